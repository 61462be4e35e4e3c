"""The step thread: schedules, launches and commits steps, one after the other.

Only this thread touches the scheduler and the runner. It takes commands in from other threads, between two steps, and
reports what the steps did. What other threads may read is listed in StepLoop.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from model.config import KVGroup
from model.step import Sampled, StepInput
from service.engine.metrics import Metrics
from service.engine.pages import PoolUsage
from service.engine.scheduler import Delta, Scheduler

log = logging.getLogger("banded.engine")

# Consecutive steps that may raise before the engine gives up.
MAX_FAILURES = 2

Command = Callable[[], None]


class Pending(Protocol):
    def result(self) -> Sampled: ...


class StepRunner(Protocol):
    def launch(self, step: StepInput) -> Pending: ...


class InFlight(NamedTuple):
    """A step of `num_tokens` that was launched at `time` and whose tokens have not been read."""

    num_tokens: int
    pending: Pending
    time: float


class StepLoop:
    """Runs commands and steps in a thread of its own.

    Other threads call `start`, `send` and `stop`, and read the properties num_running, lacks_pages, busy_since, is_alive,
    num_running_of() and usage(): single values, each true at some moment during the last step.
    """

    def __init__(self, runner: StepRunner, scheduler: Scheduler, metrics: Metrics, *, overlap: bool):
        """With `overlap` each step is launched before the tokens of the step before it are read.

        That is for devices with a queue of their own, which must not run empty while tokens are read.
        """
        self._runner = runner
        self._scheduler = scheduler
        self._metrics = metrics
        self._num_ahead = 1 if overlap else 0
        self._in_flight: deque[InFlight] = deque()  # oldest first
        self._failures = 0
        self._busy_since = math.inf
        # Shared with other threads, under the condition.
        self._inbox_changed = threading.Condition()
        self._inbox: list[Command] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)

    # -- other threads ------------------------------------------------------------------------------------------------

    def start(self, report: Callable[[list[Delta], float], None], give_up: Callable[[], None]) -> None:
        """Begin. The step thread calls `report` with the deltas and the end of each step, and `give_up` when it fails."""
        self._report_to, self._give_up = report, give_up
        self._thread.start()

    def send(self, command: Command) -> None:
        """Run `command` in the step thread, between two steps."""
        with self._inbox_changed:
            self._inbox.append(command)
            self._inbox_changed.notify()

    def stop(self) -> None:
        """End the thread after the steps in flight. `join` waits for it."""
        with self._inbox_changed:
            self._stopping = True
            self._inbox_changed.notify()

    def join(self, seconds: float) -> None:
        if self.is_alive:
            self._thread.join(seconds)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def busy_since(self) -> float:
        """The start of work or the end of the last step, whichever is later; infinite while idle."""
        return self._busy_since

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    def num_running_of(self, client: bytes) -> int:
        return self._scheduler.waiting.held(client)

    @property
    def lacks_pages(self) -> bool:
        return self._scheduler.lacks_pages

    def usage(self) -> dict[KVGroup, PoolUsage]:
        return self._scheduler.cache.usage()

    # -- step thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while commands := self._next_commands():
                self._busy_since = time.monotonic()
                for command in commands:
                    command()
                while not self._scheduler.idle and not self._stopping:
                    self._step()
                    for command in self._take_inbox():
                        command()
                self._read_steps(keep=0)  # an idle scheduler has left none
                self._busy_since = math.inf
        except Exception:
            log.exception("the step loop failed")
            self._give_up()

    def _step(self) -> None:
        """Schedule and launch a step, then read this one or, with overlap, the one before it."""
        now = time.monotonic()
        self._report(self._scheduler.expire(now))
        step = self._scheduler.schedule(now)
        if step is not None:
            self._report(self._scheduler.begun)
            self._launch(step)
        self._read_steps(keep=0 if step is None else self._num_ahead)

    def _launch(self, step: StepInput) -> None:
        launched = time.monotonic()
        try:
            self._in_flight.append(InFlight(step.num_tokens, self._runner.launch(step), launched))
        except Exception:
            self._read_steps(keep=0)  # steps end in order, and none may be scheduled on top of one that did not run
            self._fail_step()

    def _read_steps(self, *, keep: int) -> None:
        """Wait for the oldest steps and commit them, until `keep` are in flight."""
        while len(self._in_flight) > keep:
            num_tokens, pending, launched = self._in_flight.popleft()
            try:
                sampled = pending.result()
            except Exception:
                self._fail_step()
                continue
            self._failures = 0
            now = time.monotonic()
            seconds = now - max(launched, self._busy_since)  # until then the device ran the step before
            self._busy_since = now
            self._metrics.step_time.observe(seconds)
            self._metrics.step_tokens.observe(num_tokens)
            deltas = self._scheduler.commit(sampled, seconds)
            self._metrics.draft_tokens.inc(self._scheduler.drafts.drafted)
            self._metrics.accepted_draft_tokens.inc(self._scheduler.drafts.accepted)
            self._report(deltas)

    def _fail_step(self) -> None:
        """The oldest step that the scheduler knows of raised."""
        deltas = self._scheduler.fail_step()
        log.exception("a step failed; its %d choices end with an error", len(deltas))
        self._check_integrity()
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            raise RuntimeError(f"{self._failures} steps in a row have failed")  # ends every request, these included
        self._busy_since = time.monotonic()
        self._report(deltas)

    def _report(self, deltas: list[Delta]) -> None:
        if deltas:
            self._report_to(deltas, self._busy_since)

    def _next_commands(self) -> list[Command]:
        """Wait, idle, for commands; empty when the loop stops."""
        self._check_integrity()
        with self._inbox_changed:
            while not self._inbox and not self._stopping:
                self._inbox_changed.wait()
        return [] if self._stopping else self._take_inbox()

    def _take_inbox(self) -> list[Command]:
        with self._inbox_changed:
            commands, self._inbox = self._inbox, []
        return commands

    def _check_integrity(self) -> None:
        for fault in self._scheduler.check_integrity():
            self._metrics.accounting_faults.inc()
            log.error("page accounting: %s", fault)
