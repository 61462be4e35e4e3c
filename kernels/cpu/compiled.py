"""The compiled CPU path: C++ (csrc/) where PyTorch's ops are slow, kernels.torch_ops for the rest.

N tokens, H heads of size D, O and C the channels and columns of a weight. Where nothing can be compiled, kernels.torch_ops
serves alone.
"""

import atexit
import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import torch_ops
from kernels.cpu.abi import (
    ARGUMENTS,
    BlockArgs,
    NormArgs,
    PlanArgs,
    ProductArgs,
    QuantizedRows,
    SamplingArgs,
    ScratchArgs,
)
from kernels.cpu.build import Shape, compiled_library
from kernels.cpu.memory import HugePages
from kernels.cpu.panels import ACTIVATIONS, BLOCK, LANES, OFFSET, PANELS, Bf16Panels, Int8Panels, to_panels
from kernels.int8 import quantize_channels
from kernels.logprobs import TopLogprobs
from kernels.names import Activation, PatternKind
from kernels.ops import BlockParts, NativeForward, Weight
from kernels.plan import DecodePlan, PrefillPlan, StepPlan
from kernels.sampling_state import SamplingState

# Bytes of tensors that are kept for helpers, beyond which a call waits for them: logits of prompts take 51 MB a call.
MAX_KEPT = 32 << 20
POLL_SECONDS = 50e-6


class Kept(NamedTuple):
    """What a helper may still read of a call."""

    num_bytes: int
    what: object


class Helpers:
    """A library's threads, which live as long as the process, and what those that were put aside may still read."""

    def __init__(self, library: ctypes.CDLL):
        library.oldest_job.restype = ctypes.c_int64
        self._oldest_job = library.oldest_job
        self.kept: dict[int, Kept] = {}  # by the number of the job that may still read it
        atexit.register(self.free, -1)

    def free(self, most: int) -> None:
        """Let go of what no helper can read any more, and wait until that leaves no more than `most` bytes; -1: nothing."""
        while kept := list(self.kept.items()):  # a copy: another thread may be here too
            oldest = self._oldest_job()
            for number, _ in kept:
                if number < oldest:
                    self.kept.pop(number, None)
            if sum(each.num_bytes for number, each in kept if number >= oldest) <= most:
                break
            time.sleep(POLL_SECONDS)


@cache
def helpers_of(handle: int) -> Helpers:
    """The helpers of an open library. They outlive the ops that call it, and the weights that those have packed."""
    return Helpers(ctypes.CDLL(None, handle=handle))


