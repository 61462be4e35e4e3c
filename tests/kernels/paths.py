"""The implementations that serve, as parameters of a test: two on a CPU, and Triton's in its interpreter and on a GPU."""

from collections.abc import Callable
from typing import NamedTuple, cast

import pytest
import torch
from torch import Tensor

from kernels import reference, torch_ops, torch_sampling
from kernels.gpu import sampling, triton_ops
from kernels.ops import Ops
from kernels.sampling_state import SamplingState
from tests.kernels.compiled import AnyCompiled, compiled_ops

Sample = Callable[[Tensor, SamplingState, Tensor, Tensor], Tensor]


def compiled_sample(variant: str) -> Sample:
    return lambda *arguments: compiled_ops(16, torch.float32, variant).sample(*arguments)


SAMPLERS: dict[str, Sample] = {
    "reference": reference.sample,
    "cpu": torch_sampling.sample,
    "compiled": compiled_sample("compiled"),
    "compiled for AVX2": compiled_sample("compiled for AVX2"),
    "triton": sampling.sample,
}


class ServedPath(NamedTuple):
    ops: Ops
    device: torch.device


CPU_PATH = ServedPath(torch_ops, torch.device("cpu"))
COMPILED = ServedPath(cast(Ops, AnyCompiled()), torch.device("cpu"))
INTERPRETED = ServedPath(triton_ops, torch.device("cpu"))
CUDA = ServedPath(triton_ops, torch.device("cuda"))

triton_paths = pytest.mark.parametrize(
    "path", [pytest.param(INTERPRETED, id="interpreted"), pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu)]
)
served_paths = pytest.mark.parametrize(
    "path",
    [
        pytest.param(CPU_PATH, id="cpu"),
        pytest.param(COMPILED, id="compiled"),
        pytest.param(INTERPRETED, id="interpreted"),
        pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu),
    ],
)
