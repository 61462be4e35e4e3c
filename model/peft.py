"""Adapters that PEFT wrote: adapter_config.json and adapter_model.safetensors, for a model of any architecture.

PEFT's modules are those of transformers, so q, k and v may have adapters of their own where we have one matrix, c_attn.
They become blocks of a larger one: the matrices A are stacked, and B has a block's rows in the columns of that block.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.checkpoint.architectures import Architecture, flag, integer, number
from model.checkpoint.files import CheckpointError, Json, check_file, few, read_json
from model.gpt import GPT
from model.lora import TARGETS, Adapter, AdapterConfig, LowRank, adaptable, most_bytes

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Fields that are read below, or say nothing that the tensors don't: these name the modules and layers that have an adapter,
# and fan_in_fan_out does not change their layout. Any other field must be null, false, empty or "none": use_dora, bias,
# modules_to_save, and whatever a later PEFT adds.
FIELDS = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "ensure_weight_tying"),
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "lora_dropout"),
    *(
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
    ),
)
# Initial values that leave the model's own weights as they are. Others, such as PiSSA's, move a part of them to the adapter.
INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")


class Factor(NamedTuple):
    """A or B of one module."""

    module: str  # its whole name in transformers
    matrix: Tensor


def load_peft_adapter(directory: Path, model: GPT, architecture: Architecture) -> Adapter:
    """The adapter in `directory`, fp32, each B multiplied by its scale.

    Raises CheckpointError naming the field or tensor that can't be served, or does not fit the model.
    """
    config, path = read_json(directory / PEFT_CONFIG), directory / PEFT_WEIGHTS
    try:
        refuse_unserved(config)
        flag(config, "use_rslora", False), integer(config, "r"), number(config, "lora_alpha")
    except ValueError as error:
        raise CheckpointError(f"{directory / PEFT_CONFIG}: {error}") from error
    if path.exists():
        check_file(path, most_bytes(model))
    stored = read_factors(path, architecture)
    parts = {}
    for name, linear in adaptable(model, TARGETS).items():
        modules = [key.removesuffix(".weight") for key in architecture.source_of(f"{name}.weight").keys]
        shape = linear.outputs // len(modules), linear.inputs
        blocks = [take(path, stored, module, config, *shape) for module in modules]
        if any(len(block.a) for block in blocks):
            b = torch.block_diag(*(block.b for block in blocks))
            parts[name] = LowRank(torch.cat([block.a for block in blocks]), b)
    if stored or not parts:
        found = few([f"{factor.module}.lora_{key[-1]}" for key, factor in sorted(stored.items())])
        raise CheckpointError(f"{path} holds {found or 'no adapter'}, for which the model has no place")
    rank = max(len(part.a) for part in parts.values())
    targets = tuple(sorted({name.rsplit(".", 1)[-1] for name in parts}))
    made_for = config.get("base_model_name_or_path")
    return Adapter(AdapterConfig(rank, float(rank), targets), parts, base=None, made_for=str(made_for or ""))


def refuse_unserved(config: Json) -> None:
    """ValueError naming the first field that asks for more than low-rank matrices next to the model's own weights."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type {config.get('peft_type')!r} is not supported, only 'LORA'")
    for name, value in config.items():
        if name not in FIELDS and value not in (None, False, "none", [], {}):
            raise ValueError(f"{name} {value!r:.80} is not supported")
    if config.get("init_lora_weights") not in INITIAL:
        raise ValueError(
            f"init_lora_weights {config['init_lora_weights']!r} is not supported: it changes the model's own weights"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(type(value) in (int, float) and value > 0 for value in pattern.values()):
            raise ValueError(f"{name} must map modules to positive numbers, got {pattern!r:.80}")
        for key in pattern:
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{name} {key!r} is no regular expression: {error}") from error


def read_factors(path: Path, architecture: Architecture) -> dict[str, Factor]:
    """The tensors in `path` by their modules without root, followed by " A" or " B"."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        pickled = " (adapter_model.bin is a pickle: save it by PEFT with safe_serialization=True)"
        hint = pickled if path.with_name("adapter_model.bin").exists() else ""
        raise CheckpointError(f"can't read {path}: {error}{hint}") from error
    found = {}
    for key, tensor in tensors.items():
        matched = KEY.fullmatch(key)
        if matched is None or tensor.dim() != 2 or not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {key} is not supported, only lora_A and lora_B of linear layers")
        module, side = matched.groups()
        root = next(filter(module.startswith, architecture.roots), "")
        found[f"{module.removeprefix(root)} {side}"] = Factor(module, tensor.float())
    return found


def take(path: Path, stored: dict[str, Factor], module: str, config: Json, outputs: int, inputs: int) -> LowRank:
    """The factors of `module`, B multiplied by its scale, out of `stored`; of rank 0 where it has no adapter."""
    factors = {side: stored.pop(f"{module} {side}") for side in "AB" if f"{module} {side}" in stored}
    if not factors:
        return LowRank(torch.empty(0, inputs), torch.empty(outputs, 0))
    name = next(iter(factors.values())).module
    rank = patterned(config, "rank_pattern", name, config["r"])
    for side, shape in {"A": (rank, inputs), "B": (outputs, rank)}.items():
        found = tuple(factors[side].matrix.shape) if side in factors else None
        if found != shape:
            raise CheckpointError(f"{path} does not fit the model: {name}.lora_{side} is {found}, not {shape}")
    alpha = patterned(config, "alpha_pattern", name, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(factors["A"].matrix, scale * factors["B"].matrix)


def patterned(config: Json, field: str, module: str, default: float) -> float:
    """The value of the first pattern that matches the end of a module's name, as PEFT matches it."""
    patterns = config.get(field) or {}
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
