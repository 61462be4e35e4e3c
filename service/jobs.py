"""Fine-tuning jobs: one at a time, each in a process of its own at low priority, begun again where the server was stopped.

A job's process is `banded finetune`. What it has done is read from its loss curve, so it needs no line to the server.
Told to end, it saves its state and goes on with the next server; one that outlived its server is waited for (see
model.training.run.follow).
"""

import asyncio
import contextlib
import csv
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from service.served import ServedModel
from service.store import UNFINISHED, Job, Store

log = logging.getLogger("banded.jobs")

POLL_SECONDS = 1.0
# How long a process may take to save its state when it is told to end.
END_SECONDS = 30.0
LOWEST_PRIORITY = 19
COMMAND = (sys.executable, "-c", "import sys; from service.cli import main; sys.exit(main())", "finetune")


class Jobs:
    """Runs the jobs of a store, in the event loop."""

    def __init__(self, store: Store, base: ServedModel, directory: Path, publish: Callable[[str, str], Awaitable[None]]):
        """`base` is the model that jobs begin with, and `directory` where it lies. `publish` serves the result of a job,
        given its name and the job's id."""
        self.store = store
        self._base, self._directory = base, directory
        self._publish = publish
        self._changed = asyncio.Event()
        self._process: tuple[str, asyncio.subprocess.Process] | None = None  # of the job that runs
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End the running process; its job goes on with the next server."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._end_process()

    def notice(self) -> None:
        """There is a new job."""
        self._changed.set()

    def has_learnt(self, job: Job) -> bool:
        """Whether its process has succeeded: then its model is about to be served."""
        return self._process is not None and self._process[0] == job.id and self._process[1].returncode == 0

    async def cancel(self, job: Job) -> Job:
        cancelled = self.store.end_job(job.id, "cancelled")
        self.store.add_event(job.id, "The job was cancelled")
        if self._process and self._process[0] == job.id:
            await self._end_process()
        return cancelled

    async def _end_process(self) -> None:
        if self._process is None:
            return
        process = self._process[1]
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), END_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            unfinished = [job for job in self.store.jobs() if job.status in UNFINISHED and job.model == self._base.name]
            if not unfinished:
                await self._changed.wait()
                continue
            job = unfinished[-1]  # the oldest
            try:
                await self._advance(job)
            except Exception:
                log.exception("job %s", job.id)
                self._fail(job, "internal error")

    async def _advance(self, job: Job) -> None:
        """Bring a job to its end, from whatever it has come to."""
        if job.status == "validating_files":
            validated = await self._validate(job)
            if validated is None:
                return
            job = validated
        self.store.update_job(job.id, status="running")
        self.store.add_event(job.id, "The job goes on" if job.status == "running" else "The job has started")
        status = await self._train(job)
        current = self.store.job(job.id)
        if current is None or current.status == "cancelled":
            return
        if status:
            self._fail(job, last_line(self.store.run_directory(job.id) / "log"))
            return
        name = f"ft:{job.model}:{job.suffix}:{job.id[-8:]}"
        await self._publish(name, job.id)
        self.store.end_job(job.id, "succeeded", fine_tuned_model=name)
        self.store.add_event(job.id, f"New model: {name}")
        self.store.add_event(job.id, "The job has succeeded")

    def _fail(self, job: Job, reason: str) -> None:
        self.store.end_job(job.id, "failed", error=reason)
        self.store.add_event(job.id, f"The job has failed: {reason}", level="error")

    async def _validate(self, job: Job) -> Job | None:
        """The job, its files read and counted; None where one of them is wrong."""
        from model.training.finetune import DataError, advice, encode, read_examples  # imports torch's optimizers

        def read(file_id: str) -> tuple[list[str], int]:
            examples = read_examples(self.store.path_of(file_id))
            encoded = encode(examples, self._base.tokenizer, self._base.config.n_positions)
            return advice(examples), sum(len(example.inputs) for example in encoded)

        self.store.add_event(job.id, "Validating files")
        num_tokens = 0
        for file_id in filter(None, (job.training_file, job.validation_file)):
            try:
                lines, count = await asyncio.to_thread(read, file_id)
            except (DataError, OSError) as error:
                self._fail(job, str(error))
                return None
            for line in lines:
                self.store.add_event(job.id, f"{file_id}: {line}", level="warn")
            num_tokens += count if file_id == job.training_file else 0
        if self._is_cancelled(job):
            return None
        self.store.add_event(job.id, "Files validated")
        tokens = num_tokens * job.hyperparameters.n_epochs
        return self.store.update_job(job.id, status="queued", trained_tokens=tokens)

    def _is_cancelled(self, job: Job) -> bool:
        current = self.store.job(job.id)
        return current is None or current.status == "cancelled"

    async def _train(self, job: Job) -> int:
        """Run the job's process, note what its curve says, and return its exit status."""
        directory, parameters = self.store.run_directory(job.id), job.hyperparameters
        directory.mkdir(parents=True, exist_ok=True)
        options = {
            "--model": self._directory,
            "--out": directory,
            "--epochs": parameters.n_epochs,
            "--batch": parameters.batch_size,
            "--learning-rate": parameters.learning_rate,
            "--rank": parameters.rank,
            "--seed": job.seed,
        }
        if job.validation_file:
            options["--valid"] = self.store.path_of(job.validation_file)
        arguments = [str(each) for option in options.items() for each in option]
        with (directory / "log").open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *COMMAND,
                str(self.store.path_of(job.training_file)),
                "--resume",
                *arguments,
                stdout=output,
                stderr=output,
                preexec_fn=lambda: os.nice(LOWEST_PRIORITY),
            )
        self._process = job.id, process
        if self._is_cancelled(job):  # while the process began
            await self._end_process()
        ended = asyncio.create_task(process.wait())
        noted = self.store.last_step(job.id)
        while not ended.done():
            await asyncio.wait([ended], timeout=POLL_SECONDS)
            noted = self._note_progress(job, noted)
        return ended.result()

    def _note_progress(self, job: Job, last: int) -> int:
        """An event for every update after `last`; the last one of which there is an event now."""
        path = self.store.run_directory(job.id) / "loss.csv"
        if not path.exists():
            return last
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["update"]) > last]
        for row in rows:
            step, loss = int(row["update"]), float(row["loss"])
            message, data = f"Step {step}: training loss {loss:.4f}", {"step": step, "train_loss": loss}
            if row["held_out_loss"]:
                data["valid_loss"] = float(row["held_out_loss"])
                message += f", validation loss {data['valid_loss']:.4f}"
            self.store.add_event(job.id, message, data=data)
            last = step
        return last


def last_line(path: Path) -> str:
    """What a process said last."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("banded: ")[-500:] if lines else "the process said nothing"
