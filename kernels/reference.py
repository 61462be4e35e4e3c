"""The oracle: the ops of kernels.ops.Ops, slow and obvious. Tests hold every implementation to it."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.band import PAGE_SIZE
from kernels.int8 import ZERO_POINT, Int8Weight, quantize_rows, quantize_weight
from kernels.logprobs import TopLogprobs
from kernels.names import NONE_LEFT, NOT_FINITE, Activation
from kernels.noise import gumbel, row_keys
from kernels.ops import BlockParts, PackedWeight, Weight
from kernels.patterns import Pattern
from kernels.plan import DecodePlan, PrefillPlan
from kernels.sampling_state import SamplingState


def kv_write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
    for i, slot in enumerate(slot_mapping.tolist()):
        page, offset = divmod(slot, PAGE_SIZE)
        k_pages[page, :, offset], v_pages[page, :, offset] = k[i], v[i]


def decode_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, scale: float) -> Tensor:
    starts = (plan.lengths - 1).tolist()
    chunks = PrefillPlan(plan.page_table, starts, [1] * len(q), plan.pattern, plan.layout)
    return prefill_attention(q, k_pages, v_pages, chunks, scale)


def prefill_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
    queries = q.split(plan.lengths)
    rows = [
        attend(queries[i], start, k_pages, v_pages, plan.page_table[i], plan.pattern, scale)
        for i, start in enumerate(plan.starts)
    ]
    return torch.cat(rows)


def attend(
    q: Tensor, start: int, k_pages: Tensor, v_pages: Tensor, page_ids: Tensor, pattern: Pattern, scale: float
) -> Tensor:
    """Queries (T, H, D) at start, start + 1, ...: all keys in one tensor, the predicate as mask, softmax in fp64."""
    positions = torch.arange(start, start + len(q), device=q.device)
    keys = torch.arange(start + len(q), device=q.device)
    seen = pattern.sees(positions[:, None], keys)  # (T, keys)
    k, v = (x[page_ids[keys // PAGE_SIZE].long(), :, keys % PAGE_SIZE].double() for x in (k_pages, v_pages))  # (keys, H, D)
    # A page that no query sees any more may hold anything, and 0 * NaN is NaN.
    v = v.masked_fill(~seen.any(0)[:, None, None], 0.0)
    scores = (torch.einsum("thd,khd->htk", q.double(), k) * scale).masked_fill(~seen, float("-inf"))
    return torch.einsum("htk,khd->thd", scores.softmax(-1), v).to(q.dtype)


def pack(weight: Tensor, *, quantize: bool) -> Weight:
    return quantize_weight(weight) if quantize else weight


def linear(x: Tensor, weight: Weight, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
    if isinstance(weight, Int8Weight):
        integers, scales = quantize_rows(x)  # how rows are rounded is a definition: there is nothing to check
        rows = (integers.double() - ZERO_POINT) * scales.double()
        product = rows @ weight.dense().T
        product = (product if bias is None else product + bias.double()).to(x.dtype)
    elif isinstance(weight, PackedWeight):
        product = F.linear(x, weight.dense(), bias)
    else:
        product = F.linear(x, weight.to_dense().to(x.dtype) if weight.is_mkldnn else weight, bias)
    return product if activation is None else bias_activation(product, None, activation)


def project(x: Tensor, weight: Weight) -> Tensor:
    if isinstance(weight, Tensor | Int8Weight):
        return linear(x, weight, None)
    return F.linear(x.float(), weight.dense().float())


def add_layernorm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    centered = total.double() - total.double().mean(-1, keepdim=True)
    normed = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        normed = normed * weight.double()
    if bias is not None:
        normed = normed + bias.double()
    return normed.to(x.dtype), total


def bias_activation(x: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    y = x.double() if bias is None else x.double() + bias.double()
    if activation == "gelu_new":
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    elif activation == "gelu":
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    else:
        y = torch.where(y < 0, 0.0, y)
    return y.to(x.dtype)


def sample(logits: Tensor, state: SamplingState, batch_rows: Tensor, positions: Tensor) -> Tensor:
    rows = zip(logits, batch_rows.tolist(), positions.tolist(), strict=True)
    tokens = [sample_row(row_logits, state, batch_row, position) for row_logits, batch_row, position in rows]
    return torch.tensor(tokens, device=logits.device)


def sample_row(logits: Tensor, state: SamplingState, batch_row: int, position: int) -> int:
    """The token of one row of logits (V,): their first maximum, or that of logit + noise over the tokens that stay."""
    if not (logits < math.inf).all():
        return NOT_FINITE
    if state.adjusted[batch_row]:
        logits = adjust(logits, state, batch_row)
    if (logits == -math.inf).all():
        return NONE_LEFT
    if state.temperature[batch_row] == 0:
        return int(logits.argmax())
    x = (logits - logits.max()) / state.temperature[batch_row]
    stays = truncate(x, int(state.top_k[batch_row]), float(state.top_p[batch_row]), float(state.min_p[batch_row]))
    key = row_keys(state.seed[batch_row, None], state.choice[batch_row, None], torch.tensor([position], device=x.device))
    noised = x + gumbel(key, torch.arange(len(x), device=x.device))[0]
    return int(noised.masked_fill(~stays, float("-inf")).argmax())


def adjust(logits: Tensor, state: SamplingState, batch_row: int) -> Tensor:
    """Logits (V,) after the batch row's penalties and bias."""
    generated, penalty = state.generated[batch_row], state.repetition_penalty[batch_row]
    seen = (generated > 0) | state.in_prompt[batch_row]
    logits = torch.where(seen & (logits > 0), logits / penalty, torch.where(seen, logits * penalty, logits))
    logits = logits - state.frequency_penalty[batch_row] * generated
    logits = logits - state.presence_penalty[batch_row] * (generated > 0)
    return logits + state.bias[batch_row]


def truncate(x: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which tokens stay (V,). x (V,) are logits / temperature with their maximum at 0. Equal logits stay or go together."""
    likelier = x > x[:, None]  # (token, other token): whether the other is likelier
    weight = x.double().exp()
    stays = weight >= min_p * weight.max()
    if top_k > 0:
        stays &= likelier.sum(-1) < top_k
    if top_p < 1:
        weight = torch.where(stays, weight, 0.0)
        stays &= (likelier.double() @ weight < top_p * weight.sum()) | (x == x.max())
    return stays


def top_logprobs(logits: Tensor, count: int) -> TopLogprobs:
    values, ids = logits.sort(descending=True, stable=True)
    totals = logits.double().logsumexp(-1, keepdim=True)
    return TopLogprobs(totals.float(), ids[:, :count], (values[:, :count] - totals).float())


def native_forward(
    blocks: Sequence[BlockParts], final_norm: nn.LayerNorm | None, activation: Activation, *, pre_norm: bool
) -> None:
    """Ops run one by one."""
