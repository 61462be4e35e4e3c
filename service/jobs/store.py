"""Files and fine-tuning jobs: a row and a record of each, and their contents.

banded.sqlite                  the rows, and the events of jobs
copies/                        the last two copies of the database
files/ID.jsonl, ID.json        a file's content and its record
jobs/ID/, ID.json              where a job's process works and leaves its result, and the job's record
lost+found/                    what a start has found and no row or record tells of
ballast                        room for deleting on a full disk
lock                           held by the one server that has the directory

A record is written ahead of its row, so it is right where the two differ: after a crash, or with an older database.
"""

import fcntl
import json
import logging
import secrets
import shutil
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from model.checkpoint.files import write_atomically
from service.engine.options import NOBODY
from service.jobs.database import EVENT, DataError, copy_database, copy_paths, damaged, events_of, open_database
from service.jobs.disk import SPARE, Ballast, DiskFullError, free_bytes, room_for
from service.jobs.records import checked, read_record, write_record

log = logging.getLogger("banded.store")

# Of each owner: what others have must neither be told nor take room.
MAX_FILES = 1000
MAX_TOTAL_BYTES = 4 << 30
MAX_JOBS = 1000

Status = Literal["validating_files", "running", "succeeded", "failed", "cancelled"]
# A job with one of these goes on, after a restart too.
UNFINISHED = ("validating_files", "running")


class StoredFile(NamedTuple):
    """A row of files."""

    id: str
    filename: str
    purpose: str
    bytes: int
    created: int
    owner: str = NOBODY  # the name of the key that it came with


class Hyperparameters(NamedTuple):
    n_epochs: int
    batch_size: int
    learning_rate: float
    rank: int


class Job(NamedTuple):
    """A row of jobs."""

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
    owner: str = NOBODY


class Event(NamedTuple):
    number: int  # counts those of its job from 1: a count of all would tell of others' jobs
    job: str
    created: int
    level: str  # info, warn or error
    type: str  # message, or metrics
    message: str
    data: dict[str, Any]


class NewEvent(NamedTuple):
    """An event that has no number yet."""

    level: str
    type: str
    message: str
    data: Mapping[str, float] = {}


def message_event(message: str, level: str = "info") -> NewEvent:
    return NewEvent(level, "message", message)


