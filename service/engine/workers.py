"""Keeps the event loop running: long work goes to a worker thread, or is done in slices."""

import asyncio
import io
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

from service.engine.shares import Shares

T = TypeVar("T")

# Characters, token ids and bytes of JSON that are gone through on the event loop, in a few milliseconds at most.
SHORT = 4096
# Large requests that are worked on at a time. The others wait, so that every thread gets the interpreter soon.
LARGE_AT_ONCE = 4
# Seconds of work after which the event loop gets its turn.
SLICE_SECONDS = 0.01
# The same for a worker thread, of processor time. So a step that began meanwhile can finish during the rest.
WORK_SECONDS = 0.005

# Whose share of the threads a task's work takes: whoever knows the client sets it.
current_client: ContextVar[Hashable] = ContextVar("client", default="")


class QueuedWork(NamedTuple):
    """Work that waits for a thread, and what becomes of it."""

    client: Hashable
    work: Callable[[], Any]
    done: Future[Any]


class FairThreads:
    """Threads that work for one client after the other, and within one by arrival. Of several, a client gets half."""

    def __init__(self, name: str, count: int = 1):
        self.pool = ThreadPoolExecutor(count, name)
        self._most = max(1, count // 2)
        self._lock = threading.Lock()
        self._waiting: Shares[QueuedWork] = Shares()
        self.seconds = 0.0  # that the last piece of work took

    def num_waiting(self, client: Hashable) -> int:
        with self._lock:
            return sum(queued.client == client for queued in self._waiting)

    async def run(self, client: Hashable, work: Callable[[], T]) -> T:
        """The result of `work`. Cancelled ahead of its turn, it leaves the line."""
        queued = QueuedWork(client, work, Future())
        with self._lock:
            self._waiting.add(queued)
        self.pool.submit(self._work)
        try:
            result: T = await asyncio.wrap_future(queued.done)
            return result
        finally:
            with self._lock:
                if queued in self._waiting:
                    self._waiting.remove(queued)
            del queued  # as in settle

    def _work(self) -> None:
        """Do what waits. A client with its share of the threads is served by those that it has."""
        while queued := self._take():
            if queued.done.set_running_or_notify_cancel():
                began = time.monotonic()
                settle(queued.done, queued.work)
                self.seconds = time.monotonic() - began
            with self._lock:
                self._waiting.leave(queued)

    def _take(self) -> QueuedWork | None:
        with self._lock:
            queued = self._waiting.first()
            if queued is None or self._waiting.held(queued.client) >= self._most:
                return None
            self._waiting.take(queued, 0)
            return queued


def settle(done: Future[T], work: Callable[[], T]) -> None:
    """End `done` with what `work` returns or raises."""
    try:
        done.set_result(work())
    except BaseException as error:  # a panic of a library in Rust too: somebody waits
        done.set_exception(error)
    finally:
        del done, work  # an error's traceback holds this frame: in a cycle it would keep all that `work` went through


# Waits for the process that renders checkpoints' templates. Nothing else may have to wait for them.
template_thread = FairThreads("chat-template")
workers = FairThreads("large-request", LARGE_AT_ONCE)


def drop_waiting() -> None:
    """Give up what waits for a thread: the interpreter would do all of it before it ends. For the end of the process."""
    for threads in (workers, template_thread):
        threads.pool.shutdown(wait=False, cancel_futures=True)


async def off_the_loop(size: int, work: Callable[[], T]) -> T:
    """The result of `work`, which goes through about `size` characters, tokens or bytes: in a worker thread if many."""
    if size <= SHORT:
        return work()
    return await workers.run(current_client.get(), lambda: with_rests(work))


# The processor time that each worker thread at work had taken at its last rest.
_rested: dict[int, float] = {}


def with_rests(work: Callable[[], T]) -> T:
    """The result of `work`, in which this thread rests."""
    me = threading.get_ident()
    _rested[me] = time.thread_time()
    try:
        return work()
    finally:
        del _rested[me]


def rest() -> None:
    """Sleep, in a worker thread, so long that all of them together work half of the time. Call it between pieces of work.

    A step takes the interpreter back dozens of times, and each time it would wait for a worker. Other threads go on.
    """
    me = threading.get_ident()
    if me in _rested and (worked := time.thread_time() - _rested[me]) > WORK_SECONDS:
        time.sleep(worked * (2 * len(_rested) - 1))
        _rested[me] = time.thread_time()


class RestingFile(io.BytesIO):
    """A file whose reader rests."""

    def read1(self, size: int | None = -1, /) -> bytes:
        rest()
        return super().read1(size)


class Slices:
    """Work on the event loop that gives way to others now and then."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    async def rest(self) -> None:
        """Let others run if the last time is long ago. Call it between pieces of work."""
        if time.monotonic() - self._since > SLICE_SECONDS:
            await asyncio.sleep(0)
            self._since = time.monotonic()
