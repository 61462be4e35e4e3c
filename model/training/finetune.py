"""Fine-tune a model on prompts and completions: all its weights, or a low-rank adapter for them."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import torch_ops
from model.checkpoint.weights import save_model
from model.gpt import GPT, Adapt
from model.lora import AdapterConfig, adapt_all, new_adapter, save_adapter
from model.training.data import shuffled
from model.training.examples import IGNORED, Encoded
from model.training.plans import FinetuningPlan
from model.training.run import follow
from model.training.trainer import Trainer, hidden_states, next_token_loss

# The curve shows the loss on so many held-out examples during the run, and on all of them at the end.
GLANCE = 64
# Tokens computed at a time, with padding. The activations of more would need more memory than the weights.
MICRO_TOKENS = 4096


def padded(examples: Sequence[Encoded], device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) of B examples of up to T tokens. Padding is IGNORED, and no token of an example sees it."""
    length = max(len(example.inputs) for example in examples)
    inputs = [example.inputs + [0] * (length - len(example.inputs)) for example in examples]
    targets = [example.targets + [IGNORED] * (length - len(example.targets)) for example in examples]
    return torch.tensor(inputs, device=device), torch.tensor(targets, device=device)


def finetuning_plan(
    examples: Sequence[Encoded], *, epochs: int, batch: int, learning_rate: float, seed: int = 0
) -> FinetuningPlan:
    total, longest = len(examples) * epochs, max(len(example.inputs) for example in examples)
    micro = max(1, MICRO_TOKENS // longest)
    return FinetuningPlan(total=total, batch=min(batch, total), learning_rate=learning_rate, micro_batch=micro, seed=seed)


def finetune(
    directory: Path,
    model: GPT,
    examples: Sequence[Encoded],
    plan: FinetuningPlan,
    *,
    base: str,
    adapter: AdapterConfig | None,
    held_out: Sequence[Encoded] = (),
    resume: bool = False,
    save_every: float = 60,
    origin: Path | None = None,
) -> float | None:
    """Learn the completions of `examples`: an adapter of `model`, fp32, or all its weights if `adapter` is None.

    `directory` gets state and result: see model.training.run.follow. `base` is the model's weights_digest, which an adapter
    keeps. `origin` is the model's directory: see `save_model`. Returns the loss on `held_out` at the end.
    """
    device = model.head.device
    learnt = None if adapter is None else new_adapter(model, adapter, base, plan.seed)
    model.requires_grad_(learnt is None)
    adapt = None if learnt is None else adapt_all(learnt)
    parameters: Mapping[str, Tensor] = dict(model.named_parameters()) if learnt is None else learnt.tensors
    trainer = Trainer(parameters, plan, lambda inputs, targets: next_token_loss(model, inputs, targets, adapt))

    def batches(first: int, count: int, _window: int) -> tuple[Tensor, Tensor]:
        places = [divmod(number, len(examples)) for number in range(first, first + count)]
        orders = {epoch: shuffled(plan.seed, epoch, len(examples)).tolist() for epoch, _ in places}
        return padded([examples[orders[epoch][place]] for epoch, place in places], device)

    def held_out_loss(whole: bool) -> float:
        return completion_loss(model, held_out if whole else held_out[:GLANCE], adapt)

    digest = hashlib.sha256(json.dumps(examples).encode()).hexdigest()
    save_weights = partial(save_model, directory, model, torch.bfloat16, origin=origin)
    write_model = save_weights if learnt is None else partial(save_adapter, directory, learnt)
    return follow(
        directory,
        trainer,
        batches,
        {"base": base, "adapter": None if adapter is None else dataclasses.asdict(adapter), "examples": digest},
        write_model=write_model,
        held_out_loss=held_out_loss if held_out else None,
        resume=resume,
        save_every=save_every,
    )


@torch.inference_mode()
def completion_loss(model: GPT, examples: Sequence[Encoded], adapt: Adapt | None = None, batch: int = 8) -> float:
    """Mean loss in nats over all tokens of the completions and the eos after them, in the dtype of the weights."""
    total, count = 0.0, 0
    by_length = sorted(examples, key=lambda example: len(example.inputs))
    for start in range(0, len(by_length), batch):
        inputs, targets = padded(by_length[start : start + batch], model.head.device)
        hidden = hidden_states(model, inputs, adapt)
        counted = targets != IGNORED
        losses = F.cross_entropy(model.logits(hidden[counted], torch_ops), targets[counted], reduction="sum")
        total += losses.item()
        count += int(counted.sum())
    return total / count
