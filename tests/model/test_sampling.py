"""Sampling against a slow oracle per row, and against the distribution it claims to draw from."""

import math

import pytest
import torch
from torch import Tensor

from model import sampling
from model.sampling import SamplingRows, draw, gumbel, row_keys, sample

V = 5000


def rows(
    count: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, choice: int = 0
) -> SamplingRows:
    return SamplingRows(
        torch.full((count,), temperature),
        torch.full((count,), top_k),
        torch.full((count,), top_p),
        torch.full((count,), seed),
        torch.full((count,), choice),
        torch.arange(count),
    )


def oracle(logits: Tensor, temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """Token -> probability after temperature, then top-k, then top-p over what is left."""
    peak = max(logits.tolist())
    weights = {i: math.exp((x - peak) / temperature) for i, x in enumerate(logits.tolist())}
    ranked = sorted(weights, key=lambda i: (-weights[i], i))[: top_k or None]
    mass = sum(weights[i] for i in ranked)
    kept: dict[int, float] = {}
    for token in ranked:
        if kept and sum(kept.values()) >= top_p * mass:
            break
        kept[token] = weights[token]
    total = sum(kept.values())
    return {token: weight / total for token, weight in kept.items()}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 5, 1.0), (1.3, 0, 0.3), (1.0, 20, 0.6), (1.0, 1, 1.0), (2.0, 0, 0.0), (1.0, 0, 0.999)],
)
def test_draws_follow_the_truncated_distribution(temperature: float, top_k: int, top_p: float) -> None:
    torch.manual_seed(1)
    logits = torch.randn(40) * 2
    expected = oracle(logits, temperature, top_k, top_p)
    n = 40_000
    tokens = draw(logits.expand(n, -1), rows(n, temperature=temperature, top_k=top_k, top_p=top_p, seed=3))
    counts = torch.bincount(tokens, minlength=40).tolist()
    assert {i for i, c in enumerate(counts) if c} <= set(expected)
    for token, probability in expected.items():
        spread = math.sqrt(n * probability * (1 - probability))
        assert abs(counts[token] - n * probability) <= 5 * spread + 1


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (0, 0.99), (2000, 1.0), (3000, 0.7), (10_000, 1.0), (50, 0.5)])
def test_the_shortlist_never_changes_the_token(top_k: int, top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    flat, peaked = torch.randn(32, V) * 0.1, torch.randn(32, V) * 6
    logits = torch.cat((flat, peaked))
    params = rows(64, top_k=top_k, top_p=top_p, seed=9)
    with_shortlist = draw(logits, params)
    monkeypatch.setattr(sampling, "SHORTLIST", V)
    assert torch.equal(with_shortlist, draw(logits, params))
    for row in (0, 40):
        assert int(with_shortlist[row]) in oracle(logits[row], 1.0, top_k, top_p)


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    torch.manual_seed(3)
    logits = torch.randn(6, V)
    params = SamplingRows(
        torch.tensor([0.0, 1.0, 0.7, 2.0, 1.0, 0.0]),
        torch.tensor([0, 0, 40, 0, 3000, 7]),
        torch.tensor([1.0, 1.0, 0.9, 0.5, 1.0, 0.1]),
        torch.tensor([1, 2, 3, -4, 5, 2**62]),
        torch.tensor([0, 1, 2, 3, 4, 5]),
        torch.tensor([10, 20, 30, 40, 50, 60]),
    )
    together = sample(logits, params)
    for i in range(6):
        alone = sample(logits[i : i + 1], SamplingRows(*(column[i : i + 1] for column in params)))
        assert alone.item() == together[i].item()
    assert together[0] == logits[0].argmax()
    assert together[5] == logits[5].argmax()


def test_greedy_and_top_p_0_take_the_maximum() -> None:
    logits = torch.randn(8, V)
    assert torch.equal(sample(logits, rows(8, temperature=0.0)), logits.argmax(-1))
    assert torch.equal(sample(logits, rows(8, top_p=0.0)), logits.argmax(-1))


def test_a_tiny_temperature_does_not_overflow() -> None:
    logits = torch.randn(4, V) * 30
    assert torch.equal(sample(logits, rows(4, temperature=1e-6)), logits.argmax(-1))


def test_noise_depends_on_seed_choice_position_and_token_and_is_gumbel() -> None:
    def noise(seed: int, choice: int, position: int, token: int) -> float:
        key = row_keys(*(torch.tensor([x]) for x in (seed, choice, position)))
        return float(gumbel(key, torch.tensor([token])))

    changes = [(5, 1, 9, 4), (6, 1, 9, 4), (5, 2, 9, 4), (5, 1, 10, 4), (5, 1, 9, 5), (1, 5, 9, 4), (9, 1, 5, 4)]
    assert len({noise(*change) for change in changes}) == len(changes)
    n = 200
    many = gumbel(row_keys(torch.zeros(n).long(), torch.zeros(n).long(), torch.arange(n)), torch.arange(V))
    assert many.isfinite().all()
    # exp(-exp(-g)) of Gumbel noise is uniform.
    counts = torch.histc((-(-many.double()).exp()).exp(), 100, 0, 1)
    expected = n * V / 100
    assert ((counts - expected) ** 2 / expected).sum() < 160, "99 degrees of freedom: the 0.9999 quantile is about 155"
    assert abs(torch.corrcoef(torch.stack((many[:-1].flatten(), many[1:].flatten())))[0, 1]) < 0.005
    assert abs(torch.corrcoef(torch.stack((many[:, :-1].flatten(), many[:, 1:].flatten())))[0, 1]) < 0.005


def test_rounding_errors_of_the_logits_hardly_ever_change_the_token() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(1000, V, generator=generator)
    noisy = logits * (1 + 1e-6 * torch.randn(1000, V, generator=generator))
    params = rows(1000, seed=11)
    assert (sample(logits, params) != sample(noisy, params)).sum() <= 1


def splitmix64(x: int) -> int:
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@pytest.mark.parametrize("x", [0, 1, -1, 2**63 - 1, -(2**63), 123456789])
def test_mix_is_splitmix64(x: int) -> None:
    ours = int(sampling.mix(torch.tensor([x])).item()) & ((1 << 64) - 1)
    assert ours == splitmix64(x & ((1 << 64) - 1))
