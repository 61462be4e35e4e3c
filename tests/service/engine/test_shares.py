"""Who goes next: slots and prompt tokens among clients, and how long anybody waits at most."""

import heapq
import math
import random
from collections import Counter, deque
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from kernels.band import PAGE_SIZE
from model.step import Sampled, Sampling, StepInput
from service.engine.scheduler import MAX_REPLAY, QUANTUM, PrefixGroup, Scheduler, Sequence
from service.engine.shares import Shares
from tests.service.engine.test_scheduler import answer, make


class Item(NamedTuple):
    client: str
    number: int = 0


def shares_of(*items: Item) -> Shares[Item]:
    shares: Shares[Item] = Shares()
    for item in items:
        shares.add(item)
    return shares


def granted(shares: Shares[Item], count: int) -> str:
    """The clients that the next slots go to."""
    found = ""
    for _ in range(count):
        item = shares.first()
        assert item is not None
        shares.take(item, 1)
        found += item.client
    return found


def test_slots_go_round_the_clients_and_within_one_by_arrival() -> None:
    shares = shares_of(*(Item("a", i) for i in range(5)), Item("b"), Item("c"), Item("b", 1))
    assert granted(shares, 8) == "abcabaaa"
    assert (len(shares), shares.first(), list(shares)) == (0, None, [])


def test_a_client_that_got_a_slot_waits_for_those_that_have_not() -> None:
    shares = shares_of(Item("a"), Item("a", 1), Item("b"), Item("b", 1))
    assert granted(shares, 1) == "a"
    shares.leave(Item("a"))
    assert granted(shares, 1) == "b"
    shares.leave(Item("b"))
    assert granted(shares, 1) == "a"


def test_what_is_put_back_is_the_first_of_its_client() -> None:
    shares = shares_of(Item("a"), Item("a", 1), Item("a", 2))
    assert granted(shares, 2) == "aa"
    shares.put_back(Item("a", 1))
    assert (list(shares), shares.held("a")) == ([Item("a", 1), Item("a", 2)], 1)
    assert Item("a", 1) in shares
    shares.remove(Item("a", 1))
    assert shares.first() == Item("a", 2)


@pytest.mark.parametrize(("held", "yields"), [({"a": 3, "b": 1}, "a"), ({"a": 2, "b": 1}, None), ({"a": 1, "b": 3}, None)])
def test_only_a_client_with_at_least_two_more_slots_yields(held: dict[str, int], yields: str | None) -> None:
    shares = shares_of(*(Item(client, i) for client, count in held.items() for i in range(count)))
    granted(shares, sum(held.values()))
    assert shares.over("b") == yields


def test_a_prompt_is_due_when_its_clients_share_would_have_computed_it() -> None:
    shares = shares_of(Item("a"), Item("a", 1), Item("b"))
    due = [shares.take(item, tokens) for item, tokens in ((Item("a"), 1000), (Item("b"), 300), (Item("a", 1), 50))]
    assert due == [1000, 300, 1050]
    shares.advance(400, ["a", "b", "a"])
    shares.add(Item("c"))
    assert shares.take(Item("c"), 10) == 210, "half of 400 tokens, and its own"
    shares.advance(0, [])
    shares.advance(5000, ["a"])
    shares.add(Item("a", 2))
    assert shares.take(Item("a", 2), 10) == 5210, "a client keeps nothing of what it left unused"


def test_what_is_not_computed_is_not_owed() -> None:
    shares = shares_of(Item("a"), Item("a", 1), Item("a", 2))
    assert [shares.take(Item("a", i), 1000) for i in range(2)] == [1000, 2000]
    shares.refund("a", 1000)
    assert shares.take(Item("a", 2), 10) == 1010
    shares.refund("unknown", 5)  # it has paid all: the clock has passed it


# The scheduler


def sequence(client: str, num_prompt: int, max_tokens: int, **fields: Any) -> Sequence:
    return Sequence([hash(client) % 1000] * num_prompt, max_tokens, Sampling(), client=client, is_cached=False, **fields)


