"""The work of the Triton attention kernels: counts in the interpreter equal closed forms."""

import pytest
import torch

from kernels.band import PAGE_SIZE, first_key, pages_spanned
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.prefill_attention import prefill_attention
from kernels.gpu.tiles import capability_of, padded_head_dim, tile_of
from kernels.patterns import Pattern
from tests.kernels.interpreter import DotShape, Work
from tests.kernels.paged import CPU, decode_case, prefill_case

HEADS, DIM = 2, 64
KEY_BYTES = HEADS * DIM * 2  # of one key or value over all heads, fp16


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def tiles(start: int, length: int, band: int | None, block_m: int) -> int:
    """Tiles of block_m queries x PAGE_SIZE keys that the chunk [start, start + length) of one head needs."""
    stop = start + length
    first_rows = range(start, stop, block_m)
    return sum(len(pages_spanned(first_key(row, band), min(row + block_m, stop))) for row in first_rows)


def test_tiles_of_2048_tokens() -> None:
    """Band 256 leaves a third of the 128 x 64 tiles, and two sevenths of the 64 x 64 ones."""
    assert [tiles(0, 2048, band, 128) for band in (None, 256)] == [272, 90]
    assert [tiles(0, 2048, band, 64) for band in (None, 256)] == [528, 150]
    assert tiles(0, 4096, None, 128) / tiles(0, 4096, 256, 128) == pytest.approx(5.68, abs=0.01)
    assert tiles(0, 1024, None, 128) / tiles(0, 1024, 256, 128) == pytest.approx(1.71, abs=0.01)


@pytest.mark.parametrize("band", [None, 64, 100, 256])
@pytest.mark.parametrize(("start", "length"), [(0, 300), (0, 128), (200, 65), (130, 1)])
def test_prefill_visits_the_tiles_of_the_closed_form(band: int | None, start: int, length: int) -> None:
    pattern = Pattern("banded", band) if band else Pattern()
    case = prefill_case([start], [length], pattern, heads=HEADS, dim=DIM, dtype=torch.float16)
    with Work(k=case.cache.k, v=case.cache.v, q=case.q) as work:
        prefill_attention(case.q, case.cache.k, case.cache.v, case.plan, 0.1)
    block_m = tile_of("prefill", capability_of(CPU), DIM, 2).block_m
    visited = HEADS * tiles(start, length, band, block_m)
    # Scores and output are one product each. For this head size, both products have the same shape.
    assert work.dots == {DotShape(block_m, PAGE_SIZE, DIM): 2 * visited}
    assert work.flops == visited * 4 * block_m * PAGE_SIZE * DIM
    assert work.loaded["k"] == visited * PAGE_SIZE * DIM * 2
    assert work.loaded["q"] == length * KEY_BYTES
    assert work.stored["_prefill_attention.out_ptr"] == length * KEY_BYTES
    assert not work.out_of_bounds


def test_prefill_of_2048_tokens_visits_272_tiles_or_90() -> None:
    for band, expected in ((None, 272), (256, 90)):
        case = prefill_case(
            [0], [2048], Pattern("banded", band) if band else Pattern(), heads=1, dim=DIM, dtype=torch.float16
        )
        with Work(k=case.cache.k, v=case.cache.v) as work:
            prefill_attention(case.q, case.cache.k, case.cache.v, case.plan, 0.1)
        assert work.dots == {DotShape(128, PAGE_SIZE, DIM): 2 * expected}


@pytest.mark.parametrize("dim", [80, 96])
def test_padding_a_head_moves_no_bytes(dim: int) -> None:
    case = prefill_case([0], [64], Pattern(), heads=1, dim=dim, dtype=torch.float16)
    with Work(k=case.cache.k, v=case.cache.v, q=case.q) as work:
        prefill_attention(case.q, case.cache.k, case.cache.v, case.plan, 0.1)
    assert padded_head_dim(dim) == 128
    assert work.loaded["k"] == work.loaded["v"] == work.loaded["q"] == 64 * dim * 2
    assert not work.out_of_bounds


