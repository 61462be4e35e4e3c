"""Low-rank adapters (LoRA, Hu et al. 2021): what a fine-tune adds to the weights of a model that many share.

Shapes: N tokens in a step, of which n have the adapter; R the rank, I the inputs of a linear, O its outputs.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kernels.names import Activation
from kernels.ops import Ops, Weight
from model.checkpoint.files import CheckpointError, check_file, read_json, write_atomically
from model.checkpoint.weights import HEADER_BYTES, write_tensors
from model.gpt import GPT, Adapt, Linear

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter.json", "adapter.safetensors"
# Ranks are padded with zeros to a multiple of this, because compiled products read so many columns at once.
RANK_MULTIPLE = 32
# The linears that can have an adapter. Attention and the MLP each have a c_proj.
TARGETS = ("c_attn", "c_proj", "c_fc")


@dataclass(frozen=True)
class AdapterConfig:
    """x @ W.T becomes x @ W.T + scale * (x @ A.T) @ B.T, A with `rank` rows. Raises ValueError naming a wrong field."""

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
    """The matrices of one linear: tensors, or packed."""

    a: Any  # (R, I)
    b: Any  # (O, R)


@dataclass(frozen=True)
class Adapter:
    """An adapter for one set of weights."""

    config: AdapterConfig  # its rank is the largest of the parts'
    parts: Mapping[str, LowRank]  # by the name of the linear
    base: str | None  # weights_digest of the model, if known
    made_for: str = ""  # the model's name where the adapter was made, if known

    @property
    def fingerprint(self) -> str:
        """A hash of config and weights."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(name.encode() + tensor.detach().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All matrices by name, such as h.3.attn.c_attn.a."""
        return {f"{name}.{side}": matrix for name, part in self.parts.items() for side, matrix in part._asdict().items()}


def adaptable(model: GPT, targets: tuple[str, ...]) -> dict[str, Linear]:
    """The linears of `targets`, by name."""
    linears = (module for module in model.modules() if isinstance(module, Linear))
    return {linear.name: linear for linear in linears if linear.name.rsplit(".", 1)[-1] in targets}


def most_bytes(model: GPT) -> int:
    """Bytes of the largest file of an adapter that makes sense: of full rank on all linears, and fp64."""
    sizes = [linear.inputs * linear.outputs for linear in adaptable(model, TARGETS).values()]
    return HEADER_BYTES + 8 * 4 * sum(sizes)


