"""The implementations that serve, as parameters of a test: two on a CPU, and Triton's in its interpreter and on a GPU."""

from typing import NamedTuple, cast

import pytest
import torch

from kernels import torch_ops
from kernels.gpu import triton_ops
from kernels.ops import Ops
from tests.kernels.compiled import AnyCompiled


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
