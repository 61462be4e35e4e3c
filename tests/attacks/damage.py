"""What `python -m tests.attacks.stored_data` does to a data directory."""

import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

DATABASE = "banded.sqlite"
NOISE = random.Random(20200528).randbytes(5000)
PAGE = 4096


class Stored(NamedTuple):
    """What a data directory holds. Files are called A, B, C; jobs 1 (has succeeded), 2 (runs), 3 (waits)."""

    files: dict[str, tuple[str, bytes]]  # ids and contents
    jobs: dict[str, tuple[str, str]]  # ids and statuses
    num_events: int  # of job 1
    adapter: str  # what job 1 has made
    text: str  # its answer
    older: Path  # the database as it was when only A was stored

    @property
    def names(self) -> list[str]:
        return [*(f"file {name}" for name in self.files), *(f"job {name}" for name in self.jobs), "events", "adapter"]


Do = Callable[[Path, Stored], object]


class Damage(NamedTuple):
    """`hides`: what is answered, "one or the other", for things that nobody could show. All others must be served."""

    name: str
    do: Do
    hides: Mapping[str, str] = {}
    refused: bool | None = False  # whether the start must be; None where it may
    is_killed: bool = False  # of a server that was killed, with SQLite's log of what it wrote last
    is_newer: bool = False  # then nothing has to be moved away


GONE = "404 file_not_found"
NO_CONTENT = "404 file_content_missing"
NO_JOB = "404 job_not_found"
NO_MODEL = "404 model_not_found"


def execute(*statements: str) -> Do:
    def do(directory: Path, _: Stored) -> None:
        with closing(sqlite3.connect(directory / DATABASE)) as db:
            for statement in statements:
                db.execute(statement)
            db.commit()

    return do


# Each of these does one thing to a path.


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + NOISE)


