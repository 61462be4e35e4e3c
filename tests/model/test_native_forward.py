"""The native forward gives the bits of the ops one by one, whatever the model and the step."""

import copy
import random
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.cpu.compiled import CompiledOps
from model.checkpoint.weights import load_model
from model.doctor import kernel_errors
from model.step import DecodeToken, PromptChunk, RowStart, Sample, Sampling, StepInput
from tests.kernels.compiled import VARIANTS, compiled_ops
from tests.kernels.paths import ServedPath
from tests.model.checkpoint.checkpoints import FIELDS, tiny
from tests.model.paged_run import PagedRun, random_steps

# Heads of 32 fit AMX tiles.
MODELS: dict[str, dict[str, Any]] = {
    "every pattern": {"n_head": 2, "attention": ("dense", "banded", "strided", "fixed"), "stride": 32, "summary": 5},
    "OPT-350m's order": {"pre_norm": False, "final_norm": False, "activation": "relu", "embedding_width": 32},
    "as few parameters as can be": {"qkv_bias": False, "bias": False, "norm_affine": False, "scale_by_inverse_layer": True},
    "a band over pages": {"band": 70, "activation": "gelu", "n_inner": 160, "tied_head": False},
}
packs = pytest.mark.parametrize("pack", ["as it is", "int8"])
variants = pytest.mark.parametrize("variant", [name for name in VARIANTS if "AVX2" not in name])


def one_by_one(ops: CompiledOps) -> CompiledOps:
    ops = copy.copy(ops)
    ops.native_forward = lambda *_, **__: None  # type: ignore[method-assign]
    return ops


def skip_without_products(ops: CompiledOps) -> None:
    if not ops.has_int8:
        pytest.skip("this CPU lacks the instructions for the products")


@variants
@packs
@pytest.mark.parametrize("name", MODELS)
def test_the_bits_are_those_of_the_ops(name: str, pack: Literal["as it is", "int8"], variant: str, tmp_path: Path) -> None:
    fields = FIELDS["banded"] | MODELS[name]
    if variant == "portable products":
        fields |= {"n_head": 2}  # it takes the compiler the longest, and products know nothing of heads
    directory = tiny("banded", tmp_path, **fields)
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(331, (length,), generator=generator) for length in (150, 1, 64, 65)]
    ops = compiled_ops(fields["n_embd"] // fields["n_head"], torch.bfloat16, variant)
    skip_without_products(ops)
    cpu = torch.device("cpu")
    runs = [
        PagedRun(directory, sequences, torch.bfloat16, ServedPath(each, cpu), pack=pack) for each in (ops, one_by_one(ops))
    ]
    assert [run.is_native for run in runs] == [True, False]
    for run in runs:
        random_steps(run, random.Random(4))
    for together, apart in zip(runs[0].logits, runs[1].logits, strict=True):
        assert not together.isnan().any()
        assert torch.equal(together, apart)


def test_the_caller_is_told_right_ahead_of_the_native_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two, any op of PyTorch's would give the interpreter to the thread that was told."""
    ops = compiled_ops(FIELDS["banded"]["n_embd"] // 2, torch.bfloat16)
    skip_without_products(ops)
    path = ServedPath(ops, torch.device("cpu"))
    run = PagedRun(
        tiny("banded", tmp_path, n_head=2), [torch.zeros(9, dtype=torch.int64)], torch.bfloat16, path, pack="as it is"
    )
    run_blocks, seen = ops._library.run_blocks, list[str]()

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append("op")
            return op(*args, **kwargs or {})

    def noted(*arguments: Any) -> Any:
        seen.append("native code")
        return run_blocks(*arguments)

    monkeypatch.setattr(ops._library, "run_blocks", noted)
    for step in (
        StepInput(
            [RowStart(0, Sampling(), [1, 2])],
            run.cache.extend(0, 9),
            [],
            [PromptChunk(0, 0, [1, 2])],
            [Sample(0, 1)],
            [],
            [],
        ),
        StepInput([], [], [DecodeToken(0, 2)], [], [Sample(0, 0)], [], []),
    ):
        seen.clear()
        with Noting():
            run.runner.launch(step, lambda: seen.append("told"))
        assert seen.count("told") == 1
        assert seen[seen.index("told") + 1] == "native code"
        assert seen[0] == seen[-1] == "op"


@packs
def test_the_doctor_measures_the_native_forward(pack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = compiled_ops(FIELDS["banded"]["n_embd"] // 2, torch.bfloat16, "portable products")
    skip_without_products(ops)
    model = load_model(tiny("banded", tmp_path, n_head=2), torch.bfloat16, torch.device("cpu"))
    model.pack(ops, quantize=pack == "int8")
    assert kernel_errors(model, ops).faults() == []
    run = ops._library.run_blocks

    def broken(blocks: Any, count: int, *rest: Any) -> Any:
        return run(blocks, count - 1, *rest)

    monkeypatch.setattr(ops._library, "run_blocks", broken)
    (fault,) = kernel_errors(model, ops).faults()
    assert fault.startswith("kernels of kind all: ")


@pytest.mark.parametrize(
    ("fields", "pack"),
    [
        ({}, None),
        ({"n_inner": 240}, "as it is"),  # panels do not take the rows of one of the four products
        ({"n_embd": 40}, "int8"),  # norms of this width are not compiled
    ],
)
def test_without_one_of_the_compiled_ops_all_run_one_by_one(
    fields: dict[str, Any], pack: Literal["as it is", "int8"] | None, tmp_path: Path
) -> None:
    head_dim = fields.get("n_embd", 64) // FIELDS["banded"]["n_head"]
    path = ServedPath(compiled_ops(head_dim, torch.bfloat16), torch.device("cpu"))
    sequences = [torch.zeros(9, dtype=torch.int64)]
    run = PagedRun(tiny("banded", tmp_path, **fields), sequences, torch.bfloat16, path, pack=pack)
    assert not run.is_native
    random_steps(run, random.Random(1))
