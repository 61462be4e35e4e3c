"""Checkpoints with random weights: they take as much time as trained ones."""

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.checkpoint.tokenizer import END_OF_TEXT
from model.checkpoint.weights import save_model
from model.config import GPT3_SIZES, GPTConfig
from model.gpt import GPT
from tests.model.checkpoint.vocabularies import r50k_merges, r50k_vocab, write_vocabulary

# GPT-Neo's shape: dense and banded layers in turn.
ALTERNATING_125M = GPT3_SIZES["gpt3-125m"]


def all_dense(config: GPTConfig) -> GPTConfig:
    """The same model with dense attention in every layer."""
    return replace(config, attention=("dense",), band=None)


@torch.no_grad()
def random_model(config: GPTConfig) -> GPT:
    """A model with GPT-2's initial weights, like that of older results. They decide how soon a text repeats itself."""
    model = GPT(config)
    model.init_weights(0)  # norms and biases
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            residual = name.endswith("c_proj.weight")
            parameter.normal_(0, 0.02 / (2 * config.n_layer) ** 0.5 if residual else 0.02, generator=generator)
    return model


def write_own(directory: Path, config: GPTConfig) -> Path:
    """Write a random model in Banded's own layout, in bf16."""
    save_model(directory, random_model(config), torch.bfloat16)
    return directory


def write_gpt2(directory: Path, config: GPTConfig, *, peaked: bool = False) -> Path:
    """Write a random bf16 model as Hugging Face's GPT-2. Any server can load it. `config` must be GPT-2's: all dense.

    Its tied head knows nothing of the next token: 10.6 nats, and greedy text soon repeats itself. That of a *peaked* model
    is one of its own, eight times as large: 3.7 nats, and 330 tokens have 0.95 of the probability, as with real models.
    """
    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
    end = config.vocab_size - 1
    fields = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": config.n_positions}
    fields |= {"bos_token_id": end, "eos_token_id": end, "tie_word_embeddings": not peaked} | {
        name: getattr(config, name) for name in names
    }
    write_vocabulary(directory, r50k_vocab() | {END_OF_TEXT: end}, r50k_merges())
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    tokenizer = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": config.n_positions} | roles
    for name, content in (("config.json", fields), ("tokenizer_config.json", tokenizer)):
        (directory / name).write_text(json.dumps(content))
    tensors = {}
    for name, tensor in random_model(config).state_dict().items():
        rows = tensor[: config.vocab_size] if name == "wte.weight" else tensor
        stored = rows.T if re.search(r"(attn|mlp)\.c_\w+\.weight", name) else rows
        tensors[f"transformer.{name}"] = stored.to(torch.bfloat16).contiguous()
    if peaked:
        head = torch.empty(config.vocab_size, config.n_embd)
        head.normal_(0, 8 * 0.02, generator=torch.Generator().manual_seed(5))
        tensors["lm_head.weight"] = head.to(torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
