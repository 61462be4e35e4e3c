"""Files and fine-tuning jobs: rows in SQLite, contents on disk beside it."""

import json
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

MAX_FILES = 1000
MAX_TOTAL_BYTES = 4 << 30
MAX_JOBS = 1000

Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
# Jobs that still have something to do, after a restart too.
UNFINISHED = ("validating_files", "queued", "running")

SCHEMA = """
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
"""


class StoreFullError(Exception):
    """More than the store holds."""


class StoredFile(NamedTuple):
    id: str
    filename: str
    purpose: str
    bytes: int
    created: int


class Hyperparameters(NamedTuple):
    n_epochs: int
    batch_size: int
    learning_rate: float
    rank: int


class Job(NamedTuple):
    id: str
    status: Status
    model: str
    suffix: str
    seed: int
    hyperparameters: Hyperparameters
    training_file: str
    validation_file: str | None
    created: int
    finished: int | None = None
    error: str | None = None
    fine_tuned_model: str | None = None
    trained_tokens: int | None = None


class Event(NamedTuple):
    number: int
    job: str
    created: int
    level: str  # info, warn or error
    type: str  # message, or metrics
    message: str
    data: dict[str, Any]


class Store:
    """Used from one thread at a time. What it says is on the disk."""

    def __init__(self, directory: Path):
        self.directory = directory
        (directory / "files").mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(directory / "banded.sqlite", check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.executescript(SCHEMA)

    def close(self) -> None:
        self._db.close()

    # -- files --------------------------------------------------------------------------------------------------------

    def add_file(self, filename: str, purpose: str, content: bytes) -> StoredFile:
        """Raises StoreFullError with the numbers."""
        count, total = self._db.execute("SELECT count(*), coalesce(sum(bytes), 0) FROM files").fetchone()
        if count >= MAX_FILES:
            raise StoreFullError(f"{count} files are stored, as many as there may be: delete one")
        if total + len(content) > MAX_TOTAL_BYTES:
            raise StoreFullError(f"files take {total} bytes; {len(content)} more are over the limit of {MAX_TOTAL_BYTES}")
        file = StoredFile(f"file-{secrets.token_hex(12)}", filename, purpose, len(content), int(time.time()))
        path = self.path_of(file.id)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)
        self._db.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?)", file)
        return file

    def files(self) -> list[StoredFile]:
        """The newest first."""
        return [StoredFile(*row) for row in self._db.execute("SELECT * FROM files ORDER BY created DESC, rowid DESC")]

    def file(self, file_id: str) -> StoredFile | None:
        row = self._db.execute("SELECT * FROM files WHERE id = ?", (file_id,)).fetchone()
        return row and StoredFile(*row)

    def path_of(self, file_id: str) -> Path:
        return self.directory / "files" / f"{file_id}.jsonl"

    def delete_file(self, file_id: str) -> None:
        self._db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path_of(file_id).unlink(missing_ok=True)

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def add_job(
        self, model: str, suffix: str, seed: int, hyperparameters: Hyperparameters, training: str, validation: str | None
    ) -> Job:
        """Raises StoreFullError with the number."""
        (count,) = self._db.execute("SELECT count(*) FROM jobs").fetchone()
        if count >= MAX_JOBS:
            raise StoreFullError(f"{count} jobs are stored, as many as there may be")
        job_id, now = f"ftjob-{secrets.token_hex(12)}", int(time.time())
        job = Job(job_id, "validating_files", model, suffix, seed, hyperparameters, training, validation, now)
        row = job._replace(hyperparameters=json.dumps(hyperparameters))  # type: ignore[arg-type]
        self._db.execute(f"INSERT INTO jobs VALUES ({', '.join('?' * len(row))})", row)
        return job

    def jobs(self) -> list[Job]:
        """The newest first."""
        return [job_of(row) for row in self._db.execute("SELECT * FROM jobs ORDER BY created DESC, rowid DESC")]

    def job(self, job_id: str) -> Job | None:
        row = self._db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return row and job_of(row)

    def update_job(self, job_id: str, **fields: Any) -> Job:
        """Change columns of a job; it as it is now."""
        columns = ", ".join(f"{name} = ?" for name in fields)
        self._db.execute(f"UPDATE jobs SET {columns} WHERE id = ?", (*fields.values(), job_id))
        job = self.job(job_id)
        assert job is not None
        return job

    def end_job(self, job_id: str, status: Status, **fields: Any) -> Job:
        return self.update_job(job_id, status=status, finished=int(time.time()), **fields)

    def run_directory(self, job_id: str) -> Path:
        """Where a job's process works, and its result lies."""
        return self.directory / "jobs" / job_id

    def forget_result(self, job_id: str) -> None:
        """The model of a job was deleted."""
        self.update_job(job_id, fine_tuned_model=None)
        shutil.rmtree(self.run_directory(job_id), ignore_errors=True)

    # -- events -------------------------------------------------------------------------------------------------------

    def add_event(self, job_id: str, message: str, *, level: str = "info", data: Mapping[str, float] | None = None) -> None:
        """With `data` it is of type metrics."""
        kind = "metrics" if data else "message"
        row = (job_id, int(time.time()), level, kind, message, json.dumps(data or {}))
        self._db.execute("INSERT INTO events (job, created, level, type, message, data) VALUES (?, ?, ?, ?, ?, ?)", row)

    def events(self, job_id: str) -> list[Event]:
        """The newest first."""
        rows = self._db.execute("SELECT * FROM events WHERE job = ? ORDER BY number DESC", (job_id,))
        return [Event._make((*row[:6], json.loads(row[6]))) for row in rows]

    def last_step(self, job_id: str) -> int:
        """The last update of which there is an event."""
        steps = [event.data["step"] for event in self.events(job_id) if event.type == "metrics"]
        return max(steps, default=0)


def job_of(row: tuple[Any, ...]) -> Job:
    job = Job(*row)
    return job._replace(hyperparameters=Hyperparameters(*json.loads(row[5])))
