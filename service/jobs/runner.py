"""Runs fine-tuning jobs: one at a time, each in a process of its own at low priority.

A job's process is `banded finetune`. The server reads its progress from the report and the loss curve that it writes, so
the two need no connection. A process that is told to end saves its state, and the next server resumes the job. If a
process outlives its server, the next one waits for it (see model.training.run.follow).
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Collection
from pathlib import Path

from model.training.records import CURVE_FILE, REPORT_FILE, DataReport, LossRow, read_curve
from service.engine.models import Models
from service.engine.options import NOBODY
from service.jobs.disk import SPARE, DiskFullError
from service.jobs.store import UNFINISHED, Job, Store, message_event

log = logging.getLogger("banded.jobs")

POLL_SECONDS = 1.0
# A job whose process found the disk full is begun again after this time at most: there may seem to be room by then.
MOST_POLL_SECONDS = 16.0
# The time that a process gets to save its state when it is told to end.
END_SECONDS = 30.0
# A job with more updates is refused: the whole curve is written again and again.
MAX_UPDATES = 100_000
MAIN = "import sys; from service.jobs.runner import give_way; give_way(); from service.cli import main; sys.exit(main())"
COMMAND = (sys.executable, "-c", MAIN, "finetune")
# Exit statuses of a process that was told to end, whether it could save its state or not.
INTERRUPTED = (128 + signal.SIGINT, -signal.SIGINT, -signal.SIGTERM)
PR_SET_PDEATHSIG = 1


class Jobs:
    """Runs the jobs of a store. Belongs to the event loop."""

    def __init__(self, store: Store, models: Models, directory: Path, owners: Collection[str] = (NOBODY,)):
        """Jobs begin with the base of `models`, which lies in `directory`, and add their results to `models`.

        Those of others than `owners` rest: nobody could see or cancel them.
        """
        self.store = store
        self._owners = owners
        self._turns: dict[str, int] = {}  # of each owner, how many jobs had begun when its last one did
        self._models, self._directory = models, directory
        self._changed = asyncio.Event()
        self._process: tuple[str, asyncio.subprocess.Process] | None = None  # the running job's id and process
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._keep_copies())]

    async def stop(self) -> None:
        """End the running process. The next server resumes its job."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.store.close()

    def notice(self) -> None:
        """Look for a new job."""
        self._changed.set()

    def has_learnt(self, job: Job) -> bool:
        """Whether the job's process has succeeded. Its model is then about to be served."""
        return self._process is not None and self._process[0] == job.id and self._process[1].returncode == 0

    async def cancel(self, job: Job) -> None:
        self.store.end_job(job.id, "cancelled", events=[message_event("The job was cancelled")])
        if self._process and self._process[0] == job.id:
            await end_process(self._process[1])

    async def _run(self) -> None:
        waits, pause = "", POLL_SECONDS  # the job that was told to wait for room
        while True:
            self._changed.clear()
            job = None
            try:
                if job := self._next():
                    self.store.check_disk()
                    await self._advance(job)
                    waits, pause = "", POLL_SECONDS
                else:
                    await self._changed.wait()
            except DiskFullError as error:
                if job and job.id != waits:
                    log.warning("job %s waits: %s", job.id, error)
                    waits = job.id
                self._process = None
                await asyncio.sleep(pause)
                if job and self._status(job) == "cancelled":
                    self.store.remove_run(job.id)
                pause = min(2 * pause, MOST_POLL_SECONDS)
            except Exception:
                log.exception("job %s", job and job.id)
                with contextlib.suppress(Exception):  # the disk may be full or the database locked; that may pass
                    if job:
                        self._fail(job, "internal error")
                await asyncio.sleep(POLL_SECONDS)
            self._process = None

    def _take_turn(self, job: Job) -> None:
        self._turns[job.owner] = max(self._turns.values(), default=0) + 1

    async def _keep_copies(self) -> None:
        """Copy the store's database after changes, for at most a twentieth of the time."""
        can_copy = True
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if not self.store.has_changed:
                continue
            started = time.monotonic()
            try:
                await asyncio.to_thread(self.store.copy)
                can_copy = True
            except (OSError, sqlite3.Error) as error:
                if can_copy:
                    log.warning("the database can't be copied: %s", error)
                can_copy = False
            await asyncio.sleep(20 * (time.monotonic() - started))

    def _next(self) -> Job | None:
        """The oldest unfinished job of the owner whose turn it is, unless one has been begun."""
        base, unfinished = self._models.base.name, reversed(self.store.unfinished_jobs())
        mine = [job for job in unfinished if job.model == base and job.owner in self._owners]
        return min(mine, key=lambda job: (job.status != "running", self._turns.get(job.owner, 0)), default=None)

    async def _advance(self, job: Job) -> None:
        """Run a job until it ends or its process is told to end."""
        self._take_turn(job)
        for file_id in filter(None, (job.training_file, job.validation_file)):
            file = self.store.file(job.owner, file_id)
            if file and (fault := self.store.missing_content(file)):
                self._fail(job, f"the content of file '{file_id}' {fault}")
                return
        status = await self._train(job)
        if status == 0 and self._status(job) in UNFINISHED:
            name = f"ft:{job.model}:{job.suffix}:{job.id[-8:]}"
            try:
                if self._models.find(name, job.owner) is None:  # else it was added when there was no room for the job's end
                    await self._models.add(name, self.store.run_directory(job.id), job.owner)
            except (ValueError, OSError) as error:
                self._fail(job, str(error))
            else:
                # Nobody can have cancelled the job meanwhile: see has_learnt.
                events = [message_event(f"New model: {name}"), message_event("The job has succeeded")]
                self.store.end_job(job.id, "succeeded", events=events, fine_tuned_model=name)
        elif status == os.EX_TEMPFAIL:  # it goes on when there is room for what it could not save
            raise DiskFullError(self.store.directory, SPARE, "the data directory")
        elif status and status not in INTERRUPTED:
            self.store.check_disk()  # what it died of may be a full disk all the same
            self._fail(job, why(status, self.store.run_directory(job.id) / "log"))
        if self._status(job) in ("failed", "cancelled"):
            self.store.remove_run(job.id)

    def _fail(self, job: Job, reason: str) -> None:
        events = [message_event(f"The job has failed: {reason}", "error")]
        self.store.end_job(job.id, "failed", events=events, error=reason)

    def _status(self, job: Job) -> str | None:
        current = self.store.job(job.owner, job.id)
        return current and current.status

    async def _train(self, job: Job) -> int:
        """Run the job's process, record its progress, and return its exit status."""
        directory = self.store.run_directory(job.id)
        with self.store.room():
            directory.mkdir(parents=True, exist_ok=True)
            log_file = (directory / "log").open("ab")
        with log_file as output:
            process = await asyncio.create_subprocess_exec(
                *COMMAND,
                *self._arguments(job),
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C at the terminal is meant for the server
            )
        self._process = job.id, process
        try:
            if job.status == "running":
                self.store.add_event(job.id, "The job goes on")
            if self._status(job) == "cancelled":  # it was cancelled while the process started
                return await end_process(process)
            ended = asyncio.create_task(process.wait())
            progress = Progress(self.store, job)
            while not ended.done():
                await asyncio.wait([ended], timeout=POLL_SECONDS)
                with contextlib.suppress(DiskFullError):  # it is noted when there is room
                    if reason := await progress.note():
                        self._fail(job, reason)
                        await end_process(process)
            await progress.note(to_the_end=ended.result() == 0)
            return ended.result()
        finally:
            await end_process(process)

    def _arguments(self, job: Job) -> list[str]:
        directory, parameters = self.store.run_directory(job.id), job.hyperparameters
        arguments: list[object] = [self.store.path_of(job.training_file), "--resume"]
        arguments += ["--model", self._directory, "--out", directory, "--report", directory / REPORT_FILE]
        arguments += ["--epochs", parameters.n_epochs, "--batch", parameters.batch_size]
        arguments += ["--learning-rate", parameters.learning_rate, "--rank", parameters.rank, "--seed", job.seed]
        if job.validation_file:
            arguments += ["--valid", self.store.path_of(job.validation_file)]
        return list(map(str, arguments))


