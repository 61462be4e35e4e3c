"""Weights as csrc/products.h reads them: in panels of channels, from front to back.

O and C are the channels and columns of a weight, O' and C' the same padded.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.int8 import Int8Weight
from kernels.names import Activation
from kernels.ops import PackedWeight

# csrc/abi.h explains these. kernels.cpu.abi.layout has the compiler check that both files say the same.
LANES, GROUP, BLOCK, PANELS, OFFSET = 16, 4, 64, 2, 128
# The enum Activation there.
ACTIVATIONS: dict[Activation | None, int] = {None: 0, "relu": 1, "gelu": 2, "gelu_new": 3}


def to_panels(numbers: Tensor, padding: float = 0) -> Tensor:
    """(O, C) of one or two bytes as (O' / LANES, C' / n, LANES, n), n of them in a GROUP, with `padding` up to O' and C'."""
    size = numbers.element_size()
    channels, columns = numbers.shape
    padded = F.pad(numbers, (0, -columns % (BLOCK // size), 0, -channels % (PANELS * LANES)), value=padding)
    return padded.unflatten(1, (-1, GROUP // size)).unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


def from_panels(panels: Tensor, channels: int, columns: int) -> Tensor:
    return panels.transpose(1, 2).flatten(2).flatten(0, 1)[:channels, :columns]


@dataclass(frozen=True, eq=False)
class Int8Panels(Int8Weight):
    """`scales` are (O',)."""

    panels: Tensor  # uint8: the integers + OFFSET
    shape: tuple[int, int]  # (O, C)

    @property
    def padded(self) -> int:
        """C', the length of the rows that the panels are multiplied with."""
        return self.panels[0].numel() // LANES

    def integers(self) -> Tensor:
        return (from_panels(self.panels, *self.shape).to(torch.int16) - OFFSET).to(torch.int8)


@dataclass(frozen=True, eq=False)
class Bf16Panels(PackedWeight):
    panels: Tensor  # bfloat16
    shape: tuple[int, int]  # (O, C)

    def dense(self) -> Tensor:
        return from_panels(self.panels, *self.shape)
