"""Whatever has happened to a data directory, a start loses nothing of it: it refuses in one line, or everything is there."""

import json
import os
import random
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from service.cli import main
from service.jobs import database
from service.jobs.database import DataError
from service.jobs.records import read_record, write_record
from service.jobs.store import Job, Store, StoredFile
from tests.service.jobs.stored import PARAMETERS, Kept, content, fill

DATABASE = "banded.sqlite"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Kept]:
    directory = tmp_path_factory.mktemp("filled") / "data"
    with pytest.MonkeyPatch.context() as patch:  # what was made in one second may be rebuilt in another order
        return directory, fill(directory, patch)


@pytest.fixture
def directory(filled: tuple[Path, Kept], tmp_path: Path) -> Path:
    """A directory that may be damaged."""
    return Path(shutil.copytree(filled[0], tmp_path / "data"))


def execute(directory: Path, *statements: str) -> None:
    with closing(sqlite3.connect(directory / DATABASE)) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


def overwrite(path: Path, place: float, data: bytes) -> None:
    """Write `data` at a share of a file's length."""
    whole = path.read_bytes()
    at = int(place * len(whole))
    path.write_bytes(whole[:at] + data + whole[at + len(data) :])


def overwrite_text(path: Path, text: bytes, data: bytes) -> None:
    whole = path.read_bytes()
    overwrite(path, whole.index(text) / len(whole), data)


def be_gone(directory: Path, *names: str) -> None:
    for name in names:
        for path in directory.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def be_older(directory: Path) -> None:
    """The database is from a backup: of three files and jobs it knows one, as it was at first."""
    execute(
        directory,
        "DELETE FROM files WHERE rowid > 1",
        "DELETE FROM jobs WHERE rowid > 1",
        "UPDATE jobs SET status = 'running', finished = NULL, fine_tuned_model = NULL",
        "DELETE FROM events WHERE number > 2",
    )


def be_of_schema_0(directory: Path) -> None:
    """As a version without records, copies, owners and a schema's number left it."""
    columns = [f"ALTER TABLE {table} DROP COLUMN owner" for table in ("files", "jobs")]
    execute(directory, *columns, "PRAGMA user_version = 0")
    be_gone(directory, "copies", "files/*.json", "jobs/*.json", "ballast")


def be_replaced(directory: Path, make: Callable[[Path], object]) -> None:
    (directory / DATABASE).unlink()
    make(directory / DATABASE)


NOISE = random.Random(20200528).randbytes(4096)
DAMAGED = "banded.sqlite is damaged ("
WAY_OUT = ". Put a backup in its place, or move it away (mv "

