"""The served CPU path: reads live pages only; decoding copies a few at a time, a prompt chunk those that it sees.

Signatures and shapes are those of kernels.ops.Ops.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.band import PAGE_SIZE, pages_spanned, query_blocks
from kernels.cpu_sampling import sample as sample
from kernels.names import Activation
from kernels.plan import DecodePlan, PageList, PrefillPlan

# Pages whose fp32 copy exists at a time: small enough to stay in the last-level cache while it is used.
PAGES_AT_A_TIME = 32


def kv_write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
    pages, offsets = slot_mapping // PAGE_SIZE, slot_mapping % PAGE_SIZE
    k_pages[pages, :, offsets] = k
    v_pages[pages, :, offsets] = v


def decode_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, scale: float) -> Tensor:
    """Every page gives a partial maximum, sum and output in fp32; the parts are merged per sequence.

    A row's arithmetic depends on its own pages only, never on its batch-mates.
    """
    queries = q.float() * scale
    pages = plan.page_list
    parts = [
        attend_pages(queries, k_pages, v_pages, pages, slice(start, start + PAGES_AT_A_TIME))
        for start in range(0, len(pages.page_ids), PAGES_AT_A_TIME)
    ]
    peak, total, out = (torch.cat(part) for part in zip(*parts, strict=True))
    # Merging adds one page after the other, so that its order of summation is the sequence's own as well.
    batch, heads, dim = q.shape
    owners = pages.sequences[:, None].expand(-1, heads)
    highest = peak.new_full((batch, heads), float("-inf")).scatter_reduce_(0, owners, peak, "amax")
    weight = (peak - highest[pages.sequences]).exp()  # (R, H)
    sums = total.new_zeros(batch, heads).index_add_(0, pages.sequences, weight * total)
    merged = out.new_zeros(batch, heads, dim).index_add_(0, pages.sequences, weight.unsqueeze(-1) * out)
    return (merged / sums.unsqueeze(-1)).to(q.dtype)


def attend_pages(
    queries: Tensor, k_pages: Tensor, v_pages: Tensor, pages: PageList, rows: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial maximum (R, H), sum (R, H) and unnormalised output (R, H, D) of some rows of the page list."""
    page_ids, visible = pages.page_ids[rows], pages.visible[rows]
    k = k_pages.index_select(0, page_ids).float()  # (R, H, 64, D)
    v = v_pages.index_select(0, page_ids).float()
    # Keys not written yet may hold anything, NaN included, and 0 * NaN is NaN.
    last_pages = pages.last_pages
    unwritten = last_pages[(last_pages >= rows.start) & (last_pages < rows.stop)] - rows.start
    v[unwritten] = v[unwritten].masked_fill(~visible[unwritten, None, :, None], 0.0)
    scores = torch.matmul(k, queries[pages.sequences[rows], :, :, None]).squeeze(-1)  # (R, H, 64)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    peak = scores.amax(-1)
    # A page of which a sparse pattern shows this query nothing has no peak, and -inf - -inf is NaN.
    weights = (scores - peak.clamp_min(torch.finfo(peak.dtype).min).unsqueeze(-1)).exp()
    return peak, weights.sum(-1), torch.matmul(weights.unsqueeze(2), v).squeeze(2)


def prefill_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
    out = torch.empty_like(q)
    row = 0
    for i, (start, length) in enumerate(zip(plan.starts, plan.lengths, strict=True)):
        blocks = list(query_blocks(start, start + length, plan.pattern.band))
        base = blocks[0].first_key
        pages = plan.page_table[i, list(pages_spanned(base, start + length))].long()
        k, v = (gather_keys(x, pages) for x in (k_pages, v_pages))  # (H, keys, D) from key `base` on
        for block in blocks:
            rows = slice(row + block.start - start, row + block.stop - start)
            keys = slice(block.first_key - base, block.stop - base)
            mask = plan.pattern.sees(
                torch.arange(block.start, block.stop)[:, None], torch.arange(block.first_key, block.stop)
            )
            queries = q[rows].transpose(0, 1)[None]  # (1, H, queries, D)
            attended = F.scaled_dot_product_attention(
                queries, k[None, :, keys], v[None, :, keys], attn_mask=mask, scale=scale
            )
            out[rows] = attended[0].transpose(0, 1)
        row += length
    return out


def block_sparse_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
    """Row of the layout by row: only listed pages are gathered."""
    assert plan.layout is not None, f"a {plan.pattern.kind} pattern has no block layout"
    row_ptr, col_idx = plan.layout.row_ptr.tolist(), plan.layout.col_idx
    out = torch.empty_like(q)
    for i, (chunk, length, first_row) in enumerate(plan.chunks.tolist()):
        for row in pages_spanned(chunk, chunk + length):
            start, stop = max(chunk, row * PAGE_SIZE), min(chunk + length, (row + 1) * PAGE_SIZE)
            columns = col_idx[row_ptr[row] : row_ptr[row + 1]].long()
            # The diagonal block stands last; only there are keys that are not written yet.
            keys = (columns[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
            keys = keys[keys < stop]
            pages = plan.page_table[i, columns].long()
            k, v = (gather_keys(x, pages)[None, :, : len(keys)] for x in (k_pages, v_pages))
            mask = plan.pattern.sees(torch.arange(start, stop)[:, None], keys)
            rows = slice(first_row + start - chunk, first_row + stop - chunk)
            attended = F.scaled_dot_product_attention(q[rows].transpose(0, 1)[None], k, v, attn_mask=mask, scale=scale)
            out[rows] = attended[0].transpose(0, 1)
    return out


def gather_keys(pages: Tensor, page_ids: Tensor) -> Tensor:
    """The named pages of (P, H, 64, D) side by side: (H, keys, D)."""
    return pages.index_select(0, page_ids).transpose(0, 1).flatten(1, 2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The bias is added apart: with it inside, one row alone has other bits in bf16 than among others."""
    product = F.linear(x, weight)
    return product if bias is None else product + bias.to(product.dtype)


def add_layernorm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """LayerNorm of x + residual (..., C), and the sum itself: x where there is no residual. Differentiable."""
    total = x if residual is None else x + residual
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total


def bias_activation(x: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """activation(x + bias) of x (..., C) and bias (C,). Differentiable, so never in place."""
    if bias is not None:
        x = x + bias.to(x.dtype)  # under autocast x is 16 bits wide and the bias is not
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_new" else "none")
