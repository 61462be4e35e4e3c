"""The CPU path against the reference: values, and that only live keys are read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import cpu, reference
from kernels.band import PAGE_SIZE, first_key, pages_spanned, query_blocks
from kernels.plan import PrefillPlan, plan_decode

HEADS, DIM, MAX_PAGES = 2, 16, 40
BANDS = [None, 1, 63, 64, 65, 100, 256]


class Cache:
    """Sequences of random keys in scattered pages; everything that is not a live key is NaN."""

    def __init__(
        self,
        lengths: list[int],
        first_keys: list[int],
        dtype: torch.dtype = torch.float32,
        heads: int = HEADS,
        dim: int = DIM,
    ):
        num_pages = sum(-(-length // PAGE_SIZE) for length in lengths) + 3
        shape = (num_pages, heads, PAGE_SIZE, dim)
        self.k = torch.full(shape, float("nan"), dtype=dtype)
        self.v = torch.full(shape, float("nan"), dtype=dtype)
        order = iter(torch.randperm(num_pages).tolist())
        self.page_table = torch.full((len(lengths), MAX_PAGES), num_pages - 1, dtype=torch.int32)
        for i, (length, first) in enumerate(zip(lengths, first_keys, strict=True)):
            # A banded layer still holds the whole page in which its first live key stands.
            first_page = first // PAGE_SIZE
            for page in range(first_page, -(-length // PAGE_SIZE)):
                page_id = next(order)
                self.page_table[i, page] = page_id
                written = min(length - page * PAGE_SIZE, PAGE_SIZE)
                for pages in (self.k, self.v):
                    pages[page_id, :, :written] = torch.randn(heads, written, dim).to(dtype)


class PagesRead(TorchDispatchMode):
    """Counts the keys gathered from a cache, and refuses any other op on it: the reads can't go around the count."""

    def __init__(self, cache: Cache):
        super().__init__()
        self.watched = {cache.k.data_ptr(), cache.v.data_ptr()}
        self.keys = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        touched = [x for x in args if isinstance(x, Tensor) and x.data_ptr() in self.watched and x.numel()]
        if touched:
            assert func is torch.ops.aten.index_select.default, f"{func} reads the cache unseen"
            self.keys += len(args[2]) * PAGE_SIZE
        return func(*args, **(kwargs or {}))


def decode_case(lengths: list[int], band: int | None, dtype: torch.dtype) -> tuple[Tensor, Cache]:
    cache = Cache(lengths, [first_key(length - 1, band) for length in lengths], dtype)
    return torch.randn(len(lengths), HEADS, DIM).to(dtype), cache


def prefill_case(starts: list[int], counts: list[int], band: int | None, dtype: torch.dtype) -> tuple[Tensor, Cache]:
    lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    cache = Cache(lengths, [first_key(start, band) for start in starts], dtype)
    return torch.randn(sum(counts), HEADS, DIM).to(dtype), cache


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_decode_equals_reference(band: int | None, dtype: torch.dtype, tolerance: float) -> None:
    lengths = [1, 63, 64, 65, 257, 2048, 700, 320]
    q, cache = decode_case(lengths, band, dtype)
    plan = plan_decode(cache.page_table, torch.tensor(lengths), band)
    out = cpu.decode_attention(q, cache.k, cache.v, plan, 0.3)
    expected = reference.decode_attention(q, cache.k, cache.v, plan, 0.3)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)])
