"""Which implementation serves which device, and that each has every op."""

import inspect
import types

import pytest
import torch

from kernels import cpu, gpu, ops, reference


def test_a_cpu_is_served_by_pytorch_and_a_gpu_by_triton() -> None:
    assert ops.choose(torch.device("cpu"), "auto") is cpu
    assert ops.choose(torch.device("cuda"), "auto") is gpu
    assert ops.choose(torch.device("cuda"), "triton") is gpu


def test_triton_runs_on_a_cpu_in_its_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.choose(torch.device("cpu"), "triton") is gpu
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="run on a CPU in Triton's interpreter only: set TRITON_INTERPRET=1"):
        ops.choose(torch.device("cpu"), "triton")


@pytest.mark.parametrize("implementation", [cpu, gpu, reference])
def test_every_implementation_has_every_op_with_the_same_arguments(implementation: types.ModuleType) -> None:
    names = [name for name in vars(ops.Ops) if not name.startswith("_")]
    assert len(names) == 8
    for name in names:
        wanted = [*inspect.signature(getattr(ops.Ops, name)).parameters][1:]
        assert [*inspect.signature(getattr(implementation, name)).parameters] == wanted, name
