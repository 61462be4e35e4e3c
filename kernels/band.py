"""Which keys, and so which pages, a query needs. Integers only: the planner that every path and every test shares.

The mask's truth is one line: query q sees key k when 0 <= q - k, and q - k < band where the layer is banded.
"""

from collections.abc import Iterator
from typing import NamedTuple

PAGE_SIZE = 64  # keys in a page, and in a key tile: a tile never straddles pages
# Pages that one program of Triton's decode attention reads. Splits begin at absolute multiples of it (in a sparse pattern:
# of the row's list), so that the order in which a sequence's keys are added depends on nothing but its length.
SPLIT_PAGES = 4
QUERY_BLOCK = 256  # queries that the CPU path computes against one range of keys


def first_key(position: int, band: int | None) -> int:
    """The earliest key that the query at `position` sees."""
    return 0 if band is None else max(0, position - band + 1)


def pages_spanned(first: int, stop: int) -> range:
    """Pages that hold the keys [first, stop), stop > first."""
    return range(first // PAGE_SIZE, (stop - 1) // PAGE_SIZE + 1)


class QueryBlock(NamedTuple):
    """Queries [start, stop) and the keys [first_key, stop) that contain all they see; first_key begins a page."""

    start: int
    stop: int
    first_key: int


def query_blocks(start: int, stop: int, band: int | None) -> Iterator[QueryBlock]:
    """Cut the queries [start, stop) at absolute multiples of QUERY_BLOCK and name the keys each block reads.

    A banded block reads less than band + QUERY_BLOCK + PAGE_SIZE keys, however long the history.
    """
    while start < stop:
        end = min(stop, (start // QUERY_BLOCK + 1) * QUERY_BLOCK)
        yield QueryBlock(start, end, first_key(start, band) // PAGE_SIZE * PAGE_SIZE)
        start = end
