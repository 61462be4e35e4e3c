"""Files and fine-tuning jobs over HTTP, with a fake engine and processes that do what a test says."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

import service.jobs.runner
import service.jobs.store
from service.api.app import create_app
from service.api.routes.files import OpenFile
from service.engine.loading import LoadError
from service.engine.models import ModelEntry, Models
from service.jobs.runner import Jobs
from service.jobs.store import Hyperparameters, Store, StoreFullError
from service.settings import Settings
from tests.conformance import contract
from tests.service.api.helpers import served
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run, settings_of
from tests.serving import JOB_COMMAND

GOOD = [{"prompt": f"{word} =>", "completion": f" {word}s"} for word in ("cat", "dog", "bird")]
LINE = '{"prompt": "b", "completion": " c"}'
# A file as part of a form.
UPLOADED = f'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n{LINE}\r\n'
ADVICE = "begin every completion with a space, as words are tokens with one: line 4"
# Slowly writes what a run writes: the report, a row for every update, then the result.
PROCESS = """
import csv, json, os, signal, sys, time
from pathlib import Path
if {deaf}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
arguments = sys.argv[1:]
out = Path(arguments[arguments.index("--out") + 1])
(out / "arguments.json").write_text(json.dumps([arguments, os.getsid(0) == os.getpid()]))
report = Path(arguments[arguments.index("--report") + 1])
found = {{"examples": 3, "tokens": 20, "advice": []}}
files = [found | {{"advice": [{advice!r}]}}, found]
report.with_suffix(".tmp").write_text(json.dumps({{"files": files, "updates": {updates}}}))
report.with_suffix(".tmp").rename(report)
path = out / "loss.csv"
header = ["update", "examples", "loss", "learning_rate", "gradient_norm", "held_out_loss"]
rows = list(csv.reader(path.open())) if path.exists() else [header]
for update in range(len(rows), {updates} + 1):
    rows.append([update, 8 * update, 5 - update, 0.001, 1.0, 4.5 if update == {updates} else ""])
    with path.with_suffix(".tmp").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    path.with_suffix(".tmp").rename(path)
    time.sleep({seconds})
if {status} > 0:
    print("banded: it went wrong", file=sys.stderr)
if {status} < 0:
    os.kill(os.getpid(), -{status})
sys.exit({status})
"""


class FakeLoader:
    def __init__(self, base: ModelEntry) -> None:
        self.base = base
        self.loaded: list[tuple[str, Path]] = []
        self.unloaded: list[str] = []

    async def load(self, name: str, directory: Path) -> ModelEntry:
        self.loaded.append((name, directory))
        return self.base._replace(name=name, parent=self.base.name)

    async def unload(self, served: ModelEntry) -> None:
        self.unloaded.append(served.name)


class Api(NamedTuple):
    client: httpx.AsyncClient
    store: Store
    jobs: Jobs
    loader: FakeLoader

    async def get(self, path: str) -> Any:
        answer = await self.client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def upload(self, lines: list[Any] | str = GOOD, name: str = "data.jsonl") -> str:
        content = lines if isinstance(lines, str) else "\n".join(map(json.dumps, lines))
        answer = await self.client.post("/v1/files", files={"file": (name, content)}, data={"purpose": "fine-tune"})
        assert answer.status_code == 200, answer.text
        file_id: str = answer.json()["id"]
        return file_id

    async def create(self, **fields: Any) -> Any:
        answer = await self.client.post("/v1/fine_tuning/jobs", json={"model": "fake", **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def ended(self, job_id: str) -> Any:
        while (job := await self.get(f"/v1/fine_tuning/jobs/{job_id}"))["finished_at"] is None:
            await asyncio.sleep(0.02)
        return job

    async def messages(self, job_id: str) -> list[str]:
        """The messages of a job's events, in order."""
        events = (await self.get(f"/v1/fine_tuning/jobs/{job_id}/events?limit=100"))["data"]
        return [event["message"] for event in reversed(events)]


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Sets what a job's process does."""

    def become(updates: int = 3, seconds: float = 0.0, status: int = 0, *, deaf: bool = False) -> None:
        path = tmp_path / "process.py"
        path.write_text(PROCESS.format(updates=updates, seconds=seconds, status=status, advice=ADVICE, deaf=deaf))
        monkeypatch.setattr(service.jobs.runner, "COMMAND", (sys.executable, str(path)))

    monkeypatch.setattr(service.jobs.runner, "POLL_SECONDS", 0.05)
    become()
    return become


