"""The plans of the sizes."""

import pytest

from model.config import GPT3_SIZES
from model.training.plans import DEMO_PLAN, GPT3_BATCHES, plan_for, size


def test_every_size_has_a_plan() -> None:
    assert GPT3_BATCHES.keys() == GPT3_SIZES.keys()
    for name in GPT3_SIZES:
        plan = plan_for(name, size(name).n_positions)
        assert plan.num_tokens == 300_000_000_000
        step = plan.step_at(0)
        assert step is not None
        assert step.size == 32768


def test_the_largest_is_the_papers() -> None:
    plan = plan_for("gpt3-175b", 2048)
    assert (plan.batch, plan.learning_rate, plan.warmup_tokens) == (3_200_000, 0.6e-4, 375_000_000)
    step = plan.step_at(12_000_000_000)
    assert step is not None
    assert step.size == pytest.approx(3.2e6, rel=1e-3)
    step = plan.step_at(260_000_000_000)
    assert step is not None
    assert step.learning_rate == pytest.approx(0.6e-5)


def test_other_numbers_of_tokens_stretch_the_phases() -> None:
    plan = plan_for("demo", 2048, num_tokens=DEMO_PLAN.num_tokens // 10)
    assert plan.short_tokens == DEMO_PLAN.short_tokens // 10
    assert plan.warmup_tokens == DEMO_PLAN.warmup_tokens // 10
    assert not plan.batch_softmax
    assert plan_for("demo", 2048, batch_softmax=True).batch_softmax
    assert plan.micro_tokens == DEMO_PLAN.micro_tokens
    assert plan_for("demo", 2048, micro_tokens=16384).micro_tokens == 16384
    plan = plan_for("gpt3-125m", 1024, num_tokens=3_000_000_000, batch=65536, learning_rate=1e-3, seed=7)
    assert (plan.window, plan.batch, plan.first_batch, plan.ramp_tokens) == (1024, 65536, None, 0)
    assert (plan.decay_tokens, plan.learning_rate, plan.seed) == (2_600_000_000, 1e-3, 7)


def test_no_window_is_longer_than_ones_own() -> None:
    plan = plan_for("demo", 2048, window=128)
    assert (plan.window, plan.short_window, plan.batch) == (128, 128, DEMO_PLAN.batch)
    plan = plan_for("demo", 2048, window=1024)
    assert (plan.window, plan.short_window) == (1024, DEMO_PLAN.short_window)
    with pytest.raises(ValueError, match="a window of 4096 tokens is longer than the model's 2048 positions"):
        plan_for("demo", 2048, window=4096)


def test_an_unknown_size_is_named_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"there is no size 'gpt4', only demo, gpt3-125m, .*gpt3-175b"):
        size("gpt4")
