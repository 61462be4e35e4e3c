"""What every attention launcher asserts before a kernel trusts its pointers."""

import math

import torch
from torch import Tensor

from kernels.band import PAGE_SIZE


def check_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor) -> None:
    """q (N, H, D) with whole heads side by side, pages (P, H, PAGE_SIZE, D) contiguous and of q's dtype, table int32."""
    _, num_heads, head_dim = q.shape
    assert q.stride()[1:] == (head_dim, 1), f"heads of q must lie side by side, strides are {q.stride()}"
    shape = (num_heads, PAGE_SIZE, head_dim)
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        assert pages.shape[1:] == shape, f"{name} has shape {tuple(pages.shape)} for q {tuple(q.shape)}"
        assert pages.is_contiguous(), f"{name} is not contiguous"
        assert pages.dtype == q.dtype, f"{name} is {pages.dtype}, q {q.dtype}"
    assert page_table.dtype == torch.int32, f"page_table is {page_table.dtype}, not int32"
    assert page_table.stride(1) == 1, f"rows of page_table must be contiguous, strides are {page_table.stride()}"
    devices = {str(x.device) for x in (q, k_pages, v_pages, page_table)}
    assert len(devices) == 1, f"q, pages and page_table lie on {sorted(devices)}"


def scale_log2(scale: float) -> float:
    """The factor on scores that makes weights powers of 2. It is positive: kernels take the maximum before scaling."""
    assert scale > 0, f"scale must be positive, got {scale}"
    return scale * math.log2(math.e)
