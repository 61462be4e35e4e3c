"""The decoder's ops: one signature each, for every implementation.

kernels.gpu.triton_ops, kernels.torch_ops and kernels.cpu.compiled serve. kernels.reference is the oracle that tests hold
them to. The model gets one of the four as an argument.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from kernels.logprobs import TopLogprobs
from kernels.names import Activation, PatternKind
from kernels.plan import DecodePlan, PrefillPlan, StepPlan
from kernels.sampling_state import SamplingState


class PackedWeight(ABC):
    """A weight (O, C) in a layout of its own."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight again."""


Weight = Tensor | PackedWeight


class LinearParts(NamedTuple):
    """The operands of Ops.linear."""

    weight: Weight
    bias: Tensor | None


class BlockParts(NamedTuple):
    """A block of the decoder, its linears packed or not, and its pages of keys and values."""

    ln_1: nn.LayerNorm
    c_attn: LinearParts
    c_proj: LinearParts
    ln_2: nn.LayerNorm
    c_fc: LinearParts
    mlp_c_proj: LinearParts
    k_pages: Tensor
    v_pages: Tensor
    kind: PatternKind
    scale: float  # on attention scores


# Hidden states (N, C) of x (N, C), which it overwrites, after all blocks and the final norm. Takes a plan for each kind of
# attention, and what to call right ahead of the native code.
NativeForward = Callable[[Tensor, Mapping[PatternKind, StepPlan], Callable[[], object]], Tensor]


class Ops(Protocol):
    """N tokens in a step, H heads of size D, C the width, P pages of PAGE_SIZE keys, V the vocabulary."""

    def kv_write(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
        """Scatter the keys and values (N, H, D) of a step into pages (P, H, PAGE_SIZE, D).

        slot_mapping (N,) int64 is page * PAGE_SIZE + offset of each token.
        """

    def decode_attention(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, scale: float) -> Tensor:
        """Attention of one query per sequence, q (B, H, D), over its live pages: (B, H, D)."""

    def prefill_attention(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
        """Attention of prompt chunks, q (N, H, D) chunk after chunk, over their sequences' pages: (N, H, D)."""

    def pack(self, weight: Tensor, *, quantize: bool) -> Weight:
        """A weight (O, C) in the layout that `linear` and `project` read fastest, in int8 if `quantize`. No gradient."""

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
        """activation(x @ weight.T + bias), by the vendor's library: x (..., C), weight (O, C), packed or not, bias (O,)."""

    def project(self, x: Tensor, weight: Weight) -> Tensor:
        """x @ weight.T, in fp32 where the implementation need not round the product to x's dtype."""

    def add_layernorm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """LayerNorm of x + residual, (N, C) both, and the sum itself. Statistics in fp32."""

    def bias_activation(self, x: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
        """activation(x + bias) of x (N, C) and bias (C,), after a product that did not apply them. May overwrite x."""

    def sample(self, logits: Tensor, state: SamplingState, batch_rows: Tensor, positions: Tensor) -> Tensor:
        """Token ids (B,) int64 for logits (B, V) fp32 of batch_rows (B,); positions (B,) are those of the new tokens.

        A row that no token can be sampled from gets NOT_FINITE or NONE_LEFT of kernels.names. No row depends on another.
        """

    def top_logprobs(self, logits: Tensor, count: int) -> TopLogprobs:
        """The `count` likeliest tokens of logits (R, V) fp32, equal ones by id, and what all logprobs are relative to.

        On a CPU a row has the same bits in any batch. A row with NaN or infinity may have any tokens, and no finite logprob.
        """

    def native_forward(
        self, blocks: Sequence[BlockParts], final_norm: nn.LayerNorm | None, activation: Activation, *, pre_norm: bool
    ) -> NativeForward | None:
        """All blocks and the final norm in one call of native code, with the bits of the ops one by one.

        None where there is no such code. The modules must keep their tensors from then on.
        """
