"""What attention reads in one step: built once per step and attention pattern, shared by all layers that have it."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.band import PAGE_SIZE
from kernels.block_layout import BlockLayout
from kernels.patterns import Pattern


class PageList(NamedTuple):
    """The R live pages of a decode step as one flat list: raggedness, paging and the pattern are which pages stand in it.

    B, R and W are at least 2, because compiled code takes a 1 for a constant: a lone sequence has an empty one behind it,
    and of a lone page there is a second.
    """

    page_ids: Tensor  # (R,) int64, ordered by sequence, then by position
    owners: Tensor  # (R,) int64: which of the B each page belongs to
    visible: Tensor  # (R, PAGE_SIZE) bool: keys that the query sees
    rows: Tensor  # (B, W) int64: index into R of each sequence's pages in turn, R where it has no more
    last_pages: Tensor  # (B,) int64: index into R of the page that ends each sequence, the only one with unwritten keys


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """B sequences with one query each, which stands behind all their keys."""

    # (B, W + 1) int32: page id of each 64 positions; dead entries are never followed, the last is padding (see
    # prefill_attention.py).
    page_table: Tensor
    lengths: Tensor  # (B,) int64, each at least 1: keys so far, the query's own included
    pattern: Pattern
    layout: BlockLayout | None  # where the pattern is sparse

    @cached_property
    def page_list(self) -> PageList:
        """The form that the CPU path works on. Its size depends on the lengths, so making it waits for the device."""
        own_page = (self.lengths - 1) // PAGE_SIZE  # (B,) that of the query itself
        if self.layout is None:
            band = self.pattern.band
            first_page = (self.lengths - band).clamp_min(0) // PAGE_SIZE if band else torch.zeros_like(own_page)
            counts = own_page + 1 - first_page
        else:
            first_entry, ends = self.layout.row_ptr[own_page].long(), self.layout.row_ptr[own_page + 1].long()
            counts = ends - first_entry
        owners = torch.repeat_interleave(counts)
        ends = counts.cumsum(0)
        starts = ends - counts
        index_in_sequence = torch.arange(len(owners), device=owners.device) - starts[owners]
        if self.layout is None:
            page_index = first_page[owners] + index_in_sequence
        else:
            page_index = self.layout.col_idx[first_entry[owners] + index_in_sequence].long()
        keys = page_index[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=owners.device)  # (R, PAGE_SIZE)
        visible = self.pattern.sees(self.lengths[owners, None] - 1, keys)
        page_ids = self.page_table[owners, page_index].long()
        if len(owners) == 1:
            page_ids, owners, visible = page_ids.repeat(2), torch.arange(2, device=owners.device), visible.repeat(2, 1)
        rows = starts[:, None] + torch.arange(max(2, int(counts.max())), device=owners.device)  # (B, W)
        rows = rows.where(rows < ends[:, None], len(owners))
        if len(rows) == 1:
            rows = torch.cat((rows, torch.full_like(rows, len(owners))))
        return PageList(page_ids, owners, visible, rows, ends - 1)


@dataclass(frozen=True, eq=False)
class PrefillPlan:
    """The prompt chunks of a step; chunk i holds positions starts[i] .. starts[i] + lengths[i] of its sequence."""

    page_table: Tensor  # (chunks, W + 1) int32, as in DecodePlan
    starts: list[int]
    lengths: list[int]
    pattern: Pattern
    layout: BlockLayout | None

    @cached_property
    def chunks(self) -> Tensor:
        """(chunks, 3) int32 on the device: start, length, and the row of q in which the chunk begins."""
        rows, begin = [], 0
        for start, length in zip(self.starts, self.lengths, strict=True):
            rows.append((start, length, begin))
            begin += length
        device = self.page_table.device
        host = torch.tensor(rows, dtype=torch.int32, pin_memory=device.type == "cuda")
        return host.reshape(-1, 3).to(device, non_blocking=True)
