"""Training on toy texts learns and is deterministic, and each part does what its name says."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels import torch_ops
from model.attention import TrainingAttention
from model.config import GPTConfig
from model.gpt import GPT
from model.training.data import Windows
from model.training.examples import IGNORED
from model.training.plans import TrainingPlan
from model.training.trainer import Trainer, mean_loss, next_token_loss
from tests.model.logits import window_logits

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
PLAN = TrainingPlan(num_tokens=40_000, window=48, batch=480, learning_rate=5e-3, warmup_tokens=2000)


def model_of(seed: int) -> GPT:
    model = GPT(CONFIG)
    model.init_weights(seed)
    return model


def trained(text: torch.Tensor, plan: TrainingPlan) -> GPT:
    model = model_of(plan.seed)
    windows = Windows([text.numpy().astype(np.uint16)], plan.window, plan.seed)
    trainer = Trainer(dict(model.named_parameters()), plan, lambda *batch: next_token_loss(model, *batch))
    while trainer.update(lambda first, count, window: windows.batch(first, count)):
        pass
    return model


def test_a_repeating_text_is_learnt_and_the_result_depends_on_the_seed_only() -> None:
    text = torch.arange(97, dtype=torch.int32).repeat(20)
    first, second = trained(text, PLAN), trained(text, PLAN)
    assert mean_loss(model_of(0), text[:500]) > math.log(80)
    assert mean_loss(first, text[:500]) < math.log(3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("micro_windows", [1, 3, 4, 10])
def test_micro_batches_add_up_to_the_batch(micro_windows: int) -> None:
    """Any micro-batches give the gradient of a batch that is computed at once, but for rounding."""
    model = model_of(0)
    plan = replace(PLAN, micro_tokens=48 * micro_windows, clip_norm=math.inf)
    inputs, targets = torch.randint(97, (2, 10, 48), generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(float_loss(model, inputs, targets), list(model.parameters()))
    trainer = Trainer(dict(model.named_parameters()), plan, lambda *batch: float_loss(model, *batch))
    found: list[torch.Tensor] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: found.extend(p.grad.clone() for p in model.parameters() if p.grad is not None)
    )
    update = trainer.update(lambda first, count, window: (inputs[first : first + count], targets[first : first + count]))
    assert update is not None
    assert update.seen == 480
    norm = torch.stack([grad.norm() for grad in expected]).norm()
    assert update.gradient_norm == pytest.approx(norm.item(), rel=1e-4)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def float_loss(model: GPT, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(window_logits(model, inputs).flatten(0, 1), targets.flatten())


def test_micro_batches_count_by_their_targets() -> None:
    model = model_of(0)
    inputs, targets = torch.randint(97, (2, 10, 48), generator=torch.Generator().manual_seed(1))
    for row in range(10):
        targets[row, : 4 * row] = IGNORED
    with torch.no_grad():
        expected = next_token_loss(model, inputs, targets).item()
    for micro_windows in (1, 3):
        trainer = Trainer(
            dict(model_of(0).named_parameters()),
            replace(PLAN, micro_tokens=48 * micro_windows),
            lambda *batch: next_token_loss(model, *batch),
        )
        update = trainer.update(lambda first, count, window: (inputs[first : first + count], targets[first : first + count]))
        assert update is not None
        assert update.loss == pytest.approx(expected, rel=1e-3)


def test_a_batch_softmax_is_over_the_targets_there() -> None:
    model = model_of(0)
    inputs, targets = torch.randint(97, (2, 3, 48), generator=torch.Generator().manual_seed(2)) // 4
    logits = window_logits(model, inputs).flatten(0, 1)
    missing = [token for token in range(97) if token not in targets]
    assert len(missing) > 50
    logits[:, missing] = -math.inf
    expected = F.cross_entropy(logits, targets.flatten()).item()
    loss = next_token_loss(model, inputs, targets, batch_softmax=True)
    assert loss.item() == pytest.approx(expected, rel=0.01)
    assert next_token_loss(model, inputs, targets).item() > expected + 0.5
    loss.backward()
    assert model.wte.weight.grad is not None
    assert model.wte.weight.grad[96].count_nonzero() == 0


def test_the_last_batch_is_as_large_as_what_is_left() -> None:
    plan = TrainingPlan(num_tokens=1050, window=100, batch=400, learning_rate=1.0)
    assert [count for _, count, _ in steps(plan)] == [4, 4, 3]


def test_gradients_are_clipped_and_vectors_do_not_decay() -> None:
    model = model_of(0)
    trainer = Trainer(dict(model.named_parameters()), PLAN, lambda *batch: 1e4 * next_token_loss(model, *batch))
    norms: list[float] = []

    def note(*_: Any) -> None:
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None)))

    trainer.optimizer.register_step_pre_hook(note)
    batch = torch.randint(97, (2, 10, 48), generator=torch.Generator().manual_seed(1))
    update = trainer.update(lambda *_: (batch[0], batch[1]))
    assert update is not None
    assert update.gradient_norm > 100
    assert norms == [pytest.approx(PLAN.clip_norm, rel=1e-3)]
    decays = {p.dim(): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert decays == {1: 0.0, 2: PLAN.weight_decay}


def test_frozen_parameters_stay() -> None:
    model = model_of(0)
    model.requires_grad_(False)
    model.wpe.requires_grad_(True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = Trainer(dict(model.named_parameters()), PLAN, lambda *batch: next_token_loss(model, *batch))
    batch = torch.randint(97, (2, 10, 48), generator=torch.Generator().manual_seed(1))
    trainer.update(lambda *_: (batch[0], batch[1]))
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["wpe.weight"]


def test_the_mean_loss_is_over_every_token_but_the_first() -> None:
    model = model_of(1)
    tokens = torch.randint(97, (130,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    losses = []
    for start in range(0, 129, 48):
        window = tokens[start : start + 49].long()
        hidden = model(window[:-1], torch.arange(len(window) - 1), lambda *args: window_attend(*args), torch_ops)
        losses += F.cross_entropy(model.logits(hidden, torch_ops), window[1:], reduction="none").tolist()
    assert len(losses) == 129
    assert mean_loss(model, tokens) == pytest.approx(torch.tensor(losses).mean().item(), rel=1e-5)


def window_attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return TrainingAttention(CONFIG)(layer, q[None], k[None], v[None])[0]


def steps(plan: TrainingPlan) -> list[tuple[int, int, float]]:
    """Length and number of windows, and the learning rate, of every update."""
    found, seen = [], 0
    while step := plan.step_at(seen):
        found.append((step.window, step.num_windows, step.learning_rate))
        seen += step.size
    return found


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    plan = TrainingPlan(num_tokens=100_000, window=100, batch=1000, learning_rate=1.0, warmup_tokens=10_000)
    rates = [rate for *_, rate in steps(plan)]
    assert len(rates) == 100
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[54] == pytest.approx(0.55, abs=1e-9), "half way down the cosine"
    assert rates[-1] == pytest.approx(0.1, abs=1e-9)


def test_after_the_fall_the_rate_stays() -> None:
    plan = TrainingPlan(num_tokens=10_000, window=100, batch=1000, learning_rate=1.0, decay_tokens=4000)
    assert [rate for *_, rate in steps(plan)][3:] == pytest.approx([0.1] * 7)


def test_the_batch_grows_and_so_do_windows() -> None:
    plan = TrainingPlan(
        num_tokens=10_000,
        window=100,
        batch=1000,
        learning_rate=1.0,
        first_batch=200,
        ramp_tokens=4000,
        short_window=25,
        short_tokens=3000,
    )
    found = steps(plan)
    sizes = [window * count for window, count, _ in found]
    assert sizes[0] == 200
    assert sum(sizes) == 10_000
    assert sizes[:-1] == sorted(sizes[:-1])
    assert max(sizes) == sizes[-2] == 1000
    seen = [sum(sizes[:i]) for i in range(len(sizes))]
    lengths = [25 if before < 1500 else 50 if before < 3000 else 100 for before in seen]
    assert [window for window, *_ in found] == lengths
    assert sorted(set(lengths)) == plan.windows == [25, 50, 100]
    assert all(size == 1000 for before, size in zip(seen[:-1], sizes[:-1], strict=True) if before >= 4000)


def test_windows_double_up_to_a_length_that_is_no_double() -> None:
    assert replace(PLAN, window=100, batch=400, first_batch=None, short_window=30, micro_tokens=100).windows == [30, 60, 100]
    assert replace(PLAN, short_window=None).windows == [PLAN.window]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_tokens": -5}, "a batch of 480 tokens does not fit training on -5"),
        ({"batch": 0}, "a batch of 0 tokens does not fit training on 40000"),
        ({"batch": 47}, "a batch of 47 tokens is shorter than a window of 48"),
        ({"first_batch": 40}, "a batch of 40 tokens is shorter than a window of 48"),
        ({"learning_rate": 0.0}, r"the learning rate must be positive, got 0\.0"),
        ({"learning_rate": float("nan")}, "the learning rate must be positive, got nan"),
    ],
)
def test_a_plan_that_can_not_be_followed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **fields)
