"""The structures of csrc/abi.h and the arguments of the functions in csrc/, for ctypes.

kernels.cpu.build compiles `layout` into every library. Compiling fails where C++ and Python differ.
"""

import ctypes
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from typing import get_args

import torch
from torch import Tensor, nn

from kernels.band import PAGE_SIZE
from kernels.cpu.panels import ACTIVATIONS, BLOCK, GROUP, LANES, OFFSET, PANELS, Bf16Panels, Int8Panels
from kernels.names import NONE_LEFT, NOT_FINITE, Activation, PatternKind
from kernels.ops import BlockParts
from kernels.plan import StepPlan
from kernels.sampling_state import COLUMNS, TABLES, SamplingState

KINDS: tuple[PatternKind, ...] = get_args(PatternKind)


class Pointer:
    """The type of an argument that is a tensor or None here and a pointer in C++."""

    @staticmethod
    def from_param(x: Tensor | None) -> c_void_p:
        return c_void_p(None if x is None else x.data_ptr())


class TensorStructure(ctypes.Structure):
    """Takes tensors for its pointers, and keeps them. A copy of it in another structure or array does not."""

    def __init__(self, *values: object):
        self.values = values
        super().__init__(*(x.data_ptr() if isinstance(x, Tensor) else x for x in values))


def pointers(*names: str) -> tuple[tuple[str, type[c_void_p]], ...]:
    return tuple((name, c_void_p) for name in names)


class NormArgs(TensorStructure):
    _fields_ = (*pointers("weight", "bias"), ("eps", c_float))

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> "NormArgs":
        return cls(norm.weight, norm.bias, norm.eps)


class ProductArgs(TensorStructure):
    _fields_ = (
        ("panels", c_void_p),
        ("num_panels", c_int64),
        ("scales", c_void_p),
        ("padded", c_int64),
        ("bias", c_void_p),
        ("channels", c_int64),
        ("columns", c_int64),
    )

    @classmethod
    def of(cls, weight: object, bias: Tensor | None) -> "ProductArgs":
        assert isinstance(weight, Bf16Panels | Int8Panels)
        scales, padded = (weight.scales, weight.padded) if isinstance(weight, Int8Panels) else (None, 0)
        return cls(weight.panels, len(weight.panels), scales, padded, bias, *weight.shape)


class BlockArgs(TensorStructure):
    _fields_ = (
        *((name, NormArgs) for name in ("ln_1", "ln_2")),
        *((name, ProductArgs) for name in ("c_attn", "c_proj", "c_fc", "mlp_c_proj")),
        *pointers("k_pages", "v_pages"),
        ("plan", c_int64),
        ("scale", c_float),
    )

    @classmethod
    def of(cls, parts: BlockParts, plan: int) -> "BlockArgs":
        norms = NormArgs.of(parts.ln_1), NormArgs.of(parts.ln_2)
        linears = parts.c_attn, parts.c_proj, parts.c_fc, parts.mlp_c_proj
        products = (ProductArgs.of(linear.weight, linear.bias) for linear in linears)
        return cls(*norms, *products, parts.k_pages, parts.v_pages, plan, parts.scale)


class PlanArgs(TensorStructure):
    _fields_ = (
        *pointers("page_table", "rows", "positions", "row_ptr", "col_idx"),
        *((name, c_int64) for name in ("table_stride", "kind", "size", "summary")),
        *pointers("slot_mapping", "page_ids", "offsets", "visible"),
        *pointers("tile_rows", "tile_offsets", "tile_page_ids", "tile_masks", "tile_hidden"),
        ("num_tiles", c_int64),
    )

    @classmethod
    def of(cls, plan: StepPlan) -> "PlanArgs":
        """With room for all pages of the rows that decode."""
        table, layout, (kind, size, summary) = plan.page_table, plan.layout, plan.pattern
        sparse = (layout.row_ptr, layout.col_idx) if layout else (None, None)
        most = plan.num_decodes * table.shape[1]
        page_ids, offsets = torch.empty(most, dtype=torch.int64), torch.empty(plan.num_decodes + 1, dtype=torch.int64)
        room = torch.empty_like(plan.positions), page_ids, offsets, torch.empty(most, PAGE_SIZE, dtype=torch.bool)
        tiles = plan.prefill.tile_list if plan.prefill else None
        prefill = (*tiles, len(tiles.rows)) if tiles else ()
        pattern = table.stride(0), KINDS.index(kind), size, summary
        return cls(table, plan.rows, plan.positions, *sparse, *pattern, *room, *prefill)


