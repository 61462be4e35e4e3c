"""The compiled ops for tests: with all of this machine's instructions, without the newest, and without most of them."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from kernels.cpu import build as cpu_build
from kernels.cpu import compiled as cpu_compiled
from kernels.cpu.build import Shape
from kernels.cpu.compiled import CompiledOps

# Further flags for the compiler. Only "portable products" has int8's products on a processor that lacks the instructions for
# them. Without AMX, "compiled" has no tiles: a variant without them would be the same library again.
WITHOUT_TILES = {"compiled without tiles": " -mno-amx-tile -mno-amx-int8 -mno-amx-bf16"}
VARIANTS = {
    "compiled": "",
    **(WITHOUT_TILES if torch.cpu._is_amx_tile_supported() else {}),
    "compiled for AVX2": " -march=x86-64-v3",
    "portable products": " -march=x86-64-v3 -DPORTABLE_PRODUCTS",
}
variants = pytest.mark.parametrize("variant", VARIANTS)


@cache
def compiled_ops(dim: int, dtype: torch.dtype, variant: str = "compiled") -> CompiledOps:
    """Taken from the server's own cache, so that only the first run on a machine waits for the compiler."""
    flags = cpu_build.FLAGS
    cpu_build.FLAGS = flags + VARIANTS[variant]
    try:
        compiled = cpu_compiled.load(Shape(dim, dtype))
    finally:
        cpu_build.FLAGS = flags
    assert compiled is not None
    # Even where a server would take oneDNN's, which are faster there.
    compiled.has_int8 = compiled.has_int8 or variant == "portable products"
    compiled.has_bf16 = compiled.has_bf16 or compiled.has_int8
    return compiled


class AnyCompiled:
    """Compiled ops that take their shape from the first tensor of a call: heads (N, H, D), or rows of any width."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(x: torch.Tensor, *rest: Any) -> Any:
            return getattr(compiled_ops(x.shape[-1] if x.dim() == 3 else 16, x.dtype), name)(x, *rest)

        return call

    def native_forward(self, *_: Any, **__: Any) -> None:
        """None: products of fp32 are not compiled."""
