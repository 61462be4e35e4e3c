"""Low-rank adapters (LoRA, Hu et al. 2021): what a fine-tune adds to the weights of a model that many share."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kernels.names import Activation
from kernels.ops import Ops, Weight
from model.checkpoint.files import CheckpointError, read_json, write_atomically
from model.checkpoint.weights import write_tensors
from model.gpt import GPT

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter.json", "adapter.safetensors"
# Compiled products read so many columns together: ranks are padded with zeros.
RANK_MULTIPLE = 32
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

    a: Any  # (rank, C): a tensor, or packed
    b: Any  # (O, rank)


@dataclass(frozen=True)
class Adapter:
    """All of them, by the names of the linears."""

    config: AdapterConfig
    parts: Mapping[str, LowRank]
    base: str  # weights_digest of the model that it belongs to

    @property
    def fingerprint(self) -> str:
        """A hash of all its numbers."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name, tensor in sorted(named_tensors(self.parts).items()):
            digest.update(name.encode() + tensor.detach().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name; those of an adapter that is trained are parameters."""
        tensors = named_tensors(self.parts)
        return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}


def adaptable(model: GPT, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linears of `targets`, by name."""
    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name: linear for name, linear in linears if name.rsplit(".", 1)[-1] in targets}


def new_adapter(model: GPT, config: AdapterConfig, base: str, seed: int) -> Adapter:
    """One that changes nothing yet: A is random, B zero. fp32 parameters, on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, linear in adaptable(model, config.targets).items():
        outputs, inputs = linear.out_features, linear.in_features
        a = torch.empty(config.rank, inputs).normal_(0, inputs**-0.5, generator=generator)
        b = torch.zeros(outputs, config.rank)
        parts[name] = LowRank(*(nn.Parameter(tensor.to(linear.weight.device)) for tensor in (a, b)))
    return Adapter(config, parts, base)


class Group(NamedTuple):
    """Rows of a step that have an adapter, and which."""

    rows: Tensor | None  # (n,) int64; None: all
    parts: Mapping[int, LowRank]  # by the id of the linear's weight
    scale: float


class AdaptedOps:
    """Ops in which linears have adapters beside them; everything else is that of `ops`.

    With a lone group they are differentiable if `ops` are. Rows of all adapters and of none share the product with the
    weight, and a row has the bits that it has alone.
    """

    def __init__(self, ops: Ops, groups: Sequence[Group]):
        self._ops, self._groups = ops, groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
        """As Ops.linear, x (N, C) where a group is not all of it."""
        groups = [(rows, parts[id(weight)], scale) for rows, parts, scale in self._groups if id(weight) in parts]
        if not groups:
            return self._ops.linear(x, weight, bias, activation)
        if groups[0][0] is None:
            return self._activate(self._ops.linear(x, weight, bias) + self._update(x, *groups[0][1:]), activation)
        own_rows = [rows for rows, _, _ in groups if rows is not None]  # None is said of a lone group only
        adapted = torch.cat(own_rows)
        out = self._ops.linear(x, weight, bias, activation)
        # What is to be added comes before the activation, which is part of the product: these rows go through it twice.
        sums = self._ops.linear(x[adapted], weight, bias) if activation else out[adapted]
        for own, rows, (_, part, scale) in zip(sums.split(list(map(len, own_rows))), own_rows, groups, strict=True):
            own += self._update(x[rows], part, scale)
        out[adapted] = self._activate(sums, activation)
        return out

    def _update(self, x: Tensor, part: LowRank, scale: float) -> Tensor:
        return scale * self._ops.linear(self._ops.linear(x, part.a, None), part.b, None)

    def _activate(self, x: Tensor, activation: Activation | None) -> Tensor:
        return x if activation is None else self._ops.bias_activation(x, None, activation)


def adapted(ops: Ops, model: GPT, adapter: Adapter) -> AdaptedOps:
    """Ops that run `model` with an adapter."""
    linears = adaptable(model, adapter.config.targets)
    parts = {id(linears[name].weight): part for name, part in adapter.parts.items()}
    return AdaptedOps(ops, [Group(None, parts, adapter.config.scale)])


class Adapters:
    """Adapters of one model by number, from 1 on, their matrices packed as the model's are."""

    def __init__(self, model: GPT, ops: Ops):
        self._model, self._ops = model, ops
        self._groups: dict[int, Group] = {}  # their rows are a step's affair

    def put(self, number: int, adapter: Adapter) -> None:
        linears, weight = adaptable(self._model, adapter.config.targets), self._model.head
        padding = -adapter.config.rank % RANK_MULTIPLE

        def packed(matrix: Tensor, *pad: int) -> Weight:
            padded = F.pad(matrix.detach(), pad).to(device=weight.device, dtype=weight.dtype)
            return self._ops.pack(padded, quantize=False)

        parts = {
            id(linears[name].weight): LowRank(packed(a, 0, 0, 0, padding), packed(b, 0, padding))
            for name, (a, b) in adapter.parts.items()
        }
        self._groups[number] = Group(None, parts, adapter.config.scale)

    def remove(self, number: int) -> None:
        """Nothing that runs may have it."""
        del self._groups[number]

    def ops_for(self, numbers: Sequence[int]) -> Ops | None:
        """Ops for a step whose token i has the adapter numbers[i], or none where that is 0; None where no token has one."""
        distinct = set(numbers)
        if distinct <= {0}:
            return None
        if len(distinct) == 1:
            return AdaptedOps(self._ops, [self._groups[number] for number in distinct])
        column = torch.tensor(numbers, device=self._model.head.device)
        groups = [
            self._groups[number]._replace(rows=(column == number).nonzero()[:, 0]) for number in sorted(distinct - {0})
        ]
        return AdaptedOps(self._ops, groups)


def named_tensors(parts: Mapping[str, LowRank]) -> dict[str, Tensor]:
    return {f"{name}.{side}": tensor for name, part in parts.items() for side, tensor in part._asdict().items()}


def save_adapter(directory: Path, adapter: Adapter) -> None:
    """Write it in fp32, each file replaced atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in named_tensors(adapter.parts).items()}
    write_tensors(directory / ADAPTER_WEIGHTS, tensors)
    about = {"base": adapter.base, **asdict(adapter.config)}
    with write_atomically(directory / ADAPTER_CONFIG) as file:
        file.write_text(json.dumps(about, indent=2) + "\n")


def load_adapter(directory: Path, model: GPT) -> Adapter:
    """The adapter in a directory, fp32. Raises CheckpointError naming what is wrong or doesn't fit the model."""
    raw = read_json(directory / ADAPTER_CONFIG)
    try:
        config, base = AdapterConfig(raw["rank"], raw["alpha"], tuple(raw["targets"])), str(raw["base"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / ADAPTER_CONFIG}: {error}") from error
    shapes: dict[str, tuple[int, int]] = {}
    for name, linear in adaptable(model, config.targets).items():
        outputs, inputs = linear.out_features, linear.in_features
        shapes |= {f"{name}.a": (config.rank, inputs), f"{name}.b": (outputs, config.rank)}
    path = directory / ADAPTER_WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"can't read {path}: {error}") from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        name = min(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
        raise CheckpointError(f"{path} does not fit the model: {name} is {found.get(name)}, not {shapes.get(name)}")
    names = [name.removesuffix(".a") for name in tensors if name.endswith(".a")]
    return Adapter(config, {name: LowRank(tensors[f"{name}.a"], tensors[f"{name}.b"]) for name in names}, base)
