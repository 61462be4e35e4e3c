"""Corner cases of the scheduler and the page accounts. A change once broke each of them, and no other test noticed."""

import itertools
from collections import abc
from typing import Any

import pytest

from kernels.band import PAGE_SIZE
from kernels.names import PatternKind
from model.config import GPTConfig, KVGroup
from model.step import Sampled, Sampling, StepInput
from service.engine.drafting import PromptLookup
from service.engine.pace import Load
from service.engine.pages import FilledPage, PageAllocator, page_hashes
from service.engine.scheduler import MIN_CHUNK, Delta, PrefixGroup, Scheduler, Sequence
from tests.service.engine.test_scheduler import fail_step

CONTEXT = 512
STOP = 7
fresh_tokens = itertools.count(1000)


# Helpers: they know the internal names and fields.


def pages(num_pages: int, band: int | None = None, *, step_tokens: int = 128) -> PageAllocator:
    """The accounts of one pool of `num_pages` pages. With a band, there is a second pool of the same size."""
    attention: tuple[PatternKind, ...] = ("dense",) if band is None else ("dense", "banded")
    shape = GPTConfig(
        vocab_size=100, n_positions=CONTEXT, n_embd=8, n_layer=2, n_head=1, n_inner=8, attention=attention, band=band
    )
    sizes: dict[KVGroup, int] = {"dense": num_pages, "banded": num_pages}
    return PageAllocator(shape, sizes, step_tokens=step_tokens)


def make(
    band: int | None = None, *, num_pages: int = 64, max_rows: int = 4, step_tokens: int = 128, max_draft: int = 0
) -> Scheduler:
    cache = pages(num_pages, band, step_tokens=step_tokens)
    return Scheduler(cache, max_rows=max_rows, step_tokens=step_tokens, max_draft=max_draft)


def sequence(prompt: abc.Sequence[int], max_tokens: int = 5, **fields: Any) -> Sequence:
    return Sequence(list(prompt), max_tokens, Sampling(), frozenset({STOP}), **fields)


def alone(num_prompt: int, max_tokens: int = 5) -> Sequence:
    """A sequence whose prompt begins like no other."""
    return sequence([next(fresh_tokens), *range(1, num_prompt)], max_tokens)


def group(num_common: int, *, one_prompt: bool) -> dict[str, Any]:
    return {"group": PrefixGroup(num_common, one_prompt)}


def faults(scheduler: Scheduler) -> list[str]:
    """What is wrong with the page accounts at this moment, even if a step is in flight."""
    return scheduler.cache.check_integrity()


def cached_pages(cache: PageAllocator) -> int:
    """How many pages no row holds, but a page hash still finds."""
    return len(cache.pools["dense"].cached)


def free_pages(cache: PageAllocator) -> int:
    return len(cache.pools["dense"].free)


def fill(cache: PageAllocator, row: int, num_pages: int) -> list[FilledPage]:
    """Have a row fill its first pages with the same tokens as every other row."""
    tokens = range(num_pages * PAGE_SIZE)
    assert cache.try_reserve(row, len(tokens))
    cache.extend(row, len(tokens))
    return cache.fill(row, 0, len(tokens), page_hashes(tokens))


def launch(scheduler: Scheduler) -> StepInput:
    step = scheduler.schedule(0.0)
    assert step is not None
    return step


def commit(scheduler: Scheduler, step: StepInput, token: int = 1) -> list[Delta]:
    """Commit `step`, the oldest one in flight, with `token` as every sample."""
    prompt_logprobs: list[Any] = [[] for _ in step.prompt_logprobs]
    return scheduler.commit(Sampled([token] * len(step.samples), [None] * len(step.samples), prompt_logprobs), 0.01)


def finish(scheduler: Scheduler) -> None:
    while step := scheduler.schedule(0.0):
        commit(scheduler, step)
    assert scheduler.idle
    assert scheduler.check_integrity() == []


def num_cached(step: StepInput) -> int:
    """Where the only chunk of this step begins: all tokens ahead of it were in the cache."""
    (chunk,) = step.chunks
    return chunk.start


