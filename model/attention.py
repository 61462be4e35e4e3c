"""Attention in training and evaluation: whole windows, differentiable, without a cache.

Shapes: B windows of T tokens, H heads of size D; K blocks of W queries in a window, W the band.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import GPTConfig


class TrainingAttention:
    """Causal attention inside whole windows, q, k and v (B, T, H, D): differentiable, keeps no cache. Training's form."""

    def __init__(self, config: GPTConfig):
        self.config = config

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pattern, scale = self.config.pattern(self.config.kind(layer)), self.config.scale_of(layer)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        if pattern.is_sparse:
            positions = torch.arange(q.shape[2], device=q.device)
            seen = pattern.sees(positions[:, None], positions)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
        elif pattern.band is None or q.shape[2] <= pattern.band:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            out = banded_window_attention(q, k, v, pattern.band, scale)
        return out.transpose(1, 2)


def banded_window_attention(q: Tensor, k: Tensor, v: Tensor, band: int, scale: float) -> Tensor:
    """Banded causal attention of (B, H, T, D) in blocks of `band` queries, each against its own and the previous block.

    Work and memory grow with T * band, not T * T.
    """
    batch, heads, length, dim = q.shape
    blocks = math.ceil(length / band)

    def cut(x: Tensor) -> Tensor:  # (B, H, T, D) -> (B * blocks, H, band, D)
        x = F.pad(x, (0, 0, 0, blocks * band - length))
        return x.view(batch, heads, blocks, band, dim).transpose(1, 2).reshape(batch * blocks, heads, band, dim)

    def with_previous(x: Tensor) -> Tensor:  # keys of block b - 1, then of block b
        x = cut(x).view(batch, blocks, heads, band, dim)
        previous = F.pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat((previous, x), dim=3).view(batch * blocks, heads, 2 * band, dim)

    distance = torch.arange(band, device=q.device)[:, None] + band - torch.arange(2 * band, device=q.device)
    mask = ((distance >= 0) & (distance < band)).repeat(blocks, 1, 1)  # (blocks, band, 2 * band)
    mask[0, :, :band] = False  # the first block has nothing before it
    mask = mask.repeat(batch, 1, 1).unsqueeze(1)
    out = F.scaled_dot_product_attention(cut(q), with_previous(k), with_previous(v), attn_mask=mask, scale=scale)
    out = out.view(batch, blocks, heads, band, dim).transpose(1, 2).reshape(batch, heads, blocks * band, dim)
    return out[:, :, :length]
