"""The ops in plain PyTorch: what training runs, and what serves on CPUs where nothing is compiled.

Attention reads live pages only: decoding copies a few pages at a time, a prompt chunk copies those that it sees. Signatures
and shapes are those of kernels.ops.Ops; R is the number of rows of a page list.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.band import PAGE_SIZE
from kernels.int8 import OneDNNWeight, multiply, quantize_rows, quantize_weight
from kernels.logprobs import top_logprobs as top_logprobs
from kernels.names import Activation
from kernels.ops import BlockParts, Weight
from kernels.plan import NO_PAGE, DecodePlan, PageList, PrefillPlan, Tile
from kernels.torch_sampling import sample as sample

# Pages with an fp32 copy at a time: the copy stays in the last-level cache while it is used.
PAGES_AT_A_TIME = 32

# The number of rows of a product in prompt attention is a multiple of this.
LEAST_ROWS = 16

# Whether oneDNN multiplies with AMX, and the number of rows up to which its order of summation is the same.
HAS_TILES = torch.cpu._is_amx_tile_supported()
ROWS_OF_TILES = 32

# What oneDNN applies to a product ahead of rounding: name, scalars, algorithm.
EPILOGUES: dict[Activation | None, tuple[str, list[float], str]] = {
    None: ("none", [], ""),
    "gelu_new": ("gelu", [], "tanh"),
    "gelu": ("gelu", [], "none"),
    "relu": ("relu", [], ""),
}


def kv_write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
    pages, offsets = slot_mapping // PAGE_SIZE, slot_mapping % PAGE_SIZE
    k_pages[pages, :, offsets] = k
    v_pages[pages, :, offsets] = v


def decode_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, scale: float) -> Tensor:
    """Every page gives a partial maximum, sum and output in fp32, which are merged sequence by sequence.

    A row's arithmetic depends on its own pages only.
    """
    queries = q.float() * scale
    pages = plan.page_list
    parts = [
        attend_pages(queries, k_pages, v_pages, pages, slice(start, start + PAGES_AT_A_TIME))
        for start in range(0, len(pages.page_ids), PAGES_AT_A_TIME)
    ]
    peak, total, out = (torch.cat(part) for part in zip(*parts, strict=True))
    # index_add_ adds one page after the other, so the order of summation is the sequence's own, too.
    batch, heads, dim = queries.shape
    owners = pages.owners[:, None].expand(-1, heads)
    highest = peak.new_full((batch, heads), float("-inf")).scatter_reduce_(0, owners, peak, "amax")
    weight = (peak - highest[pages.owners]).exp()  # (R, H)
    sums = total.new_zeros(batch, heads).index_add_(0, pages.owners, weight * total)
    merged = out.new_zeros(batch, heads, dim).index_add_(0, pages.owners, weight.unsqueeze(-1) * out)
    return (merged / sums.unsqueeze(-1)).to(q.dtype)


def attend_pages(
    queries: Tensor, k_pages: Tensor, v_pages: Tensor, pages: PageList, rows: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial maximum (R, H), sum (R, H) and unnormalised output (R, H, D) of the R `rows` of the page list."""
    page_ids, visible = pages.page_ids[rows], pages.visible[rows]
    k = k_pages.index_select(0, page_ids).float()  # (R, H, 64, D)
    v = v_pages.index_select(0, page_ids).float()
    # Values not written yet may be NaN, and 0 * NaN is NaN.
    last_pages = pages.offsets[1:] - 1
    unwritten = last_pages[(last_pages >= rows.start) & (last_pages < rows.stop)] - rows.start
    v[unwritten] = v[unwritten].masked_fill(~visible[unwritten, None, :, None], 0.0)
    scores = torch.matmul(k, queries[pages.owners[rows], :, :, None]).squeeze(-1)  # (R, H, 64)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    peak = scores.amax(-1)
    # If a sparse pattern hides a whole page from a query, the peak is -inf, and -inf - -inf is NaN.
    weights = (scores - peak.clamp_min(torch.finfo(peak.dtype).min).unsqueeze(-1)).exp()
    return peak, weights.sum(-1), torch.matmul(weights.unsqueeze(2), v).squeeze(2)


def prefill_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
    """One tile of queries after the other. A row has the same bits however its prompt is cut.

    A product's order of summation depends on the number of keys, so the queries of one page always meet the same keys. It
    also depends on the number of rows if they are few, so rows are padded.
    """
    out = torch.empty_like(q)
    for tile in plan.tiles:
        count = tile.rows.stop - tile.rows.start
        queries = F.pad(q[tile.rows], (0, 0, 0, 0, 0, -count % LEAST_ROWS)).transpose(0, 1).contiguous()  # (H, T', D)
        k, v = gather_keys(k_pages, tile.page_ids), gather_keys(v_pages, tile.page_ids)
        out[tile.rows] = attend_tile(queries, k, v, tile, scale)[:, :count].transpose(0, 1)
    return out


def gather_keys(pages: Tensor, page_ids: list[int]) -> Tensor:
    """The named pages of (P, H, 64, D) concatenated: (H, keys, D), with zeros for NO_PAGE."""
    dead = page_ids.count(NO_PAGE)  # only the first ids can be it
    parts = [pages[page] for page in page_ids[dead:]]
    if dead:
        parts.insert(0, parts[0].new_zeros(len(parts[0]), dead * PAGE_SIZE, pages.shape[-1]))
    return torch.cat(parts, 1)


