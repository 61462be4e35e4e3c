"""Attention of one query a sequence over paged keys, cut into splits that run side by side, and their merge."""

import triton
import triton.language as tl
from torch import Tensor, empty, float32

from kernels.band import PAGE_SIZE, SPLIT_PAGES
from kernels.gpu.checks import check_attention, scale_log2
from kernels.gpu.online_softmax import attend_page, normalised
from kernels.gpu.tiles import capability_of, padded_head_dim, tile_of
from kernels.plan import DecodePlan


@triton.jit
def live_splits(length, row_ptr, PATTERN: tl.constexpr, SIZE: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr):
    """Pages [first, stop) that the query of a sequence of `length` keys reads, and splits [first, stop) that hold them.

    In a sparse pattern pages count entries of the layout and splits begin with its row.
    """
    if PATTERN == "strided" or PATTERN == "fixed":
        row = (length - 1) // PAGE
        first = tl.load(row_ptr + row)
        stop = tl.load(row_ptr + row + 1)
        return first, stop, 0, tl.cdiv(stop - first, SPLIT)
    first = 0
    if PATTERN == "banded":
        first = tl.maximum(length - SIZE, 0) // PAGE
    stop = tl.cdiv(length, PAGE)
    return first, stop, first // SPLIT, tl.cdiv(stop, SPLIT)


@triton.jit
def _decode_attention(
    q_ptr,  # (B, H, D)
    k_ptr,  # (P, H, PAGE, D)
    v_ptr,  # (P, H, PAGE, D)
    out_ptr,  # (B, H, D): written here where the sequence has one live split
    part_ptr,  # (B, H, SPLITS, D) fp32: output of each split, not divided by its sum
    peak_ptr,  # (B, H, SPLITS) fp32
    total_ptr,  # (B, H, SPLITS) fp32
    table_ptr,  # (B, W + 1) int32
    lengths_ptr,  # (B,) int64
    row_ptr,  # (rows + 1,) int32, of a sparse pattern
    col_ptr,  # (blocks + 1,) int32
    q_stride,
    table_stride,
    page_stride,
    scale_log2,
    PATTERN: tl.constexpr,
    SIZE: tl.constexpr,
    SUMMARY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One split of one head of one sequence; programs beyond the live splits return at once."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    place = (sequence * tl.num_programs(1) + head) * tl.num_programs(2) + tl.program_id(2)
    SPARSE: tl.constexpr = PATTERN == "strided" or PATTERN == "fixed"
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    first, stop, first_split, stop_split = live_splits(length, row_ptr, PATTERN, SIZE, SPLIT, PAGE)
    split = first_split + tl.program_id(2)
    if split >= stop_split:
        return
    base = first if SPARSE else 0
    stop = tl.minimum(stop, base + (split + 1) * SPLIT)
    first = tl.maximum(first, base + split * SPLIT)

    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    in_head = d < D
    # The tensor cores want 16 rows: the others are zeros, and nobody looks at them.
    q_mask = (m == 0)[:, None] & in_head[None, :]
    q = tl.load(q_ptr + sequence * q_stride + head * D + m[:, None] * 0 + d[None, :], mask=q_mask, other=0.0)
    positions = length - 1 + m * 0
    k_ptr += head * PAGE * D
    v_ptr += head * PAGE * D
    table_ptr += sequence * table_stride
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Column and page id are carried one page ahead, as in prefill_attention.py.
    column = tl.load(col_ptr + first) if SPARSE else first
    page = tl.load(table_ptr + column).to(tl.int64)
    for i in tl.range(first, stop):
        next_column = tl.load(col_ptr + i + 1) if SPARSE else i + 1
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
            length,
            scale_log2,
            True,
            PATTERN,
            SIZE,
            SUMMARY,
            PAGE,
            D,
            BLOCK_D,
        )
        column = next_column
        page = next_page.to(tl.int64)
    if stop_split - first_split == 1:
        out = normalised(acc, total)
        out_ptrs = out_ptr + (sequence * tl.num_programs(1) + head) * D + m[:, None] * 0 + d[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=q_mask)
    else:
        tl.store(part_ptr + place * D + m[:, None] * 0 + d[None, :], acc, mask=q_mask)
        tl.store(peak_ptr + place + m * 0, peak, mask=m == 0)
        tl.store(total_ptr + place + m * 0, total, mask=m == 0)


