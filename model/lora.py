"""Low-rank adapters (LoRA, Hu et al. 2021): what a fine-tune adds to the weights of a model that many share."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kernels.names import Activation
from kernels.ops import Ops, Weight
from model.gpt import GPT
from model.weights import CheckpointError, read_json, write_atomically

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter.json", "adapter.safetensors"
# The linears that can have one; c_proj is attention's and the MLP's.
TARGETS = ("c_attn", "c_proj", "c_fc")


@dataclass(frozen=True)
class AdapterConfig:
    """x @ W.T becomes x @ W.T + scale * (x @ A.T) @ B.T, with `rank` rows in A. Raises ValueError naming the field."""

    rank: int
    alpha: float  # scale * rank
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not self.targets or set(self.targets) - set(TARGETS):
            raise ValueError(f"targets must be some of {', '.join(TARGETS)}, got {', '.join(self.targets) or 'none'}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LowRank(NamedTuple):
    """What is added to one linear (O, C)."""

    a: Tensor  # (rank, C)
    b: Tensor  # (O, rank)


@dataclass(frozen=True)
class Adapter:
    """All of them, by the names of the linears."""

    config: AdapterConfig
    parts: Mapping[str, LowRank]

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name; those of an adapter that is trained are parameters."""
        tensors = named_tensors(self.parts)
        return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}


def adaptable(model: GPT, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linears of `targets`, by name."""
    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name: linear for name, linear in linears if name.rsplit(".", 1)[-1] in targets}


def new_adapter(model: GPT, config: AdapterConfig, seed: int) -> Adapter:
    """One that changes nothing yet: A is random, B zero. fp32 parameters, on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, linear in adaptable(model, config.targets).items():
        outputs, inputs = linear.out_features, linear.in_features
        a = torch.empty(config.rank, inputs).normal_(0, inputs**-0.5, generator=generator)
        b = torch.zeros(outputs, config.rank)
        parts[name] = LowRank(*(nn.Parameter(tensor.to(linear.weight.device)) for tensor in (a, b)))
    return Adapter(config, parts)


class AdaptedOps:
    """Ops in which the linears of a model have the adapter beside them; everything else is that of `ops`."""

    def __init__(self, ops: Ops, model: GPT, adapter: Adapter):
        self._ops = ops
        self._scale = adapter.config.scale
        linears = adaptable(model, adapter.config.targets)
        self._parts = {id(linears[name].weight): part for name, part in adapter.parts.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
        part = self._parts.get(id(weight))
        if part is None:
            return self._ops.linear(x, weight, bias, activation)
        product = self._ops.linear(x, weight, bias) + self._scale * ((x @ part.a.T) @ part.b.T)
        return product if activation is None else self._ops.bias_activation(product, None, activation)


def named_tensors(parts: Mapping[str, LowRank]) -> dict[str, Tensor]:
    return {f"{name}.{side}": tensor for name, part in parts.items() for side, tensor in part._asdict().items()}


def save_adapter(directory: Path, adapter: Adapter, base: str) -> None:
    """Write it in fp32, each file replaced atomically. `base`: the fingerprint or name of the model that it belongs to."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in named_tensors(adapter.parts).items()}
    temporary = directory / (ADAPTER_WEIGHTS + ".tmp")
    save_file(tensors, temporary)
    os.replace(temporary, directory / ADAPTER_WEIGHTS)
    about = {"base": base, **asdict(adapter.config)}
    write_atomically(directory / ADAPTER_CONFIG, json.dumps(about, indent=2).encode() + b"\n")


def load_adapter(directory: Path, model: GPT) -> Adapter:
    """The adapter in a directory, fp32. Raises CheckpointError naming what is wrong or doesn't fit the model."""
    raw = read_json(directory / ADAPTER_CONFIG)
    try:
        config = AdapterConfig(raw["rank"], raw["alpha"], tuple(raw["targets"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / ADAPTER_CONFIG}: {error}") from error
    shapes: dict[str, tuple[int, int]] = {}
    for name, linear in adaptable(model, config.targets).items():
        outputs, inputs = linear.out_features, linear.in_features
        shapes |= {f"{name}.a": (config.rank, inputs), f"{name}.b": (outputs, config.rank)}
    path = directory / ADAPTER_WEIGHTS
    with safe_open(path, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if found != shapes:
            wrong = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
            name = wrong[0]
            raise CheckpointError(f"{path} does not fit the model: {name} is {found.get(name)}, not {shapes.get(name)}")
        tensors = {name: file.get_tensor(name) for name in found}
    names = [name.removesuffix(".a") for name in tensors if name.endswith(".a")]
    return Adapter(config, {name: LowRank(tensors[f"{name}.a"], tensors[f"{name}.b"]) for name in names})
