"""Page accounting: pool sizes equal the arithmetic, and the integrity check finds faults."""

import pytest

from kernels.band import PAGE_SIZE
from model.config import GPT3_SIZES, GPTConfig
from service.engine.pages import PageAllocator, page_hashes, pool_sizes, resting_pages, sequence_bytes

SMALL = GPT3_SIZES["gpt3-125m"]
DENSE = GPTConfig(vocab_size=50257, n_positions=2048, n_embd=768, n_layer=12, n_head=12, n_inner=3072)


def test_an_alternating_stack_holds_1_73_times_fewer_bytes_at_2048_tokens() -> None:
    ratio = sequence_bytes(DENSE, 2048, 2) / sequence_bytes(SMALL, 2048, 2)
    assert ratio == pytest.approx(32 / ((32 + 5) / 2))
    assert round(ratio, 2) == 1.73


def admitted(config: GPTConfig, num_tokens: int, kv_bytes: int) -> int:
    sizes = pool_sizes(config, kv_bytes=kv_bytes, item_bytes=2, max_rows=10_000, step_tokens=512)
    cache = PageAllocator(config, sizes, step_tokens=512)
    row = 0
    while cache.try_reserve(row, num_tokens):
        row += 1
    return row


def test_the_same_memory_admits_1_7_times_the_sequences() -> None:
    kv_bytes = 8 << 30
    assert admitted(SMALL, 2048, kv_bytes) / admitted(DENSE, 2048, kv_bytes) >= 1.7


def test_pool_sizes_stop_at_max_slots_and_stay_inside_the_budget() -> None:
    plenty = pool_sizes(SMALL, kv_bytes=1 << 40, item_bytes=2, max_rows=3, step_tokens=512)
    assert plenty == {"dense": 3 * 32, "banded": 3 * 5 + 8}
    budget = 300_000_000
    sizes = pool_sizes(SMALL, kv_bytes=budget, item_bytes=2, max_rows=1000, step_tokens=512)
    used = sum(pages * 2 * 6 * 768 * 64 * 2 for pages in sizes.values())
    assert 0.95 * budget < used <= budget


def test_a_budget_below_one_sequence_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="kv_bytes is 1000, but one sequence of 2048 tokens needs 43646976 bytes"):
        pool_sizes(SMALL, kv_bytes=1000, item_bytes=2, max_rows=4, step_tokens=512)


@pytest.mark.parametrize(("num_tokens", "band", "pages"), [(1, None, 1), (65, None, 2), (2048, 256, 5), (100, 256, 2)])
def test_resting_pages(num_tokens: int, band: int | None, pages: int) -> None:
    assert resting_pages(num_tokens, band) == pages


def test_faults_names_a_lost_page_and_a_page_held_twice() -> None:
    cache = PageAllocator(SMALL, {"dense": 40, "banded": 20}, step_tokens=512)
    assert cache.try_reserve(0, 200)
    cache.extend(0, 200)
    assert cache.check_integrity() == []
    lost = cache.pools["dense"].free.pop()
    assert cache.check_integrity() == ["dense: 39 pages accounted for, 39 distinct, of 40"]
    cache.pools["dense"].free.append(cache.pools["dense"].held[0].page_ids[0])
    assert cache.check_integrity() == ["dense: 40 pages accounted for, 39 distinct, of 40"]
    cache.pools["dense"].free[-1] = lost
    cache.pools["banded"].reserved += 1
    assert cache.check_integrity() == ["banded: 4 pages promised to rows, 5 booked, of 12"]
    cache.pools["banded"].reserved -= 1
    cache.pools["dense"]._holders[lost] += 1
    assert cache.check_integrity() == ["dense: rows hold 4 pages, 5 are booked"]


def test_a_sequence_fits_if_every_group_has_room_for_it() -> None:
    cache = PageAllocator(SMALL, {"dense": 3, "banded": 20}, step_tokens=512)
    assert cache.fits_when_empty(192)
    assert not cache.fits_when_empty(193)


def test_a_band_finds_a_prefix_whose_first_pages_are_gone() -> None:
    """SMALL's band is 256 tokens, so that after 10 pages only the last 4 are seen."""
    cache, prompt = PageAllocator(SMALL, {"dense": 40, "banded": 20}, step_tokens=640), list(range(640))
    hashes = page_hashes(prompt)
    assert cache.try_reserve(0, 640)
    cache.extend(0, 640)
    cache.publish(cache.fill(0, 0, 640, hashes))
    cache.free(0)
    banded = cache.pools["banded"]
    for content in hashes[:6]:
        page = banded._published[content]
        del banded.cached[page]
        banded._forget_hash(page)
        banded.free.append(page)
    assert cache.check_integrity() == []
    assert cache.prefix(hashes) == 10
    assert cache.prefix(hashes[:9]) == 0, "page 5, which the query after page 8 sees, is gone"


def test_hashes_differ_by_adapter_and_scope_wherever_one_ends_and_the_other_begins() -> None:
    prompt = list(range(PAGE_SIZE))
    pairs = [(b"", ""), (b"ab", "c"), (b"a", "bc"), (b"abc", ""), (b"", "abc"), (b"1 a", ""), (b"", "1 a")]
    assert len({page_hashes(prompt, *pair)[0] for pair in pairs}) == len(pairs)
    assert page_hashes(prompt, b"a", "b") == page_hashes(prompt, b"a", "b")


def test_a_fork_shares_the_full_pages_that_its_parent_still_holds() -> None:
    cache = PageAllocator(SMALL, {"dense": 40, "banded": 20}, step_tokens=640)
    assert cache.try_reserve(0, 700)
    assert cache.try_join(1, 0, 600, 700)
    cache.extend(0, 600)
    cache.release_passed(0, 600)
    pages, copies = cache.fork(1, 0, 600)
    parent = {group: (pool.held[0].first, list(pool.held[0].page_ids)) for group, pool in cache.pools.items()}
    assert [first for first, _ in parent.values()] == [0, 5]
    for group, (first, page_ids) in parent.items():
        shared, own = (new for new in pages if new.group == group)
        assert (shared.first, shared.page_ids) == (first, page_ids[:-1])
        assert (own.first, len(own.page_ids)) == (9, 1)
        [copy] = [copy for copy in copies if copy.group == group]
        assert (copy.source, copy.target) == (page_ids[-1], own.page_ids[0])
    assert cache.check_integrity() == []