class CompiledOps:
    """kernels.torch_ops with some of its functions compiled. A row has the same bits in any batch."""

    bias_activation = staticmethod(torch_ops.bias_activation)

    def __init__(self, library: ctypes.CDLL):
        for name, arguments in ARGUMENTS.items():
            if hasattr(library, name):
                getattr(library, name).argtypes, getattr(library, name).restype = arguments, ctypes.c_int64
        self._library, self._helpers = library, helpers_of(library._handle)
        self._huge_pages = HugePages()
        has_products = hasattr(library, "linear_panels")
        self.has_int8 = has_products and bool(library.int8_is_fast())
        self.has_bf16 = has_products and bool(library.bf16_is_fast())
        self._sampled: tuple[SamplingState, SamplingArgs] | None = None  # the last call's, for the next one with this state

    def call(self, function: str, *arguments: object, keep: object = None) -> None:
        """Call a function that shares its work out among this thread's number of threads, its last argument.

        A helper that was put aside may read the arguments later: they are kept until it no longer can, and `keep` with them.
        """
        if number := getattr(self._library, function)(*arguments, torch.get_num_threads()):
            num_bytes = sum(each.nbytes for each in arguments if isinstance(each, Tensor))
            self._helpers.kept[number] = Kept(num_bytes, (arguments, keep))
        self._helpers.free(MAX_KEPT)

    def pack(self, weight: Tensor, *, quantize: bool) -> Weight:
        packed = self._pack(weight, quantize=quantize)
        if isinstance(packed, Bf16Panels | Int8Panels):
            self._library.use_helpers()  # else oneDNN multiplies
        return packed

    def _pack(self, weight: Tensor, *, quantize: bool) -> Weight:
        channels, columns = weight.shape
        if self.has_int8 and quantize:
            integers, scales = quantize_channels(weight)
            panels = to_panels((integers.to(torch.int16) + OFFSET).to(torch.uint8), OFFSET)
            scales = F.pad(scales, (0, -channels % (PANELS * LANES)))
            return Int8Panels(scales, self._huge_pages.copy(panels), (channels, columns))
        # The products read whole BLOCKs of a row, so they would read past the end of other rows.
        if self.has_bf16 and weight.dtype == torch.bfloat16 and columns * weight.element_size() % BLOCK == 0:
            return Bf16Panels(self._huge_pages.copy(to_panels(weight)), (channels, columns))
        return torch_ops.pack(weight, quantize=quantize)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
        if not isinstance(weight, Bf16Panels | Int8Panels):
            return torch_ops.linear(x, weight, bias, activation)
        x, rows = x.contiguous(), x.numel() // x.shape[-1]
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        room = QuantizedRows(rows, weight.padded) if isinstance(weight, Int8Panels) else None
        self.call("linear_panels", ProductArgs.of(weight, bias), x, rows, ACTIVATIONS[activation], out, room)
        return out

    def project(self, x: Tensor, weight: Weight) -> Tensor:
        if not isinstance(weight, Bf16Panels):
            return self.linear(x, weight, None)
        x, rows = x.contiguous(), x.numel() // x.shape[-1]
        out = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32)
        self.call("project_panels", ProductArgs.of(weight, None), x, rows, out)
        return out

    def kv_write(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
        k, v = same_strides(k, v)
        self.call("kv_write", k, v, k.stride(0), k_pages, v_pages, slot_mapping, len(k), k.shape[1])

    def decode_attention(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, scale: float) -> Tensor:
        (q,) = same_strides(q)
        pages, out = plan.page_list, q.new_empty(q.shape)
        self.call(
            "decode_attention",
            *(q, q.stride(0), k_pages, v_pages, pages.page_ids, pages.offsets, pages.visible, out),
            *(len(q), q.shape[1], scale),
        )
        return out

    def prefill_attention(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
        """A query has the same bits however its prompt is cut."""
        (q,) = same_strides(q)
        tiles, out = plan.tile_list, q.new_empty(q.shape)
        self.call(
            "prefill_attention",
            *(q, q.stride(0), k_pages, v_pages, tiles.rows, tiles.offsets, tiles.page_ids, tiles.masks, tiles.hidden),
            *(len(tiles.rows), out, q.shape[1], scale),
        )
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
        self.call("add_layernorm", rows, more, weight, bias, x.numel() // columns, columns, eps, normed, total)
        return normed, total

    def sample(self, logits: Tensor, state: SamplingState, batch_rows: Tensor, positions: Tensor) -> Tensor:
        """The tokens of kernels.torch_sampling, but for rounding: README.md says where and how often."""
        logits = rows_of_floats(logits)
        batch_rows, positions, tokens = batch_rows.contiguous(), positions.contiguous(), torch.empty_like(batch_rows)
        if self._sampled is None or self._sampled[0] is not state:
            self._sampled = state, SamplingArgs.of(state)
        args = self._sampled[1]
        self.call("sample", logits, logits.stride(0), *logits.shape, args, batch_rows, positions, tokens, keep=state)
        return tokens

    def top_logprobs(self, logits: Tensor, count: int) -> TopLogprobs:
        logits = rows_of_floats(logits)
        rows, count = len(logits), min(count, logits.shape[1])
        ids = torch.empty(rows, count, dtype=torch.int64)
        found = TopLogprobs(torch.empty(rows, 1), ids, torch.empty(rows, count))
        self.call("top_logprobs", logits, logits.stride(0), *logits.shape, count, *found)
        return found

    def native_forward(
        self, blocks: Sequence[BlockParts], final_norm: nn.LayerNorm | None, activation: Activation, *, pre_norm: bool
    ) -> NativeForward | None:
        """None unless all norms and products are compiled."""
        products = [each.weight for part in blocks for each in (part.c_attn, part.c_proj, part.c_fc, part.mlp_c_proj)]
        if blocks[0].ln_1.normalized_shape[0] % LANES or not all(isinstance(w, Bf16Panels | Int8Panels) for w in products):
            return None
        return NativeBlocks(self, blocks, final_norm, activation, pre_norm=pre_norm)


class NativeBlocks:
    """A step up to the final norm in one call: between ops Python would wait for the interpreter's lock.

    See kernels.ops.NativeForward.
    """

    def __init__(
        self,
        ops: CompiledOps,
        parts: Sequence[BlockParts],
        final_norm: nn.LayerNorm | None,
        activation: Activation,
        *,
        pre_norm: bool,
    ):
        self._ops, self._activation, self._pre_norm = ops, ACTIVATIONS[activation], pre_norm
        self._parts = list(parts)  # self._blocks points to their tensors
        self._final_norm = NormArgs.of(final_norm) if final_norm else None
        self._kinds = list(dict.fromkeys(part.kind for part in parts))
        self._blocks = (BlockArgs * len(parts))(*(BlockArgs.of(part, self._kinds.index(part.kind)) for part in parts))
        self._heads = parts[0].k_pages.shape[1]

    def __call__(self, x: Tensor, plans: Mapping[PatternKind, StepPlan], begins: Callable[[], object]) -> Tensor:
        tokens, columns = x.shape  # N, C
        first = self._blocks[0]
        num_decodes = plans[self._kinds[0]].num_decodes
        plan_args = [PlanArgs.of(plans[kind]) for kind in self._kinds]
        step = (PlanArgs * len(plan_args))(*plan_args)
        update, normed, attended = (torch.empty_like(x) for _ in range(3))
        qkv, inner = x.new_empty(tokens, 3 * columns), x.new_empty(tokens, first.c_fc.channels)
        quantized = QuantizedRows(tokens, max(first.c_attn.padded, first.mlp_c_proj.padded))
        scratch = ScratchArgs(normed, qkv, attended, inner, quantized)
        begins()
        self._ops.call(
            "run_blocks",
            *(self._blocks, len(self._blocks), self._pre_norm, self._activation, self._heads),
            *(step, len(step), tokens, num_decodes, x, update, scratch, self._final_norm),
            keep=(self._parts, plans, plan_args),
        )
        if self._final_norm:
            return normed
        return x + update if self._pre_norm else x


def rows_of_floats(logits: Tensor) -> Tensor:
    """Logits (R, V) fp32 with contiguous rows, which may lie apart: as they are, or copied."""
    assert logits.dtype == torch.float32, f"logits are {logits.dtype}"
    return logits if logits.stride(1) == 1 else logits.contiguous()


def same_strides(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors (N, H, D) with contiguous heads and one distance between tokens: as they are, or copied."""
    strides = tensors[0].stride()
    if strides[1:] == (tensors[0].shape[2], 1) and all(x.stride() == strides for x in tensors):
        return tensors
    return tuple(x.contiguous() for x in tensors)


def load(shape: Shape) -> CompiledOps | None:
    """The compiled ops; None, and a line in the log, where there are none."""
    library = compiled_library(shape)
    return None if library is None else CompiledOps(library)
