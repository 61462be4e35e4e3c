"""What every launcher asserts: a kernel trusts the shapes, dtypes, devices and strides of its tensors."""

import torch
from torch import Tensor


def check(
    name: str,
    x: Tensor | None,
    shape: tuple[int, ...],
    like: Tensor,
    dtype: torch.dtype | None = None,
    *,
    rows_apart: bool = False,
) -> None:
    """Assert that x has `shape`, is contiguous, lies where `like` lies and has its dtype, or `dtype`. None always passes.

    With `rows_apart` only the numbers inside a row x[i], of one or two dimensions, must be contiguous.
    """
    if x is None:
        return
    wanted = dtype or like.dtype
    assert x.shape == shape, f"{name} has shape {tuple(x.shape)}, not {tuple(shape)}"
    assert x.dtype == wanted, f"{name} is {x.dtype}, not {wanted}"
    assert x.device == like.device, f"{name} is on {x.device}, not on {like.device}"
    fits = x.stride()[1:] == (*shape[2:], 1) if rows_apart else x.is_contiguous()
    assert fits, f"{'rows of ' * rows_apart}{name} must be contiguous, strides are {x.stride()}"