# What is done to the database or the records, and how the error begins, or None where a start finds everything.
DAMAGE: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "nothing": (lambda directory: None, None),
    "the database is gone": (lambda directory: be_gone(directory, DATABASE), None),
    "it is empty": (lambda directory: (directory / DATABASE).write_bytes(b""), None),
    "its rows are gone": (lambda directory: execute(directory, "DELETE FROM files", "DELETE FROM jobs"), None),
    "its events are gone": (lambda directory: execute(directory, "DELETE FROM events"), None),
    "it is an older backup": (be_older, None),
    "it has an older schema": (be_of_schema_0, None),
    "it is gone and its log is left": (
        lambda directory: (directory / DATABASE).rename(directory / f"{DATABASE}-wal"),
        None,
    ),
    "a log of noise is left": (lambda directory: (directory / f"{DATABASE}-wal").write_bytes(NOISE), None),
    "a journal of noise is left": (lambda directory: (directory / f"{DATABASE}-journal").write_bytes(NOISE), None),
    "the records are gone": (lambda directory: be_gone(directory, "files/*.json", "jobs/*.json"), None),
    "the records are empty": (
        lambda directory: [path.write_bytes(b"") for path in directory.glob("*/*.json")],
        None,
    ),
    "the records are noise": (
        lambda directory: [path.write_bytes(NOISE) for path in directory.glob("*/*.json")],
        None,
    ),
    "the copies are gone": (lambda directory: be_gone(directory, "copies"), None),
    "the copies are noise, and events are gone": (
        lambda directory: (directory / "copies" / "banded-2.sqlite").write_bytes(NOISE),
        None,
    ),
    "the database is truncated": (lambda directory: os.truncate(directory / DATABASE, 9000), DAMAGED),
    "it ends within its header": (lambda directory: os.truncate(directory / DATABASE, 50), DAMAGED),
    "its header is noise": (lambda directory: overwrite(directory / DATABASE, 0, NOISE[:100]), DAMAGED),
    "its middle is noise": (lambda directory: overwrite(directory / DATABASE, 0.3, NOISE), DAMAGED),
    "it is a text": (lambda directory: (directory / DATABASE).write_text("hello\n" * 5000), DAMAGED),
    "it is a directory": (lambda directory: be_replaced(directory, Path.mkdir), "banded.sqlite is not a file"),
    "it is a pipe": (lambda directory: be_replaced(directory, os.mkfifo), "banded.sqlite is not a file"),
    "it lacks a table": (
        lambda directory: execute(directory, "DROP TABLE files"),
        "banded.sqlite lacks the column bytes of files",
    ),
    "it lacks a column": (
        lambda directory: execute(directory, "ALTER TABLE jobs DROP COLUMN trained_tokens"),
        "banded.sqlite lacks the column trained_tokens of jobs",
    ),
    "it has an unknown column": (
        lambda directory: execute(directory, "ALTER TABLE files ADD COLUMN colour TEXT"),
        "banded.sqlite has, unknown to this version, the column colour of files",
    ),
    "an index lacks a row": (
        lambda directory: execute(
            directory,
            "PRAGMA writable_schema = ON",
            "UPDATE sqlite_master SET sql = replace(sql, 'number)', 'created)') WHERE name = 'events_of'",
        ),
        DAMAGED,
    ),
    "a row has another type": (
        lambda directory: execute(directory, "UPDATE files SET bytes = 'many'"),
        f"{DAMAGED}a row of files: bytes is 'many')",
    ),
    "a row is no text": (
        lambda directory: execute(directory, "UPDATE jobs SET suffix = CAST(x'ff' AS TEXT)"),
        f"{DAMAGED}a row of jobs: Could not decode to UTF-8",
    ),
    "a row's numbers are no JSON": (
        lambda directory: execute(directory, "UPDATE jobs SET hyperparameters = '[1'"),
        f"{DAMAGED}a row of jobs: Expecting ',' delimiter",
    ),
    "an id leads elsewhere": (
        lambda directory: execute(directory, "UPDATE files SET id = '../file-1' WHERE rowid = 1"),
        f"{DAMAGED}a row of files: '../file-1' is no id)",
    ),
    "an event's numbers are no JSON": (
        lambda directory: execute(directory, "UPDATE events SET data = '{' WHERE number = 2"),
        f"{DAMAGED}events)",
    ),
    "an event is no text": (
        lambda directory: execute(directory, "UPDATE events SET message = CAST(x'ff' AS TEXT) WHERE number = 2"),
        f"{DAMAGED}Could not decode to UTF-8",
    ),
    "its schema is no text": (
        lambda directory: overwrite_text(directory / DATABASE, b"sqlite_autoindex_files_1", b"sqli\xd3\xd9"),
        f"{DAMAGED}its schema)",
    ),
    "a newer version has written it": (
        lambda directory: execute(directory, "PRAGMA user_version = 99"),
        f"banded.sqlite has schema 99, from a newer Banded; this one knows {database.VERSION}: start the newer one",
    ),
    "a newer version has written a record": (
        lambda directory: next((directory / "jobs").glob("*.json")).write_text('{"version": 99}'),
        f".json has schema 99, from a newer Banded; this one knows {database.VERSION}: start the newer one",
    ),
}


def check_files(directory: Path, kept: Kept, store: Store) -> None:
    assert Kept.of(store).files == kept.files
    for file in kept.files:
        assert store.missing_content(file) is None


