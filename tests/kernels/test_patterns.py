"""The patterns against their definitions, and block layouts against the predicate."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.band import PAGE_SIZE
from kernels.block_layout import block_layout
from kernels.names import PatternKind
from kernels.patterns import Pattern
from tests.kernels.paged import CPU

PATTERNS = [
    Pattern("dense"),
    Pattern("banded", 1),
    Pattern("banded", 100),
    Pattern("strided", 64),
    Pattern("strided", 128),
    Pattern("strided", 37),
    Pattern("fixed", 128, 32),
    Pattern("fixed", 256, 8),
    Pattern("fixed", 50, 50),
]


def definition(kind: PatternKind, size: int, summary: int, q: int, k: int) -> bool:
    """Child et al. 2019, section 4.3, with both heads of a factorised pattern in one. Its l is `size`, its c `summary`."""
    if k > q:
        return False
    if kind == "dense":
        return True
    if kind == "banded":
        return k in range(q - size + 1, q + 1)
    if kind == "strided":
        return k in range(max(0, q - size + 1), q + 1) or (q - k) % size == 0
    return q // size == k // size or k % size in range(size - summary, size)


@given(
    kind=st.sampled_from(["dense", "banded", "strided", "fixed"]),
    size=st.integers(1, 300),
    share=st.floats(0.01, 1),
    q=st.integers(0, 2047),
    k=st.integers(0, 2047),
)
def test_sees_follows_the_definition(kind: PatternKind, size: int, share: float, q: int, k: int) -> None:
    summary = max(1, int(size * share))
    assert bool(Pattern(kind, size, summary).sees(q, k)) == definition(kind, size, summary, q, k)
    assert Pattern(kind, size, summary).sees(q, q), "a query that sees nothing has no softmax"


def test_sees_takes_tensors() -> None:
    positions = torch.arange(90)
    for pattern in PATTERNS:
        seen = pattern.sees(positions[:, None], positions)
        assert seen.tolist() == [[bool(pattern.sees(q, k)) for k in range(90)] for q in range(90)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("num_positions", [64, 65, 500])
def test_a_layout_lists_the_blocks_with_a_key_that_is_seen(pattern: Pattern, num_positions: int) -> None:
    layout = block_layout(pattern, num_positions, CPU)
    rows = -(-num_positions // PAGE_SIZE)
    pointers, columns, partial = layout.row_ptr.tolist(), layout.col_idx.tolist(), layout.partial.tolist()
    assert len(pointers) == rows + 1
    assert len(columns) == len(partial) == pointers[-1] + 1, "one entry of padding"
    for row in range(rows):
        entries = slice(pointers[row], pointers[row + 1])
        queries = range(row * PAGE_SIZE, (row + 1) * PAGE_SIZE)
        seen = {
            column: [pattern.sees(q, k) for q in queries for k in range(column * PAGE_SIZE, (column + 1) * PAGE_SIZE)]
            for column in range(rows)
        }
        assert columns[entries] == [column for column in seen if any(seen[column])]
        assert columns[entries][-1] == row, "the diagonal comes last"
        assert [not flag for flag in partial[entries]] == [all(seen[column]) for column in columns[entries]]
    assert layout.max_blocks == max(b - a for a, b in pairwise(pointers))


def num_blocks(pattern: Pattern, num_positions: int) -> int:
    return len(block_layout(pattern, num_positions, CPU).col_idx) - 1


def test_how_many_blocks_2048_tokens_leave() -> None:
    assert num_blocks(Pattern("dense"), 2048) == 32 * 33 // 2 == 528
    assert num_blocks(Pattern("banded", 256), 2048) == 150
    # Strided by l = 128 keeps every second block of a row (distances 0, 128, 256, ...) and the one next to the diagonal.
    assert num_blocks(Pattern("strided", 128), 2048) == sum((row // 2 + 1) + min(1, row) for row in range(32))
    # Fixed with l = 128, c = 32: the second half of every 128 keys holds their summary. Row 2 i + 1 sees both own halves.
    assert num_blocks(Pattern("fixed", 128, 32), 2048) == sum((row // 2) + 1 + row % 2 for row in range(32))