@pytest.mark.parametrize("band", [64, 128, 256, 100])
@pytest.mark.parametrize("length", [1, 64, 200, 321, 700])
def test_banded_decode_reads_band_and_a_tile_at_most(band: int, length: int) -> None:
    case = decode_case([length], Pattern("banded", band), heads=HEADS, dim=DIM, dtype=torch.float16)
    with Work(k=case.cache.k, v=case.cache.v) as work:
        decode_attention(case.q, case.cache.k, case.cache.v, case.plan, 0.1)
    live = pages_spanned(first_key(length - 1, band), length)
    assert work.loaded["k"] == len(live) * PAGE_SIZE * KEY_BYTES
    # A band of whole pages may straddle one page more. Only the last page is read in part, and only its values.
    assert work.loaded["k"] <= (-(-band // PAGE_SIZE) + 1) * PAGE_SIZE * KEY_BYTES
    assert work.loaded["v"] == (length - live[0] * PAGE_SIZE) * KEY_BYTES
    assert not work.out_of_bounds


def test_banded_decode_at_2048_reads_an_eighth_at_best() -> None:
    loaded = {}
    for pattern in (Pattern(), Pattern("banded", 256)):
        case = decode_case([2048], pattern, heads=HEADS, dim=DIM, dtype=torch.float16)
        with Work(k=case.cache.k, v=case.cache.v) as work:
            decode_attention(case.q, case.cache.k, case.cache.v, case.plan, 0.1)
        loaded[pattern.kind] = work.loaded["k"] + work.loaded["v"]
    assert loaded["dense"] == 2 * 2048 * KEY_BYTES
    assert loaded["dense"] / loaded["banded"] == 8
    # The ratio over an alternating stack.
    assert 2 * loaded["dense"] / (loaded["dense"] + loaded["banded"]) == pytest.approx(1.78, abs=0.01)


@pytest.mark.parametrize("pattern", [Pattern("strided", 128), Pattern("fixed", 128, 32)], ids=lambda p: p.kind)
def test_sparse_patterns_read_the_listed_blocks(pattern: Pattern) -> None:
    case = prefill_case([128], [192], pattern, heads=1, dim=DIM, dtype=torch.float16)
    layout = case.plan.layout
    assert layout is not None
    pointers = layout.row_ptr.tolist()
    listed = [set(layout.col_idx[pointers[row] : pointers[row + 1]].tolist()) for row in (2, 3, 4)]
    assert sum(map(len, listed)) < 3 + 4 + 5, "the pattern leaves nothing out"
    with Work(k=case.cache.k, v=case.cache.v) as work:
        prefill_attention(case.q, case.cache.k, case.cache.v, case.plan, 0.1)
    assert work.loaded["k"] == sum(map(len, listed)) * PAGE_SIZE * DIM * 2
    assert work.pages("k") == set(case.cache.page_table[0, sorted(set.union(*listed))].tolist())
    assert not work.out_of_bounds
    row = decode_case([300], pattern, heads=1, dim=DIM, dtype=torch.float16)
    with Work(k=row.cache.k, v=row.cache.v) as work:
        decode_attention(row.q, row.cache.k, row.cache.v, row.plan, 0.1)
    assert work.pages("k") == set(row.cache.page_table[0, sorted(listed[2])].tolist())
    assert not work.out_of_bounds


@pytest.mark.parametrize(
    "pattern", [Pattern(), Pattern("banded", 100), Pattern("strided", 64), Pattern("fixed", 128, 8)], ids=lambda p: p.kind
)
def test_no_page_of_another_sequence_is_read(pattern: Pattern) -> None:
    """Table entries of dead and of unwritten pages name a page of NaN. No kernel reads it."""
    lengths = [300, 65, 1]
    rows = decode_case(lengths, pattern, heads=1, dtype=torch.float16)
    chunks = prefill_case([250, 0, 64], [50, 65, 3], pattern, heads=1, dtype=torch.float16)
    with Work(k=rows.cache.k, v=rows.cache.v) as decoding:
        decode_attention(rows.q, rows.cache.k, rows.cache.v, rows.plan, 0.1)
    with Work(k=chunks.cache.k, v=chunks.cache.v) as prefilling:
        prefill_attention(chunks.q, chunks.cache.k, chunks.cache.v, chunks.plan, 0.1)
    for work, cache, ends in ((decoding, rows.cache, lengths), (prefilling, chunks.cache, [300, 65, 67])):
        dead = int(cache.page_table[0, -1])
        own = {int(cache.page_table[i, page]) for i, end in enumerate(ends) for page in range(-(-end // PAGE_SIZE))} - {dead}
        assert work.pages("k") <= own
        assert work.pages("v") <= own
        assert not work.out_of_bounds
    for case in (rows, chunks):
        freed = case.cache.k.isnan().all(-1).all(-1).all(-1)
        assert freed.any()


def test_programs_beyond_a_sequences_end_do_nothing() -> None:
    """The grid has programs for the longest sequence. The surplus ones of a short sequence read no keys, compute nothing."""
    short = decode_case([64], Pattern(), heads=1, dim=DIM, dtype=torch.float16)
    with Work(k=short.cache.k, v=short.cache.v) as work:
        decode_attention(short.q, short.cache.k, short.cache.v, short.plan, 0.1)
    assert sum(work.dots.values()) == 2
    # One split is live: its program writes the output, and nothing is stored for the merge.
    assert set(work.stored) == {"_decode_attention.out_ptr"}