class StoreFullError(Exception):
    """There is no room. `param` is the field of a request that there is no room for, if there is one."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


T = TypeVar("T", StoredFile, Job)
TABLES: dict[type, str] = {StoredFile: "files", Job: "jobs"}
PREFIXES: dict[type, str] = {StoredFile: "file-", Job: "ftjob-"}


class Store:
    """Belongs to one process, and to one thread but for `add_file` and `copy`. A change is on disk when the call returns.

    A change raises DiskFullError if there is no room for it, and nothing has changed then. Only its record may have been
    written already; the next start then makes the change.
    """

    def __init__(self, directory: Path):
        """Nothing stored is removed: what nothing explains is moved to lost+found/, with a line in the log.

        Raises ValueError if another process has the directory, DataError if the database is damaged or a newer Banded's,
        and OSError if the directory can't be written.
        """
        self.directory = directory
        self._database, self._copies = directory / "banded.sqlite", directory / "copies"
        self._ballast = Ballast(directory / "ballast")
        self._changing, self._copying = threading.RLock(), threading.Lock()
        self._copied = 0 if copy_paths(self._copies)[0].exists() else -1  # changes at the time of the last copy
        self._has_copied = False
        with ExitStack() as opened, self.room():
            for folder in ("files", "jobs", "copies"):
                (directory / folder).mkdir(parents=True, exist_ok=True)
            self._lock = opened.enter_context((directory / "lock").open("w"))
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another server keeps its files in {directory}") from None
            if free_bytes(directory) < SPARE:
                self._ballast.give_up()
            self._remove_temporary_files()
            self._db = opened.enter_context(closing(self._open()))
            self._reconcile(StoredFile)
            self._reconcile(Job)
            self._recover_events()
            self._set_strays_aside()
            self._ballast.fill()
            opened.pop_all()

    def close(self) -> None:
        try:
            self.copy()
        except (OSError, sqlite3.Error) as error:
            log.warning("the database was not copied: %s", error)
        self._db.close()
        self._lock.close()

    @property
    def free_bytes(self) -> float:
        """Of the directory's disk. Not a number if it can't be found out."""
        try:
            return free_bytes(self.directory)
        except OSError:
            return float("nan")

    def check_disk(self, size: int = 0) -> None:
        """Raises DiskFullError if the disk has no room for `size` bytes and for what is written with them."""
        with self._changing:
            self._ballast.fill()  # if there is room again: what is stored now may have to be deleted on a full disk
        if free_bytes(self.directory) < size + SPARE:
            raise DiskFullError(self.directory, size + SPARE, "the data directory")

    def room(self, size: int = 0) -> AbstractContextManager[None]:
        """In this block a write that finds the disk full raises DiskFullError; `size` as in check_disk."""
        return room_for("the data directory", self.directory, size + SPARE)

    @property
    def has_changed(self) -> bool:
        """Whether the database has changed since its last copy."""
        return self._copied != self._db.total_changes

    def copy(self) -> None:
        """Copy the database, if it has changed. Any thread may call this. Raises DiskFullError and sqlite3.Error."""
        with self._copying, self.room():
            changes = self._db.total_changes
            if self._copied != changes:
                # The older copy is the last one of an earlier process, so it outlives whatever goes wrong in this one.
                copy_database(self._database, self._copies, keep_last=not self._has_copied)
                self._copied, self._has_copied = changes, True
                with self._changing:  # never while a change needs the room
                    self._ballast.fill()

    def _open(self) -> sqlite3.Connection:
        if not self._database.exists() or (self._database.is_file() and not self._database.stat().st_size):
            for ending in ("-wal", "-shm", "-journal"):  # SQLite would delete or apply what belongs to another database
                self._set_aside(self._database.with_name(self._database.name + ending), "its database is gone")
        return open_database(self._database)

    def _remove_temporary_files(self) -> None:
        """Those that a killed server left: nobody was told that their content is stored."""
        for pattern in ("files/file-*.tmp", "jobs/ftjob-*.tmp", "copies/banded-*.tmp*", "ballast.tmp"):
            for path in self.directory.glob(pattern):
                if path.is_file():
                    path.unlink(missing_ok=True)

    def _reconcile(self, kind: type[T]) -> None:
        """Make the rows and the records of files or of jobs tell the same."""
        try:
            rows = {item.id: item for item in self._items(kind, checked)}
        except (ValueError, TypeError, sqlite3.Error) as error:
            raise damaged(self._database, f"is damaged (a row of {TABLES[kind]}: {error})") from error
        records = {}
        for path in sorted((self.directory / TABLES[kind]).glob(f"{PREFIXES[kind]}*.json")):
            try:
                records[path.stem] = read_record(path, kind), path.stat().st_mtime_ns
            except DataError:
                raise
            except ValueError as error:
                self._set_aside(path, f"the record can't be read: {error}")
        changed = [(item, written) for item, written in records.values() if rows.get(item.id) != item]
        if changed:
            with self._transaction():
                for item, _ in sorted(changed, key=lambda each: (each[0].created, each[1])):
                    self._put_row(item)
            log.warning("%d rows of %s are rebuilt from their records", len(changed), TABLES[kind])
        for item in rows.values():
            if item.id not in records:
                write_record(self._record_of(item), item)

    def _recover_events(self) -> None:
        for path in copy_paths(self._copies):
            try:
                lost = events_of(path, self._db) if path.is_file() else []
            except sqlite3.Error as error:
                log.warning("%s can't be read: %s", path, error)
                continue
            if lost:
                with self._transaction():
                    marks = ", ".join("?" * len(EVENT))
                    self._db.executemany(f"INSERT INTO events ({', '.join(EVENT)}) VALUES ({marks})", lost)
                log.warning("%d events of jobs are back from %s", len(lost), path)

    def _set_strays_aside(self) -> None:
        files = {self.path_of(file.id) for file in self._items(StoredFile, made_of)}
        for path in (self.directory / "files").glob("file-*.jsonl"):
            if path not in files:
                self._set_aside(path, "no row and no record tells of this file", "to use it, upload it again")
        runs = {self.run_directory(job.id) for job in self._all_jobs() if job.status in UNFINISHED or job.fine_tuned_model}
        for path in (self.directory / "jobs").glob("ftjob-*"):
            if path.is_dir() and path not in runs:
                remedy = "if it holds an adapter, serve it with --adapter NAME=DIR"
                self._set_aside(path, "no job goes on there, and none has its result there", remedy)

    def _set_aside(self, path: Path, reason: str, remedy: str = "") -> None:
        """Move a file or directory to lost+found/, if there is one."""
        if not path.exists():
            return
        place = self.directory / "lost+found" / path.name
        try:
            place.parent.mkdir(exist_ok=True)
            while place.exists():
                place = place.with_name(f"{place.name}.again")
            path.rename(place)
        except OSError as error:  # a file system's own lost+found is root's
            place = path
            reason += f" and it can't be moved ({error.strerror})"
        log.warning("%s: %s; it is kept as %s%s", path, reason, place, f": {remedy}" if remedy else "")

    def _record_of(self, item: StoredFile | Job) -> Path:
        return self.directory / TABLES[type(item)] / f"{item.id}.json"

    def _items(self, kind: type[T], made: Callable[[dict[str, Any], type[T]], T], where: str = "", *values: Any) -> list[T]:
        """The rows of files or jobs, the newest first, as `made` makes them from their fields."""
        query = f"SELECT {', '.join(kind._fields)} FROM {TABLES[kind]} {where} ORDER BY created DESC, rowid DESC"
        rows = [dict(zip(kind._fields, row, strict=True)) for row in self._select(query, *values)]
        for row in rows if kind is Job else ():
            numbers = json.loads(row["hyperparameters"])
            row["hyperparameters"] = dict(zip(Hyperparameters._fields, numbers, strict=True))
        return [made(row, kind) for row in rows]

    def _select(self, query: str, *values: Any) -> list[Any]:
        """Rows as they are on disk: never in the middle of an upload's change, which its thread may yet take back."""
        with self._changing:
            return self._db.execute(query, values).fetchall()

    def _put_row(self, item: StoredFile | Job) -> None:
        fields = item._asdict()
        values = [json.dumps(value) if isinstance(value, tuple) else value for value in fields.values()]
        changes = ", ".join(f"{name} = excluded.{name}" for name in fields)  # not REPLACE: it would change the order
        self._db.execute(
            f"INSERT INTO {TABLES[type(item)]} ({', '.join(fields)}) VALUES ({', '.join('?' * len(fields))}) "
            f"ON CONFLICT (id) DO UPDATE SET {changes}",
            values,
        )

    def _put(self, item: StoredFile | Job, events: Iterable[NewEvent] = ()) -> None:
        """Write a record and its row, with `events` of the job."""
        with self._transaction():
            self._put_row(item)
            self._add_events(item.id, events)
            write_record(self._record_of(item), item)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All changes of the block are on disk at its end, or after an error none is."""
        with self._changing, self.room():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _at_any_rate(self, change: Callable[[], None]) -> None:
        """Make a change that must be possible on a full disk: the ballast is given up for it."""
        with self._changing:
            try:
                with self.room():
                    change()
            except DiskFullError:
                self._ballast.give_up()
                with self.room():
                    self._db.execute("PRAGMA wal_checkpoint(RESTART)")  # SQLite's log begins again in the room that it has
                    change()
            self._ballast.fill()

    def add_file(self, owner: str, filename: str, purpose: str, content: bytes) -> StoredFile:
        """Any thread may call this. Raises StoreFullError, with the numbers, if there are too many files or bytes."""
        self.check_disk(len(content))
        file = StoredFile(f"file-{secrets.token_hex(12)}", filename, purpose, len(content), int(time.time()), owner)
        path = self.path_of(file.id)
        try:
            with self.room(len(content)):
                with write_atomically(path, durable=True) as temporary:
                    temporary.write_bytes(content)
                with self._changing:
                    self._check_limits(owner, len(content))
                    self._put(file)
        except BaseException:
            self._record_of(file).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise
        return file

    def _check_limits(self, owner: str, size: int) -> None:
        query = "SELECT count(*), coalesce(sum(bytes), 0) FROM files WHERE owner = ?"
        [(count, total)] = self._select(query, owner)
        if count >= MAX_FILES:
            raise StoreFullError(f"{count} files are stored, as many as there may be: delete one", "file")
        if total + size > MAX_TOTAL_BYTES:
            message = f"files take {total} bytes; {size} more are over the limit of {MAX_TOTAL_BYTES}"
            raise StoreFullError(message, "file")

    def files(self, owner: str) -> list[StoredFile]:
        """The newest first."""
        return self._items(StoredFile, made_of, "WHERE owner = ?", owner)

    def file(self, owner: str, file_id: str) -> StoredFile | None:
        return next(iter(self._items(StoredFile, made_of, "WHERE owner = ? AND id = ?", owner, file_id)), None)

    def path_of(self, file_id: str) -> Path:
        return self.directory / "files" / f"{file_id}.jsonl"

    def missing_content(self, file: StoredFile) -> str | None:
        """What is wrong with the content of a file, if something outside has removed or changed it."""
        path = self.path_of(file.id)
        if not path.is_file():
            return "is gone from the data directory"
        size = path.stat().st_size
        return None if size == file.bytes else f"has {size} bytes in the data directory, not the {file.bytes} that were sent"

    def delete_file(self, file_id: str) -> None:
        def delete() -> None:
            with suppress(FileNotFoundError, IsADirectoryError):  # something outside may have taken its place
                self.path_of(file_id).unlink()  # first of all: it makes room for the other changes
            (self.directory / "files" / f"{file_id}.json").unlink(missing_ok=True)
            with self._transaction():
                self._db.execute("DELETE FROM files WHERE id = ?", (file_id,))

        self._at_any_rate(delete)

    def add_job(
        self,
        owner: str,
        model: str,
        suffix: str,
        seed: int,
        hyperparameters: Hyperparameters,
        training: str,
        validation: str | None,
    ) -> Job:
        """Drops the owner's oldest ended job without a result to make room. Raises StoreFullError if there is none."""
        self.check_disk()
        job_id, now = f"ftjob-{secrets.token_hex(12)}", int(time.time())
        job = Job(job_id, "validating_files", model, suffix, seed, hyperparameters, training, validation, now, owner=owner)
        try:
            with self._transaction():
                self._make_room_for_a_job(owner)
                self._put_row(job)
                self._add_events(job.id, [message_event(f"Created job {job.id}")])
                write_record(self._record_of(job), job)
        except BaseException:
            self._record_of(job).unlink(missing_ok=True)
            raise
        return job

    def _make_room_for_a_job(self, owner: str) -> None:
        jobs = self.jobs(owner)
        if len(jobs) < MAX_JOBS:
            return
        ended = [job for job in jobs if job.status not in UNFINISHED and job.fine_tuned_model is None]
        if not ended:
            raise StoreFullError(f"{len(jobs)} jobs are stored, as many as there may be")
        self._db.execute("DELETE FROM events WHERE job = ?", (ended[-1].id,))
        self._db.execute("DELETE FROM jobs WHERE id = ?", (ended[-1].id,))
        self._record_of(ended[-1]).unlink(missing_ok=True)

    def jobs(self, owner: str) -> list[Job]:
        """The newest first."""
        return self._items(Job, made_of, "WHERE owner = ?", owner)

    def job(self, owner: str, job_id: str) -> Job | None:
        return next(iter(self._items(Job, made_of, "WHERE owner = ? AND id = ?", owner, job_id)), None)

    def _all_jobs(self) -> list[Job]:
        """Everybody's, the newest first."""
        return self._items(Job, made_of)

    def unfinished_jobs(self) -> list[Job]:
        """Everybody's, the newest first."""
        return [job for job in self._all_jobs() if job.status in UNFINISHED]

    def results(self, model: str, owners: Collection[str]) -> list[tuple[str, str, Path]]:
        """The adapters that jobs of `owners` have made for `model`, oldest first: owner, name and directory of each."""
        made = [job for job in self._all_jobs() if job.model == model and job.fine_tuned_model and job.owner in owners]
        return [(job.owner, str(job.fine_tuned_model), self.run_directory(job.id)) for job in reversed(made)]

    def unseen(self, owners: Collection[str]) -> Counter[str]:
        """How many files and jobs there are of each other owner."""
        found = [file.owner for file in self._items(StoredFile, made_of)] + [job.owner for job in self._all_jobs()]
        return Counter(owner for owner in found if owner not in owners)

    def update_job(self, job_id: str, *, events: Iterable[NewEvent] = (), **fields: Any) -> bool:
        """Change columns of a job, and add events to it, unless it has ended. Returns whether it was changed."""
        job = next(iter(self._items(Job, made_of, "WHERE id = ?", job_id)), None)
        if job is None or job.status not in UNFINISHED:
            return False
        self._put(job._replace(**fields), events)
        return True

    def end_job(self, job_id: str, status: Status, *, events: Iterable[NewEvent] = (), **fields: Any) -> bool:
        """End a job that has not ended yet, on a full disk too. Returns whether it was ended."""
        ended = False

        def end() -> None:
            nonlocal ended
            ended = self.update_job(job_id, status=status, finished=int(time.time()), events=events, **fields)

        self._at_any_rate(end)
        return ended

    def run_directory(self, job_id: str) -> Path:
        """The directory in which a job's process works and leaves its result."""
        return self.directory / "jobs" / job_id

    def remove_run(self, job_id: str) -> None:
        """Delete the directory of a job whose process has ended and whose result nobody wants."""
        shutil.rmtree(self.run_directory(job_id), ignore_errors=True)

    def forget_result(self, job: Job) -> None:
        """Delete the model that a job has made, on a full disk too."""
        self.remove_run(job.id)
        self._at_any_rate(lambda: self._put(job._replace(fine_tuned_model=None)))

    def add_event(self, job_id: str, message: str, *, level: str = "info") -> None:
        self.add_events(job_id, [message_event(message, level)])

    def add_metrics(self, job_id: str, metrics: Iterable[tuple[str, Mapping[str, float]]]) -> None:
        """Add a metrics event for each message and its numbers, one of them "step". Either all are added or none."""
        self.add_events(job_id, [NewEvent("info", "metrics", message, data) for message, data in metrics])

    def add_events(self, job_id: str, events: Iterable[NewEvent]) -> None:
        with self._transaction():  # which waits for the disk once
            self._add_events(job_id, events)

    def _add_events(self, job_id: str, events: Iterable[NewEvent]) -> None:
        now = int(time.time())
        self._db.executemany(
            "INSERT INTO events (job, created, level, type, message, data) VALUES (?, ?, ?, ?, ?, ?)",
            [(job_id, now, event.level, event.type, event.message, json.dumps(event.data)) for event in events],
        )

    def events(self, job_id: str, limit: int, before: int | None = None) -> list[Event]:
        """The newest first; with `before`, only those that are older than the event of that number, which must exist."""
        stop = self._num_events(job_id) if before is None else before - 1
        start = max(stop - limit, 0)
        query = f"SELECT {', '.join(EVENT[1:])} FROM events WHERE job = ? ORDER BY number LIMIT ? OFFSET ?"
        rows = self._select(query, job_id, stop - start, start)
        return [Event._make((number, *row[:5], json.loads(row[5]))) for number, row in enumerate(rows, start + 1)][::-1]

    def has_event(self, job_id: str, number: int) -> bool:
        return 0 < number <= self._num_events(job_id)

    def _num_events(self, job_id: str) -> int:
        [(count,)] = self._select("SELECT count(*) FROM events WHERE job = ?", job_id)
        return int(count)

    def last_metrics(self, job_id: str) -> dict[str, float]:
        """The numbers of the newest metrics event, empty if there is none."""
        query = "SELECT data FROM events WHERE job = ? AND type = 'metrics' ORDER BY number DESC LIMIT 1"
        found = self._select(query, job_id)
        return json.loads(found[0][0]) if found else {}


def made_of(fields: dict[str, Any], kind: type[T]) -> T:
    """A file or job of the fields of its row."""
    if kind is Job:
        fields["hyperparameters"] = Hyperparameters(**fields["hyperparameters"])
    return kind(**fields)
