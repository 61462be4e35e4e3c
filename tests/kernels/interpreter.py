"""What Triton's interpreter can tell about a kernel next to its values: bytes, FLOPs, pages, accesses out of bounds.

Needs TRITON_INTERPRET=1 before triton is first imported. Also corrects bf16, which the interpreter gets wrong.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Self
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, ReduceScanOpInterface, TensorHandle, interpreter_builder

Addresses = NDArray[np.int64]


class DotShape(NamedTuple):
    m: int
    n: int
    k: int


class Work:
    """Counts what the kernels launched inside it do: `with Work(k=k_pages, v=v_pages) as work: launch(...)`.

    A launch's other tensors are counted under "kernel.argument", the name in its signature. A lane is out of bounds if its
    address belongs to no element of these tensors: it is counted and masked off, so that it can't crash the test. Every
    unmasked lane counts, even if two load the same address. Atomics are not counted.
    """

    def __init__(self, **tensors: Tensor):
        self.named = tensors
        self.arguments: dict[str, Tensor] = {}  # of the launch that runs
        self.loaded: Counter[str] = Counter()  # bytes by tensor
        self.stored: Counter[str] = Counter()
        self.dots: Counter[DotShape] = Counter()
        self.out_of_bounds: Counter[str] = Counter()  # lanes, by "load" and "store"
        self.touched: dict[str, set[int]] = {name: set() for name in tensors}

    @property
    def flops(self) -> int:
        return sum(2 * m * n * k * count for (m, n, k), count in self.dots.items())

    def pages(self, name: str) -> set[int]:
        """Indices of the first dimension of a named tensor that were loaded or stored: page ids of a page pool."""
        return self.touched[name]

    def __enter__(self) -> Self:
        init_args, load, store, dot = (
            GridExecutor._init_args_hst,
            interpreter_builder.create_masked_load,
            interpreter_builder.create_masked_store,
            interpreter_builder.create_dot,
        )

        def counted_args(executor: Any, args: Any, kwargs: Any) -> Any:
            self.arguments.clear()
            for name, arg in [*zip(executor.arg_names, args, strict=False), *kwargs.items()]:
                if isinstance(arg, Tensor):
                    self.arguments[f"{executor.fn.__name__}.{name}"] = arg
            return init_args(executor, args, kwargs)

        def counted_load(ptrs: Any, mask: Any, *args: Any) -> Any:
            return load(ptrs, self.account(ptrs, mask, self.loaded, "load"), *args)

        def counted_store(ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
            return store(ptrs, value, self.account(ptrs, mask, self.stored, "store"), *args)

        def counted_dot(a: Any, b: Any, *args: Any) -> Any:
            batch = a.data.size // (a.data.shape[-2] * a.data.shape[-1])
            self.dots[DotShape(a.data.shape[-2], b.data.shape[-1], a.data.shape[-1])] += batch
            return dot(a, b, *args)

        self.patches = ExitStack()
        self.patches.enter_context(patch.object(GridExecutor, "_init_args_hst", counted_args))
        self.patches.enter_context(patch.object(interpreter_builder, "create_masked_load", counted_load))
        self.patches.enter_context(patch.object(interpreter_builder, "create_masked_store", counted_store))
        self.patches.enter_context(patch.object(interpreter_builder, "create_dot", counted_dot))
        return self

    def __exit__(self, *error: object) -> None:
        self.patches.close()

    def account(self, ptrs: Any, mask: Any, moved: Counter[str], access: str) -> Any:
        """Attribute the unmasked lanes to tensors. Returns the mask without lanes that belong to none."""
        mask = np.broadcast_to(np.asarray(mask.data, bool), ptrs.data.shape).copy()
        lanes = np.flatnonzero(mask)
        addresses = ptrs.data.ravel()[lanes].astype(np.int64)
        for name, tensor in [*self.named.items(), *self.arguments.items()]:
            if not len(lanes):
                break
            inside = elements(tensor, addresses)
            if inside.any():
                moved[name] += int(inside.sum()) * tensor.element_size()
                if name in self.touched:
                    page_bytes = tensor.stride(0) * tensor.element_size()
                    self.touched[name] |= set(((addresses[inside] - tensor.data_ptr()) // page_bytes).tolist())
                lanes, addresses = lanes[~inside], addresses[~inside]
        if len(lanes):
            self.out_of_bounds[access] += len(lanes)
            mask.flat[lanes] = False
        return TensorHandle(mask, tl.int1)


def elements(tensor: Tensor, addresses: Addresses) -> NDArray[np.bool_]:
    """Which addresses are elements of a tensor. It may be a strided view: the gaps between its rows are not elements."""
    rest = (addresses - tensor.data_ptr()) // tensor.element_size()
    inside = (rest >= 0) & (tensor.numel() > 0)
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True):
        if size > 1 and stride > 0:
            index, rest = np.divmod(rest, stride)
            inside &= index < size
    return inside & (rest == 0)


@contextmanager
def exact_bf16() -> Iterator[None]:
    """Make the interpreter round to bf16 and multiply bf16 correctly: by itself it truncates, and multiplies bit patterns.

    A product also gives a row the same bits wherever it stands in a tile, as tensor cores do. NumPy's own products don't on
    every processor: on Zen 3 they depend on the place.

    Other arithmetic on bf16 raises TypeError. It would give wrong values in silence, and the kernels compute in fp32 anyway.
    """
    cast, binary, unary = (
        interpreter_builder.cast_impl,
        interpreter_builder.binary_op,
        interpreter_builder.unary_op,
    )

    def widen(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle(torch.tensor(x.data).view(torch.bfloat16).float().numpy(), tl.float32)

    def exact_cast(x: Any, dtype: Any, *rounding_mode: Any) -> Any:
        if dtype.scalar != tl.bfloat16:
            return cast(widen(x), dtype)
        data = torch.tensor(widen(x).data).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(data, tl.bfloat16)

    def exact_dot(a: Any, b: Any, added: Any, *_: Any) -> Any:
        product = np.einsum("...mk,...kn->...mn", widen(a).data, widen(b).data, dtype=added.data.dtype)
        return TensorHandle(product + added.data, added.dtype.scalar)

    def refuse(*operands: Any) -> None:
        if any(x.dtype.scalar == tl.bfloat16 for x in operands if hasattr(x, "dtype")):
            raise TypeError(
                "arithmetic on bf16: the interpreter would compute with its bit patterns; widen it to fp32 first"
            )

    def checked(compute: Any) -> Any:
        def call(*args: Any) -> Any:
            refuse(*args)
            return compute(*args)

        return call

    with (
        patch.object(interpreter_builder, "cast_impl", exact_cast),
        patch.object(interpreter_builder, "create_fp_to_fp", exact_cast),
        patch.object(interpreter_builder, "create_dot", exact_dot),
        patch.object(interpreter_builder, "binary_op", checked(binary)),
        patch.object(interpreter_builder, "unary_op", checked(unary)),
        patch.object(ReduceScanOpInterface, "check_tensor", lambda _, inputs: refuse(*inputs)),
    ):
        yield