def check_jobs(directory: Path, kept: Kept, store: Store) -> None:
    found = Kept.of(store)
    assert (found.jobs, found.events) == (kept.jobs, kept.events)


def check_adapters(directory: Path, kept: Kept, store: Store) -> None:
    assert Kept.of(store).adapters == kept.adapters
    [(_, _, run)] = store.results("demo", [""])
    assert (run / "adapter.safetensors").read_bytes() == run.name.encode() * 50


def check_all_but_events(directory: Path, kept: Kept) -> Kept:
    with closing(Store(directory)) as store:
        found = Kept.of(store)
    assert found._replace(events=kept.events) == kept
    return found


@pytest.mark.parametrize("check", [check_files, check_jobs, check_adapters])
@pytest.mark.parametrize("damage", DAMAGE)
def test_no_damage_loses_what_is_stored(
    damage: str,
    check: Callable[[Path, Kept, Store], None],
    filled: tuple[Path, Kept],
    directory: Path,
) -> None:
    do, message = DAMAGE[damage]
    before = content(directory)
    do(directory)
    if message is not None:
        with pytest.raises(DataError) as caught:
            Store(directory)
        line = str(caught.value)
        assert message in line
        assert "\n" not in line
        assert (WAY_OUT in line) == ("newer" not in line)
        assert content(directory) == before
        if "newer" in message:  # what it says would be found by the newer version
            return
        path = directory / DATABASE
        path.rename(path.with_name("banded.sqlite.damaged"))  # as it says
    for _ in range(2):  # what the first start made is right for the next
        with closing(Store(directory)) as store:
            check(directory, filled[1], store)
        assert not before - content(directory), "something is lost"


