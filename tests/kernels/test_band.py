"""The planner against the one-line predicate, key by key."""

from hypothesis import given
from hypothesis import strategies as st

from kernels.band import PAGE_SIZE, QUERY_BLOCK, first_key, pages_spanned, query_blocks

bands = st.none() | st.integers(1, 600)


def sees(q: int, k: int, band: int | None) -> bool:
    return q - k >= 0 and (band is None or q - k < band)


@given(position=st.integers(0, 3000), band=bands)
def test_first_key(position: int, band: int | None) -> None:
    assert first_key(position, band) == min(k for k in range(position + 1) if sees(position, k, band))


@given(first=st.integers(0, 500), count=st.integers(1, 500))
def test_pages_spanned(first: int, count: int) -> None:
    assert list(pages_spanned(first, first + count)) == sorted({k // PAGE_SIZE for k in range(first, first + count)})


@given(start=st.integers(0, 2000), count=st.integers(1, 900), band=bands)
def test_query_blocks_cover_every_query_once_and_every_key_it_sees(start: int, count: int, band: int | None) -> None:
    blocks = list(query_blocks(start, start + count, band))
    assert [q for block in blocks for q in range(block.start, block.stop)] == list(range(start, start + count))
    for block in blocks:
        assert block.first_key % PAGE_SIZE == 0
        assert block.first_key <= min(first_key(q, band) for q in range(block.start, block.stop))
        if band is not None:
            assert block.stop - block.first_key < band + QUERY_BLOCK + PAGE_SIZE