def test_prefill_equals_reference(band: int | None, dtype: torch.dtype, tolerance: float) -> None:
    starts, counts = [0, 0, 200, 513, 64], [1, 130, 300, 5, 64]
    q, cache = prefill_case(starts, counts, band, dtype)
    plan = PrefillPlan(cache.page_table, starts, counts, band)
    out = cpu.prefill_attention(q, cache.k, cache.v, plan, 0.3)
    expected = reference.prefill_attention(q, cache.k, cache.v, plan, 0.3)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("band", [None, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decode_row_has_the_same_bits_in_any_batch(band: int | None, dtype: torch.dtype) -> None:
    lengths = [64 * 20 + 7, 3, 900, 2048, 65, 64, 700]
    heads, dim = 12, 64
    cache = Cache(lengths, [first_key(length - 1, band) for length in lengths], dtype, heads, dim)
    q = torch.randn(len(lengths), heads, dim).to(dtype)
    together = cpu.decode_attention(q, cache.k, cache.v, plan_decode(cache.page_table, torch.tensor(lengths), band), 0.25)
    for i, length in enumerate(lengths):
        plan = plan_decode(cache.page_table[i : i + 1], torch.tensor([length]), band)
        alone = cpu.decode_attention(q[i : i + 1], cache.k, cache.v, plan, 0.25)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("band", [1, 64, 100, 256])
def test_banded_decode_reads_at_most_band_and_a_page(band: int) -> None:
    for length in (1, 64, 204, 300, 330, 2047, 2048):
        q, cache = decode_case([length], band, torch.float32)
        plan = plan_decode(cache.page_table, torch.tensor([length]), band)
        with PagesRead(cache) as read:
            cpu.decode_attention(q, cache.k, cache.v, plan, 1.0)
        # Pages are read whole: a band that is no multiple of the page is rounded up to one.
        assert 0 < read.keys / 2 <= -(-band // PAGE_SIZE) * PAGE_SIZE + PAGE_SIZE


def test_dense_decode_reads_each_key_once() -> None:
    q, cache = decode_case([1000, 130], None, torch.float32)
    plan = plan_decode(cache.page_table, torch.tensor([1000, 130]), None)
    with PagesRead(cache) as read:
        cpu.decode_attention(q, cache.k, cache.v, plan, 1.0)
    assert read.keys / 2 == (16 + 3) * PAGE_SIZE


@pytest.mark.parametrize(("start", "count"), [(0, 700), (1000, 300), (1983, 65), (512, 1)])
def test_banded_prefill_reads_what_the_planner_names(start: int, count: int) -> None:
    band = 256
    q, cache = prefill_case([start], [count], band, torch.float32)
    with PagesRead(cache) as read:
        cpu.prefill_attention(q, cache.k, cache.v, PrefillPlan(cache.page_table, [start], [count], band), 1.0)
    named = {
        page for block in query_blocks(start, start + count, band) for page in pages_spanned(block.first_key, block.stop)
    }
    assert 0 < read.keys / 2 <= len(named) * PAGE_SIZE
    assert len(named) * PAGE_SIZE <= band + count + 2 * PAGE_SIZE


def gather_and_mask(q: Tensor, k: Tensor, v: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
    k.index_select(0, plan.page_table[0, : -(-(plan.starts[0] + plan.lengths[0]) // PAGE_SIZE)].long())
    return q


def test_the_count_would_catch_a_path_that_gathers_the_whole_history() -> None:
    q, cache = prefill_case([1000], [10], 64, torch.float32)
    plan = PrefillPlan(cache.page_table, [1000], [10], 64)
    op: Callable[..., Tensor] = gather_and_mask
    with PagesRead(cache) as read:
        op(q, cache.k, cache.v, plan, 1.0)
    assert read.keys > 64 + 10 + 2 * PAGE_SIZE


def test_kv_write_equals_reference_and_touches_nothing_else() -> None:
    k, v = torch.randn(5, HEADS, DIM), torch.randn(5, HEADS, DIM)
    slots = torch.tensor([0, 63, 64, 200, 129])
    pools = [torch.full((4, HEADS, PAGE_SIZE, DIM), float("nan")) for _ in range(4)]
    cpu.kv_write(k, v, pools[0], pools[1], slots)
    reference.kv_write(k, v, pools[2], pools[3], slots)
    for ours, expected in zip(pools[:2], pools[2:], strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True, rtol=0, atol=0)
