"""Scatter a step's keys and values into the pages of the cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.band import PAGE_SIZE


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
    assert v.shape == k.shape, f"v has shape {tuple(v.shape)}, k {tuple(k.shape)}"
    for name, x in (("k", k), ("v", v)):
        assert x.stride()[1:] == (head_dim, 1), f"heads of {name} must lie side by side, strides are {x.stride()}"
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        shape = (len(pages), num_heads, PAGE_SIZE, head_dim)
        assert pages.shape == shape, f"{name} has shape {tuple(pages.shape)}, not {shape}"
        assert pages.is_contiguous(), f"{name} is not contiguous, strides are {pages.stride()}"
        assert pages.dtype == k.dtype == v.dtype, f"{name} is {pages.dtype}, k {k.dtype}, v {v.dtype}"
        assert pages.device == k.device == v.device, f"{name} is on {pages.device}, k on {k.device}, v on {v.device}"
    assert slot_mapping.shape == (num_tokens,), f"slot_mapping has shape {tuple(slot_mapping.shape)}, not ({num_tokens},)"
    assert slot_mapping.dtype == torch.int64, f"slot_mapping is {slot_mapping.dtype}, not int64"
    assert slot_mapping.is_contiguous(), f"slot_mapping is not contiguous, strides are {slot_mapping.stride()}"
    assert slot_mapping.device == k.device, f"slot_mapping is on {slot_mapping.device}, k on {k.device}"
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
        num_warps=num_warps(block),
        enable_fp_fusion=True,
    )


def num_warps(block: int) -> int:
    """16 bytes per thread, in at most 8 warps. Never tuned."""
    return min(max(block // 256, 1), 8)
