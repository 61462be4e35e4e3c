"""`TRITON_INTERPRET=1 python -m tests.bench.errors`: max |error| of every op by path and dtype, against the reference."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import reference, torch_ops
from kernels.gpu import triton_ops
from kernels.ops import Ops
from kernels.patterns import Pattern
from tests.kernels.interpreter import exact_bf16
from tests.kernels.paged import decode_case, prefill_case

PATTERNS = (Pattern(), Pattern("banded", 100), Pattern("strided", 64), Pattern("fixed", 128, 32))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attention(pattern: Pattern, dtype: torch.dtype, *, decodes: bool) -> Callable[[Ops], Tensor]:
    """Ragged batches around the borders of pages, heads of 64."""
    scale = 64**-0.5
    if decodes:
        rows = decode_case([1, 63, 64, 65, 257, 700], pattern, dim=64, dtype=dtype)
        return lambda ops: ops.decode_attention(rows.q, rows.cache.k, rows.cache.v, rows.plan, scale)
    chunks = prefill_case([0, 200, 64], [130, 70, 64], pattern, dim=64, dtype=dtype)
    return lambda ops: ops.prefill_attention(chunks.q, chunks.cache.k, chunks.cache.v, chunks.plan, scale)


def pointwise(dtype: torch.dtype) -> dict[str, Callable[[Ops], Tensor]]:
    x, residual = (torch.randn(63, 768).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(768).to(dtype) for _ in range(2))
    return {
        "add_layernorm": lambda ops: ops.add_layernorm(x, residual, weight, bias, 1e-5)[0],
        "gelu_new": lambda ops: ops.bias_activation(x.clone(), bias, "gelu_new"),
        "gelu": lambda ops: ops.bias_activation(x.clone(), bias, "gelu"),
        "relu": lambda ops: ops.bias_activation(x.clone(), bias, "relu"),
    }


def cases(dtype: torch.dtype) -> dict[str, Callable[[Ops], Tensor]]:
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for decodes, phase in ((False, "prefill"), (True, "decode")):
        found |= {f"{phase}, {pattern.kind}": attention(pattern, dtype, decodes=decodes) for pattern in PATTERNS}
    return found | pointwise(dtype)


def main() -> None:
    print("max |error| of elements of magnitude 1 to 8; most of it comes from rounding to the dtype")
    print(f"{'':<18}" + "".join(f"{str(dtype)[6:] + ', ' + path:>22}" for dtype in DTYPES for path in ("CPU", "Triton")))
    by_dtype = [cases(dtype) for dtype in DTYPES]
    with exact_bf16():
        for name in by_dtype[0]:
            errors = []
            for by_name in by_dtype:
                expected = by_name[name](reference)
                errors += [float((by_name[name](ops) - expected).abs().max()) for ops in (torch_ops, triton_ops)]
            print(f"{name:<18}" + "".join(f"{error:22.1e}" for error in errors), flush=True)


if __name__ == "__main__":
    main()
