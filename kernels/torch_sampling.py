"""Sampling in plain PyTorch: from the likeliest tokens, and from the whole vocabulary only if those are not enough."""

import math

import torch
from torch import Tensor

from kernels.long_rows import first_argmax
from kernels.names import NONE_LEFT, NOT_FINITE
from kernels.noise import gumbel, row_keys
from kernels.sampling_state import SamplingState

# Candidates looked at ahead of sorting the whole vocabulary; truncation rarely leaves more.
SHORTLIST = 1024


def sample(logits: Tensor, state: SamplingState, batch_rows: Tensor, positions: Tensor) -> Tensor:
    """Token ids (B,) int64 for logits (B, V) fp32 of batch_rows (B,); positions (B,) are those of the new tokens.

    Rows do not influence each other. A row that no token can be sampled from gets NOT_FINITE or NONE_LEFT.
    """
    rows, given = torch.nonzero(state.adjusted[batch_rows]).squeeze(1), logits
    if len(rows):
        logits = logits.index_copy(0, rows, adjust(logits[rows], state, batch_rows[rows]))
    tokens = first_argmax(logits)
    peaks = logits.gather(1, tokens[:, None]).squeeze(1)  # NaN, if the row holds one
    drawn = torch.nonzero(state.temperature[batch_rows]).squeeze(1)  # a temperature of 0 takes the first maximum
    if len(drawn):
        tokens[drawn] = draw(logits[drawn], state, batch_rows[drawn], positions[drawn])
    if all(map(math.isfinite, peaks.tolist())):
        return tokens
    is_finite = peaks < math.inf
    if len(rows):  # what a penalty makes infinite is no fault of the model
        is_finite[rows] = given[rows].amax(-1) < math.inf
    return tokens.masked_fill_(peaks == -math.inf, NONE_LEFT).masked_fill_(~is_finite, NOT_FINITE)


def adjust(logits: Tensor, state: SamplingState, batch_rows: Tensor) -> Tensor:
    """Logits (B, V) after the penalties and the bias of their batch_rows (B,)."""
    generated = state.generated[batch_rows]
    penalty = state.repetition_penalty[batch_rows, None]
    damped = torch.where(logits > 0, logits / penalty, logits * penalty)
    logits = torch.where((generated > 0) | state.in_prompt[batch_rows], damped, logits)
    logits = logits - state.frequency_penalty[batch_rows, None] * generated
    logits = logits - state.presence_penalty[batch_rows, None] * (generated > 0)
    return logits + state.bias[batch_rows]


def draw(logits: Tensor, state: SamplingState, batch_rows: Tensor, positions: Tensor) -> Tensor:
    """Token ids (B,) drawn from softmax(logits / temperature), truncated by top-k and min-p, then by top-p of what is left.

    The draw takes the maximum of logit + Gumbel noise, with noise for each token of a row. So a difference in the logits'
    last bits hardly ever changes the token; with an inverted running sum over the vocabulary it often would.
    """
    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    scaled = (logits - logits.amax(-1, keepdim=True)) / state.temperature[batch_rows, None]
    keys = row_keys(state.seed[batch_rows], state.choice[batch_rows], positions)
    top_k, top_p, min_p = state.top_k[batch_rows], state.top_p[batch_rows], state.min_p[batch_rows]
    truncated = (top_k > 0) | (top_p < 1) | (min_p > 0)
    tokens = torch.empty_like(batch_rows)
    vocab_size = logits.shape[1]
    whole = torch.nonzero(~truncated).squeeze(1)
    if len(whole):
        tokens[whole] = (scaled[whole] + gumbel(keys[whole], torch.arange(vocab_size, device=logits.device))).argmax(-1)
    pending = torch.nonzero(truncated).squeeze(1)
    for width in (min(SHORTLIST, vocab_size), vocab_size):
        if not len(pending):
            break
        ids, kept, enough = shortlist(scaled[pending], top_k[pending], top_p[pending], min_p[pending], width)
        noised = kept + gumbel(keys[pending], ids)
        # The lowest id of the maxima, as argmax over the whole vocabulary takes it; NaN equals nothing.
        best = torch.where(noised == noised.amax(-1, keepdim=True), ids, vocab_size - 1).amin(-1)
        tokens[pending[enough]] = best[enough]
        pending = pending[~enough]
    return tokens


def shortlist(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `width` likeliest tokens, likeliest first: ids and logits (B, width), and whether no other token is kept (B,).

    Logits outside the truncated set are -inf. Equal logits are kept or dropped together, and the likeliest are always kept.
    The list is long enough if its last token is dropped: all less likely ones are dropped, too.
    """
    vocab_size = scaled.shape[1]
    values, ids = torch.topk(scaled, width)
    last = torch.where(top_k > 0, top_k, width).clamp_max(width) - 1
    weights = values.double().exp()
    kept = (values >= values.gather(1, last[:, None])) & (weights >= min_p[:, None])
    weights = weights.masked_fill(~kept, 0.0)
    total = weights.sum(-1)
    enough = ~kept[:, -1]
    beyond = torch.nonzero(kept[:, -1] & (top_k == 0) & (top_p < 1)).squeeze(1)
    if len(beyond) and width < vocab_size:
        mass = scaled[beyond].double().exp()
        total[beyond] = mass.masked_fill(mass < min_p[beyond, None], 0.0).sum(-1)
        enough[beyond] = True  # as far as top-k and min-p go
    limit = torch.where(top_p < 1, top_p * total, float("inf"))
    heavier = weights.cumsum(-1) - weights
    last = (kept & (heavier < limit[:, None])).sum(-1).clamp_min(1) - 1
    kept &= values >= values.gather(1, last[:, None])
    enough = (enough & ~kept[:, -1]) | (width == vocab_size)
    return ids, values.masked_fill(~kept, float("-inf")), enough
