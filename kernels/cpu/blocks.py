"""All blocks of the decoder as one call of compiled code: no Python between ops, which waits for the interpreter's lock."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor, nn

from kernels.cpu.panels import ACTIVATIONS, Bf16Panels, Int8Panels, address
from kernels.names import Activation, PatternKind
from kernels.ops import BlockParts, LinearParts
from kernels.plan import StepPlan

# Structures of the source, with its names.


class Norm(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("eps", c_float))

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> "Norm":
        return cls(address(norm.weight), address(norm.bias), norm.eps)


class Product(ctypes.Structure):
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
    def of(cls, linear: LinearParts) -> "Product":
        weight = linear.weight
        assert isinstance(weight, Bf16Panels | Int8Panels)
        scales, padded = (weight.scales.data_ptr(), weight.padded) if isinstance(weight, Int8Panels) else (None, 0)
        return cls(weight.panels.data_ptr(), len(weight.panels), scales, padded, address(linear.bias), *weight.shape)


class Block(ctypes.Structure):
    _fields_ = (
        ("ln_1", Norm),
        ("ln_2", Norm),
        ("c_attn", Product),
        ("c_proj", Product),
        ("c_fc", Product),
        ("mlp_c_proj", Product),
        ("k_pages", c_void_p),
        ("v_pages", c_void_p),
        ("plan", c_int64),
        ("scale", c_float),
    )

    @classmethod
    def of(cls, parts: BlockParts, plan: int) -> "Block":
        norms = Norm.of(parts.ln_1), Norm.of(parts.ln_2)
        products = map(Product.of, (parts.c_attn, parts.c_proj, parts.c_fc, parts.mlp_c_proj))
        return cls(*norms, *products, parts.k_pages.data_ptr(), parts.v_pages.data_ptr(), plan, parts.scale)


class Plan(ctypes.Structure):
    _fields_ = (
        ("slot_mapping", c_void_p),
        ("page_ids", c_void_p),
        ("offsets", c_void_p),
        ("visible", c_void_p),
        ("tile_rows", c_void_p),
        ("tile_offsets", c_void_p),
        ("tile_page_ids", c_void_p),
        ("tile_masks", c_void_p),
        ("tile_hidden", c_void_p),
        ("num_tiles", c_int64),
    )

    @classmethod
    def of(cls, plan: StepPlan) -> "Plan":
        """Valid as long as `plan`."""
        found = cls(slot_mapping=plan.slot_mapping.data_ptr())
        if plan.decode:
            pages = plan.decode.page_list
            found.page_ids, found.offsets = pages.page_ids.data_ptr(), pages.offsets.data_ptr()
            found.visible = pages.visible.data_ptr()
        if plan.prefill:
            tiles = plan.prefill.tile_list
            found.tile_rows, found.tile_offsets = tiles.rows.data_ptr(), tiles.offsets.data_ptr()
            found.tile_page_ids, found.tile_masks = tiles.page_ids.data_ptr(), tiles.masks.data_ptr()
            found.tile_hidden, found.num_tiles = tiles.hidden.data_ptr(), len(tiles.rows)
        return found


class Scratch(ctypes.Structure):
    _fields_ = (
        ("normed", c_void_p),
        ("qkv", c_void_p),
        ("attended", c_void_p),
        ("inner", c_void_p),
        ("integers", c_void_p),
        ("row_scales", c_void_p),
        ("row_sums", c_void_p),
    )


# Of the source's run_blocks.
ARGUMENTS = (c_void_p, c_int64, c_int, c_int, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int)


class CompiledBlocks:
    """See kernels.ops.AllBlocks."""

    def __init__(
        self, run_blocks: Callable[..., None], parts: Sequence[BlockParts], activation: Activation, *, pre_norm: bool
    ):
        self._run, self._activation, self._pre_norm = run_blocks, ACTIVATIONS[activation], pre_norm
        self._parts = list(parts)  # the blocks point to their tensors
        self._kinds = list(dict.fromkeys(part.kind for part in parts))
        self._blocks = (Block * len(parts))(*(Block.of(part, self._kinds.index(part.kind)) for part in parts))
        self._heads = parts[0].k_pages.shape[1]
        self._inner = self._blocks[0].c_fc.channels
        self._padded = max(self._blocks[0].c_attn.padded, self._blocks[0].mlp_c_proj.padded)

    def __call__(self, x: Tensor, plans: Mapping[PatternKind, StepPlan]) -> tuple[Tensor, Tensor | None]:
        tokens, columns = x.shape
        decodes = plans[self._kinds[0]].num_decodes
        step = (Plan * len(self._kinds))(*(Plan.of(plans[kind]) for kind in self._kinds))
        update, normed, attended = (torch.empty_like(x) for _ in range(3))
        qkv, inner = x.new_empty(tokens, 3 * columns), x.new_empty(tokens, self._inner)
        integers = torch.empty(tokens, self._padded, dtype=torch.int8)
        row_scales, row_sums = torch.empty(tokens), torch.empty(tokens, dtype=torch.int32)
        scratch = Scratch(*(t.data_ptr() for t in (normed, qkv, attended, inner, integers, row_scales, row_sums)))
        self._run(
            self._blocks, len(self._blocks), self._pre_norm, self._activation, self._heads, step, tokens, decodes,
            x.data_ptr(), update.data_ptr(), ctypes.byref(scratch), torch.get_num_threads(),
        )  # fmt: skip
        return x, update if self._pre_norm else None