@asynccontextmanager
async def serving(directory: Path, **options: Any) -> AsyncIterator[Api]:
    fake = FakeEngine()
    base = served(fake).base._replace(num_parameters=1_000_000)
    loader = FakeLoader(base)
    models, store = Models([base], loader), Store(directory)
    jobs = Jobs(store, models, Path("/models/fake"))
    app = create_app(models, fake.metrics, Settings(**{"max_adapters": 4} | options), jobs)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        yield Api(client, store, jobs, loader)


def test_an_upload_is_charged_for_its_tokens_at_most_for_a_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.limits.MINUTE", 1e9)  # nothing is refilled

    async def test() -> None:
        async with serving(tmp_path, api_keys=("a",), limit_requests=9, limit_tokens=100) as api:
            api.client.headers["authorization"] = "Bearer a"
            for status, lines, left in ((200, GOOD, "88"), (200, GOOD * 20, "0"), (429, GOOD, "0")):
                content = "\n".join(map(json.dumps, lines))
                answer = await api.client.post(
                    "/v1/files", files={"file": ("data.jsonl", content)}, data={"purpose": "fine-tune"}
                )
                assert (answer.status_code, answer.headers["x-ratelimit-remaining-tokens"]) == (status, left)
            assert answer.headers["x-ratelimit-remaining-requests"] == "6"
            assert len((await api.get("/v1/files"))["data"]) == 2

    run(test)


def test_an_upload_that_is_refused_is_charged_for_what_was_tokenized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.api.limits.MINUTE", 1e9)  # nothing is refilled

    async def test() -> None:
        async with serving(tmp_path, api_keys=("a",), limit_requests=9, limit_tokens=100) as api:
            content = "\n".join([*map(json.dumps, GOOD), "no JSON"])
            answer = await api.client.post(
                "/v1/files",
                files={"file": ("data.jsonl", content)},
                data={"purpose": "fine-tune"},
                headers={"authorization": "Bearer a"},
            )
            assert (answer.status_code, answer.headers["x-ratelimit-remaining-tokens"]) == (400, "88")

    run(test)


def test_a_file_is_kept_listed_read_and_deleted(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path) as api:
            first, second = await api.upload(), await api.upload(LINE, "notes.txt")
            found = await api.get(f"/v1/files/{second}")
            assert found == {
                "id": second,
                "object": "file",
                "bytes": len(LINE),
                "created_at": pytest.approx(time.time(), abs=5),
                "filename": "notes.txt",
                "purpose": "fine-tune",
                "status": "processed",
            }
            assert [file["id"] for file in (await api.get("/v1/files"))["data"]] == [second, first]
            assert (await api.client.get(f"/v1/files/{second}/content")).text == LINE
            answer = await api.client.delete(f"/v1/files/{second}")
            assert answer.json() == {"id": second, "object": "file", "deleted": True}
        async with serving(tmp_path) as api:
            assert [file["id"] for file in (await api.get("/v1/files"))["data"]] == [first], "after a restart too"
            answer = await api.client.get(f"/v1/files/{second}")
            assert answer.status_code == 404
            assert answer.json()["error"]["message"] == f"there is no file '{second}'"

    run(test)


def test_a_file_that_is_deleted_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    path, content, sent = tmp_path / "file.jsonl", LINE.encode() * 5000, []
    path.write_bytes(content)

    async def send(message: MutableMapping[str, Any]) -> None:
        path.unlink(missing_ok=True)  # when the head goes out, ahead of the content
        sent.append(message.get("body", b""))

    response = OpenFile(path)
    run(lambda: response({"type": "http", "method": "GET", "headers": []}, no_more, send))
    assert b"".join(sent) == content
    assert response._file.closed


async def no_more() -> dict[str, Any]:
    await asyncio.sleep(60)
    return {"type": "http.disconnect"}


