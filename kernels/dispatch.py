"""Which implementation of the ops serves a device. Nothing falls back silently."""

import os

import torch

from kernels.names import KernelChoice
from kernels.ops import Ops


def choose(device: torch.device, choice: KernelChoice) -> Ops:
    """The implementation that serves `device`. "triton" runs the GPU kernels on CPU tensors, for tests.

    Raises ValueError if these would run on a CPU without Triton's interpreter, or on a GPU in it.
    """
    if device.type == "cuda" or choice == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device.type == "cpu" and not interpreted:
            raise ValueError("the Triton kernels run on a CPU in Triton's interpreter only: set TRITON_INTERPRET=1")
        if device.type == "cuda" and interpreted:
            raise ValueError("TRITON_INTERPRET=1 is set: the kernels would be interpreted, not run on the GPU; unset it")
        from kernels.gpu import triton_ops  # Triton decides at import whether it compiles or interprets, and takes a second

        return triton_ops
    from kernels import torch_ops

    return torch_ops
