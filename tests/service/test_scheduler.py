"""The scheduler against a slow oracle that remembers, key by key, what stands in every page."""

import random
from collections import deque
from typing import NamedTuple, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.band import PAGE_SIZE, first_key
from model.config import GPTConfig, KVGroup
from model.step import Sampled, SamplingParams, StepInput
from service.kv_cache import KVCache, chunk_slack, resting_pages
from service.scheduler import MIN_CHUNK, Delta, Pace, Scheduler, Sequence

EOS = 7


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


def make(
    band: int | None = 100,
    *,
    max_slots: int = 4,
    step_tokens: int = 128,
    dense_sequences: int = 3,
    banded_sequences: int = 3,
    n_positions: int = 512,
) -> Scheduler:
    """A scheduler whose pools hold that many full-context sequences each, so that either can be the one that binds."""
    shape = config(band, n_positions)
    sizes = {"dense": dense_sequences * resting_pages(n_positions, None)}
    if band is not None:
        sizes["banded"] = banded_sequences * resting_pages(n_positions, band) + chunk_slack(band, step_tokens)
    cache = KVCache(shape, cast(dict[KVGroup, int], sizes), step_tokens=step_tokens)
    return Scheduler(cache, max_slots=max_slots, step_tokens=step_tokens)


def sequence(num_prompt: int, max_tokens: int, *, deadline: float = float("inf")) -> Sequence:
    return Sequence(list(range(num_prompt)), max_tokens, SamplingParams(), EOS, deadline)


class Row(NamedTuple):
    """What a sequence is to gain from a step, noted when the step is scheduled."""

    sequence: Sequence
    gains: list[int] | None  # None while its prompt lasts


