"""Sequences, and what runs of them in each step: admission, prompt chunks, batch, finish.

Plain numbers: no torch, no clock, no thread.
"""

import math
import sys
from collections import Counter, abc, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from kernels.band import PAGE_SIZE
from kernels.names import NONE_LEFT, NOT_FINITE
from model.step import (
    DecodeToken,
    PromptChunk,
    PromptLogprobs,
    RowStart,
    Sample,
    Sampled,
    Sampling,
    StepInput,
    TokenLogprobs,
)
from service.engine.drafting import PromptLookup
from service.engine.pace import Load, Pace
from service.engine.pages import FilledPage, PageAllocator, PageHash, page_hashes
from service.engine.shares import Shares

# Tokens of a step that decoding always leaves to prompts, so that prompts make progress.
MIN_CHUNK = 16
# Known tokens of a sequence that a step computes again, if it was put back and its pages were needed. They take about as
# long as a batch of so many sequences, less the output head.
MAX_REPLAY = 32
# Tokens that the only sequence of a client generates before it must yield its row to a client without one.
QUANTUM = 64
# Pages are reserved under this row until the sequence gets one.
NO_ROW = -1

# "stop" and "length" are for the client. "error": the step raised. "timeout": the sequence waited too long to start.
# "not_finite": the model's logits are NaN or infinite. "none_left": the request bans every token.
FinishReason = Literal["stop", "length", "error", "timeout", "not_finite", "none_left"]
FAULTS: dict[int, FinishReason] = {NOT_FINITE: "not_finite", NONE_LEFT: "none_left"}  # by what is sampled instead


class AdapterRef(NamedTuple):
    """One of the runner's adapters. No number ever stands for two names."""

    number: int
    name: bytes


NO_ADAPTER = AdapterRef(0, b"")


@dataclass(eq=False, frozen=True)
class PrefixGroup:
    """Sequences of a request whose prompts begin alike. The first to run, the *parent*, computes the beginning for all."""

    num_common: int  # leading tokens that all prompts share
    forks: bool  # all prompts are equal: the others fork from the parent at the end of its prompt


