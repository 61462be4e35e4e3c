"""Names that configurations and settings use for what this folder offers. Imports nothing."""

from typing import Literal

PatternKind = Literal["dense", "banded", "strided", "fixed"]
Activation = Literal["gelu_new", "gelu", "relu"]
# auto: Triton on CUDA, PyTorch on CPUs. triton: Triton's interpreter on a CPU, for tests.
KernelChoice = Literal["auto", "triton"]
