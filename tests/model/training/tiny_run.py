"""A training run of a second, for tests that kill its process."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from model.checkpoint.tokenizer import Tokenizer
from model.config import GPTConfig
from model.gpt import GPT
from model.training.plans import TrainingPlan
from model.training.run import train

# A token is a byte: the loss over 50,000 tokens would take most of the time.
BYTES = Tokenizer(
    {byte: bytes([byte]) for byte in range(256)}, range(256), special={"<|endoftext|>": 256}, added={}, eos_id=256
)
CONFIG = GPTConfig(
    vocab_size=257,
    n_positions=32,
    n_embd=16,
    n_layer=2,
    n_head=2,
    n_inner=32,
    attention=("dense", "banded"),
    band=8,
)
PLAN = TrainingPlan(
    num_tokens=6400,
    window=32,
    batch=128,
    first_batch=64,
    ramp_tokens=2000,
    learning_rate=1e-2,
    warmup_tokens=500,
    short_window=16,
    short_tokens=3000,
    micro_tokens=64,
)
# Two micro-batches a batch, one for each of two ranks. A sum of two has the same bits in either order.
PAIRS = replace(PLAN, num_tokens=3200, batch=64, first_batch=None, short_window=None, micro_tokens=32)


def run(directory: Path, corpus: Path, plan: TrainingPlan = PLAN, *, resume: bool = False) -> None:
    """Saves after every update."""
    model = GPT(CONFIG)
    model.init_weights(plan.seed)
    train(directory, model, plan, [corpus], BYTES, resume=resume, save_every=0.0)


def main(directory: Path, corpus: Path, options: Sequence[str], environment: Mapping[str, str]) -> None:
    """What a process does. Exits with 130 after Ctrl-C, as `banded train` does."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    try:
        run(directory, corpus, PAIRS if "--pairs" in options else PLAN, resume="--resume" in options)
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()
