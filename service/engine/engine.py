"""The engine: takes sequences from the event loop, runs the step loop in a thread of its own, streams text back.

A request's life: `generate` checks that it may enter and puts its sequences into the inbox; the step thread moves them
to the scheduler, runs steps and sends each step's deltas back in one call; `generate` turns tokens into text, stops at
stop strings and yields. However a request ends early (stop string, disconnect, error, shutdown), its sequences leave
through `Scheduler.abort`.
"""

import asyncio
import functools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Items
from contextlib import suppress
from typing import NamedTuple, Protocol

from model.checkpoint.tokenizer import Tokenizer
from model.config import KVGroup
from model.step import Sampled, StepInput, TokenLogprobs
from service.engine.choice import Choice, ChoiceRequest, Output
from service.engine.metrics import Metrics
from service.engine.scheduler import AdapterRef, Delta, Family, FinishReason, Scheduler, Sequence

log = logging.getLogger("banded.engine")

# A busy engine that has finished no step for this long is not ready: something hangs.
STALL_SECONDS = 30.0
# How long the steps in flight may take to end when the engine stops.
STOP_SECONDS = 5.0
# How often it is asked whether a retired adapter's choices have ended.
RETIRE_SECONDS = 0.05
# Consecutive steps that may raise before the engine gives up.
MAX_FAILURES = 2


class EngineError(Exception):
    """A request that the engine can't take or finish."""


class DoesNotFitError(EngineError):
    """The request could not run even on an idle engine."""


class QueueFullError(EngineError):
    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(EngineError):
    """Draining, failed, or the request waited too long."""


class RetiredError(EngineError):
    """The request needs an adapter that is no longer served."""


class StepFailedError(EngineError):
    """The step that the request ran in raised."""


class StepNews(NamedTuple):
    """What a step that ended at `time` did to the choices of a request."""

    time: float
    deltas: list[Delta]


# A request's messages from the step thread: news, or why the whole request ends.
Mailbox = asyncio.Queue[StepNews | EngineError]


class Pending(Protocol):
    def result(self) -> Sampled: ...


class StepRunner(Protocol):
    def launch(self, step: StepInput) -> Pending: ...


class InFlight(NamedTuple):
    """A step of `num_tokens` that was launched at `time` and whose tokens have not been read."""

    num_tokens: int
    pending: Pending
    time: float


