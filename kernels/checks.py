"""What every attention launcher asserts before a kernel trusts its pointers."""

import math

import torch
from torch import Tensor

from kernels.band import PAGE_SIZE


def check_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor) -> None:
    """q (N, H, D) with whole heads side by side, pages (P, H, PAGE_SIZE, D) contiguous and of q's dtype, table int32."""
    _, num_heads, head_dim = q.shape
    assert q.stride()[1:] == (head_dim, 1), f"heads of q must lie side by side, strides are {q.stride()}"
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        assert pages.shape[1:] == (num_heads, PAGE_SIZE, head_dim), (
            f"{name} has shape {tuple(pages.shape)} for q {tuple(q.shape)}"
        )
        assert pages.is_contiguous(), f"{name} is not contiguous"
        assert pages.dtype == q.dtype, f"{name} is {pages.dtype}, q {q.dtype}"
    assert page_table.dtype == torch.int32, f"page_table is {page_table.dtype}, not int32"
    assert page_table.stride(1) == 1, f"rows of page_table must be contiguous, strides are {page_table.stride()}"
    assert q.device == k_pages.device == v_pages.device == page_table.device, (
        "q, pages and page_table are on several devices"
    )


def scale_log2(scale: float) -> float:
    """The factor on scores for weights that are powers of 2. It must be positive: kernels take the maximum before scaling."""
    assert scale > 0, f"scale must be positive, got {scale}"
    return scale * math.log2(math.e)
