"""The pace on simulated machines: each test defines what a step costs."""

import random
import sys

import pytest

from kernels.band import PAGE_SIZE
from service.engine.pace import MAX_CROWDING, MAX_SLOWDOWN, Load, Pace


def machine(load: Load) -> float:
    """Seconds of a step: 10 ms, 0.5 ms a row, 0.1 ms a prompt token, and 0.1 ms for every 1024 keys these see."""
    return 0.01 + 0.0005 * load.rows + 0.0001 * (load.tokens + load.keys / 1024)


def learnt(noise: float = 0.0, seed: int = 0) -> Pace:
    """A pace that has seen a prompt of 1500 tokens, then decode steps, then another prompt next to decode rows."""
    rng, pace = random.Random(seed), Pace()

    def observe(load: Load) -> None:
        pace.observe(load, machine(load) * rng.uniform(1 - noise, 1 + noise))

    for start in (0, 512, 1024):
        observe(Load(0, 500, 500 * (start + 250)))
    for _ in range(20):
        observe(Load(rng.randrange(8, 40), 0, 0))
    start = 0
    while start < 1500:
        count = pace.chunk_limit(24, start)
        observe(Load(24, count, count * start))
        start += count
    for _ in range(20):
        observe(Load(24, 0, 0))
    return pace


def test_nothing_is_known_at_first() -> None:
    assert Pace().chunk_limit(8, 0) == PAGE_SIZE
    assert Pace().row_limit(0) == 0
    pace = Pace()
    pace.observe(Load(0, 500, 0), 0.3)
    assert pace.chunk_limit(8, 0) == PAGE_SIZE, "the pace knows nothing of decoding"
    assert pace.row_limit(0) == 0
    pace = Pace()
    pace.observe(Load(8, 0, 0), 0.3)
    assert pace.chunk_limit(8, 0) == PAGE_SIZE, "the pace knows nothing of prompts"


@pytest.mark.parametrize("start", [0, 700, 1400])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_step_with_a_chunk_takes_as_much_longer_as_it_should(start: int, noise: float) -> None:
    ratios = []
    for seed in range(20):
        count = learnt(noise, seed).chunk_limit(24, start)
        ratios.append(machine(Load(24, count, count * start)) / machine(Load(24, 0, 0)))
    assert 0.85 * MAX_SLOWDOWN < sorted(ratios)[10] < 1.15 * MAX_SLOWDOWN
    assert max(ratios) < 3


@pytest.mark.parametrize("start", [0, 700])
def test_rows_leave_room_for_a_page_of_a_prompt(start: int) -> None:
    num_rows = learnt().row_limit(start)
    assert num_rows > 8
    ratio = machine(Load(num_rows, PAGE_SIZE, PAGE_SIZE * start)) / machine(Load(24, 0, 0))
    assert ratio == pytest.approx(MAX_SLOWDOWN, rel=0.15)


def test_nothing_but_a_page_and_no_row_fits_where_steps_are_longer_than_they_should_be() -> None:
    pace = learnt()
    assert pace.row_limit(10**6) == 0
    assert pace.chunk_limit(10**6, 0) == PAGE_SIZE


def test_a_few_long_steps_do_not_make_longer_ones_right() -> None:
    pace = learnt()
    before = pace.chunk_limit(24, 0)
    for _ in range(3):
        pace.observe(Load(64, 0, 0), machine(Load(64, 0, 0)))
    assert pace.chunk_limit(24, 0) == pytest.approx(before, rel=0.25)


def test_more_rows_leave_less_for_prompts() -> None:
    pace = learnt()
    assert pace.chunk_limit(8, 0) > pace.chunk_limit(24, 0) > pace.chunk_limit(500, 0) == PAGE_SIZE


def test_long_contexts_leave_less_for_prompts() -> None:
    pace = learnt()
    assert pace.chunk_limit(24, 0) > pace.chunk_limit(24, 1900)


def explaining(load: Load) -> float:
    """A machine on which a prompt token with logprobs takes as long as six without."""
    return machine(load) + 0.0005 * load.explained


def test_logprobs_of_prompts_are_costs_of_their_own() -> None:
    """Steps with them keep the pace, as the scheduler counts them. Other prompts soon get what they got."""
    pace = learnt()
    for _ in range(30):
        count = pace.chunk_limit(24, 0) // 6
        load = Load(24, count, 0, count)
        assert explaining(load) < 1.15 * MAX_SLOWDOWN * explaining(Load(24, 0, 0))
        pace.observe(load, explaining(load))
        pace.observe(Load(24, 0, 0), explaining(Load(24, 0, 0)))
    for _ in range(10):
        count = pace.chunk_limit(24, 0)
        pace.observe(Load(24, count, 0), explaining(Load(24, count, 0)))
    count = pace.chunk_limit(24, 0)
    assert machine(Load(24, count, 0)) / machine(Load(24, 0, 0)) == pytest.approx(MAX_SLOWDOWN, rel=0.15)


def test_a_machine_that_becomes_slower_is_followed() -> None:
    pace = learnt()
    before = pace.chunk_limit(24, 100)
    for _ in range(30):
        count = pace.chunk_limit(24, 100)
        pace.observe(Load(24, count, count * 100), 2 * machine(Load(24, 0, 0)) + 0.0005 * count)
        pace.observe(Load(24, 0, 0), 2 * machine(Load(24, 0, 0)))
    assert pace.chunk_limit(24, 100) < before


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("num_rows", [2, 10, 30])
def test_a_crowd_takes_as_much_longer_as_it_may(num_rows: int, noise: float) -> None:
    ratios = []
    for seed in range(20):
        pace = learnt(noise, seed)
        for _ in range(20):
            for rows in (4, 30):
                pace.observe(Load(rows, 0, 0), machine(Load(rows, 0, 0)))
        count = pace.crowd_limit(num_rows)
        assert count >= num_rows
        ratios.append(machine(Load(count, 0, 0)) / machine(Load(num_rows, 0, 0)))
    assert sorted(ratios)[10] == pytest.approx(MAX_CROWDING, rel=0.05)


def test_rows_that_cost_nothing_are_no_crowd() -> None:
    assert Pace().crowd_limit(3) == sys.maxsize
    pace = Pace()
    for rows in (1, 64) * 200:
        pace.observe(Load(rows, 0, 0), 0.01)
    assert pace.crowd_limit(1) > 64
