"""What to train each size on, and how fast: GPT-3's plans, and that of a small model."""

from dataclasses import replace

from model.config import SIZES, GPTConfig
from model.training.trainer import TrainingPlan

# Brown et al. 2020, table 2.1: tokens in a batch and highest learning rate. Appendix B: 300 billion tokens in windows of
# 2048; the rate warms up over 375 million and falls over 260 billion; the batch grows from 32 thousand over the first 4 to
# 12 billion. Which size has how many of them is not said: here they grow with the batch.
GPT3_BATCHES = {
    "gpt3-125m": (0.5e6, 6.0e-4),
    "gpt3-350m": (0.5e6, 3.0e-4),
    "gpt3-760m": (0.5e6, 2.5e-4),
    "gpt3-1.3b": (1e6, 2.0e-4),
    "gpt3-2.7b": (1e6, 1.6e-4),
    "gpt3-6.7b": (2e6, 1.2e-4),
    "gpt3-13b": (2e6, 1.0e-4),
    "gpt3-175b": (3.2e6, 0.6e-4),
}
GPT3_TOKENS = 300e9


def gpt3_plan(name: str) -> TrainingPlan:
    batch, rate = GPT3_BATCHES[name]
    return TrainingPlan(
        num_tokens=int(GPT3_TOKENS),
        window=2048,
        batch=int(batch),
        learning_rate=rate,
        first_batch=32_768,
        ramp_tokens=int((4 + 8 * (batch - 0.5e6) / (3.2e6 - 0.5e6)) * 1e9),
        warmup_tokens=375_000_000,
        decay_tokens=260_000_000_000,
        micro_tokens=2048,
    )


# Most of what a small model learns is local, and short windows cost less attention: they come first. At twice the rate and
# in windows of 512 from the beginning, 8 layers forgot what they had learnt of copying (51 % of tokens right, then 6 %).
# The embedded model had larger batches: see `demo-model` in the Makefile.
DEMO_PLAN = TrainingPlan(
    num_tokens=24_000_000,
    window=2048,
    batch=4096,
    learning_rate=1e-3,
    warmup_tokens=600_000,
    short_window=128,
    short_tokens=19_200_000,
)


def size(name: str) -> GPTConfig:
    """The dimensions of that name. Raises ValueError for a name that is none."""
    if name not in SIZES:
        raise ValueError(f"there is no size {name!r}, only {', '.join(SIZES)}")
    return SIZES[name]


def plan_for(
    name: str,
    n_positions: int,
    *,
    num_tokens: int | None = None,
    window: int | None = None,
    batch: int | None = None,
    learning_rate: float | None = None,
    micro_tokens: int | None = None,
    batch_softmax: bool = False,
    seed: int = 0,
) -> TrainingPlan:
    """The plan of a size for a model of `n_positions`. Fewer or more tokens stretch all its phases, no window is longer than
    one's own, and a batch of one's own doesn't grow. Raises ValueError for what TrainingPlan refuses, or a window that
    does not fit the model.
    """
    if window is not None and window > n_positions:
        raise ValueError(f"a window of {window} tokens is longer than the model's {n_positions} positions")
    plan = DEMO_PLAN if name == "demo" else gpt3_plan(name)
    longest = min(plan.window, n_positions) if window is None else window
    stretch = 1.0 if num_tokens is None else num_tokens / plan.num_tokens
    return replace(
        plan,
        num_tokens=plan.num_tokens if num_tokens is None else num_tokens,
        window=longest,
        short_window=None if plan.short_window is None else min(plan.short_window, longest),
        batch=plan.batch if batch is None else batch,
        first_batch=plan.first_batch if batch is None else None,
        ramp_tokens=int(plan.ramp_tokens * stretch) if batch is None else 0,
        warmup_tokens=int(plan.warmup_tokens * stretch),
        decay_tokens=None if plan.decay_tokens is None else int(plan.decay_tokens * stretch),
        short_tokens=int(plan.short_tokens * stretch),
        learning_rate=plan.learning_rate if learning_rate is None else learning_rate,
        micro_tokens=plan.micro_tokens if micro_tokens is None else micro_tokens,
        batch_softmax=batch_softmax,
        seed=seed,
    )
