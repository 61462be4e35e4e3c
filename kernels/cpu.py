"""The served CPU path: reads live pages only; decoding copies a few at a time, a prompt chunk those that it sees."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.band import PAGE_SIZE, pages_spanned, query_blocks
from kernels.plan import DecodePlan, PrefillPlan

# Pages whose fp32 copy exists at a time: small enough to stay in the last-level cache while it is used.
PAGES_AT_A_TIME = 32


def kv_write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Scatter the keys and values (N, H, D) of a step into pages (P, H, 64, D); slots (N,) is page * 64 + offset."""
    pages, offsets = slots // PAGE_SIZE, slots % PAGE_SIZE
    k_pages[pages, :, offsets] = k
    v_pages[pages, :, offsets] = v


def decode_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, scale: float) -> Tensor:
    """Attention of one query a sequence, q (B, H, D), over its live pages of (P, H, 64, D): (B, H, D).

    Every page gives a partial maximum, sum and output in fp32; the parts are merged per sequence. A row's arithmetic
    depends on its own pages only, never on its batch-mates.
    """
    queries = q.float() * scale
    parts = [
        attend_pages(queries, k_pages, v_pages, plan, slice(start, start + PAGES_AT_A_TIME))
        for start in range(0, len(plan.page_ids), PAGES_AT_A_TIME)
    ]
    peak, total, out = (torch.cat(part) for part in zip(*parts, strict=True))
    # Merging adds one page after the other, so that its order of summation is the sequence's own as well.
    batch, heads, dim = q.shape
    owners = plan.sequences[:, None].expand(-1, heads)
    highest = peak.new_full((batch, heads), float("-inf")).scatter_reduce_(0, owners, peak, "amax")
    weight = (peak - highest[plan.sequences]).exp()  # (R, H)
    sums = total.new_zeros(batch, heads).index_add_(0, plan.sequences, weight * total)
    merged = out.new_zeros(batch, heads, dim).index_add_(0, plan.sequences, weight.unsqueeze(-1) * out)
    return (merged / sums.unsqueeze(-1)).to(q.dtype)


def attend_pages(
    queries: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, rows: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial maximum (R, H), sum (R, H) and unnormalised output (R, H, D) of some rows of the page list."""
    page_ids, visible = plan.page_ids[rows], plan.visible[rows]
    k = k_pages.index_select(0, page_ids).float()  # (R, H, 64, D)
    v = v_pages.index_select(0, page_ids).float()
    # Keys not written yet may hold anything, NaN included, and 0 * NaN is NaN.
    unwritten = plan.last_pages[(plan.last_pages >= rows.start) & (plan.last_pages < rows.stop)] - rows.start
    v[unwritten] = v[unwritten].masked_fill(~visible[unwritten, None, :, None], 0.0)
    scores = torch.matmul(k, queries[plan.sequences[rows], :, :, None]).squeeze(-1)  # (R, H, 64)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    peak = scores.amax(-1)
    weights = (scores - peak.unsqueeze(-1)).exp()
    return peak, weights.sum(-1), torch.matmul(weights.unsqueeze(2), v).squeeze(2)


def prefill_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
    """Attention of prompt chunks, q (N, H, D) chunk after chunk, over their sequences' pages: (N, H, D)."""
    out = torch.empty_like(q)
    row = 0
    for i, (start, length) in enumerate(zip(plan.starts, plan.lengths, strict=True)):
        blocks = list(query_blocks(start, start + length, plan.band))
        base = blocks[0].first_key
        pages = plan.page_table[i, list(pages_spanned(base, start + length))].long()
        k, v = (gather_keys(x, pages) for x in (k_pages, v_pages))  # (H, keys, D) from key `base` on
        for block in blocks:
            rows = slice(row + block.start - start, row + block.stop - start)
            keys = slice(block.first_key - base, block.stop - base)
            mask = band_mask(block.start, block.stop, block.first_key, plan.band)
            queries = q[rows].transpose(0, 1)[None]  # (1, H, queries, D)
            attended = F.scaled_dot_product_attention(
                queries, k[None, :, keys], v[None, :, keys], attn_mask=mask, scale=scale
            )
            out[rows] = attended[0].transpose(0, 1)
        row += length
    return out


def gather_keys(pages: Tensor, page_ids: Tensor) -> Tensor:
    """The named pages of (P, H, 64, D) side by side: (H, keys, D)."""
    return pages.index_select(0, page_ids).transpose(0, 1).flatten(1, 2)


def band_mask(start: int, stop: int, first_key: int, band: int | None) -> Tensor:
    """True where queries [start, stop) see keys [first_key, stop): (queries, keys)."""
    distance = torch.arange(start, stop)[:, None] - torch.arange(first_key, stop)
    return distance >= 0 if band is None else (distance >= 0) & (distance < band)
