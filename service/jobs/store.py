"""Files and fine-tuning jobs: their rows in SQLite, their contents in files next to it."""

import fcntl
import json
import logging
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from model.checkpoint.files import write_atomically

log = logging.getLogger("banded.store")

MAX_FILES = 1000
MAX_TOTAL_BYTES = 4 << 30
MAX_JOBS = 1000

Status = Literal["validating_files", "running", "succeeded", "failed", "cancelled"]
# A job with one of these goes on, after a restart too.
UNFINISHED = ("validating_files", "running")
HAS_NOT_ENDED = f"status IN {UNFINISHED}"
LAST_NUMBER = 2**63 - 1

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


class StoreFullError(Exception):
    """There is no room. `param` is the field of a request that there is no room for, if there is one."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class Store:
    """Belongs to one process, and to one thread at a time. A change is on disk when the call returns."""

    def __init__(self, directory: Path):
        """Raises ValueError if another process has the directory."""
        self.directory = directory
        (directory / "files").mkdir(parents=True, exist_ok=True)
        self._lock = (directory / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(f"another server keeps its files in {directory}") from None
        path = directory / "banded.sqlite"
        is_new = not path.exists()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.executescript(SCHEMA)
        if not is_new:  # a new database can't tell a leftover from a file whose row was lost
            self._remove_leftovers()

    def close(self) -> None:
        self._db.close()
        self._lock.close()

    def _remove_leftovers(self) -> None:
        """Remove what a killed process left behind."""
        files = {self.path_of(file.id) for file in self.files()}
        for path in (self.directory / "files").glob("file-*.jsonl*"):
            if path not in files:
                log.warning("removing %s: no stored file has this name", path)
                path.unlink(missing_ok=True)
        runs = {self.run_directory(job.id) for job in self.jobs() if job.status in UNFINISHED or job.fine_tuned_model}
        for path in (self.directory / "jobs").glob("ftjob-*"):
            if path not in runs:
                log.warning("removing %s: no unfinished job runs there, and it holds no result", path)
                shutil.rmtree(path, ignore_errors=True)

    def add_file(self, filename: str, purpose: str, content: bytes) -> StoredFile:
        """Raises StoreFullError, with the numbers, if there is no room."""
        count, total = self._db.execute("SELECT count(*), coalesce(sum(bytes), 0) FROM files").fetchone()
        if count >= MAX_FILES:
            raise StoreFullError(f"{count} files are stored, as many as there may be: delete one", "file")
        if total + len(content) > MAX_TOTAL_BYTES:
            message = f"files take {total} bytes; {len(content)} more are over the limit of {MAX_TOTAL_BYTES}"
            raise StoreFullError(message, "file")
        file = StoredFile(f"file-{secrets.token_hex(12)}", filename, purpose, len(content), int(time.time()))
        with write_atomically(self.path_of(file.id)) as temporary:
            temporary.write_bytes(content)
        self._db.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?)", file)
        return file

    def files(self) -> list[StoredFile]:
        """The newest first."""
        return [StoredFile(*row) for row in self._db.execute("SELECT * FROM files ORDER BY created DESC, rowid DESC")]

    def file(self, file_id: str) -> StoredFile | None:
        return next((file for file in self.files() if file.id == file_id), None)

    def path_of(self, file_id: str) -> Path:
        return self.directory / "files" / f"{file_id}.jsonl"

    def delete_file(self, file_id: str) -> None:
        self._db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path_of(file_id).unlink(missing_ok=True)

    def add_job(
        self, model: str, suffix: str, seed: int, hyperparameters: Hyperparameters, training: str, validation: str | None
    ) -> Job:
        """Drops the oldest ended job without a result to make room. Raises StoreFullError if there is none."""
        (count,) = self._db.execute("SELECT count(*) FROM jobs").fetchone()
        if count >= MAX_JOBS:
            query = f"SELECT id FROM jobs WHERE NOT {HAS_NOT_ENDED} AND fine_tuned_model IS NULL ORDER BY created, rowid"
            oldest = self._db.execute(query).fetchone()
            if oldest is None:
                raise StoreFullError(f"{count} jobs are stored, as many as there may be")
            self._db.execute("DELETE FROM events WHERE job = ?", oldest)
            self._db.execute("DELETE FROM jobs WHERE id = ?", oldest)
        job_id, now = f"ftjob-{secrets.token_hex(12)}", int(time.time())
        job = Job(job_id, "validating_files", model, suffix, seed, hyperparameters, training, validation, now)
        row = job._replace(hyperparameters=json.dumps(hyperparameters))  # type: ignore[arg-type]
        self._db.execute(f"INSERT INTO jobs VALUES ({', '.join('?' * len(row))})", row)
        return job

    def jobs(self) -> list[Job]:
        """The newest first."""
        return [job_of(row) for row in self._db.execute("SELECT * FROM jobs ORDER BY created DESC, rowid DESC")]

    def unfinished_jobs(self) -> list[Job]:
        """The newest first."""
        return [job for job in self.jobs() if job.status in UNFINISHED]

    def results(self, model: str) -> list[tuple[str, Path]]:
        """The adapters that jobs have made for `model`, oldest first: the name and the directory of each."""
        query = "SELECT fine_tuned_model, id FROM jobs WHERE model = ? AND fine_tuned_model NOT NULL ORDER BY created, rowid"
        return [(name, self.run_directory(job_id)) for name, job_id in self._db.execute(query, (model,))]

    def job(self, job_id: str) -> Job | None:
        row = self._db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return row and job_of(row)

    def update_job(self, job_id: str, **fields: Any) -> bool:
        """Change columns of a job unless it has ended. Returns whether it was changed."""
        columns = ", ".join(f"{name} = ?" for name in fields)
        query = f"UPDATE jobs SET {columns} WHERE id = ? AND {HAS_NOT_ENDED}"
        return self._db.execute(query, (*fields.values(), job_id)).rowcount > 0

    def end_job(self, job_id: str, status: Status, **fields: Any) -> bool:
        """End a job that has not ended yet. Returns whether it was ended."""
        return self.update_job(job_id, status=status, finished=int(time.time()), **fields)

    def run_directory(self, job_id: str) -> Path:
        """The directory in which a job's process works and leaves its result."""
        return self.directory / "jobs" / job_id

    def remove_run(self, job_id: str) -> None:
        """Delete the directory of a job whose process has ended and whose result nobody wants."""
        shutil.rmtree(self.run_directory(job_id), ignore_errors=True)

    def forget_result(self, job_id: str) -> None:
        """Delete the model that a job has made."""
        self._db.execute("UPDATE jobs SET fine_tuned_model = NULL WHERE id = ?", (job_id,))
        self.remove_run(job_id)

    def add_event(self, job_id: str, message: str, *, level: str = "info") -> None:
        self._add_events([(job_id, int(time.time()), level, "message", message, "{}")])

    def add_metrics(self, job_id: str, metrics: Iterable[tuple[str, Mapping[str, float]]]) -> None:
        """Add a metrics event for each message and its numbers, one of them "step". Either all are added or none."""
        now = int(time.time())
        self._add_events([(job_id, now, "info", "metrics", message, json.dumps(data)) for message, data in metrics])

    def _add_events(self, rows: list[tuple[str, int, str, str, str, str]]) -> None:
        with self._db:  # in one transaction, which waits for the disk once
            self._db.execute("BEGIN")
            self._db.executemany(
                "INSERT INTO events (job, created, level, type, message, data) VALUES (?, ?, ?, ?, ?, ?)", rows
            )

    def events(self, job_id: str, limit: int, before: int | None = None) -> list[Event]:
        """The newest first; with `before`, only those that are older than that event."""
        rows = self._db.execute(
            "SELECT * FROM events WHERE job = ? AND number < ? ORDER BY number DESC LIMIT ?",
            (job_id, LAST_NUMBER if before is None else before, limit),
        )
        return [Event._make((*row[:6], json.loads(row[6]))) for row in rows]

    def has_event(self, job_id: str, number: int) -> bool:
        query = "SELECT 1 FROM events WHERE job = ? AND number = ?"
        return self._db.execute(query, (job_id, number)).fetchone() is not None

    def last_metrics(self, job_id: str) -> dict[str, float]:
        """The numbers of the newest metrics event, empty if there is none."""
        query = "SELECT data FROM events WHERE job = ? AND type = 'metrics' ORDER BY number DESC LIMIT 1"
        row = self._db.execute(query, (job_id,)).fetchone()
        return json.loads(row[0]) if row else {}


def job_of(row: tuple[Any, ...]) -> Job:
    job = Job(*row)
    return job._replace(hyperparameters=Hyperparameters(*json.loads(row[5])))