def launch(scheduler: Scheduler) -> StepInput:
    step = scheduler.schedule(0.0)
    assert step is not None
    scheduler.commit(answer(step), 0.01)
    return step


def run(scheduler: Scheduler, steps: int) -> None:
    for _ in range(steps):
        launch(scheduler)


def test_a_row_is_taken_from_the_client_with_more_and_pages_are_kept() -> None:
    scheduler = make(None, max_rows=2, dense_sequences=3)
    large = [sequence("a", 10, 40) for _ in range(3)]
    scheduler.submit(large)
    run(scheduler, 5)
    scheduler.submit([other := sequence("b", 10, 2)])
    step = launch(scheduler)
    assert [start.row for start in step.starts] == [1]
    assert [each.row for each in large] == [0, -2, -1]
    assert (scheduler.num_put_back, len(scheduler.waiting)) == (1, 2)
    run(scheduler, 1)
    assert other.num_generated == 2
    step = launch(scheduler)
    assert [(start.row, start.generated) for start in step.starts] == [(1, (1,) * 5)]
    assert [(new.row, new.first) for new in step.pages] == [(1, 0)]
    assert [(token.row, token.position, token.token) for token in step.decodes] == [(0, 16, 1), (1, 14, 1)]
    assert scheduler.check_integrity() == []


def test_pages_are_taken_for_a_clients_first_row_only_and_known_tokens_computed_again() -> None:
    scheduler = make(None, max_rows=3, dense_sequences=2)  # 16 pages
    first, newest = sequence("a", 320, 190), sequence("a", 320, 190)  # 8 pages each
    scheduler.submit([first, newest])
    while newest.num_generated < 100:
        launch(scheduler)
    other, more = sequence("b", 10, 3), sequence("b", 320, 1)
    scheduler.submit([other, more])
    launch(scheduler)
    assert (newest.num_computed, newest in scheduler.waiting) == (0, True)
    assert (other.num_generated, more in scheduler.waiting) == (1, True)
    while newest.row < 0:
        launch(scheduler)
    while newest.in_prompt:
        assert newest.num_generated == 100
        launch(scheduler)
    step = launch(scheduler)
    again = [token.position for token in step.decodes if token.row == newest.row]
    assert again == list(range(320, 320 + MAX_REPLAY + 1))
    assert [sample.row for sample in step.samples] == [first.row], "nothing is sampled after known tokens"
    while newest.num_generated == 100:
        launch(scheduler)
    assert newest.num_computed == 320 + 100


def test_the_only_row_is_yielded_after_a_turn_if_its_client_has_more_to_do() -> None:
    scheduler = make(None, max_rows=1)
    large, other = [sequence("a", 10, 300) for _ in range(2)], sequence("b", 10, 1)
    scheduler.submit(large)
    run(scheduler, 2)
    scheduler.submit([other])
    run(scheduler, QUANTUM - 2)
    assert (large[0].num_generated, other.num_generated) == (QUANTUM, 0)
    run(scheduler, 2)
    assert (large[0].num_generated, other.num_generated) == (QUANTUM + 1, 1)


def test_a_client_with_one_sequence_keeps_its_row() -> None:
    scheduler = make(None, max_rows=1)
    scheduler.submit([sequence("a", 10, 300)])
    run(scheduler, 2)
    scheduler.submit([sequence("b", 10, 1)])
    run(scheduler, 297)
    assert scheduler.num_put_back == 0


def test_a_row_is_taken_only_when_no_step_is_in_flight() -> None:
    scheduler = make(None, max_rows=2)
    large = [sequence("a", 10, 40) for _ in range(2)]
    scheduler.submit(large)
    steps = [scheduler.schedule(0.0)]
    scheduler.submit([sequence("b", 10, 1)])
    assert scheduler.schedule(0.0) is None
    for step in steps:
        assert step is not None
        scheduler.commit(answer(step), 0.01)
    step = scheduler.schedule(0.0)
    assert step is not None
    assert [chunk.row for chunk in step.chunks] == [1]


