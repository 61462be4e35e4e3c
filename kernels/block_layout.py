"""Sparse patterns cut into 64 x 64 blocks of queries and keys, in compressed rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.band import PAGE_SIZE
from kernels.patterns import Pattern


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The key blocks that each block of 64 queries reads: row r reads col_idx[row_ptr[r] : row_ptr[r + 1]], ascending.

    Rows and columns count absolute positions // 64, so a block of keys is a page of a sequence's table. Every row ends with
    its diagonal block. col_idx and partial have one entry of padding, which kernels load ahead and never use.
    """

    row_ptr: Tensor  # (rows + 1,) int32
    col_idx: Tensor  # (blocks + 1,) int32
    partial: Tensor  # (blocks + 1,) int32: 0 where every query of the block sees every key
    max_blocks: int  # in the longest row


def block_layout(pattern: Pattern, num_positions: int, device: torch.device) -> BlockLayout:
    """The layout of `pattern` over positions [0, num_positions), straight from its predicate."""
    size = -(-num_positions // PAGE_SIZE) * PAGE_SIZE
    positions = torch.arange(size)
    seen = pattern.sees(positions[:, None], positions[None, :])
    blocks = seen.view(size // PAGE_SIZE, PAGE_SIZE, size // PAGE_SIZE, PAGE_SIZE).transpose(1, 2).flatten(2)
    some, every = blocks.any(-1), blocks.all(-1)
    rows, columns = some.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(some))
    padding = torch.zeros(1, dtype=torch.int64)
    row_ptr = torch.cat((padding, counts.cumsum(0)))
    col_idx = torch.cat((columns, padding))
    partial = torch.cat(((~every)[rows, columns].long(), padding))
    row_ptr, col_idx, partial = (x.to(device, torch.int32) for x in (row_ptr, col_idx, partial))
    return BlockLayout(row_ptr, col_idx, partial, max_blocks=int(counts.max()))
