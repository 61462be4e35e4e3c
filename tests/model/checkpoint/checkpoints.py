"""Tiny random checkpoints of every architecture that is served, as their own tools write them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.checkpoint.weights import save_model
from model.config import GPTConfig
from model.gpt import GPT

# The same small shape in each architecture's own words. The vocabulary is not round, so its padding shows.
FIELDS: dict[str, dict[str, Any]] = {
    "banded": {
        "vocab_size": 331,
        "n_positions": 256,
        "n_embd": 64,
        "n_layer": 4,
        "n_head": 4,
        "n_inner": 256,
        "attention": ("dense", "banded"),
        "band": 16,
    },
    "gpt2": {"vocab_size": 331, "n_positions": 256, "n_embd": 64, "n_layer": 3, "n_head": 4},
    "cerebras": {
        "vocab_size": 331,
        "n_positions": 256,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 256,
        "activation_function": "gelu",
    },
    "gpt_neo": {
        "vocab_size": 331,
        "max_position_embeddings": 256,
        "hidden_size": 64,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 16,
    },
    "opt": {
        "vocab_size": 331,
        "max_position_embeddings": 256,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 160,
    },
}
FIELDS["opt-350m"] = FIELDS["opt"] | {"word_embed_proj_dim": 32, "do_layer_norm_before": False}

# Keys of FIELDS, each with changes: a runner must compute all of them as transformers does.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "cerebras": ("cerebras", {}),
    "gpt_neo": ("gpt_neo", {}),
    "gpt_neo, band over a page": (
        "gpt_neo",
        {"window_size": 70, "attention_types": [[["local", "local", "global"], 1]], "num_layers": 3},
    ),
    "opt": ("opt", {}),
    "opt-350m": ("opt-350m", {}),
}


def tiny(arch: str, directory: Path, *, max_shard_size: str = "1GB", seed: int = 0, **overrides: Any) -> Path:
    """Write a random fp32 checkpoint of `arch`, a key of FIELDS, into a folder of `directory` and return the folder.

    `overrides` are fields of its config.json, or of GPTConfig for "banded". Same arguments, same weights.

    >>> tiny("gpt2", tmp_path, n_layer=2, vocab_size=50257)
    """
    fields, path = FIELDS[arch] | overrides, directory / arch
    if arch == "banded":
        model = GPT(GPTConfig(**fields))
        randomise(model, seed)
        save_model(path, model, torch.float32)
        return path
    # Importing it takes seconds, which tests of our own format save.
    import transformers

    classes = {
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "cerebras": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "gpt_neo": (transformers.GPTNeoConfig, transformers.GPTNeoForCausalLM),
        "opt": (transformers.OPTConfig, transformers.OPTForCausalLM),
        "opt-350m": (transformers.OPTConfig, transformers.OPTForCausalLM),
    }
    config_class, model_class = classes[arch]
    model = model_class(config_class(bos_token_id=0, eos_token_id=0, **fields))
    randomise(model, seed)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Weights far larger than any initialisation, with no bias 0 and no norm 1, so dropping any of them shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.empty(parameter.shape).normal_(0, 0.2, generator=generator)
        is_norm = parameter.dim() == 1 and name.endswith("weight")
        parameter.copy_(1 + noise if is_norm else noise)
