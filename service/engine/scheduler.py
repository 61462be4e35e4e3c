"""Decides what runs in each step: admission, prompt chunks, batch, finish. Plain numbers, no torch, no clock, no thread."""

import math
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from kernels.band import PAGE_SIZE
from model.step import (
    DecodeRow,
    PromptChunk,
    Sampled,
    SampleRow,
    SamplingParams,
    ScoreRows,
    SlotStart,
    StepInput,
    TokenLogprobs,
)
from service.engine.drafting import PromptLookup
from service.engine.pace import Load, Pace
from service.engine.pages import FilledPage, KVCache, PageKey, page_keys

# Tokens of a step that decoding leaves to prompts, so that these always get on.
MIN_CHUNK = 16

# "stop" and "length" are the client's; "error": the step raised; "timeout": waited too long to start.
FinishReason = Literal["stop", "length", "error", "timeout"]


@dataclass(eq=False, frozen=True)
class Family:
    """Sequences of one request whose prompts begin alike: the first to run computes what they have in common for all."""

    num_common: int  # leading tokens of every prompt
    one_prompt: bool  # all of them, of every prompt: the others fork behind it


class AdapterRef(NamedTuple):
    """One of the runner's adapters. No two that ever have a number have the same name."""

    number: int
    name: bytes


NO_ADAPTER = AdapterRef(0, b"")


