"""A job's process where it begins and where it ends: what is cancelled meanwhile, and the last row of its loss curve."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest

from service.engine.models import Models
from service.jobs import runner
from service.jobs.runner import Jobs
from service.jobs.store import Hyperparameters, Job, Store

# Writes a curve of two updates and its report at once; then it may stay until it is told to end.
PROCESS = """
import sys, time
from pathlib import Path
from model.training.records import CURVE_FILE, REPORT_FILE, DataReport, FileReport, LossRow, write_curve
out = Path(sys.argv[sys.argv.index("--out") + 1])
rows = [LossRow(1, 3, 4.0, 1e-3, 1.0), LossRow(2, 6, 3.0, 1e-3, 1.0, 2.5)]
write_curve(out / CURVE_FILE, rows, "example")
DataReport([FileReport(3, 20, [])], 2).write(out / REPORT_FILE)
while "stay" in sys.argv[1:2]:
    time.sleep(1)
"""


class FakeModels:
    """What jobs do with models: begin with the base, and add their results, whose names are kept."""

    base = SimpleNamespace(name="fake")

    def __init__(self) -> None:
        self.added: list[str] = []

    def find(self, name: str, _owner: str) -> str | None:
        return name if name in self.added else None

    async def add(self, name: str, _directory: Path, _owner: str) -> None:
        self.added.append(name)


class Served(NamedTuple):
    store: Store
    jobs: Jobs
    published: list[str]

    def add_job(self) -> Job:
        file = self.store.add_file("", "a.jsonl", "fine-tune", b"{}")
        return self.store.add_job("", "fake", "", 0, Hyperparameters(1, 1, 1.0, 1), file.id, None)

    def status(self, job: Job) -> str:
        found = self.store.job("", job.id)
        assert found
        return found.status

    def steps(self, job: Job) -> list[str]:
        """The messages of a job's updates, in order."""
        events = reversed(self.store.events(job.id, 100))
        return [event.message for event in events if event.message.startswith("Step")]

    async def ended(self, job: Job) -> str:
        while (status := self.status(job)) not in ("succeeded", "failed", "cancelled"):
            await asyncio.sleep(0.02)
        return status


def run(directory: Path, test: Callable[[Served], Awaitable[None]]) -> None:
    """Run a test with jobs over a store. However busy the machine is, a process at the lowest priority gets there."""

    async def main() -> None:
        store, models = Store(directory), FakeModels()
        jobs = Jobs(store, cast(Models, models), Path("nowhere"))
        jobs.start()
        try:
            await asyncio.wait_for(test(Served(store, jobs, models.added)), 120)
        finally:
            await jobs.stop()

    asyncio.run(main())


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets whether a job's process stays until it is told to end."""

    def become(*, stays: bool) -> None:
        path = tmp_path / "process.py"
        path.write_text(PROCESS)
        monkeypatch.setattr(runner, "COMMAND", (sys.executable, str(path), "stay" if stays else "end"))

    monkeypatch.setattr(runner, "POLL_SECONDS", 0.05)
    return become


LAST = "Step 2: training loss 3.0000, validation loss 2.5000"


def test_the_last_row_of_the_curve_is_noted_when_the_process_has_succeeded(
    tmp_path: Path, process: Callable[..., None]
) -> None:
    process(stays=False)

    async def test(served: Served) -> None:
        job = served.add_job()
        served.jobs.notice()
        assert await served.ended(job) == "succeeded"
        assert served.steps(job) == ["Step 1: training loss 4.0000", LAST]

    run(tmp_path / "data", test)


def test_the_last_row_of_the_curve_is_not_noted_while_the_process_may_add_to_it(
    tmp_path: Path, process: Callable[..., None]
) -> None:
    process(stays=True)

    async def test(served: Served) -> None:
        job = served.add_job()
        served.jobs.notice()
        while not served.steps(job):
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)  # some more readings of the curve
        assert served.steps(job) == ["Step 1: training loss 4.0000"]
        await served.jobs.cancel(job)
        assert served.steps(job) == ["Step 1: training loss 4.0000"]

    run(tmp_path / "data", test)


def test_a_job_that_is_cancelled_while_its_process_begins_ends_at_once(
    tmp_path: Path, process: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    process(stays=True)
    begin = asyncio.create_subprocess_exec
    begun: list[asyncio.subprocess.Process] = []

    async def test(served: Served) -> None:
        async def begin_late(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
            if not begun:
                await served.jobs.cancel(job)  # which finds no process to end yet
            begun.append(await begin(*arguments, **options))
            return begun[-1]

        monkeypatch.setattr(asyncio, "create_subprocess_exec", begin_late)
        job = served.add_job()
        served.jobs.notice()
        while not begun:
            await asyncio.sleep(0.02)
        await asyncio.wait_for(begun[0].wait(), 60)
        process(stays=False)
        later = served.add_job()
        served.jobs.notice()
        assert await served.ended(later) == "succeeded", "the cancelled job's process is in nobody's way"
        assert served.status(job) == "cancelled"
        assert len(served.published) == 1

    run(tmp_path / "data", test)