@dataclass(eq=False)
class Sequence:
    """A prompt and what has become of it. Its maker hands it over to the scheduler, which alone reads and writes it then.

    Positions [0, num_computed) have their keys in the cache once the steps in flight have run. During the prompt
    num_computed grows by chunks. Afterwards the token at position num_computed is the last one that a scheduled step
    samples.

    A sequence that is put back waits for a row again. If its pages are needed meanwhile, it computes its prompt again, and
    then the tokens that it has generated: as decode rows, several positions at once, since only these have the same bits.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()  # tokens that end the sequence when sampled
    min_tokens: int = 0  # none of stop_ids is sampled before so many other tokens
    # How many of the likeliest tokens to report with each generated one; None: no logprobs at all.
    top_logprobs: int | None = None
    # First position of the prompt whose token gets logprobs too, at least 1. Earlier tokens may come from the cache. It
    # moves on when logprobs are committed, so that none are reported twice.
    prompt_logprobs_from: int | None = None
    prompt_top_logprobs: int = 0  # likeliest tokens to report with each of these, if more than top_logprobs
    bad_words: tuple[tuple[int, ...], ...] = ()  # runs of tokens that are not generated
    is_cached: bool = True  # whether its prompt may come from the prefix cache, and stay there
    cache_scope: str = ""  # sequences of different scopes never share a page
    group: PrefixGroup | None = None
    adapter: AdapterRef = NO_ADAPTER
    client: Hashable = ""  # whose share of the engine it takes
    deadline: float = math.inf  # when to give up waiting for a row, on the scheduler's clock
    siblings: abc.Sequence["Sequence"] = ()  # those it was submitted with: once one has a row, none of them times out
    row: int = NO_ROW  # while running. Put back, a number below NO_ROW that its pages are kept under
    due: float = 0.0  # when its prompt's turn is, on the clock of the shares
    is_placed: bool = False  # whether the runner knows it by its row
    admitted: float = 0.0  # when it first got a row
    has_begun: bool = False  # whether its Start was reported
    num_computed: int = 0  # booked when a step is scheduled
    generated: list[int] = field(default_factory=list)  # tokens known, booked when a step is committed
    num_before: int = 0  # of these, known when it got its row
    last_step: int = 0  # the number of the step that computed it last, or from which on it has its row
    suspect_to: int = 0  # up to where it is watched after it had to start over: the step that raised may be its fault
    lookup: PromptLookup | None = None  # its text, once it decodes, if its tokens can be guessed

    @property
    def num_written(self) -> int:
        """Positions that will ever be in the cache: the last token is sampled but never computed."""
        return len(self.prompt) + max(self.max_tokens - 1, 0)

    @property
    def num_generated(self) -> int:
        return len(self.generated)

    @property
    def num_prompt_left(self) -> int:
        """Tokens of the prompt that no step has computed or is about to."""
        return max(0, len(self.prompt) - self.num_computed)

    @property
    def in_prompt(self) -> bool:
        return self.num_computed < len(self.prompt)

    @property
    def is_decoding(self) -> bool:
        """Whether the next step computes its last token: it is past its prompt and short of max_tokens.

        If a token in flight turns out to be the end, the token after it is dropped.
        """
        return len(self.prompt) <= self.num_computed < self.num_written

    @property
    def waits_for_tokens(self) -> bool:
        """Whether what must not be sampled next depends on a token that is still in flight."""
        return bool(self.bad_words) and self.num_generated <= self.num_computed - len(self.prompt)

    @property
    def may_fork(self) -> bool:
        """Whether it may begin at the end of another sequence's prompt, which equals its own."""
        return self.group is not None and self.group.forks

    @cached_property
    def page_hashes(self) -> list[PageHash]:
        return page_hashes(self.prompt, self.adapter.name, self.cache_scope) if self.is_cached else []

    @property
    def usable_hashes(self) -> list[PageHash]:
        """Of pages that may come from the cache: at least one token is computed, and all that logprobs are taken after."""
        end = len(self.prompt) if self.prompt_logprobs_from is None else self.prompt_logprobs_from
        return self.page_hashes[: (end - 1) // PAGE_SIZE]

    def banned(self) -> tuple[int, ...]:
        """What must not be sampled after the last token that has been scheduled."""
        few = self.num_computed - len(self.prompt) < self.min_tokens
        banned = {*self.stop_ids} if few else set()
        for *start, end in self.bad_words:
            place = len(self.generated) - len(start)
            if place >= 0 and self.generated[place:] == start:
                banned.add(end)
        return tuple(sorted(banned))


class Start(NamedTuple):
    """When a sequence first got a row, and what the prefix cache knew of its prompt when the first tokens were scheduled."""

    admitted: float
    num_looked_up: int  # prompt tokens that the prefix cache was asked for
    num_cached: int  # prompt tokens that it had


class Delta(NamedTuple):
    """What one step did to one sequence: its tokens (none, one, or several if a draft came true), and why it ended."""

    sequence: Sequence
    tokens: list[int]
    finish_reason: FinishReason | None
    logprobs: abc.Sequence[TokenLogprobs] = ()  # of `tokens`, where asked for
    prompt_logprobs: abc.Sequence[TokenLogprobs] = ()  # of the prompt's next tokens, from prompt_logprobs_from on
    start: Start | None = None  # in the first delta of a sequence that began, which comes before the step has run


class Drafts(NamedTuple):
    """Of one step: how many guessed tokens were computed, and how many of them came true."""

    drafted: int
    accepted: int


@dataclass
class Scheduled:
    """A step in flight: scheduled, not yet committed. It remembers its sequences, since rows may change hands meanwhile."""

    step: StepInput = field(default_factory=lambda: StepInput([], [], [], [], [], [], []))
    sequences: dict[Sequence, int] = field(default_factory=dict)  # all that it computes, and the first position of each
    sampling: list[Sequence] = field(default_factory=list)  # of step.samples
    explaining: list[Sequence] = field(default_factory=list)  # of step.prompt_logprobs
    num_tokens: int = 0  # so far
    unsampled: list[Sequence] = field(default_factory=list)  # with max_tokens 0: they end with their prompt, in this step
    filled: list[tuple[Sequence, list[FilledPage]]] = field(default_factory=list)
    parents: dict[Sequence, Sequence] = field(default_factory=dict)  # of those that begin at the end of another's prompt

    @property
    def num_explained(self) -> int:
        """Prompt tokens with logprobs."""
        return sum(len(wanted.targets) for wanted in self.step.prompt_logprobs)


class Scheduler:
    """Continuous batching with admission by reservation: a sequence that has a row never lacks pages.

    Shares says whose turn it is, and nobody overtakes. A sequence loses its row only to another client, never by a lack of
    pages of its own, and later goes on with the same bits.

    Several steps may be scheduled before the first is committed. The device runs steps in order, so that a step's reads
    and writes are safe from later steps. That is why pages and rows are reused at once, even while steps in flight still
    use them. Every step is committed in the same order; `submit` and `abort` come at any time.
    """

    def __init__(
        self, cache: PageAllocator, *, max_rows: int, step_tokens: int, explained_weight: float = 1.0, max_draft: int = 0
    ):
        """At most `max_rows` sequences run at once, and at most `step_tokens` tokens are computed in a step.

        A prompt token with logprobs counts as `explained_weight` tokens, from 1 to MIN_CHUNK.

        A step computes up to `max_draft` guessed tokens of a sequence. If that is above 0, every step must be committed
        before the next is scheduled.
        """
        if step_tokens < max_rows + MIN_CHUNK:
            raise ValueError(
                f"step_tokens is {step_tokens}, at least max_slots + {MIN_CHUNK} = {max_rows + MIN_CHUNK} is needed"
            )
        self.cache = cache
        self.max_rows = max_rows
        self.step_tokens = step_tokens
        self.explained_weight = explained_weight
        self.max_draft = max_draft
        self.waiting: Shares[Sequence] = Shares()
        self.running: dict[int, Sequence] = {}  # by row, in order of admission
        self.num_put_back = 0  # so far
        self._num_steps = 0  # so far
        self.begun: list[Delta] = []  # of the sequences that begin in the step that was scheduled last
        self.drafts = Drafts(0, 0)  # of the step that was committed last
        self._lacks_pages = False
        self._earliest = math.inf  # no deadline of a waiting sequence is earlier
        self._parked: dict[Sequence, None] = {}  # those put back that still have their pages, the one put back first first
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self._pace = Pace()
        self._in_flight: deque[Scheduled] = deque()  # oldest first

    @property
    def lacks_pages(self) -> bool:
        """Whether the first in line waits for pages, however many rows are free."""
        return self._lacks_pages and bool(self.waiting)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running and not self._in_flight

    def submit(self, sequences: abc.Iterable[Sequence]) -> None:
        """Queue the sequences of a request, each of which fits an empty cache."""
        together = list(sequences)
        for sequence in together:
            sequence.siblings = together
            self.waiting.add(sequence)
            self._earliest = min(self._earliest, sequence.deadline)

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is. Harmless if it has already ended."""
        if self.is_running(sequence):
            self._retire(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            self._drop_pages(sequence)

    def is_running(self, sequence: Sequence) -> bool:
        return self.running.get(sequence.row) is sequence

    def expire(self, now: float) -> list[Delta]:
        """End the sequences that have waited past their deadline."""
        if self._earliest >= now:
            return []
        late = [sequence for sequence in self.waiting if sequence.deadline < now]
        for sequence in late:
            self.waiting.remove(sequence)
        self._earliest = min((sequence.deadline for sequence in self.waiting), default=math.inf)
        return [Delta(sequence, [], "timeout") for sequence in late]

    def schedule(self, now: float) -> StepInput | None:
        """The next step, or None when nothing can run before the steps in flight are committed.

        `begun` tells which sequences begin in it.
        """
        assert not (self.max_draft and self._in_flight), "a draft's tokens are not verified yet"
        self._release_passed(in_flight=self._in_flight)
        self.begun = []
        if not self._admit(now):
            return None
        scheduled = Scheduled()
        decoding = [s for s in self.running.values() if s.is_decoding and not s.waits_for_tokens]
        prompts = self._prompts()
        is_paced = self._is_paced(prompts, decoding)
        decoding, crowd = self._in_turns(decoding)
        self._num_steps += 1
        room = min(self.step_tokens - MIN_CHUNK, crowd) - len(decoding)
        if is_paced:
            room = min(room, self._pace.row_limit(prompts[0].num_computed) - len(decoding))
        for sequence in decoding:
            room -= self._add_decode(scheduled, sequence, room, len(decoding))
        num_decodes = len(scheduled.step.decodes)
        budget = self.step_tokens - num_decodes
        if is_paced:
            budget = min(budget, self._pace.chunk_limit(num_decodes, prompts[0].num_computed))
        self._add_chunks(scheduled, prompts, budget)
        self.waiting.advance(scheduled.num_tokens - num_decodes, (sequence.client for sequence in prompts))
        if not scheduled.sequences:
            return None
        self._in_flight.append(scheduled)
        return scheduled.step

    def _release_passed(self, in_flight: abc.Reversible[Scheduled] = ()) -> None:
        """Return the pages that no later step will see. Every sequence then holds at most what it reserved.

        What steps `in_flight` see is kept, so that they can run again, as far as nobody has reserved the memory.
        """
        oldest: dict[Sequence, int] = {}
        for scheduled in reversed(in_flight):
            oldest |= scheduled.sequences
        spare = self.cache.spare_pages
        for sequence in self.running.values():
            position = sequence.num_computed
            if sequence in oldest:
                spare -= self.cache.num_passed(oldest[sequence], position)
                position = oldest[sequence] if spare >= 0 else position
            self.cache.release_passed(sequence.row, position)

    def _admit(self, now: float) -> bool:
        """Give rows to those whose turn it is. False if somebody must yield who is still in a step in flight."""
        self._lacks_pages = False
        while sequence := self.waiting.first():
            victim = None if self._free_rows else self._victim(sequence)
            if not (self._free_rows or victim):
                break
            if victim and self._in_flight:
                return False
            if not self._reserve(sequence):
                self._lacks_pages = True
                return not (self._in_flight and self._victim_for_pages(sequence))
            if victim and not self._free_rows:
                self._put_back(victim)
            self._take_row(sequence, now)
        return True

    def _victim(self, sequence: Sequence) -> Sequence | None:
        """Who must yield to the first in line: the newest of a client that has more than its share.

        If no client has, but that of `sequence` has no row at all: one who has had a turn, and whose client has others.
        """
        client = self.waiting.over(sequence.client)
        if client is not None:
            return next(each for each in reversed(self.running.values()) if each.client == client)
        if self.waiting.held(sequence.client):
            return None
        return next((each for each in self.running.values() if self._has_had_turn(each)), None)

    def _has_had_turn(self, sequence: Sequence) -> bool:
        num_new = sequence.num_generated - sequence.num_before
        return num_new >= QUANTUM and self.waiting.has_waiting(sequence.client)

    def _victim_for_pages(self, sequence: Sequence) -> Sequence | None:
        """Computing a victim's tokens again takes time, so only a client without a row may cause it."""
        return None if self.waiting.held(sequence.client) else self._victim(sequence)

    def _reserve(self, sequence: Sequence) -> bool:
        """Promise pages to the first in line. Those who were put back lose theirs if needed, the last to go on first."""
        if sequence in self._parked:
            return True
        while not self._try_reserve(sequence):
            if self._parked:
                self._drop_pages(next(iter(self._parked)))
            elif (victim := self._victim_for_pages(sequence)) and not self._in_flight:
                self._put_back(victim)
            else:
                return False
        return True

    def _try_reserve(self, sequence: Sequence) -> bool:
        same = (each for each in self.running.values() if each.group is sequence.group and each.in_prompt)
        parent = next(same, None) if sequence.may_fork else None
        if parent:
            return self.cache.try_join(NO_ROW, parent.row, len(sequence.prompt), sequence.num_written)
        return self.cache.try_reserve(NO_ROW, sequence.num_written)

    def _take_row(self, sequence: Sequence, now: float) -> None:
        sequence.due = self.waiting.take(sequence, sequence.num_prompt_left)
        row = self._free_rows.pop()
        self.cache.move(sequence.row, row)
        self._parked.pop(sequence, None)
        self.running[row] = sequence
        sequence.row, sequence.num_before, sequence.last_step = row, sequence.num_generated, self._num_steps
        if not sequence.has_begun:
            sequence.admitted = now
        if sequence.deadline < math.inf:
            for sibling in sequence.siblings:
                sibling.deadline = math.inf

    def _put_back(self, sequence: Sequence) -> None:
        """Take a sequence's row away. It keeps its pages until somebody needs them, unless it is inside its prompt.

        No step in flight may hold it: what it samples would be lost, and pages that it has passed would be needed again.
        """
        self.waiting.refund(sequence.client, sequence.num_prompt_left)
        del self.running[sequence.row]
        self._free_rows.append(sequence.row)
        self.waiting.put_back(sequence)
        self.num_put_back += 1
        key = NO_ROW - self.num_put_back
        self.cache.move(sequence.row, key)
        sequence.row, sequence.is_placed = key, False
        self._parked[sequence] = None
        if sequence.in_prompt:
            self._drop_pages(sequence)

    def start_over(self, sequence: Sequence) -> None:
        """Compute a running sequence again from its beginning, since what it did in a step that raised can't be repeated.

        What it does in steps in flight is lost. It is watched as far as any step may get that raises as this one did.
        """
        sequence.suspect_to = sequence.num_computed + self.step_tokens
        self._put_back(sequence)
        self._drop_pages(sequence)

    @property
    def has_suspects(self) -> bool:
        """Whether a step may raise that could not be repeated if another was scheduled on top of it."""
        return any(sequence.num_computed < sequence.suspect_to for sequence in self.running.values())

    def _drop_pages(self, sequence: Sequence) -> None:
        """Take the pages of a sequence that waits, if it has any: it will be computed again."""
        if sequence in self._parked:
            del self._parked[sequence]
            self.cache.free(sequence.row)
            sequence.row, sequence.num_computed = NO_ROW, 0

    def _parents(self) -> dict[PrefixGroup, Sequence]:
        """The first sequence of each group, unless it is known to have computed its prompt."""
        parents: dict[PrefixGroup, Sequence] = {}
        for sequence in self.running.values():
            if sequence.group and (sequence.in_prompt or sequence.num_generated == 0):
                parents.setdefault(sequence.group, sequence)
        return parents

    def _prompts(self) -> list[Sequence]:
        """Sequences whose prompts this step may continue, the one that is due first first."""
        parents = self._parents()
        in_prompt = [sequence for sequence in self.running.values() if sequence.in_prompt]
        in_prompt.sort(key=lambda sequence: sequence.due)
        return [s for s in in_prompt if s.group is None or not self._waits(s, s.group, parents[s.group])]

    def _is_paced(self, prompts: list[Sequence], decoding: list[Sequence]) -> bool:
        """Whether prompts must leave those who decode their pace.

        With as many prompts as streams, prompts take the whole step. To streams of other clients, only the prompt of a
        client that has nothing else does that: a client with many prompts would slow them down for as long as it likes.
        """
        num_first = sum(self.waiting.held(sequence.client) == 1 for sequence in prompts)
        others = {sequence.client for sequence in decoding} - {sequence.client for sequence in prompts}
        return bool(prompts) and (len(prompts) < len(decoding) or num_first < len(others))

    def _in_turns(self, decoding: list[Sequence]) -> tuple[list[Sequence], int]:
        """Those of `decoding` that a step computes, and how many rows it may have with their drafts.

        A client that decodes more sequences than any other may slow the others down by MAX_CROWDING only. The rest of its
        sequences sit the step out: those that were computed last, so that they take turns.

        How long one waits: let its client hold n rows, and the next largest decode m sequences. Each step computes at least
        m of the client's sequences, of those that decode the ones that have waited longest. Whoever is computed or gets a
        row comes last. So at most n - 1 are ahead of a sequence, nobody joins them, and m leave in each step that leaves
        it out. That is at most (n - 1) / m steps in a row, and n < max_rows. No other client's sequence waits.
        Where two clients decode equally many there is no limit, and a third feels both.
        """
        counts = Counter(sequence.client for sequence in decoding).most_common(2)
        if len(counts) < 2 or counts[0][1] == counts[1][1]:
            return decoding, self.step_tokens
        (largest, _), (_, fair) = counts
        others = [sequence for sequence in decoding if sequence.client != largest]
        own = sorted((s for s in decoding if s.client == largest), key=lambda s: s.last_step)
        crowd = self._pace.crowd_limit(len(others) + fair)
        return others + own[: crowd - len(others)], crowd

    def _waits(self, sequence: Sequence, group: PrefixGroup, parent: Sequence) -> bool:
        """Whether the parent of its group is about to compute what the sequence would."""
        if parent is sequence or sequence.num_computed:
            return False
        if group.forks:
            return True
        common = sequence.usable_hashes[: group.num_common // PAGE_SIZE]
        return self.cache.prefix(common) < len(common)

    def _add_decode(self, scheduled: Scheduled, sequence: Sequence, room: int, streams: int) -> int:
        """Add the last token of a sequence, followed by a draft; or known tokens, if it was put back and lost their keys.

        Returns how many tokens that is beyond the first: at most `room`.
        """
        if not sequence.is_placed:
            self._start(scheduled, sequence)
        known = sequence.generated[sequence.num_computed - len(sequence.prompt) :]  # none if a step in flight samples it
        room = max(0, min(room, self._room_in_pages(sequence)))
        tokens: list[int | None] = [*known[: 1 + min(room, MAX_REPLAY)]] or [None]
        if sequence.lookup and len(known) == 1:
            tokens += sequence.lookup.draft(min(room, self.max_draft), streams)
        for i, token in enumerate(tokens, 1):
            scheduled.step.decodes.append(DecodeToken(sequence.row, sequence.num_computed, token))
            self._compute(scheduled, sequence, 1)
            if i >= len(known):
                self._add_sample(scheduled, sequence, scheduled.num_tokens - 1)
        return len(tokens) - 1

    def _room_in_pages(self, sequence: Sequence) -> int:
        """How many tokens after the next one may be computed: no further than max_tokens, and within reserved pages."""
        stop = min(self.cache.reserved_end(sequence.row), sequence.num_written)
        return int(stop) - sequence.num_computed - 1

    def _add_chunks(self, scheduled: Scheduled, prompts: list[Sequence], budget: int) -> None:
        """Add prompt tokens that count as `budget`. No more than one prompt may rest inside a page, see PageAllocator."""
        end = scheduled.num_tokens + budget

        def left() -> int:
            return int(end - scheduled.num_tokens - (self.explained_weight - 1) * scheduled.num_explained)

        begun = next((sequence for sequence in prompts if sequence.num_computed % PAGE_SIZE), None)
        if begun and begun is not prompts[0]:
            self._add_chunk(scheduled, begun, left(), most=-begun.num_computed % PAGE_SIZE)
            if begun.in_prompt and begun.num_computed % PAGE_SIZE:
                return
            prompts = [sequence for sequence in prompts if sequence is not begun]
        for sequence in prompts:
            if sequence.in_prompt and not self._add_chunk(scheduled, sequence, left()):
                break

    def _compute(self, scheduled: Scheduled, sequence: Sequence, num_tokens: int) -> None:
        scheduled.sequences.setdefault(sequence, sequence.num_computed)
        scheduled.num_tokens += num_tokens
        sequence.last_step = self._num_steps
        sequence.num_computed += num_tokens
        scheduled.step.pages.extend(self.cache.extend(sequence.row, sequence.num_computed))

    def _add_sample(self, scheduled: Scheduled, sequence: Sequence, index: int) -> None:
        scheduled.step.samples.append(Sample(sequence.row, index, sequence.top_logprobs, sequence.banned()))
        scheduled.sampling.append(sequence)

    def _add_chunk(self, scheduled: Scheduled, sequence: Sequence, budget: int, most: int = sys.maxsize) -> bool:
        """Add as much of a prompt as the budget allows, at most `most` tokens.

        Returns whether its end was added, so that the next may follow.
        """
        step, prompt = scheduled.step, sequence.prompt
        begins, start = sequence.num_computed == 0, sequence.num_computed
        cached: list[PageHash] = []
        if begins and (usable := sequence.usable_hashes):
            cached = usable[: self.cache.prefix(usable)]
            start = len(cached) * PAGE_SIZE
        end = min(start + min(budget, most), len(prompt))
        if sequence.prompt_logprobs_from is not None:
            explained = max(start, sequence.prompt_logprobs_from - 1)
            end = min(end, explained + int((start + budget - explained) / self.explained_weight))
        if end < len(prompt) and end // PAGE_SIZE * PAGE_SIZE > start:
            end = end // PAGE_SIZE * PAGE_SIZE  # the queries of a page are cheapest together
        if end <= start:
            return False
        if begins:
            num_looked_up = len(prompt) if sequence.prompt_logprobs_from is None and sequence.is_cached else 0
            self._start(scheduled, sequence, num_looked_up, start)
        if cached:
            step.pages.extend(self.cache.start_after(sequence.row, cached))
            sequence.num_computed = start
            self.waiting.refund(sequence.client, start)
        step.chunks.append(PromptChunk(sequence.row, start, prompt[start:end]))
        self._compute(scheduled, sequence, end - start)
        scheduled.filled.append((sequence, self.cache.fill(sequence.row, start, end, sequence.page_hashes)))
        if sequence.prompt_logprobs_from is not None:
            positions = range(max(sequence.prompt_logprobs_from, start + 1), min(end + 1, len(prompt)))
            self._add_prompt_logprobs(scheduled, sequence, positions)
        if end < len(prompt):
            return False
        self._end_prompt(scheduled, sequence)
        if sequence.may_fork:
            for fork in [s for s in self.running.values() if s.group is sequence.group and s.num_computed == 0]:
                self._fork(scheduled, fork, sequence)
        return True

    def _start(self, scheduled: Scheduled, sequence: Sequence, num_looked_up: int = 0, num_cached: int = 0) -> None:
        """Tell the runner of a sequence that has got a row, with the pages it may have kept. Report it if it is new."""
        start = RowStart(
            sequence.row, sequence.sampling, sequence.prompt, sequence.adapter.number, tuple(sequence.generated)
        )
        scheduled.step.starts.append(start)
        scheduled.step.pages.extend(self.cache.pages_of(sequence.row))
        sequence.is_placed = True
        if not sequence.has_begun:
            sequence.has_begun = True
            self.begun.append(Delta(sequence, [], None, start=Start(sequence.admitted, num_looked_up, num_cached)))

    def _add_prompt_logprobs(self, scheduled: Scheduled, sequence: Sequence, positions: range) -> None:
        """Ask for the logprobs of prompt tokens. The tokens before each of them are the last ones of the step so far."""
        if positions:
            first = scheduled.num_tokens - (sequence.num_computed - (positions.start - 1))
            targets = sequence.prompt[positions.start : positions.stop]
            num_top = max(sequence.top_logprobs or 0, sequence.prompt_top_logprobs)
            scheduled.step.prompt_logprobs.append(PromptLogprobs(first, targets, num_top))
            scheduled.explaining.append(sequence)

    def _fork(self, scheduled: Scheduled, sequence: Sequence, parent: Sequence) -> None:
        self._start(scheduled, sequence)
        pages, copies = self.cache.fork(sequence.row, parent.row, len(sequence.prompt))
        scheduled.step.pages.extend(pages)
        scheduled.step.copies.extend(copies)
        sequence.num_computed = len(sequence.prompt)
        scheduled.sequences[sequence] = sequence.num_computed
        scheduled.parents[sequence] = parent
        self.waiting.refund(sequence.client, len(sequence.prompt))
        self._end_prompt(scheduled, sequence)

    def _end_prompt(self, scheduled: Scheduled, sequence: Sequence) -> None:
        """The step's last token so far is the last of the sequence's prompt, and the token after it may be known already."""
        if sequence.generated:
            return
        if sequence.max_tokens:
            self._add_sample(scheduled, sequence, scheduled.num_tokens - 1)
        else:
            scheduled.unsampled.append(sequence)

    @property
    def oldest_step(self) -> StepInput | None:
        """The oldest step in flight."""
        return self._in_flight[0].step if self._in_flight else None

    def oldest_requests(self) -> list[list[Sequence]]:
        """The sequences that the oldest step in flight computes, by request, those included that have ended meanwhile."""
        requests: dict[int, list[Sequence]] = {}
        for sequence in self._in_flight[0].sequences:
            requests.setdefault(id(sequence.siblings), []).append(sequence)
        return list(requests.values())

    def can_repeat(self, sequence: Sequence) -> bool:
        """Whether the oldest step in flight can compute a running sequence of it again: all that it reads is still there.

        Pages may be gone if memory was short, and the sequence that one forks from if it was aborted.
        """
        scheduled = self._in_flight[0]
        has_source = self.is_running(scheduled.parents.get(sequence, sequence))
        return has_source and self.cache.holds(sequence.row, scheduled.sequences[sequence])

    def commit(self, sampled: Sampled, seconds: float | None, failed: abc.Iterable[Sequence] = ()) -> list[Delta]:
        """Take in the results of the oldest step in flight; returns what each sequence gained.

        The step ran for `seconds`, or None if that tells nothing. It could not compute `failed`, which end with an error.
        Tokens of sequences that ended after the step was scheduled are dropped.
        """
        errors = [self._fail(sequence, "error") for sequence in failed]
        scheduled = self._in_flight.popleft()
        step = scheduled.step
        tokens = sum(len(chunk.tokens) for chunk in step.chunks)
        keys = sum(len(chunk.tokens) * (chunk.start + len(chunk.tokens) // 2) for chunk in step.chunks)
        if seconds is not None:
            self._pace.observe(Load(len(step.decodes), tokens, keys, scheduled.num_explained), seconds)
        for sequence, filled in scheduled.filled:
            if self.is_running(sequence):
                self.cache.publish(filled)
            else:
                self.cache.discard(filled)
        past_prompt = {*scheduled.unsampled, *scheduled.sampling}
        gains = {sequence: Delta(sequence, [], None) for sequence in scheduled.sequences}
        gains |= self._verified(scheduled, sampled)
        for sequence, logprobs in zip(scheduled.explaining, sampled.prompt_logprobs, strict=True):
            gains[sequence] = gains[sequence]._replace(prompt_logprobs=logprobs)
            sequence.prompt_logprobs_from = (sequence.prompt_logprobs_from or 0) + len(logprobs)
        deltas = errors
        for sequence, delta in gains.items():
            if not self.is_running(sequence):
                continue
            if not all(math.isfinite(each.logprob) for each in delta.prompt_logprobs):
                deltas.append(self._fail(sequence, "not_finite"))
            elif sequence in past_prompt:
                deltas += self._advance(delta)
            elif delta.prompt_logprobs:
                deltas.append(delta)
        return deltas

    def _verified(self, scheduled: Scheduled, sampled: Sampled) -> dict[Sequence, Delta]:
        """The samples that follow a sequence's own tokens. Tokens from a wrong guess on count as not computed."""
        found: dict[Sequence, Delta] = {}
        num_drafted = num_accepted = 0
        right = True
        for i, (sequence, token, logprobs) in enumerate(
            zip(scheduled.sampling, sampled.tokens, sampled.logprobs, strict=True)
        ):
            before = Delta(sequence, [], None)
            if i > 0 and sequence is scheduled.sampling[i - 1]:  # a draft
                before = found[sequence]
                drafted = scheduled.step.decodes[scheduled.step.samples[i].token].token
                right = right and drafted == sampled.tokens[i - 1]
                num_drafted += 1
                num_accepted += right
            else:
                right = True
            if right:
                more = () if logprobs is None else (logprobs,)
                found[sequence] = before._replace(tokens=[*before.tokens, token], logprobs=(*before.logprobs, *more))
            else:
                sequence.num_computed -= 1
        self.drafts = Drafts(num_drafted, num_accepted)
        return found

    def check_integrity(self) -> list[str]:
        """What is wrong with the page accounts, in words, whatever is in flight; empty when they balance."""
        self._release_passed()  # or a prompt chunk would seem to hold more pages than were reserved
        return self.cache.check_integrity()

    def _advance(self, delta: Delta) -> list[Delta]:
        """Book what a sequence gained, and end the sequence if that was its last token or the next can't be sampled."""
        sequence = delta.sequence
        end = next((i for i, token in enumerate(delta.tokens, 1) if token in sequence.stop_ids), None)
        fault = FAULTS.get(delta.tokens[-1]) if delta.tokens and end is None else None
        tokens = delta.tokens[: -1 if fault else end]
        sequence.generated += tokens
        finish: FinishReason | None = None
        if end is not None:
            finish = "stop"
        elif sequence.num_generated == sequence.max_tokens:
            finish = "length"
        if finish:
            self._retire(sequence)
        elif self.max_draft and not (sequence.sampling.adjusted or sequence.bad_words):  # they depend on what was sampled
            sequence.lookup = sequence.lookup or PromptLookup(sequence.prompt)
            for token in tokens:
                sequence.lookup.append(token)
        gained = delta._replace(tokens=tokens, logprobs=delta.logprobs[: len(tokens)], finish_reason=finish)
        deltas = [gained] if tokens or finish else []
        return [*deltas, self._fail(sequence, fault)] if fault else deltas

    def _fail(self, sequence: Sequence, fault: FinishReason) -> Delta:
        """End a sequence. Pages of its prompt may hold NaN, so nobody may find them: its own, and those it found cached."""
        if fault == "not_finite":
            self.cache.unpublish(sequence.page_hashes)
        self._retire(sequence)
        return Delta(sequence, [], fault)

    def _retire(self, sequence: Sequence) -> None:
        self.waiting.refund(sequence.client, sequence.num_prompt_left)
        del self.running[sequence.row]
        self.cache.free(sequence.row)
        self._free_rows.append(sequence.row)
        self.waiting.leave(sequence)
