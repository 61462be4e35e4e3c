"""The SQLite database of a data directory: opened, checked, brought to the schema of this version, and copied."""

import sqlite3
from collections import deque
from contextlib import closing, suppress
from pathlib import Path
from shlex import quote
from typing import Any

from model.checkpoint.files import write_atomically
from service.jobs.disk import is_full

# What a database of each older schema lacks, oldest first; PRAGMA user_version counts those that were applied. A new
# column gets a script here that adds it with a default, and a field with that default in its tuple in store.py.
MIGRATIONS = (
    """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, filename TEXT NOT NULL, purpose TEXT NOT NULL, bytes INTEGER NOT NULL, created INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, status TEXT NOT NULL, model TEXT NOT NULL, suffix TEXT NOT NULL, seed INTEGER NOT NULL,
    hyperparameters TEXT NOT NULL, training_file TEXT NOT NULL, validation_file TEXT, created INTEGER NOT NULL,
    finished INTEGER, error TEXT, fine_tuned_model TEXT, trained_tokens INTEGER
);
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, created INTEGER NOT NULL, level TEXT NOT NULL,
    type TEXT NOT NULL, message TEXT NOT NULL, data TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS events_of ON events (job, number);
""",
    """
ALTER TABLE files ADD COLUMN owner TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN owner TEXT NOT NULL DEFAULT '';
""",
)
VERSION = len(MIGRATIONS)
COLUMNS = """
SELECT tables.name, columns.name FROM sqlite_master AS tables, pragma_table_info(tables.name) AS columns
WHERE tables.type = 'table'
"""
EVENT = ("number", "job", "created", "level", "type", "message", "data")
# What is true of an event that no outside hand has changed.
IS_SOUND = "json_valid(data) AND typeof(created) = 'integer' AND " + " AND ".join(
    f"typeof({column}) = 'text'" for column in ("job", "level", "type", "message", "data")
)
# SQLite's primary codes of a database that is sound, but out of reach.
OUT_OF_REACH = (
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_IOERR,
)


class DataError(ValueError):
    """A data directory that can't be used: which part, what is wrong with it and what to do, in one line."""


def damaged(path: Path, reason: str) -> DataError:
    """The error for a database that a start must not touch, with the way out."""
    move = f"mv {quote(str(path))} {quote(f'{path}.damaged')}"
    return DataError(
        f"{path} {reason}. Put a backup in its place, or move it away ({move}): the next start rebuilds it from the records "
        "of files and jobs and from copies/, and keeps what has no record in lost+found/"
    )


def newer(path: Path, version: int) -> DataError:
    return DataError(f"{path} has schema {version}, from a newer Banded; this one knows {VERSION}: start the newer one")


def open_database(path: Path) -> sqlite3.Connection:
    """The database, sound and of this version's schema; a new one if there is none.

    Raises DataError if it is neither and can't be made so, and sqlite3.Error on a full disk.
    """
    if path.exists() and not path.is_file():
        raise damaged(path, "is not a file")
    try:
        db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            prepare(db, path)
        except BaseException:
            db.close()
            raise
    except UnicodeDecodeError as error:  # SQLite quotes the damage in its message
        raise damaged(path, "is damaged (its schema)") from error
    except sqlite3.Error as error:
        if is_full(error, path.parent):
            raise
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in OUT_OF_REACH:
            raise DataError(f"{path} can't be used: {error}") from error
        raise damaged(path, f"is damaged ({error})") from error
    return db


def prepare(db: sqlite3.Connection, path: Path) -> None:
    """Check a database and bring it to this version's schema."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise newer(path, version)
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(f"BEGIN; PRAGMA user_version = {version}; ROLLBACK")  # fails if nothing can be written
    # More than quick_check: an index that doesn't fit its table would hide rows.
    (fault,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if fault != "ok":
        raise damaged(path, f"is damaged ({' '.join(fault.split())})")
    if version < VERSION:
        db.executescript("\n".join(["BEGIN IMMEDIATE;", *MIGRATIONS[version:], f"PRAGMA user_version = {VERSION}; COMMIT"]))
    for table, column in sorted(expected_columns() ^ columns_of(db)):
        lack = "lacks" if (table, column) in expected_columns() else "has, unknown to this version,"
        raise damaged(path, f"{lack} the column {column} of {table}")
    if db.execute(f"SELECT 1 FROM events WHERE NOT ({IS_SOUND})").fetchone():
        raise damaged(path, "is damaged (events)")
    deque(db.execute(f"SELECT {', '.join(EVENT)} FROM events"), maxlen=0)  # fails on what is not UTF-8


def expected_columns() -> set[tuple[str, str]]:
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript("".join(MIGRATIONS))
        return columns_of(db)


def columns_of(db: sqlite3.Connection) -> set[tuple[str, str]]:
    """The columns of the tables that this version has."""
    return {(table, column) for table, column in db.execute(COLUMNS) if table in ("files", "jobs", "events")}


def copy_database(path: Path, copies: Path, *, keep_last: bool) -> None:
    """Copy a database that may be in use to `copies`, as its newest copy. `keep_last` keeps the newest so far as the older.

    Raises sqlite3.Error, and OSError, and leaves the copies alone then.
    """
    newest, older = copy_paths(copies)
    with write_atomically(newest, durable=True) as temporary:
        address = f"{path.resolve().as_uri()}?mode=ro"  # without a mode, a database that was taken away would be made anew
        with closing(sqlite3.connect(address, uri=True)) as source, closing(sqlite3.connect(temporary)) as copy:
            source.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # one file, whole by itself
            (fault,) = copy.execute("PRAGMA quick_check(1)").fetchone()
            if fault != "ok":
                raise sqlite3.DatabaseError(fault)
        if keep_last and newest.exists():
            newest.replace(older)


def copy_paths(copies: Path) -> tuple[Path, Path]:
    """Where the newest copy is and where the one before."""
    return copies / "banded-1.sqlite", copies / "banded-2.sqlite"


def events_of(copy: Path, db: sqlite3.Connection) -> list[tuple[Any, ...]]:
    """The rows of events that `copy` has of jobs in `db` and `db` has not. Raises sqlite3.Error if they can't be read."""
    db.execute("ATTACH ? AS copy", (str(copy),))
    try:
        (fault,) = db.execute("PRAGMA copy.quick_check(1)").fetchone()
        if fault != "ok":
            raise sqlite3.DatabaseError(fault)
        lost = "job IN (SELECT id FROM jobs) AND number NOT IN (SELECT number FROM main.events)"
        return db.execute(f"SELECT {', '.join(EVENT)} FROM copy.events WHERE {lost} AND {IS_SOUND}").fetchall()
    finally:
        with suppress(sqlite3.Error):
            db.execute("DETACH copy")