@contract("fine_tuning", "file", "one whose content is gone or cut short is a 404 with the reason; the others are served")
@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (Path.unlink, "is gone from the data directory"),
        (lambda path: os.truncate(path, 3), f"has 3 bytes in the data directory, not the {len(LINE)} that were sent"),
        (lambda path: (path.unlink(), path.mkdir()), "is gone from the data directory"),
    ],
)
def test_a_file_whose_content_is_not_what_was_sent(tmp_path: Path, harm: Callable[[Path], object], reason: str) -> None:
    async def test() -> None:
        async with serving(tmp_path) as api:
            harmed, whole = await api.upload(LINE), await api.upload(LINE)
            message = f"the content of file '{harmed}' {reason}: delete the file and send it again"
            waiting = api.store.add_job("", "fake", "", 0, Hyperparameters(1, 1, 1.0, 1), whole, harmed)
            harm(api.store.path_of(harmed))
            answer = await api.client.get(f"/v1/files/{harmed}/content")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "file_content_missing")
            assert answer.json()["error"]["message"] == message
            assert (await api.client.get(f"/v1/files/{whole}/content")).text == LINE
            body = {"model": "fake", "training_file": whole, "validation_file": harmed}
            answer = await api.client.post("/v1/fine_tuning/jobs", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "validation_file")
            assert answer.json()["error"]["message"] == message
            api.jobs.notice()
            assert (await api.ended(waiting.id))["error"]["message"] == f"the content of file '{harmed}' {reason}"
            assert (await api.client.delete(f"/v1/files/{harmed}")).status_code == 200

    run(test)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json": {"file": "x"}}, "a file is sent as multipart/form-data"),
        ({"files": {"file": ("a", b"x")}}, "'purpose': 'fine-tune' is the only one, got 'None'"),
        (
            {"files": {"file": ("a", b"x")}, "data": {"purpose": "batch"}},
            "'purpose': 'fine-tune' is the only one, got 'batch'",
        ),
        ({"files": {"file": ("a", b"")}, "data": {"purpose": "fine-tune"}}, "'file': it is empty"),
        (
            {"files": {"file": ("a" * 256, b"x")}, "data": {"purpose": "fine-tune"}},
            "'file': its name has 256 characters, at most 255 are taken",
        ),
        ({"files": {"other": ("a", b"x")}, "data": {"purpose": "fine-tune"}}, "unknown field 'other'"),
        ({"files": {"purpose": (None, "fine-tune")}}, "'file': a file is needed"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "Missing boundary in multipart."),
        ({"files": {"file": ("a", b"x")}, "data": {"purpose": "x" * 1025}}, "Part exceeded maximum size of 1KB."),
        (
            {"files": {"file": ("a", b"x")}, "data": {str(i): "" for i in range(9)}},
            "Too many fields. Maximum number of fields is 8.",
        ),
    ],
)
def test_uploads_that_are_none(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    async def test() -> None:
        async with serving(tmp_path) as api:
            answer = await api.client.post("/v1/files", **options)
            assert answer.status_code == 400
            assert answer.json()["error"]["message"] == message

    run(test)


@contract("fine_tuning", "file", "a form in another charset than UTF-8: 400")
@pytest.mark.parametrize(
    "charset",
    ["undefined", "punycode", "unicode_escape", "raw_unicode_escape", "idna", "latin-1", "utf-16", "zlib", "x\u00e9"],
)
def test_a_form_in_another_charset(tmp_path: Path, charset: str) -> None:
    async def test() -> None:
        async with serving(tmp_path) as api:
            form = f'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n{UPLOADED}--b--\r\n'
            for name, status in ((charset, 400), ("utf-8", 200), ('"UTF8"', 200)):
                content_type = f"multipart/form-data; boundary=b; charset={name}".encode()
                answer = await api.client.post("/v1/files", content=form, headers={b"content-type": content_type})
                assert answer.status_code == status, answer.text
                if status == 400:
                    assert "but this server reads UTF-8 only" in answer.json()["error"]["message"]

    run(test)


@contract("fine_tuning", "training_file", "a lone surrogate in an id: 400")
@pytest.mark.parametrize("field", ["training_file", "validation_file"])
def test_an_id_that_is_no_text(tmp_path: Path, field: str) -> None:
    async def test() -> None:
        async with serving(tmp_path) as api:
            body = {"model": "fake", "training_file": await api.upload(), field: "file-\ud800"}
            content, headers = json.dumps(body), {"content-type": "application/json"}
            answer = await api.client.post("/v1/fine_tuning/jobs", content=content, headers=headers)
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["message"] == f"'{field}': holds a lone surrogate, which is no character"
            assert error["param"] == field

    run(test)


@contract("fine_tuning", "file", "what a job would refuse is refused at once, by its line")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("any text", "'file': notes.txt, line 1: not JSON: Expecting value: line 1 column 1 (char 0)"),
        (LINE + '\n\n{"prompt": "a"}', "'file': notes.txt, line 3: expected an object of "),
        ("\n", "'file': notes.txt holds no examples"),
        (b"\xff", "'file': notes.txt is not UTF-8: "),
        (LINE + "\n" + LINE.replace("b", "word " * 300), "'file': the model's context is 256 tokens; longer, up to "),
        (LINE.replace("b", "-" * 50_000), "'file': the model's context is 256 tokens; longer, up to 391: line 1"),
        (LINE + "\n" + "x" * (2**20 + 1), "'file': notes.txt, line 2: has 1048577 characters, at most 1048576 are read"),
    ],
)
def test_files_that_no_job_could_learn_from(tmp_path: Path, content: str | bytes, message: str) -> None:
    async def test() -> None:
        async with serving(tmp_path) as api:
            files = {"file": ("notes.txt", content)}
            answer = await api.client.post("/v1/files", files=files, data={"purpose": "fine-tune"})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")
            assert answer.json()["error"]["message"].startswith(message)
            assert (await api.get("/v1/files"))["data"] == []
            await api.upload("\ufeff" + LINE + "\r\n\r\n" + LINE)

    run(test)


