"""Scatter a step's keys and values into the pages of the cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.band import PAGE_SIZE
from kernels.gpu.checks import check


@triton.jit
def _kv_write(
    k_ptr,  # (N, H, D)
    v_ptr,  # (N, H, D)
    k_pages_ptr,  # (P, H, PAGE, D)
    v_pages_ptr,  # (P, H, PAGE, D)
    slot_mapping_ptr,  # (N,) int64
    k_stride,
    v_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    target = slot // PAGE * (H * PAGE * D) + slot % PAGE * D
    # 32 bits are enough inside a page. D is a multiple of 16, so 16 bytes never straddle two heads.
    i = tl.arange(0, BLOCK)
    inside = i // D * (PAGE * D) + i % D
    mask = i < H * D
    k = tl.load(k_ptr + token * k_stride + i, mask=mask)
    v = tl.load(v_ptr + token * v_stride + i, mask=mask)
    tl.store(k_pages_ptr + target + inside, k, mask=mask)
    tl.store(v_pages_ptr + target + inside, v, mask=mask)


def kv_write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
    """Scatter k and v (N, H, D) into contiguous pages (P, H, PAGE_SIZE, D) of the same dtype.

    Rows of k and v may lie apart, as in slices of a fused qkv; the heads of a row may not. slot_mapping (N,) int64 is
    page * PAGE_SIZE + offset of each token. Nothing checks that it lies inside the pages. If two tokens share a slot, either
    may win.
    """
    num_tokens, num_heads, head_dim = k.shape
    for name, x in (("k", k), ("v", v)):
        check(name, x, k.shape, k, rows_apart=True)
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        check(name, pages, (len(pages), num_heads, PAGE_SIZE, head_dim), k)
    check("slot_mapping", slot_mapping, (num_tokens,), k, torch.int64)
    block = triton.next_power_of_2(num_heads * head_dim)
    _kv_write[(num_tokens,)](
        k,
        v,
        k_pages,
        v_pages,
        slot_mapping,
        k.stride(0),
        v.stride(0),
        H=num_heads,
        D=head_dim,
        PAGE=PAGE_SIZE,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 8),  # 16 bytes per thread, in at most 8 warps; never tuned
        enable_fp_fusion=True,
    )