def test_logprobs_of_a_prompt_are_given_once_though_it_begins_again() -> None:
    scheduler = make(None, max_rows=2, step_tokens=64, dense_sequences=4)
    explained = sequence("a", 300, 5, top_logprobs=0, prompt_logprobs_from=1)
    scheduler.submit([sequence("a", 2, 300), explained])
    targets = 0

    def step() -> None:
        nonlocal targets
        found = scheduler.schedule(0.0)
        assert found is not None
        targets += sum(len(some.targets) for some in found.prompt_logprobs)
        scores: Any = [[type("Found", (), {"logprob": -1.0})()] * len(some.targets) for some in found.prompt_logprobs]
        scheduler.commit(Sampled([1] * len(found.samples), [None] * len(found.samples), scores), 0.01)

    for _ in range(3):
        step()
    before = targets
    assert 0 < before < 299
    scheduler.submit([sequence("b", 10, 1)])
    step()
    assert explained in scheduler.waiting
    while explained.num_generated < 5:
        step()
    assert targets == 299


def test_a_short_prompt_passes_the_long_ones_of_another_client_but_is_not_passed_itself() -> None:
    scheduler = make(None, max_rows=4, step_tokens=80, dense_sequences=4)
    scheduler.submit([sequence("a", 500, 1) for _ in range(2)])
    launch(scheduler)
    scheduler.submit([sequence("b", 30, 1), sequence("c", 480, 1)])
    step = launch(scheduler)
    assert [chunk.row for chunk in step.chunks] == [2, 0], "then the one that came first"


@pytest.mark.parametrize("history", ["forks", "aborted", "cached"])
def test_a_client_owes_no_prompt_tokens_that_nobody_computed(history: str) -> None:
    scheduler = make(None, max_rows=4, step_tokens=2000, dense_sequences=8)
    same = PrefixGroup(480, True) if history == "forks" else None
    before = [sequence("a", 480, 1, group=same) for _ in range(3)]
    for each in before:
        each.is_cached = history == "cached"
    for some in [before] if history != "cached" else [[each] for each in before]:
        scheduler.submit(some)
        if history == "aborted":
            scheduler._admit(0.0)  # they get rows, and no step
            for each in some:
                scheduler.abort(each)
        while not scheduler.idle:
            launch(scheduler)
    scheduler.step_tokens = 80
    scheduler.submit([sequence("b", 400, 1), sequence("a", 30, 1)])
    assert len(launch(scheduler).chunks[0].tokens) == 30, "the short one first, as if it were new"


def test_many_prompts_of_a_client_leave_the_streams_of_another_their_pace() -> None:
    scheduler = make(None, max_rows=4, step_tokens=256, dense_sequences=4)
    scheduler._pace.chunk_limit = lambda *_, **__: PAGE_SIZE  # type: ignore[method-assign]
    scheduler.submit([sequence("a", 10, 99)])
    launch(scheduler)
    for prompts, tokens in ((["b"], 192), (["b", "b"], PAGE_SIZE), (["a", "a"], 192)):
        more = [sequence(client, 400, 1) for client in prompts]
        scheduler.submit(more)
        assert sum(len(chunk.tokens) for chunk in launch(scheduler).chunks) == tokens
        for each in more:
            scheduler.abort(each)


def test_rows_beyond_those_of_every_other_client_take_turns() -> None:
    scheduler = make(None, max_rows=6, dense_sequences=6)
    scheduler._pace.crowd_limit = lambda num_rows: num_rows + 1  # type: ignore[method-assign]
    large = [sequence("a", 10, 60) for _ in range(5)]
    scheduler.submit(large)
    for _ in range(2):
        assert len(launch(scheduler).samples) == 5, "alone it is not held back"
    scheduler.submit([other := sequence("b", 10, 20)])
    launch(scheduler)
    steps = [{token.row for token in launch(scheduler).decodes} for _ in range(15)]
    assert all(len(rows) == 3 and 5 in rows for rows in steps)
    for i in range(13):
        assert set().union(*steps[i : i + 3]) == {*range(6)}, "five rows, two in a step"
    while other.num_generated < 20:
        launch(scheduler)
    assert len(launch(scheduler).decodes) == 5


