"""Products in int8 on CPUs: weights scaled per output channel, activations per row. By oneDNN, through PyTorch.

A scale for each row, and not for the whole step, so that a loud row leaves the others as they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Where 0 lies in a row: oneDNN multiplies unsigned activations.
ZERO_POINT = 128
LARGEST = 127


class Int8Weight(NamedTuple):
    """A weight (O, C) as integers of -127 to 127 and a scale for each of its rows."""

    packed: Tensor  # (C, O) int8 in oneDNN's blocked layout
    scales: Tensor  # (O,) fp32
    zero_points: Tensor  # (O,) int64, all 0: oneDNN asks for them

    def integers(self) -> Tensor:
        """(O, C) int8."""
        return self.packed.to_dense().T


def quantize_weight(weight: Tensor) -> Int8Weight:
    """Of a weight (O, C)."""
    scales = weight.float().abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
    integers = (weight.float() / scales[:, None]).round().to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(integers, None)
    return Int8Weight(packed, scales, torch.zeros(len(scales), dtype=torch.int64))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, C) as integers (N, C) uint8 around ZERO_POINT, and their scales (N, 1) in x's dtype. A NaN is one of its scale."""
    # Rounded to the dtype first: the integers are those of the very scale that they will be multiplied by.
    scales = (x.abs().amax(-1, keepdim=True).float() / LARGEST).clamp_min(torch.finfo(torch.float32).tiny).to(x.dtype)
    return ((x.float() / scales.float()).round() + ZERO_POINT).to(torch.uint8), scales


def multiply(integers: Tensor, scales: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """Quantised rows (N, C) times the weight's transpose, and bias (O,): (N, O) in the dtype of `scales`.

    Sums of products are exact, so a row has the same bits whatever stands beside it.
    """
    product = torch.ops.onednn.qlinear_pointwise(
        integers, 1.0, ZERO_POINT, *weight, None, 1.0, 0, scales.dtype, "none", [], ""
    )  # fmt: skip
    return product * scales if bias is None else torch.addcmul(bias, product, scales)
