"""`python -m tests.attacks.stored_data`: whether a start loses what is stored; exits with 1 if it does.

It fills a data directory over HTTP: files, an adapter that a job has made, a job that runs and one that waits. Then it
damages a copy of it, a kind at a time, and starts `banded serve` on it. The start serves everything that was not damaged, or
refuses in one line; then it does what the line says and starts again. Then servers are killed in the middle of uploads,
deletions and jobs. `--only WORD`: the cases whose names contain the word.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.attacks.damage import DAMAGES, DATABASE, Damage, Stored
from tests.attacks.forks import IDLE_JOB, end, import_server, started
from tests.attacks.table import Table, run
from tests.serving import PATIENCE

MUST = "0 bytes lost, no traceback, served or refused in a line"
NUM_KILLS = 10
WORDS = ["apple", "bird", "cloud", "door", "egg", "fox", "gate", "hill"]
JOB: dict[str, Any] = {"seed": 1, "hyperparameters": {"n_epochs": 1, "batch_size": 256, "rank": 1}}
LONG_JOB: dict[str, Any] = {"seed": 1, "hyperparameters": {"n_epochs": 50, "batch_size": 1, "rank": 1}}


def lines(count: int, seed: int = 0) -> bytes:
    chance = random.Random(seed)
    pairs = ({"prompt": f"{chance.choice(WORDS)} {number} =>", "completion": " done"} for number in range(count))
    return "".join(json.dumps(pair) + "\n" for pair in pairs).encode()


def client_of(url: str, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=60, **options)


def upload(client: httpx.Client, name: str, content: bytes) -> httpx.Response:
    return client.post("/v1/files", files={"file": (f"{name}.jsonl", content)}, data={"purpose": "fine-tune"})


def create_job(client: httpx.Client, model: str, file_id: str, job: dict[str, Any]) -> httpx.Response:
    return client.post("/v1/fine_tuning/jobs", json={"model": model, "training_file": file_id, "suffix": "s"} | job)


def wait_for(client: httpx.Client, job_id: str, status: str) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE
    while (job := client.get(f"/v1/fine_tuning/jobs/{job_id}").json())["status"] != status:
        if time.monotonic() > deadline or job["finished_at"]:
            raise RuntimeError(f"the job did not come to be {status}: {job}")
        time.sleep(0.2)
    return dict(job)


def completed(client: httpx.Client, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "gate 1 =>", "max_tokens": 4, "temperature": 0}
    return client.post("/v1/completions", json=body)


def fill(checkpoint: Path, directory: Path, root: Path) -> tuple[Stored, Path]:
    """Fill a data directory. Also a copy of it as a server left it that was killed."""
    files, jobs, older, killed = {}, {}, root / "older.sqlite", root / "killed"
    with started(checkpoint, directory, root / "log") as start, client_of(start.url) as client:

        def add(name: str, content: bytes) -> str:
            answer = upload(client, name, content).raise_for_status()
            files[name] = answer.json()["id"], content
            return files[name][0]

        add("A", lines(8))
        with closing(sqlite3.connect(directory / DATABASE)) as db, closing(sqlite3.connect(older)) as copy:
            db.backup(copy)
        add("B", lines(20, 1))
        first = create_job(client, checkpoint.name, files["A"][0], JOB).raise_for_status().json()["id"]
        adapter = wait_for(client, first, "succeeded")["fine_tuned_model"]
        jobs["1"] = first, "succeeded"
        text = completed(client, adapter).raise_for_status().json()["choices"][0]["text"]
        num_events = len(client.get(f"/v1/fine_tuning/jobs/{first}/events?limit=100").json()["data"])
        add("C", lines(2000, 2))
        for number, status in (("2", "running"), ("3", "validating_files")):
            jobs[number] = (
                create_job(client, checkpoint.name, files["C"][0], LONG_JOB).raise_for_status().json()["id"],
                status,
            )
        wait_for(client, jobs["2"][0], "running")
        time.sleep(3)  # the database is copied
    shutil.copytree(directory, killed)
    with started(checkpoint, directory, root / "log", IDLE_JOB) as start:
        assert end(start) == 0, start.log.read_text()
    return Stored(files, jobs, num_events, adapter, text, older), killed


def content(directory: Path) -> Counter[tuple[str, int]]:
    """What was sent and what was learnt, wherever it is: hashes and lengths."""
    found: Counter[tuple[str, int]] = Counter()
    for path in directory.rglob("*"):
        is_content = ".jsonl" in path.name or any(part.startswith("ftjob-") for part in path.parent.parts)
        if is_content and path.is_file() and path.name != "log" and not path.is_symlink():
            data = path.read_bytes()
            found[hashlib.sha256(data).hexdigest(), len(data)] += 1
    return found


def lost_bytes(before: Counter[tuple[str, int]], directory: Path) -> int:
    return sum(size * count for (_, size), count in (before - content(directory)).items())


def answer_of(answer: httpx.Response) -> str:
    try:
        return f"{answer.status_code} {answer.json()['error']['code']}"
    except (ValueError, KeyError):
        return f"{answer.status_code}"


def seen(client: httpx.Client, stored: Stored) -> dict[str, str]:
    """What the server tells of each thing: "served", or how it refuses."""
    found = {}
    for name, (file_id, data) in stored.files.items():
        answer = client.get(f"/v1/files/{file_id}/content")
        known = client.get(f"/v1/files/{file_id}")
        if answer.status_code == known.status_code == 200:
            is_same = answer.content == data and known.json()["filename"] == f"{name}.jsonl"
            found[f"file {name}"] = "served" if is_same else "another content"
        else:
            found[f"file {name}"] = answer_of(answer)
    for number, (job_id, status) in stored.jobs.items():
        answer = client.get(f"/v1/fine_tuning/jobs/{job_id}")
        is_same = answer.status_code == 200 and answer.json()["status"] == status
        found[f"job {number}"] = "served" if is_same else answer.json().get("status") or answer_of(answer)
    answer = client.get(f"/v1/fine_tuning/jobs/{stored.jobs['1'][0]}/events?limit=100")
    count = len(answer.json().get("data", ()))
    found["events"] = answer_of(answer) if answer.status_code != 200 else f"{count} events"
    if count == stored.num_events:
        found["events"] = "served"
    answer = completed(client, stored.adapter)
    is_same = answer.status_code == 200 and answer.json()["choices"][0]["text"] == stored.text
    found["adapter"] = "served" if is_same else answer_of(answer) if answer.status_code != 200 else "another text"
    for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/models", "/metrics"):
        if (answer := client.get(path)).status_code != 200:
            found[path] = answer_of(answer)
    return found


class Outcome(NamedTuple):
    """Of one start, or of two: the first was refused, and the second came after what it said was done."""

    refusal: list[str] | None  # what the first one said; None: it served
    status: int | None  # of the last start, None if it served
    lost: int  # bytes
    num_tracebacks: int
    seen: dict[str, str]

    def faults(self, damage: Damage, stored: Stored) -> list[str]:
        """What is wrong with it."""
        found = [f"{self.lost} bytes lost"] * (self.lost > 0)
        found += [f"{self.num_tracebacks} tracebacks"] * (self.num_tracebacks > 0)
        if damage.refused is not None and damage.refused != (self.refusal is not None):
            found.append("not refused" if damage.refused else f"refused: {' '.join(self.refusal or ())}")
        if self.refusal is not None and len(self.refusal) != 1:
            found.append(f"{len(self.refusal)} lines: {' '.join(self.refusal)[-100:]}")
        if self.status is not None:
            is_right = self.status == 2 and is_final(self.refusal, damage)
            return found if is_right else [*found, f"status {self.status}"]
        expected = {**dict.fromkeys(stored.names, "served"), **damage.hides}
        found += [
            f"{name}: {answer}" for name, answer in self.seen.items() if answer not in expected.get(name, "").split(" or ")
        ]
        return found


def is_final(refusal: list[str] | None, damage: Damage) -> bool:
    """Whether nothing was to be done about a refusal with the directory itself."""
    return refusal is not None and (damage.is_newer or not way_out(refusal))


def way_out(refusal: list[str]) -> list[str]:
    """The command that a refusal tells to run, if it does."""
    found = re.search(r"\((mv .+?)\)", " ".join(refusal))
    return shlex.split(found[1]) if found else []


def attempt(checkpoint: Path, directory: Path, stored: Stored) -> Outcome:
    before, refusal, num_tracebacks = content(directory), None, 0
    for _ in range(2):
        with started(checkpoint, directory, directory.with_suffix(".log"), IDLE_JOB) as start:
            found = {}
            if start.status is None:
                with client_of(start.url) as client:
                    found = seen(client, stored)
        num_tracebacks += start.log.read_text(errors="replace").count("Traceback")
        if start.status is None or refusal is not None:
            break
        refusal = start.said()
        if not (command := way_out(refusal)):
            break
        subprocess.run(command, check=True)
    return Outcome(refusal, start.status, lost_bytes(before, directory), num_tracebacks, found)


def shown(outcome: Outcome) -> str:
    start = "served" if outcome.refusal is None else "refused, served" if outcome.status is None else "refused"
    hidden = sorted({f"{name}: {answer}" for name, answer in outcome.seen.items() if answer != "served"})
    more = f"; {hidden[0]}" + (f" and {len(hidden) - 1} more" if len(hidden) > 1 else "") if hidden else ""
    return f"{outcome.lost} lost, {outcome.num_tracebacks} tracebacks, {start}{more}"


class Ledger:
    """What servers have told to be stored and deleted, while they were killed."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.deleted: set[str] = set()
        self.unsure: dict[str, bytes] = {}  # asked to be deleted, without an answer
        self.jobs: dict[str, str | None] = {}  # ids; "cancelled", or None where it may have any status

    def check(self, client: httpx.Client) -> list[str]:
        """In what the server differs from what it, or the one before it, has told. What was half deleted can be deleted."""
        found = []
        for file_id, data in (self.files | self.unsure).items():
            answer = client.get(f"/v1/files/{file_id}/content")
            if answer.status_code == 404 and file_id in self.unsure:
                client.delete(f"/v1/files/{file_id}")
                self.deleted.add(file_id)
                del self.unsure[file_id]
            elif answer.content != data:
                found.append(f"{file_id}: {answer_of(answer)}")
        found += [f"{each} is back" for each in self.deleted if client.get(f"/v1/files/{each}").status_code != 404]
        for job_id, status in self.jobs.items():
            answer = client.get(f"/v1/fine_tuning/jobs/{job_id}")
            if answer.status_code != 200 or status not in (None, answer.json()["status"]):
                found.append(f"{job_id}: {answer.json().get('status') or answer_of(answer)}")
        listed = client.get("/v1/files").json()["data"]
        found += [f"{each['id']} can't be read" for each in listed if client.get(f"/v1/files/{each['id']}/content").is_error]
        return found

    def act(self, client: httpx.Client, model: str, chance: random.Random) -> None:
        """Do one thing. Raises httpx.TransportError if the server ends meanwhile."""
        kind = chance.choice(("upload", "upload", "upload", "delete", "delete", "job", "cancel"))
        if kind == "upload":
            data = lines(chance.choice((1, 100, 3000)), chance.randrange(1 << 30))
            answer = upload(client, "x", data).raise_for_status()
            self.files[answer.json()["id"]] = data
        elif kind == "delete" and self.files:
            file_id = chance.choice([*self.files])
            self.unsure[file_id] = self.files.pop(file_id)
            answer = client.delete(f"/v1/files/{file_id}")
            if answer.status_code == 409:  # a job needs it
                self.files[file_id] = self.unsure.pop(file_id)
            elif answer.status_code == 200:
                del self.unsure[file_id]
                self.deleted.add(file_id)
        elif kind == "job" and self.files:
            answer = create_job(client, model, chance.choice([*self.files]), JOB)
            if answer.status_code == 200:
                self.jobs[answer.json()["id"]] = None
        elif kind == "cancel" and self.jobs:
            job_id = chance.choice([*self.jobs])
            if client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").status_code == 200:
                self.jobs[job_id] = "cancelled"