def test_a_crowded_step_has_no_drafts_and_an_equal_crowd_is_none() -> None:
    scheduler = make(None, max_rows=6, dense_sequences=6, max_draft=7)
    scheduler._pace.crowd_limit = lambda num_rows: num_rows + 2  # type: ignore[method-assign]
    scheduler.submit([sequence("a", 10, 200) for _ in range(3)])
    run(scheduler, 9)
    assert len(launch(scheduler).decodes) > 3, "they repeat themselves"
    scheduler.submit([sequence("b", 10, 200)])
    run(scheduler, 9)
    assert len(launch(scheduler).decodes) == 4, "no more than two and two"
    scheduler.submit([sequence("b", 10, 200) for _ in range(2)])
    run(scheduler, 9)
    assert len(launch(scheduler).decodes) > 8


class Load(NamedTuple):
    client: int
    num_prompt: int
    max_tokens: int
    num_choices: int
    after: int  # steps after the one before it


loads = st.lists(
    st.builds(
        Load,
        client=st.integers(0, 5),
        num_prompt=st.integers(1, 400),
        max_tokens=st.integers(1, 100),
        num_choices=st.sampled_from([1, 1, 2, 9]),
        after=st.integers(0, 30),
    ),
    min_size=2,
    max_size=12,
)


