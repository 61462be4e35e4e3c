"""Attention of every implementation against the reference: values, bits, and that only live keys are read."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import reference, torch_ops
from kernels.band import PAGE_SIZE, first_key, pages_of_tile, pages_spanned
from kernels.gpu import triton_ops
from kernels.patterns import Pattern
from kernels.plan import DecodePlan, PrefillPlan
from tests.kernels.cases import BANDS, DENSE, SPARSE, TOLERANCE, alone, assert_close, decode, patterns, prefill
from tests.kernels.interpreter import exact_bf16
from tests.kernels.paged import Cache, DecodeCase, PrefillCase, cache_of, decode_case, prefill_case
from tests.kernels.paths import ServedPath, served_paths

one_of_each = pytest.mark.parametrize("pattern", [DENSE, BANDS[4], SPARSE[0], SPARSE[2]], ids=lambda p: p.kind)


@pytest.fixture(autouse=True)
def bf16_is_right() -> Iterator[None]:
    torch.manual_seed(0)
    with exact_bf16():
        yield


@served_paths
@patterns
def test_decode_equals_reference(path: ServedPath, pattern: Pattern) -> None:
    # Lengths around the borders of pages, splits and bands; 2048 fills 8 splits.
    case = decode_case([1, 63, 64, 65, 256, 257, 2048, 700, 320], pattern, device=path.device)
    assert_close(decode(path.ops, case), decode(reference, case))


@served_paths
@patterns
def test_prefill_equals_reference(path: ServedPath, pattern: Pattern) -> None:
    starts, counts = [0, 0, 200, 513, 64, 255], [1, 130, 70, 5, 64, 2]
    case = prefill_case(starts, counts, pattern, device=path.device)
    assert_close(prefill(path.ops, case), prefill(reference, case))


@served_paths
@one_of_each
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        # Every head size and every dtype, with every pattern, but not every pair: the compiler takes seconds for each.
        *((dtype, 64) for dtype in TOLERANCE),
        (torch.float32, 80),
        (torch.float16, 96),
        (torch.bfloat16, 128),
    ],
)
def test_every_head_size_and_every_dtype(path: ServedPath, pattern: Pattern, dtype: torch.dtype, dim: int) -> None:
    shape: dict[str, Any] = {"dim": dim, "dtype": dtype, "device": path.device, "max_pages": 5}
    chunks = prefill_case([0, 150], [70, 9], pattern, **shape)
    assert_close(prefill(path.ops, chunks, dim**-0.5), prefill(reference, chunks, dim**-0.5))
    rows = decode_case([70, 3, 300], pattern, **shape)
    assert_close(decode(path.ops, rows, dim**-0.5), decode(reference, rows, dim**-0.5))


@served_paths
def test_scores_far_from_0_do_not_overflow(path: ServedPath) -> None:
    # fp32 rounds a score of 1000 by up to 6e-5, which is then the relative error of its weight.
    case = prefill_case([0], [70], DENSE, device=path.device)
    torch.testing.assert_close(prefill(path.ops, case, 100.0), prefill(reference, case, 100.0), atol=1e-3, rtol=1e-3)
    rows = decode_case([300], DENSE, device=path.device)
    torch.testing.assert_close(decode(path.ops, rows, 100.0), decode(reference, rows, 100.0), atol=1e-3, rtol=1e-3)


@served_paths
def test_a_score_far_above_the_others_is_not_rounded_to_16_bits(path: ServedPath) -> None:
    """Many models look at the first token this way. Rounded, its score of 40 and so its weight would be off by 0.1."""
    case = prefill_case([0], [200], DENSE, dim=64, dtype=torch.bfloat16, device=path.device)
    first, own = case.cache.page_table[0, 0].long(), case.q[150].clone()
    case.cache.k[first, :, 0] = own * 40 / own.float().square().sum(-1, keepdim=True).to(own.dtype)
    case.q[64:] = own
    assert_close(prefill(path.ops, case, 1.0), prefill(reference, case, 1.0))


@served_paths
@one_of_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decode_row_has_the_same_bits_in_any_batch(path: ServedPath, pattern: Pattern, dtype: torch.dtype) -> None:
    # More heads and rows are programs of their own, and slow to interpret.
    heads, more = (3, [900, 64, 700]) if path.ops is not triton_ops else (1, [])
    lengths = [64 * 20 + 7, 3, 2048, 65, *more]
    case = decode_case(lengths, pattern, heads=heads, dim=64, dtype=dtype, device=path.device)
    together = decode(path.ops, case)
    for i in range(len(lengths)):
        assert torch.equal(decode(path.ops, alone(case, i))[0], together[i])


@served_paths
@one_of_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_has_the_same_bits_however_it_is_cut(path: ServedPath, pattern: Pattern, dtype: torch.dtype) -> None:
    length = 700 if path.ops is not triton_ops else 200
    whole = prefill_case([0], [length], pattern, heads=1, dim=64, dtype=dtype, device=path.device)
    expected = prefill(path.ops, whole)
    for cuts in [[1, 2, 70, 130], [63, 65, 199], *([[300, 513, 699], [16, 600]] if path.ops is not triton_ops else [])]:
        for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
            plan = PrefillPlan(whole.plan.page_table, [start], [stop - start], pattern, whole.plan.layout)
            part = prefill(path.ops, PrefillCase(whole.q[start:stop], whole.cache, plan))
            assert torch.equal(part, expected[start:stop]), (start, stop)


@served_paths
@one_of_each
def test_a_prompt_has_the_same_bits_beside_others(path: ServedPath, pattern: Pattern) -> None:
    starts, counts = [30, 0, 128], [70, 9, 64]
    case = prefill_case(starts, counts, pattern, dtype=torch.bfloat16, dim=64, heads=1, device=path.device)
    together = prefill(path.ops, case)
    begin = 0
    for i, count in enumerate(counts):
        rows = slice(begin, begin + count)
        plan = PrefillPlan(case.plan.page_table[i : i + 1], [starts[i]], [count], pattern, case.plan.layout)
        assert torch.equal(prefill(path.ops, PrefillCase(case.q[rows], case.cache, plan)), together[rows])
        begin += count


@served_paths
@one_of_each
def test_the_last_query_of_a_prompt_is_near_the_same_query_decoded(path: ServedPath, pattern: Pattern) -> None:
    """Two kernels, or two ways through PyTorch: equal within a tolerance, not in bits."""
    case = prefill_case([0], [150], pattern, dim=64, device=path.device)
    plan = DecodePlan(case.plan.page_table, torch.tensor([150], device=path.device), pattern, case.plan.layout)
    row = decode(path.ops, DecodeCase(case.q[-1:], case.cache, plan))
    assert_close(row, prefill(path.ops, case)[-1:])


class PagesRead(TorchDispatchMode):
    """Counts the keys gathered from a cache, and refuses every other op on it, so that no read goes uncounted."""

    def __init__(self, cache: Cache):
        super().__init__()
        self.watched = {cache.k.untyped_storage().data_ptr(), cache.v.untyped_storage().data_ptr()}
        self.keys = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        touched = [x for x in tree_leaves(args) if isinstance(x, Tensor) and self.is_cache(x)]
        if func is torch.ops.aten.index_select.default and touched:
            self.keys += len(args[2]) * PAGE_SIZE
        elif func is torch.ops.aten.cat.default:
            self.keys += sum(x.shape[1] for x in touched)
        elif touched:
            assert func in (torch.ops.aten.select.int, torch.ops.aten.new_zeros.default), f"{func} reads the cache unseen"
        return func(*args, **(kwargs or {}))

    def is_cache(self, x: Tensor) -> bool:
        return x.numel() > 0 and not x.is_mkldnn and x.untyped_storage().data_ptr() in self.watched


@pytest.mark.parametrize("band", [1, 64, 100, 256])
def test_banded_decode_on_the_cpu_reads_at_most_band_and_a_page(band: int) -> None:
    for length in (1, 64, 204, 300, 330, 2047, 2048):
        case = decode_case([length], Pattern("banded", band))
        with PagesRead(case.cache) as read:
            decode(torch_ops, case)
        # Pages are read whole: the band is rounded up to a multiple of the page.
        assert 0 < read.keys / 2 <= -(-band // PAGE_SIZE) * PAGE_SIZE + PAGE_SIZE


def test_dense_decode_on_the_cpu_reads_each_key_once() -> None:
    case = decode_case([1000, 130], DENSE)
    with PagesRead(case.cache) as read:
        decode(torch_ops, case)
    assert read.keys / 2 == (16 + 3) * PAGE_SIZE


@pytest.mark.parametrize(("start", "count"), [(0, 700), (1000, 300), (1983, 65), (512, 1)])
def test_banded_prefill_on_the_cpu_reads_what_the_planner_names(start: int, count: int) -> None:
    band = 256
    case = prefill_case([start], [count], Pattern("banded", band))
    with PagesRead(case.cache) as read:
        prefill(torch_ops, case)
    seen = set(pages_spanned(first_key(start, band), start + count))
    tiles = pages_spanned(start, start + count)
    assert read.keys / 2 == sum(len(seen & set(pages_of_tile(tile, band))) for tile in tiles) * PAGE_SIZE


def test_sparse_attention_on_the_cpu_reads_the_listed_blocks() -> None:
    pattern = Pattern("strided", 256)
    case = prefill_case([640], [64], pattern)
    with PagesRead(case.cache) as read:
        prefill(torch_ops, case)
    # Row 10: distances 0 to 256 in blocks 6 to 10, then multiples of 256: block 2.
    assert read.keys / 2 == 6 * PAGE_SIZE
    rows = decode_case([700], pattern)
    with PagesRead(rows.cache) as read:
        decode(torch_ops, rows)
    assert read.keys / 2 == 6 * PAGE_SIZE


def gather_and_mask(q: Tensor, k: Tensor, v: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
    k.index_select(0, plan.page_table[0, : -(-(plan.starts[0] + plan.lengths[0]) // PAGE_SIZE)].long())
    return q


def test_the_count_would_catch_a_path_that_gathers_the_whole_history() -> None:
    case = prefill_case([1000], [10], Pattern("banded", 64))
    op: Callable[..., Tensor] = gather_and_mask
    with PagesRead(case.cache) as read:
        op(case.q, case.cache.k, case.cache.v, case.plan, 1.0)
    assert read.keys > 64 + 10 + 2 * PAGE_SIZE


def refused(message: str, op: Callable[..., Tensor], case: DecodeCase | PrefillCase, **changed: Any) -> None:
    arguments = {"q": case.q, "k_pages": case.cache.k, "v_pages": case.cache.v, "plan": case.plan, "scale": 1.0}
    with pytest.raises(AssertionError, match=message):
        op(**arguments | changed)


def test_launchers_refuse_what_their_kernels_do_not_expect() -> None:
    chunks, rows = prefill_case([0], [9], DENSE), decode_case([9], DENSE)
    for op, case in ((triton_ops.prefill_attention, chunks), (triton_ops.decode_attention, rows)):
        transposed = case.q.transpose(1, 2).contiguous().transpose(1, 2)
        refused("rows of q must be contiguous, strides are", op, case, q=transposed)
        refused(r"k_pages has shape \(4, 3, 64, 16\), not \(4, 2, 64, 16\)", op, case, k_pages=cache_of([9], [0], heads=3).k)
        refused("v_pages is torch.float16, not torch.float32", op, case, v_pages=case.cache.v.half())
        spread = torch.empty(*case.cache.k.shape[:3], 32)[..., ::2]
        refused(r"^k_pages must be contiguous", op, case, k_pages=spread)
        refused("scale must be positive, got -1.0", op, case, scale=-1.0)
    table = rows.plan.page_table
    wide = DecodePlan(table.long(), rows.plan.lengths, DENSE, None)
    refused("page_table is torch.int64, not torch.int32", triton_ops.decode_attention, rows, plan=wide)
    strided = DecodePlan(table.T.contiguous().T.expand(-1, 41), rows.plan.lengths, DENSE, None)
    assert strided.page_table.stride(1) == 1 or strided.page_table.shape[0] == 1
    refused(r"\(1,\) lengths for 2 queries", triton_ops.decode_attention, rows, q=rows.q.expand(2, -1, -1))
    refused("q has 9 rows for chunks of", triton_ops.prefill_attention, chunks, plan=prefill_case([0], [8], DENSE).plan)
    unlisted = PrefillPlan(table, [0], [9], SPARSE[0], None)
    refused("a strided pattern and its layout disagree", triton_ops.prefill_attention, chunks, plan=unlisted)
    layout = prefill_case([0], [9], SPARSE[0]).plan.layout
    listed = PrefillPlan(table, [0], [9], DENSE, layout)
    refused("a dense pattern and its layout disagree", triton_ops.prefill_attention, chunks, plan=listed)
    no_layout = DecodePlan(table, rows.plan.lengths, SPARSE[0], None)
    refused("a strided pattern and its layout disagree", triton_ops.decode_attention, rows, plan=no_layout)
    big = prefill_case([0], [3], DENSE, dim=144)
    with pytest.raises(ValueError, match="the attention kernels take heads of up to 128, got 144"):
        triton_ops.prefill_attention(big.q, big.cache.k, big.cache.v, big.plan, 1.0)


def test_kv_write_equals_reference_and_touches_nothing_else() -> None:
    k, v = torch.randn(2, 5, 2, 16)
    slots = torch.tensor([0, 63, 64, 200, 129])
    pools = [torch.full((4, 2, PAGE_SIZE, 16), float("nan")) for _ in range(4)]
    torch_ops.kv_write(k, v, pools[0], pools[1], slots)
    reference.kv_write(k, v, pools[2], pools[3], slots)
    for ours, expected in zip(pools[:2], pools[2:], strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True, rtol=0, atol=0)