def garble(path: Path) -> None:
    """Noise of the same length."""
    path.write_bytes((NOISE * (path.stat().st_size // len(NOISE) + 1))[: path.stat().st_size])


def be(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in a path's place."""

    def do(path: Path) -> None:
        remove(path)
        make(path)

    return do


def be_full_directory(path: Path) -> None:
    path.mkdir()
    (path / "x").write_text("x")


REPLACED: dict[str, Callable[[Path], None]] = {
    "gone": remove,
    "empty": empty,
    "cut in half": halve,
    "noise": garble,
    "a directory": be(be_full_directory),
    "a FIFO": be(os.mkfifo),
    "a link to itself": be(lambda path: path.symlink_to(path.name)),
    "a link to /dev/zero": be(lambda path: path.symlink_to("/dev/zero")),
}


def at(name: str, do: Callable[[Path], object]) -> Do:
    """Do something to what `name`, a pattern, names."""
    return lambda directory, _: [do(path) for path in sorted(directory.glob(name))]


def overwrite(place: float, data: bytes, path: Path) -> None:
    """Write `data` at a share of a file's length."""
    with path.open("r+b") as file:
        file.seek(int(place * path.stat().st_size))
        file.write(data)


def noisy_page(seed: int, path: Path) -> None:
    """One page of a database, anywhere, is noise, or one bit of it is another."""
    chance = random.Random(seed)
    page = chance.randrange(path.stat().st_size // PAGE)
    with path.open("r+b") as file:
        file.seek(page * PAGE)
        data = bytearray(file.read(PAGE))
        if seed % 2:
            data = bytearray(chance.randbytes(PAGE))
        else:
            data[chance.randrange(PAGE)] ^= 1 << chance.randrange(8)
        file.seek(page * PAGE)
        file.write(data)


def all_of(*steps: Do) -> Do:
    return lambda directory, stored: [step(directory, stored) for step in steps]


def be_newer(path: Path) -> None:
    """As a record of a newer version says it."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))


def swap_records(kind: str, directory: Path, _: Stored) -> None:
    """Each of the first two has the other's id."""
    first, second, *_others = sorted((directory / kind).glob("*.json"))
    texts = first.read_text(), second.read_text()
    first.write_text(texts[1])
    second.write_text(texts[0])


def of_file(name: str, do: Callable[[Path], object]) -> Do:
    return lambda directory, stored: do(directory / "files" / f"{stored.files[name][0]}.jsonl")


def of_run(number: str, what: str, do: Callable[[Path], object]) -> Do:
    return lambda directory, stored: do(directory / "jobs" / stored.jobs[number][0] / what)


def older_database(directory: Path, stored: Stored) -> None:
    at(f"{DATABASE}*", remove)(directory, stored)
    shutil.copy(stored.older, directory / DATABASE)


LOSE_DATABASE = at(f"{DATABASE}*", remove)
LOSE_COPIES = at("copies/*", remove)
LOSE_RECORDS = at("*/*.json", remove)


def damages_of_the_database() -> Iterator[Damage]:
    for name, do in REPLACED.items():
        yield Damage(f"database: {name}", at(DATABASE, do), refused=name not in ("gone", "empty"))
    yield Damage("database: its header is noise", at(DATABASE, partial(overwrite, 0, NOISE[:100])), refused=True)
    yield Damage("database: ends within its header", at(DATABASE, lambda path: os.truncate(path, 50)), refused=True)
    yield Damage("database: a text", at(DATABASE, lambda path: path.write_text("hello\n" * 5000)), refused=True)
    for seed in range(6):
        yield Damage(
            f"database: a page is {'noise' if seed % 2 else 'one bit off'} ({seed})",
            at(DATABASE, partial(noisy_page, seed)),
            refused=None,
        )
    yield Damage("database: from an older copy", older_database)
    for table in ("files", "jobs", "events"):
        yield Damage(f"database: no rows of {table}", execute(f"DELETE FROM {table}"))
        yield Damage(f"database: no table {table}", execute(f"DROP TABLE {table}"), refused=True)
    for table, column in (("files", "bytes"), ("jobs", "trained_tokens"), ("events", "data")):
        yield Damage(f"database: no column {column}", execute(f"ALTER TABLE {table} DROP COLUMN {column}"), refused=True)
    yield Damage("database: an unknown column", execute("ALTER TABLE files ADD COLUMN colour TEXT"), refused=True)
    yield Damage("database: a newer version's", execute("PRAGMA user_version = 99"), refused=True, is_newer=True)
    yield Damage("database: a schema that can't be read", at(DATABASE, spoil_schema), refused=True)
    yield Damage("database: a length that is a text", execute("UPDATE files SET bytes = 'many'"), refused=True)
    yield Damage("database: a status that is unknown", execute("UPDATE jobs SET status = 'lost'"), refused=True)
    yield Damage(
        "database: an id that leads elsewhere", execute("UPDATE jobs SET id = '../x' WHERE rowid = 1"), refused=True
    )


def spoil_schema(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"sqlite_autoindex_files_1", b"sqlite_autoindex_fil\xd3\xd9_1", 1))


def damages_of_its_log() -> Iterator[Damage]:
    """What SQLite keeps next to a database that is in use."""
    wal = f"{DATABASE}-wal"
    yield Damage("log: nothing done", lambda directory, stored: None, is_killed=True)
    yield Damage("log: gone", at(wal, remove), is_killed=True)
    yield Damage("log: cut in half", at(wal, halve), is_killed=True)
    yield Damage("log: noise", at(wal, garble), is_killed=True, refused=None)
    yield Damage("log: gone with its index", at(f"{DATABASE}-*", remove), is_killed=True)
    yield Damage("log: its index is noise", at(f"{DATABASE}-shm", garble), is_killed=True)
    yield Damage("log: its database is gone", at(DATABASE, remove), is_killed=True)
    yield Damage("log: its database is empty", at(DATABASE, empty), is_killed=True)
    yield Damage("log: a directory", at(wal, be(be_full_directory)), is_killed=True, refused=None)
    yield Damage("log: a journal of noise", lambda directory, _: (directory / f"{DATABASE}-journal").write_bytes(NOISE))


def damages_of_records() -> Iterator[Damage]:
    for kind in ("files", "jobs"):
        for name, do in REPLACED.items():
            yield Damage(f"records of {kind}: {name}", at(f"{kind}/*.json", do))
        yield Damage(f"records of {kind}: of another id", partial(swap_records, kind))
        yield Damage(f"records of {kind}: a newer version's", at(f"{kind}/*.json", be_newer), refused=True, is_newer=True)
    yield Damage("records of files: without database", all_of(at("files/*.json", remove), LOSE_DATABASE), hide_files(GONE))
    yield Damage(
        "records of jobs: without database",
        all_of(at("jobs/*.json", remove), LOSE_DATABASE),
        {f"job {number}": NO_JOB for number in "123"} | {"events": NO_JOB, "adapter": NO_MODEL},
    )
    yield Damage("records, database, copies: noise", all_of(at("*/*.json", garble), LOSE_DATABASE, LOSE_COPIES), ALL_GONE)


def hide_files(answer: str) -> dict[str, str]:
    return {f"file {name}": answer for name in "ABC"}


UNABLE = {f"job {number}": "failed or served" for number in "23"}  # those without their files: they find out soon
ALL_GONE = hide_files(GONE) | {f"job {number}": NO_JOB for number in "123"} | {"events": NO_JOB, "adapter": NO_MODEL}


def damages_of_contents() -> Iterator[Damage]:
    """Of a file that nothing uses, and of what a job has made."""
    for name, do in REPLACED.items():
        hides = {"file B": "another content" if name == "noise" else NO_CONTENT}  # noise has the same length
        yield Damage(f"content of a file: {name}", of_file("B", do), hides)
    yield Damage("content of a file: longer", of_file("B", lengthen), {"file B": NO_CONTENT})
    for name, do in REPLACED.items():
        yield Damage(f"weights of an adapter: {name}", of_run("1", "adapter.safetensors", do), {"adapter": NO_MODEL})
    for name in ("gone", "noise", "a FIFO"):
        yield Damage(f"size of an adapter: {name}", of_run("1", "adapter.json", REPLACED[name]), {"adapter": NO_MODEL})
    for name in ("gone", "a FIFO"):
        yield Damage(f"an adapter's directory: {name}", of_run("1", "", REPLACED[name]), {"adapter": NO_MODEL})
    yield Damage("an adapter's directory: a file", of_run("1", "", be(Path.touch)), {"adapter": NO_MODEL})


def damages_of_the_rest() -> Iterator[Damage]:
    for name, do in REPLACED.items():
        yield Damage(f"copies: {name}", at("copies/*", do))
    for name in ("gone", "noise", "a FIFO"):
        both = all_of(at("copies/*", REPLACED[name]), LOSE_DATABASE)
        yield Damage(f"copies: {name}, and no database", both, {"events": "0 events"})
    stray = all_of(LOSE_DATABASE, LOSE_RECORDS)
    yield Damage("database, records: gone", stray, ALL_GONE)
    yield Damage("the same, lost+found is a file", all_of(stray, lambda d, _: (d / "lost+found").write_text("x")), ALL_GONE)
    yield Damage("the same, lost+found has the names", all_of(take_names, stray), ALL_GONE)
    yield Damage("lock: a directory", at("lock", be(Path.mkdir)), refused=True)
    yield Damage("ballast: a directory", at("ballast", be(Path.mkdir)))
    for name in ("files", "jobs", "copies"):
        yield Damage(f"{name}/: a file", all_of(at(name, be(Path.touch))), refused=True)
    yield Damage("files/: gone", at("files", remove), hide_files(NO_CONTENT) | UNABLE)
    yield Damage("jobs/: gone", at("jobs", remove), {"adapter": NO_MODEL})
    yield Damage("all: gone", at("*", remove), ALL_GONE)


def take_names(directory: Path, _: Stored) -> None:
    """Everything that could be moved to lost+found is there already, with something else in it."""
    lost = directory / "lost+found"
    lost.mkdir()
    for path in [*directory.glob("files/*"), *directory.glob("jobs/*"), *directory.glob(f"{DATABASE}*")]:
        (lost / path.name).write_text("taken")


DAMAGES = [
    Damage("nothing", lambda directory, stored: None),
    *damages_of_the_database(),
    *damages_of_its_log(),
    *damages_of_records(),
    *damages_of_contents(),
    *damages_of_the_rest(),
]
