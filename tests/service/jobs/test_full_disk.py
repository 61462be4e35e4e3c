"""A full disk: whichever write finds it, the change is made as a whole or not at all, and deleting makes room again."""

import asyncio
import errno
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest

from service.api.app import create_app
from service.jobs.disk import SPARE, Ballast, DiskFullError
from service.jobs.records import read_record, write_record
from service.jobs.runner import Jobs
from service.jobs.store import Job, Store, StoredFile
from tests.conformance import contract
from tests.service.api.helpers import served
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run, settings_of
from tests.service.jobs.stored import PARAMETERS, Kept, content, fill

# Whether one write fails, or it and all that follow until the ballast is given up.
Extent = Literal["one", "all"]
WRITES = ("BEGIN", "INSERT", "UPDATE", "DELETE", "COMMIT")


class FullDisk:
    """Counts the writes from `begin` on, and is full at one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, directory: Path, full_at: int, extent: Extent):
        """Everything that writes asks this disk from here on."""
        self._ballast, self._full_at, self._extent = directory / "ballast", full_at, extent
        self._writes: int | None = None
        disk = self

        def failing(function: Callable[..., Any]) -> Callable[..., Any]:
            def write(*arguments: Any, **options: Any) -> Any:
                if disk.write():
                    if function in (Path.write_bytes, Path.write_text):  # half of it got there
                        function(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return function(*arguments, **options)

            return write

        class Connection(sqlite3.Connection):
            def execute(self, query: str, *arguments: Any) -> sqlite3.Cursor:
                self._check(query)
                return super().execute(query, *arguments)

            def executemany(self, query: str, *arguments: Any) -> sqlite3.Cursor:
                self._check(query)
                return super().executemany(query, *arguments)

            def executescript(self, query: str) -> sqlite3.Cursor:
                self._check(query)
                return super().executescript(query)

            def backup(self, *arguments: Any, **options: Any) -> None:
                self._check("INSERT")
                super().backup(*arguments, **options)

            def _check(self, query: str) -> None:
                if query.lstrip().startswith(WRITES) and disk.write():
                    error = sqlite3.OperationalError("database or disk is full")
                    error.sqlite_errorcode = sqlite3.SQLITE_FULL
                    raise error

        for owner, name in (
            (Path, "touch"),
            (Path, "mkdir"),
            (Path, "write_bytes"),
            (Path, "write_text"),
            (os, "replace"),
        ):
            patch.setattr(owner, name, failing(getattr(owner, name)))
        patch.setattr(os, "fsync", failing(lambda _: None))  # nothing here must outlive the machine
        connect = sqlite3.connect
        patch.setattr(sqlite3, "connect", lambda *arguments, **options: connect(*arguments, **options, factory=Connection))

    def begin(self) -> None:
        self._writes = 0

    def end(self) -> bool:
        """Whether it was full."""
        writes, self._writes = self._writes, None
        return writes is not None and writes >= self._full_at

    def write(self) -> bool:
        """Whether one more write fails."""
        if self._writes is None:
            return False
        self._writes += 1
        if self._extent == "one":
            return self._writes == self._full_at
        return self._writes >= self._full_at and self._ballast.exists()


def upload(store: Store) -> None:
    store.add_file("", "new", "fine-tune", b"new")


def create_job(store: Store) -> None:
    store.add_job("", "demo", "", 0, PARAMETERS, store.files("")[0].id, None)


def note_progress(store: Store) -> None:
    store.add_metrics(store.jobs("")[0].id, [(f"Step {step}", {"step": step}) for step in (4, 5)])


def begin_job(store: Store) -> None:
    store.update_job(store.jobs("")[0].id, trained_tokens=99)


def end_job(store: Store) -> None:
    assert store.end_job(store.jobs("")[0].id, "cancelled")


def delete_file(store: Store) -> None:
    store.delete_file(store.files("")[0].id)


def delete_model(store: Store) -> None:
    store.forget_result(next(job for job in store.jobs("") if job.fine_tuned_model))


def change_before(store: Store) -> None:
    """So that there is something to copy."""
    store.add_event(store.jobs("")[0].id, "Hello")


def copy(store: Store) -> None:
    store.copy()


CHANGES = (upload, create_job, note_progress, begin_job, end_job, delete_file, delete_model, copy)
# They need no room that isn't kept for them.
MAKE_ROOM = (end_job, delete_file, delete_model)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("filled") / "data"
    with pytest.MonkeyPatch.context() as patch:
        fill(directory, patch)
    (directory / "ballast").write_text("small, as there are many copies of it")
    return directory


@pytest.fixture
def same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ids and times, so that a change at the second attempt is what it would have been at the first."""
    monkeypatch.setattr("secrets.token_hex", lambda _: "1")
    monkeypatch.setattr("time.time", lambda: 1800000000.0)
    monkeypatch.setattr(os, "urandom", bytes)


