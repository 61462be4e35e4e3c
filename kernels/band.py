"""Which keys, and so which pages, a query needs. Integers only; every implementation and every test plans with these.

The truth of the mask is one line: query q sees key k if 0 <= q - k, and in a banded layer also q - k < band.
"""

PAGE_SIZE = 64  # keys in a page, and in a key tile: a tile never straddles pages
# Pages that one program of Triton's decode attention reads. Splits begin at absolute multiples of it (with a block layout:
# at multiples in the row's list), so that the order of a sequence's sums depends on its length alone.
SPLIT_PAGES = 4


def first_key(position: int, band: int | None) -> int:
    """The earliest key that the query at `position` sees."""
    return 0 if band is None else max(0, position - band + 1)


def pages_spanned(first: int, stop: int) -> range:
    """Pages that hold the keys [first, stop), stop > first."""
    return range(first // PAGE_SIZE, (stop - 1) // PAGE_SIZE + 1)


def pages_of_tile(tile: int, band: int | None) -> range:
    """Pages with the keys that the queries at the positions of page `tile` see: at most band / 64 + 2."""
    return range(first_key(tile * PAGE_SIZE, band) // PAGE_SIZE, tile + 1)