class TurnsScheduler(Scheduler):
    """Checks how long rows sit out: at most (n - 1) / m steps of a client that holds n rows if each computes m of them."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.waited: dict[Sequence, list[int]] = {}  # of each row that sits out: its client's rows at first, then each m
        self.most = 0

    def _in_turns(self, decoding: list[Sequence]) -> tuple[list[Sequence], int]:
        chosen, crowd = super()._in_turns(decoding)
        counts = Counter(sequence.client for sequence in decoding)
        self.waited = {each: counted for each, counted in self.waited.items() if self.is_running(each)}
        for sequence in decoding:
            if sequence in chosen:
                self.waited.pop(sequence, None)
                continue
            others = max((count for client, count in counts.items() if client != sequence.client), default=0)
            assert 0 < others < counts[sequence.client], "only a client that decodes more than any other is held back"
            n, *m = self.waited.setdefault(sequence, [self.waiting.held(sequence.client)])
            self.waited[sequence].append(others)
            assert sum(m) + others <= n - 1 <= self.max_rows - 2
            self.most = max(self.most, len(m) + 1)
        return chosen, crowd


@given(loads=loads, max_rows=st.integers(2, 12), crowd=st.integers(0, 3), ahead=st.integers(0, 1))
def test_no_row_waits_longer_than_a_bound_for_its_turn(loads: list[Load], max_rows: int, crowd: int, ahead: int) -> None:
    cache = make(None, dense_sequences=4, step_tokens=300).cache
    scheduler = TurnsScheduler(cache, max_rows=max_rows, step_tokens=300)
    scheduler._pace.crowd_limit = lambda num_rows: num_rows + crowd  # type: ignore[method-assign]
    steps: deque[StepInput] = deque()
    while loads or not scheduler.idle:
        if loads and len(scheduler.waiting) < 3:
            load = loads.pop()
            fields: dict[str, Any] = {"client": load.client, "is_cached": False}
            fields["group"] = PrefixGroup(load.num_prompt, True) if load.num_choices > 1 else None
            prompt = [load.client] * load.num_prompt
            scheduler.submit([Sequence(prompt, load.max_tokens, Sampling(), **fields) for _ in range(load.num_choices)])
        step = scheduler.schedule(0.0)
        if step is not None:
            steps.append(step)
        while len(steps) > (ahead if step is not None else 0):
            scheduler.commit(answer(steps.popleft()), 0.01)
    event(f"{scheduler.most} steps without a row")


@given(loads=loads, max_rows=st.integers(1, 8), step_tokens=st.integers(80, 300), pages=st.integers(1, 3))
def test_nobody_waits_longer_than_a_bound(loads: list[Load], max_rows: int, step_tokens: int, pages: int) -> None:
    """A client's first row comes at once if there is a row for each client, else after the turns of the others."""
    scheduler = make(100, max_rows=max_rows, step_tokens=step_tokens, dense_sequences=pages * 3, banded_sequences=pages * 3)
    clients = {load.client for load in loads}
    longest = max(load.num_prompt for load in loads)
    # Steps that compute the prompts of as many sequences as there are rows, at the least pace, and again what they lost.
    prompts = sum(-(-(load.num_prompt + load.max_tokens) // PAGE_SIZE) + 1 for load in [max(loads, key=sum)]) * max_rows
    turn = prompts + longest + max(load.max_tokens for load in loads) + QUANTUM
    todo = list(loads)
    waits: dict[Sequence, int] = {}
    now = due = 0
    while todo or not scheduler.idle:
        while todo and now >= due + todo[0].after:
            load, due = todo.pop(0), now
            together = PrefixGroup(load.num_prompt, True) if load.num_choices > 1 else None
            made = [
                Sequence([load.client * 500 + len(todo)] * load.num_prompt, load.max_tokens, Sampling(), client=load.client,
                         group=together)
                for _ in range(load.num_choices)
            ]  # fmt: skip
            if not any(each.client == load.client for each in (*scheduler.waiting, *scheduler.running.values())):
                waits[made[0]] = now
            scheduler.submit(made)
        step = scheduler.schedule(0.0)
        if step is not None:
            scheduler.commit(answer(step), 0.01)
        now += 1
        for first, since in list(waits.items()):
            if first.row >= 0 or first.num_generated:
                del waits[first]
                continue
            # What is left of choices that shared a prompt may have reserved up to twice a sequence's pages.
            rows_for_all = max_rows >= len(clients) and pages * 3 >= 2 * len(clients)
            assert now - since <= (0 if rows_for_all else len(clients) * turn), "its client waits too long"
    assert not waits
    assert math.isfinite(scheduler.waiting._clock)


def latencies(*, flood: bool) -> list[float]:
    """Of 31 clients that each ask for 16 tokens and pause for a second, on a machine of 4 ms a step and 0.6 ms a row.

    With `flood` a client has 1024 texts that repeat themselves, so that they are drafted.
    """
    rng, now, found = random.Random(1), -1.0, []
    scheduler = make(None, max_rows=32, step_tokens=512, dense_sequences=64, n_positions=2048, max_draft=7)
    if flood:
        scheduler.submit([sequence("flood", 1, 1500) for _ in range(1024)])
    coming = [(0.0, client) for client in range(31)]
    since: dict[Sequence, float] = {}
    while now < 5:
        while coming and coming[0][0] <= now:
            asked, client = heapq.heappop(coming)
            prompt = [rng.randrange(50_000) for _ in range(5)]
            scheduler.submit([short := Sequence(prompt, 16, Sampling(), client=client)])
            since[short] = max(asked, 0.0)
        if scheduler.idle:
            now = coming[0][0]
            continue
        step = scheduler.schedule(now)
        assert step is not None
        seconds = 0.004 + 0.0006 * len(step.decodes) + 0.00015 * (step.num_tokens - len(step.decodes))
        now += seconds
        repeats = [scheduler.running[sample.row].client == "flood" for sample in step.samples]
        tokens = [1 if known and rng.random() < 0.93 else rng.randrange(50_000) for known in repeats]
        for delta in scheduler.commit(Sampled(tokens, [None] * len(tokens), []), seconds):
            if delta.finish_reason and delta.sequence.client != "flood":
                found.append(now - since[delta.sequence])
                heapq.heappush(coming, (now + rng.uniform(0, 2), cast(int, delta.sequence.client)))
    return sorted(found)


def test_beside_a_flood_others_take_at_most_twice_as_long() -> None:
    alone, beside = latencies(flood=False), latencies(flood=True)
    assert len(alone) > 100
    for share in (0.9, 0.99):
        ratio = beside[int(share * len(beside))] / alone[int(share * len(alone))]
        assert ratio < 2, f"{share}: {ratio}"
