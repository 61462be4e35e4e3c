"""Decides what runs in each step: admission, prompt chunks, batch, finish. Plain numbers, no torch, no clock, no thread."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from model.step import DecodeRow, PromptChunk, Sampled, SamplingParams, SlotStart, StepInput
from service.kv_cache import KVCache

# "stop" and "length" are the client's; "error": the step raised; "timeout": waited too long to start.
FinishReason = Literal["stop", "length", "error", "timeout"]

# Prompt tokens that run beside decoding streams even where the pace allows fewer, so that prompts always get on. A chunk
# that does not end its prompt ends at an absolute multiple of it: attention over a prompt then has the same bits wherever
# time and batch-mates happen to cut it (in bf16, where the matrix products of every row have the same bits in any batch).
MIN_CHUNK = 16
# However many prompts wait, a step beside decoding streams may take about this many times their own time longer.
MOST_PACE = 3.0
# Weight of the newest step in the running averages of step times.
NEWEST = 0.2


@dataclass(eq=False)
class Sequence:
    """One choice: a prompt and what has become of it. Made by the caller, then touched by the scheduler only.

    Positions [0, num_computed) have their keys in the cache once the steps in flight have run. While the prompt lasts
    that grows by chunks; afterwards the token at position num_computed is the last one that a scheduled step samples.
    """

    prompt: list[int]
    max_tokens: int
    sampling: SamplingParams
    # Ends the choice when sampled; None generates on.
    eos_id: int | None
    # When to give up waiting for a slot, on the caller's clock.
    deadline: float = math.inf
    slot: int = -1  # while running
    started: float = 0.0  # when it got its slot, on the same clock
    num_computed: int = 0  # booked when a step is scheduled
    num_generated: int = 0  # tokens known, booked when a step is committed

    @property
    def num_written(self) -> int:
        """Positions that will ever be in the cache: the last token is sampled but never computed."""
        return len(self.prompt) + max(self.max_tokens - 1, 0)

    @property
    def in_prompt(self) -> bool:
        return self.num_computed < len(self.prompt)

    @property
    def is_decoding(self) -> bool:
        """Whether the next step computes its last token: the steps so far end the prompt, but sample less than max_tokens.
        Should a token in flight turn out to be the end, the one after it is dropped."""
        return len(self.prompt) <= self.num_computed < self.num_written


class Delta(NamedTuple):
    """What one step did to one sequence: at most one token now, and why it ended if it did."""

    sequence: Sequence
    tokens: list[int]
    finish_reason: FinishReason | None


class Scheduled(NamedTuple):
    """A step in flight: scheduled, not yet committed. It remembers its sequences, since their slots may change hands."""

    step: StepInput
    sequences: list[Sequence]  # of step.decodes, then of step.chunks
    past_prompt: list[Sequence]  # those whose prompt is computed with this step, in the order of its sampled tokens


class Pace:
    """How many prompt tokens may run beside decoding streams.

    Those that take as long as the decoding itself does, so that a step takes twice as long at most. Where more sequences
    wait in their prompts than decode it is up to MOST_PACE times that, or a burst of prompts would crawl behind the first.
    """

    def __init__(self) -> None:
        self._decode_seconds: float | None = None
        self._seconds_per_prompt_token: float | None = None

    def observe(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from a step that took `seconds`."""
        if not num_prompt_tokens:
            self._decode_seconds = blend(self._decode_seconds, seconds)
            return
        prompt_seconds = seconds - (self._decode_seconds or 0.0) if num_decodes else seconds
        # Fewer tokens than a chunk measure the step's overhead.
        if prompt_seconds > 0 and num_prompt_tokens >= MIN_CHUNK:
            per_token = prompt_seconds / num_prompt_tokens
            self._seconds_per_prompt_token = blend(self._seconds_per_prompt_token, per_token)

    def chunk_limit(self, num_decodes: int, num_prompts: int) -> int:
        """Prompt tokens for a step beside `num_decodes` streams, with `num_prompts` sequences still in their prompts."""
        if self._decode_seconds is None or not self._seconds_per_prompt_token:
            return MIN_CHUNK
        seconds = self._decode_seconds * min(max(1.0, num_prompts / num_decodes), MOST_PACE)
        return max(MIN_CHUNK, int(seconds / self._seconds_per_prompt_token))


def blend(average: float | None, value: float) -> float:
    return value if average is None else average + NEWEST * (value - average)


