"""Random keys in scattered pages, for all tests and benchmarks of the attention ops."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.band import PAGE_SIZE, first_key
from kernels.block_layout import BlockLayout, block_layout
from kernels.patterns import Pattern
from kernels.plan import DecodePlan, PrefillPlan

MAX_PAGES = 40
CPU = torch.device("cpu")


class Cache(NamedTuple):
    """Keys and values (P, H, PAGE_SIZE, D) of some sequences; everything that is not a live key is NaN."""

    k: Tensor
    v: Tensor
    page_table: Tensor  # (sequences, MAX_PAGES + 1) int32; dead entries name a page of NaN


def cache_of(
    lengths: list[int],
    first_keys: list[int],
    *,
    heads: int = 2,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    max_pages: int = MAX_PAGES,
) -> Cache:
    """Sequences of `lengths` keys. Those ahead of first_keys[i] are dead."""
    num_pages = sum(-(-length // PAGE_SIZE) for length in lengths) + 3
    k, v = torch.full((2, num_pages, heads, PAGE_SIZE, dim), float("nan"), dtype=dtype, device=device)
    order = iter(torch.randperm(num_pages).tolist())
    dead = next(order)
    page_table = torch.full((len(lengths), max_pages + 1), dead, dtype=torch.int32)
    for i, (length, first) in enumerate(zip(lengths, first_keys, strict=True)):
        # A banded layer still holds the whole page of its first live key.
        for page in range(first // PAGE_SIZE, -(-length // PAGE_SIZE)):
            page_id = next(order)
            page_table[i, page] = page_id
            written = min(length - page * PAGE_SIZE, PAGE_SIZE)
            for pages in (k, v):
                pages[page_id, :, :written] = torch.randn(heads, written, dim, device=device).to(dtype)
    return Cache(k, v, page_table.to(device))


def layout_of(pattern: Pattern, device: torch.device = CPU, max_pages: int = MAX_PAGES) -> BlockLayout | None:
    return block_layout(pattern, max_pages * PAGE_SIZE, device) if pattern.is_sparse else None


def queries(
    count: int, *, heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> Tensor:
    """(count, H, D) as a slice of a fused projection, which is what the model passes."""
    return torch.randn(count, 3, heads, dim, device=device).to(dtype)[:, 0]


class DecodeCase(NamedTuple):
    q: Tensor
    cache: Cache
    plan: DecodePlan


def decode_case(lengths: list[int], pattern: Pattern, *, device: torch.device = CPU, **shape: object) -> DecodeCase:
    """One query at the last of `lengths` keys of each sequence. `shape` goes to cache_of."""
    cache = cache_of(lengths, [first_key(n - 1, pattern.band) for n in lengths], device=device, **shape)  # type: ignore[arg-type]
    q = queries(len(lengths), heads=cache.k.shape[1], dim=cache.k.shape[3], dtype=cache.k.dtype, device=device)
    layout = layout_of(pattern, device, cache.page_table.shape[1] - 1)
    return DecodeCase(q, cache, DecodePlan(cache.page_table, torch.tensor(lengths, device=device), pattern, layout))


class PrefillCase(NamedTuple):
    q: Tensor
    cache: Cache
    plan: PrefillPlan


def prefill_case(
    starts: list[int], counts: list[int], pattern: Pattern, *, device: torch.device = CPU, **shape: object
) -> PrefillCase:
    """Chunks of `counts` queries after `starts` earlier keys. `shape` goes to cache_of.

    Unless told, there is room for no more pages than they need: the layout of a sparse pattern takes long for many.
    """
    lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    shape = {"max_pages": -(-max(lengths) // PAGE_SIZE)} | shape
    cache = cache_of(lengths, [first_key(n, pattern.band) for n in starts], device=device, **shape)  # type: ignore[arg-type]
    q = queries(sum(counts), heads=cache.k.shape[1], dim=cache.k.shape[3], dtype=cache.k.dtype, device=device)
    layout = layout_of(pattern, device, cache.page_table.shape[1] - 1)
    return PrefillCase(q, cache, PrefillPlan(cache.page_table, starts, counts, pattern, layout))