def attend_tile(q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> Tensor:
    """Attention of q (H, T', D), whose first T rows are the tile's, over k and v (H, keys, D). Overwrites v.

    Products in 16 bits round their sums. So each score is taken relative to the highest of the first and last page: scores
    near the maximum, which count, are then near 0, where rounding errors are small.
    """
    keys = k.transpose(1, 2)
    if q.dtype == torch.float32:
        scores = torch.bmm(q, keys).mul_(scale)
    else:
        edges = k if k.shape[1] <= 2 * PAGE_SIZE else torch.cat((k[:, :PAGE_SIZE], k[:, -PAGE_SIZE:]), 1)
        sample = torch.bmm(q, edges.transpose(1, 2))
        for page, columns in ((0, slice(PAGE_SIZE)), (len(tile.page_ids) - 1, slice(-PAGE_SIZE, None))):
            hide(sample[:, :, columns], tile, page)
        scores = torch.baddbmm(sample.amax(-1, keepdim=True) * scale, q, keys, beta=-1, alpha=scale)
    for page in tile.hidden:
        hide(scores[:, :, page * PAGE_SIZE : (page + 1) * PAGE_SIZE], tile, page)
    if tile.unwritten:  # may be NaN, and 0 * NaN is NaN
        v[:, -tile.unwritten :] = 0
    return torch.bmm(scores.softmax(-1), v)


def hide(scores: Tensor, tile: Tile, page: int) -> None:
    """Take keys of a page that a query does not see out of its scores (H, T', PAGE_SIZE)."""
    if page in tile.hidden:
        scores[:, : len(tile.hidden[page])].masked_fill_(tile.hidden[page], float("-inf"))


def pack(weight: Tensor, *, quantize: bool) -> Weight:
    """The weight in oneDNN's blocked layout, or as it is if oneDNN can't multiply its dtype on this CPU."""
    if quantize:
        return quantize_weight(weight)
    onednn = torch.ops.mkldnn
    if weight.dtype == torch.bfloat16 and not onednn._is_mkldnn_bf16_supported():
        return weight
    if weight.dtype == torch.float16 and not onednn._is_mkldnn_fp16_supported():
        return weight
    return onednn._reorder_linear_weight(weight, 1)  # packed for 1 row; the layout is the same for more


def linear(x: Tensor, weight: Weight, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
    """With a packed weight, bias and activation are applied ahead of rounding, and a row has the same bits in any batch.
    With a plain one it is differentiable."""
    assert isinstance(weight, Tensor | OneDNNWeight), "packed by other ops"
    if isinstance(weight, OneDNNWeight) or weight.is_mkldnn:
        count = x.numel() // x.shape[-1]
        rows = F.pad(x.flatten(0, -2), (0, 0, 0, rounded_up(count) - count))
        return multiply_packed(rows, weight, bias, activation)[:count].unflatten(0, x.shape[:-1])
    product = F.linear(x, weight)
    if activation:
        return bias_activation(product, bias, activation)
    return product if bias is None else product + bias.to(product.dtype)


def multiply_packed(
    rows: Tensor, weight: Tensor | OneDNNWeight, bias: Tensor | None, activation: Activation | None
) -> Tensor:
    """activation(rows times the weight's transpose + bias) by oneDNN, (N, O) for rows (N, C)."""
    if isinstance(weight, OneDNNWeight):
        product = multiply(*quantize_rows(rows), weight, bias)
        return bias_activation(product, None, activation) if activation else product
    # With AMX oneDNN splits the long sums of many rows across threads.
    parts = rows.split(ROWS_OF_TILES) if HAS_TILES and rows.dtype == torch.bfloat16 else [rows]
    products = [torch.ops.mkldnn._linear_pointwise(part, weight, bias, *EPILOGUES[activation]) for part in parts]
    return products[0] if len(products) == 1 else torch.cat(products)


def rounded_up(num_rows: int) -> int:
    """How many rows oneDNN multiplies instead of `num_rows`: at most an eighth more, but two for a single one.

    It compiles a product for each number of rows, which takes milliseconds and half a megabyte that stays. It splits a
    single row's sum across threads, which changes the row's bits.
    """
    step = max(1, 1 << num_rows.bit_length() >> 4)
    return max(2, -(-num_rows // step) * step)


def project(x: Tensor, weight: Weight) -> Tensor:
    return linear(x, weight, None)


def add_layernorm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """LayerNorm of x + residual (..., C), and the sum itself, which is x without a residual. Differentiable."""
    total = x if residual is None else x + residual
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total


def bias_activation(x: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """activation(x + bias) of x (..., C) and bias (C,). Differentiable, so never in place."""
    if bias is not None:
        x = x + bias.to(x.dtype)  # under autocast x is 16 bits wide and the bias is not
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_new" else "none")


def native_forward(
    blocks: Sequence[BlockParts], final_norm: nn.LayerNorm | None, activation: Activation, *, pre_norm: bool
) -> None:
    """Ops run one by one."""
