"""All blocks of the decoder in one call of compiled code: between ops Python would wait for the interpreter's lock."""

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kernels.cpu.abi import BlockArgs, PlanArgs, QuantizedRows, ScratchArgs
from kernels.cpu.panels import ACTIVATIONS
from kernels.names import Activation, PatternKind
from kernels.ops import BlockParts
from kernels.plan import StepPlan


class NativeBlocks:
    """See kernels.ops.NativeForward. N tokens in a step, C the width."""

    def __init__(self, library: ctypes.CDLL, parts: Sequence[BlockParts], activation: Activation, *, pre_norm: bool):
        self._library, self._activation, self._pre_norm = library, ACTIVATIONS[activation], pre_norm
        self._parts = list(parts)  # self._blocks points to their tensors
        self._kinds = list(dict.fromkeys(part.kind for part in parts))
        self._blocks = (BlockArgs * len(parts))(*(BlockArgs.of(part, self._kinds.index(part.kind)) for part in parts))
        self._heads = parts[0].k_pages.shape[1]

    def __call__(self, x: Tensor, plans: Mapping[PatternKind, StepPlan]) -> tuple[Tensor, Tensor | None]:
        tokens, columns = x.shape  # x_NC
        first = self._blocks[0]
        num_decodes = plans[self._kinds[0]].num_decodes
        step = (PlanArgs * len(self._kinds))(*(PlanArgs.of(plans[kind]) for kind in self._kinds))
        update, normed, attended = (torch.empty_like(x) for _ in range(3))
        qkv, inner = x.new_empty(tokens, 3 * columns), x.new_empty(tokens, first.c_fc.channels)
        quantized = QuantizedRows(tokens, max(first.c_attn.padded, first.mlp_c_proj.padded))
        scratch = ScratchArgs(normed, qkv, attended, inner, quantized)
        self._library.run_blocks(
            *(self._blocks, len(self._blocks), self._pre_norm, self._activation, self._heads),
            *(step, tokens, num_decodes, x, update, scratch, torch.get_num_threads()),
        )
        return x, update if self._pre_norm else None
