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

    Positions [0, num_computed) have their keys in the cache. While the prompt lasts that grows by chunks; afterwards
    the token at position num_computed is the last one sampled.
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
    num_computed: int = 0
    num_generated: int = 0

    @property
    def num_written(self) -> int:
        """Positions that will ever be in the cache: the last token is sampled but never computed."""
        return len(self.prompt) + max(self.max_tokens - 1, 0)

    @property
    def in_prompt(self) -> bool:
        return self.num_computed < len(self.prompt)


class Delta(NamedTuple):
    """What one step did to one sequence: at most one token now, and why it ended if it did."""

    sequence: Sequence
    tokens: list[int]
    finish_reason: FinishReason | None


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

    First in, first out, no overtaking. `schedule` and `commit` alternate; `submit` and `abort` come between them.
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
        self._step: StepInput | None = None  # scheduled, not yet committed

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences, each of which fits an empty cache."""
        self.waiting.extend(sequences)

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is. Harmless when it has already ended."""
        if self.running.get(sequence.slot) is sequence:
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
        assert self._step is None, "schedule called twice without commit"
        self._admit(now)
        decodes = [sequence for sequence in self.running.values() if not sequence.in_prompt]
        chunks = self._chunks(len(decodes))
        if not decodes and not chunks:
            return None
        starts = [SlotStart(c.slot, self.running[c.slot].sampling) for c in chunks if c.start == 0]
        pages = []
        for sequence in decodes:
            pages += self.cache.extend(sequence.slot, sequence.num_computed + 1)
        for chunk in chunks:
            pages += self.cache.extend(chunk.slot, chunk.start + len(chunk.tokens))
        rows = [DecodeRow(sequence.slot, sequence.num_computed) for sequence in decodes]
        self._step = StepInput(starts, pages, rows, chunks)
        return self._step

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
        """Take in the tokens of the scheduled step, which ran for `seconds`; what each sequence gained."""
        step, self._step = self._step, None
        assert step is not None, "commit without a scheduled step"
        self._pace.observe(len(step.decodes), sum(len(chunk.tokens) for chunk in step.chunks), seconds)
        tokens = iter(sampled.tokens)
        deltas = []
        for row in step.decodes:
            sequence = self.running[row.slot]
            sequence.num_computed += 1
            deltas.append(self._advance(sequence, [next(tokens)]))
        for chunk in step.chunks:
            sequence = self.running[chunk.slot]
            sequence.num_computed += len(chunk.tokens)
            if chunk.samples:
                deltas.append(self._advance(sequence, [next(tokens)]))
            elif not sequence.in_prompt:  # max_tokens 0: the prompt was all there is to compute
                deltas.append(self._advance(sequence, []))
            else:
                self.cache.release_behind(sequence.slot, sequence.num_computed)
        return deltas

    def fail_step(self) -> list[Delta]:
        """End every sequence of the scheduled step, which raised, with an error; the others are not harmed."""
        step, self._step = self._step, None
        assert step is not None, "fail_step without a scheduled step"
        slots = [row.slot for row in step.decodes] + [chunk.slot for chunk in step.chunks]
        deltas = [Delta(self.running[slot], [], "error") for slot in slots]
        for delta in deltas:
            self._retire(delta.sequence)
        return deltas

    def _advance(self, sequence: Sequence, tokens: list[int]) -> Delta:
        sequence.num_generated += len(tokens)
        finish: FinishReason | None = None
        if tokens and tokens[-1] == sequence.eos_id:
            finish = "stop"
        elif sequence.num_generated == sequence.max_tokens:
            finish = "length"
        if finish:
            self._retire(sequence)
        else:
            self.cache.release_behind(sequence.slot, sequence.num_computed)
        return Delta(sequence, tokens, finish)

    def _retire(self, sequence: Sequence) -> None:
        del self.running[sequence.slot]
        self.cache.free(sequence.slot)
        self._free_slots.append(sequence.slot)
