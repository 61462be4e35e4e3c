"""Products of packed weights: values against the reference, and bits of a row that do not depend on the other rows."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch

from kernels import reference, torch_ops
from kernels.names import Activation
from kernels.ops import Ops
from tests.kernels.compiled import VARIANTS, compiled_ops, variants


@pytest.fixture(params=["oneDNN", *VARIANTS])
def make_ops(request: pytest.FixtureRequest) -> Callable[[torch.dtype], Ops]:
    return lambda dtype: torch_ops if request.param == "oneDNN" else compiled_ops(32, dtype, request.param)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dtypes
@pytest.mark.parametrize("activation", [None, *get_args(Activation)])
@pytest.mark.parametrize("rows", [1, 2, 65])
def test_a_packed_product_equals_the_reference(
    make_ops: Callable[[torch.dtype], Ops], dtype: torch.dtype, activation: Activation | None, rows: int
) -> None:
    ops = make_ops(dtype)
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(rows, 96).to(dtype), (torch.randn(70, 96) / 10).to(dtype), torch.randn(70).to(dtype)
    packed = ops.pack(weight, quantize=False)
    for some_bias in (bias, None):
        ours = ops.linear(x, packed, some_bias, activation)
        # The bias is added before the sum is rounded: the reference is given what it needs to do so too.
        wide = None if some_bias is None else some_bias.float()
        expected = reference.linear(x.float(), weight.float(), wide, activation)
        torch.testing.assert_close(ours.float(), expected, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        again = reference.linear(x, packed, some_bias, activation)
        torch.testing.assert_close(again, reference.linear(x, weight, some_bias, activation), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("width", "out"), [(768, 2304), (768, 768), (768, 3072), (3072, 768), (1024, 256), (4096, 512), (8192, 512), (33, 96)]
)
def test_a_row_has_the_same_bits_beside_any_others(
    make_ops: Callable[[torch.dtype], Ops], dtype: torch.dtype, width: int, out: int
) -> None:
    ops = make_ops(dtype)
    torch.manual_seed(0)
    weight, bias = (torch.randn(out, width) / 10).to(dtype), torch.randn(out).to(dtype)
    packed = ops.pack(weight, quantize=False)
    x = torch.randn(300, width).to(dtype)
    together = ops.linear(x, packed, bias, "gelu_new")
    for count in (1, 2, 3, 5, 7, 8, 11, 16, 31, 32, 33, 64, 100, 256):
        for start in (0, 131, 300 - count) if count < 64 else (300 - count,):
            rows = slice(start, start + count)
            assert torch.equal(ops.linear(x[rows], packed, bias, "gelu_new"), together[rows]), (start, count)


def test_few_numbers_of_rows_are_multiplied() -> None:
    """Each is compiled once, and kept."""
    counts = range(2, 2049)
    assert all(count <= torch_ops.rounded_up(count) <= 1.125 * count for count in counts)
    assert len({torch_ops.rounded_up(count) for count in counts}) < 75
    assert torch_ops.rounded_up(1) == 2
    assert torch_ops.rounded_up(0) == 2


@variants
@pytest.mark.parametrize("rows", [1, 16, 17, 70])
def test_logits_are_not_rounded_where_the_products_are_our_own(variant: str, rows: int) -> None:
    compiled = compiled_ops(32, torch.bfloat16, variant)
    x, weight = torch.randn(rows, 96).bfloat16(), torch.randn(70, 96).bfloat16()
    logits = compiled.project(x, compiled.pack(weight, quantize=False))
    if compiled.has_bf16:
        assert logits.dtype == torch.float32
    torch.testing.assert_close(
        logits.float(), x.float() @ weight.float().T, atol=2e-5 if compiled.has_bf16 else 0.1, rtol=1e-2
    )


@variants
def test_rows_that_end_a_buffer_are_not_read_beyond(variant: str) -> None:
    """Memory after the rows is NaN, and a row of an odd length has no product of ours."""
    compiled = compiled_ops(32, torch.bfloat16, variant)
    for columns in (96, 80, 33):
        for rows in (1, 5, 16, 17, 40):
            buffer = torch.full((rows + 40, columns), float("nan"), dtype=torch.bfloat16)
            buffer[:rows] = 1.0
            packed = compiled.pack(torch.ones(48, columns, dtype=torch.bfloat16), quantize=False)
            assert (compiled.linear(buffer[:rows], packed, None) == columns).all()
