"""What attention reads in one step. A plan is built once per step and attention pattern, for all layers of that pattern."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.band import PAGE_SIZE, first_key, pages_of_tile, pages_spanned
from kernels.block_layout import BlockLayout
from kernels.patterns import Pattern

NO_PAGE = -1  # in Tile.page_ids


class PageList(NamedTuple):
    """The R live pages of a decode step as one flat list: ragged lengths, paging and the pattern decide what it holds."""

    page_ids: Tensor  # (R,) int64, ordered by sequence, then by position
    owners: Tensor  # (R,) int64: which of the B sequences each page belongs to
    visible: Tensor  # (R, PAGE_SIZE) bool: keys that the query sees
    offsets: Tensor  # (B + 1,) int64: where each sequence's pages begin, and the end. Only its last has unwritten keys


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """B sequences with one query each, whose key is the sequence's last."""

    # (B, W + 1) int32: page id of each 64 positions. No kernel follows a dead entry. The last entry is padding, which GPU
    # kernels load ahead.
    page_table: Tensor
    lengths: Tensor  # (B,) int64, each at least 1: keys so far, the query's own included
    pattern: Pattern
    layout: BlockLayout | None  # given exactly where the pattern is sparse

    @cached_property
    def page_list(self) -> PageList:
        """The form that single ops on a CPU take. Its size depends on the lengths, so building it waits for the device."""
        own_page = (self.lengths - 1) // PAGE_SIZE  # (B,) the page of the query's own key
        if self.layout is None:
            band = self.pattern.band
            first_page = (self.lengths - band).clamp_min(0) // PAGE_SIZE if band else torch.zeros_like(own_page)
            counts = own_page + 1 - first_page
        else:
            first_entry, ends = self.layout.row_ptr[own_page].long(), self.layout.row_ptr[own_page + 1].long()
            counts = ends - first_entry
        offsets = F.pad(counts.cumsum(0), (1, 0))
        # Not repeat_interleave, which wakes all of OpenMP's threads however little there is to do: half a millisecond.
        begins = torch.zeros(int(offsets[-1]), dtype=torch.int64, device=offsets.device)
        begins[offsets[1:-1]] = 1  # each sequence has a page
        owners = begins.cumsum(0)
        index_in_sequence = torch.arange(len(owners), device=owners.device) - offsets[owners]
        if self.layout is None:
            page_index = first_page[owners] + index_in_sequence
        else:
            page_index = self.layout.col_idx[first_entry[owners] + index_in_sequence].long()
        keys = page_index[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=owners.device)  # (R, PAGE_SIZE)
        visible = self.pattern.sees(self.lengths[owners, None] - 1, keys)
        return PageList(self.page_table[owners, page_index].long(), owners, visible, offsets)


class Tile(NamedTuple):
    """The T queries of a chunk that lie in one page, and the n pages that they see. The last of these is their own page."""

    rows: slice  # of q
    page_ids: list[int]  # n, ordered by position; NO_PAGE where no query of this chunk sees the page
    # By index among the n pages: which keys (T, PAGE_SIZE) a query does not see. Only of pages that hide a key.
    hidden: dict[int, Tensor]
    unwritten: int  # keys at the end of the last page that have not been written yet


