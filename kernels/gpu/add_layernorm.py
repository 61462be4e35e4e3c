"""Residual sum and LayerNorm in one pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.checks import check


@triton.jit
def _add_layernorm(
    x_ptr,  # (N, C)
    residual_ptr,  # (N, C) or None
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    normed_ptr,  # (N, C) contiguous
    total_ptr,  # (N, C) contiguous, or None where there is no residual
    x_stride,
    residual_stride,
    C,
    eps,
    BLOCK: tl.constexpr,
):
    """One row, held in registers: the mean first, then the mean of squared differences, which can't cancel."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < C
    total = tl.load(x_ptr + row * x_stride + i, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + row * residual_stride + i, mask=mask, other=0.0).to(tl.float32)
        # Statistics of the rounded sum: that is what the next layer reads back.
        rounded = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * C + i, rounded, mask=mask)
        total = rounded.to(tl.float32)
    mean = tl.sum(total, axis=0) / C
    centered = tl.where(mask, total - mean, 0.0)
    normed = centered * tl.rsqrt(tl.sum(centered * centered, axis=0) / C + eps)
    if weight_ptr is not None:
        normed *= tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row * C + i, normed.to(normed_ptr.dtype.element_ty), mask=mask)


def add_layernorm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(LayerNorm(total), total), where total is x + residual rounded to the dtype, or x itself without a residual.

    Rows of x and residual (N, C) may lie apart. weight and bias (C,) may be None. All have one dtype; statistics are fp32.
    Keeps no gradient.
    """
    num_rows, width = x.shape
    assert not (torch.is_grad_enabled() and x.requires_grad), "add_layernorm keeps no gradient, and x requires one"
    check("x", x, x.shape, x, rows_apart=True)
    check("residual", residual, x.shape, x, rows_apart=True)
    check("weight", weight, (width,), x)
    check("bias", bias, (width,), x)
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x if residual is None else torch.empty_like(normed)
    block = triton.next_power_of_2(width)
    _add_layernorm[(num_rows,)](
        x,
        residual,
        weight,
        bias,
        normed,
        None if residual is None else total,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        width,
        eps,
        BLOCK=block,
        # 8 to 32 elements per thread, so that the row stays in registers; never tuned.
        num_warps=min(max(block // 256, 1), 16),
        enable_fp_fusion=True,
    )
    return normed, total
