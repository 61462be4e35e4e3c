"""Train a decoder from random parameters: predict the next token, measure the error, update, again and again."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from kernels import cpu
from model.gpt import GPT, WindowAttention
from model.training.data import consecutive_windows, random_windows
from model.training.loss import linear_cross_entropy

# The first part of training sees short windows, the rest the whole context: most of what a small model learns is local,
# and short windows cost less attention.
SHORT_WINDOW = 512
SHORT_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How much to train and how fast. Learning rate: linear warm-up, then GPT-3's cosine to a tenth."""

    num_tokens: int
    batch_tokens: int = 2048
    learning_rate: float = 1.5e-3
    warmup_share: float = 0.03
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.batch_tokens <= self.num_tokens:
            raise ValueError(f"a batch of {self.batch_tokens} tokens does not fit training on {self.num_tokens}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"the learning rate must be positive, got {self.learning_rate}")

    @property
    def num_steps(self) -> int:
        return self.num_tokens // self.batch_tokens

    def rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        warmup = max(1, round(self.num_steps * self.warmup_share))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.num_steps - warmup)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    def window_at(self, step: int, n_positions: int) -> int:
        """Window length of a step, in tokens."""
        return min(SHORT_WINDOW, n_positions) if step < SHORT_SHARE * self.num_steps else n_positions


def train(model: GPT, tokens: Tensor, plan: TrainingPlan, *, save: Callable[[GPT], None], save_every: int) -> None:
    """Train `model`, fp32, on `tokens` (N,); `save` gets it every `save_every` steps and at the end.

    Raises ValueError when the text or a batch is shorter than one window.
    """
    n_positions = model.config.n_positions
    if plan.batch_tokens < n_positions:
        raise ValueError(f"a batch of {plan.batch_tokens} tokens is shorter than a window of {n_positions}")
    if len(tokens) <= n_positions:
        raise ValueError(f"the corpus has {len(tokens)} tokens; at least {n_positions + 1} are needed")
    model.requires_grad_(True).train()
    generator = torch.Generator().manual_seed(plan.seed)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    average = None
    with tqdm(total=plan.num_steps * plan.batch_tokens, unit="tok", unit_scale=True) as progress:
        for step in range(plan.num_steps):
            length = plan.window_at(step, n_positions)
            inputs, targets = random_windows(tokens, length, plan.batch_tokens // length, generator)
            for group in optimizer.param_groups:
                group["lr"] = plan.rate_at(step)
            loss = next_token_loss(model, inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            progress.update(inputs.numel())
            progress.set_postfix(loss=f"{average:.3f}", refresh=False)
            if (step + 1) % save_every == 0:
                save(model)
    save(model)


def next_token_loss(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token loss in nats over windows (B, T), matrix work in bf16."""
    positions = torch.arange(inputs.shape[1])
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(inputs, positions, WindowAttention(model.config), cpu)
        hidden = model.project_out(hidden).to(torch.bfloat16)
    return linear_cross_entropy(hidden.flatten(0, 1), model.head, targets.flatten(), model.config.vocab_size)


@torch.inference_mode()
def perplexity(model: GPT, tokens: Tensor) -> float:
    """exp of the mean next-token loss over a text (N,), read in consecutive windows of the model's whole context.

    The model computes in the dtype of its weights. Only the first token of the text is not predicted.
    """
    total = 0.0
    windows = list(consecutive_windows(tokens, model.config.n_positions))
    for inputs, targets in tqdm(windows, desc="held-out", unit="window"):
        hidden = model(inputs, torch.arange(inputs.shape[1]), WindowAttention(model.config), cpu)
        for rows, labels in zip(hidden[0].split(256), targets[0].split(256), strict=True):
            total += F.cross_entropy(model.logits(rows, cpu), labels, reduction="sum").item()
    return math.exp(total / (len(tokens) - 1))