@triton.jit
def _merge_splits(
    part_ptr,  # (B, H, SPLITS, D) fp32
    peak_ptr,  # (B, H, SPLITS) fp32
    total_ptr,  # (B, H, SPLITS) fp32
    out_ptr,  # (B, H, D)
    lengths_ptr,  # (B,) int64
    row_ptr,  # (rows + 1,) int32, of a sparse pattern
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PATTERN: tl.constexpr,
    SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the splits of one head of one sequence."""
    sequence = tl.program_id(0).to(tl.int64)
    row = sequence * tl.num_programs(1) + tl.program_id(1)
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    _, _, first_split, stop_split = live_splits(length, row_ptr, PATTERN, SIZE, SPLIT, PAGE)
    live = stop_split - first_split
    if live == 1:
        return
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    is_live = s < live
    peak = tl.load(peak_ptr + row * SPLITS + s, mask=is_live, other=float("-inf"))
    total = tl.load(total_ptr + row * SPLITS + s, mask=is_live, other=0.0)
    mask = is_live[:, None] & (d < D)[None, :]
    part = tl.load(part_ptr + (row * SPLITS + s)[:, None] * D + d[None, :], mask=mask, other=0.0)
    # Every live split holds a key that the query sees, except where a band or a pattern leaves a page nothing.
    weight = tl.exp2(peak - tl.max(peak, 0))
    out = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def num_splits(plan: DecodePlan) -> int:
    """Splits that a query can need at most, whatever its length: what the grid of every decode step is sized by."""
    width = plan.page_table.shape[1] - 1
    if plan.layout is not None:
        return triton.cdiv(plan.layout.max_blocks, SPLIT_PAGES)
    if plan.pattern.band is not None:
        # Keys [p - band + 1, p] reach into one split more than they fill, unless they fill a key of it only.
        width_of_split = SPLIT_PAGES * PAGE_SIZE
        return min(triton.cdiv(width, SPLIT_PAGES), (plan.pattern.band + width_of_split - 2) // width_of_split + 1)
    return triton.cdiv(width, SPLIT_PAGES)


def decode_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, scale: float) -> Tensor:
    """See kernels.ops.Ops. q (B, H, D) may be a slice of a fused projection."""
    check_attention(q, k_pages, v_pages, plan.page_table)
    batch, num_heads, head_dim = q.shape
    assert plan.lengths.shape == (batch,), f"{tuple(plan.lengths.shape)} lengths for {batch} queries"
    assert plan.pattern.is_sparse == (plan.layout is not None), f"a {plan.pattern.kind} pattern and its layout disagree"
    tile = tile_of("decode", capability_of(q.device), head_dim, q.element_size())
    splits = num_splits(plan)
    out = empty(q.shape, dtype=q.dtype, device=q.device)
    part = empty((batch, num_heads, splits, head_dim), dtype=float32, device=q.device)
    peak, total = (empty((batch, num_heads, splits), dtype=float32, device=q.device) for _ in range(2))
    # Without a layout the kernels never follow these two.
    row_ptr, col_idx = (plan.layout.row_ptr, plan.layout.col_idx) if plan.layout else (plan.page_table, plan.page_table)
    shape = {
        "PATTERN": plan.pattern.kind,
        "SIZE": plan.pattern.size,
        "SPLIT": SPLIT_PAGES,
        "PAGE": PAGE_SIZE,
        "D": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
    }
    _decode_attention[(batch, num_heads, splits)](
        q,
        k_pages,
        v_pages,
        out,
        part,
        peak,
        total,
        plan.page_table,
        plan.lengths,
        row_ptr,
        col_idx,
        q.stride(0),
        plan.page_table.stride(0),
        k_pages.stride(0),
        scale_log2(scale),
        SUMMARY=plan.pattern.summary,
        BLOCK_M=tile.block_m,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
        **shape,
    )
    if splits > 1:
        _merge_splits[(batch, num_heads)](
            part,
            peak,
            total,
            out,
            plan.lengths,
            row_ptr,
            SPLITS=splits,
            BLOCK_S=triton.next_power_of_2(splits),
            num_warps=4,
            enable_fp_fusion=True,
            **shape,
        )
    return out