def kill_in_the_middle(checkpoint: Path, directory: Path, ledger: Ledger, seed: int) -> tuple[str, list[str]]:
    """A server of which a client wants something until it is killed. Ahead of that, what came of the one before it."""
    chance, num_done = random.Random(seed), 0

    def go_on() -> None:
        nonlocal num_done
        try:
            with suppress(httpx.TransportError), client_of(start.url) as client:
                while True:
                    ledger.act(client, checkpoint.name, chance)
                    num_done += 1
        except httpx.HTTPStatusError as error:
            faults.append(str(error).splitlines()[0])

    temporary = {(path, path.stat().st_mtime_ns) for path in directory.rglob("*.tmp*")}
    with started(checkpoint, directory, directory.with_suffix(".log")) as start:
        if start.status is not None:
            return "refused", [f"status {start.status}", *start.said()[-1:]]
        with client_of(start.url) as client:
            faults = ledger.check(client)
        faults += [f"{path.name} is left" for path, time in temporary if path.exists() and path.stat().st_mtime_ns == time]
        going_on = threading.Thread(target=go_on)
        going_on.start()
        seconds = chance.uniform(0.2, 4)
        time.sleep(seconds)
        os.kill(start.pid, signal.SIGKILL)
        going_on.join()
    faults += ["a traceback"] * start.log.read_text(errors="replace").count("Traceback")
    return f"killed after {seconds:.1f} s and {num_done} changes", faults