def directories(filled: Path, place: Path) -> Iterator[tuple[int, Path]]:
    """Copies of a directory, with the number of the write that is to fail."""
    for full_at in range(1, 100):
        directory = Path(shutil.copytree(filled, place / "data"))
        yield full_at, directory
        shutil.rmtree(directory)


@pytest.mark.parametrize("extent", ["one", "all"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("same")
def test_a_change_is_made_as_a_whole_or_not_at_all(
    change: Callable[[Store], None], extent: Extent, filled: Path, tmp_path: Path
) -> None:
    with closing(Store(Path(shutil.copytree(filled, tmp_path / "right")))) as store:
        change_before(store)
        before = Kept.of(store)
        change(store)
        after = Kept.of(store)
    has_failed = False
    for full_at, directory in directories(filled, tmp_path):
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, directory, full_at, extent)
            with closing(Store(directory)) as store:
                change_before(store)
                disk.begin()
                expected = before
                with suppress(DiskFullError):
                    change(store)
                    expected = after
                assert Kept.of(store) == expected
                has_failed |= expected == before != after
                was_full = disk.end()
                assert not [path for path in directory.rglob("*") if ".tmp" in path.name]
        with closing(Store(directory)) as store:  # the record may have been written, and its row not
            assert Kept.of(store) in (before, after)
            if Kept.of(store) == before and change is not copy:
                change(store)
                assert Kept.of(store) == after
        assert not content(filled) - content(directory) or change in (delete_file, delete_model)
        if not was_full:
            break
    assert has_failed == (change not in (*MAKE_ROOM, copy))


def test_the_message_tells_a_full_disk_from_a_quota(tmp_path: Path) -> None:
    enough, too_many = str(DiskFullError(tmp_path, 1, "the data directory")), DiskFullError(tmp_path, 1 << 60, "x")
    assert enough.startswith("the disk for the data directory takes no more, as by a quota or without free inodes: ")
    assert str(too_many).startswith("the disk for x is full: ")


def lose_database(directory: Path) -> None:
    (directory / "banded.sqlite").unlink()


def lose_records(directory: Path) -> None:
    for path in directory.glob("*/*.json"):
        path.unlink()


@pytest.mark.parametrize("extent", ["one", "all"])
@pytest.mark.parametrize("damage", [lambda directory: None, lose_database, lose_records])
def test_a_start_on_a_full_disk_is_refused_or_complete(
    damage: Callable[[Path], None], extent: Extent, filled: Path, tmp_path: Path
) -> None:
    with closing(Store(Path(shutil.copytree(filled, tmp_path / "right")))) as store:
        before = Kept.of(store)
    for full_at, directory in directories(filled, tmp_path):
        damage(directory)
        (directory / "files" / "file-1.jsonl.tmp").write_text("half of an upl")
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, directory, full_at, extent)
            disk.begin()
            with suppress(DiskFullError), closing(Store(directory)) as store:
                assert Kept.of(store) == before
            was_full = disk.end()
        with closing(Store(directory)) as store:
            assert Kept.of(store) == before
        assert content(directory) == content(filled)
        assert not [path for path in directory.rglob("*") if ".tmp" in path.name]
        if not was_full:
            break


def test_the_ballast_is_kept_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ballast"
    ballast = Ballast(path)
    ballast.fill()
    assert path.stat().st_blocks * 512 >= SPARE
    ballast.give_up()
    ballast.give_up()
    monkeypatch.setattr("service.jobs.disk.free_bytes", lambda _: SPARE)
    ballast.fill()
    assert not path.exists()


