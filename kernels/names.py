"""Names of what this folder offers, for configurations and settings. Imports nothing."""

from typing import Literal

PatternKind = Literal["dense", "banded", "strided", "fixed"]
Activation = Literal["gelu_new", "gelu", "relu"]
# auto: Triton on CUDA, PyTorch on a CPU. triton: Triton's interpreter on a CPU, for tests.
KernelChoice = Literal["auto", "triton"]

# What Ops.sample gives instead of a token id.
NOT_FINITE = -1  # a logit is NaN or infinity
NONE_LEFT = -2  # after bans and bias every logit is minus infinity