def test_serve_refuses_in_one_line(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = directory / DATABASE
    path.write_text("hello\n" * 5000)
    assert main(["serve", "--port", "0", "--data-dir", str(directory)]) == 2
    assert capsys.readouterr().err == (
        f"banded: {path} is damaged (file is not a database). Put a backup in its place, or move it away (mv {path} "
        f"{path}.damaged): the next start rebuilds it from the records of files and jobs and from copies/, and keeps what "
        "has no record in lost+found/\n"
    )


@pytest.mark.parametrize("seed", range(12))
def test_noise_anywhere_in_the_database_loses_nothing(seed: int, filled: tuple[Path, Kept], directory: Path) -> None:
    chance = random.Random(seed)
    path = directory / DATABASE
    overwrite(path, chance.random() * 0.98, chance.randbytes(chance.choice((1, 16, 300))))
    with suppress(DataError):
        Store(directory).close()
        path = directory / "none"
    if path.exists():  # it was refused
        path.rename(path.with_name("banded.sqlite.damaged"))
    check_all_but_events(directory, filled[1])
    assert content(directory) == content(filled[0])


def test_what_nothing_tells_of_is_kept_with_a_line_on_how_to_get_it_back(
    filled: tuple[Path, Kept], directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a row nor a record is left, so names and lengths are unknown. Twice: no name in lost+found is taken again."""
    for _ in range(2):
        shutil.copytree(filled[0], directory, dirs_exist_ok=True)
        be_gone(directory, DATABASE, "*/*.json")
        caplog.clear()
        Store(directory).close()
        lost = directory / "lost+found"
        for file in filled[1].files:
            path = directory / "files" / f"{file.id}.jsonl"
            assert not path.exists()
            assert f"{path}: no row and no record tells of this file; it is kept as {lost / path.name}" in caplog.text
        assert "to use it, upload it again" in caplog.text
        assert "if it holds an adapter, serve it with --adapter NAME=DIR" in caplog.text
        assert not content(filled[0]) - content(directory)
    assert content(directory) == content(filled[0]) + content(filled[0])


def test_what_was_put_back_with_its_record_is_there_again(filled: tuple[Path, Kept], directory: Path) -> None:
    """The way back from a backup of single files."""
    be_gone(directory, "files", "jobs", DATABASE, "copies")
    Store(directory).close()
    for name in ("files", "jobs"):
        shutil.copytree(filled[0] / name, directory / name, dirs_exist_ok=True)
    check_all_but_events(directory, filled[1])


def test_strangers_stay_where_they_are(directory: Path) -> None:
    strangers = [directory / name for name in ("files/mine.txt", "files/mine.jsonl", "jobs/mine.json", "jobs/mine.tmp")]
    for path in strangers:
        path.write_text("x")
    Store(directory).close()
    assert all(path.read_text() == "x" for path in strangers)
    assert not (directory / "lost+found").exists()


def test_what_cannot_be_moved_stays_with_a_line(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file system has a lost+found of its own, which is root's."""
    (directory / "lost+found").write_text("not a directory")
    stray = directory / "files" / "file-1.jsonl"
    stray.write_text("x")
    Store(directory).close()
    assert stray.read_text() == "x"
    assert f"and it can't be moved (File exists); it is kept as {stray}" in caplog.text


def test_a_database_that_cannot_be_written_is_no_damage(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Path, **options: Any) -> sqlite3.Connection:
        return connect(f"{path.as_uri()}?mode=ro", uri=True, **options)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", read_only)
    with pytest.raises(DataError, match=r"banded.sqlite can't be used: attempt to write a readonly database$"):
        Store(directory)


def test_events_are_all_that_goes_with_the_database_and_its_copies(filled: tuple[Path, Kept], directory: Path) -> None:
    be_gone(directory, DATABASE, "copies")
    assert check_all_but_events(directory, filled[1]).events == [[], [], []]


def test_the_last_two_copies_are_kept(tmp_path: Path) -> None:
    """The newest follows the changes. The other is the last one of the process before."""

    def names(number: int) -> list[str]:
        with closing(sqlite3.connect(tmp_path / "copies" / f"banded-{number}.sqlite")) as db:
            return [name for (name,) in db.execute("SELECT filename FROM files ORDER BY rowid")]

    store = Store(tmp_path)
    store.add_file("", "a", "fine-tune", b"x")
    store.close()
    assert names(1) == ["a"]
    store = Store(tmp_path)
    assert not store.has_changed
    for name in ("b", "c"):
        store.add_file("", name, "fine-tune", b"x")
        assert store.has_changed
        store.copy()
        assert not store.has_changed
    assert (names(1), names(2)) == (["a", "b", "c"], ["a"])
    store.close()
    assert sorted(path.name for path in (tmp_path / "copies").iterdir()) == ["banded-1.sqlite", "banded-2.sqlite"]


def test_a_damaged_copy_is_passed_over(directory: Path, filled: tuple[Path, Kept], caplog: pytest.LogCaptureFixture) -> None:
    """Whatever it has, nothing of it comes into the database; the other copy may have the same."""
    newest, older = directory / "copies" / "banded-1.sqlite", directory / "copies" / "banded-2.sqlite"
    for harm, reason in (
        (lambda: newest.write_bytes(NOISE), "file is not a database"),
        (lambda: overwrite(newest, 0.3, NOISE), "database disk image is malformed"),
        (lambda: overwrite_text(newest, b"Step 1", b"St\xff"), "Could not decode to UTF-8"),
        (newest.unlink, None),
    ):
        shutil.copy(filled[0] / "copies" / "banded-1.sqlite", newest)
        be_gone(directory, DATABASE)
        harm()
        be_gone(directory, older.name)
        shutil.copy(filled[0] / "copies" / "banded-1.sqlite", older)
        caplog.clear()
        for _ in range(2):
            with closing(Store(directory)) as store:
                assert Kept.of(store) == filled[1]
        if reason:
            assert f"{newest} can't be read: " in caplog.text


def test_a_database_that_vanishes_while_it_is_used_is_not_copied_as_an_empty_one(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(directory)
    store.add_file("", "late", "fine-tune", b"x")
    before = (directory / "copies" / "banded-1.sqlite").read_bytes()
    be_gone(directory, f"{DATABASE}*")
    store.close()
    assert "the database was not copied: unable to open database file" in caplog.text
    assert (directory / "copies" / "banded-1.sqlite").read_bytes() == before
    store = Store(directory)
    assert {file.filename for file in store.files("")} == {"0.jsonl", "1.jsonl", "2.jsonl", "late"}
    store.close()


def test_a_column_is_added_by_a_script_and_a_default(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the next schema would: rows and records of before get the default, and what is newer is refused."""

    class Coloured(NamedTuple):
        id: str
        filename: str
        purpose: str
        bytes: int
        created: int
        owner: str = ""
        colour: str = "green"

    script, known = "ALTER TABLE files ADD COLUMN colour TEXT NOT NULL DEFAULT 'green';", database.VERSION
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, script))
        for module in ("database", "records"):
            patch.setattr(f"service.jobs.{module}.VERSION", known + 1)
        patch.setattr("service.jobs.store.StoredFile", Coloured)
        patch.setattr("service.jobs.store.TABLES", {Coloured: "files", Job: "jobs"})
        patch.setattr("service.jobs.store.PREFIXES", {Coloured: "file-", Job: "ftjob-"})
        for _ in range(2):
            store = Store(directory)
            assert {getattr(file, "colour", None) for file in store.files("")} == {"green"}
            new = store.add_file("", "new", "fine-tune", b"x")
            store.close()
            be_gone(directory, DATABASE, "copies")
        assert json.loads((directory / "files" / f"{new.id}.json").read_text())["colour"] == "green"
    with pytest.raises(DataError, match=f"json has schema {known + 1}, from a newer Banded; this one knows {known}"):
        Store(directory)


GOOD_FILE = {"version": 1, "id": "file-1", "filename": "a", "purpose": "fine-tune", "bytes": 1, "created": 1}
GOOD_JOB = {
    **{"version": 1, "id": "ftjob-1", "status": "running", "model": "m", "suffix": "", "seed": 0, "training_file": "file-1"},
    **{"validation_file": None, "created": 1, "hyperparameters": PARAMETERS._asdict()},
}


@pytest.mark.parametrize("record", [GOOD_FILE, GOOD_JOB])
def test_a_record_is_read(record: dict[str, Any], tmp_path: Path) -> None:
    kind = StoredFile if record is GOOD_FILE else Job
    path = tmp_path / f"{record['id']}.json"
    path.write_text(json.dumps(record))
    item = read_record(path, kind)
    write_record(path, item)
    assert read_record(path, kind) == item
    assert json.loads(path.read_text()) == dict.fromkeys(kind._fields) | record | {"version": database.VERSION, "owner": ""}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([GOOD_FILE], "file-1.json must hold a JSON object, got list"),
        (GOOD_FILE | {"version": None}, "it has no version"),
        (GOOD_FILE | {"version": True}, "it has no version"),
        (GOOD_FILE | {"id": "file-2"}, "it is that of file-2"),
        (GOOD_FILE | {"id": "file-1/../x"}, "'file-1/../x' is no id"),
        (GOOD_FILE | {"colour": "red"}, "it has an unknown field, colour"),
        ({name: value for name, value in GOOD_FILE.items() if name != "bytes"}, "it has no bytes"),
        (GOOD_FILE | {"bytes": "1"}, "bytes is '1'"),
        (GOOD_FILE | {"bytes": True}, "bytes is True"),
        (GOOD_FILE | {"filename": None}, "filename is None"),
        (GOOD_FILE | {"filename": "\ud800"}, "surrogates not allowed"),
        (GOOD_JOB | {"status": "asleep"}, "status is 'asleep'"),
        (GOOD_JOB | {"validation_file": 1}, "validation_file is 1"),
        (GOOD_JOB | {"hyperparameters": [2, 8, 1e-3, 4]}, "hyperparameters is [2, 8, 0.001, 4]"),
        (GOOD_JOB | {"hyperparameters": PARAMETERS._asdict() | {"rank": 1.5}}, "rank is 1.5"),
    ],
)
def test_a_record_that_is_none_is_refused(record: Any, message: str, tmp_path: Path) -> None:
    job = isinstance(record, dict) and "status" in record
    path = tmp_path / ("ftjob-1.json" if job else "file-1.json")
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_record(path, Job if job else StoredFile)
