"""Training's attention follows the definition of its patterns, forwards and backwards."""

import math

import pytest
import torch
from torch import Tensor

from model.attention import TrainingAttention, banded_window_attention
from model.config import GPTConfig

CONFIG = GPTConfig(
    vocab_size=331,
    n_positions=256,
    n_embd=64,
    n_layer=4,
    n_head=4,
    n_inner=256,
    attention=("dense", "banded"),
    band=16,
    scale_by_inverse_layer=True,
)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, band: int | None, scale: float) -> Tensor:
    """The definition: query i sees key j when 0 <= i - j < band."""
    out = torch.empty_like(q)
    for i in range(q.shape[2]):
        first = 0 if band is None else max(0, i - band + 1)
        seen = slice(first, i + 1)
        scores = (k[:, :, seen] @ q[:, :, i, :, None]).squeeze(-1) * scale
        out[:, :, i] = (scores.softmax(-1)[..., None] * v[:, :, seen]).sum(-2)
    return out


@pytest.mark.parametrize(
    ("band", "length"), [(band, length) for band in (1, 16, 64) for length in (1, 63, band, band + 1, 3 * band + 5)]
)
def test_banded_window_attention_follows_the_definition(band: int, length: int) -> None:
    torch.manual_seed(length)
    q, k, v = torch.randn(3, 2, 3, length, 16)
    out = banded_window_attention(q, k, v, band, scale=0.7)
    torch.testing.assert_close(out, masked_attention(q, k, v, band, 0.7), rtol=1e-5, atol=1e-5)


def test_banded_window_attention_has_the_gradient_of_the_definition() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(3, 1, 2, 53, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 2, 53, 8, dtype=torch.float64)
    q, k, v = qkv
    (ours,) = torch.autograd.grad((banded_window_attention(q, k, v, 16, 0.3) * weight).sum(), qkv)
    scores = q @ k.transpose(-1, -2) * 0.3
    distance = torch.arange(53)[:, None] - torch.arange(53)
    scores = scores.masked_fill((distance < 0) | (distance >= 16), -math.inf)
    (expected,) = torch.autograd.grad((scores.softmax(-1) @ v * weight).sum(), qkv)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("length", [1, 16, 17, 53])
@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "banded"])
def test_training_attention_takes_band_and_scale_from_the_config(layer: int, length: int) -> None:
    torch.manual_seed(length)
    q, k, v = torch.randn(3, 2, length, 4, 16)
    out = TrainingAttention(CONFIG)(layer, q, k, v)
    expected = masked_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        CONFIG.pattern(CONFIG.kind(layer)).band,
        CONFIG.scale_of(layer),
    )
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
