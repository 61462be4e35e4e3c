"""Products of packed weights: values against the reference, and bits that do not depend on what stands beside a row."""

from typing import get_args

import pytest
import torch

from kernels import cpu, reference
from kernels.names import Activation

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dtypes
@pytest.mark.parametrize("activation", [None, *get_args(Activation)])
@pytest.mark.parametrize("rows", [1, 2, 65])
def test_a_packed_product_equals_the_reference(dtype: torch.dtype, activation: Activation | None, rows: int) -> None:
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(rows, 96).to(dtype), (torch.randn(70, 96) / 10).to(dtype), torch.randn(70).to(dtype)
    packed = cpu.pack(weight, quantize=False)
    for some_bias in (bias, None):
        ours = cpu.linear(x, packed, some_bias, activation)
        # The bias is added before the sum is rounded: the reference is given what it needs to do so too.
        wide = None if some_bias is None else some_bias.float()
        expected = reference.linear(x.float(), weight.float(), wide, activation)
        torch.testing.assert_close(ours.float(), expected, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        again = reference.linear(x, packed, some_bias, activation)
        torch.testing.assert_close(again, reference.linear(x, weight, some_bias, activation), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("width", "out"), [(768, 2304), (768, 768), (768, 3072), (3072, 768), (1024, 256), (4096, 1024), (8192, 2048), (33, 96)]
)
def test_a_row_has_the_same_bits_beside_any_others(dtype: torch.dtype, width: int, out: int) -> None:
    torch.manual_seed(0)
    weight, bias = (torch.randn(out, width) / 10).to(dtype), torch.randn(out).to(dtype)
    packed = cpu.pack(weight, quantize=False)
    x = torch.randn(300, width).to(dtype)
    together = cpu.linear(x, packed, bias, "gelu_new")
    for count in (1, 2, 3, 5, 7, 8, 11, 16, 31, 32, 33, 64, 100, 256):
        for start in (0, 131, 300 - count):
            rows = slice(start, start + count)
            assert torch.equal(cpu.linear(x[rows], packed, bias, "gelu_new"), together[rows]), (start, count)
