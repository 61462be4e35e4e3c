"""Attention of prompt chunks over paged keys: any pattern, ragged batch, key tiles on absolute borders."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.band import PAGE_SIZE
from kernels.gpu.attention import attend, launch_arguments, normalised
from kernels.plan import PrefillPlan


@triton.jit
def _prefill_attention(
    q_ptr,  # (N, H, D)
    k_ptr,  # (P, H, PAGE, D)
    v_ptr,  # (P, H, PAGE, D)
    out_ptr,  # (N, H, D)
    table_ptr,  # (chunks, W + 1) int32
    chunks_ptr,  # (chunks, 3) int32: start, length, first row of q
    row_ptr,  # (rows + 1,) int32: the layout of a sparse pattern, else None, as the next two
    col_ptr,  # (blocks + 1,) int32
    partial_ptr,  # (blocks + 1,) int32
    q_stride,
    out_stride,
    table_stride,
    page_stride,
    scale_log2,
    PATTERN: tl.constexpr,
    SIZE: tl.constexpr,
    SUMMARY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of queries of one head of one chunk. Tiles beyond the chunk's end return at once."""
    # The last tiles of a prompt have the most keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(2).to(tl.int64)
    start = tl.load(chunks_ptr + chunk * 3)
    num_keys = start + tl.load(chunks_ptr + chunk * 3 + 1)
    first_row = tl.load(chunks_ptr + chunk * 3 + 2)
    # A layout's rows count absolute positions, so that a chunk may cover its first row in part.
    begin = start + tile * BLOCK_M if row_ptr is None else (start // PAGE + tile) * PAGE
    if begin >= num_keys:
        return
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    positions = begin + m
    in_chunk = positions < num_keys
    if row_ptr is not None:
        in_chunk &= positions >= start
    rows = first_row.to(tl.int64) + positions - start
    mask = in_chunk[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + rows[:, None] * q_stride + head * D + d[None, :], mask=mask, other=0.0)

    # Pages before the full ones straddle the left edge of the band, those after them the diagonal. One loop takes all
    # three, so that its pipeline never drains in between.
    if row_ptr is not None:
        row = begin // PAGE
        first = tl.load(row_ptr + row)
        stop = tl.load(row_ptr + row + 1)
        first_full = None
        stop_full = None
    else:
        end = tl.minimum(begin + BLOCK_M, num_keys)
        first = 0
        first_full = 0
        if PATTERN == "banded":
            first = tl.maximum(begin - SIZE + 1, 0) // PAGE
            first_full = tl.cdiv(tl.maximum(end - SIZE, 0), PAGE)
        stop_full = (begin + 1) // PAGE
        stop = tl.cdiv(end, PAGE)
    acc, _, total = attend(
        q,
        positions,
        k_ptr + head * PAGE * D,
        v_ptr + head * PAGE * D,
        table_ptr + chunk * table_stride,
        col_ptr,
        partial_ptr,
        page_stride,
        first,
        stop,
        first_full,
        stop_full,
        num_keys,
        scale_log2,
        PATTERN,
        SIZE,
        SUMMARY,
        PAGE,
        D,
        BLOCK_D,
    )
    out = normalised(acc, total)
    tl.store(out_ptr + rows[:, None] * out_stride + head * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def prefill_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
    """See kernels.ops.Ops. q (N, H, D) may be a slice of a fused projection."""
    assert q.shape[0] == sum(plan.lengths), f"q has {q.shape[0]} rows for chunks of {plan.lengths}"
    layout = plan.layout
    arguments = launch_arguments("block_sparse" if layout else "prefill", q, k_pages, v_pages, plan, scale)
    out, block_m = arguments["out_ptr"], arguments["BLOCK_M"]
    num_tiles = triton.cdiv(max(plan.lengths), block_m)
    if layout:
        assert block_m == PAGE_SIZE, f"a tile of {block_m} queries is no row of the layout"
        num_tiles += 1  # a chunk that begins inside a row may reach into one row more than its length says
    _prefill_attention[(num_tiles, q.shape[1], len(plan.lengths))](
        chunks_ptr=plan.chunks, partial_ptr=layout and layout.partial, out_stride=out.stride(0), **arguments
    )
    return out
