"""Worker threads leave half of the time to others, and what waits for one must not keep the process from ending."""

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from model.checkpoint.files import json_lines
from service.api.routes.files import check_examples
from service.engine import request, workers
from service.engine.workers import SHORT, WORK_SECONDS, RestingFile, off_the_loop, rest
from tests.service.api.helpers import served
from tests.service.engine.fakes import FakeEngine


def test_what_waits_for_a_thread_is_given_up_at_the_end() -> None:
    code = (
        "import time; from service.engine import workers\n"
        "for pool in (workers.template_thread, workers.workers):\n"
        "    [pool.submit(time.sleep, 2) for _ in range(30)]\n"
        "workers.drop_waiting()"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert time.monotonic() - started < 15, "30 waits of 2 s in one thread would take a minute"


def work_for(seconds: float) -> None:
    """Take so much processor time, with rests."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        rest()
    rest()


@pytest.mark.parametrize("count", [1, 2])
def test_worker_threads_rest_half_of_the_time_all_together(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    together = threading.Barrier(count)

    def work() -> None:
        together.wait(20)
        work_for(10 * WORK_SECONDS)
        together.wait(20)

    async def all_work() -> None:
        await asyncio.gather(*(off_the_loop(SHORT + 1, work) for _ in range(count)))

    asyncio.run(all_work())
    assert min(slept) >= (2 * count - 1) * WORK_SECONDS
    assert sum(slept) >= 0.8 * count * (2 * count - 1) * 10 * WORK_SECONDS


def test_other_threads_do_not_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    work_for(3 * WORK_SECONDS)
    asyncio.run(off_the_loop(SHORT, lambda: work_for(3 * WORK_SECONDS)))  # on the event loop
    assert not slept
    asyncio.run(off_the_loop(SHORT + 1, lambda: work_for(3 * WORK_SECONDS)))
    assert len(slept) in (2, 3)
    assert all(seconds > WORK_SECONDS for seconds in slept)


def test_a_file_is_read_with_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[None] = []
    monkeypatch.setattr(workers, "rest", lambda: rests.append(None))
    assert list(json_lines(RestingFile(b"\n" * 100_000 + b"1"), "x")) == [(100_001, "1")]
    assert len(rests) >= 10
    del rests[:]
    assert check_examples(b"\n" * 100_000, "x", served(FakeEngine()).base)[0] == 0
    assert len(rests) >= 10


def test_a_long_text_is_tokenized_with_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[None] = []
    monkeypatch.setattr(request, "rest", lambda: rests.append(None))
    request.text_prompt("a b " * 200_000, FakeEngine.tokenizer)
    assert len(rests) > 10
