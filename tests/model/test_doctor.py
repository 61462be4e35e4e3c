"""The doctor passes right kernels on every path and in every dtype, and names the kind of wrong ones."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from kernels import reference, torch_ops
from kernels.ops import Ops
from kernels.plan import DecodePlan, PrefillPlan
from model.checkpoint.weights import load_model
from model.doctor import DECODES, LIMITS, KernelErrors, hidden_states, kernel_errors, steps_of
from model.gpt import GPT
from service.engine.loading import DEMO_DIRECTORY
from tests.kernels.paths import ServedPath, served_paths
from tests.model.checkpoint.checkpoints import tiny

SPARSE: dict[str, Any] = {"attention": ("strided", "fixed", "dense", "banded"), "stride": 32, "summary": 4}
dtypes = pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: str(dtype)[6:])


def broken(**functions: Any) -> Ops:
    """kernels.torch_ops with other functions."""
    return cast(Ops, SimpleNamespace(**vars(torch_ops) | functions))


def with_pattern(kind: str, change: int) -> Ops:
    """One kind of attention whose masks have a size that is off by `change`."""

    def altered(attend: Any) -> Any:
        def call(q: Tensor, k: Tensor, v: Tensor, plan: DecodePlan | PrefillPlan, scale: float) -> Tensor:
            pattern = plan.pattern
            if pattern.kind == kind:
                plan = dataclasses.replace(plan, pattern=pattern._replace(size=pattern.size + change))
            return attend(q, k, v, plan, scale)

        return call

    names = ("decode_attention", "prefill_attention")
    return broken(**{name: altered(getattr(torch_ops, name)) for name in names})


def page_skipped(q: Tensor, k: Tensor, v: Tensor, plan: DecodePlan, scale: float) -> Tensor:
    """Decoding that does not see the first page."""
    visible = plan.page_list.visible.clone()
    visible[0] = False
    skipping = dataclasses.replace(plan)
    skipping.__dict__["page_list"] = plan.page_list._replace(visible=visible)
    return torch_ops.decode_attention(q, k, v, skipping, scale)


def scaled_twice(q: Tensor, k: Tensor, v: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
    return torch_ops.prefill_attention(q, k, v, plan, scale * scale)


def stale_residual(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """A norm of the sum that does not return the sum."""
    return torch_ops.add_layernorm(x, residual, weight, bias, eps)[0], x


def failing(errors: KernelErrors) -> set[str]:
    return {kind for kind in errors.errors if errors.share(kind) > errors.limit}


def tiny_model(tmp_path: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> GPT:
    return load_model(tiny("banded", tmp_path, **fields), dtype)


@dtypes
@pytest.mark.parametrize(
    "fields", [{}, {"band": 64}, {"attention": ("dense",)}, SPARSE], ids=["band 16", "band 64", "dense", "sparse"]
)
def test_the_cpu_path_is_within_a_third_of_the_limit(fields: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(tmp_path, dtype, **fields)
    errors = kernel_errors(model, torch_ops)
    assert errors.dtype == dtype
    assert set(errors.errors) == set(model.config.attention) | {"pointwise", "all"}
    assert errors.faults() == []
    for kind in errors.errors:
        assert errors.share(kind) < errors.limit / 3
    assert errors.errors["all"] > 0, "the active ops must have run"


@served_paths
def test_every_path_is_right(path: ServedPath, tmp_path: Path) -> None:
    # As few positions as have the cut after a page of the band, and decoding after another.
    model = tiny_model(tmp_path, n_layer=2, n_positions=152).to(path.device)
    errors = kernel_errors(model, path.ops)
    assert errors.faults() == []
    assert errors.errors["all"] > 0


@dtypes
@pytest.mark.parametrize("change", [-1, 1])
def test_a_band_that_is_off_by_one_key_is_found(change: int, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(tmp_path, dtype)
    assert failing(kernel_errors(model, with_pattern("banded", change))) == {"banded", "all"}


def test_a_key_too_many_is_one_of_a_page_given_back(tmp_path: Path) -> None:
    """The error is NaN, which no rounding hides: prefill and decoding start where the band has just left a page."""
    model = tiny_model(tmp_path)
    wide = with_pattern("banded", 1)
    assert kernel_errors(model, wide).errors["banded"] == math.inf
    for name in ("decode_attention", "prefill_attention"):
        errors = kernel_errors(model, broken(**{name: getattr(wide, name)}))
        assert errors.errors["banded"] == errors.errors["all"] == math.inf


def test_one_key_of_the_demo_band_is_found_in_fp32() -> None:
    model = load_model(DEMO_DIRECTORY, torch.float32)
    assert failing(kernel_errors(model, with_pattern("banded", -1))) == {"banded", "all"}


@dtypes
def test_a_skipped_page_of_the_demo_is_found(dtype: torch.dtype) -> None:
    model = load_model(DEMO_DIRECTORY, dtype)
    assert kernel_errors(model, torch_ops).faults() == []
    found = {"dense", "all"} if dtype == torch.bfloat16 else {"dense", "banded", "all"}  # bf16 hides it in banded layers
    assert failing(kernel_errors(model, broken(decode_attention=page_skipped))) == found


@pytest.mark.parametrize("kind", ["strided", "fixed"])
def test_a_sparse_pattern_that_is_off_by_one_key_is_found(kind: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path, **SPARSE)
    assert failing(kernel_errors(model, with_pattern(kind, 1))) == {kind, "all"}


@dtypes
@pytest.mark.parametrize(
    ("name", "function", "kinds"),
    [
        ("decode_attention", page_skipped, {"dense", "banded"}),
        ("prefill_attention", scaled_twice, {"dense", "banded"}),
        ("add_layernorm", stale_residual, {"pointwise"}),
        ("linear", lambda x, weight, bias, activation=None: torch_ops.linear(x, weight, bias), {"pointwise"}),
        ("linear", lambda x, weight, bias, activation=None: torch_ops.linear(x, weight, None, activation), {"pointwise"}),
        ("kv_write", lambda k, v, *rest: torch_ops.kv_write(v, k, *rest), {"dense", "banded"}),
    ],
)
def test_a_wrong_op_is_found(name: str, function: Any, kinds: set[str], dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(tmp_path, dtype)
    assert failing(kernel_errors(model, broken(**{name: function}))) == kinds | {"all"}


def test_a_single_nan_is_an_infinite_error(tmp_path: Path) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, plan: DecodePlan, scale: float) -> Tensor:
        out = torch_ops.decode_attention(q, k, v, plan, scale)
        if plan.pattern.kind == "dense":
            out[0, 0, 0] = math.nan
        return out

    errors = kernel_errors(tiny_model(tmp_path), broken(decode_attention=attend))
    assert failing(errors) == {"dense", "all"}
    assert errors.errors["dense"] == errors.errors["all"] == math.inf
    assert errors.faults()[0] == (
        f"kernels of kind dense: max |Δ logit| inf is inf% of the logits' standard deviation {errors.deviation:.3g}, "
        "the limit for float32 is 0.1%"
    )


@pytest.mark.parametrize(("weight", "dtype"), [(math.nan, torch.float32), (60_000.0, torch.float16)])
def test_weights_without_finite_logits_are_refused(weight: float, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(tmp_path, dtype)
    with torch.no_grad():
        model.wte.weight.fill_(weight)
        model.wpe.weight.fill_(weight)  # the sum of both is above fp16's largest number
    with pytest.raises(ValueError, match=r"the reference's logits are not finite: the weights are not, or too large for "):
        kernel_errors(model, torch_ops)


def test_logits_that_are_all_equal_have_no_deviation_and_still_a_verdict(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    with torch.no_grad():
        model.wte.weight.zero_()
    errors = kernel_errors(model, torch_ops)
    assert errors.deviation == 0.0
    assert errors.faults() == []
    assert errors._replace(errors={"dense": 1e-9}).share("dense") == math.inf


@pytest.mark.parametrize("size", [0, 1, 16, 63, 64, 65, 256])
@pytest.mark.parametrize("n_positions", [1, 2, 3, 9, 10, 64, 65, 200, 256, 2048])
def test_steps_are_the_positions_in_order(n_positions: int, size: int) -> None:
    steps = steps_of(n_positions, size)
    positions = [position for step in steps for position in step]
    assert positions == list(range(len(positions)))
    assert len(positions) <= n_positions
    if n_positions < size + 135:
        assert len(positions) == n_positions
        return
    first, second, *decodes = steps
    assert (len(first), len(decodes)) == (size + 63, DECODES)
    assert len(second) % 64 == 0, "decoding begins where the band has just left a page"
    if n_positions == 2048:
        assert decodes[0].start >= 256, "decoding reads more than a split of 256 keys"


@pytest.mark.parametrize("n_positions", [1, 2, 9, 65])
def test_short_contexts(n_positions: int, tmp_path: Path) -> None:
    errors = kernel_errors(tiny_model(tmp_path, n_positions=n_positions), torch_ops)
    assert (errors.num_tokens, errors.num_rows) == (n_positions, min(n_positions, 64))
    assert errors.faults() == []


def test_the_baseline_does_not_depend_on_paging_or_chunks(tmp_path: Path) -> None:
    """The reference gives the same over one chunk of the whole window as over chunks and decode rows."""
    model = tiny_model(tmp_path, **SPARSE)
    attention: Any = dict.fromkeys(model.config.attention, reference)
    tokens = torch.arange(150)
    with torch.inference_mode():
        whole = hidden_states(model, tokens, [range(150)], attention, reference)
        steps = hidden_states(model, tokens, steps_of(150, 16), attention, reference)
    torch.testing.assert_close(steps, whole, atol=1e-4, rtol=1e-4)
