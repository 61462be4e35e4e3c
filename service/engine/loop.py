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
from contextlib import suppress
from itertools import chain
from typing import NamedTuple, Protocol

from model.config import KVGroup
from model.step import Sampled, StepInput
from service.engine.cores import CoreWatch
from service.engine.metrics import Metrics
from service.engine.pages import PoolUsage
from service.engine.retry import Retry, canary
from service.engine.scheduler import Delta, Scheduler, Sequence

log = logging.getLogger("banded.engine")

Command = Callable[[], None]


class Pending(Protocol):
    def result(self) -> Sampled: ...


class StepRunner(Protocol):
    def launch(self, step: StepInput, begins: Callable[[], object] = ...) -> Pending: ...


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
        self._unreported: list[tuple[list[Delta], float]] = []  # and when their step ended
        self._busy_since = math.inf
        self._cores = CoreWatch()
        # Shared with other threads, under the condition.
        self._inbox_changed = threading.Condition()
        self._inbox: list[Command] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)

    # -- other threads ------------------------------------------------------------------------------------------------

    def start(self, report: Callable[[list[Delta], float], None], give_up: Callable[[], None]) -> None:
        """Begin. The step thread calls `report` with the deltas and the end of each step, and `give_up` when it fails.

        Those of a step are reported when the next one begins to compute, or there is none. Earlier, the event loop's work on
        them would take the interpreter from this thread.
        """
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
                    if commands := self._take_inbox():
                        self._report()
                    for command in commands:
                        command()
                self._read_steps(keep=0)  # an idle scheduler has left none
                self._report()
                self._busy_since = math.inf
        except Exception:
            log.exception("the step loop failed")
            self._report()
            self._give_up()

    def _step(self) -> None:
        """Schedule and launch a step, then read this one or, with overlap, the one before it."""
        now = time.monotonic()
        self._add_report(self._scheduler.expire(now))
        num_put_back = self._scheduler.num_put_back
        step = self._scheduler.schedule(now)
        self._metrics.put_back.inc(self._scheduler.num_put_back - num_put_back)
        if step is not None:
            self._add_report(self._scheduler.begun)
            self._launch(step)
        self._report()  # unless the launch has
        self._read_steps(keep=0 if step is None or self._scheduler.has_suspects else self._num_ahead)

    def _launch(self, step: StepInput) -> None:
        launched = time.monotonic()
        try:
            self._in_flight.append(InFlight(step.num_tokens, self._runner.launch(step, self._report), launched))
            return
        except Exception:
            log.exception("a step raised and is run again in halves")
        # Steps end in order, and none may be scheduled on top of one that did not run.
        self._read_steps(keep=0)
        if self._scheduler.oldest_step is step:
            self._repeat_step(raised=True)

    def _read_steps(self, *, keep: int) -> None:
        """Wait for the oldest steps and commit them, until `keep` are in flight."""
        while len(self._in_flight) > keep:
            self._report()
            num_tokens, pending, launched = self._in_flight.popleft()
            try:
                sampled = pending.result()
            except Exception:
                log.exception("a step raised and is run again in halves")
            else:
                self._commit(sampled, num_tokens, launched)
                continue
            while self._in_flight:  # steps that were launched on top of the one that failed
                with suppress(Exception):
                    self._in_flight.popleft().pending.result()
            self._repeat_step(raised=True)
            while self._scheduler.oldest_step:
                self._repeat_step(raised=False)

    def _commit(self, sampled: Sampled, num_tokens: int, launched: float) -> None:
        now = time.monotonic()
        seconds = now - max(launched, self._busy_since)  # until then the device ran the step before
        self._busy_since = now
        self._metrics.step_time.observe(seconds)
        self._cores.add_step(seconds)
        self._metrics.step_tokens.observe(num_tokens)
        deltas = self._scheduler.commit(sampled, seconds)
        self._metrics.draft_tokens.inc(self._scheduler.drafts.drafted)
        self._metrics.accepted_draft_tokens.inc(self._scheduler.drafts.accepted)
        self._add_report(deltas)

    def _repeat_step(self, *, raised: bool) -> None:
        """Run the oldest step again in halves, and halves of those that raise, until each request that raises is alone.

        Those end with an error, the others go on as if nothing had happened. If memory was short, some can't be run again
        and start over. `raised`: the step as a whole has raised.
        """
        self._report()
        scheduler, step = self._scheduler, self._scheduler.oldest_step
        assert step is not None
        retry, requests = Retry(step), scheduler.oldest_requests()
        is_alone = raised and len(requests) == 1
        running = [some for request in requests if (some := [each for each in request if scheduler.is_running(each)])]
        lost = [request for request in running if not all(map(scheduler.can_repeat, request))]
        failed: list[list[Sequence]] = []
        parts = [[request for request in running if request not in lost]]
        if is_alone:
            failed, parts = running, []
            self._run_canary()
        elif raised:
            parts = halves(*parts)
        for sequence in chain.from_iterable(() if is_alone else lost):
            scheduler.start_over(sequence)
        while parts:
            part = parts.pop()
            if not part or self._run_part(retry, part):
                continue
            if len(part) > 1:
                parts += halves(part)
            else:
                failed += part
                self._run_canary()
        if raised or failed:
            log.error("a step raised: %d of its %d requests end with an error", len(failed), len(requests))
        deltas = scheduler.commit(retry.sampled, None, chain.from_iterable(failed))
        self._check_integrity()
        self._add_report(deltas)

    def _run_part(self, retry: Retry, requests: list[list[Sequence]]) -> bool:
        """Run the part of a step that computes `requests`; whether it did not raise."""
        part = retry.part(chain.from_iterable(requests))
        try:
            retry.add(part, self._runner.launch(part).result())
        except Exception as error:
            log.warning("a step of %d requests raised again: %r", len(requests), error)
            return False
        finally:
            self._busy_since = time.monotonic()
        return True

    def _run_canary(self) -> None:
        """Raise if a step raises that is known to be good: then the fault is the engine's, and not a request's."""
        for step in canary(self._scheduler.max_rows):
            self._runner.launch(step).result()

    def _add_report(self, deltas: list[Delta]) -> None:
        if deltas:
            self._unreported.append((deltas, self._busy_since))

    def _report(self) -> None:
        unreported, self._unreported = self._unreported, []
        for deltas, ended in unreported:
            self._report_to(deltas, ended)

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


def halves(requests: list[list[Sequence]]) -> list[list[list[Sequence]]]:
    """The second half and the first."""
    middle = len(requests) // 2
    return [requests[middle:], requests[:middle]]
