"""Attention of prompt chunks over paged keys: dense or banded, ragged batch, key tiles on absolute borders."""

import triton
import triton.language as tl
from torch import Tensor, empty

from kernels.band import PAGE_SIZE
from kernels.gpu.checks import check_attention, scale_log2
from kernels.gpu.online_softmax import attend_page, normalised
from kernels.gpu.tiles import capability_of, padded_head_dim, tile_of
from kernels.plan import PrefillPlan


@triton.jit
def _prefill_attention(
    q_ptr,  # (N, H, D)
    k_ptr,  # (P, H, PAGE, D)
    v_ptr,  # (P, H, PAGE, D)
    out_ptr,  # (N, H, D)
    table_ptr,  # (chunks, W + 1) int32
    chunks_ptr,  # (chunks, 3) int32: start, length, first row of q
    q_stride,
    out_stride,
    table_stride,
    page_stride,
    scale_log2,
    PATTERN: tl.constexpr,
    SIZE: tl.constexpr,
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
    length = tl.load(chunks_ptr + chunk * 3 + 1)
    first_row = tl.load(chunks_ptr + chunk * 3 + 2)
    if tile * BLOCK_M >= length:
        return
    begin = start + tile * BLOCK_M
    num_keys = start + length
    end = tl.minimum(begin + BLOCK_M, num_keys)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    positions = begin + m
    rows = first_row.to(tl.int64) + tile * BLOCK_M + m
    mask = (positions < num_keys)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + rows[:, None] * q_stride + head * D + d[None, :], mask=mask, other=0.0)

    # Every query of the tile sees all of pages [lo, hi). Those before straddle the left edge of the band, those after the
    # diagonal; one loop takes all three, so that its pipeline never drains in between.
    if PATTERN == "banded":
        first = tl.maximum(begin - SIZE + 1, 0) // PAGE
        lo = tl.cdiv(tl.maximum(end - SIZE, 0), PAGE)
    else:
        first = 0
        lo = 0
    hi = (begin + 1) // PAGE
    k_ptr += head * PAGE * D
    v_ptr += head * PAGE * D
    table_ptr += chunk * table_stride
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Each page id is loaded one page ahead and carried: loaded in the same iteration it would hold up the pipeline of tiles.
    # So every table has one entry of padding.
    page = tl.load(table_ptr + first).to(tl.int64)
    for i in tl.range(first, tl.cdiv(end, PAGE)):
        next_page = tl.load(table_ptr + i + 1)
        acc, peak, total = attend_page(
            acc,
            peak,
            total,
            q,
            positions,
            k_ptr + page * page_stride,
            v_ptr + page * page_stride,
            i * PAGE,
            num_keys,
            scale_log2,
            (i < lo) | (i >= hi),
            PATTERN,
            SIZE,
            0,
            PAGE,
            D,
            BLOCK_D,
        )
        page = next_page.to(tl.int64)
    out = normalised(acc, total)
    tl.store(out_ptr + rows[:, None] * out_stride + head * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def prefill_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
    """See kernels.ops.Ops. q (N, H, D) may be a slice of a fused projection; the pattern must not be sparse."""
    check_attention(q, k_pages, v_pages, plan.page_table)
    assert plan.layout is None, f"a {plan.pattern.kind} pattern needs block_sparse_attention"
    assert q.shape[0] == sum(plan.lengths), f"q has {q.shape[0]} rows for chunks of {plan.lengths}"
    num_heads, head_dim = q.shape[1:]
    tile = tile_of("prefill", capability_of(q.device), head_dim, q.element_size())
    out = empty(q.shape, dtype=q.dtype, device=q.device)
    grid = (triton.cdiv(max(plan.lengths), tile.block_m), num_heads, len(plan.lengths))
    _prefill_attention[grid](
        q,
        k_pages,
        v_pages,
        out,
        plan.page_table,
        plan.chunks,
        q.stride(0),
        out.stride(0),
        plan.page_table.stride(0),
        k_pages.stride(0),
        scale_log2(scale),
        PATTERN=plan.pattern.kind,
        SIZE=plan.pattern.size,
        BLOCK_M=tile.block_m,
        PAGE=PAGE_SIZE,
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    return out
