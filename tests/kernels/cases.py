"""The patterns, tolerances and calls that the tests of attention share."""

import pytest
import torch
from torch import Tensor

from kernels.ops import Ops
from kernels.patterns import Pattern
from kernels.plan import DecodePlan
from tests.kernels.paged import DecodeCase, PrefillCase

DENSE = Pattern("dense")
BANDS = [Pattern("banded", band) for band in (1, 63, 64, 65, 100, 256)]
SPARSE = [Pattern("strided", 64), Pattern("strided", 37), Pattern("fixed", 128, 32), Pattern("fixed", 50, 3)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

patterns = pytest.mark.parametrize("pattern", [DENSE, *BANDS, *SPARSE], ids=lambda p: f"{p.kind}{p.size or ''}")


def prefill(ops: Ops, case: PrefillCase, scale: float = 0.3) -> Tensor:
    return ops.prefill_attention(case.q, case.cache.k, case.cache.v, case.plan, scale)


def decode(ops: Ops, case: DecodeCase, scale: float = 0.3) -> Tensor:
    return ops.decode_attention(case.q, case.cache.k, case.cache.v, case.plan, scale)


def alone(case: DecodeCase, i: int) -> DecodeCase:
    """Row i of a case as a batch of its own."""
    row = slice(i, i + 1)
    plan = DecodePlan(case.plan.page_table[row], case.plan.lengths[row], case.plan.pattern, case.plan.layout)
    return DecodeCase(case.q[row], case.cache, plan)


def assert_close(ours: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)
