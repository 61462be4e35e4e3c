"""Work that waits for a thread must not keep the process from ending, and is done for one client after the other."""

import asyncio
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.workers import FairThread
from tests.service.helpers import run, until


def test_what_waits_for_a_thread_is_given_up_at_the_end() -> None:
    code = (
        "import time; from service.engine import workers\n"
        "for pool in (workers.template_thread.pool, workers.workers):\n"
        "    [pool.submit(time.sleep, 2) for _ in range(30)]\n"
        "workers.drop_waiting()"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert time.monotonic() - started < 15, "30 waits of 2 s in one thread would take a minute"


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["done", "done", "fails", "leaves"])), max_size=20))
def test_a_client_waits_for_one_piece_of_work_of_each_other(asked: list[tuple[str, str]]) -> None:
    order: list[tuple[str, int]] = []

    async def test() -> None:
        thread, begun, gate = FairThread("test"), threading.Event(), threading.Event()

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
        thread, begun, gate = FairThread("test"), threading.Event(), threading.Event()
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
