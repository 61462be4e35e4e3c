"""Train a decoder: predict the next token, measure the error, update, again and again."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from kernels import torch_ops
from model.attention import TrainingAttention
from model.gpt import GPT, Adapt
from model.training.data import consecutive_windows
from model.training.loss import linear_cross_entropy

# GPT-3's AdamW.
BETAS, EPS = (0.9, 0.95), 1e-8
# A target that stands for no token: of a prompt, or of padding.
IGNORED = -1
# What the learning rate falls to, of its highest.
LOWEST_RATE = 0.1


class Step(NamedTuple):
    """What the next update sees."""

    window: int  # tokens of one
    num_windows: int
    learning_rate: float

    @property
    def num_tokens(self) -> int:
        return self.window * self.num_windows


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How much to train on, in which batches and how fast: all of it a function of the tokens seen so far.

    The learning rate warms up linearly, then falls along a cosine to a tenth; the batch grows linearly from `first_batch` to
    `batch`; windows begin at `short_window` tokens and double at equal distances until, behind `short_tokens`, they are
    `window` long (Li et al. 2022, https://arxiv.org/abs/2108.06084). At a time `micro_tokens` are computed, in whole windows
    and at least one. Everything is counted in tokens. With `batch_softmax` the loss is among the tokens that are targets
    there, not the whole vocabulary: enough to learn looking up from random words, in less of a small model's time.

    Raises ValueError naming what can't be followed.
    """

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
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"the learning rate must be positive, got {self.learning_rate}")

    @property
    def smallest_batch(self) -> int:
        return self.batch if self.first_batch is None else self.first_batch

    @property
    def windows(self) -> list[int]:
        """How long windows are, one after the other."""
        lengths, length = [], self.window if self.short_window is None else self.short_window
        while length < self.window:
            lengths.append(length)
            length *= 2
        return [*lengths, self.window]

    def step_at(self, seen: int) -> Step | None:
        """The update that follows `seen` tokens; None when they are enough."""
        if seen >= self.num_tokens:
            return None
        lengths = self.windows
        window = lengths[(len(lengths) - 1) * seen // self.short_tokens] if seen < self.short_tokens else self.window
        ramp = min(seen / self.ramp_tokens, 1.0) if self.ramp_tokens else 1.0
        num_windows = round(self.smallest_batch + ramp * (self.batch - self.smallest_batch)) // window
        num_windows = min(num_windows, math.ceil((self.num_tokens - seen) / window))
        return Step(window, num_windows, self._rate_at(seen + num_windows * window))

    def _rate_at(self, seen: int) -> float:
        if seen < self.warmup_tokens:
            return self.learning_rate * seen / self.warmup_tokens
        end = self.num_tokens if self.decay_tokens is None else self.decay_tokens
        progress = min((seen - self.warmup_tokens) / max(1, end - self.warmup_tokens), 1.0)
        return self.learning_rate * (LOWEST_RATE + (1 - LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * progress)))

    def difference(self, other: "TrainingPlan") -> str | None:
        """The first field in which two plans differ, with both values."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                return f"{field.name} {mine}, not {theirs}"
        return None


class Update(NamedTuple):
    """How an update went."""

    loss: float  # in nats a token, before it
    gradient_norm: float  # before clipping
    step: Step


# batch(first, count, window) -> inputs and targets, each (count, window): windows `first` and following.
Batches = Callable[[int, int, int], tuple[Tensor, Tensor]]
# loss(inputs, targets) -> mean loss in nats.
Loss = Callable[[Tensor, Tensor], Tensor]


class Trainer:
    """AdamW over the fp32 parameters that require gradients. Its state is theirs, the optimizer's and the tokens seen.

    In a process group of torch.distributed every rank takes its share of a batch's micro-batches, and all make the same
    update.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], plan: TrainingPlan, loss: Loss):
        self.plan, self.parameters = plan, {name: p for name, p in parameters.items() if p.requires_grad}
        self.seen = 0  # tokens
        self.num_updates = 0
        self._loss = loss
        trained = list(self.parameters.values())
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": plan.weight_decay},
            {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)

    def update(self, batches: Batches) -> Update | None:
        """Learn from the next batch; None when the plan is fulfilled."""
        step = self.plan.step_at(self.seen)
        if step is None:
            return None
        rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        first = self.seen // step.window
        # Something to do for every rank, where there are windows enough.
        size = max(1, min(self.plan.micro_tokens // step.window, step.num_windows // num_ranks))
        micro_batches = [
            batches(first + begin, min(size, step.num_windows - begin), step.window)
            for begin in range(0, step.num_windows, size)
        ]
        counts = [int((targets != IGNORED).sum()) for _, targets in micro_batches]
        total = torch.zeros(())
        for micro_batch, count in list(zip(micro_batches, counts, strict=True))[rank::num_ranks]:
            loss = self._loss(*micro_batch) * (count / sum(counts))
            loss.backward()
            total += loss.detach().cpu()
        if num_ranks > 1:
            for tensor in [total, *map(gradient, self.parameters.values())]:
                dist.all_reduce(tensor)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.plan.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = step.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seen += step.num_tokens
        self.num_updates += 1
        return Update(total.item(), norm.item(), step)


def gradient(parameter: nn.Parameter) -> Tensor:
    """What the rank has of a parameter's gradient; a rank that had no micro-batch adds zeros."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def next_token_loss(
    model: GPT, inputs: Tensor, targets: Tensor, adapt: Adapt | None = None, *, batch_softmax: bool = False
) -> Tensor:
    """Mean next-token loss in nats over windows (B, T), matrix work in bf16. Targets that are IGNORED don't count.

    With `batch_softmax` only tokens that are targets are predicted, as if the vocabulary held no others.
    """
    positions = torch.arange(inputs.shape[1], device=inputs.device)
    with torch.autocast(inputs.device.type, torch.bfloat16):
        hidden = model(inputs, positions, TrainingAttention(model.config), torch_ops, adapt)
        hidden = model.head_input(hidden, torch_ops).to(torch.bfloat16)
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    counted = targets != IGNORED
    if not counted.all():
        hidden, targets = hidden[counted], targets[counted]
    if batch_softmax:
        candidates, targets = targets.unique(return_inverse=True)
        return linear_cross_entropy(hidden, model.head[candidates], targets, len(candidates))
    return linear_cross_entropy(hidden, model.head, targets, model.config.vocab_size)


@torch.inference_mode()
def mean_loss(model: GPT, tokens: Tensor) -> float:
    """Mean next-token loss in nats over a text (N,), read in consecutive windows of the model's whole context.

    The model computes in the dtype of its weights. Only the first token of the text is not predicted.
    """
    total = 0.0
    windows = list(consecutive_windows(tokens.to(model.head.device), model.config.n_positions))
    for inputs, targets in tqdm(windows, desc="held-out", unit="window", leave=False):
        hidden = model(
            inputs, torch.arange(inputs.shape[1], device=inputs.device), TrainingAttention(model.config), torch_ops
        )
        for rows, labels in zip(hidden[0].split(256), targets[0].split(256), strict=True):
            total += F.cross_entropy(model.logits(rows, torch_ops), labels, reduction="sum").item()
    return total / (len(tokens) - 1)
