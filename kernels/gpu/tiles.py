"""Tile sizes of the attention kernels: a literal table. Nothing is tuned while a server runs.

`make aot` holds every entry to its limits, `python -m tests.bench.tiles` times the candidates. README.md says which entries
were timed on a GPU.
"""

from functools import cache
from typing import Literal, NamedTuple

import torch

Phase = Literal["prefill", "block_sparse", "decode"]
Capability = Literal[80, 90]


class TileShape(NamedTuple):
    """How an attention kernel is compiled. The keys of a tile are one page."""

    block_m: int  # queries
    num_warps: int
    num_stages: int  # of the pipeline that loads K and V


# By phase, compute capability, head size padded to a power of two, and bytes of an element. "block_sparse" is prefill by a
# block layout, whose rows are 64 queries. Tensor cores want at least 16 queries, wgmma on Hopper 64; fp32 uses neither.
TILES: dict[tuple[Phase, Capability, int, int], TileShape] = {
    ("prefill", 80, 64, 2): TileShape(128, 8, 3),
    ("prefill", 80, 128, 2): TileShape(64, 8, 3),
    ("prefill", 90, 64, 2): TileShape(64, 4, 3),
    ("prefill", 90, 128, 2): TileShape(64, 4, 3),
    ("block_sparse", 80, 64, 2): TileShape(64, 4, 3),
    ("block_sparse", 80, 128, 2): TileShape(64, 8, 3),
    ("block_sparse", 90, 64, 2): TileShape(64, 4, 3),
    ("block_sparse", 90, 128, 2): TileShape(64, 4, 3),
    ("decode", 80, 64, 2): TileShape(16, 4, 3),
    ("decode", 80, 128, 2): TileShape(16, 4, 3),
    ("decode", 90, 64, 2): TileShape(16, 2, 3),
    ("decode", 90, 128, 2): TileShape(16, 4, 3),
    ("prefill", 80, 64, 4): TileShape(64, 8, 2),
    ("prefill", 80, 128, 4): TileShape(64, 16, 2),
    ("prefill", 90, 64, 4): TileShape(64, 8, 2),
    ("prefill", 90, 128, 4): TileShape(64, 16, 2),
    ("block_sparse", 80, 64, 4): TileShape(64, 8, 2),
    ("block_sparse", 80, 128, 4): TileShape(64, 16, 2),
    ("block_sparse", 90, 64, 4): TileShape(64, 8, 2),
    ("block_sparse", 90, 128, 4): TileShape(64, 16, 2),
    ("decode", 80, 64, 4): TileShape(16, 4, 2),
    ("decode", 80, 128, 4): TileShape(16, 4, 2),
    ("decode", 90, 64, 4): TileShape(16, 4, 2),
    ("decode", 90, 128, 4): TileShape(16, 4, 2),
}


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile that holds a head, 64 or 128. Heads of 80 and 96 waste arithmetic, but no memory traffic."""
    return 64 if head_dim <= 64 else 128


def tile_of(phase: Phase, capability: Capability, head_dim: int, item_bytes: int) -> TileShape:
    """The table's entry. Raises ValueError for a head of more than 128."""
    if head_dim > 128:
        raise ValueError(f"the attention kernels take heads of up to 128, got {head_dim}")
    return TILES[phase, capability, padded_head_dim(head_dim), item_bytes]


@cache
def capability_of(device: torch.device) -> Capability:
    """The part of the table for a device: 90 for Hopper, 80 for all others and for the interpreter."""
    if device.type != "cuda":
        return 80
    return 90 if torch.cuda.get_device_capability(device)[0] == 9 else 80
