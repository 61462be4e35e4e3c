"""Bias and activation of the MLP in one pass over memory."""

import math
from typing import get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.checks import check
from kernels.names import Activation

BLOCK = 1024  # columns of a program: 16 bytes per thread in 4 warps; never tuned
NUM_WARPS = 4
SQRT_8_OVER_PI = tl.constexpr(math.sqrt(8 / math.pi))
SQRT_HALF = tl.constexpr(math.sqrt(0.5))


@triton.jit
def _bias_activation(
    x_ptr,  # (N, C), overwritten
    bias_ptr,  # (C,) or None
    x_stride,
    C,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < C
    x = tl.load(x_ptr + row * x_stride + i, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + i, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu_new":
        # (1 + tanh(z / 2)) / 2 is the logistic function of z. exp of -|z| can't overflow.
        z = SQRT_8_OVER_PI * (x + 0.044715 * x * x * x)
        small = tl.exp(-tl.abs(z))
        y = x * tl.where(z < 0, small, 1.0) / (1.0 + small)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    else:
        y = tl.where(x < 0, 0.0, x)  # keeps a NaN, which tl.maximum would hide
    tl.store(x_ptr + row * x_stride + i, y.to(x_ptr.dtype.element_ty), mask=mask)


def bias_activation(x: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """activation(x + bias), in place. Rows of x (N, C) may lie apart; bias (C,) has the same dtype or is None.

    "gelu_new" is the tanh form, "gelu" the erf form. Computes in fp32 and keeps no gradient.
    """
    num_rows, width = x.shape
    assert activation in get_args(Activation), f"unknown activation {activation!r}"
    assert not (torch.is_grad_enabled() and x.requires_grad), "bias_activation keeps no gradient, and x requires one"
    check("x", x, x.shape, x, rows_apart=True)
    check("bias", bias, (width,), x)
    _bias_activation[(num_rows, triton.cdiv(width, BLOCK))](
        x,
        bias,
        x.stride(0),
        width,
        ACTIVATION=activation,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return x
