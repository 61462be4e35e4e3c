"""Maxima of N rows as long as a vocabulary V, by blocks of 64: on a CPU PyTorch's own argmax and topk are slower."""

import torch
from torch import Tensor

BLOCK = 64


def first_argmax(rows: Tensor) -> Tensor:
    """The column (N,) of the first maximum of each row of (N, V). NaN counts as the highest."""
    block = block_maxima(rows).argmax(-1, keepdim=True)
    columns = columns_of(block, rows.shape[1])
    return columns.gather(1, rows.gather(1, columns).argmax(-1, keepdim=True)).squeeze(1)


def highest(rows: Tensor, count: int) -> Tensor:
    """The columns (N, count) of the highest values of each row of (N, V), in any order; any of them among equal values."""
    maxima = block_maxima(rows)
    if maxima.shape[1] <= count:
        return rows.topk(count).indices
    # The highest values lie in the blocks with the highest maxima.
    columns = columns_of(maxima.topk(count).indices, rows.shape[1])
    values = rows.gather(1, columns)
    # A shorter last block is filled up with repetitions of its last column.
    values[:, 1:].masked_fill_(columns[:, 1:] == columns[:, :-1], float("-inf"))
    return columns.gather(1, values.topk(count).indices)


def block_maxima(rows: Tensor) -> Tensor:
    """(N, ceil(V / 64))."""
    whole, rest = divmod(rows.shape[1], BLOCK)
    maxima = rows[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).amax(-1)
    return torch.cat((maxima, rows[:, -rest:].amax(-1, keepdim=True)), 1) if rest else maxima


def columns_of(blocks: Tensor, num_columns: int) -> Tensor:
    """The columns of b blocks (N, b) of each row, block after block: (N, b * 64)."""
    columns = blocks[..., None] * BLOCK + torch.arange(BLOCK, device=blocks.device)
    return columns.flatten(1).clamp_max(num_columns - 1)
