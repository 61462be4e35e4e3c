"""The engine as the event loop sees it: takes requests in, hands sequences to the step loop, turns deltas into text.

`generate` checks whether a request may enter and submits its sequences. The step loop reports what each step did in one
call, `_deliver`. A Generation turns tokens into text, finds stop strings and yields outputs. However a request ends early
(stop string, disconnect, error, shutdown), its sequences leave through `Scheduler.abort`.
"""

import asyncio
import functools
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import suppress

from model.checkpoint.tokenizer import Tokenizer
from model.config import KVGroup
from service.engine.choice import Choice, LogprobColumns, Output
from service.engine.loop import StepLoop, StepRunner
from service.engine.metrics import Metrics
from service.engine.request import GenerationRequest, RequestError
from service.engine.scheduler import AdapterRef, Delta, Scheduler, Sequence
from service.engine.workers import SHORT, Slices, off_the_loop, settle

log = logging.getLogger("banded.engine")

# A busy engine that has finished no step for this long is not ready: something hangs.
STALL_SECONDS = 30.0
# How long the steps in flight may take to end when the engine stops.
STOP_SECONDS = 5.0
# How often to ask whether the sequences of a retired adapter have ended.
RETIRE_SECONDS = 0.05


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
    """The step that the request ran in raised, or gave it logits that are NaN or infinite."""


# Deltas and the time when their step ended, or why the whole request ends.
Message = tuple[list[Delta], float] | EngineError


class Generation:
    """A request on its way through the engine: `outputs` runs it, once, and `choices` adds up what has come so far."""

    def __init__(self, engine: "Engine", request: GenerationRequest):
        self.request = request
        self.choices: list[list[Choice]] = []  # for each prompt, its choices
        self.choice_of: dict[Sequence, Choice] = {}
        self.mailbox: asyncio.Queue[Message] = asyncio.Queue()  # from the step loop
        self._engine = engine

    async def outputs(self) -> AsyncGenerator[list[Output], None]:
        """What the choices gain, as it comes: all that has come since the last time. Closing the iterator aborts what runs.

        Raises DoesNotFitError, QueueFullError, RetiredError or UnavailableError before the first output, UnavailableError
        when a choice waited too long to start, StepFailedError when a step raised or its logits are not finite, RequestError
        when the request bans every token.
        """
        await self._engine.submit(self)
        unfinished = dict.fromkeys(self.choice_of)
        outcome = "abort"
        try:
            while unfinished:
                found: list[Output] = []
                failure = await self._take(await self.mailbox.get(), unfinished, found)
                while unfinished and not failure and not self.mailbox.empty():
                    failure = await self._take(self.mailbox.get_nowait(), unfinished, found)
                if found:
                    yield found
                if failure:
                    outcome = "error"
                    raise failure
        finally:
            for sequence in unfinished:
                self._engine.close(sequence, outcome)

    async def _take(
        self, message: Message, unfinished: dict[Sequence, None], found: list[Output]
    ) -> EngineError | RequestError | None:
        """Add to `found` what a message brings the `unfinished` sequences. Returns why the request ends, if it must."""
        if isinstance(message, EngineError):
            return message
        deltas, now = message
        slices = Slices()  # with echo, a choice may begin with a whole context
        for delta in deltas:
            await slices.rest()
            if delta.sequence not in unfinished:
                continue  # from a step that was in flight when the stop string was found
            if delta.finish_reason not in (None, "stop", "length"):
                return self._engine.failure(self, delta)
            choice = self.choice_of[delta.sequence]
            found += choice.advance(delta, now)
            if choice.finish_reason:
                del unfinished[delta.sequence]
                self._engine.close(delta.sequence)
        return None

    def best(self) -> list[Choice]:
        """The choices to return: of each prompt the n with the highest mean logprob, if there are more than n."""
        params, found = self.request.params, []
        for choices in self.choices:
            if params.is_ranked:
                choices = sorted(choices, key=lambda choice: choice.mean_logprob, reverse=True)[: params.n]
            found += choices
        return found

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counts once, whatever the number of its choices."""
        return sum(len(prompt.tokens) for prompt in self.request.prompts)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, those of choices that are not returned included."""
        return sum(len(choice.tokens) for choices in self.choices for choice in choices)

    @property
    def cached_tokens(self) -> list[int]:
        """For each prompt that has begun, how many of its tokens came from the prefix cache."""
        return [choices[0].start.num_cached for choices in self.choices if choices[0].start]

    @property
    def begun_tokens(self) -> int:
        """Tokens of the prompts that have begun to be computed."""
        return sum(len(choices[0].prompt.tokens) for choices in self.choices if choices[0].start)