def test_no_more_is_kept_than_there_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.jobs.store, "MAX_FILES", 2)
    monkeypatch.setattr(service.jobs.store, "MAX_TOTAL_BYTES", 200)

    async def test() -> None:
        async with serving(tmp_path) as api:
            await api.upload(LINE.ljust(120))
            for content, message in (
                (LINE.ljust(100), "files take 120 bytes; 100 more are over the limit of 200"),
                (LINE, "2 files are stored, as many as there may be: delete one"),
            ):
                answer = await api.client.post("/v1/files", files={"file": ("a", content)}, data={"purpose": "fine-tune"})
                assert answer.status_code == 413
                assert answer.json()["error"]["message"] == message
                if len(content) == 100:
                    await api.upload(LINE)

    run(test)


def test_a_server_that_keeps_nothing_says_so() -> None:
    async def test() -> None:
        fake = FakeEngine()
        app = create_app(served(fake), fake.metrics, settings_of())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for method, path in (("POST", "/v1/files"), ("GET", "/v1/files"), ("GET", "/v1/fine_tuning/jobs")):
                answer = await client.request(method, path)
                assert answer.status_code == 404
                assert answer.json()["error"]["message"] == "this server keeps no files: start it with --data-dir"

    run(test)


def test_a_job_from_its_files_to_its_model(tmp_path: Path, process: Callable[..., None]) -> None:
    async def test() -> None:
        async with serving(tmp_path) as api:
            training, validation = await api.upload([*GOOD, {"prompt": "odd", "completion": "one"}]), await api.upload()
            parameters = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5, "rank": 4}
            job = await api.create(
                training_file=training, validation_file=validation, suffix="mine", seed=7, hyperparameters=parameters
            )
            assert job["status"] == "validating_files"
            done = await api.ended(job["id"])
            name = f"ft:fake:mine:{job['id'][-8:]}"
            assert (done["status"], done["fine_tuned_model"], done["error"]) == ("succeeded", name, None)
            assert done["hyperparameters"] == parameters | {"batch_size": 8}
            assert done["trained_tokens"] == 2 * 20
            directory = tmp_path / "jobs" / job["id"]
            assert api.loader.loaded == [(name, directory)]
            arguments, leads_a_session = json.loads((directory / "arguments.json").read_text())
            assert arguments == [
                *(
                    str(tmp_path / "files" / f"{training}.jsonl"),
                    "--resume",
                    "--model",
                    "/models/fake",
                    "--out",
                    str(directory),
                ),
                *("--report", str(directory / "report.json")),
                *("--epochs", "2", "--batch", "8", "--learning-rate", "0.0005", "--rank", "4", "--seed", "7"),
                *("--valid", str(tmp_path / "files" / f"{validation}.jsonl")),
            ]
            assert leads_a_session
            messages = await api.messages(job["id"])
            assert f"{training}: {ADVICE}" in messages
            assert [message for message in messages if not message.startswith("file-")] == [
                f"Created job {job['id']}",
                "Files validated",
                "The job has started",
                "Step 1: training loss 4.0000",
                "Step 2: training loss 3.0000",
                "Step 3: training loss 2.0000, validation loss 4.5000",
                f"New model: {name}",
                "The job has succeeded",
            ]
            [checkpoint] = (await api.get(f"/v1/fine_tuning/jobs/{job['id']}/checkpoints"))["data"]
            assert (checkpoint["fine_tuned_model_checkpoint"], checkpoint["step_number"]) == (name, 3)
            assert checkpoint["metrics"] == {"step": 3, "train_loss": 2.0, "valid_loss": 4.5, "full_valid_loss": 4.5}
            assert (await api.get(f"/v1/models/{name}"))["parent"] == "fake"
            answer = await api.client.post("/v1/fine_tuning/jobs", json={"model": name, "training_file": training})
            assert answer.json()["error"]["message"] == f"'model': '{name}' is an adapter; fine-tune 'fake'"

            assert (await api.client.delete(f"/v1/models/{name}")).json() == {"id": name, "object": "model", "deleted": True}
            assert api.loader.unloaded == [name]
            assert (await api.client.get(f"/v1/models/{name}")).status_code == 404
            assert not directory.exists()
            answer = await api.client.delete("/v1/models/fake")
            assert answer.json()["error"]["message"] == "'fake' is not the result of a job: it can't be deleted"

    run(test)