def test_a_start_gives_up_the_ballast_if_there_is_little_room(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite makes files of its own next to a database when it opens it."""
    directory = Path(shutil.copytree(filled, tmp_path / "data"))
    for module in ("disk", "store"):
        monkeypatch.setattr(f"service.jobs.{module}.free_bytes", lambda _: 0)
    Store(directory).close()
    assert not (directory / "ballast").exists()


@asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[tuple[httpx.AsyncClient, Jobs]]:
    fake = FakeEngine()
    models = served(fake)
    jobs = Jobs(Store(directory), models, Path("nowhere"))
    app = create_app(models, fake.metrics, settings_of(), jobs)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        yield client, jobs


@contract("fine_tuning", "file", "on a full disk an upload and a job are a 507 with the free and the needed bytes")
@contract("fine_tuning", "DELETE", "works on a full disk, and makes room")
def test_a_full_disk_over_http(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = Path(shutil.copytree(filled, tmp_path / "data"))
    line = b'{"prompt": "b", "completion": " c"}'

    async def test() -> None:
        async with serving(directory) as (client, _):

            async def upload() -> httpx.Response:
                return await client.post("/v1/files", files={"file": ("a", line)}, data={"purpose": "fine-tune"})

            assert (await upload()).status_code == 200
            with monkeypatch.context() as patch:
                disk = FullDisk(patch, directory, 1, "all")
                for module in ("disk", "store"):
                    patch.setattr(f"service.jobs.{module}.free_bytes", lambda _: 1000)
                disk.begin()
                answer = await upload()
                full = "the disk for the data directory is full: 1000 bytes are free, {} are needed"
                assert answer.status_code == 507
                assert answer.json()["error"] == {
                    "message": full.format(SPARE + len(line)),
                    "type": "server_error",
                    "param": None,
                    "code": "disk_full",
                }
                files = (await client.get("/v1/files")).json()["data"]
                body = {"model": "fake", "training_file": files[0]["id"]}
                answer = await client.post("/v1/fine_tuning/jobs", json=body)
                assert (answer.status_code, answer.json()["error"]["message"]) == (507, full.format(SPARE))
                answer = await client.post("/v1/completions", json={"model": "fake", "prompt": "Once", "max_tokens": 3})
                assert answer.status_code == 200
                assert 'banded_data_free_bytes{model="fake"} 1000.0' in (await client.get("/metrics")).text
                answer = await client.delete(f"/v1/files/{files[0]['id']}")
                assert answer.json() == {"id": files[0]["id"], "object": "file", "deleted": True}
                assert (await client.delete("/v1/models/ft:demo:a:1")).status_code == 200
                assert disk.end()
            assert (await upload()).status_code == 200
        assert "Traceback" not in caplog.text

    run(test)


def test_a_job_waits_for_room(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """It says so once."""
    monkeypatch.setattr("service.jobs.runner.POLL_SECONDS", 0.01)
    free = 1000
    for module in ("disk", "store"):
        monkeypatch.setattr(f"service.jobs.{module}.free_bytes", lambda _: free)
    directory = Path(shutil.copytree(filled, tmp_path / "data"))
    with closing(sqlite3.connect(directory / "banded.sqlite")) as db:
        [(job_id,)] = db.execute("SELECT id FROM jobs WHERE status = 'running'")
    record = directory / "jobs" / f"{job_id}.json"
    record.write_text(record.read_text().replace('"demo"', '"fake"'))

    async def test() -> None:
        nonlocal free
        async with serving(directory) as (client, jobs):
            begun = asyncio.Event()

            async def advance(job: Job) -> None:
                begun.set()
                jobs.store.end_job(job.id, "failed", error="enough")

            monkeypatch.setattr(jobs, "_advance", advance)
            await asyncio.sleep(0.1)
            assert not begun.is_set()
            free = 10 * SPARE
            await begun.wait()
            assert client

    run(test)
    waits = [
        line for line in caplog.messages if line.startswith(f"job {job_id} waits: the disk for the data directory is full")
    ]
    assert len(waits) == 1


def test_a_record_on_a_full_disk_is_overwritten_in_the_room_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file-1.json"
    file = StoredFile("file-1", "a long name", "fine-tune", 1, 1)
    write_record(path, file)

    def touch(_: Path) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "touch", touch)
    write_record(path, file._replace(filename="a"))
    assert read_record(path, StoredFile).filename == "a"
    with pytest.raises(OSError, match="full"):
        write_record(path, file._replace(filename="a" * 512 * path.stat().st_blocks))
    assert read_record(path, StoredFile).filename == "a"
    with pytest.raises(OSError, match="full"):
        write_record(tmp_path / "file-2.json", file)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_the_ballast_is_back_when_something_is_stored(tmp_path: Path) -> None:
    """It was given up, and there was room again before the next copy: a job that is created then can be cancelled."""
    with closing(Store(tmp_path)) as store:
        ballast = tmp_path / "ballast"
        file = store.add_file("", "a", "fine-tune", b"x")
        ballast.unlink()
        store.add_job("", "demo", "", 0, PARAMETERS, file.id, None)
        assert ballast.exists()
        ballast.unlink()
        store.add_file("", "b", "fine-tune", b"x")
        assert ballast.exists()
