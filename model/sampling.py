"""Pick the next token: pure functions of the logits and of each row's own parameters.

Rows never influence each other: the random number of a row is a hash of (seed, choice, position), so the same request
draws the same numbers alone and in a full batch.
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
    """Token ids (B,) drawn from softmax(logits / temperature), truncated by top-k and then by top-p of what it leaves."""
    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    scaled = (logits - logits.amax(-1, keepdim=True)) / rows.temperature[:, None]
    uniforms = uniform(rows.seed, rows.choice, rows.position)
    truncated = (rows.top_k > 0) | (rows.top_p < 1)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    whole = torch.nonzero(~truncated).squeeze(1)
    if len(whole):
        tokens[whole] = invert(scaled[whole].double().exp(), uniforms[whole])
    pending = torch.nonzero(truncated).squeeze(1)
    vocab_size = logits.shape[1]
    for width in (min(SHORTLIST, vocab_size), vocab_size):
        if not len(pending):
            break
        chosen, enough = draw_truncated(scaled[pending], rows.top_k[pending], rows.top_p[pending], uniforms[pending], width)
        tokens[pending[enough]] = chosen[enough]
        pending = pending[~enough]
    return tokens


def draw_truncated(scaled: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Draw among the `width` likeliest tokens: ids (B,), and whether those were enough to hold the truncated set (B,).

    The likeliest token always stays, so a top_p of 0 is greedy. Tokens that tie with the last of the top k are cut by
    their order in the sort.
    """
    order = torch.sort(scaled, descending=True, stable=True) if width == scaled.shape[1] else torch.topk(scaled, width)
    weights = order.values.double().exp()
    keep = torch.where(top_k > 0, top_k, scaled.shape[1]).clamp_max(scaled.shape[1])
    weights = weights.masked_fill(torch.arange(width, device=scaled.device) >= keep[:, None], 0.0)
    mass = torch.where(keep <= width, weights.sum(-1), scaled.double().exp().sum(-1))
    before = weights.cumsum(-1) - weights
    inside = before < (top_p * mass)[:, None]
    inside[:, 0] = True
    enough = (keep <= width) | ((top_k == 0) & ~inside[:, -1])
    choice = invert(weights.masked_fill(~inside, 0.0), uniforms)
    return order.indices.gather(1, choice[:, None]).squeeze(1), enough


def invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Index (B,) at which the running sum of weights (B, n) passes uniform * total; never an index of weight 0."""
    running = weights.cumsum(-1)
    # u < 1 keeps the target below the total except by rounding; the last index with weight is the right answer then.
    target = (uniforms * running[:, -1])[:, None]
    index = torch.searchsorted(running, target, right=True).squeeze(1)
    last = weights.shape[1] - 1 - (weights.flip(-1) > 0).to(torch.uint8).argmax(-1)
    return torch.minimum(index, last)


def uniform(seed: Tensor, choice: Tensor, position: Tensor) -> Tensor:
    """A number in [0, 1) per row (fp64, 53 bits), a hash of the row's (seed, choice, position), each (B,) int64."""
    state = mix(mix(mix(seed) ^ choice) ^ position)
    return shift_right(state, 11).double() * 2.0**-53


def mix(x: Tensor) -> Tensor:
    """The splitmix64 step (Steele, Lea and Flood 2014) on int64, which wraps like uint64."""
    x = x + -0x61C8864680B583EB
    x = (x ^ shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ shift_right(x, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
