"""The planner against the one-line predicate, key by key."""

from hypothesis import given
from hypothesis import strategies as st

from kernels.band import PAGE_SIZE, first_key, pages_of_tile, pages_spanned

bands = st.none() | st.integers(1, 600)


def sees(q: int, k: int, band: int | None) -> bool:
    return q - k >= 0 and (band is None or q - k < band)


@given(position=st.integers(0, 3000), band=bands)
def test_first_key(position: int, band: int | None) -> None:
    assert first_key(position, band) == min(k for k in range(position + 1) if sees(position, k, band))


@given(first=st.integers(0, 500), count=st.integers(1, 500))
def test_pages_spanned(first: int, count: int) -> None:
    assert list(pages_spanned(first, first + count)) == sorted({k // PAGE_SIZE for k in range(first, first + count)})


@given(tile=st.integers(0, 40), band=bands)
def test_pages_of_a_tile_are_those_its_queries_see(tile: int, band: int | None) -> None:
    queries = range(tile * PAGE_SIZE, (tile + 1) * PAGE_SIZE)
    assert list(pages_of_tile(tile, band)) == sorted(
        {k // PAGE_SIZE for q in queries for k in range(first_key(q, band), q + 1)}
    )