class QuantizedRows(TensorStructure):
    _fields_ = pointers("integers", "scales", "sums")

    def __init__(self, rows: int, padded: int):
        """Room for `rows` rows of `padded` integers."""
        integers = torch.empty(rows, padded, dtype=torch.int8)
        super().__init__(integers, torch.empty(rows), torch.empty(rows, dtype=torch.int32))


class ScratchArgs(TensorStructure):
    _fields_ = (*pointers("normed", "qkv", "attended", "inner"), ("quantized", QuantizedRows))


class SamplingArgs(TensorStructure):
    _fields_ = (*pointers(*SamplingState._fields), *((f"{name}_stride", c_int64) for name in TABLES))

    @classmethod
    def of(cls, state: SamplingState) -> "SamplingArgs":
        for name, column in state._asdict().items():
            dtype = (COLUMNS | TABLES)[name]
            assert (column.dtype, column.stride(-1)) == (dtype, 1), f"{name}: {column.dtype}, strides {column.stride()}"
        return cls(*state, *(getattr(state, name).stride(0) for name in TABLES))


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    *(NormArgs, ProductArgs, BlockArgs, PlanArgs, QuantizedRows, ScratchArgs, SamplingArgs),
)
# Of the functions that share their work out among threads. They return what Team::run in csrc/team.h does.
ARGUMENTS: dict[str, tuple[object, ...]] = {
    "kv_write": (Pointer, Pointer, c_int64, *[Pointer] * 3, c_int64, c_int64, c_int),
    "decode_attention": (Pointer, c_int64, *[Pointer] * 6, c_int64, c_int64, c_float, c_int),
    "prefill_attention": (Pointer, c_int64, *[Pointer] * 7, c_int64, Pointer, c_int64, c_float, c_int),
    "add_layernorm": (*[Pointer] * 4, c_int64, c_int64, c_float, Pointer, Pointer, c_int),
    "sample": (Pointer, *[c_int64] * 3, POINTER(SamplingArgs), *[Pointer] * 3, c_int),
    "top_logprobs": (Pointer, *[c_int64] * 4, *[Pointer] * 3, c_int),
    # Only in libraries for processors that have the instructions.
    "linear_panels": (POINTER(ProductArgs), Pointer, c_int64, c_int, Pointer, POINTER(QuantizedRows), c_int),
    "project_panels": (POINTER(ProductArgs), Pointer, c_int64, Pointer, c_int),
    "run_blocks": (
        *(POINTER(BlockArgs), c_int64, c_int, c_int, c_int64),
        *(POINTER(PlanArgs), *[c_int64] * 3, Pointer, Pointer, POINTER(ScratchArgs), POINTER(NormArgs), c_int),
    ),
}


def layout() -> str:
    """C++ that compiles after csrc/abi.h only if that has the constants, the structures and the fields of this file."""
    constants = {"PAGE_SIZE": PAGE_SIZE, "LANES": LANES, "GROUP": GROUP, "BLOCK": BLOCK, "PANELS": PANELS, "OFFSET": OFFSET}
    constants |= {"NOT_FINITE": NOT_FINITE, "NONE_LEFT": NONE_LEFT}
    constants |= {name.upper(): KINDS.index(name) for name in KINDS}
    constants |= {str(name).upper(): ACTIVATIONS[name] for name in (None, *get_args(Activation))}
    facts = [f"{name} == {value}" for name, value in constants.items()]
    for structure in STRUCTURES:
        owner = structure.__name__
        facts.append(f"sizeof({owner}) == {ctypes.sizeof(structure)}")
        for name, *_ in structure._fields_:
            field = getattr(structure, name)
            facts += [f"offsetof({owner}, {name}) == {field.offset}", f"sizeof({owner}::{name}) == {field.size}"]
    return "\n".join(("#include <cstddef>", *(f"static_assert({fact});" for fact in facts), ""))
