"""Attention in training and evaluation: whole windows, differentiable, without a cache.

Shapes: B windows of T tokens, H heads of size D; W the band, K the blocks of W queries in a window.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import GPTConfig


class TrainingAttention:
    """Causal attention inside windows, as an `Attend` of model/gpt.py."""

    def __init__(self, config: GPTConfig):
        self.config = config

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, T, H, D) of q, k and v (B, T, H, D)."""
        pattern, scale = self.config.pattern(self.config.kind(layer)), self.config.scale_of(layer)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        if pattern.is_sparse:
            positions = torch.arange(q.shape[2], device=q.device)
            seen = pattern.sees(positions[:, None], positions)  # (T, T)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
        elif pattern.band is None or q.shape[2] <= pattern.band:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            out = banded_window_attention(q, k, v, pattern.band, scale)
        return out.transpose(1, 2)  # (B, T, H, D)


def banded_window_attention(q: Tensor, k: Tensor, v: Tensor, band: int, scale: float) -> Tensor:
    """Banded causal attention (B, H, T, D). Each block of `band` queries sees its own keys and those of the previous block.

    Work and memory grow with T * W, not T * T.
    """
    batch, heads, length, dim = q.shape
    blocks = math.ceil(length / band)

    def cut(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, blocks * band - length))  # (B, H, K * W, D)
        return x.view(batch, heads, blocks, band, dim).transpose(1, 2).reshape(batch * blocks, heads, band, dim)

    def with_previous(x: Tensor) -> Tensor:
        x = cut(x).view(batch, blocks, heads, band, dim)
        previous = F.pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))  # (B, K, H, W, D): block k has that of k - 1
        return torch.cat((previous, x), dim=3).view(batch * blocks, heads, 2 * band, dim)

    distance = torch.arange(band, device=q.device)[:, None] + band - torch.arange(2 * band, device=q.device)  # (W, 2 * W)
    mask = ((distance >= 0) & (distance < band)).repeat(blocks, 1, 1)  # (K, W, 2 * W)
    mask[0, :, :band] = False  # nothing precedes the first block
    mask = mask.repeat(batch, 1, 1).unsqueeze(1)  # (B * K, 1, W, 2 * W)
    out = F.scaled_dot_product_attention(cut(q), with_previous(k), with_previous(v), attn_mask=mask, scale=scale)
    out = out.view(batch, blocks, heads, band, dim).transpose(1, 2).reshape(batch, heads, blocks * band, dim)
    return out[:, :, :length]  # (B, H, T, D)