def test_a_wrong_file_is_found_by_the_process_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is a real `banded finetune`, at the priority of the server."""
    monkeypatch.setattr(service.jobs.runner, "COMMAND", JOB_COMMAND)

    async def test() -> None:
        async with serving(tmp_path) as api:
            file_id = api.store.add_file("", "older.jsonl", "fine-tune", b"{}").id  # kept before uploads were checked
            job = await api.ended((await api.create(training_file=file_id))["id"])
            assert (job["status"], job["trained_tokens"]) == ("failed", None)
            reason = f'{file_id}.jsonl, line 1: expected an object of "prompt" and "completion", got \'{{}}\''
            assert job["error"]["message"] == reason
            assert not (tmp_path / "jobs" / job["id"]).exists()

    run(test)


def test_a_process_that_fails_is_quoted(tmp_path: Path, process: Callable[..., None]) -> None:
    process(updates=1, status=2)

    async def test() -> None:
        async with serving(tmp_path) as api:
            job = await api.ended((await api.create(training_file=await api.upload()))["id"])
            assert (job["status"], job["fine_tuned_model"]) == ("failed", None)
            assert job["error"] == {"code": "job_failed", "message": "it went wrong", "param": None}
            assert (await api.messages(job["id"]))[-1] == "The job has failed: it went wrong"
            assert not (tmp_path / "jobs" / job["id"]).exists()
            process()
            assert (await api.ended((await api.create(training_file=await api.upload()))["id"]))["status"] == "succeeded"

    run(test)


def test_a_process_that_is_killed_has_failed_and_one_that_is_told_to_end_goes_on(
    tmp_path: Path, process: Callable[..., None]
) -> None:
    async def test() -> None:
        async with serving(tmp_path) as api:
            process(updates=1, status=-signal.SIGKILL)
            job = await api.ended((await api.create(training_file=await api.upload()))["id"])
            assert job["error"]["message"] == "its process was ended by SIGKILL"
            process(updates=1, status=-signal.SIGTERM)
            job = await api.create(training_file=await api.upload())
            while (await api.messages(job["id"])).count("The job goes on") < 2:
                await asyncio.sleep(0.02)
            process(updates=2)
            assert (await api.ended(job["id"]))["status"] == "succeeded"

    run(test)


def test_a_result_that_can_not_be_served_has_failed(tmp_path: Path, process: Callable[..., None]) -> None:
    async def test() -> None:
        async with serving(tmp_path) as api:

            async def load(name: str, directory: Path) -> ModelEntry:
                raise LoadError(f"{name} is for other weights")

            api.loader.load = load  # type: ignore[method-assign]
            job = await api.ended((await api.create(training_file=await api.upload()))["id"])
            assert job["error"]["message"] == f"ft:fake::{job['id'][-8:]} is for other weights"

    run(test)


def test_a_disk_that_fails_for_a_while_stops_no_later_job(
    tmp_path: Path, process: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    process(updates=1000, seconds=0.05)
    add_metrics, end_job = Store.add_metrics, Store.end_job
    failures = iter(range(3))

    def failing_metrics(store: Store, *arguments: Any) -> None:
        if next(failures, None) is not None:
            raise sqlite3.OperationalError("database or disk is full")
        add_metrics(store, *arguments)

    def failing_end(store: Store, job_id: str, status: Any, **fields: Any) -> bool:
        if status == "failed":  # after failing metrics
            process()
            raise sqlite3.OperationalError("database or disk is full")
        return end_job(store, job_id, status, **fields)

    monkeypatch.setattr(Store, "add_metrics", failing_metrics)
    monkeypatch.setattr(Store, "end_job", failing_end)

    async def test() -> None:
        async with serving(tmp_path) as api:
            job = await api.create(training_file=await api.upload())
            assert (await api.ended(job["id"]))["status"] == "succeeded"
            assert next(failures, None) is None

    run(test)


async def waiting_for_room(api: Api, caplog: pytest.LogCaptureFixture) -> Any:
    """A job whose process has found the disk full."""
    job = await api.create(training_file=await api.upload())
    while not caplog.messages:
        await asyncio.sleep(0.02)
    return job


def test_a_process_that_found_the_disk_full_goes_on_although_there_seems_to_be_room(
    tmp_path: Path, process: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """What it could not write is gone, and with it the proof that the disk was full."""
    process(status=os.EX_TEMPFAIL)

    async def test() -> None:
        async with serving(tmp_path) as api:
            job = await waiting_for_room(api, caplog)
            await asyncio.sleep(0.3)  # it is begun again
            [told] = caplog.messages
            assert told.startswith(f"job {job['id']} waits: the disk for the data directory takes no more")
            process()
            assert (await api.ended(job["id"]))["status"] == "succeeded"

    run(test)


def test_a_job_that_waits_for_room_can_be_cancelled(
    tmp_path: Path, process: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    process(status=os.EX_TEMPFAIL)

    async def test() -> None:
        async with serving(tmp_path) as api:
            job = await waiting_for_room(api, caplog)
            await api.client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
            process()
            assert (await api.ended((await api.create(training_file=await api.upload()))["id"]))["status"] == "succeeded"
            assert not (tmp_path / "jobs" / job["id"]).exists()

    run(test)


def test_a_job_that_is_cancelled_while_it_ends_is_not_served(tmp_path: Path, process: Callable[..., None]) -> None:
    process(updates=3, seconds=0.2, deaf=True)

    async def test() -> None:
        async with serving(tmp_path) as api:
            job = await api.create(training_file=await api.upload())
            while "Step 1: training loss 4.0000" not in await api.messages(job["id"]):
                await asyncio.sleep(0.02)
            answer = await api.client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
            assert answer.json()["status"] == "cancelled"
            process()
            assert (await api.ended((await api.create(training_file=await api.upload()))["id"]))["status"] == "succeeded"
            assert len(api.loader.loaded) == 1
            assert not any("succeeded" in message for message in await api.messages(job["id"]))
            assert not (tmp_path / "jobs" / job["id"]).exists()

    run(test)


def test_more_updates_than_a_curve_holds_are_refused(tmp_path: Path, process: Callable[..., None]) -> None:
    process(updates=100_001, seconds=0.05)

    async def test() -> None:
        async with serving(tmp_path) as api:
            job = await api.ended((await api.create(training_file=await api.upload()))["id"])
            reason = "100001 updates are more than 100000: fewer epochs or larger batches are needed"
            assert job["error"]["message"] == reason

    run(test)


def test_later_updates_have_fewer_events(tmp_path: Path, process: Callable[..., None]) -> None:
    process(updates=1234)

    async def test() -> None:
        async with serving(tmp_path) as api:
            job = await api.ended((await api.create(training_file=await api.upload()))["id"])
            assert job["status"] == "succeeded"
            steps, after = [], ""
            while True:
                page = await api.get(f"/v1/fine_tuning/jobs/{job['id']}/events?limit=100{after}")
                steps += [event["data"]["step"] for event in page["data"] if event["type"] == "metrics"]
                if not page["has_more"]:
                    break
                after = f"&after={page['data'][-1]['id']}"
            assert steps[::-1] == [*range(1, 1001), *range(1010, 1240, 10), 1234]
            first = page["data"][-1]["id"]
            assert first == f"ftevent-{job['id'].removeprefix('ftjob-')}-1"
            for nobody in (first[:-1] + "0", first[:-1] + "x", first[:-1] + "9" * 30, first[8:], "ftevent-1", "x"):
                answer = await api.client.get(f"/v1/fine_tuning/jobs/{job['id']}/events?after={nobody}")
                assert answer.json()["error"]["message"] == f"after: there is no '{nobody}'"

    run(test)


def test_a_store_belongs_to_one_server(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ValueError, match=f"another server keeps its files in {tmp_path}"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


def test_what_a_killed_server_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    store = Store(tmp_path)
    file = store.add_file("", "a", "fine-tune", b"x")
    jobs = [store.add_job("", "fake", "", 0, Hyperparameters(1, 1, 1.0, 1), file.id, None) for _ in range(4)]
    for job, status in zip(jobs, ("succeeded", "failed", "running", "succeeded"), strict=True):
        store.update_job(job.id, status=status, fine_tuned_model="ft" if job == jobs[0] else None)
        store.run_directory(job.id).mkdir(parents=True)
    strangers = [tmp_path / "files" / "mine.txt", tmp_path / "jobs" / "mine"]
    leftovers = [tmp_path / "files" / "file-1.jsonl", tmp_path / "files" / "file-2.jsonl.tmp", tmp_path / "jobs" / "ftjob-1"]
    for path in (*strangers, *leftovers):
        path.mkdir()
    store.close()
    for path in leftovers[:2]:
        path.rmdir()
        path.write_text("x")
    store = Store(tmp_path)
    assert [path.exists() for path in (*strangers, *leftovers)] == [True, True, False, False, False]
    assert [store.run_directory(job.id).exists() for job in jobs] == [True, False, True, False]
    assert store.path_of(file.id).exists()
    store.close()
    for path in tmp_path.glob("banded.sqlite*"):
        path.unlink()
    Store(tmp_path).close()
    assert store.run_directory(jobs[0].id).exists(), "with a new database nothing is known"


def test_the_oldest_job_without_a_result_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.jobs.store, "MAX_JOBS", 3)
    store = Store(tmp_path)

    def add() -> str:
        return store.add_job("", "fake", "", 0, Hyperparameters(1, 1, 1.0, 1), "file-x", None).id

    served, failed, running = add(), add(), add()
    store.end_job(served, "succeeded", fine_tuned_model="ft:fake")
    store.end_job(failed, "failed")
    store.add_event(failed, "gone with it")
    new = add()
    assert {job.id for job in store.jobs("")} == {served, running, new}
    assert store.events(failed, 10) == []
    with pytest.raises(StoreFullError, match="3 jobs are stored, as many as there may be"):
        add()
    store.close()


def test_a_job_ends_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    job = store.add_job("", "fake", "", 0, Hyperparameters(1, 1, 1.0, 1), "file-x", None)
    assert store.end_job(job.id, "cancelled")
    assert not store.end_job(job.id, "failed", error="too late")
    found = store.job("", job.id)
    assert found is not None
    assert (found.status, found.error) == ("cancelled", None)
    store.close()


def test_jobs_wait_for_each_other_and_can_be_cancelled(tmp_path: Path, process: Callable[..., None]) -> None:
    process(updates=1000, seconds=0.05)

    async def test() -> None:
        async with serving(tmp_path) as api:
            file_id = await api.upload()
            running, waiting = [await api.create(training_file=file_id) for _ in range(2)]
            while "Step 2: training loss 3.0000" not in await api.messages(running["id"]):
                await asyncio.sleep(0.02)
            assert (await api.get(f"/v1/fine_tuning/jobs/{waiting['id']}"))["status"] == "validating_files"
            answer = await api.client.delete(f"/v1/files/{file_id}")
            assert answer.status_code == 409
            assert answer.json()["error"]["message"] == f"job {waiting['id']} needs the file: cancel it first"
            for job in (waiting, running):
                answer = await api.client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
                assert answer.json()["status"] == "cancelled"
                answer = await api.client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
                assert answer.json()["error"]["message"] == f"job {job['id']} is not running: its status is cancelled"
            process()
            last = await api.create(training_file=file_id)
            assert (await api.ended(last["id"]))["status"] == "succeeded"
            assert (await api.get(f"/v1/fine_tuning/jobs/{running['id']}"))["status"] == "cancelled"

    run(test)


def test_a_job_whose_model_is_being_loaded_is_not_cancelled(tmp_path: Path, process: Callable[..., None]) -> None:
    async def test() -> None:
        async with serving(tmp_path) as api:
            loading, may_load = asyncio.Event(), asyncio.Event()
            load = api.loader.load

            async def slow(name: str, directory: Path) -> ModelEntry:
                loading.set()
                await may_load.wait()
                return await load(name, directory)

            api.loader.load = slow  # type: ignore[method-assign]
            job = await api.create(training_file=await api.upload())
            await loading.wait()
            answer = await api.client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
            message = f"job {job['id']} is not running: its status is about to be succeeded"
            assert answer.json()["error"]["message"] == message
            may_load.set()
            assert (await api.ended(job["id"]))["status"] == "succeeded"

    run(test)


def test_a_job_goes_on_with_the_next_server(tmp_path: Path, process: Callable[..., None]) -> None:
    process(updates=6, seconds=0.5)  # on a busy machine too, the server stops before the job ends

    async def test() -> None:
        async with serving(tmp_path) as api:
            job = await api.create(training_file=await api.upload())
            while "Step 2: training loss 3.0000" not in await api.messages(job["id"]):
                await asyncio.sleep(0.02)
        async with serving(tmp_path) as api:
            assert (await api.ended(job["id"]))["status"] == "succeeded"
            messages = await api.messages(job["id"])
            assert "The job goes on" in messages
            assert [message.split(":")[0] for message in messages if "loss" in message] == [f"Step {i}" for i in range(1, 7)]

    run(test)


def test_lists_come_in_pages(tmp_path: Path, process: Callable[..., None]) -> None:
    async def test() -> None:
        async with serving(tmp_path, max_adapters=10) as api:
            file_id = await api.upload()
            made = [(await api.create(training_file=file_id))["id"] for _ in range(3)]
            for job_id in made:
                await api.ended(job_id)
            first = await api.get("/v1/fine_tuning/jobs?limit=2")
            assert ([job["id"] for job in first["data"]], first["has_more"]) == ([made[2], made[1]], True)
            rest = await api.get(f"/v1/fine_tuning/jobs?limit=2&after={made[1]}")
            assert ([job["id"] for job in rest["data"]], rest["has_more"]) == ([made[0]], False)
            more = await api.upload(name="b.jsonl")
            first = await api.get("/v1/files?limit=1")
            assert ([file["id"] for file in first["data"]], first["has_more"]) == ([more], True)
            rest = await api.get(f"/v1/files?limit=1&after={more}&purpose=fine-tune")
            assert ([file["id"] for file in rest["data"]], rest["has_more"]) == ([file_id], False)
            assert [file["id"] for file in (await api.get("/v1/files?order=asc"))["data"]] == [file_id, more]
            assert (await api.get("/v1/files?purpose=batch"))["data"] == []
            answer = await api.client.get("/v1/files?after=nobody")
            assert answer.json()["error"]["message"] == "after: there is no 'nobody'"
            answer = await api.client.get("/v1/fine_tuning/jobs?after=nobody")
            assert answer.json()["error"]["message"] == "after: there is no 'nobody'"
            assert (await api.client.get("/v1/fine_tuning/jobs?limit=0")).status_code == 400

    run(test)


def test_jobs_that_can_not_be(tmp_path: Path, process: Callable[..., None]) -> None:
    process(updates=1000, seconds=0.05)

    async def test() -> None:
        async with serving(tmp_path, max_adapters=1) as api:
            file_id = await api.upload()
            for fields, message in (
                ({"training_file": "file-x"}, "there is no file 'file-x'"),
                ({"training_file": file_id, "validation_file": "file-y"}, "there is no file 'file-y'"),
                ({"training_file": file_id, "model": "gpt-4"}, "the model 'gpt-4' does not exist; this server has 'fake'"),
                ({"training_file": file_id, "method": {}}, "unknown field 'method'"),
                ({}, "'training_file' is required"),
                ({"training_file": file_id, "suffix": "a b"}, "'suffix': string should match pattern"),
                (
                    {"training_file": file_id, "hyperparameters": {"n_epochs": 0}},
                    "'hyperparameters.n_epochs': input should be greater than or equal to 1",
                ),
                (
                    {"training_file": file_id, "hyperparameters": {"learning_rate_multiplier": 5e-322}},
                    "'hyperparameters.learning_rate_multiplier': input should be greater than or equal to 0.000001",
                ),
                (
                    {"training_file": file_id, "hyperparameters": {"rank": 0}},
                    "rank 0, all weights: the result would need a second engine, 2,000,000 bytes of weights and at ",
                ),
                (
                    {"training_file": file_id, "hyperparameters": {"rank": 65}},
                    "'hyperparameters.rank': input should be less than or equal to 64",
                ),
            ):
                answer = await api.client.post("/v1/fine_tuning/jobs", json={"model": "fake", **fields})
                assert answer.status_code in (400, 404), message
                assert message in answer.json()["error"]["message"]
            for path in ("", "/events", "/checkpoints"):
                answer = await api.client.get(f"/v1/fine_tuning/jobs/nobody{path}")
                assert answer.status_code == 404
                assert answer.json()["error"]["message"] == "there is no job 'nobody'"
            await api.create(training_file=file_id)
            answer = await api.client.post("/v1/fine_tuning/jobs", json={"model": "fake", "training_file": file_id})
            assert answer.json()["error"]["message"].startswith(
                "this server serves 1 adapters at most (max_adapters): 0 are there and 1 in work"
            )

    run(test)


LOWLY = """
import os
from pathlib import Path
from service.jobs.runner import give_way

give_way()
facts = [Path("/proc/self", name) for name in ("autogroup", "oom_score_adj")]
print(os.nice(0), *(file.read_text().split()[-1] for file in facts if file.exists()))
"""


def test_a_jobs_process_comes_behind_the_server() -> None:
    """The kernel may share cores among sessions; nice alone then means nothing to a process in its own session."""
    command = [sys.executable, "-c", LOWLY]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, start_new_session=True).stdout.split()
    assert shown[0] == "19"
    assert shown[1:] == [
        value for name, value in (("autogroup", "19"), ("oom_score_adj", "1000")) if Path("/proc/self", name).exists()
    ]
