"""Products in int8 on CPUs: what is rounded how, and the products by oneDNN, through PyTorch.

N rows, O and C the channels and columns of a weight. A weight has a scale for each channel, activations have one for each
row: with one scale for the whole step, a loud row would change the others.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import PackedWeight

# Added to the integers of a row, because oneDNN multiplies unsigned activations.
ZERO_POINT = 128
LARGEST = 127


@dataclass(frozen=True, eq=False)
class Int8Weight(PackedWeight):
    """A weight (O, C) as integers of -127 to 127 and a scale for each channel."""

    scales: Tensor  # (O,) fp32, or longer

    @abstractmethod
    def integers(self) -> Tensor:
        """(O, C) int8."""

    def dense(self) -> Tensor:
        integers = self.integers().double()
        return integers * self.scales[: len(integers), None]


@dataclass(frozen=True, eq=False)
class OneDNNWeight(Int8Weight):
    packed: Tensor  # (C, O) int8 in oneDNN's blocked layout
    zero_points: Tensor  # (O,) int64, all 0: oneDNN asks for them

    def integers(self) -> Tensor:
        return self.packed.to_dense().T


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (O, C) as integers (O, C) int8, and scales (O,) fp32."""
    scales = weight.float().abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
    return (weight.float() / scales[:, None]).round().to(torch.int8), scales


def quantize_weight(weight: Tensor) -> OneDNNWeight:
    """A weight (O, C) packed for `multiply`."""
    integers, scales = quantize_channels(weight)
    packed = torch.ops.onednn.qlinear_prepack(integers, None)
    return OneDNNWeight(scales, packed, torch.zeros(len(scales), dtype=torch.int64))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, C) as integers (N, C) uint8 around ZERO_POINT, and scales (N, 1) in x's dtype; NaN makes a NaN scale."""
    # Rounded to the dtype first: the integers are those of the very scale that they will be multiplied by.
    scales = (x.abs().amax(-1, keepdim=True).float() / LARGEST).clamp_min(torch.finfo(torch.float32).tiny).to(x.dtype)
    return ((x.float() / scales.float()).round() + ZERO_POINT).to(torch.uint8), scales


def multiply(integers: Tensor, scales: Tensor, weight: OneDNNWeight, bias: Tensor | None) -> Tensor:
    """Quantised rows (N, C) times the weight's transpose, and bias (O,): (N, O) in the dtype of `scales`.

    Sums of products are exact, so a row has the same bits in any batch.
    """
    channels = weight.packed, weight.scales, weight.zero_points
    product = torch.ops.onednn.qlinear_pointwise(
        integers, 1.0, ZERO_POINT, *channels, None, 1.0, 0, scales.dtype, "none", [], ""
    )  # fmt: skip
    return product * scales if bias is None else torch.addcmul(bias, product, scales)
