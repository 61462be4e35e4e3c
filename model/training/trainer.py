"""Train a decoder: predict the next token, measure the error, update, again and again.

Shapes: B windows of T tokens, N of them counted, C the width, V' the vocabulary with its padding.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from kernels import torch_ops
from model.attention import TrainingAttention
from model.checkpoint.files import Json
from model.checkpoint.weights import write_tensors
from model.gpt import GPT, Adapt
from model.training.examples import IGNORED
from model.training.loss import LinearCrossEntropy
from model.training.plans import Plan
from model.training.records import LossRow

# GPT-3's AdamW.
BETAS, EPS = (0.9, 0.95), 1e-8
# What AdamW keeps of every parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")

# batch(first, count, window) -> inputs and targets, (count, T) each, of `count` windows from number `first` on.
Batches = Callable[[int, int, int], tuple[Tensor, Tensor]]
# loss(inputs, targets) -> mean loss in nats.
Loss = Callable[[Tensor, Tensor], Tensor]


class Trainer:
    """AdamW over the fp32 parameters that require gradients. Its state is theirs, the optimizer's, and `seen`.

    In a process group of torch.distributed each rank takes its share of a batch's micro-batches, and all ranks make the
    same update.
    """

    def __init__(self, parameters: Mapping[str, Tensor], plan: Plan, loss: Loss):
        self.plan, self.parameters = plan, {name: p for name, p in parameters.items() if p.requires_grad}
        self.seen = 0  # tokens or examples, whatever the plan counts
        self.num_updates = 0
        self._loss = loss
        trained = list(self.parameters.values())
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": plan.weight_decay},
            {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)

    def update(self, batches: Batches) -> LossRow | None:
        """Learn from the next batch; None at the end of the plan."""
        step = self.plan.step_at(self.seen)
        if step is None:
            return None
        rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        first = self.seen // step.window
        # If there are enough windows, every rank gets some.
        size = max(1, min(step.micro_windows, step.num_windows // num_ranks))
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
            dist.all_reduce(total)
            for parameter in self.parameters.values():
                if parameter.grad is None:  # this rank had no micro-batch
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.plan.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = step.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seen += step.size
        self.num_updates += 1
        return LossRow(self.num_updates, self.seen, total.item(), step.learning_rate, norm.item())

    def save(self, path: Path, about: Json) -> None:
        """Replace `path` with the state. `about` must be the same when the run resumes.

        The tensors are parameters and moments. There is no random state: `seen` and the seed tell which data come next.
        """
        tensors = {f"parameter/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"{moment}/{name}": self.optimizer.state[parameter][moment] for moment in MOMENTS}
        facts = {"seen": self.seen, "updates": self.num_updates, "plan": asdict(self.plan), "about": about}
        write_tensors(path, tensors, {"training": json.dumps(facts)}, durable=True)

    def load(self, path: Path, about: Json) -> None:
        """Come to where the run was that saved `path`. Raises ValueError naming what has changed since.

        On a CPU a run that resumes has the bits of one that never stopped.
        """
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["training"])
            then, now = facts["plan"] | facts["about"], json.loads(json.dumps(asdict(self.plan) | about))
            for name, value in now.items():
                if then.get(name) != value:
                    raise ValueError(f"{path} is the state of another run: {name} {value}, not {then.get(name)}")
            for name, parameter in self.parameters.items():
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(f"parameter/{name}"))
                moments = {moment: file.get_tensor(f"{moment}/{name}").to(parameter.device) for moment in MOMENTS}
                # AdamW counts its updates in a tensor for each parameter.
                step = torch.tensor(float(facts["updates"]), device=parameter.device)
                self.optimizer.state[parameter] = {"step": step, **moments}
        self.seen, self.num_updates = facts["seen"], facts["updates"]


def hidden_states(model: GPT, inputs: Tensor, adapt: Adapt | None = None) -> Tensor:
    """(B, T, C) of whole windows (B, T)."""
    positions = torch.arange(inputs.shape[1], device=inputs.device)
    return model(inputs, positions, TrainingAttention(model.config), torch_ops, adapt)


def next_token_loss(
    model: GPT, inputs: Tensor, targets: Tensor, adapt: Adapt | None = None, *, batch_softmax: bool = False
) -> Tensor:
    """Mean next-token loss in nats over windows (B, T), with matrix products in bf16. IGNORED targets don't count.

    With `batch_softmax` the vocabulary is only the tokens that are targets here.
    """
    with torch.autocast(inputs.device.type, torch.bfloat16):
        hidden = model.head_input(hidden_states(model, inputs, adapt), torch_ops).to(torch.bfloat16)
    hidden, targets = hidden.flatten(0, 1), targets.flatten()  # (N, C), (N,)
    counted = targets != IGNORED
    if not counted.all():
        hidden, targets = hidden[counted], targets[counted]
    if batch_softmax:
        candidates, targets = targets.unique(return_inverse=True)
        return LinearCrossEntropy.apply(hidden, model.head[candidates], targets, len(candidates))
    return LinearCrossEntropy.apply(hidden, model.head, targets, model.config.vocab_size)


@torch.inference_mode()
def mean_loss(model: GPT, tokens: Tensor) -> float:
    """Mean next-token loss in nats over a text, in consecutive windows of the model's whole context.

    The model computes in the dtype of its weights. All tokens but the first are predicted.
    """
    total, length = 0.0, model.config.n_positions
    tokens = tokens.to(model.head.device)
    for start in tqdm(range(0, len(tokens) - 1, length), desc="held-out", unit="window", leave=False):
        window = tokens[start : start + length + 1].long()
        hidden = hidden_states(model, window[None, :-1])  # (1, T, C)
        for rows, labels in zip(hidden[0].split(256), window[1:].split(256), strict=True):
            total += F.cross_entropy(model.logits(rows, torch_ops), labels, reduction="sum").item()
    return total / (len(tokens) - 1)
