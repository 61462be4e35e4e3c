"""Which implementation serves which device, and that each has every op."""

import inspect
import types

import pytest
import torch

from kernels import dispatch, ops, reference, torch_ops
from kernels.cpu.compiled import CompiledOps
from kernels.gpu import triton_ops


def test_a_cpu_is_served_by_pytorch_and_a_gpu_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert dispatch.choose(torch.device("cpu"), "auto") is torch_ops
    assert dispatch.choose(torch.device("cuda"), "auto") is triton_ops
    assert dispatch.choose(torch.device("cuda"), "triton") is triton_ops


def test_triton_runs_on_a_cpu_in_its_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose(torch.device("cpu"), "triton") is triton_ops
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="run on a CPU in Triton's interpreter only: set TRITON_INTERPRET=1"):
        dispatch.choose(torch.device("cpu"), "triton")


def test_the_interpreter_left_on_is_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 is set: the kernels would be interpreted, not run"):
        dispatch.choose(torch.device("cuda"), "auto")


@pytest.mark.parametrize("implementation", [torch_ops, triton_ops, reference, CompiledOps.__new__(CompiledOps)])
def test_every_implementation_has_every_op_with_the_same_arguments(implementation: types.ModuleType | CompiledOps) -> None:
    names = [name for name in vars(ops.Ops) if not name.startswith("_")]
    assert len(names) == 11
    for name in names:
        wanted = [*inspect.signature(getattr(ops.Ops, name)).parameters][1:]
        assert [*inspect.signature(getattr(implementation, name)).parameters] == wanted, name
