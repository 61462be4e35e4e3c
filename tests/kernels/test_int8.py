"""Products in int8: op by op and compiled, against the reference and against the products that they stand for."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from kernels import reference, torch_ops
from kernels.int8 import LARGEST, ZERO_POINT, quantize_rows, quantize_weight
from kernels.names import Activation
from kernels.ops import Ops
from tests.kernels.compiled import VARIANTS, compiled_ops

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
# One rounding of the sum, and one of what the activation makes of it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}


@pytest.fixture(scope="module", params=["op by op", *VARIANTS])
def path(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def ops(path: str, dtype: torch.dtype) -> Ops:
    ops: Ops = torch_ops if path == "op by op" else compiled_ops(32, dtype, path)
    # Without VNNI oneDNN adds pairs of products in 16 bits, which the largest do not fit.
    if not (torch.cpu._is_vnni_supported() or getattr(ops, "has_int8", False)):
        pytest.skip("this CPU has no VNNI")
    return ops


def product(dtype: torch.dtype, rows: int, width: int = 96, out: int = 160) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows)
    return torch.randn(rows, width).to(dtype), torch.randn(out, width).to(dtype), torch.randn(out).to(dtype)


@dtypes
@pytest.mark.parametrize("rows", [1, 2, 33, 512])
@pytest.mark.parametrize("activation", [None, *get_args(Activation)])
def test_a_product_equals_the_reference(ops: Ops, dtype: torch.dtype, rows: int, activation: Activation | None) -> None:
    x, weight, bias = product(dtype, rows)
    packed = ops.pack(weight, quantize=True)
    for some_bias in (bias, None):
        ours, expected = (each.linear(x, packed, some_bias, activation) for each in (ops, reference))
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, expected, atol=10 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@dtypes
def test_a_product_is_near_the_one_it_stands_for(ops: Ops, dtype: torch.dtype) -> None:
    x, weight, bias = product(dtype, 64, 768, 256)
    ours = ops.linear(x, ops.pack(weight, quantize=True), bias).double()
    exact = x.double() @ weight.double().T + bias.double()
    assert (ours - exact).square().mean().sqrt() < 0.012 * exact.std()


@dtypes
def test_a_row_has_the_same_bits_beside_any_other(ops: Ops, dtype: torch.dtype) -> None:
    x, weight, bias = product(dtype, 40)
    packed = ops.pack(weight, quantize=True)
    together = ops.linear(x, packed, bias, "gelu_new")
    for start, stop in ((0, 1), (39, 40), (3, 5), (7, 31)):
        assert torch.equal(ops.linear(x[start:stop], packed, bias, "gelu_new"), together[start:stop])
    loud = x.clone()
    loud[20] *= 1000
    kept = [i for i in range(40) if i != 20]
    assert torch.equal(ops.linear(loud, packed, bias, "gelu_new")[kept], together[kept])


@dtypes
def test_rows_of_zeros_and_of_nan(ops: Ops, dtype: torch.dtype) -> None:
    x, weight, bias = product(dtype, 3)
    x[0] = 0
    x[1, 5] = float("nan")
    out = ops.linear(x, ops.pack(weight, quantize=True), bias)
    assert torch.equal(out[0], bias)
    assert out[1].isnan().all()
    assert out[2].isfinite().all()


@dtypes
def test_rows_use_the_whole_range_and_no_more(dtype: torch.dtype) -> None:
    x = torch.randn(500, 64).to(dtype) * torch.logspace(-6, 6, 500)[:, None].to(dtype)
    integers, scales = quantize_rows(x)
    largest = (integers.int() - ZERO_POINT).abs().amax(1)
    assert largest.min() >= LARGEST - 1
    assert largest.max() <= LARGEST
    error = (integers.double() - ZERO_POINT) * scales.double() - x.double()
    assert (error.abs() <= 0.51 * scales.double()).all()


def test_a_weight_is_what_its_integers_say() -> None:
    weight = torch.randn(70, 50)
    weight[3] = 0
    packed = quantize_weight(weight)
    restored = packed.integers().double() * packed.scales.double()[:, None]
    assert ((restored - weight.double()).abs() <= 0.51 * packed.scales.double()[:, None]).all()
    assert restored[3].abs().max() == 0