def draft_all_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every draft as long as the scheduler allows."""
    monkeypatch.setattr(PromptLookup, "draft", lambda _self, limit, _streams: [2] * max(limit, 0))


# Pages


@pytest.mark.parametrize("band", [None, 64])
def test_a_page_computed_on_one_of_a_failed_step_is_never_found(band: int | None) -> None:
    scheduler = make(band, step_tokens=PAGE_SIZE)
    prompt = range(2 * PAGE_SIZE + 1)
    scheduler.submit([sequence(prompt)])
    launch(scheduler)  # computes the first page, and fails
    second = launch(scheduler)  # computes the second page, which attends to the first
    assert [delta.finish_reason for delta in fail_step(scheduler)] == ["error"]
    assert commit(scheduler, second) == []
    scheduler.submit([sequence(prompt[: PAGE_SIZE + 1])])  # computes the first page again, this time correctly
    finish(scheduler)
    scheduler.submit([sequence(prompt)])
    assert num_cached(launch(scheduler)) == PAGE_SIZE


def test_the_pages_of_a_failed_step_are_free() -> None:
    scheduler = make()
    scheduler.submit([alone(128)])
    launch(scheduler)
    fail_step(scheduler)
    assert (cached_pages(scheduler.cache), free_pages(scheduler.cache)) == (0, 64)


def test_of_two_pages_with_one_content_one_is_kept() -> None:
    cache = pages(8)
    filled = [fill(cache, row, 2) for row in (0, 1)]
    for each in filled:
        cache.publish(each)
    cache.free(1)
    assert (cached_pages(cache), free_pages(cache)) == (0, 6)
    cache.free(0)
    assert (cached_pages(cache), free_pages(cache)) == (2, 6)
    assert cache.check_integrity() == []


def test_a_page_let_go_before_it_is_published_is_free_at_once_if_its_content_is_kept_already() -> None:
    cache = pages(8)
    first, second = (fill(cache, row, 2) for row in (0, 1))
    cache.publish(first)
    cache.free(1)  # its step is still in flight
    cache.publish(second)
    assert (cached_pages(cache), free_pages(cache)) == (0, 6)
    cache.free(0)
    assert (cached_pages(cache), free_pages(cache)) == (2, 6)
    assert cache.check_integrity() == []


@pytest.mark.parametrize(("num_pages", "is_kept"), [(16, True), (4, False)])
def test_pages_that_a_step_in_flight_sees_are_kept_as_far_as_there_is_room(num_pages: int, is_kept: bool) -> None:
    """So that it can run again, though a later step was launched that does not see them."""
    scheduler = make(10, num_pages=num_pages)  # two of them for prompt chunks, two for the sequence
    one = alone(72, max_tokens=9)
    scheduler.submit([one])
    commit(scheduler, launch(scheduler))
    steps = [launch(scheduler), launch(scheduler)]
    assert [step.decodes[0].position for step in steps] == [72, 73], "which see keys from 63 and from 64 on"
    assert scheduler.can_repeat(one) == is_kept
    held = scheduler.cache.pools["banded"].held[one.row]
    assert len(held.page_ids) == 1 + is_kept
    commit(scheduler, steps[0])
    assert scheduler.can_repeat(one)
    launch(scheduler)
    assert len(held.page_ids) == 1, "once the step has run, the page is passed"


@pytest.mark.parametrize("generated", [[], [7, 8]])  # tokens of a fork that was put back and resumes: none is sampled then
def test_a_fork_without_its_parent_can_not_run_again(generated: list[int]) -> None:
    scheduler = make(step_tokens=256)
    parent, fork = (sequence(range(70), **together) for together in [group(70, one_prompt=True)] for _ in range(2))
    fork.generated += generated
    scheduler.submit([parent, fork])
    launch(scheduler)
    assert [scheduler.can_repeat(each) for each in (parent, fork)] == [True, True]
    assert scheduler.oldest_requests() == [[parent, fork]]
    scheduler.abort(parent)
    assert not scheduler.can_repeat(fork)


# Drafts


@pytest.mark.parametrize(("num_prompt", "num_rows"), [(10, 118), (72, 56), (73, 119), (136, 56), (137, 119)])
def test_a_draft_ends_with_the_pages_that_a_band_reserved(
    num_prompt: int, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft_all_that_fits(monkeypatch)
    band = 10  # a sequence holds two pages between steps
    scheduler = make(band, step_tokens=400, max_draft=300)
    scheduler.submit([alone(num_prompt, max_tokens=300)])
    commit(scheduler, launch(scheduler))
    step = launch(scheduler)
    assert faults(scheduler) == []
    assert len(step.decodes) == num_rows
    assert (num_prompt + num_rows) % PAGE_SIZE == 0, "one row more would take another page"


def test_a_draft_leaves_a_prompt_its_least_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_all_that_fits(monkeypatch)
    scheduler = make(step_tokens=100, max_draft=300)
    scheduler.submit([alone(5, max_tokens=300), alone(5, max_tokens=300)])
    commit(scheduler, launch(scheduler))
    for others in ([], [alone(200)], [alone(200), alone(200)]):
        scheduler.submit(others)
        scheduler._pace.row_limit = lambda *_: 1000  # type: ignore[method-assign]
        scheduler._pace.chunk_limit = lambda *_, **__: 1000  # type: ignore[method-assign]
        step = launch(scheduler)
        assert len(step.decodes) == 100 - MIN_CHUNK
        assert sum(len(chunk.tokens) for chunk in step.chunks) == MIN_CHUNK * bool(others)
        commit(scheduler, step)
        for each in others:
            scheduler.abort(each)


# The order of prompts, and prefix groups


def test_a_prompt_that_rests_inside_a_page_first_goes_on_to_its_end() -> None:
    scheduler = make(100)
    common = [next(fresh_tokens), *range(1, PAGE_SIZE)]
    first, second = (sequence([*common, own], 0, **together) for together in [group(64, one_prompt=False)] for own in (2, 3))
    other = alone(300)
    scheduler.submit([first, second])
    scheduler.submit([other])
    step = launch(scheduler)
    rows = [each.row for each in (first, second, other)]
    assert [chunk.row for chunk in step.chunks] == [rows[0], rows[2]], "the second sequence waits for the common page"
    commit(scheduler, step)
    step = launch(scheduler)
    chunks = [(chunk.row, chunk.start, len(chunk.tokens)) for chunk in step.chunks]
    assert chunks == [(rows[2], 63, 1), (rows[1], 64, 1)], "then comes the one whose turn it is"
    commit(scheduler, step)
    finish(scheduler)


def test_a_fork_that_comes_after_its_parents_prompt_reserves_pages_of_its_own() -> None:
    scheduler = make(num_pages=8, max_rows=2, step_tokens=512)
    other, together = alone(5, 2), group(320, one_prompt=True)
    parent, fork = (sequence(range(320), 30, **together) for _ in range(2))  # 6 pages each, 5 for the prompt
    scheduler._pace.chunk_limit = lambda *_, **__: 512  # type: ignore[method-assign]
    scheduler.submit([other])
    first = launch(scheduler)
    scheduler.submit([parent, fork])
    second = launch(scheduler)
    assert parent.num_computed == 320
    commit(scheduler, first)
    scheduler.abort(other)
    third = launch(scheduler)
    assert scheduler.lacks_pages, "5 shared pages and 2 more would fit; 12 pages do not"
    for step in (second, third):
        commit(scheduler, step)
    finish(scheduler)
    assert fork.num_generated == 30


def test_a_fork_that_gets_a_row_later_shares_the_reservation_of_a_parent_in_its_prompt() -> None:
    scheduler = make(num_pages=8, max_rows=2)
    other, together = alone(5, 1), group(320, one_prompt=True)
    parent, fork = (sequence(range(320), 30, **together) for _ in range(2))
    scheduler.submit([other])
    scheduler.submit([parent, fork])
    commit(scheduler, launch(scheduler))  # the other ends, and leaves its row to the fork
    step = launch(scheduler)
    assert parent.in_prompt
    assert len(scheduler.running) == 2, "5 shared pages and 2 fit"
    commit(scheduler, step)
    finish(scheduler)


# What a step asks of the device, and what the pace learns of it


def test_a_step_asks_for_as_many_likeliest_tokens_of_a_prompt_as_its_sequence_does() -> None:
    scheduler = make()
    for top in (3, 0, None):
        scheduler.submit([sequence([next(fresh_tokens), *range(20)], top_logprobs=top, prompt_logprobs_from=1)])
    assert [rows.top_logprobs for rows in launch(scheduler).prompt_logprobs] == [3, 0, 0]


def test_a_first_token_may_be_a_stop_unless_the_sequence_says_otherwise() -> None:
    scheduler = make()
    scheduler.submit([alone(20), sequence([next(fresh_tokens)], min_tokens=1)])
    assert [sample.banned for sample in launch(scheduler).samples] == [(), (STOP,)]


def test_the_pace_learns_what_a_step_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make()
    learnt: list[tuple[Load, float]] = []
    monkeypatch.setattr(scheduler._pace, "observe", lambda load, seconds: learnt.append((load, seconds)))
    scheduler._pace.chunk_limit = lambda *_, **__: 64  # type: ignore[method-assign]
    scheduler.submit([alone(10), alone(10)])
    commit(scheduler, launch(scheduler))
    scheduler.submit([alone(100)])
    commit(scheduler, launch(scheduler))
    commit(scheduler, launch(scheduler))
    assert learnt == [
        (Load(0, 20, 2 * 10 * 5), 0.01),
        (Load(2, 64, 64 * 32), 0.01),
        (Load(2, 36, 36 * (64 + 18)), 0.01),
    ]
