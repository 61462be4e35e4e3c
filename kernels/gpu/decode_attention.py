"""Attention of one query per sequence over paged keys: splits that run side by side, and their merge."""

import triton
import triton.language as tl
from torch import Tensor, float32

from kernels.band import PAGE_SIZE, SPLIT_PAGES
from kernels.gpu.attention import attend, launch_arguments, normalised
from kernels.plan import DecodePlan


@triton.jit
def live_splits(length, row_ptr, PATTERN: tl.constexpr, SIZE: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr):
    """Pages [first, stop) that the last of `length` positions reads, and the splits [first, stop) that hold these pages.

    With a layout "pages" are entries of the layout, and splits count from the first entry of the query's row.
    """
    if row_ptr is not None:
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
    out_ptr,  # (B, H, D): written only where the sequence has a single live split
    part_ptr,  # (B, H, SPLITS, D) fp32: each split's sum of weighted values
    peak_ptr,  # (B, H, SPLITS) fp32
    total_ptr,  # (B, H, SPLITS) fp32
    table_ptr,  # (B, W + 1) int32
    lengths_ptr,  # (B,) int64
    row_ptr,  # (rows + 1,) int32: the layout of a sparse pattern, else None, as the next
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
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    first, stop, first_split, stop_split = live_splits(length, row_ptr, PATTERN, SIZE, SPLIT, PAGE)
    split = first_split + tl.program_id(2)
    if split >= stop_split:
        return
    base = 0 if row_ptr is None else first
    stop = tl.minimum(stop, base + (split + 1) * SPLIT)
    first = tl.maximum(first, base + split * SPLIT)

    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    in_head = d < D
    # Tensor cores want 16 rows. Row 0 is the query; the others are zeros, and their results are dropped.
    q_mask = (m == 0)[:, None] & in_head[None, :]
    q = tl.load(q_ptr + sequence * q_stride + head * D + m[:, None] * 0 + d[None, :], mask=q_mask, other=0.0)
    positions = length - 1 + m * 0
    acc, peak, total = attend(
        q,
        positions,
        k_ptr + head * PAGE * D,
        v_ptr + head * PAGE * D,
        table_ptr + sequence * table_stride,
        col_ptr,
        None,
        page_stride,
        first,
        stop,
        None,
        None,
        length,
        scale_log2,
        PATTERN,
        SIZE,
        SUMMARY,
        PAGE,
        D,
        BLOCK_D,
    )
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
    row_ptr,  # (rows + 1,) int32, or None
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
    # A split of which the query sees no key has a peak of -inf, and so a weight of 0.
    weight = tl.exp2(peak - tl.max(peak, 0))
    out = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def num_splits(plan: DecodePlan) -> int:
    """The most splits that a query of any length needs. The grid of every decode step has this size."""
    width = plan.page_table.shape[1] - 1
    if plan.layout is not None:
        return triton.cdiv(plan.layout.max_blocks, SPLIT_PAGES)
    if plan.pattern.band is not None:
        # `band` keys lie in at most cdiv(band - 1, width) + 1 splits, wherever the first one starts.
        width_of_split = SPLIT_PAGES * PAGE_SIZE
        return min(triton.cdiv(width, SPLIT_PAGES), (plan.pattern.band + width_of_split - 2) // width_of_split + 1)
    return triton.cdiv(width, SPLIT_PAGES)


def decode_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, scale: float) -> Tensor:
    """See kernels.ops.Ops. q (B, H, D) may be a slice of a fused projection."""
    batch, num_heads, head_dim = q.shape
    assert plan.lengths.shape == (batch,), f"{tuple(plan.lengths.shape)} lengths for {batch} queries"
    arguments = launch_arguments("decode", q, k_pages, v_pages, plan, scale)
    splits = num_splits(plan)
    parts = {
        "part_ptr": q.new_empty((batch, num_heads, splits, head_dim), dtype=float32),
        "peak_ptr": q.new_empty((batch, num_heads, splits), dtype=float32),
        "total_ptr": q.new_empty((batch, num_heads, splits), dtype=float32),
        "lengths_ptr": plan.lengths,
        "SPLIT": SPLIT_PAGES,
    }
    _decode_attention[(batch, num_heads, splits)](**arguments, **parts)
    if splits > 1:
        shared = {name: arguments[name] for name in ("out_ptr", "row_ptr", "PATTERN", "SIZE", "PAGE", "D", "BLOCK_D")}
        _merge_splits[(batch, num_heads)](
            SPLITS=splits,
            BLOCK_S=triton.next_power_of_2(splits),
            num_warps=4,
            enable_fp_fusion=True,
            **shared,
            **parts,
        )
    out: Tensor = arguments["out_ptr"]
    return out
