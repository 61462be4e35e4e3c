"""Which keys, and so which pages, a query needs. Integers only: the planner that every path and every test shares.

The mask's truth is one line: query q sees key k when 0 <= q - k, and q - k < band where the layer is banded.
"""

PAGE_SIZE = 64  # keys in a page, and in a key tile: a tile never straddles pages
# Pages that one program of Triton's decode attention reads. Splits begin at absolute multiples of it (in a sparse pattern:
# of the row's list), so that the order in which a sequence's keys are added depends on nothing but its length.
SPLIT_PAGES = 4


def first_key(position: int, band: int | None) -> int:
    """The earliest key that the query at `position` sees."""
    return 0 if band is None else max(0, position - band + 1)


def pages_spanned(first: int, stop: int) -> range:
    """Pages that hold the keys [first, stop), stop > first."""
    return range(first // PAGE_SIZE, (stop - 1) // PAGE_SIZE + 1)


def pages_of_tile(tile: int, band: int | None) -> range:
    """Pages that hold all that the queries of tile `tile`, at the positions of page `tile`, see: at most band / 64 + 2."""
    return range(first_key(tile * PAGE_SIZE, band) // PAGE_SIZE, tile + 1)
