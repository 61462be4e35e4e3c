"""`python -m tests.attacks.full_disk`: a server whose data directory is on a full disk; exits with 1 if it is of no use.

The disk is a tmpfs of 24 MB, mounted in a temporary folder, which takes root. Where that can't be done all of it is skipped.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from service.jobs.disk import SPARE, free_bytes
from tests.attacks.stored_data import JOB, LONG_JOB, client_of, completed, create_job, lines, upload, wait_for
from tests.attacks.table import Table, run
from tests.model.checkpoint.checkpoints import tiny
from tests.serving import PATIENCE, banded_serve

SIZE = 24 << 20
FULL = re.compile(r"the disk for the data directory is full: (\d+) bytes are free, (\d+) are needed")
LARGE = b'{"prompt": "a", "completion": " b"}\n' * 100_000  # 3.6 MB


@contextmanager
def mounted(folder: Path) -> Iterator[bool]:
    """Whether a tmpfs could be mounted there."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    is_mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted and subprocess.run(["umount", str(folder)], capture_output=True).returncode:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)  # something of the server still ends


def fill_up(disk: Path, leave: int = 0) -> None:
    """Take all of the free bytes, or leave some."""
    with (disk / f"filler-{time.monotonic_ns()}").open("wb", buffering=0) as file:
        while (free := free_bytes(disk) - leave) > 0:
            try:
                file.write(bytes(min(free, 1 << 20)))
            except OSError:
                break


def make_room(disk: Path) -> None:
    for path in disk.glob("filler-*"):
        path.unlink()


def refusal_faults(answer: httpx.Response, free: int, needed: int) -> list[str]:
    """What is wrong with the answer to something that finds the disk full."""
    if answer.status_code != 507:
        return [f"{answer.status_code}, not 507"]
    message = answer.json()["error"]["message"]
    found = FULL.fullmatch(message)
    if not found:
        return [message]
    said = int(found[1]), int(found[2])
    return [f"says {said[0]} free and {said[1]} needed, not {free} and {needed}"] if said != (free, needed) else []


def status_faults(answer: httpx.Response, status: int = 200) -> list[str]:
    return [] if answer.status_code == status else [f"{answer.status_code}: {answer.text[:200]}"]


