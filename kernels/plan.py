"""What attention reads in one step: built once per step and KV group, shared by all its layers."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.band import PAGE_SIZE


class DecodePlan(NamedTuple):
    """B sequences with one query each, and the R live pages they read as one flat list.

    Raggedness, paging and the band all come down to which pages stand in the list.
    """

    page_table: Tensor  # (B, pages of the context) int32: page id of each 64 positions; dead entries are never read
    lengths: Tensor  # (B,) int64: keys so far, the query's own included
    band: int | None
    page_ids: Tensor  # (R,) int64, ordered by sequence, then by position
    sequences: Tensor  # (R,) int64: which of the B each page belongs to
    visible: Tensor  # (R, PAGE_SIZE) bool: keys inside the band and not beyond the query
    last_pages: Tensor  # (B,) int64: index into R of the page that ends each sequence, the only one with unwritten keys


class PrefillPlan(NamedTuple):
    """The prompt chunks of a step; chunk i holds positions starts[i] .. starts[i] + lengths[i] of its sequence."""

    page_table: Tensor  # (chunks, pages of the context) int32
    starts: list[int]
    lengths: list[int]
    band: int | None


def plan_decode(page_table: Tensor, lengths: Tensor, band: int | None) -> DecodePlan:
    """Plan for sequences with `lengths` (B,) keys, each at least 1 (B may be 0), in pages named by page_table (B, pages)."""
    first_key = torch.zeros_like(lengths) if band is None else (lengths - band).clamp_min(0)
    first_page = first_key // PAGE_SIZE
    counts = (lengths - 1) // PAGE_SIZE + 1 - first_page  # (B,)
    sequences = torch.repeat_interleave(counts)
    ends = counts.cumsum(0)
    index_in_sequence = torch.arange(len(sequences)) - (ends - counts)[sequences]
    page_index = first_page[sequences] + index_in_sequence
    positions = page_index[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)  # (R, PAGE_SIZE)
    visible = (positions >= first_key[sequences, None]) & (positions < lengths[sequences, None])
    page_ids = page_table[sequences, page_index].long()
    return DecodePlan(page_table, lengths, band, page_ids, sequences, visible, ends - 1)
