"""How a run trains: how much, in which batches and how fast. GPT-3's plans, that of a small model, and fine-tuning's."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from model.config import SIZES, GPTConfig

# The learning rate falls to this share of its peak.
LOWEST_RATE = 0.1


class Step(NamedTuple):
    """What the next update sees. Windows are counted in the plan's unit: tokens, or one example each."""

    window: int
    num_windows: int
    micro_windows: int  # computed at a time, at most
    learning_rate: float

    @property
    def size(self) -> int:
        return self.window * self.num_windows


def check_rate(rate: float) -> None:
    if not 0 < rate < math.inf:
        raise ValueError(f"the learning rate must be positive, got {rate}")


def learning_rate_at(seen: int, peak: float, warmup: int, end: int) -> float:
    """Warms up linearly, then falls along a cosine until `end`."""
    if seen < warmup:
        return peak * seen / warmup
    progress = min((seen - warmup) / max(1, end - warmup), 1.0)
    return peak * (LOWEST_RATE + (1 - LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """A plan counted in tokens. Each step is a function of the tokens seen so far.

    The learning rate warms up linearly, then falls along a cosine. The batch grows linearly from `first_batch` to `batch`.
    Windows begin at `short_window` tokens and double at equal distances until, after `short_tokens`, they are `window` long
    (Li et al. 2022, https://arxiv.org/abs/2108.06084). `micro_tokens` are computed at a time, in whole windows and at least
    one. With `batch_softmax` the loss is among the targets of a micro-batch, not the whole vocabulary: a small model learns
    looking up from random words that way too, in less time.

    Raises ValueError naming what can't be followed.
    """

    unit: ClassVar[str] = "token"

    num_tokens: int
    window: int
    batch: int
    learning_rate: float
    first_batch: int | None = None
    ramp_tokens: int = 0
    warmup_tokens: int = 0
    decay_tokens: int | None = None  # None: all of num_tokens
    short_window: int | None = None
    short_tokens: int = 0
    micro_tokens: int = 4096
    batch_softmax: bool = False
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= self.num_tokens:
            raise ValueError(f"a batch of {self.batch} tokens does not fit training on {self.num_tokens}")
        if self.smallest_batch < self.window:
            raise ValueError(f"a batch of {self.smallest_batch} tokens is shorter than a window of {self.window}")
        check_rate(self.learning_rate)

    @property
    def total(self) -> int:
        return self.num_tokens

    @property
    def smallest_batch(self) -> int:
        return self.batch if self.first_batch is None else self.first_batch

    @property
    def windows(self) -> list[int]:
        """The lengths of windows, in order."""
        lengths, length = [], self.window if self.short_window is None else self.short_window
        while length < self.window:
            lengths.append(length)
            length *= 2
        return [*lengths, self.window]

    def step_at(self, seen: int) -> Step | None:
        """The update after `seen` tokens; None if they are enough."""
        if seen >= self.num_tokens:
            return None
        lengths = self.windows
        window = lengths[(len(lengths) - 1) * seen // self.short_tokens] if seen < self.short_tokens else self.window
        ramp = min(seen / self.ramp_tokens, 1.0) if self.ramp_tokens else 1.0
        num_windows = round(self.smallest_batch + ramp * (self.batch - self.smallest_batch)) // window
        num_windows = min(num_windows, math.ceil((self.num_tokens - seen) / window))
        end = self.num_tokens if self.decay_tokens is None else self.decay_tokens
        rate = learning_rate_at(seen + num_windows * window, self.learning_rate, self.warmup_tokens, end)
        return Step(window, num_windows, self.micro_tokens // window, rate)


@dataclass(frozen=True, kw_only=True)
class FinetuningPlan:
    """A plan counted in examples: each is a window."""

    unit: ClassVar[str] = "example"

    total: int  # of all epochs together
    batch: int
    learning_rate: float
    micro_batch: int  # computed at a time
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_rate(self.learning_rate)

    @property
    def num_updates(self) -> int:
        return math.ceil(self.total / self.batch)

    def step_at(self, seen: int) -> Step | None:
        """The update after `seen` examples; None if they are enough."""
        count = min(self.batch, self.total - seen)
        if count <= 0:
            return None
        rate = learning_rate_at(seen + count, self.learning_rate, self.total // 10, self.total)
        return Step(1, count, self.micro_batch, rate)


Plan = TrainingPlan | FinetuningPlan

# Brown et al. 2020, table 2.1: tokens in a batch, and peak of the learning rate. Appendix B: 300 billion tokens in windows
# of 2048. The rate warms up over 375 million and falls over 260 billion. The batch grows from 32 thousand over the first 4
# to 12 billion; the paper does not say how many for which size. Here they grow with the batch.
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


def gpt3_plan(name: str) -> TrainingPlan:
    batch, rate = GPT3_BATCHES[name]
    return TrainingPlan(
        num_tokens=300_000_000_000,
        window=2048,
        batch=int(batch),
        learning_rate=rate,
        first_batch=32_768,
        ramp_tokens=int((4 + 8 * (batch - 0.5e6) / (3.2e6 - 0.5e6)) * 1e9),
        warmup_tokens=375_000_000,
        decay_tokens=260_000_000_000,
        micro_tokens=2048,
    )


# Short windows come first: a small model learns mostly what is local, and their attention costs less. NOTES.md has what
# other plans led to. The embedded model had larger batches: see `demo-model` in the Makefile.
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
    """The dimensions of that name. Raises ValueError for an unknown name."""
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
    """The plan of a size for a model of `n_positions`, changed by whatever is given.

    `num_tokens` stretches all phases of the plan. No window is longer than `window`. A batch of `batch` doesn't grow.
    Raises ValueError for what TrainingPlan refuses, or a window that does not fit the model.
    """
    if window is not None and window > n_positions:
        raise ValueError(f"a window of {window} tokens is longer than the model's {n_positions} positions")
    plan = DEMO_PLAN if name == "demo" else gpt3_plan(name)
    longest = min(plan.window, n_positions) if window is None else window
    stretch = 1.0 if num_tokens is None else num_tokens / plan.num_tokens
    given = {"num_tokens": num_tokens, "batch": batch, "learning_rate": learning_rate, "micro_tokens": micro_tokens}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(
        plan,
        window=longest,
        short_window=None if plan.short_window is None else min(plan.short_window, longest),
        first_batch=plan.first_batch if batch is None else None,
        ramp_tokens=int(plan.ramp_tokens * stretch) if batch is None else 0,
        warmup_tokens=int(plan.warmup_tokens * stretch),
        decay_tokens=None if plan.decay_tokens is None else int(plan.decay_tokens * stretch),
        short_tokens=int(plan.short_tokens * stretch),
        batch_softmax=batch_softmax,
        seed=seed,
        **changes,
    )
