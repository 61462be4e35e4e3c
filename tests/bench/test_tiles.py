"""python -m tests.bench.tiles, with Triton interpreted: it times the tiles and does not change their table."""

import pytest
import torch

from kernels.gpu import tiles as tuning
from kernels.gpu.tiles import Phase, TileShape
from tests.bench import tiles
from tests.bench.gpu_check import DRY

CANDIDATES: dict[Phase, list[TileShape]] = {
    "decode": [TileShape(16, 4, 2), TileShape(16, 1, 2)],
    "prefill": [TileShape(64, 4, 2)],
    "block_sparse": [TileShape(128, 4, 2), TileShape(64, 4, 2)],
}


def test_tiles_that_run_are_timed_fastest_first(capsys: pytest.CaptureFixture[str]) -> None:
    before = dict(tuning.TILES)
    found = list(tiles.times(DRY.shapes._replace(head_dims=(64,)), torch.device("cpu"), CANDIDATES))
    assert before == tuning.TILES
    assert [len(timed) for timed in found] == [2, 2, 2, 1, 1, 1, 1]  # 128 queries are not a row of a block layout
    assert "prefill_attention strided 32, D 64: (128, 4, 2) a tile of 128 queries is no row" in capsys.readouterr().err
    assert [timed[0].row.task.name.split()[0] for timed in found] == [
        *["decode_attention"] * 3,
        *["prefill_attention"] * 4,
    ]
    for timed in found:
        medians = [row.ms[1] for _, row in timed]
        assert medians == sorted(medians)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        tiles.main()