class FullDisk:
    """A server over a disk, and what it has stored while there was room."""

    def __init__(self, table: Table, disk: Path, url: str, model: str):
        self.table, self.disk, self.url, self.model = table, disk, url, model
        self.client = client_of(url)

    def store(self) -> None:
        """Files, and an adapter. Ahead of the others."""
        self.files = [upload(self.client, name, lines(100, ord(name))).raise_for_status().json()["id"] for name in "abcdef"]
        job = create_job(self.client, self.model, self.files[0], JOB).raise_for_status().json()["id"]
        self.adapter = wait_for(self.client, job, "succeeded")["fine_tuned_model"]
        self.texts = [self.text(name) for name in (self.model, self.adapter)]
        time.sleep(3)  # the database is copied

    def text(self, model: str) -> str:
        return str(completed(self.client, model).raise_for_status().json()["choices"][0]["text"])

    def refused(self) -> None:
        fill_up(self.disk)
        for name, data in (("a small upload", lines(1)), ("a large upload", LARGE)):
            answer = upload(self.client, "x", data)
            faults = refusal_faults(answer, free_bytes(self.disk), SPARE + len(data))
            self.table.case(name, f"{answer.status_code}", faults, "507 with the free and the needed bytes")
        answer = create_job(self.client, self.model, self.files[0], JOB)
        faults = refusal_faults(answer, free_bytes(self.disk), SPARE)
        self.table.case("a job", f"{answer.status_code}", faults, "507 with the free and the needed bytes")
        answers = at_once(8, lambda: upload(self.client, "x", lines(200)))
        statuses = sorted(answer.status_code for answer in answers)
        self.table.case("8 uploads at once", f"{statuses}", [] if {*statuses} == {507} else ["not all refused"], "507")
        self.nothing_left("after them")
        files = [each["id"] for each in self.client.get("/v1/files").json()["data"]]
        self.table.case("the list of files", f"{len(files)}", [] if len(files) == len(self.files) else ["another"], "6")

    def nothing_left(self, when: str) -> None:
        left = [path.name for path in self.disk.rglob("*.tmp*")]
        self.table.case(f"temporary files {when}", f"{len(left)}", left[:1], "0")

    def goes_on(self, when: str) -> None:
        texts = [self.text(name) for name in (self.model, self.adapter)]
        self.table.case(
            f"completions {when}", "the same" if texts == self.texts else "others", [] if texts == self.texts else texts
        )
        body = {"model": self.model, "prompt": "gate", "max_tokens": 20, "stream": True, "ignore_eos": True}
        answer = self.client.post("/v1/completions", json=body)
        is_whole = answer.text.endswith("data: [DONE]\n\n")
        self.table.case(
            f"a stream {when}", f"{answer.status_code}", status_faults(answer) + ["no end"] * (not is_whole), "200"
        )
        [line] = [
            each for each in self.client.get("/metrics").text.splitlines() if each.startswith("banded_data_free_bytes{")
        ]
        said, free = float(line.rsplit(" ", 1)[1]), free_bytes(self.disk)
        faults = [] if abs(said - free) <= SPARE else [f"{free} are free"]
        self.table.case(f"the gauge of free bytes {when}", f"{said:.0f}", faults, "what is free")

    def deletes(self) -> None:
        for file_id in self.files[1:4]:  # one after the other, and something else takes the room each time
            fill_up(self.disk)
            size = int(self.client.get(f"/v1/files/{file_id}").json()["bytes"])
            before = free_bytes(self.disk)
            answer = self.client.delete(f"/v1/files/{file_id}")
            freed = free_bytes(self.disk) - before
            faults = status_faults(answer) + ["nothing freed"] * (freed <= 0)
            self.table.case(f"DELETE of a file of {size} bytes", f"{answer.status_code}, {freed} freed", faults, "200")
        fill_up(self.disk)
        answer = self.client.delete(f"/v1/models/{self.adapter}")
        self.table.case("DELETE of a model", f"{answer.status_code}", status_faults(answer), "200")

    def cancels(self) -> None:
        make_room(self.disk)
        job = create_job(self.client, self.model, self.files[0], LONG_JOB).raise_for_status().json()["id"]
        fill_up(self.disk)
        answer = self.client.post(f"/v1/fine_tuning/jobs/{job}/cancel")
        self.table.case("cancelling a job", f"{answer.status_code}", status_faults(answer), "200")

    def a_job_waits(self) -> None:
        """It has begun when the disk becomes full."""
        make_room(self.disk)
        job = create_job(self.client, self.model, self.files[0], JOB).raise_for_status().json()["id"]
        fill_up(self.disk)
        time.sleep(15)
        path = f"/v1/fine_tuning/jobs/{job}"
        meanwhile = self.client.get(path).json()["status"]
        make_room(self.disk)
        deadline = time.monotonic() + PATIENCE
        while not (found := self.client.get(path).json())["finished_at"] and time.monotonic() < deadline:
            time.sleep(0.2)
        faults = [] if found["status"] == "succeeded" else [json.dumps(found["error"])]
        self.table.case("a job, and then there is room", f"{meanwhile}, {found['status']}", faults, "succeeded")

    def filled_meanwhile(self) -> None:
        """Uploads while something else takes the room."""
        statuses: list[int] = []
        for leave in (SPARE + len(LARGE) // 4, SPARE + len(LARGE) // 2, SPARE + len(LARGE), SPARE + len(LARGE) + (64 << 10)):
            make_room(self.disk)
            fill_up(self.disk, leave)
            filling = threading.Timer(0.3, fill_up, [self.disk])
            filling.start()
            statuses.append(upload(self.client, "x", LARGE).status_code)
            filling.join()
        faults = [] if {*statuses} <= {200, 507} else ["neither stored nor refused"]
        self.table.case("4 uploads, and it fills meanwhile", f"{statuses}", faults, "200 or 507")
        self.nothing_left("after those")
        listed = self.client.get("/v1/files").json()["data"]
        bad = [
            each["id"] for each in listed if len(self.client.get(f"/v1/files/{each['id']}/content").content) != each["bytes"]
        ]
        self.table.case("what is listed then", f"{len(listed)} files", [f"{each} is not whole" for each in bad], "whole")


def at_once(count: int, ask: Callable[[], httpx.Response]) -> list[httpx.Response]:
    found: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: found.append(ask())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def tracebacks(table: Table, log: Path) -> None:
    count = log.read_text(errors="replace").count("Traceback")
    table.case("tracebacks in the log", f"{count}", ["not 0"] * (count > 0), "0")


def attack(table: Table, disk: Path, root: Path) -> None:
    checkpoint, log = tiny("banded", root, vocab_size=50257, n_layer=2), root / "log"
    options = ("--data-dir", str(disk / "data"))
    with banded_serve(checkpoint, log, *options, OMP_WAIT_POLICY="PASSIVE") as served:
        attacked = FullDisk(table, disk, served.url, checkpoint.name)
        attacked.store()
        attacked.refused()
        attacked.goes_on("on a full disk")
    tracebacks(table, log)
    fill_up(disk)
    (disk / "data" / "files" / "file-1.jsonl.tmp").touch()  # as a killed server leaves it
    with banded_serve(checkpoint, log, *options, OMP_WAIT_POLICY="PASSIVE") as served:
        attacked.client, attacked.url = client_of(served.url), served.url
        table.case("a start on a full disk", "ready")
        attacked.nothing_left("after a start")
        attacked.goes_on("after it")
        attacked.deletes()
        attacked.cancels()
        attacked.a_job_waits()
        attacked.filled_meanwhile()
        make_room(disk)
        answer = upload(attacked.client, "x", LARGE)
        table.case("an upload when there is room again", f"{answer.status_code}", status_faults(answer), "200")
    tracebacks(table, log)


def main(arguments: Any = None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        disk, table = Path(temporary) / "disk", Table("a full disk", "as each line says")
        disk.mkdir()
        with mounted(disk) as is_mounted:
            if is_mounted:
                attack(table, disk, Path(temporary))
            else:
                table.skip("a full disk", "cannot mount a tmpfs")
        return table.end()


if __name__ == "__main__":
    run(main)