class Progress:
    """Brings what a job's process has written into the store."""

    def __init__(self, store: Store, job: Job):
        directory = store.run_directory(job.id)
        self._store, self._job = store, job
        self._report, self._curve = directory / REPORT_FILE, directory / CURVE_FILE
        self._is_validated = job.status == "running"
        self._read = (0, 0)  # which curve was read last: it is replaced as a whole
        self._last = int(store.last_metrics(job.id).get("step", 0))

    async def note(self, *, to_the_end: bool = False) -> str | None:
        """What is new since the last call. Returns why the job should end, if it should.

        The curve's last row may still get a held-out loss: it is left for the next time, but `to_the_end`.
        """
        if not self._is_validated and self._report.exists():
            if reason := self._note_report(DataReport.read(self._report)):
                return reason
            self._is_validated = True
        if not self._curve.exists():
            return None
        status = self._curve.stat()
        version = status.st_ino, status.st_mtime_ns
        if to_the_end or version != self._read:
            rows = await asyncio.to_thread(read_curve, self._curve, self._last)
            rows = rows if to_the_end else rows[:-1]
            self._store.add_metrics(self._job.id, [metrics_of(row) for row in rows if is_shown(row)])
            self._last = max((row.update for row in rows), default=self._last)
            self._read = version
        return None

    def _note_report(self, report: DataReport) -> str | None:
        names = self._job.training_file, self._job.validation_file
        advice = [
            message_event(f"{file_id}: {line}", "warn")
            for file_id, found in zip(names, report.files, strict=False)
            for line in found.advice
        ]
        if report.updates > MAX_UPDATES:
            self._store.add_events(self._job.id, advice)
            return f"{report.updates} updates are more than {MAX_UPDATES}: fewer epochs or larger batches are needed"
        tokens = report.files[0].tokens * self._job.hyperparameters.n_epochs
        events = [*advice, message_event("Files validated"), message_event("The job has started")]
        self._store.update_job(self._job.id, status="running", trained_tokens=tokens, events=events)
        return None


