"""Attention of prompt chunks over the key blocks that a layout lists: the general form, for strided and fixed patterns."""

import triton
import triton.language as tl
from torch import Tensor, empty

from kernels.band import PAGE_SIZE
from kernels.gpu.checks import check_attention, scale_log2
from kernels.gpu.online_softmax import attend_page, normalised
from kernels.gpu.tiles import capability_of, padded_head_dim, tile_of
from kernels.plan import PrefillPlan


@triton.jit
def _block_sparse_attention(
    q_ptr,  # (N, H, D)
    k_ptr,  # (P, H, PAGE, D)
    v_ptr,  # (P, H, PAGE, D)
    out_ptr,  # (N, H, D)
    table_ptr,  # (chunks, W + 1) int32
    chunks_ptr,  # (chunks, 3) int32: start, length, first row of q
    row_ptr,  # (rows + 1,) int32
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
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row of the layout, which a chunk may cover in part: rows count absolute positions, wherever the chunk begins."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(2).to(tl.int64)
    start = tl.load(chunks_ptr + chunk * 3)
    num_keys = start + tl.load(chunks_ptr + chunk * 3 + 1)
    first_row = tl.load(chunks_ptr + chunk * 3 + 2)
    row = start // PAGE + tile
    if row * PAGE >= num_keys:
        return
    m, d = tl.arange(0, PAGE), tl.arange(0, BLOCK_D)
    positions = row * PAGE + m
    rows = first_row.to(tl.int64) + positions - start
    mask = ((positions >= start) & (positions < num_keys))[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + rows[:, None] * q_stride + head * D + d[None, :], mask=mask, other=0.0)
    k_ptr += head * PAGE * D
    v_ptr += head * PAGE * D
    table_ptr += chunk * table_stride
    acc = tl.zeros((PAGE, BLOCK_D), tl.float32)
    peak = tl.full((PAGE,), float("-inf"), tl.float32)
    total = tl.zeros((PAGE,), tl.float32)
    first = tl.load(row_ptr + row)
    stop = tl.load(row_ptr + row + 1)
    # Column, page id and flag are carried one block ahead, as in prefill_attention.py.
    column = tl.load(col_ptr + first)
    partial = tl.load(partial_ptr + first)
    page = tl.load(table_ptr + column).to(tl.int64)
    for i in tl.range(first, stop):
        next_column = tl.load(col_ptr + i + 1)
        next_partial = tl.load(partial_ptr + i + 1)
        next_page = tl.load(table_ptr + next_column)
        acc, peak, total = attend_page(
            acc,
            peak,
            total,
            q,
            positions,
            k_ptr + page * page_stride,
            v_ptr + page * page_stride,
            column * PAGE,
            num_keys,
            scale_log2,
            partial != 0,
            PATTERN,
            SIZE,
            SUMMARY,
            PAGE,
            D,
            BLOCK_D,
        )
        column = next_column
        partial = next_partial
        page = next_page.to(tl.int64)
    out = normalised(acc, total)
    tl.store(out_ptr + rows[:, None] * out_stride + head * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def block_sparse_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
    """See kernels.ops.Ops. q (N, H, D) may be a slice of a fused projection; the plan must have a layout."""
    check_attention(q, k_pages, v_pages, plan.page_table)
    layout = plan.layout
    assert layout is not None, f"a {plan.pattern.kind} pattern has no block layout"
    assert q.shape[0] == sum(plan.lengths), f"q has {q.shape[0]} rows for chunks of {plan.lengths}"
    num_heads, head_dim = q.shape[1:]
    tile = tile_of("block_sparse", capability_of(q.device), head_dim, q.element_size())
    assert tile.block_m == PAGE_SIZE, f"a tile of {tile.block_m} queries is no row of the layout"
    out = empty(q.shape, dtype=q.dtype, device=q.device)
    # A chunk that begins inside a row may reach into one row more than its length says.
    grid = (triton.cdiv(max(plan.lengths), PAGE_SIZE) + 1, num_heads, len(plan.lengths))
    _block_sparse_attention[grid](
        q,
        k_pages,
        v_pages,
        out,
        plan.page_table,
        plan.chunks,
        layout.row_ptr,
        layout.col_idx,
        layout.partial,
        q.stride(0),
        out.stride(0),
        plan.page_table.stride(0),
        k_pages.stride(0),
        scale_log2(scale),
        PATTERN=plan.pattern.kind,
        SIZE=plan.pattern.size,
        SUMMARY=plan.pattern.summary,
        PAGE=PAGE_SIZE,
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    return out
