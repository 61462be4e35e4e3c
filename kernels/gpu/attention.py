"""What the attention kernels share: on the device the loop over a sequence's pages, on the host what every launch takes.

N queries, H heads of size D (padded to BLOCK_D), M queries of a program, P pages of PAGE keys, W pages of a sequence.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.band import PAGE_SIZE
from kernels.gpu.checks import check
from kernels.gpu.tiles import Phase, capability_of, padded_head_dim, tile_of
from kernels.plan import DecodePlan, PrefillPlan


@triton.jit
def sees(q, k, PATTERN: tl.constexpr, SIZE: tl.constexpr, SUMMARY: tl.constexpr):
    """kernels.patterns.Pattern.sees, on the device."""
    seen = q >= k
    if PATTERN == "banded":
        seen &= q - k < SIZE
    elif PATTERN == "strided":
        seen &= (q - k < SIZE) | ((q - k) % SIZE == 0)
    elif PATTERN == "fixed":
        seen &= (q // SIZE == k // SIZE) | (k % SIZE >= SIZE - SUMMARY)
    return seen


@triton.jit
def attend(
    q,  # (M, BLOCK_D)
    positions,  # (M,) of the queries
    k_ptr,  # (P, H, PAGE, D), from the first page of the program's head on
    v_ptr,  # (P, H, PAGE, D)
    table_ptr,  # (W + 1,) int32: pages of the sequence
    col_ptr,  # (blocks + 1,) int32: columns of the layout, or None
    partial_ptr,  # (blocks + 1,) int32: 0 where every query sees every key, or None
    page_stride,
    first,  # pages [first, stop) of the sequence, or entries of the layout
    stop,
    first_full,  # every query sees all of pages [first_full, stop_full), so they need no mask
    stop_full,  # None: partial_ptr says which pages need one, or all do
    num_keys,  # keys written so far: memory after them may hold anything, NaN included
    scale_log2,  # positive, since the maximum is taken before scaling
    PATTERN: tl.constexpr,
    SIZE: tl.constexpr,
    SUMMARY: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of weighted values (M, BLOCK_D), highest score in units of log 2 (M,) and sum of weights (M,), all in fp32.

    A page of which a row sees nothing leaves the row's bits as they are. So a row's bits do not depend on the other rows of
    its tile, nor on where a chunk began.
    """
    n, d = tl.arange(0, PAGE), tl.arange(0, BLOCK_D)
    offsets = n[:, None] * D + d[None, :]
    in_head = d[None, :] < D
    acc = tl.zeros(q.shape, tl.float32)
    peak = tl.full(positions.shape, float("-inf"), tl.float32)
    total = tl.zeros(positions.shape, tl.float32)
    # Each page id is loaded one page ahead and carried: a load in the same iteration would hold up the pipeline of tiles.
    # So every table and every layout has one entry of padding.
    column = first if col_ptr is None else tl.load(col_ptr + first)
    page = tl.load(table_ptr + column).to(tl.int64)
    partial = True if partial_ptr is None else tl.load(partial_ptr + first) != 0
    for i in tl.range(first, stop):
        next_column = i + 1 if col_ptr is None else tl.load(col_ptr + i + 1)
        next_page = tl.load(table_ptr + next_column)
        keys = column * PAGE + n
        k = tl.load(k_ptr + page * page_stride + offsets, mask=in_head, other=0.0)
        # Values never written may be NaN, and 0 * NaN is NaN: a weight of 0 would not hide them.
        v_mask = in_head & (keys < num_keys)[:, None]
        v = tl.load(v_ptr + page * page_stride + offsets, mask=v_mask, other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee")
        if stop_full is not None:
            partial = (i < first_full) | (i >= stop_full)
        if partial:
            scores = tl.where(sees(positions[:, None], keys[None, :], PATTERN, SIZE, SUMMARY), scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
        # A row that has seen no key yet has no peak, and -inf - -inf is NaN.
        reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores * scale_log2 - reference[:, None])
        rescale = tl.exp2(peak - reference)
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        peak = new_peak
        column = next_column
        page = next_page.to(tl.int64)
        if partial_ptr is not None:
            partial = tl.load(partial_ptr + i + 1) != 0
    return acc, peak, total


@triton.jit
def normalised(acc, total):
    """The output: acc divided by the sum of weights. A padding row may have seen no key: it becomes 0."""
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


def launch_arguments(
    phase: Phase, q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan | PrefillPlan, scale: float
) -> dict[str, Any]:
    """What every attention kernel takes, by name, the output that it fills included. Asserts what a kernel trusts.

    Rows of q (N, H, D) may lie apart. Pages (P, H, PAGE_SIZE, D) are contiguous and of q's dtype.
    """
    _, num_heads, head_dim = q.shape
    table, layout, pattern = plan.page_table, plan.layout, plan.pattern
    check("q", q, q.shape, q, rows_apart=True)
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        check(name, pages, (len(pages), num_heads, PAGE_SIZE, head_dim), q)
    check("page_table", table, table.shape, q, torch.int32, rows_apart=True)
    assert pattern.is_sparse == (layout is not None), f"a {pattern.kind} pattern and its layout disagree"
    assert scale > 0, f"scale must be positive, got {scale}"
    tile = tile_of(phase, capability_of(q.device), head_dim, q.element_size())
    return {
        "q_ptr": q,
        "k_ptr": k_pages,
        "v_ptr": v_pages,
        "out_ptr": torch.empty(q.shape, dtype=q.dtype, device=q.device),
        "table_ptr": table,
        "row_ptr": layout and layout.row_ptr,
        "col_ptr": layout and layout.col_idx,
        "q_stride": q.stride(0),
        "table_stride": table.stride(0),
        "page_stride": k_pages.stride(0),
        "scale_log2": scale * math.log2(math.e),
        "PATTERN": pattern.kind,
        "SIZE": pattern.size,
        "SUMMARY": pattern.summary,
        "BLOCK_M": tile.block_m,
        "PAGE": PAGE_SIZE,
        "D": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }
