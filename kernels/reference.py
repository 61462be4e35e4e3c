"""The oracle: same names and signatures as the served paths, slow and obvious. Tests hold every path to it."""

import torch
from torch import Tensor

from kernels.band import PAGE_SIZE
from kernels.plan import DecodePlan, PrefillPlan


def kv_write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    for i, slot in enumerate(slots.tolist()):
        k_pages[slot // PAGE_SIZE, :, slot % PAGE_SIZE] = k[i]
        v_pages[slot // PAGE_SIZE, :, slot % PAGE_SIZE] = v[i]


def decode_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, scale: float) -> Tensor:
    rows = [
        attend(q[i], length - 1, k_pages, v_pages, plan.page_table[i], plan.band, scale)
        for i, length in enumerate(plan.lengths.tolist())
    ]
    return torch.stack(rows)


def prefill_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
    rows: list[Tensor] = []
    for i, (start, length) in enumerate(zip(plan.starts, plan.lengths, strict=True)):
        for position in range(start, start + length):
            rows.append(attend(q[len(rows)], position, k_pages, v_pages, plan.page_table[i], plan.band, scale))
    return torch.stack(rows)


def attend(
    q: Tensor, position: int, k_pages: Tensor, v_pages: Tensor, pages: Tensor, band: int | None, scale: float
) -> Tensor:
    """One query (H, D) at `position`: key by key, softmax in fp64."""
    seen = [key for key in range(position + 1) if band is None or position - key < band]
    k = torch.stack([k_pages[pages[key // PAGE_SIZE], :, key % PAGE_SIZE] for key in seen], dim=1)  # (H, keys, D)
    v = torch.stack([v_pages[pages[key // PAGE_SIZE], :, key % PAGE_SIZE] for key in seen], dim=1)
    weights = torch.softmax(torch.einsum("hd,hkd->hk", q.double(), k.double()) * scale, dim=-1)
    return torch.einsum("hk,hkd->hd", weights, v.double()).to(q.dtype)