class Engine:
    """One set of weights, one scheduler, one KV cache. Used from one event loop; the step thread is its own affair."""

    def __init__(
        self,
        runner: StepRunner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        max_slots: int,
        max_queue: int,
        queue_timeout: float,
        steps_ahead: int,
    ):
        """The step loop launches up to `steps_ahead` steps before it reads the tokens of the first: 0 where `launch`
        computes, 1 where it only puts work into a device's queue, which must not run empty while tokens are read."""
        self.tokenizer = tokenizer
        self._runner = runner
        self._scheduler = scheduler
        self._metrics = metrics
        self._max_slots = max_slots
        self._max_queue = max_queue
        self._queue_timeout = queue_timeout
        self._steps_ahead = steps_ahead
        # Event-loop state: where each unread sequence's deltas go, and which sequences the step thread has not ended yet.
        self._mailboxes: dict[Sequence, Mailbox] = {}
        self._active: set[Sequence] = set()
        self._retired: set[AdapterRef] = set()
        self._choice_seconds = 1.0  # running average of a choice's time in a slot, for Retry-After
        self._empty = asyncio.Event()  # no mailboxes
        self._empty.set()
        self._draining = False
        self._failed = asyncio.Event()
        # Shared with the step thread, under the condition.
        self._inbox_changed = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._stopping = False
        # Written by the step thread only.
        self._in_flight: deque[InFlight] = deque()  # oldest first
        self._busy_since = math.inf  # start of work or end of the last step; infinite while idle
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)
        metrics.ready.set_function(lambda: self.unready_reason is None)
        metrics.queue_limit.set(max_queue)
        metrics.requests_running.set_function(lambda: len(scheduler.running))
        metrics.requests_waiting.set_function(lambda: len(scheduler.waiting))
        for group in scheduler.cache.pools:
            metrics.kv_total(group).set(scheduler.cache.usage()[group].total)
            metrics.kv_held(group).set_function(functools.partial(held_pages, scheduler, group))
            metrics.kv_usage(group).set_function(functools.partial(held_share, scheduler, group))

    # -- event loop ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the step thread; call from the event loop that will use the engine."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def unready_reason(self) -> str | None:
        """Why no request should be sent here, None when ready."""
        if self._failed.is_set():
            return "the engine has failed"
        if self._draining:
            return "the server is shutting down"
        if time.monotonic() - self._busy_since > STALL_SECONDS:
            return f"no step has finished for {STALL_SECONDS:.0f} s"
        return None

    @property
    def has_failed(self) -> bool:
        return self._failed.is_set()

    async def failed(self) -> None:
        """Returns when the engine has given up; the process should end then."""
        await self._failed.wait()

    async def generate(self, requests: Items[ChoiceRequest]) -> AsyncGenerator[Output, None]:
        """Run a request's choices; Output.choice counts them. Closing the iterator aborts what still runs.

        Raises DoesNotFitError, QueueFullError or UnavailableError before the first output, UnavailableError when a
        choice waited too long for a slot, StepFailedError when a step raised.
        """
        sequences = [request.sequence for request in requests]
        self._check_admission(sequences)
        submitted = time.monotonic()
        mailbox: Mailbox = asyncio.Queue()
        scores: dict[Family | Sequence, list[TokenLogprobs]] = {}
        choices = {}
        for i, request in enumerate(requests):
            sequence = request.sequence
            prompt_scores = scores.setdefault(sequence.family if sequence.family and sequence.is_fork else sequence, [])
            choices[sequence] = Choice(i, request, prompt_scores, self.tokenizer, submitted, self._metrics)
        self._open(sequences, mailbox, submitted)
        unfinished = set(sequences)
        outcome = "abort"
        try:
            while unfinished:
                message = await mailbox.get()
                if isinstance(message, EngineError):
                    outcome = "error"
                    raise message
                for delta in message.deltas:
                    sequence = delta.sequence
                    if sequence not in unfinished:
                        continue  # from a step that was in flight when its stop string matched
                    if delta.finish_reason in ("error", "timeout"):
                        outcome = "error"
                        raise self._failure(delta.finish_reason)
                    output = choices[sequence].advance(delta, message.time)
                    if output.finish_reason:
                        unfinished.remove(sequence)
                        self._close(sequence)
                    yield output
        finally:
            for sequence in unfinished:
                self._close(sequence)
                self._metrics.outcome(outcome).inc()

    def _open(self, sequences: Items[Sequence], mailbox: Mailbox, submitted: float) -> None:
        self._empty.clear()
        for sequence in sequences:
            sequence.deadline = submitted + self._queue_timeout
            self._mailboxes[sequence] = mailbox
            self._active.add(sequence)
        for sequence in one_of_each_prompt(sequences):
            self._metrics.prompt_tokens.inc(len(sequence.prompt))
            self._metrics.request_prompt_tokens.observe(len(sequence.prompt))
        self._send(lambda: self._scheduler.submit(sequences))

    def _close(self, sequence: Sequence) -> None:
        """Forget a sequence, and abort it where the step thread has not ended it."""
        del self._mailboxes[sequence]
        if not self._mailboxes:
            self._empty.set()
        if sequence in self._active:
            self._active.remove(sequence)
            self._send(lambda: self._scheduler.abort(sequence))

    async def retire(self, adapter: AdapterRef, remove: Callable[[], None]) -> None:
        """Let what runs with an adapter end, take in nothing more that needs it, and run `remove` in the step thread."""
        self._retired.add(adapter)
        while any(sequence.adapter == adapter for sequence in self._active):  # noqa: ASYNC110, as nobody is told
            await asyncio.sleep(RETIRE_SECONDS)
        await self.between_steps(remove)

    async def between_steps(self, work: Callable[[], None]) -> None:
        """Run `work` in the step thread, where no step runs meanwhile; raises what it raises."""
        done: asyncio.Future[None] = self._loop.create_future()

        def settle(error: Exception | None) -> None:
            if done.cancelled():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        def run() -> None:
            error = None
            try:
                work()
            except Exception as caught:
                error = caught
            self._loop.call_soon_threadsafe(settle, error)

        self._send(run)
        await done

    def check_size(self, num_choices: int) -> None:
        """Raise DoesNotFitError if a request has more choices than an idle engine takes."""
        limit = self._max_slots + self._max_queue
        if num_choices > limit:
            raise DoesNotFitError(f"the request asks for {num_choices} choices; this server holds at most {limit}")

    def _check_admission(self, sequences: Items[Sequence]) -> None:
        if reason := self.unready_reason:
            raise UnavailableError(reason)
        if any(sequence.adapter in self._retired for sequence in sequences):  # since the request found its model
            raise RetiredError("the model has been deleted")
        self.check_size(len(sequences))
        longest = max(sequences, key=lambda sequence: sequence.num_written)
        if not self._scheduler.cache.fits_when_empty(longest.num_written):
            raise DoesNotFitError(
                f"a prompt of {len(longest.prompt)} tokens with max_tokens {longest.max_tokens} needs more KV cache than "
                f"this server's {self._scheduler.cache.capacity_text()}"
            )
        waiting, room = self._queue()
        if len(sequences) > room:
            self._metrics.outcome("rejected").inc(len(sequences))
            retry_after = max(1, math.ceil((waiting + 1) / self._max_slots * self._choice_seconds))
            raise QueueFullError(
                f"{waiting} choices are waiting, the limit is {self._max_queue}; try again in {retry_after} s", retry_after
            )

    def _queue(self) -> tuple[int, int]:
        """Choices that wait for a slot, and how many more may come."""
        running = len(self._scheduler.running)
        waiting = max(0, len(self._active) - running)
        free_slots = 0 if self._scheduler.blocked else max(0, self._max_slots - running)
        return waiting, self._max_queue + free_slots - waiting

    def _send(self, command: Callable[[], None]) -> None:
        """Have the step thread run `command` between two steps."""
        with self._inbox_changed:
            self._inbox.append(command)
            self._inbox_changed.notify()

    def _deliver(self, deltas: list[Delta], now: float) -> None:
        """Hand a step's deltas to the requests they belong to, one message each."""
        messages: dict[Mailbox, list[Delta]] = {}
        for delta in deltas:
            if delta.finish_reason:
                self._active.discard(delta.sequence)
            if delta.finish_reason in ("stop", "length"):  # the others need not have had a slot
                self._choice_seconds += 0.1 * (now - delta.sequence.started - self._choice_seconds)
            if mailbox := self._mailboxes.get(delta.sequence):
                messages.setdefault(mailbox, []).append(delta)
        for mailbox, message in messages.items():
            mailbox.put_nowait(StepNews(now, message))

    def _end_all(self, error: EngineError) -> None:
        for mailbox in set(self._mailboxes.values()):
            mailbox.put_nowait(error)

    def _give_up(self) -> None:
        self._failed.set()
        self._end_all(StepFailedError("the engine has failed"))

    def _failure(self, reason: FinishReason) -> EngineError:
        if reason == "timeout":
            return UnavailableError(f"the request waited more than {self._queue_timeout:g} s for a slot")
        return StepFailedError("the engine failed while it ran this request")

    async def drain(self, seconds: float) -> None:
        """Refuse new requests and wait for the running ones; those still there after `seconds` end in an error."""
        self._draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        self._end_all(UnavailableError("the server shut down before the request was finished"))

    @property
    def hangs(self) -> bool:
        """A step is still running although the engine has been stopped."""
        return self._stopping and self._thread.is_alive()

    async def stop(self, seconds: float = STOP_SECONDS) -> None:
        """End the step thread after the steps in flight. If that takes longer than `seconds` the engine has failed."""
        if self._stopping:
            return
        with self._inbox_changed:
            self._stopping = True
            self._inbox_changed.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, seconds)
        if self.hangs:
            log.error("a step has been running for over %g s", seconds)
            self._failed.set()

    # -- step thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while commands := self._next_commands():
                self._busy_since = time.monotonic()
                for command in commands:
                    command()
                while not self._scheduler.idle and not self._stopping:
                    self._step_once()
                    for command in self._take_inbox():
                        command()
                self._read_steps(keep=0)  # an idle scheduler has left none
                self._busy_since = math.inf
        except Exception:
            log.exception("the step loop failed")
            self._call_loop(self._give_up)

    def _next_commands(self) -> list[Callable[[], None]]:
        """Wait, idle, for commands; empty when the engine stops."""
        self._check_accounts()
        with self._inbox_changed:
            while not self._inbox and not self._stopping:
                self._inbox_changed.wait()
        return [] if self._stopping else self._take_inbox()

    def _check_accounts(self) -> None:
        for fault in self._scheduler.faults():
            self._metrics.accounting_faults.inc()
            log.error("page accounting: %s", fault)

    def _take_inbox(self) -> list[Callable[[], None]]:
        with self._inbox_changed:
            commands, self._inbox = self._inbox, []
        return commands

    def _step_once(self) -> None:
        """Schedule and launch a step, then read the one that is `steps_ahead` older: this one itself if that is 0."""
        now = time.monotonic()
        self._report(self._scheduler.expire(now))
        step = self._scheduler.schedule(now)
        if step is not None:
            self._launch(step)
        self._read_steps(keep=0 if step is None else self._steps_ahead)

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
            seconds = now - max(launched, self._busy_since)  # the device was at the step before until that ended
            self._busy_since = now
            self._metrics.step_time.observe(seconds)
            self._metrics.step_tokens.observe(num_tokens)
            deltas = self._scheduler.commit(sampled, seconds)
            self._metrics.draft_tokens.inc(self._scheduler.drafts.drafted)
            self._metrics.accepted_draft_tokens.inc(self._scheduler.drafts.right)
            self._report(deltas)

    def _fail_step(self) -> None:
        """The oldest step that the scheduler knows of raised."""
        deltas = self._scheduler.fail_step()
        log.exception("a step failed; its %d choices end with an error", len(deltas))
        self._check_accounts()
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            raise RuntimeError(f"{self._failures} steps in a row have failed")  # ends every request, these included
        self._busy_since = time.monotonic()
        self._report(deltas)

    def _report(self, deltas: list[Delta]) -> None:
        if deltas:
            self._call_loop(self._deliver, deltas, self._busy_since)

    def _call_loop(self, function: Callable[..., None], *args: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)


def one_of_each_prompt(sequences: Items[Sequence]) -> list[Sequence]:
    """The sequences without those that share the prompt of another."""
    return list({s.family if s.family and s.is_fork else s: s for s in reversed(sequences)}.values())


def held_pages(scheduler: Scheduler, group: KVGroup) -> int:
    return scheduler.cache.usage()[group].held


def held_share(scheduler: Scheduler, group: KVGroup) -> float:
    usage = scheduler.cache.usage()[group]
    return usage.held / usage.total
