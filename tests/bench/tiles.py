"""python -m tests.bench.tiles: every candidate tile of the attention kernels, timed on this GPU, best first.

Takes minutes, nearly all of them to compile. Put the fastest into kernels/gpu/tiles.py. `make aot` says what fits an SM.
"""

import sys
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple
from unittest import mock

import torch

from kernels.dispatch import choose
from kernels.gpu.tiles import TILES, Phase, TileShape, capability_of, padded_head_dim
from tests.bench import kernels
from tests.bench.kernels import OURS, Row, Shapes

# A row of a block layout is 64 queries. The one query of a decode step needs only the 16 rows of a tensor core.
CANDIDATES: dict[Phase, list[TileShape]] = {
    "decode": [TileShape(16, *rest) for rest in product((1, 2, 4), (2, 3, 4, 5))],
    "prefill": [TileShape(*parts) for parts in product((64, 128), (4, 8), (2, 3, 4))],
    "block_sparse": [TileShape(64, *rest) for rest in product((4, 8), (2, 3, 4))],
}


class Timed(NamedTuple):
    tile: TileShape
    row: Row


def times(shapes: Shapes, device: torch.device, candidates: dict[Phase, list[TileShape]]) -> Iterator[list[Timed]]:
    """The candidates for each kind of attention, fastest first. Those that fail or are wrong are named on stderr."""
    for build in kernels.cases(shapes, choose(device, "triton"), device):
        if build.func is not kernels.attention:
            continue
        op, pattern, dim, *_ = build.args
        phase: Phase = "decode" if op == "decode_attention" else "block_sparse" if pattern.is_sparse else "prefill"
        case = build()
        ours = case._replace(ways={OURS: case.ways[OURS]})
        entry = phase, capability_of(device), padded_head_dim(dim), shapes.dtype.itemsize
        found = []
        for tile in candidates[phase]:
            with mock.patch.dict(TILES, {entry: tile}):
                found += [Timed(tile, row) for row in kernels.measure(ours, device)]
        for tile, row in found:
            if not row.ms:
                print(f"{row.task.name}: {tuple(tile)} {row.problem}", file=sys.stderr, flush=True)
        found = [timed for timed in found if timed.row.ms]
        yield sorted(found, key=lambda timed: timed.row.ms[1])


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: Triton's interpreter has no speed worth a table")
    print(f"{torch.cuda.get_device_name()}; queries, warps, stages: rate of the median call")
    for found in times(kernels.REAL, torch.device("cuda"), CANDIDATES):
        for tile, row in found:
            print(f"{row.task.name}: {tuple(tile)} {row.rate:.3g} {row.task.unit}", flush=True)


if __name__ == "__main__":
    main()