class Engine:
    """One set of weights, one scheduler, one KV cache. Call it from one event loop only."""

    def __init__(
        self,
        runner: StepRunner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        max_queue: int,
        queue_timeout: float,
        overlap: bool,
    ):
        """`overlap`: see StepLoop, which runs `runner` and `scheduler` from now on."""
        self.tokenizer = tokenizer
        self._steps = StepLoop(runner, scheduler, metrics, overlap=overlap)
        self._scheduler = scheduler  # its immutable parts are read here, its methods are only sent to the step loop
        self._metrics = metrics
        self._max_rows = scheduler.max_rows
        self._max_queue = max_queue
        self._queue_timeout = queue_timeout
        self._generations: dict[Sequence, Generation] = {}  # of each sequence whose deltas somebody reads
        self._active: dict[Sequence, float | None] = {}  # those that the step loop has not ended, and when they got a row
        self._retired: set[AdapterRef] = set()
        self._mean_seconds = 1.0  # running average of a sequence's time in a row, for Retry-After
        self._empty = asyncio.Event()  # no generations
        self._empty.set()
        self._draining = False
        self._stopped = False
        self._failed = asyncio.Event()
        metrics.ready.set_function(lambda: self.unready_reason is None)
        metrics.queue_limit.set(max_queue)
        metrics.requests_running.set_function(lambda: self._steps.num_running)
        metrics.requests_waiting.set_function(lambda: self._steps.num_waiting)
        for group in self._steps.usage():
            self._export_usage(group)

    def _export_usage(self, group: KVGroup) -> None:
        usage = self._steps.usage
        self._metrics.kv_total(group).set(usage()[group].total)
        self._metrics.kv_held(group).set_function(lambda: usage()[group].held)
        self._metrics.kv_usage(group).set_function(lambda: usage()[group].share)

    def start(self) -> None:
        """Start the step thread; call from the event loop that will use the engine."""
        self._loop = asyncio.get_running_loop()
        self._steps.start(functools.partial(self._call, self._deliver), functools.partial(self._call, self._give_up))

    def _call(self, function: Callable[..., None], *args: object) -> None:
        """From the step thread: call `function` in the event loop."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    @property
    def unready_reason(self) -> str | None:
        """Why no request should be sent here, None when ready."""
        if self._failed.is_set():
            return "the engine has failed"
        if self._draining:
            return "the server is shutting down"
        if time.monotonic() - self._steps.busy_since > STALL_SECONDS:
            return f"no step has finished for {STALL_SECONDS:.0f} s"
        return None

    @property
    def has_failed(self) -> bool:
        return self._failed.is_set()

    async def failed(self) -> None:
        """Returns when the engine has given up; the process should end then."""
        await self._failed.wait()

    def generate(self, request: GenerationRequest) -> Generation:
        """What runs `request` when its outputs are asked for."""
        return Generation(self, request)

    async def retire(self, adapter: AdapterRef, remove: Callable[[], None]) -> None:
        """Refuse new requests for `adapter`, let its running sequences end, then run `remove` in the step thread."""
        self._retired.add(adapter)
        while any(sequence.adapter == adapter for sequence in self._active):  # noqa: ASYNC110 - nothing signals it
            await asyncio.sleep(RETIRE_SECONDS)
        await self.between_steps(remove)

    async def between_steps(self, work: Callable[[], None]) -> None:
        """Run `work` in the step thread while no step runs; raises what it raises."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # `work` runs even if nobody waits for it any more
        self._steps.send(lambda: settle(done, work))
        await asyncio.wrap_future(done)

    def check_size(self, num_choices: int) -> None:
        """Raise DoesNotFitError if a request has more choices than an idle engine takes."""
        limit = self._max_rows + self._max_queue
        if num_choices > limit:
            raise DoesNotFitError(f"the request asks for {num_choices} choices; this server holds at most {limit}")

    # -- a request's way in and out -----------------------------------------------------------------------------------

    async def submit(self, generation: Generation) -> None:
        """Check that a request may enter, and hand its sequences to the step loop."""
        request = generation.request
        self._check_admission(request)
        now = time.monotonic()
        if request.size <= SHORT:
            self._prepare(generation, now)
        else:
            await off_the_loop(request.size, lambda: self._prepare(generation, now))
            self._check_admission(request)
        for prompt in request.prompts:
            self._metrics.prompt_tokens.inc(len(prompt.tokens))
            self._metrics.request_prompt_tokens.observe(len(prompt.tokens))
        self._empty.clear()
        self._generations |= dict.fromkeys(generation.choice_of, generation)
        self._active |= dict.fromkeys(generation.choice_of)
        self._steps.send(lambda: self._scheduler.submit(generation.choice_of))

    def _prepare(self, generation: Generation, now: float) -> None:
        """Make the sequences and choices of a request that nobody else knows yet."""
        request, like = generation.request, None
        for prompt, own in zip(request.prompts, request.sequences(self.tokenizer, now + self._queue_timeout), strict=True):
            prompt_logprobs = LogprobColumns()
            for sequence in own:
                index = len(generation.choice_of)
                like = generation.choice_of[sequence] = Choice(
                    index, prompt, request, prompt_logprobs, self.tokenizer, self._metrics, now, like
                )
            generation.choices.append([generation.choice_of[sequence] for sequence in own])

    def _check_admission(self, request: GenerationRequest) -> None:
        if reason := self.unready_reason:
            raise UnavailableError(reason)
        if request.adapter in self._retired:  # since the request found its model
            raise RetiredError("the model has been deleted")
        self.check_size(request.num_choices)
        num_prompt, max_tokens = max(len(prompt.tokens) for prompt in request.prompts), request.params.max_tokens
        if not self._scheduler.cache.fits_when_empty(num_prompt + max(max_tokens - 1, 0)):
            raise DoesNotFitError(
                f"a prompt of {num_prompt} tokens with max_tokens {max_tokens} needs more KV cache than "
                f"this server's {self._scheduler.cache.capacity_text()}"
            )
        waiting, room = self._queue(request.client)
        if request.num_choices > room:
            self._metrics.outcome("rejected").inc(request.num_choices)
            retry_after = max(1, math.ceil((waiting + 1) / self._max_rows * self._mean_seconds))
            raise QueueFullError(
                f"{waiting} choices are waiting, the limit is {self._max_queue}; try again in {retry_after} s", retry_after
            )

    def _queue(self, client: bytes | None) -> tuple[int, int]:
        """Sequences of a client that wait for a row, and how many more may come. Those without a name count together."""
        running = self._steps.num_running
        if client is None:
            waiting = max(0, len(self._active) - running)
        else:
            own = sum(sequence.client == client for sequence in self._active)
            waiting = max(0, own - self._steps.num_running_of(client))
        free_rows = 0 if self._steps.lacks_pages else max(0, self._max_rows - running)
        return waiting, self._max_queue + free_rows - waiting

    def close(self, sequence: Sequence, outcome: str | None = None) -> None:
        """Forget a sequence. If the step loop has not ended it, abort it; if it is unfinished, count the outcome."""
        del self._generations[sequence]
        if not self._generations:
            self._empty.set()
        if sequence in self._active:
            del self._active[sequence]
            self._steps.send(lambda: self._scheduler.abort(sequence))
        if outcome:
            self._metrics.outcome(outcome).inc()

    def failure(self, generation: Generation, delta: Delta) -> EngineError | RequestError:
        """What a request is told that `delta` ends early. A fault of the model is logged and counted."""
        choice = generation.choice_of[delta.sequence]
        match delta.finish_reason:
            case "timeout":
                return UnavailableError(f"the request waited more than {self._queue_timeout:g} s for a slot")
            case "none_left":
                params = generation.request.params
                field = next((name for name in ("allowed_token_ids", "bad_words") if getattr(params, name)), "min_tokens")
                message = f"'{field}': every token is a stop token or banned, so that none is left for {choice.facts}"
                return RequestError(message, field)
            case "not_finite":
                self._metrics.non_finite_logits.inc()
                log.error("logits are NaN or infinite: %s, adapter %d", choice.facts, generation.request.adapter.number)
                return StepFailedError(
                    f"the model's logits are NaN or infinite, so that no token can be chosen for {choice.facts}; "
                    "try dtype float32 if 16 bits overflow; 'banded doctor' checks the kernels on these weights"
                )
        return StepFailedError("the engine failed while it ran this request")

    # -- from the step loop -------------------------------------------------------------------------------------------

    def _deliver(self, deltas: list[Delta], now: float) -> None:
        """Hand a step's deltas to the requests that they belong to, one message each."""
        messages: dict[Generation, list[Delta]] = {}
        for delta in deltas:
            sequence = delta.sequence
            generation = self._generations.get(sequence)
            if delta.start:
                if generation:
                    self._active[sequence] = delta.start.admitted
                    generation.choice_of[sequence].begin(delta.start)
                continue
            if delta.finish_reason:
                admitted = self._active.pop(sequence, None)
                if admitted is not None and delta.finish_reason in ("stop", "length"):
                    self._mean_seconds += 0.1 * (now - admitted - self._mean_seconds)
            if generation:
                messages.setdefault(generation, []).append(delta)
        for generation, message in messages.items():
            generation.mailbox.put_nowait((message, now))

    def _end_all(self, error: EngineError) -> None:
        for generation in set(self._generations.values()):
            generation.mailbox.put_nowait(error)

    def _give_up(self) -> None:
        self._failed.set()
        self._end_all(StepFailedError("the engine has failed"))

    # -- the end ------------------------------------------------------------------------------------------------------

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
        return self._stopped and self._steps.is_alive

    async def stop(self, seconds: float = STOP_SECONDS) -> None:
        """End the step thread after the steps in flight. If that takes longer than `seconds` the engine has failed."""
        if self._stopped:
            return
        self._stopped = True
        self._steps.stop()
        await asyncio.to_thread(self._steps.join, seconds)
        if self.hangs:
            log.error("a step has been running for over %g s", seconds)
            self._failed.set()