def end_of_kills(checkpoint: Path, directory: Path, ledger: Ledger) -> tuple[str, list[str]]:
    """All is as it was told, and a job that was begun goes on to its end."""
    with started(checkpoint, directory, directory.with_suffix(".log")) as start, client_of(start.url) as client:
        faults = ledger.check(client)
        unfinished = [
            job_id for job_id in ledger.jobs if not client.get(f"/v1/fine_tuning/jobs/{job_id}").json()["finished_at"]
        ]
        for job_id in unfinished[1:]:
            client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
        try:
            for job_id in unfinished[:1]:
                wait_for(client, job_id, "succeeded")
        except RuntimeError as error:
            faults.append(str(error))
    kept = f"{len(ledger.files)} files, {len(ledger.deleted)} deleted, {len(ledger.jobs)} jobs"
    return f"{kept}; {len(unfinished[:1])} unfinished job goes on", faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD")
    only = parser.parse_args().only
    import_server()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        # In a process of its own: what computes here would leave threads that a fork lacks.
        code = "import sys; from pathlib import Path; from tests.model.checkpoint.checkpoints import tiny;"
        code += "tiny('banded', Path(sys.argv[1]), vocab_size=50257, n_layer=2)"
        subprocess.run([sys.executable, "-c", code, temporary], check=True)
        checkpoint, table = root / "banded", Table("damage to a data directory", MUST)
        stored, killed = fill(checkpoint, root / "clean", root)
        for damage in DAMAGES:
            if only in damage.name:
                directory = Path(shutil.copytree(killed if damage.is_killed else root / "clean", root / "damaged"))
                damage.do(directory, stored)
                outcome = attempt(checkpoint, directory, stored)
                table.case(damage.name, shown(outcome), outcome.faults(damage, stored))
                shutil.rmtree(directory)
        ledger = Ledger()
        for seed in range(NUM_KILLS):
            if only in (name := f"kill -9: round {seed + 1}"):
                table.case(name, *kill_in_the_middle(checkpoint, root / "rounds", ledger, seed))
        if only in (name := "kill -9: the end"):
            table.case(name, *end_of_kills(checkpoint, root / "rounds", ledger))
        return table.end()


if __name__ == "__main__":
    run(main)
