"""Pick the next token: pure functions of the logits and of each row's own parameters.

Rows never influence each other: random numbers are hashes of (seed, choice, position, token), so the same request draws
the same numbers alone and in a full batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Candidates looked at before the whole vocabulary is sorted; top-k and top-p rarely need more.
SHORTLIST = 1024


class SamplingRows(NamedTuple):
    """Parameters of B rows, one tensor (B,) each."""

    temperature: Tensor  # fp32, 0 is greedy
    top_k: Tensor  # int64, 0 keeps all
    top_p: Tensor  # fp32
    seed: Tensor  # int64
    choice: Tensor  # int64
    position: Tensor  # int64, of the token being sampled


def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Token ids (B,) int64 for logits (B, V) fp32. A temperature of 0 takes the first maximum."""
    greedy = rows.temperature == 0
    tokens = logits.argmax(-1)
    drawn = torch.nonzero(~greedy).squeeze(1)
    if len(drawn):
        params = SamplingRows(*(column[drawn] for column in rows))
        tokens[drawn] = draw(logits[drawn], params)
    return tokens


def draw(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Token ids (B,) drawn from softmax(logits / temperature), truncated by top-k and then by top-p of what it leaves.

    The draw takes the maximum of logit + Gumbel noise, where each token of a row has noise of its own. Logits that differ
    in their last bits then hardly ever change the token, which an inverted running sum over the vocabulary would do often.
    """
    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    scaled = (logits - logits.amax(-1, keepdim=True)) / rows.temperature[:, None]
    keys = row_keys(rows.seed, rows.choice, rows.position)
    truncated = (rows.top_k > 0) | (rows.top_p < 1)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    vocab_size = logits.shape[1]
    whole = torch.nonzero(~truncated).squeeze(1)
    if len(whole):
        noise = gumbel(keys[whole], torch.arange(vocab_size, device=logits.device))
        tokens[whole] = (scaled[whole] + noise).argmax(-1)
    pending = torch.nonzero(truncated).squeeze(1)
    for width in (min(SHORTLIST, vocab_size), vocab_size):
        if not len(pending):
            break
        ids, kept, enough = shortlist(scaled[pending], rows.top_k[pending], rows.top_p[pending], width)
        best = (kept + gumbel(keys[pending], ids)).argmax(-1, keepdim=True)
        tokens[pending[enough]] = ids.gather(1, best).squeeze(1)[enough]
        pending = pending[~enough]
    return tokens


def shortlist(scaled: Tensor, top_k: Tensor, top_p: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `width` likeliest tokens, likeliest first: ids and logits (B, width), and whether they hold all that stay (B,).

    Logits outside the truncated set are -inf. The likeliest token always stays, so a top_p of 0 is greedy.
    """
    vocab_size = scaled.shape[1]
    # Which of several equal logits at the cut stay is torch's choice; it depends on nothing but the row.
    order = torch.sort(scaled, descending=True, stable=True) if width == vocab_size else torch.topk(scaled, width)
    keep = torch.where(top_k > 0, top_k, vocab_size).clamp_max(vocab_size)
    weights = order.values.double().exp()
    weights = weights.masked_fill(torch.arange(width, device=scaled.device) >= keep[:, None], 0.0)
    mass = torch.where(keep <= width, weights.sum(-1), scaled.double().exp().sum(-1))
    before = weights.cumsum(-1) - weights
    inside = (before < (top_p * mass)[:, None]) & (weights > 0)
    inside[:, 0] = True
    enough = (keep <= width) | ((top_k == 0) & ~inside[:, -1])
    return order.indices, order.values.masked_fill(~inside, float("-inf")), enough


def row_keys(seed: Tensor, choice: Tensor, position: Tensor) -> Tensor:
    """A 64-bit hash (B,) of each row's seed, choice and position."""
    return mix(mix(mix(seed) ^ choice) ^ position)


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Gumbel noise (B, n) fp32: a function of each row's key (B,) and of the token ids, (n,) or (B, n), alone."""
    numbers = shift_right(mix(keys[:, None] ^ (ids + 1)), 11)
    # 53 bits rounded to fp32 are finest near 0, where -log(1 - u) makes the largest noise.
    exponential = -torch.log1p(-((numbers.float() + 0.5) * 2.0**-53).clamp_max(1 - 2.0**-24))
    return -exponential.log()


def mix(x: Tensor) -> Tensor:
    """The splitmix64 step (Steele, Lea and Flood 2014) on int64, which wraps like uint64."""
    x = x + -0x61C8864680B583EB
    x = (x ^ shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ shift_right(x, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
