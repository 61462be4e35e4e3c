"""The scheduler against a slow oracle that remembers the content of every page, key by key."""

import itertools
import random
from collections import deque
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.band import PAGE_SIZE, first_key
from model.config import GPTConfig, KVGroup
from model.step import DecodeToken, Sampled, Sampling, StepInput, TokenLogprobs
from service.engine.pace import Load
from service.engine.pages import PageAllocator, chunk_slack, resting_pages
from service.engine.retry import Retry
from service.engine.scheduler import Delta, PrefixGroup, Scheduler, Sequence, Start

EOS = 7
STOP = frozenset({EOS})


def config(band: int | None, n_positions: int = 512) -> GPTConfig:
    return GPTConfig(
        vocab_size=100,
        n_positions=n_positions,
        n_embd=8,
        n_layer=2,
        n_head=1,
        n_inner=8,
        attention=("dense",) if band is None else ("dense", "banded"),
        band=band,
    )


class RecordingScheduler(Scheduler):
    """Remembers how each sequence began."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.starts: dict[Sequence, Start] = {}

    def schedule(self, now: float) -> StepInput | None:
        step = super().schedule(now)
        if step is not None:
            self.starts |= {delta.sequence: delta.start for delta in self.begun if delta.start}
        return step

    def num_cached(self, *sequences: Sequence) -> list[int]:
        return [self.starts[sequence].num_cached for sequence in sequences]


def make(
    band: int | None = 100,
    *,
    max_rows: int = 4,
    step_tokens: int = 128,
    dense_sequences: int = 3,
    banded_sequences: int = 3,
    n_positions: int = 512,
    max_draft: int = 0,
) -> RecordingScheduler:
    """A scheduler with pools for the given numbers of full-context sequences: either pool can be the one that runs out."""
    shape = config(band, n_positions)
    sizes = {"dense": dense_sequences * resting_pages(n_positions, None)}
    if band is not None:
        sizes["banded"] = banded_sequences * resting_pages(n_positions, band) + chunk_slack(band, step_tokens)
    cache = PageAllocator(shape, cast(dict[KVGroup, int], sizes), step_tokens=step_tokens)
    return RecordingScheduler(cache, max_rows=max_rows, step_tokens=step_tokens, max_draft=max_draft)


def sequence(num_prompt: int, max_tokens: int, *, deadline: float = float("inf")) -> Sequence:
    """A sequence whose prompt begins like no other."""
    return Sequence([next(fresh_tokens), *range(1, num_prompt)], max_tokens, Sampling(), STOP, deadline=deadline)


fresh_tokens = itertools.count(100)


class Row(NamedTuple):
    """What a sequence will gain from a step, noted when the step is scheduled."""

    sequence: Sequence
    past_prompt: bool
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    scores: list[TokenLogprobs]


class Device:
    """Runs every step when it is scheduled, that is, in stream order. Remembers for each key what it was computed from."""

    def __init__(self, scheduler: Scheduler, rng: random.Random):
        self.scheduler = scheduler
        self.rng = rng
        self.table: dict[tuple[KVGroup, int, int], int] = {}
        self.content: dict[tuple[KVGroup, int, int], object] = {}
        self.num_computed: dict[Sequence, int] = {}
        self.num_sampled: dict[Sequence, int] = {}
        self.num_scored: dict[Sequence, int] = {}
        self.texts: dict[Sequence, list[int]] = {}

    def run(self, step: StepInput) -> tuple[list[Row], Sampled]:
        """Write the step's keys. Check that the page table leads each query to the right keys. Sample at random."""
        running = self.scheduler.running
        for pages in step.pages:
            for i, page_id in enumerate(pages.page_ids):
                self.table[pages.group, pages.row, pages.first + i] = page_id
        starting = {start.row for start in step.starts}
        for start in step.starts:
            assert list(start.generated) == self.texts.get(running[start.row], []), "penalties count what was generated"
        for token in step.decodes:
            assert token.position >= len(running[token.row].prompt), "a prompt's keys have other bits when decoded"
        for chunk in step.chunks:
            assert chunk.start + len(chunk.tokens) <= len(running[chunk.row].prompt), (
                "a text's keys have other bits in a chunk"
            )
        for chunk in step.chunks:
            if chunk.row in starting:
                self.num_computed[running[chunk.row]] = chunk.start  # the cached part is skipped
        tokens = list(zip(step.token_rows, step.token_positions, strict=True))
        right = self.verify(step)
        for (row, position), is_right in zip(tokens, right, strict=True):
            if is_right:
                assert position == self.num_computed[running[row]], "not the next position"
                self.num_computed[running[row]] = position + 1
        for group, pool in self.scheduler.cache.pools.items():
            for (row, position), is_right in zip(tokens, right, strict=True):
                self.content[self.place(group, row, position)] = key_of(running[row], position) if is_right else "wrong"
            for row, position in itertools.compress(tokens, right):
                for key in range(first_key(position, pool.band), position + 1):
                    found = self.content[self.place(group, row, key)]
                    assert found == key_of(running[row], key), f"{group} key {key} is not there"
        for group, source, target in step.copies:
            for offset in range(PAGE_SIZE):
                self.content[group, target, offset] = self.content.get((group, source, offset))
        rows = {row: Row(running[row], False, [], [], []) for row, _ in tokens}
        for row in starting - set(rows):  # forks
            sequence = running[row]
            rows[row] = Row(sequence, False, [], [], [])
            self.num_computed[sequence] = len(sequence.prompt)
        sampled = Sampled([], [], [])
        for sample in step.samples:
            sequence = running[sample.row]
            row, position = tokens[sample.token]
            count = position + 2 - len(sequence.prompt)
            assert sample.banned == (tuple(sequence.stop_ids) if count <= sequence.min_tokens else ())
            assert row == sample.row or (running[row].prompt == sequence.prompt and sample.row in starting)
            text = self.texts.setdefault(sequence, [])
            if not right[sample.token]:
                sampled.tokens.append(self.rng.randrange(1, 4))
                sampled.logprobs.append(None if sample.top_logprobs is None else TokenLogprobs(0.0, []))
                continue
            if len(text) < count:
                text.append(self.draw(sequence))
            assert count <= min(len(text), sequence.max_tokens)
            sampled.tokens.append(text[count - 1])
            sampled.logprobs.append(None if sample.top_logprobs is None else TokenLogprobs(count, []))
            rows[sample.row].tokens.append(text[count - 1])
            rows[sample.row].logprobs.extend(filter(None, sampled.logprobs[-1:]))
        for score in step.prompt_logprobs:
            row, _ = tokens[score.first]
            sequence = running[row]
            scored = self.num_scored.get(sequence, sequence.prompt_logprobs_from or 0)
            for i, target in enumerate(score.targets):
                assert tokens[score.first + i] == (row, scored + i - 1)
                assert sequence.prompt[scored + i] == target
            self.num_scored[sequence] = scored + len(score.targets)
            sampled.prompt_logprobs.append([TokenLogprobs(scored + i, []) for i in range(len(score.targets))])
            rows[row].scores.extend(sampled.prompt_logprobs[-1])
        gains = [
            gain._replace(past_prompt=not gain.sequence.in_prompt and (gain.tokens != [] or gain.sequence.max_tokens == 0))
            for gain in rows.values()
        ]
        for sequence, past_prompt, *_ in gains:
            if past_prompt and sequence.prompt_logprobs_from is not None:
                assert self.num_scored.get(sequence, sequence.prompt_logprobs_from) == len(sequence.prompt)
        return gains, sampled

    def verify(self, step: StepInput) -> list[bool]:
        """For each token of a step, whether it is the sequence's own. Draws the tokens that drafts are compared with."""
        right: list[bool] = []
        for i, row in enumerate(step.decodes):
            sequence = self.scheduler.running[row.row]
            is_draft = i > 0 and step.decodes[i - 1].row == row.row
            place = row.position - len(sequence.prompt)
            if is_draft and right[-1] and place == len(self.texts[sequence]):
                self.texts[sequence].append(self.draw(sequence))
            token = self.texts[sequence][place] if not is_draft or right[-1] else None
            right.append(token is not None and row.token in (None, token))
            assert right[-1] or is_draft
        return right + [True] * (step.num_tokens - len(right))

    def draw(self, sequence: Sequence) -> int:
        """The next token of a text that copies itself most of the time."""
        text = self.texts[sequence]
        if len(text) >= sequence.min_tokens and self.rng.random() < 0.02:
            return EOS
        if len(text) > 3 and self.rng.random() < 0.9:
            return text[-3] if text[-3] != EOS else 1
        return self.rng.randrange(1, 4)

    def place(self, group: KVGroup, row: int, position: int) -> tuple[KVGroup, int, int]:
        return group, self.table[group, row, position // PAGE_SIZE], position % PAGE_SIZE


def key_of(sequence: Sequence, position: int) -> object:
    """What the key at a position depends on: all tokens up to it."""
    if position < len(sequence.prompt):
        return tuple(sequence.prompt[max(0, position - 3) : position + 1]), position, sequence.prompt[0]
    return sequence, position


class Request(NamedTuple):
    base: int  # prompts of the same base begin alike
    num_common: int
    num_own: int
    max_tokens: int
    min_tokens: int
    num_choices: int
    scored: bool
    differ: bool  # the choices differ in their last tokens, like continuations to score
    client: str
    is_cached: bool


requests = st.lists(
    st.builds(
        Request,
        base=st.integers(0, 2),
        num_common=st.integers(1, 320),
        num_own=st.integers(0, 80),
        max_tokens=st.integers(0, 100),
        min_tokens=st.sampled_from([0, 0, 3]),
        num_choices=st.sampled_from([1, 1, 2, 5]),
        scored=st.booleans(),
        differ=st.booleans(),
        client=st.sampled_from("abc"),
        is_cached=st.sampled_from([True, True, False]),
    ),
    min_size=1,
    max_size=8,
)


def sequences_of(request: Request) -> list[Sequence]:
    common = [request.base * 1000 + i for i in range(request.num_common)]
    own = [[next(fresh_tokens) for _ in range(request.num_own)] for _ in range(request.num_choices)]
    if not request.differ:
        own = own[:1] * request.num_choices
    num_common = request.num_common + (0 if request.differ else request.num_own)
    group = PrefixGroup(num_common, not request.differ) if request.num_choices > 1 else None
    made = [
        Sequence(
            common + own[i],
            request.max_tokens,
            Sampling(choice=i),
            STOP,
            min_tokens=request.min_tokens,
            top_logprobs=2 if request.scored else None,
            group=group,
            client=request.client,
            is_cached=request.is_cached,
        )
        for i in range(request.num_choices)
    ]
    for i, sequence in enumerate(made):
        if request.scored and (i == 0 or request.differ):
            sequence.prompt_logprobs_from = request.num_common if request.differ else 1
    return made


@given(
    requests=requests,
    band=st.none() | st.integers(1, 300),
    max_rows=st.integers(1, 5),
    step_tokens=st.integers(21, 400),
    sequences=st.tuples(st.integers(1, 9), st.integers(1, 3)),
    chunk_limit=st.none() | st.integers(16, 400),
    crowd=st.none() | st.integers(0, 3),
    explained_weight=st.just(1.0) | st.floats(1, 16),
    steps_ahead=st.integers(0, 1),
    max_draft=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_every_sequence_is_computed_once_in_order_and_finishes(
    requests: list[Request],
    band: int | None,
    max_rows: int,
    step_tokens: int,
    sequences: tuple[int, int],
    chunk_limit: int | None,
    crowd: int | None,
    explained_weight: float,
    steps_ahead: int,
    max_draft: int,
    seed: int,
) -> None:
    rng = random.Random(seed)
    scheduler = make(
        band,
        max_draft=0 if steps_ahead else max_draft,
        max_rows=max_rows,
        step_tokens=step_tokens,
        dense_sequences=sequences[0],
        banded_sequences=sequences[1],
    )
    if chunk_limit is not None:
        # The page accounts must balance whatever the pace allows.
        scheduler._pace.chunk_limit = lambda *_, **__: chunk_limit  # type: ignore[method-assign]
    if crowd is not None:
        scheduler._pace.crowd_limit = lambda num_rows: num_rows + crowd  # type: ignore[method-assign]
    scheduler.explained_weight = explained_weight
    device = Device(scheduler, rng)
    in_flight: deque[tuple[StepInput, list[Row], Sampled]] = deque()
    todo = [sequences_of(request) for request in requests]
    submitted = [sequence for group in todo for sequence in group]
    began: list[Sequence] = []
    ended: dict[Sequence, str] = {}
    generated = dict.fromkeys(submitted, 0)

    def abort_one() -> None:
        if rng.random() < 0.05 and (scheduler.running or scheduler.waiting):
            victim = rng.choice([*scheduler.running.values(), *scheduler.waiting])
            scheduler.abort(victim)
            scheduler.abort(victim)
            ended[victim] = "abort"

    def expected(row: Row) -> Delta:
        sequence, past_prompt, tokens, logprobs, scores = row
        if EOS in tokens:
            tokens = tokens[: tokens.index(EOS) + 1]
            logprobs = logprobs[: len(tokens)]
        generated[sequence] += len(tokens)
        length = past_prompt and generated[sequence] == sequence.max_tokens
        reason = "stop" if EOS in tokens else "length" if length else None
        return Delta(sequence, tokens, reason, tuple(logprobs), scores or ())  # type: ignore[arg-type]

    while todo or not scheduler.idle:
        while todo and rng.random() < 0.3:
            scheduler.submit(todo.pop(0))
        abort_one()
        step = scheduler.schedule(0.0)
        if step is None:
            assert in_flight or not scheduler.running
        else:
            num_explained = sum(len(wanted.targets) for wanted in step.prompt_logprobs)
            resting = [each for each in scheduler.running.values() if each.in_prompt and each.num_computed % PAGE_SIZE]
            assert len(resting) <= 1
            assert step.num_tokens + (explained_weight - 1) * num_explained <= step_tokens + 1e-6
            assert {start.row for start in step.starts} >= {chunk.row for chunk in step.chunks if chunk.start == 0}
            began += [delta.sequence for delta in scheduler.begun]
            in_flight.append((step, *device.run(step)))
        abort_one()
        # Now and then all results are read, as after a launch that failed.
        keep = steps_ahead if step is not None and rng.random() < 0.9 else 0
        while len(in_flight) > keep:
            step, rows, sampled = in_flight.popleft()
            rows = [row for row in rows if row.sequence not in ended]
            if rng.random() < 0.02:
                deltas = fail_step(scheduler)
                assert by_sequence(deltas) == {row.sequence: Delta(row.sequence, [], "error") for row in rows}
                failed = {row.sequence.group for row in rows if row.sequence.group}
                for other in [*scheduler.running.values(), *scheduler.waiting]:
                    if other.group in failed:  # a request ends with the first of its choices that fails
                        scheduler.abort(other)
                        ended[other] = "abort"
            else:
                wanted = [expected(row) for row in rows if row.past_prompt or row.scores]
                deltas = scheduler.commit(sampled, step.num_tokens * 1e-3)
                assert by_sequence(deltas) == by_sequence(wanted)
            ended |= {delta.sequence: delta.finish_reason for delta in deltas if delta.finish_reason}
            if rng.random() < 0.5:  # not always: the check releases passed pages, but `schedule` must do so itself
                assert scheduler.check_integrity() == []
    assert set(ended) == set(submitted)
    assert len(set(began)) == len(began), "billed twice"
    for client in "abc":
        own = [s for s in submitted if s.client == client and s.group is None]
        assert [s for s in began if s in own] == [s for s in own if s in set(began)], "a sequence overtook another"
    assert all(generated[s] == s.num_generated for s in submitted)
    assert scheduler.check_integrity() == []
    assert all(usage.held == 0 for usage in scheduler.cache.usage().values())


def by_sequence(deltas: list[Delta]) -> dict[Sequence, Delta]:
    return {delta.sequence: delta for delta in deltas}


def drive(scheduler: Scheduler, token: int = 1, seconds: float = 0.01) -> list[Delta]:
    step = scheduler.schedule(0.0)
    assert step is not None
    return scheduler.commit(answer(step, token), seconds)


def answer(step: StepInput, token: int = 1) -> Sampled:
    return Sampled([token] * len(step.samples), [None] * len(step.samples), [[] for _ in step.prompt_logprobs])


def test_a_2000_token_prompt_holds_the_band_at_rest_and_one_chunk_more_while_it_runs() -> None:
    scheduler = make(256, step_tokens=512, n_positions=2048)
    scheduler.submit([sequence(2000, 48)])
    peak = 0
    while not scheduler.idle:
        step = scheduler.schedule(0.0)
        assert step is not None
        held = len(scheduler.cache.pools["banded"].held[0].page_ids)
        peak = max(peak, held)
        assert step.chunks or held <= 5
        scheduler.commit(answer(step), 0.01)
    assert peak <= 5 + 512 // PAGE_SIZE


def test_chunks_take_pages_from_the_slack() -> None:
    scheduler = make(64, step_tokens=128, dense_sequences=9)  # banded: 3 sequences of 2 pages, and 2 pages of slack
    scheduler._pace.chunk_limit = lambda *_, **__: 128  # type: ignore[method-assign]
    scheduler.submit([sequence(100, 300), sequence(100, 300)])
    for _ in range(10):
        drive(scheduler)
    scheduler.submit([sequence(400, 5)])
    most = 0
    for _ in range(10):
        step = scheduler.schedule(0.0)
        assert step is not None
        most = max(most, scheduler.cache.usage()["banded"].held)
        scheduler.commit(answer(step), 0.01)
    pool = scheduler.cache.pools["banded"]
    assert pool.capacity == 6 < most <= pool.num_pages == 8


def test_decodes_go_first_and_a_prompt_beside_more_of_them_gets_what_the_pace_allows() -> None:
    scheduler = make(None, step_tokens=256)
    scheduler.submit([sequence(10, 50), sequence(10, 50)])
    drive(scheduler)
    scheduler.submit([sequence(400, 5)])
    asked: list[tuple[int, int]] = []

    def limit(num_rows: int, start: int) -> int:
        asked.append((num_rows, start))
        return 40

    scheduler._pace.chunk_limit = limit  # type: ignore[method-assign]
    for start in (0, 40):
        step = scheduler.schedule(0.0)
        assert step is not None
        assert len(step.decodes) == 2
        assert [(chunk.start, len(chunk.tokens)) for chunk in step.chunks] == [(start, 40 if start == 0 else 24)]
        scheduler.commit(answer(step), 0.01)
    assert asked == [(2, 0), (2, 40)]


def test_as_many_prompts_as_streams_take_the_whole_step() -> None:
    scheduler = make(None, step_tokens=256)
    scheduler.submit([sequence(10, 50)])
    drive(scheduler)
    scheduler.submit([sequence(500, 5)])
    step = scheduler.schedule(0.0)
    assert step is not None
    assert len(step.decodes) == 1
    assert [len(chunk.tokens) for chunk in step.chunks] == [192], "a chunk is made of whole pages"


# Drafts


def looping(max_tokens: int = 40, max_rows: int = 4, **fields: Any) -> Scheduler:
    """A scheduler that has seen one sequence sample 2, 3, 2, 3, 2, 3, 2."""
    scheduler = make(64, max_draft=3, max_rows=max_rows, dense_sequences=max_rows, banded_sequences=max_rows)
    loop = Sequence([9], max_tokens, **{"sampling": Sampling()} | fields)
    scheduler.submit([loop])
    while loop.num_generated < 7:
        step = scheduler.schedule(0.0)
        assert step is not None
        scheduler.commit(answers(step, [2 + step.token_positions[row.token] % 2 for row in step.samples]), 0.01)
    assert loop.num_generated == 7
    return scheduler


def test_a_loop_is_drafted_and_what_comes_true_is_kept() -> None:
    scheduler = looping()
    step = scheduler.schedule(0.0)
    assert step is not None
    assert step.decodes == [DecodeToken(0, 7, 2), DecodeToken(0, 8, 3), DecodeToken(0, 9, 2), DecodeToken(0, 10, 3)]
    (delta,) = scheduler.commit(answers(step, [3, 2, 3, 5]), 0.01)
    assert delta.tokens == [3, 2, 3, 5]
    assert scheduler.drafts == (3, 3)
    step = scheduler.schedule(0.0)
    assert step is not None
    assert step.decodes == [DecodeToken(0, 11, 5)], "5 ended the loop: nothing is drafted"


def test_a_draft_is_the_shorter_the_more_streams_pay_for_it() -> None:
    scheduler = looping(max_rows=90)
    scheduler.submit([sequence(1, 9) for _ in range(89)])
    for num_rows in (4, 3):
        step = scheduler.schedule(0.0)
        assert step is not None
        assert sum(row.row == 0 for row in step.decodes) == num_rows
        others = [6 if row.row else 2 + step.token_positions[row.token] % 2 for row in step.samples]
        scheduler.commit(answers(step, others), 0.01)


@pytest.mark.parametrize(("row_limit", "num_decodes"), [(0, 2), (2, 2), (3, 3), (99, 5)])
def test_drafts_leave_room_for_a_prompt(row_limit: int, num_decodes: int) -> None:
    scheduler = looping(max_rows=3)
    scheduler.submit([sequence(1, 9)])
    step = scheduler.schedule(0.0)
    assert step is not None
    others = [6 if row.row else 2 + step.token_positions[row.token] % 2 for row in step.samples]
    scheduler.commit(answers(step, others), 0.01)
    scheduler.submit([sequence(100, 9)])
    scheduler._pace.row_limit = lambda start: row_limit  # type: ignore[method-assign]
    step = scheduler.schedule(0.0)
    assert step is not None
    assert len(step.decodes) == num_decodes
    assert [chunk.row for chunk in step.chunks] == [2]


def test_nothing_behind_a_wrong_guess_is_kept() -> None:
    scheduler = looping()
    step = scheduler.schedule(0.0)
    assert step is not None
    (delta,) = scheduler.commit(answers(step, [4, 3, 2, 5]), 0.01)
    assert delta.tokens == [4]
    assert scheduler.drafts == (3, 0)
    step = scheduler.schedule(0.0)
    assert step is not None
    assert step.decodes == [DecodeToken(0, 8, 4)]
    assert scheduler.check_integrity() == []


def test_a_stop_token_in_a_draft_ends_the_sequence_there() -> None:
    scheduler = looping(stop_ids=STOP, top_logprobs=1)
    step = scheduler.schedule(0.0)
    assert step is not None
    found: list[TokenLogprobs | None] = [TokenLogprobs(-i, []) for i in range(4)]
    (delta,) = scheduler.commit(Sampled([3, EOS, 3, 5], found, []), 0.01)
    assert (delta.tokens, delta.finish_reason, delta.logprobs) == ([3, EOS], "stop", tuple(found[:2]))
    assert scheduler.idle


def test_no_draft_goes_beyond_max_tokens() -> None:
    scheduler = looping(max_tokens=9)
    step = scheduler.schedule(0.0)
    assert step is not None
    assert step.decodes == [DecodeToken(0, 7, 2), DecodeToken(0, 8, 3)]
    (delta,) = scheduler.commit(answers(step, [3, 2]), 0.01)
    assert (delta.tokens, delta.finish_reason) == ([3, 2], "length")


def test_penalties_look_at_what_was_sampled_and_so_forbid_drafts() -> None:
    scheduler = looping(sampling=Sampling(presence_penalty=0.5))
    step = scheduler.schedule(0.0)
    assert step is not None
    assert step.decodes == [DecodeToken(0, 7, 2)]


def answers(step: StepInput, tokens: list[int]) -> Sampled:
    return answer(step)._replace(tokens=tokens)


def test_max_tokens_0_computes_the_prompt_and_ends() -> None:
    scheduler = make()
    scheduler.submit([sequence(10, 0)])
    assert [(delta.tokens, delta.finish_reason) for delta in drive(scheduler)] == [([], "length")]
    assert scheduler.idle


def test_expire_ends_only_the_waiting_and_late() -> None:
    scheduler = make(max_rows=1)
    first, late, patient = sequence(5, 5, deadline=1.0), sequence(5, 5, deadline=2.0), sequence(5, 5)
    for each in (first, late, patient):
        scheduler.submit([each])
    drive(scheduler)
    assert scheduler.expire(2.0) == [], "at its deadline a sequence may still begin"
    assert scheduler.expire(3.0) == [Delta(late, [], "timeout")]
    assert list(scheduler.waiting) == [patient]


def test_a_failed_step_ends_its_own_sequences_only() -> None:
    scheduler = make(None, max_rows=3, step_tokens=64)
    scheduler.submit([sequence(64, 5), sequence(30, 5)])
    step = scheduler.schedule(0.0)
    assert step is not None
    assert [chunk.row for chunk in step.chunks] == [0]
    assert [delta.finish_reason for delta in fail_step(scheduler)] == ["error"]
    assert scheduler.check_integrity() == []
    step = scheduler.schedule(0.0)
    assert step is not None
    assert [start.row for start in step.starts] == [1], "a sequence admitted in the failed step must still start"


def fail_step(scheduler: Scheduler) -> list[Delta]:
    """The oldest step in flight raises, whatever is tried."""
    step = scheduler.oldest_step
    assert step is not None
    failed = [each for request in scheduler.oldest_requests() for each in request if scheduler.is_running(each)]
    return scheduler.commit(Retry(step).sampled, None, failed)


def sampled(tokens: list[int]) -> Sampled:
    return Sampled(tokens, [None] * len(tokens), [])


def launch(scheduler: Scheduler) -> StepInput:
    step = scheduler.schedule(0.0)
    assert step is not None
    return step


def test_the_token_after_the_end_is_dropped_though_its_slot_has_a_new_sequence() -> None:
    scheduler = make(max_rows=1)
    first, second = sequence(5, 9), sequence(5, 9)
    scheduler.submit([first, second])
    launch(scheduler)
    assert launch(scheduler).decodes == [DecodeToken(0, 5)], "launched before the token of the first step is known"
    assert scheduler.commit(sampled([EOS]), 0.01) == [Delta(first, [EOS], "stop")]
    assert [start.row for start in launch(scheduler).starts] == [0]
    assert scheduler.commit(sampled([3]), 0.01) == []
    assert first.num_generated == 1
    assert scheduler.commit(sampled([4]), 0.01) == [Delta(second, [4], None)]


def test_nothing_is_scheduled_past_max_tokens_and_a_step_in_flight_is_work() -> None:
    scheduler = make()
    scheduler.submit([sequence(5, 2)])
    launch(scheduler)
    launch(scheduler)
    assert scheduler.schedule(0.0) is None
    assert [delta.finish_reason for delta in scheduler.commit(sampled([1]), 0.01)] == [None]
    assert scheduler.schedule(0.0) is None
    assert [delta.finish_reason for delta in scheduler.commit(sampled([1]), 0.01)] == ["length"]
    assert scheduler.idle


def test_max_tokens_0_ends_with_the_last_chunk_not_with_one_before_it() -> None:
    scheduler = make(step_tokens=64)
    scheduler.submit([sequence(100, 0)])
    launch(scheduler)
    launch(scheduler)
    assert scheduler.commit(sampled([]), 0.01) == []
    assert [delta.finish_reason for delta in scheduler.commit(sampled([]), 0.01)] == ["length"]
    assert scheduler.idle


def test_abort_gives_pages_and_slot_back_at_once_and_drops_what_is_in_flight() -> None:
    scheduler = make(max_rows=1)
    aborted, other = sequence(5, 9), sequence(5, 1)
    scheduler.submit([aborted])
    launch(scheduler)
    scheduler.abort(aborted)
    assert all(usage.held == 0 for usage in scheduler.cache.usage().values())
    assert not scheduler.idle, "a step is in flight"
    scheduler.submit([other])
    launch(scheduler)
    assert scheduler.commit(sampled([1]), 0.01) == []
    assert scheduler.commit(sampled([1]), 0.01) == [Delta(other, [1], "length")]
    assert scheduler.idle


def test_a_failed_step_leaves_those_that_joined_the_next_one_alone() -> None:
    scheduler = make(100, step_tokens=256)
    failing, joined = sequence(256, 9), sequence(200, 1)
    scheduler.submit([failing, joined])
    launch(scheduler)
    scheduler._pace.chunk_limit = lambda *_, **__: 256  # type: ignore[method-assign]
    assert [row.row for row in launch(scheduler).decodes] == [0]
    assert fail_step(scheduler) == [Delta(failing, [], "error")]
    assert scheduler.check_integrity() == [], "a chunk in flight may hold more pages than its sequence reserved"
    assert scheduler.commit(sampled([1, 2]), 0.01) == [Delta(joined, [2], "length")]
    assert scheduler.idle
    scheduler.submit([sequence(5, 9)])
    launch(scheduler)
    launch(scheduler)
    assert len(fail_step(scheduler)) == 1
    assert fail_step(scheduler) == [], "the sequence ended with the previous step"


def alike(prompt: list[int], max_tokens: int = 5) -> Sequence:
    return Sequence(list(prompt), max_tokens, Sampling(), STOP)


def finish(scheduler: Scheduler) -> list[StepInput]:
    steps = []
    while step := scheduler.schedule(0.0):
        steps.append(step)
        scheduler.commit(answer(step), 0.01)
    assert scheduler.idle
    assert scheduler.check_integrity() == []
    return steps


def prompt_tokens(steps: list[StepInput]) -> int:
    return sum(len(chunk.tokens) for step in steps for chunk in step.chunks)


def test_600_shared_tokens_are_found_though_the_first_ran_past_them_by_more_than_the_band() -> None:
    scheduler = make(256, step_tokens=512, n_positions=2048)
    shared = list(range(600))
    first, second = alike([*shared, *range(5000, 5400)], 500), alike([*shared, *range(6000, 6100)])
    scheduler.submit([first])
    assert prompt_tokens(finish(scheduler)) == 1000
    scheduler.submit([second])
    steps = finish(scheduler)
    assert scheduler.num_cached(second) == [576], "9 full pages"
    assert prompt_tokens(steps) == 700 - 576
    assert scheduler.starts[second].num_looked_up == 700
    assert scheduler.num_cached(first) == [0]
    given = {(new.group, new.first, len(new.page_ids)) for new in steps[0].pages[:2]}
    assert given == {("dense", 0, 9), ("banded", 5, 4)}, "only the banded pages that position 576 sees"


def test_at_least_one_token_is_computed_and_all_behind_the_first_scored_one() -> None:
    scheduler = make(None)
    prompt = list(range(128))
    scheduler.submit([alike(prompt)])
    finish(scheduler)
    same, scored = alike(prompt), alike(prompt)
    scored.prompt_logprobs_from = 66
    whole = alike(prompt)
    whole.prompt_logprobs_from = 1
    for each in (same, scored, whole):
        scheduler.submit([each])
        finish(scheduler)
    assert scheduler.num_cached(same, scored, whole) == [64, 64, 0]


def test_choices_of_one_prompt_compute_it_once_and_fork_behind_it() -> None:
    scheduler = make(100, max_rows=4, step_tokens=128, dense_sequences=4, banded_sequences=4)
    group, prompt = PrefixGroup(200, True), list(range(200))
    choices = [Sequence(prompt, 100, Sampling(choice=i), STOP, group=group) for i in range(4)]
    scheduler.submit(choices)
    assert launch(scheduler).samples == []
    scheduler.commit(sampled([]), 0.01)
    step = launch(scheduler)
    assert [(chunk.row, chunk.start, len(chunk.tokens)) for chunk in step.chunks] == [(0, 128, 72)]
    assert [(row.row, row.token) for row in step.samples] == [(0, 71), (1, 71), (2, 71), (3, 71)]
    assert [start.row for start in step.starts] == [1, 2, 3]
    starts = [delta.start for delta in scheduler.begun if delta.start]
    assert [(start.num_looked_up, start.num_cached) for start in starts] == [(0, 0)] * 3, "the first counts for all"
    assert len(step.copies) == 6, "the last page of each group, for each fork"
    scheduler.commit(sampled([1, 1, 1, 1]), 0.01)
    assert scheduler.cache.usage()["dense"].held == 3 + 4, "3 full pages once, and one page for each sequence"
    assert scheduler.check_integrity() == []
    steps = finish(scheduler)
    assert prompt_tokens(steps) == 0
    assert {len(step.decodes) for step in steps} == {4}


def test_choices_beyond_the_slots_find_the_prompt_in_the_cache() -> None:
    scheduler = make(100, max_rows=2)
    group, prompt = PrefixGroup(200, True), list(range(200))
    choices = [Sequence(prompt, 9, Sampling(choice=i), STOP, group=group) for i in range(5)]
    scheduler.submit(choices)
    assert prompt_tokens(finish(scheduler)) == 200 + 2 * (200 - 192), "2 more rounds; the second row of a round forks"
    assert scheduler.num_cached(*choices) == [0, 0, 192, 0, 192]


def test_a_choice_that_comes_while_its_prompt_is_in_flight_waits_for_it() -> None:
    scheduler = make(100, max_rows=2, step_tokens=512)
    scheduler._pace.chunk_limit = lambda *_, **__: 512  # type: ignore[method-assign]
    other, group, prompt = sequence(5, 2), PrefixGroup(200, True), list(range(200))
    choices = [Sequence(prompt, 9, Sampling(choice=i), STOP, group=group) for i in range(2)]
    scheduler.submit([other])
    first = launch(scheduler)
    scheduler.submit(choices)
    launch(scheduler)
    scheduler.commit(answer(first), 0.01)
    scheduler.abort(other)
    assert launch(scheduler).chunks == [], "the prompt must not be computed again"
    scheduler.commit(sampled([1, 1]), 0.01)
    assert [(chunk.start, len(chunk.tokens)) for chunk in launch(scheduler).chunks] == [(192, 8)]


def test_who_waits_for_pages_blocks_nobody_after_leaving() -> None:
    scheduler = make(None, max_rows=4, dense_sequences=1)
    first, second = sequence(300, 100), sequence(300, 100)
    scheduler.submit([first, second])
    launch(scheduler)
    assert scheduler.lacks_pages
    scheduler.abort(second)
    assert not scheduler.lacks_pages


def test_a_request_of_which_a_choice_runs_does_not_time_out() -> None:
    scheduler = make(max_rows=1)
    together, alone = [sequence(5, 9, deadline=1.0) for _ in range(3)], sequence(5, 9, deadline=1.0)
    scheduler.submit(together)
    scheduler.submit([alone])
    launch(scheduler)
    assert scheduler.expire(2.0) == [Delta(alone, [], "timeout")]


def test_the_group_goes_on_when_its_first_is_aborted_in_the_prompt() -> None:
    scheduler = make(100, step_tokens=128)
    group, prompt = PrefixGroup(200, True), list(range(200))
    choices = [Sequence(prompt, 9, Sampling(choice=i), STOP, group=group) for i in range(3)]
    scheduler.submit(choices)
    drive(scheduler)
    scheduler.abort(choices[0])
    assert scheduler.check_integrity() == []
    steps = finish(scheduler)
    assert [choice.num_generated for choice in choices] == [0, 9, 9]
    assert sum(len(step.starts) for step in steps) == 2


def test_forks_reserve_the_prompt_once() -> None:
    scheduler = make(None, max_rows=8, dense_sequences=1)  # 8 pages
    group, prompt = PrefixGroup(320, True), list(range(320))  # 5 full pages
    choices = [Sequence(prompt, 30, Sampling(choice=i), STOP, group=group) for i in range(4)]
    scheduler.submit(choices)
    scheduler.schedule(0.0)
    assert len(scheduler.running) == 3, "5 shared pages, and one page for each sequence"
    assert scheduler.lacks_pages


def test_continuations_wait_for_what_they_have_in_common() -> None:
    scheduler = make(100, step_tokens=256)
    group, common = PrefixGroup(150, False), list(range(150))
    choices = [
        Sequence([*common, *own], 0, Sampling(), top_logprobs=1, prompt_logprobs_from=150, group=group)
        for own in ([500], [600, 601], [700, 701, 702])
    ]
    scheduler.submit(choices)
    steps = finish(scheduler)
    assert [chunk.row for chunk in steps[0].chunks] == [0]
    assert prompt_tokens(steps) == 151 + (152 - 128) + (153 - 128)
    assert [row.targets for step in steps for row in step.prompt_logprobs] == [[500], [600, 601], [700, 701, 702]]


def test_a_prompt_that_is_the_beginning_of_another_is_no_fork() -> None:
    scheduler = make(100, step_tokens=256)
    group, common = PrefixGroup(100, False), list(range(100))
    prompts = [common, [*common, *range(300, 350)], common]
    scheduler.submit([Sequence(prompt, 3, Sampling(), group=group) for prompt in prompts])
    steps = finish(scheduler)
    assert prompt_tokens(steps) == 100 + (150 - 64) + (100 - 64)
    assert [step.copies for step in steps if step.copies] == []


def test_nothing_is_found_of_a_step_that_failed_or_has_not_ended() -> None:
    scheduler = make(None, step_tokens=256)
    scheduler._pace.chunk_limit = lambda *_, **__: 256  # type: ignore[method-assign]
    prompt = list(range(128))
    scheduler.submit([alike(prompt)])
    launch(scheduler)
    scheduler.submit([alike(prompt)])
    launch(scheduler)
    assert len(fail_step(scheduler)) == 1
    assert scheduler.num_cached(scheduler.running[1]) == [0]
    scheduler.commit(sampled([1, 1]), 0.01)
    assert scheduler.check_integrity() == []
    last = alike(prompt)
    scheduler.submit([last])
    launch(scheduler)
    assert scheduler.num_cached(last) == [64], "the second sequence did not fail, and its page is found"


def test_cached_pages_make_room_the_longest_unused_first() -> None:
    scheduler = make(None, max_rows=1, step_tokens=512, dense_sequences=1)  # 8 pages
    old, new = list(range(1000, 1128)), list(range(2000, 2128))
    for prompt in (old, new, list(range(3000, 3256))):
        scheduler.submit([alike(prompt)])
        finish(scheduler)
    assert scheduler.cache.usage()["dense"].held == 0
    again = [alike([*prompt, 1]) for prompt in (new, old)]
    for each in again:
        scheduler.submit([each])
        finish(scheduler)
    assert scheduler.num_cached(*again) == [128, 64], "a prefix loses its last page first"


def test_step_tokens_must_let_every_stream_advance() -> None:
    with pytest.raises(ValueError, match=r"step_tokens is 19, at least max_slots \+ 16 = 20 is needed"):
        make(max_rows=4, step_tokens=19)


def test_prompt_tokens_with_logprobs_count_more_from_where_they_are_wanted() -> None:
    """The pace is told how many a step has had."""
    scheduler = make(None, step_tokens=256)
    scheduler.explained_weight = 4
    scheduler.submit([sequence(10, 50), sequence(10, 50)])
    drive(scheduler)
    explained = sequence(100, 5)
    explained.prompt_logprobs_from = 50
    scheduler.submit([explained])
    asked: list[tuple[int, int]] = []
    seen: list[Load] = []

    def limit(num_rows: int, start: int) -> int:
        asked.append((num_rows, start))
        return 64

    scheduler._pace.chunk_limit = limit  # type: ignore[method-assign]
    scheduler._pace.observe = lambda load, seconds: seen.append(load)  # type: ignore[method-assign]
    for _ in range(4):
        drive(scheduler)
    assert asked == [(2, 0), (2, 52), (2, 64), (2, 80)]
    # 49 and 15 / 4, then 64 / 4 each.
    assert [(load.tokens, load.explained) for load in seen] == [(52, 3), (12, 12), (16, 16), (16, 16)]