@dataclass(eq=False)
class Sequence:
    """One choice: a prompt and what has become of it. Made by the caller, then touched by the scheduler only.

    Positions [0, num_computed) have their keys in the cache once the steps in flight have run. While the prompt lasts
    that grows by chunks; afterwards the token at position num_computed is the last one that a scheduled step samples.
    """

    prompt: list[int]
    max_tokens: int
    sampling: SamplingParams
    stop_ids: frozenset[int] = frozenset()  # tokens that end the choice when sampled
    min_tokens: int = 0  # none of them is sampled before so many others
    # How many of the likeliest tokens to report beside each generated one; None: no logprobs at all.
    top_logprobs: int | None = None
    # First position of the prompt whose token gets logprobs too, at least 1. Its forerunners may come from the cache.
    scored_from: int | None = None
    family: Family | None = None
    adapter: AdapterRef = NO_ADAPTER
    # When to give up waiting for a slot, on the caller's clock.
    deadline: float = math.inf
    request: Items["Sequence"] = ()  # those it was submitted with; once one has a slot, all the others may wait for theirs
    slot: int = -1  # while running
    started: float = 0.0  # when it got its slot, on the same clock
    num_computed: int = 0  # booked when a step is scheduled
    num_generated: int = 0  # tokens known, booked when a step is committed
    lookup: PromptLookup | None = None  # its text, once it decodes, where its tokens can be guessed
    num_looked_up: int = 0  # prompt tokens for which the prefix cache was asked
    num_cached: int = 0  # and that it had

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

    @property
    def is_fork(self) -> bool:
        """Whether it may begin behind the prompt of another, which is the same."""
        return self.family is not None and self.family.one_prompt

    @cached_property
    def page_keys(self) -> list[PageKey]:
        return page_keys(self.prompt, self.adapter.name)

    @property
    def usable_keys(self) -> list[PageKey]:
        """Pages that may come from the cache: at least one token is computed, and all whose successors get logprobs."""
        computed = len(self.prompt) if self.scored_from is None else self.scored_from
        return self.page_keys[: (computed - 1) // PAGE_SIZE]

    def banned(self) -> tuple[int, ...]:
        """What must not be sampled behind the last token that has been scheduled."""
        few = self.num_computed - len(self.prompt) < self.min_tokens
        return tuple(sorted(self.stop_ids)) if few else ()


class Delta(NamedTuple):
    """What one step did to one sequence: no token, one, or several if a draft came true, and why it ended if it did."""

    sequence: Sequence
    tokens: list[int]
    finish_reason: FinishReason | None
    logprobs: Items[TokenLogprobs] = ()  # of `tokens`, where asked for
    scores: Items[TokenLogprobs] = ()  # of the prompt's next tokens, from scored_from on


class Drafts(NamedTuple):
    """Tokens of a step that were computed ahead."""

    drafted: int
    right: int


@dataclass
class Scheduled:
    """A step in flight: scheduled, not yet committed. It remembers its sequences, since their slots may change hands."""

    step: StepInput = field(default_factory=lambda: StepInput([], [], [], [], [], [], []))
    sequences: dict[Sequence, None] = field(default_factory=dict)  # all that it would harm by failing
    sampling: list[Sequence] = field(default_factory=list)  # of step.samples
    scoring: list[Sequence] = field(default_factory=list)  # of step.scores
    num_tokens: int = 0  # so far
    unsampled: list[Sequence] = field(default_factory=list)  # whose prompt ends with it, and with max_tokens 0 they do
    filled: list[tuple[Sequence, list[FilledPage]]] = field(default_factory=list)


class Scheduler:
    """Continuous batching with admission by reservation: an admitted sequence always finishes.

    First in, first out, no overtaking. Several steps may be scheduled before the first is committed: the device runs them
    in that order, so whatever a step reads or writes is safe from the steps scheduled after it. That is why pages and
    slots go back at once, though steps in flight still use them. Every step is committed, or failed, in the same order;
    `submit` and `abort` come at any time.
    """

    def __init__(self, cache: KVCache, *, max_slots: int, step_tokens: int, max_draft: int = 0):
        """At most `max_slots` sequences run at once and at most `step_tokens` tokens are computed in a step.

        Up to `max_draft` tokens of a sequence are computed ahead of what is sampled. If that is above 0, every step must be
        committed before the next is scheduled.
        """
        if step_tokens < max_slots + MIN_CHUNK:
            raise ValueError(
                f"step_tokens is {step_tokens}, at least max_slots + {MIN_CHUNK} = {max_slots + MIN_CHUNK} is needed"
            )
        self.cache = cache
        self.step_tokens = step_tokens
        self.max_draft = max_draft
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}  # by slot, in order of admission
        self._lacks_pages = False
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._pace = Pace()
        self.drafts = Drafts(0, 0)  # of the step that was committed last
        self._in_flight: deque[Scheduled] = deque()  # oldest first

    @property
    def blocked(self) -> bool:
        """Whether the first in line waits for pages, whatever slots are free."""
        return self._lacks_pages and bool(self.waiting)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running and not self._in_flight

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Queue the sequences of a request, each of which fits an empty cache."""
        together = list(sequences)
        for sequence in together:
            sequence.request = together
        self.waiting.extend(together)

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
        assert not (self.max_draft and self._in_flight), "what stands in a draft's place is not known yet"
        self._release_behind()
        self._admit(now)
        scheduled = Scheduled()
        decoding = [sequence for sequence in self.running.values() if sequence.is_decoding]
        prompts = self._prompts()
        is_paced = 0 < len(prompts) < len(decoding)  # where as many see nothing yet, prompts take the whole step
        room = self.step_tokens - MIN_CHUNK - len(decoding)
        if is_paced:
            room = min(room, self._pace.row_limit(prompts[0].num_computed) - len(decoding))
        for sequence in decoding:
            room -= self._add_decode(scheduled, sequence, room, len(decoding))
        num_decodes = len(scheduled.step.decodes)
        budget = self.step_tokens - num_decodes
        if is_paced:
            budget = min(budget, self._pace.chunk_limit(num_decodes, prompts[0].num_computed))
        for sequence in prompts:
            left = budget - (scheduled.num_tokens - num_decodes)
            if sequence.in_prompt and not self._add_chunk(scheduled, sequence, left):
                break
        if not scheduled.sequences:
            return None
        self._in_flight.append(scheduled)
        return scheduled.step

    def _release_behind(self) -> None:
        """Return the pages that no later step will see, which leaves every sequence with what it holds at rest."""
        for sequence in self.running.values():
            self.cache.release_behind(sequence.slot, sequence.num_computed)

    def _admit(self, now: float) -> None:
        self._lacks_pages = False
        leaders = self._leaders() if self.waiting else {}
        while self.waiting and self._free_slots:
            sequence = self.waiting[0]
            leader = leaders.get(sequence.family) if sequence.family else None
            if not self._try_reserve(sequence, self._free_slots[-1], leader):
                self._lacks_pages = True
                break
            self.waiting.popleft()
            sequence.slot = self._free_slots.pop()
            sequence.started = now
            self.running[sequence.slot] = sequence
            if sequence.family:
                leaders.setdefault(sequence.family, sequence)
            if sequence.deadline < math.inf:
                for other in sequence.request:
                    other.deadline = math.inf

    def _try_reserve(self, sequence: Sequence, slot: int, leader: Sequence | None) -> bool:
        if sequence.is_fork and leader and leader.in_prompt:
            return self.cache.try_join(slot, leader.slot, len(sequence.prompt), sequence.num_written)
        return self.cache.try_reserve(slot, sequence.num_written)

    def _leaders(self) -> dict[Family, Sequence]:
        """The first sequence of each family whose prompt is not known to be computed."""
        leaders: dict[Family, Sequence] = {}
        for sequence in self.running.values():
            if sequence.family and sequence.num_generated == 0:
                leaders.setdefault(sequence.family, sequence)
        return leaders

    def _prompts(self) -> list[Sequence]:
        """Sequences whose prompts this step may go on with, the one left half done first, the others in order."""
        leaders = self._leaders()
        in_prompt = [sequence for sequence in self.running.values() if sequence.in_prompt]
        in_prompt.sort(key=lambda sequence: sequence.num_computed == 0)
        return [s for s in in_prompt if s.family is None or not self._waits(s, s.family, leaders[s.family])]

    def _waits(self, sequence: Sequence, family: Family, leader: Sequence) -> bool:
        """Whether the leader of its family is about to compute what the sequence would."""
        if leader is sequence or sequence.num_computed:
            return False
        if family.one_prompt:
            return True
        common = sequence.usable_keys[: family.num_common // PAGE_SIZE]
        return self.cache.prefix(common) < len(common)

    def _add_decode(self, scheduled: Scheduled, sequence: Sequence, room: int, streams: int) -> int:
        """Add the next token of a sequence and, behind it, a draft of at most `room` tokens; the length of the draft."""
        tokens: list[int | None] = [None]
        if sequence.lookup:
            tokens = [sequence.lookup.last, *sequence.lookup.draft(min(room, self._draft_limit(sequence)), streams)]
        for token in tokens:
            scheduled.step.decodes.append(DecodeRow(sequence.slot, sequence.num_computed, token))
            self._compute(scheduled, sequence, 1)
            self._add_sample(scheduled, sequence, scheduled.num_tokens - 1)
        return len(tokens) - 1

    def _draft_limit(self, sequence: Sequence) -> int:
        """How many tokens behind the next one may be computed: those that will be written, to pages that it reserved."""
        stop = min(self.cache.reserved_end(sequence.slot), sequence.num_written)
        return min(self.max_draft, int(stop) - sequence.num_computed - 1)

    def _compute(self, scheduled: Scheduled, sequence: Sequence, num_tokens: int) -> None:
        scheduled.sequences[sequence] = None
        scheduled.num_tokens += num_tokens
        sequence.num_computed += num_tokens
        scheduled.step.pages.extend(self.cache.extend(sequence.slot, sequence.num_computed))

    def _add_sample(self, scheduled: Scheduled, sequence: Sequence, index: int) -> None:
        scheduled.step.samples.append(SampleRow(sequence.slot, index, sequence.top_logprobs, sequence.banned()))
        scheduled.sampling.append(sequence)

    def _add_chunk(self, scheduled: Scheduled, sequence: Sequence, budget: int) -> bool:
        """Add as much of a prompt as the budget allows; whether it ends there, so that the next one may follow."""
        step, prompt = scheduled.step, sequence.prompt
        start = sequence.num_computed
        keys: list[PageKey] = []
        if start == 0 and (usable := sequence.usable_keys):
            keys = usable[: self.cache.prefix(usable)]
            start = len(keys) * PAGE_SIZE
        end = min(start + budget, len(prompt))
        if end < len(prompt) and end // PAGE_SIZE * PAGE_SIZE > start:
            end = end // PAGE_SIZE * PAGE_SIZE  # a page's queries are cheapest together
        if end <= start:
            return False
        if sequence.num_computed == 0:
            step.starts.append(SlotStart(sequence.slot, sequence.sampling, prompt, sequence.adapter.number))
            sequence.num_looked_up = len(prompt) if sequence.scored_from is None else 0
        if keys:
            step.pages.extend(self.cache.start_behind(sequence.slot, keys))
            sequence.num_computed = sequence.num_cached = start
        step.chunks.append(PromptChunk(sequence.slot, start, prompt[start:end]))
        self._compute(scheduled, sequence, end - start)
        scheduled.filled.append((sequence, self.cache.fill(sequence.slot, start, end, sequence.page_keys)))
        if sequence.scored_from is not None:
            self._add_scores(scheduled, sequence, range(max(sequence.scored_from, start + 1), min(end + 1, len(prompt))))
        if end < len(prompt):
            return False
        self._end_prompt(scheduled, sequence)
        if sequence.is_fork:
            for fork in [s for s in self.running.values() if s.family is sequence.family and s.num_computed == 0]:
                self._fork(scheduled, fork, sequence)
        return True

    def _add_scores(self, scheduled: Scheduled, sequence: Sequence, positions: range) -> None:
        """Ask for the logprobs of prompt tokens, whose forerunners are computed last in the step so far."""
        if positions:
            first = scheduled.num_tokens - (sequence.num_computed - (positions.start - 1))
            targets = sequence.prompt[positions.start : positions.stop]
            scheduled.step.scores.append(ScoreRows(first, targets, sequence.top_logprobs or 0))
            scheduled.scoring.append(sequence)

    def _fork(self, scheduled: Scheduled, sequence: Sequence, leader: Sequence) -> None:
        step = scheduled.step
        step.starts.append(SlotStart(sequence.slot, sequence.sampling, sequence.prompt, sequence.adapter.number))
        pages, copies = self.cache.fork(sequence.slot, leader.slot, len(sequence.prompt))
        step.pages.extend(pages)
        step.copies.extend(copies)
        sequence.num_computed = len(sequence.prompt)
        scheduled.sequences[sequence] = None
        self._end_prompt(scheduled, sequence)

    def _end_prompt(self, scheduled: Scheduled, sequence: Sequence) -> None:
        """The step's last token so far is the last of the sequence's prompt."""
        if sequence.max_tokens:
            self._add_sample(scheduled, sequence, scheduled.num_tokens - 1)
        else:
            scheduled.unsampled.append(sequence)

    def commit(self, sampled: Sampled, seconds: float) -> list[Delta]:
        """Take in what the oldest step in flight brought, which ran for `seconds`; what each sequence gained.

        Tokens of sequences that ended after the step was scheduled are dropped.
        """
        scheduled = self._in_flight.popleft()
        step = scheduled.step
        tokens = sum(len(chunk.tokens) for chunk in step.chunks)
        keys = sum(len(chunk.tokens) * (chunk.start + len(chunk.tokens) // 2) for chunk in step.chunks)
        self._pace.observe(Load(len(step.decodes), tokens, keys), seconds)
        for sequence, filled in scheduled.filled:
            if self._is_running(sequence):
                self.cache.publish(filled)
            else:
                self.cache.discard(filled)
        past_prompt = {*scheduled.unsampled, *scheduled.sampling}
        gains = {sequence: Delta(sequence, [], None) for sequence in scheduled.sequences}
        gains |= self._verified(scheduled, sampled)
        for sequence, scores in zip(scheduled.scoring, sampled.scores, strict=True):
            gains[sequence] = gains[sequence]._replace(scores=scores)
        return [
            self._advance(delta) if sequence in past_prompt else delta
            for sequence, delta in gains.items()
            if self._is_running(sequence) and (sequence in past_prompt or delta.scores)
        ]

    def _verified(self, scheduled: Scheduled, sampled: Sampled) -> dict[Sequence, Delta]:
        """What was sampled behind tokens that are a sequence's own. Rows from a wrong guess on count as not computed."""
        found: dict[Sequence, Delta] = {}
        num_drafted = num_right = 0
        right = True
        for i, (sequence, token, logprobs) in enumerate(
            zip(scheduled.sampling, sampled.tokens, sampled.logprobs, strict=True)
        ):
            before = Delta(sequence, [], None)
            if i > 0 and sequence is scheduled.sampling[i - 1]:  # a draft
                before = found[sequence]
                right = right and scheduled.step.decodes[i].token == sampled.tokens[i - 1]
                num_drafted += 1
                num_right += right
            else:
                right = True
            if right:
                more = () if logprobs is None else (logprobs,)
                found[sequence] = before._replace(tokens=[*before.tokens, token], logprobs=(*before.logprobs, *more))
            else:
                sequence.num_computed -= 1
        self.drafts = Drafts(num_drafted, num_right)
        return found

    def fail_step(self) -> list[Delta]:
        """End the sequences of the oldest step in flight, which raised, with an error; the others are not harmed."""
        scheduled = self._in_flight.popleft()
        for _, filled in scheduled.filled:
            self.cache.discard(filled)
        deltas = [Delta(s, [], "error") for s in scheduled.sequences if self._is_running(s)]
        for delta in deltas:
            self._retire(delta.sequence)
        return deltas

    def faults(self) -> list[str]:
        """What is wrong with the page accounts, in words, whatever is in flight; empty when they balance."""
        self._release_behind()  # or the pages of a prompt chunk would count as more than was reserved
        return self.cache.faults()

    def _is_running(self, sequence: Sequence) -> bool:
        return self.running.get(sequence.slot) is sequence

    def _advance(self, delta: Delta) -> Delta:
        """Book what a sequence gained, and end it where that was the last."""
        sequence = delta.sequence
        end = next((i for i, token in enumerate(delta.tokens, 1) if token in sequence.stop_ids), None)
        tokens = delta.tokens[:end]
        sequence.num_generated += len(tokens)
        finish: FinishReason | None = None
        if end is not None:
            finish = "stop"
        elif sequence.num_generated == sequence.max_tokens:
            finish = "length"
        if finish:
            self._retire(sequence)
        elif self.max_draft and not sequence.sampling.adjusted:  # penalties depend on what was sampled before
            sequence.lookup = sequence.lookup or PromptLookup(sequence.prompt)
            for token in tokens:
                sequence.lookup.append(token)
        return delta._replace(tokens=tokens, logprobs=delta.logprobs[: len(tokens)], finish_reason=finish)

    def _retire(self, sequence: Sequence) -> None:
        del self.running[sequence.slot]
        self.cache.free(sequence.slot)
        self._free_slots.append(sequence.slot)
