"""The compiled CPU path: what PyTorch's ops do slowly as loops in C++ (csrc/kernels.cpp).

Op by op pages are copied before they are read, rows are walked several times, and oneDNN takes up to twice as long for the
few rows of a decode step. Where nothing can be compiled kernels.torch_ops serves.
"""

import ctypes
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import torch_ops
from kernels.cpu import blocks as cpu_blocks
from kernels.cpu.build import Shape, compiled_library
from kernels.cpu.panels import ACTIVATIONS, BLOCK, LANES, OFFSET, PANELS, Bf16Panels, Int8Panels, address, to_panels
from kernels.int8 import quantize_channels
from kernels.names import Activation
from kernels.ops import AllBlocks, BlockParts, Weight
from kernels.plan import DecodePlan, PrefillPlan


class CompiledOps:
    """kernels.torch_ops with some of its functions compiled."""

    decode_attention = staticmethod(torch_ops.decode_attention)
    bias_activation = staticmethod(torch_ops.bias_activation)
    sample = staticmethod(torch_ops.sample)

    def __init__(self, library: ctypes.CDLL):
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._kv_write, self._decode_step = library.kv_write, library.decode_step
        self._prefill_attention, self._add_layernorm = library.prefill_attention, library.add_layernorm
        self._prefill_attention.argtypes = [pointer, size, *[pointer] * 7, size, pointer, size, ctypes.c_float, number]
        self._kv_write.argtypes = [pointer, pointer, size, *[pointer] * 3, size, size, number]
        self._add_layernorm.argtypes = [*[pointer] * 4, size, size, ctypes.c_float, pointer, pointer, number]
        self._decode_step.argtypes = [pointer] * 3 + [size] + [pointer] * 7 + [size, size, ctypes.c_float, number]
        self.has_int8 = hasattr(library, "linear_int8")  # else the machine lacks the instructions for our products
        self.has_bf16 = self.has_int8 and bool(library.bf16_is_fast())
        if self.has_int8:
            self._linear_int8, self._run_blocks = library.linear_int8, library.run_blocks
            self._linear_bf16, self._linear_bf16_to_float = library.linear_bf16, library.linear_bf16_to_float
            product = (pointer, size, size, pointer, size, pointer, size, number, pointer, number)
            self._linear_int8.argtypes = [*product, *[pointer] * 4, size]
            self._run_blocks.argtypes = cpu_blocks.ARGUMENTS
            self._linear_bf16.argtypes = self._linear_bf16_to_float.argtypes = product

    def pack(self, weight: Tensor, *, quantize: bool) -> Weight:
        channels, columns = weight.shape
        if self.has_int8 and quantize:
            integers, scales = quantize_channels(weight)
            panels = to_panels((integers.to(torch.int16) + OFFSET).to(torch.uint8), OFFSET)
            return Int8Panels(F.pad(scales, (0, -channels % (PANELS * LANES))), panels, (channels, columns))
        # A row of other lengths would be read beyond its end.
        if self.has_bf16 and weight.dtype == torch.bfloat16 and columns * weight.element_size() % BLOCK == 0:
            return Bf16Panels(to_panels(weight), (channels, columns))
        return torch_ops.pack(weight, quantize=quantize)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
        """A row has the same bits whatever stands beside it."""
        if isinstance(weight, Bf16Panels):
            return self._linear(self._linear_bf16, x, weight, bias, activation, x.dtype)
        if isinstance(weight, Int8Panels):
            rows, padded = x.numel() // x.shape[-1], weight.padded
            integers = torch.empty(rows, padded, dtype=torch.int8)
            row_scales, row_sums = torch.empty(rows), torch.empty(rows, dtype=torch.int32)
            scratch = weight.scales.data_ptr(), integers.data_ptr(), row_scales.data_ptr(), row_sums.data_ptr(), padded
            return self._linear(self._linear_int8, x, weight, bias, activation, x.dtype, *scratch)
        return torch_ops.linear(x, weight, bias, activation)

    def project(self, x: Tensor, weight: Weight) -> Tensor:
        if isinstance(weight, Bf16Panels):
            return self._linear(self._linear_bf16_to_float, x, weight, None, None, torch.float32)
        return self.linear(x, weight, None)

    @staticmethod
    def _linear(
        function: Callable[..., None],
        x: Tensor,
        weight: Bf16Panels | Int8Panels,
        bias: Tensor | None,
        activation: Activation | None,
        dtype: torch.dtype,
        *scratch: int,
    ) -> Tensor:
        x = x.contiguous()
        channels, columns = weight.shape
        out = x.new_empty(*x.shape[:-1], channels, dtype=dtype)
        function(
            x.data_ptr(), x.numel() // columns, columns, weight.panels.data_ptr(), len(weight.panels), address(bias),
            channels, ACTIVATIONS[activation], out.data_ptr(), torch.get_num_threads(), *scratch,
        )  # fmt: skip
        return out

    def kv_write(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
        k, v = side_by_side(k, v)
        self._kv_write(
            k.data_ptr(), v.data_ptr(), k.stride(0), k_pages.data_ptr(), v_pages.data_ptr(), slot_mapping.data_ptr(),
            len(k), k.shape[1], torch.get_num_threads(),
        )  # fmt: skip

    def decode_step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        slot_mapping: Tensor,
        plan: DecodePlan,
        scale: float,
    ) -> Tensor:
        """A row's arithmetic depends on its own pages only, never on its batch-mates."""
        batch, heads, dim = q.shape
        q, k, v = side_by_side(q, k, v)
        pages = plan.page_list
        out = q.new_empty(batch, heads, dim)
        self._decode_step(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), k_pages.data_ptr(), v_pages.data_ptr(),
            slot_mapping.data_ptr(), pages.page_ids.data_ptr(), pages.offsets.data_ptr(), pages.visible.data_ptr(),
            out.data_ptr(), batch, heads, scale, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def prefill_attention(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
        """A row's arithmetic depends on its own keys only, however its prompt is cut."""
        tokens, heads, dim = q.shape
        (q,) = side_by_side(q)
        tiles = plan.tile_list
        out = q.new_empty(tokens, heads, dim)
        self._prefill_attention(
            q.data_ptr(), q.stride(0), k_pages.data_ptr(), v_pages.data_ptr(), tiles.rows.data_ptr(),
            tiles.offsets.data_ptr(), tiles.page_ids.data_ptr(), tiles.masks.data_ptr(), tiles.hidden.data_ptr(),
            len(tiles.rows), out.data_ptr(), heads, scale, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def add_layernorm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Without a gradient."""
        columns = x.shape[-1]
        if columns % LANES:
            return torch_ops.add_layernorm(x, residual, weight, bias, eps)
        rows, more = x.contiguous(), None if residual is None else residual.contiguous()
        normed, total = torch.empty_like(rows), x if residual is None else torch.empty_like(rows)
        self._add_layernorm(
            rows.data_ptr(), address(more), address(weight), address(bias), x.numel() // columns, columns, eps,
            normed.data_ptr(), total.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return normed, total

    def fuse(self, blocks: Sequence[BlockParts], activation: Activation, *, pre_norm: bool) -> AllBlocks | None:
        """Where all products are this module's."""
        products = [each.weight for part in blocks for each in (part.c_attn, part.c_proj, part.c_fc, part.mlp_c_proj)]
        if blocks[0].ln_1.normalized_shape[0] % LANES or not all(isinstance(w, Bf16Panels | Int8Panels) for w in products):
            return None
        return cpu_blocks.CompiledBlocks(self._run_blocks, blocks, activation, pre_norm=pre_norm)


def side_by_side(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors (N, H, D) of which rows may stand apart, but all of them equally far."""
    row = tensors[0].stride()
    if row[1:] == (tensors[0].shape[2], 1) and all(x.stride() == row for x in tensors):
        return tensors
    return tuple(x.contiguous() for x in tensors)


def load(shape: Shape) -> CompiledOps | None:
    """The compiled ops; None, and a line in the log, where there are none."""
    library = compiled_library(shape)
    return None if library is None else CompiledOps(library)
