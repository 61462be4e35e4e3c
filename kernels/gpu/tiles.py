"""Tile sizes of the attention kernels: a literal table, held to its limits by aot.py. Nothing is tuned while serving.

Of Hopper's entries of two bytes those for prefill were the fastest in bf16 on an H100, those for decode and block_sparse
among the fastest (decode of a band with heads of 128 at 85 % of the best): one short run of a forerunner of
`python -m tests.bench.tiles`, which times every candidate. All other entries were never tuned: they are the largest that
compile without spills, see `make aot`.
"""

from functools import cache
from typing import Literal, NamedTuple

import torch

Phase = Literal["prefill", "block_sparse", "decode"]
Capability = Literal[80, 90]


class Tile(NamedTuple):
    """How a kernel is compiled: queries in a tile (keys are one page), warps of a program, stages of its K/V pipeline."""

    block_m: int
    num_warps: int
    num_stages: int


# (phase, compute capability, head size padded to a power of two, bytes of an element). Tensor cores want 16 queries at
# least, Hopper's wgmma 64; fp32 products run on the plain cores. On the H100 tiles of 64 queries, of which more fit an SM,
# gave 368 TFLOP/s where 128 gave 334 (heads of 128, dense), and 190 where they gave 142 (heads of 64, a band).
TILES: dict[tuple[Phase, Capability, int, int], Tile] = {
    ("prefill", 80, 64, 2): Tile(128, 8, 3),
    ("prefill", 80, 128, 2): Tile(64, 8, 3),
    ("prefill", 90, 64, 2): Tile(64, 4, 3),
    ("prefill", 90, 128, 2): Tile(64, 4, 3),
    ("block_sparse", 80, 64, 2): Tile(64, 4, 3),
    ("block_sparse", 80, 128, 2): Tile(64, 8, 3),
    ("block_sparse", 90, 64, 2): Tile(64, 4, 3),
    ("block_sparse", 90, 128, 2): Tile(64, 4, 3),
    ("decode", 80, 64, 2): Tile(16, 4, 3),
    ("decode", 80, 128, 2): Tile(16, 4, 3),
    ("decode", 90, 64, 2): Tile(16, 2, 3),
    ("decode", 90, 128, 2): Tile(16, 4, 3),
    ("prefill", 80, 64, 4): Tile(64, 8, 2),
    ("prefill", 80, 128, 4): Tile(64, 16, 2),
    ("prefill", 90, 64, 4): Tile(64, 8, 2),
    ("prefill", 90, 128, 4): Tile(64, 16, 2),
    ("block_sparse", 80, 64, 4): Tile(64, 8, 2),
    ("block_sparse", 80, 128, 4): Tile(64, 16, 2),
    ("block_sparse", 90, 64, 4): Tile(64, 8, 2),
    ("block_sparse", 90, 128, 4): Tile(64, 16, 2),
    ("decode", 80, 64, 4): Tile(16, 4, 2),
    ("decode", 80, 128, 4): Tile(16, 4, 2),
    ("decode", 90, 64, 4): Tile(16, 4, 2),
    ("decode", 90, 128, 4): Tile(16, 4, 2),
}


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 64, whose columns hold a head: 80 and 96 waste arithmetic, never memory traffic."""
    return 64 if head_dim <= 64 else 128


def tile_of(phase: Phase, capability: Capability, head_dim: int, item_bytes: int) -> Tile:
    """The table's entry. Raises ValueError for a head that no kernel takes."""
    if head_dim > 128:
        raise ValueError(f"the attention kernels take heads of up to 128, got {head_dim}")
    return TILES[phase, capability, padded_head_dim(head_dim), item_bytes]


@cache
def capability_of(device: torch.device) -> Capability:
    """What tiles suit a device: 90 for Hopper, 80 for all others and for the interpreter."""
    if device.type != "cuda":
        return 80
    return 90 if torch.cuda.get_device_capability(device)[0] == 9 else 80