class Scheduler:
    """Continuous batching with admission by reservation: an admitted sequence always finishes.

    First in, first out, no overtaking. Several steps may be scheduled before the first is committed: the device runs them
    in that order, so whatever a step reads or writes is safe from the steps scheduled after it. That is why pages and
    slots go back at once, though steps in flight still use them. Every step is committed, or failed, in the same order;
    `submit` and `abort` come at any time.
    """

    def __init__(self, cache: KVCache, *, max_slots: int, step_tokens: int):
        """At most `max_slots` sequences run at once and at most `step_tokens` tokens are computed in a step."""
        if step_tokens < max_slots + MIN_CHUNK:
            raise ValueError(
                f"step_tokens is {step_tokens}, at least max_slots + {MIN_CHUNK} = {max_slots + MIN_CHUNK} is needed"
            )
        self.cache = cache
        self.step_tokens = step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}  # by slot, in order of admission
        self.blocked = False  # the first in line waits for pages, whatever slots are free
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._pace = Pace()
        self._in_flight: deque[Scheduled] = deque()  # oldest first

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running and not self._in_flight

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences, each of which fits an empty cache."""
        self.waiting.extend(sequences)

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is. Harmless when it has already ended."""
        if self._is_running(sequence):
            self._retire(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def expire(self, now: float) -> list[Delta]:
        """End the sequences that have waited past their deadline."""
        late = [sequence for sequence in self.waiting if sequence.deadline < now]
        for sequence in late:
            self.waiting.remove(sequence)
        return [Delta(sequence, [], "timeout") for sequence in late]

    def schedule(self, now: float) -> StepInput | None:
        """The next step, or None when nothing can run. Sequences that get a slot remember `now`."""
        self._release_behind()
        self._admit(now)
        decodes = [sequence for sequence in self.running.values() if sequence.is_decoding]
        chunks = self._chunks(len(decodes))
        if not decodes and not chunks:
            return None
        starts = [SlotStart(c.slot, self.running[c.slot].sampling) for c in chunks if c.start == 0]
        rows = [DecodeRow(sequence.slot, sequence.num_computed) for sequence in decodes]
        sequences = decodes + [self.running[chunk.slot] for chunk in chunks]
        counts = [1] * len(decodes) + [len(chunk.tokens) for chunk in chunks]
        pages = []
        for sequence, count in zip(sequences, counts, strict=True):
            sequence.num_computed += count
            pages += self.cache.extend(sequence.slot, sequence.num_computed)
        step = StepInput(starts, pages, rows, chunks)
        past_prompt = [sequence for sequence in sequences if not sequence.in_prompt]
        self._in_flight.append(Scheduled(step, sequences, past_prompt))
        return step

    def _release_behind(self) -> None:
        """Return the pages that no later step will see, which leaves every sequence with what it holds at rest."""
        for sequence in self.running.values():
            self.cache.release_behind(sequence.slot, sequence.num_computed)

    def _admit(self, now: float) -> None:
        self.blocked = False
        while self.waiting and self._free_slots:
            sequence = self.waiting[0]
            if not self.cache.try_reserve(self._free_slots[-1], sequence.num_written):
                self.blocked = True
                break
            self.waiting.popleft()
            sequence.slot = self._free_slots.pop()
            sequence.started = now
            self.running[sequence.slot] = sequence

    def _chunks(self, num_decodes: int) -> list[PromptChunk]:
        """Prompt chunks of this step: first come, first served, so at most one prompt is left half done."""
        in_prompt = [sequence for sequence in self.running.values() if sequence.in_prompt]
        budget = self.step_tokens - num_decodes
        if num_decodes:
            budget = min(budget, self._pace.chunk_limit(num_decodes, len(in_prompt)))
        chunks = []
        for sequence in in_prompt:
            start, end = sequence.num_computed, len(sequence.prompt)
            if start + budget < end:
                end = (start + budget) // MIN_CHUNK * MIN_CHUNK
            if end <= start:
                break
            samples = end == len(sequence.prompt) and sequence.max_tokens > 0
            chunks.append(PromptChunk(sequence.slot, start, sequence.prompt[start:end], samples))
            budget -= end - start
            if end < len(sequence.prompt):
                break
        return chunks

    def commit(self, sampled: Sampled, seconds: float) -> list[Delta]:
        """Take in the tokens of the oldest step in flight, which ran for `seconds`; what each sequence gained.

        Tokens of sequences that ended after the step was scheduled are dropped.
        """
        step, _, past_prompt = self._in_flight.popleft()
        self._pace.observe(len(step.decodes), sum(len(chunk.tokens) for chunk in step.chunks), seconds)
        tokens = iter(sampled.tokens)
        # With max_tokens 0 the prompt was all there is to compute.
        gains = [(sequence, [next(tokens)] if sequence.max_tokens else []) for sequence in past_prompt]
        return [self._advance(sequence, gained) for sequence, gained in gains if self._is_running(sequence)]

    def fail_step(self) -> list[Delta]:
        """End the sequences of the oldest step in flight, which raised, with an error; the others are not harmed."""
        deltas = [Delta(s, [], "error") for s in self._in_flight.popleft().sequences if self._is_running(s)]
        for delta in deltas:
            self._retire(delta.sequence)
        return deltas

    def faults(self) -> list[str]:
        """What is wrong with the page accounts, in words, whatever is in flight; empty when they balance."""
        self._release_behind()  # or the pages of a prompt chunk would count as more than was reserved
        return self.cache.faults()

    def _is_running(self, sequence: Sequence) -> bool:
        return self.running.get(sequence.slot) is sequence

    def _advance(self, sequence: Sequence, tokens: list[int]) -> Delta:
        sequence.num_generated += len(tokens)
        finish: FinishReason | None = None
        if tokens and tokens[-1] == sequence.eos_id:
            finish = "stop"
        elif sequence.num_generated == sequence.max_tokens:
            finish = "length"
        if finish:
            self._retire(sequence)
        return Delta(sequence, tokens, finish)

    def _retire(self, sequence: Sequence) -> None:
        del self.running[sequence.slot]
        self.cache.free(sequence.slot)
        self._free_slots.append(sequence.slot)