class TileList(NamedTuple):
    """Tiles as tensors, for native code; pages that no query of the chunk sees are left out."""

    rows: Tensor  # (tiles, 3) int64: first row of q, T, and how many keys of the last page have been written
    offsets: Tensor  # (tiles + 1,) int64: where each tile's pages begin in the next two, and the end
    page_ids: Tensor  # int64
    masks: Tensor  # int64: index into `hidden` for each page; -1 where every query sees the whole page
    hidden: Tensor  # (masks, PAGE_SIZE, PAGE_SIZE) bool: keys by queries


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
        first_rows = accumulate(self.lengths[:-1], initial=0)
        rows = list(zip(self.starts, self.lengths, first_rows, strict=True))
        device = self.page_table.device
        return torch.tensor(rows, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)

    @cached_property
    def tiles(self) -> list[Tile]:
        """The form that kernels.torch_ops takes. A query's pages are the same wherever its chunk begins and ends."""
        found = []
        for table, (start, length, begin) in zip(self.page_table.tolist(), self.chunks.tolist(), strict=True):
            stop = start + length
            for tile in pages_spanned(start, stop):
                pages = self._pages_of_tile(tile)
                # Pages that only queries ahead of `start` see may have been freed.
                seen_from = first_key(start, self.pattern.band) // PAGE_SIZE
                page_ids = [table[page] if page >= seen_from else NO_PAGE for page in pages]
                first, last = max(start, tile * PAGE_SIZE), min(stop, (tile + 1) * PAGE_SIZE)
                rows = slice(begin + first - start, begin + last - start)
                hidden = hidden_keys(self.pattern, range(first, last), pages)
                found.append(Tile(rows, page_ids, hidden, (tile + 1) * PAGE_SIZE - last))
        return found

    @cached_property
    def tile_list(self) -> TileList:
        """The form that native code takes."""
        rows, offsets, page_ids, masks = [], [0], [], []
        hidden = [torch.zeros(PAGE_SIZE, PAGE_SIZE, dtype=torch.bool)]  # unused: torch.stack needs at least one
        for tile in self.tiles:
            count = tile.rows.stop - tile.rows.start
            for page, page_id in enumerate(tile.page_ids):
                if page_id == NO_PAGE:
                    continue
                page_ids.append(page_id)
                masks.append(len(hidden) if page in tile.hidden else -1)
                if page in tile.hidden:
                    hidden.append(F.pad(tile.hidden[page].T, (0, PAGE_SIZE - count)))
            rows.append((tile.rows.start, count, PAGE_SIZE - tile.unwritten))
            offsets.append(len(page_ids))
        ids = torch.tensor(page_ids, dtype=torch.int64)  # without a dtype, an empty list would give floats
        return TileList(torch.tensor(rows), torch.tensor(offsets), ids, torch.tensor(masks), torch.stack(hidden))

    def _pages_of_tile(self, tile: int) -> list[int]:
        if self.layout is None:
            return list(pages_of_tile(tile, self.pattern.band))
        begin, end = self.layout.row_ptr[tile : tile + 2].tolist()
        return self.layout.col_idx[begin:end].tolist()


@dataclass(frozen=True, eq=False)
class StepPlan:
    """What the layers of one kind share in a step: where new keys go and which pages each token reads."""

    page_table: Tensor  # (S, W + 1) int32 of all S batch rows: otherwise as in DecodePlan
    rows: Tensor  # (N,) int64: the batch row of each token
    positions: Tensor  # (N,) int64
    num_decodes: int  # these tokens come first, each with a query of its own; several may belong to one sequence
    prefill: PrefillPlan | None  # of the others
    pattern: Pattern
    layout: BlockLayout | None

    @cached_property
    def slot_mapping(self) -> Tensor:
        """(N,) page * PAGE_SIZE + offset of each token's key."""
        pages = self.page_table[self.rows, self.positions // PAGE_SIZE].long()
        return pages * PAGE_SIZE + self.positions % PAGE_SIZE

    @cached_property
    def decode(self) -> DecodePlan | None:
        if not self.num_decodes:
            return None
        rows, positions = self.rows[: self.num_decodes], self.positions[: self.num_decodes]
        return DecodePlan(self.page_table[rows], positions + 1, self.pattern, self.layout)


def hidden_keys(pattern: Pattern, positions: range, pages: list[int]) -> dict[int, Tensor]:
    """Tile.hidden, of the queries at T positions."""
    keys = torch.tensor(pages)[:, None, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)
    hidden: Tensor = ~pattern.sees(torch.arange(positions.start, positions.stop)[:, None], keys)  # (n, T, PAGE_SIZE)
    return {index: hidden[index] for index, some in enumerate(hidden.flatten(1).any(1).tolist()) if some}
