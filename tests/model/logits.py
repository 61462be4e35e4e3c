"""Logits of whole windows, without a cache: of a model, of a checkpoint, and of the same checkpoint in transformers."""

from pathlib import Path

import torch
from torch import Tensor

from kernels import torch_ops
from model.checkpoint.weights import load_model
from model.gpt import GPT
from model.training.trainer import hidden_states


def window_logits(model: GPT, tokens: Tensor) -> Tensor:
    """(B, T, V) of windows (B, T)."""
    return model.logits(hidden_states(model, tokens), torch_ops)


def our_logits(directory: Path, tokens: Tensor) -> Tensor:
    return window_logits(load_model(directory, torch.float32), tokens)


@torch.no_grad()
def transformers_logits(directory: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    logits: Tensor = model.eval()(tokens).logits
    return logits