def new_adapter(model: GPT, config: AdapterConfig, base: str, seed: int) -> Adapter:
    """An adapter that changes nothing yet: A is random, B zero. fp32 parameters, on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, linear in adaptable(model, config.targets).items():
        a = torch.empty(config.rank, linear.inputs).normal_(0, linear.inputs**-0.5, generator=generator)
        b = torch.zeros(linear.outputs, config.rank)
        parts[name] = LowRank(*(nn.Parameter(tensor.to(model.head.device)) for tensor in (a, b)))
    return Adapter(config, parts, base)


class Group(NamedTuple):
    """The rows of a step that share an adapter."""

    rows: Tensor | None  # (n,) int64; None: all
    parts: Mapping[str, LowRank]
    scale: float


def adapted_linear(groups: Sequence[Group], linear: Linear, x: Tensor, ops: Ops, activation: Activation | None) -> Tensor:
    """As Ops.linear, with the adapters of a step's rows: an `Adapt` of model/gpt.py once `groups` are bound.

    x is (N, I), or (..., I) if a group has all rows. All rows share the product with the weight, and a row has the same
    bits as alone. A single group is differentiable if the ops are.
    """
    name, weight, bias = linear.name, linear.stored, linear.bias
    adapters = [(rows, parts[name], scale) for rows, parts, scale in groups if name in parts]
    if not adapters:
        return ops.linear(x, weight, bias, activation)
    if adapters[0][0] is None:
        return activated(ops.linear(x, weight, bias) + low_rank(x, *adapters[0][1:], ops), activation, ops)
    own_rows = [rows for rows, _, _ in adapters if rows is not None]  # only a single group has all rows
    adapted = torch.cat(own_rows)
    out = ops.linear(x, weight, bias, activation)  # (N, O)
    # Adapters add to the sums ahead of the activation, which the product includes: compute these rows again.
    sums = ops.linear(x[adapted], weight, bias) if activation else out[adapted]
    for own, rows, (_, part, scale) in zip(sums.split(list(map(len, own_rows))), own_rows, adapters, strict=True):
        own += low_rank(x[rows], part, scale, ops)
    out[adapted] = activated(sums, activation, ops)
    return out


def low_rank(x: Tensor, part: LowRank, scale: float, ops: Ops) -> Tensor:
    """What an adapter adds (..., O) for x (..., I)."""
    return scale * ops.linear(ops.linear(x, part.a, None), part.b, None)


def activated(x: Tensor, activation: Activation | None, ops: Ops) -> Tensor:
    return x if activation is None else ops.bias_activation(x, None, activation)


def adapt_all(adapter: Adapter) -> Adapt:
    """Every row has the adapter."""
    return partial(adapted_linear, [Group(None, adapter.parts, adapter.config.scale)])


class Adapters:
    """Adapters of one model, numbered from 1. Their matrices are packed as the model's are."""

    def __init__(self, model: GPT, ops: Ops):
        self._model, self._ops = model, ops
        self._groups: dict[int, Group] = {}  # of all rows; each step sets its own

    def put(self, number: int, adapter: Adapter) -> None:
        weight = self._model.head

        def packed(matrix: Tensor, *pad: int) -> Weight:
            padded = F.pad(matrix.detach(), pad).to(device=weight.device, dtype=weight.dtype)
            return self._ops.pack(padded, quantize=False)

        parts = {}
        for name, (a, b) in adapter.parts.items():
            padding = -len(a) % RANK_MULTIPLE
            parts[name] = LowRank(packed(a, 0, 0, 0, padding), packed(b, 0, padding))
        self._groups[number] = Group(None, parts, adapter.config.scale)

    def remove(self, number: int) -> None:
        """No running sequence may still use it."""
        del self._groups[number]

    def of_rows(self, numbers: Sequence[int]) -> Adapt | None:
        """For a step whose row i has the adapter numbers[i], or none if that is 0. None if no row has an adapter."""
        distinct = set(numbers)
        if distinct <= {0}:
            return None
        if len(distinct) == 1:
            return partial(adapted_linear, [self._groups[number] for number in distinct])
        column = torch.tensor(numbers, device=self._model.head.device)
        rows_of = {number: (column == number).nonzero()[:, 0] for number in sorted(distinct - {0})}
        return partial(adapted_linear, [self._groups[number]._replace(rows=rows) for number, rows in rows_of.items()])


def save_adapter(directory: Path, adapter: Adapter) -> None:
    """Write the adapter in fp32, each file atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in adapter.tensors.items()}
    write_tensors(directory / ADAPTER_WEIGHTS, tensors)
    about = {"base": adapter.base, **asdict(adapter.config)}
    with write_atomically(directory / ADAPTER_CONFIG) as file:
        file.write_text(json.dumps(about, indent=2) + "\n")


def load_adapter(directory: Path, model: GPT) -> Adapter:
    """The adapter in `directory`, fp32. Raises CheckpointError naming what is wrong or does not fit the model."""
    raw = read_json(directory / ADAPTER_CONFIG)
    try:
        config, base = AdapterConfig(raw["rank"], raw["alpha"], tuple(raw["targets"])), str(raw["base"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / ADAPTER_CONFIG}: {error}") from error
    shapes: dict[str, tuple[int, int]] = {}
    for name, linear in adaptable(model, config.targets).items():
        shapes |= {f"{name}.a": (config.rank, linear.inputs), f"{name}.b": (linear.outputs, config.rank)}
    path = directory / ADAPTER_WEIGHTS
    check_file(path, most_bytes(model))
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"can't read {path}: {error}") from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        name = min(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
        raise CheckpointError(f"{path} does not fit the model: {name} is {found.get(name)}, not {shapes.get(name)}")
    names = [name.removesuffix(".a") for name in tensors if name.endswith(".a")]
    return Adapter(config, {name: LowRank(tensors[f"{name}.a"], tensors[f"{name}.b"]) for name in names}, base)