def is_shown(row: LossRow) -> bool:
    """Of the first thousand updates every one has an event, of the first ten thousand every tenth, and so on."""
    return row.held_out_loss is not None or row.update % 10 ** max(0, len(str(row.update)) - 3) == 0


def metrics_of(row: LossRow) -> tuple[str, dict[str, float]]:
    """An update as a message and as numbers."""
    message, data = f"Step {row.update}: training loss {row.loss:.4f}", {"step": row.update, "train_loss": row.loss}
    if row.held_out_loss is not None:
        data["valid_loss"] = row.held_out_loss
        message += f", validation loss {row.held_out_loss:.4f}"
    return message, data


async def end_process(process: asyncio.subprocess.Process) -> int:
    """Tell a process to save its state and end. Returns its exit status."""
    if process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), END_SECONDS)
        except TimeoutError:
            process.kill()
    return await process.wait()


def why(status: int, log_file: Path) -> str:
    """Why a process failed: the signal that ended it, or the last line that it logged."""
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    lines = [line for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("banded: ")[-500:] if lines else "its process said nothing"


def give_way() -> None:
    """Make this process yield cores to the server, die with it, and be the first to be killed if memory runs out."""
    os.nice(19)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # it ends with its server, even if that is killed
        # Cores are shared among sessions, and nice only counts within a session: see autogroup in sched(7).
        for file, value in (("autogroup", "19"), ("oom_score_adj", "1000")):
            with contextlib.suppress(OSError):
                Path("/proc/self", file).write_text(value)
