"""Logprobs in plain PyTorch: the likeliest tokens of rows of logits, and what a logit is from its logprob."""

from typing import NamedTuple

import torch
from torch import Tensor

# Logits that topk looks for after those that are wanted, so that equal ones are ordered.
SPARE = 8


class TopLogprobs(NamedTuple):
    """Of R rows of logits: the logarithms of the sums of e^logit, and the K likeliest tokens, likeliest first."""

    totals: Tensor  # (R, 1)
    ids: Tensor  # (R, K)
    logprobs: Tensor  # (R, K): logits - totals


def top_logprobs(logits: Tensor, count: int) -> TopLogprobs:
    """The `count` likeliest tokens of logits (R, V) fp32."""
    totals, (ids, values) = log_totals(logits), likeliest(logits, count)
    return TopLogprobs(totals, ids, values - totals)


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and logits (R, count) of the highest of logits (R, V). Equal logits are ordered by id, as in argmax.

    The first id is argmax's, whatever the ties. topk leaves open which of several equal logits it returns, so ties that
    reach past the end of the list are resolved to the lowest ids only among SPARE more.
    """
    values, ids = logits.topk(min(count + SPARE, logits.shape[1]))
    # If argmax's id is missing, all these logits equal its logit, so that it may replace any of them.
    best = logits.argmax(-1)
    ids[:, -1] = torch.where((ids == best[:, None]).any(1), ids[:, -1], best)
    ids, order = ids.sort()
    values, order = values.gather(1, order).sort(descending=True, stable=True)
    return ids.gather(1, order)[:, :count], values[:, :count]


def log_totals(logits: Tensor) -> Tensor:
    """Logarithms (R, 1) of the sums of exp(logits) (R, V); on a CPU with the same bits in any batch."""
    rows = logits if len(logits) != 1 else logits.expand(2, -1)  # torch shares a single row out among its threads
    return rows.logsumexp(-1, keepdim=True)[: len(logits)]