class Device:
    """Runs every step when it is scheduled, that is, in stream order, and remembers key by key whose it is."""

    def __init__(self, scheduler: Scheduler, rng: random.Random):
        self.scheduler = scheduler
        self.rng = rng
        self.table: dict[tuple[KVGroup, int, int], int] = {}
        self.content: dict[tuple[KVGroup, int, int], tuple[Sequence, int]] = {}
        self.num_computed: dict[Sequence, int] = {}
        self.num_sampled: dict[Sequence, int] = {}

    def run(self, step: StepInput) -> tuple[list[Row], Sampled]:
        """Write the step's keys, then check that every key its queries see is where the table says; sample at random."""
        for pages in step.pages:
            for i, page_id in enumerate(pages.page_ids):
                self.table[pages.group, pages.slot, pages.first + i] = page_id
        running = self.scheduler.running
        tokens = list(zip(step.token_slots, step.token_positions, strict=True))
        for slot, position in tokens:
            assert position == self.num_computed.get(running[slot], 0), "not the next position"
            self.num_computed[running[slot]] = position + 1
        for kind, pool in self.scheduler.cache.pools.items():
            for slot, position in tokens:
                self.content[self.place(kind, slot, position)] = (running[slot], position)
            for slot, position in tokens:
                for key in range(first_key(position, pool.band), position + 1):
                    assert self.content[self.place(kind, slot, key)] == (running[slot], key), f"{kind} key {key} is gone"
        samples = {step.token_slots[index]: EOS if self.rng.random() < 0.02 else 1 for index in step.sampled_tokens}
        for slot in samples:
            sequence = running[slot]
            self.num_sampled[sequence] = self.num_sampled.get(sequence, 0) + 1
            assert self.num_sampled[sequence] <= sequence.max_tokens
        return [self.row(running[slot], samples.get(slot)) for slot in step_slots(step)], Sampled(list(samples.values()))

    def row(self, sequence: Sequence, token: int | None) -> Row:
        if self.num_computed[sequence] < len(sequence.prompt):
            return Row(sequence, None)
        return Row(sequence, [] if token is None else [token])

    def place(self, group: KVGroup, slot: int, position: int) -> tuple[KVGroup, int, int]:
        return group, self.table[group, slot, position // PAGE_SIZE], position % PAGE_SIZE


def step_slots(step: StepInput) -> list[int]:
    return [row.slot for row in step.decodes] + [chunk.slot for chunk in step.chunks]


requests = st.lists(st.tuples(st.integers(1, 400), st.integers(0, 100)), min_size=1, max_size=12)


@given(
    requests=requests,
    band=st.none() | st.integers(1, 300),
    max_slots=st.integers(1, 5),
    step_tokens=st.integers(21, 400),
    sequences=st.tuples(st.integers(1, 9), st.integers(1, 3)),
    chunk_limit=st.none() | st.integers(16, 400),
    steps_ahead=st.integers(0, 1),
    seed=st.integers(0, 1000),
)
def test_every_sequence_is_computed_once_in_order_and_finishes(
    requests: list[tuple[int, int]],
    band: int | None,
    max_slots: int,
    step_tokens: int,
    sequences: tuple[int, int],
    chunk_limit: int | None,
    steps_ahead: int,
    seed: int,
) -> None:
    rng = random.Random(seed)
    scheduler = make(
        band,
        max_slots=max_slots,
        step_tokens=step_tokens,
        dense_sequences=sequences[0],
        banded_sequences=sequences[1],
    )
    if chunk_limit is not None:
        # Whatever the pace allows, the accounts must hold.
        scheduler._pace.chunk_limit = lambda num_decodes, num_prompts: chunk_limit  # type: ignore[method-assign]
    device = Device(scheduler, rng)
    in_flight: deque[tuple[StepInput, list[Row], Sampled]] = deque()
    todo = [sequence(prompt, tokens) for prompt, tokens in requests]
    submitted = list(todo)
    began: list[Sequence] = []
    ended: dict[Sequence, str] = {}
    generated = dict.fromkeys(todo, 0)

    def abort_one() -> None:
        if rng.random() < 0.05 and (scheduler.running or scheduler.waiting):
            victim = rng.choice([*scheduler.running.values(), *scheduler.waiting])
            scheduler.abort(victim)
            scheduler.abort(victim)
            ended[victim] = "abort"

    def expected(row: Row) -> Delta:
        assert row.gains is not None
        generated[row.sequence] += len(row.gains)
        length = generated[row.sequence] == row.sequence.max_tokens
        return Delta(row.sequence, row.gains, "stop" if row.gains == [EOS] else "length" if length else None)

    while todo or not scheduler.idle:
        while todo and rng.random() < 0.3:
            scheduler.submit([todo.pop(0)])
        abort_one()
        step = scheduler.schedule(0.0)
        if step is None:
            assert in_flight or not scheduler.running
        else:
            assert len(step.token_slots) <= step_tokens
            began += [scheduler.running[start.slot] for start in step.starts]
            assert {start.slot for start in step.starts} == {chunk.slot for chunk in step.chunks if chunk.start == 0}
            for chunk in step.chunks:
                end = chunk.start + len(chunk.tokens)
                assert end % MIN_CHUNK == 0 or end == len(scheduler.running[chunk.slot].prompt)
            in_flight.append((step, *device.run(step)))
        abort_one()
        # Now and then everything is read, as when a launch fails.
        keep = steps_ahead if step is not None and rng.random() < 0.9 else 0
        while len(in_flight) > keep:
            step, rows, sampled = in_flight.popleft()
            rows = [row for row in rows if row.sequence not in ended]
            if rng.random() < 0.02:
                deltas = scheduler.fail_step()
                assert deltas == [Delta(row.sequence, [], "error") for row in rows]
            else:
                deltas = scheduler.commit(sampled, len(step.token_slots) * 1e-3)
                assert deltas == [expected(row) for row in rows if row.gains is not None]
            ended |= {delta.sequence: delta.finish_reason for delta in deltas if delta.finish_reason}
            if rng.random() < 0.5:  # not always: a check leaves all sequences at rest, which `schedule` has to do itself
                assert scheduler.faults() == []
    assert set(ended) == set(submitted)
    assert began == [s for s in submitted if s in set(began)], "a sequence overtook another"
    assert all(generated[s] == s.num_generated for s in submitted)
    assert scheduler.faults() == []
    assert all(usage.held == 0 for usage in scheduler.cache.usage().values())


def drive(scheduler: Scheduler, token: int = 1, seconds: float = 0.01) -> list[Delta]:
    step = scheduler.schedule(0.0)
    assert step is not None
    return scheduler.commit(Sampled([token] * len(step.sampled_tokens)), seconds)


def test_a_2000_token_prompt_holds_the_band_at_rest_and_one_chunk_more_while_it_runs() -> None:
    scheduler = make(256, step_tokens=512, n_positions=2048)
    scheduler.submit([sequence(2000, 48)])
    peak = 0
    while not scheduler.idle:
        step = scheduler.schedule(0.0)
        assert step is not None
        held = scheduler.cache.held(0)["banded"]
        peak = max(peak, held)
        assert step.chunks or held <= 5
        scheduler.commit(Sampled([1] * len(step.sampled_tokens)), 0.01)
    assert peak <= 5 + 512 // PAGE_SIZE


def test_the_slack_for_chunks_is_needed_to_its_last_page() -> None:
    scheduler = make(64, step_tokens=128, dense_sequences=9)  # banded: 3 sequences of 2 pages, and 2 pages of slack
    scheduler._pace.chunk_limit = lambda num_decodes, num_prompts: 128  # type: ignore[method-assign]
    scheduler.submit([sequence(100, 300), sequence(100, 300)])
    for _ in range(10):
        drive(scheduler)
    scheduler.submit([sequence(400, 5)])
    most = 0
    for _ in range(10):
        step = scheduler.schedule(0.0)
        assert step is not None
        most = max(most, scheduler.cache.usage()["banded"].held)
        scheduler.commit(Sampled([1] * len(step.sampled_tokens)), 0.01)
    assert most == scheduler.cache.usage()["banded"].total == 8


def test_decodes_go_first_and_prompts_get_the_rest_of_the_pace() -> None:
    scheduler = make(None, step_tokens=256)
    scheduler.submit([sequence(10, 50)])
    drive(scheduler)
    scheduler.submit([sequence(400, 5)])
    step = scheduler.schedule(0.0)
    assert step is not None
    assert len(step.decodes) == 1
    assert [len(chunk.tokens) for chunk in step.chunks] == [MIN_CHUNK]


def test_a_learnt_pace_sets_the_length_of_chunks() -> None:
    scheduler = make(None, step_tokens=256)
    scheduler.submit([sequence(100, 50)])
    for _ in range(5):
        drive(scheduler, seconds=0.1)  # 100 prompt tokens, then a decode step, take as long
    scheduler.submit([sequence(400, 5)])
    step = scheduler.schedule(0.0)
    assert step is not None
    assert [len(chunk.tokens) for chunk in step.chunks] == [96], "100, down to a multiple of 16"


def test_pace_allows_as_much_prompt_as_takes_one_decode_step() -> None:
    pace = Pace()
    assert pace.chunk_limit(8, 1) == MIN_CHUNK
    pace.observe(0, 100, 1.0)  # 10 ms a prompt token
    pace.observe(8, 0, 0.5)
    assert pace.chunk_limit(8, 1) == 50
    assert pace.chunk_limit(8, 16) == 100, "a burst of prompts gets on"
    assert pace.chunk_limit(1, 31) == 150, "but not at any price"
    pace.observe(0, 1, 0.5)  # one token measures the step's overhead, not the prompt's
    assert pace.chunk_limit(8, 1) == 50
    pace.observe(8, 50, 0.5 + 50 * 0.01)
    assert pace.chunk_limit(8, 1) == 50
    pace.observe(8, 0, 1e-6)
    for _ in range(100):
        pace.observe(8, 0, 1e-6)
    assert pace.chunk_limit(8, 1) == MIN_CHUNK


def test_max_tokens_0_computes_the_prompt_and_ends() -> None:
    scheduler = make()
    scheduler.submit([sequence(10, 0)])
    assert [(delta.tokens, delta.finish_reason) for delta in drive(scheduler)] == [([], "length")]
    assert scheduler.idle


def test_expire_ends_only_the_waiting_and_late() -> None:
    scheduler = make(max_slots=1)
    first, late, patient = sequence(5, 5, deadline=1.0), sequence(5, 5, deadline=2.0), sequence(5, 5)
    scheduler.submit([first, late, patient])
    drive(scheduler)
    assert scheduler.expire(1.5) == []
    assert scheduler.expire(3.0) == [Delta(late, [], "timeout")]
    assert list(scheduler.waiting) == [patient]


def test_a_failed_step_ends_its_own_sequences_only() -> None:
    scheduler = make(None, max_slots=3, step_tokens=64)
    scheduler.submit([sequence(64, 5), sequence(30, 5)])
    step = scheduler.schedule(0.0)
    assert step is not None
    assert [chunk.slot for chunk in step.chunks] == [0]
    assert [delta.finish_reason for delta in scheduler.fail_step()] == ["error"]
    assert scheduler.faults() == []
    step = scheduler.schedule(0.0)
    assert step is not None
    assert [start.slot for start in step.starts] == [1], "a sequence admitted in the failed step must still start"


def launch(scheduler: Scheduler) -> StepInput:
    step = scheduler.schedule(0.0)
    assert step is not None
    return step


def test_the_token_after_the_end_is_dropped_though_its_slot_has_a_new_sequence() -> None:
    scheduler = make(max_slots=1)
    first, second = sequence(5, 9), sequence(5, 9)
    scheduler.submit([first, second])
    launch(scheduler)
    assert launch(scheduler).decodes == [(0, 5)], "launched before the token of the first step is known"
    assert scheduler.commit(Sampled([EOS]), 0.01) == [Delta(first, [EOS], "stop")]
    assert [start.slot for start in launch(scheduler).starts] == [0]
    assert scheduler.commit(Sampled([3]), 0.01) == []
    assert first.num_generated == 1
    assert scheduler.commit(Sampled([4]), 0.01) == [Delta(second, [4], None)]


def test_nothing_is_scheduled_past_max_tokens_and_a_step_in_flight_is_work() -> None:
    scheduler = make()
    scheduler.submit([sequence(5, 2)])
    launch(scheduler)
    launch(scheduler)
    assert scheduler.schedule(0.0) is None
    assert [delta.finish_reason for delta in scheduler.commit(Sampled([1]), 0.01)] == [None]
    assert scheduler.schedule(0.0) is None
    assert [delta.finish_reason for delta in scheduler.commit(Sampled([1]), 0.01)] == ["length"]
    assert scheduler.idle


def test_max_tokens_0_ends_with_the_last_chunk_not_with_one_before_it() -> None:
    scheduler = make(step_tokens=64)
    scheduler.submit([sequence(100, 0)])
    launch(scheduler)
    launch(scheduler)
    assert scheduler.commit(Sampled([]), 0.01) == []
    assert [delta.finish_reason for delta in scheduler.commit(Sampled([]), 0.01)] == ["length"]
    assert scheduler.idle


def test_abort_gives_pages_and_slot_back_at_once_and_drops_what_is_in_flight() -> None:
    scheduler = make(max_slots=1)
    aborted, other = sequence(5, 9), sequence(5, 1)
    scheduler.submit([aborted])
    launch(scheduler)
    scheduler.abort(aborted)
    assert all(usage.held == 0 for usage in scheduler.cache.usage().values())
    assert not scheduler.idle, "a step is in flight"
    scheduler.submit([other])
    launch(scheduler)
    assert scheduler.commit(Sampled([1]), 0.01) == []
    assert scheduler.commit(Sampled([1]), 0.01) == [Delta(other, [1], "length")]
    assert scheduler.idle


def test_a_failed_step_leaves_those_that_joined_the_next_one_alone() -> None:
    scheduler = make(100, step_tokens=256)
    failing, joined = sequence(250, 9), sequence(200, 1)
    scheduler.submit([failing, joined])
    launch(scheduler)
    scheduler._pace.chunk_limit = lambda num_decodes, num_prompts: 256  # type: ignore[method-assign]
    assert [row.slot for row in launch(scheduler).decodes] == [0]
    assert scheduler.fail_step() == [Delta(failing, [], "error")]
    assert scheduler.faults() == [], "though the chunk in flight holds more pages than its sequence reserved"
    assert scheduler.commit(Sampled([1, 2]), 0.01) == [Delta(joined, [2], "length")]
    assert scheduler.idle
    scheduler.submit([sequence(5, 9)])
    launch(scheduler)
    launch(scheduler)
    assert len(scheduler.fail_step()) == 1
    assert scheduler.fail_step() == [], "it has ended with the step before"


def test_step_tokens_must_let_every_stream_advance() -> None:
    with pytest.raises(ValueError, match=r"step_tokens is 19, at least max_slots \+ 16 = 20 is needed"):
        make(max_slots=4, step_tokens=19)
