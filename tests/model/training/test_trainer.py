"""Training on toy texts: it learns, it is deterministic, its pieces are what their names say."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels import cpu
from model.config import GPTConfig
from model.gpt import GPT, WindowAttention
from model.tokenizer import r50k_base
from model.training.data import consecutive_windows, random_windows, read_tokens
from model.training.trainer import TrainingPlan, perplexity, train

CONFIG = GPTConfig(
    vocab_size=97,
    n_positions=48,
    n_embd=32,
    n_layer=2,
    n_head=2,
    n_inner=64,
    attention=("dense", "banded"),
    band=16,
)


def trained(tokens: torch.Tensor, plan: TrainingPlan) -> GPT:
    model = GPT(CONFIG)
    model.init_weights(plan.seed)
    train(model, tokens, plan, save=lambda model: None, save_every=1000)
    return model.eval()


def test_a_repeating_text_is_learnt_and_the_result_depends_on_the_seed_only() -> None:
    text = torch.arange(97, dtype=torch.int32).repeat(20)
    plan = TrainingPlan(num_tokens=40_000, batch_tokens=480, learning_rate=5e-3)
    first, second = trained(text, plan), trained(text, plan)
    untrained = GPT(CONFIG)
    untrained.init_weights(0)
    assert perplexity(untrained, text[:500]) > 80
    assert perplexity(first, text[:500]) < 3
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_checkpoints_are_saved_on_the_way_and_at_the_end() -> None:
    saved: list[int] = []
    model = GPT(CONFIG)
    model.init_weights(0)
    plan = TrainingPlan(num_tokens=480, batch_tokens=48)
    train(model, torch.zeros(100, dtype=torch.int32), plan, save=lambda model: saved.append(1), save_every=4)
    assert len(saved) == 3


def test_perplexity_is_the_exponential_of_the_mean_loss_over_every_token_but_the_first() -> None:
    model = GPT(CONFIG)
    model.init_weights(1)
    tokens = torch.randint(97, (130,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    losses = []
    for start in range(0, 129, 48):
        window = tokens[start : start + 49].long()
        hidden = model(window[:-1], torch.arange(len(window) - 1), lambda *args: window_attend(*args), cpu)
        losses += F.cross_entropy(model.logits(hidden, cpu), window[1:], reduction="none").tolist()
    assert len(losses) == 129
    assert perplexity(model, tokens) == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-4)


def window_attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return WindowAttention(CONFIG)(layer, q[None], k[None], v[None])[0]


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    plan = TrainingPlan(num_tokens=100_000, batch_tokens=1000, learning_rate=1.0, warmup_share=0.1)
    rates = [plan.rate_at(step) for step in range(plan.num_steps)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_windows() -> None:
    tokens = torch.arange(100, dtype=torch.int32)
    inputs, targets = random_windows(tokens, 10, 5, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (5, 10)
    assert torch.equal(inputs + 1, targets)
    seen = torch.cat([t[0] for _, t in consecutive_windows(tokens, 30)])
    assert torch.equal(seen, tokens[1:].long())


def test_documents_end_in_end_of_text(tmp_path: Path) -> None:
    path = tmp_path / "tales.txt"
    path.write_text("Once upon a time\n<|endoftext|>\nThe end")
    tokenizer = r50k_base()
    eos = [tokenizer.eos_id]
    expected = tokenizer.encode("Once upon a time") + eos + tokenizer.encode("The end") + eos
    assert read_tokens([path], tokenizer).tolist() == expected


def test_a_corpus_without_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no text to train on"):
        read_tokens([path], r50k_base())


def test_a_corpus_shorter_than_a_window_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="the corpus has 10 tokens; at least 49 are needed"):
        trained(torch.zeros(10, dtype=torch.int32), TrainingPlan(num_tokens=100, batch_tokens=50))


def test_a_batch_shorter_than_a_window_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="a batch of 47 tokens is shorter than a window of 48"):
        trained(torch.zeros(100, dtype=torch.int32), TrainingPlan(num_tokens=100, batch_tokens=47))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_tokens": -5}, "a batch of 2048 tokens does not fit training on -5"),
        ({"num_tokens": 100, "batch_tokens": 0}, "a batch of 0 tokens does not fit training on 100"),
        ({"num_tokens": 5000, "learning_rate": 0.0}, r"the learning rate must be positive, got 0\.0"),
        ({"num_tokens": 5000, "learning_rate": float("nan")}, "the learning rate must be positive, got nan"),
    ],
)
def test_a_plan_that_can_not_be_followed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingPlan(**fields)


def test_a_corpus_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Märchen".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8: .* position 1"):
        read_tokens([path], r50k_base())
