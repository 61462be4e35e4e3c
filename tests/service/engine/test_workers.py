"""Worker threads leave time to others and to each client its turn, and keep no process from ending."""

import asyncio
import gc
import io
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.checkpoint.files import json_lines
from service.api.routes.files import check_examples
from service.engine import request, workers
from service.engine.workers import SHORT, WORK_SECONDS, FairThreads, RestingFile, off_the_loop, rest
from tests.service.api.helpers import served
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run, until


def test_what_waits_for_a_thread_is_given_up_at_the_end() -> None:
    code = (
        "import time; from service.engine import workers\n"
        "for pool in (workers.template_thread.pool, workers.workers.pool):\n"
        "    [pool.submit(time.sleep, 2) for _ in range(30)]\n"
        "workers.drop_waiting()"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert time.monotonic() - started < 15, "30 waits of 2 s in one thread would take a minute"


def work_for(seconds: float) -> None:
    """Take so much processor time, with rests."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
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


@pytest.mark.parametrize("is_raised", [True, False])
def test_work_that_fails_lets_go_of_all_that_it_went_through(is_raised: bool) -> None:
    found: list[weakref.ref[io.BytesIO]] = []

    def work(text: io.BytesIO) -> ValueError:
        found.append(weakref.ref(text))
        try:
            raise ValueError
        except ValueError as error:
            if is_raised:
                raise
            return error

    async def ask() -> None:
        with suppress(ValueError):
            assert await off_the_loop(SHORT + 1, partial(work, io.BytesIO()))
        # The thread takes its leave of the work only now.
        async with asyncio.timeout(10):
            while found[0]() is not None:
                await asyncio.sleep(0.01)

    gc.collect()
    gc.disable()
    try:
        run(ask)
    finally:
        gc.enable()


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


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["done", "done", "fails", "leaves"])), max_size=20))
def test_a_client_waits_for_one_piece_of_work_of_each_other(asked: list[tuple[str, str]]) -> None:
    order: list[tuple[str, int]] = []

    async def test() -> None:
        thread, begun, gate = FairThreads("test"), threading.Event(), threading.Event()

        def work(client: str, number: int, how: str) -> int:
            order.append((client, number))
            if how == "fails":
                raise ValueError(number)
            return number

        def wait() -> bool:
            begun.set()
            return gate.wait(20)

        first = asyncio.create_task(thread.run("first", wait))
        await until(begun.is_set)
        tasks = []
        for i, (client, how) in enumerate(asked):
            tasks.append(asyncio.create_task(thread.run(client, partial(work, client, i, how))))
            await asyncio.sleep(0)
        for task, (_, how) in zip(tasks, asked, strict=True):
            if how == "leaves":
                task.cancel()
        await asyncio.sleep(0)
        staying = [i for i, (_, how) in enumerate(asked) if how != "leaves"]
        assert sum(map(thread.num_waiting, "abcd")) == len(staying)
        gate.set()
        assert await first is True
        for i, (task, (_, how)) in enumerate(zip(tasks, asked, strict=True)):
            (found,) = await asyncio.gather(task, return_exceptions=True)
            match how:
                case "done":
                    assert found == i
                case "fails":
                    assert isinstance(found, ValueError)
                case _:
                    assert task.cancelled()
        # Round after round, each client that still has work gets one piece done, by arrival.
        lines = {client: [i for i in staying if asked[i][0] == client] for client in "abcd"}
        while order:
            present = [client for client, line in lines.items() if line]
            this_round, order[:] = order[: len(present)], order[len(present) :]
            assert sorted(client for client, _ in this_round) == present
            assert all(number == lines[client].pop(0) for client, number in this_round)
        assert not any(lines.values())
        thread.pool.shutdown()

    run(test)


def test_work_whose_client_leaves_meanwhile_is_ended_ahead_of_the_next() -> None:
    async def test() -> None:
        thread, begun, gate = FairThreads("test"), threading.Event(), threading.Event()
        ended: list[str] = []

        def slow() -> None:
            begun.set()
            gate.wait(20)
            ended.append("slow")

        leaving = asyncio.create_task(thread.run("a", slow))
        await until(begun.is_set)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        last = asyncio.create_task(thread.run("a", lambda: ended.append("last")))
        await asyncio.sleep(0.01)
        gate.set()
        await last
        assert ended == ["slow", "last"]
        thread.pool.shutdown()

    run(test)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_client_with_much_work_leaves_threads_to_others(count: int) -> None:
    async def test() -> None:
        threads, gate = FairThreads("test", count), threading.Event()
        running: list[str] = []

        def work(client: str) -> None:
            running.append(client)
            gate.wait(20)

        much = [asyncio.create_task(threads.run("a", lambda: work("a"))) for _ in range(10)]
        await until(lambda: len(running) == max(1, count // 2))
        other = asyncio.create_task(threads.run("b", lambda: work("b")))
        await until(lambda: "b" in running)
        assert running.count("a") == max(1, count // 2)
        gate.set()
        await asyncio.gather(*much, other)
        assert running.count("a") == 10
        threads.pool.shutdown()

    run(test)


def test_large_work_is_done_for_the_client_of_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the many large requests of another client."""
    threads = FairThreads("test", 2)
    monkeypatch.setattr(workers, "workers", threads)
    order: list[str] = []

    def work(client: str, seconds: float) -> None:
        time.sleep(seconds)
        order.append(client)

    async def ask(client: str, seconds: float) -> None:
        workers.current_client.set(client)
        await off_the_loop(SHORT + 1, lambda: work(client, seconds))

    async def test() -> None:
        many = [asyncio.create_task(ask("many", 0.05)) for _ in range(10)]
        await asyncio.sleep(0.02)
        await asyncio.create_task(ask("one", 0))
        assert order.count("many") <= 1
        await asyncio.gather(*many)

    run(test)
    threads.pool.shutdown()
