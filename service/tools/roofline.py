"""What a model needs and what a GPU's data sheet allows: memory, concurrency, roofline speed, cost of training."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from model.config import GPTConfig
from model.gpt import GPT
from service.engine.pages import sequence_bytes

GB = 10**9
# Weights, keys and values have 16 bits.
ITEM_BYTES = 2
SECONDS_PER_YEAR = 365.25 * 24 * 3600


class Gpu(NamedTuple):
    """The maker's figures, without sparsity."""

    memory: float  # bytes
    bandwidth: float  # bytes/s
    flops: float  # 16-bit matrix products, per second


# NVIDIA's data sheets.
GPUS = {
    "v100-32gb": Gpu(32 * GB, 0.9e12, 125e12),
    "a100-40gb": Gpu(40 * GB, 1.555e12, 312e12),
    "a100-80gb": Gpu(80 * GB, 2.039e12, 312e12),
    "l4-24gb": Gpu(24 * GB, 0.3e12, 121e12),
    "l40s-48gb": Gpu(48 * GB, 0.864e12, 362e12),
    "h100-80gb": Gpu(80 * GB, 3.35e12, 989e12),
    "h200-141gb": Gpu(141 * GB, 4.8e12, 989e12),
}
# The share of a GPU's memory for weights, keys and values. The allocator, activations and captured graphs take the rest.
USABLE = 0.9


@dataclass(frozen=True, kw_only=True)
class Training:
    """Assumptions about training. The defaults are the published figures for GPT-3 on V100s."""

    tokens: float = 300e9
    flops: float = 28e12  # reached by one GPU
    dollars_per_hour: float = 1.50


@dataclass(frozen=True)
class Capacity:
    """A model on `count` GPUs that split weights, keys, values and work evenly and communicate in no time.

    Sequences are as long as the model's context.
    """

    config: GPTConfig
    gpu: Gpu
    count: int

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        """Of the model's parameters, by name."""
        with torch.device("meta"):
            return {name: parameter.shape for name, parameter in GPT(self.config).named_parameters()}

    @property
    def parameters(self) -> int:
        """Parameters of the decoder as it is stored, without the padding of the vocabulary."""
        config = self.config
        padding = (config.padded_vocab_size - config.vocab_size) * config.token_width
        return sum(map(math.prod, self._shapes.values())) - padding * (1 if config.tied_head else 2)

    @property
    def weights(self) -> float:
        """Bytes of all weights."""
        return self.parameters * ITEM_BYTES

    @property
    def kv_room(self) -> float:
        """Bytes left for keys and values on all GPUs; negative if the weights don't fit."""
        return self.count * self.gpu.memory * USABLE - self.weights

    @property
    def sequence(self) -> int:
        """Bytes of the keys and values of a full sequence."""
        return sequence_bytes(self.config, self.config.n_positions, ITEM_BYTES)

    @property
    def sequences(self) -> int:
        return max(0, math.floor(self.kv_room / self.sequence))

    @property
    def dense(self) -> "Capacity":
        """The same model with every layer dense."""
        return replace(self, config=replace(self.config, attention=("dense",), band=None))

    def decode_seconds(self, batch: int) -> float:
        """Time of a decode step of full sequences: of its reads or of its products, whichever is longer."""
        read = self.weights + batch * self.sequence
        work = (self._work_per_token + self._work_per_sample) * batch
        return max(read / (self.gpu.bandwidth * self.count), work / (self.gpu.flops * self.count))

    def prefill_seconds(self, tokens: int) -> float:
        """Time of a prompt's forward pass: its products, and 4 C operations for each key that a query of a layer sees."""
        config = self.config
        bands = [config.band if config.group(layer) == "banded" else None for layer in range(config.n_layer)]
        seen = sum(keys_seen(tokens, band) for band in bands)
        work = self._work_per_token * tokens + self._work_per_sample + 4.0 * config.n_embd * seen
        return max(work / (self.gpu.flops * self.count), self.weights / (self.gpu.bandwidth * self.count))

    @property
    def _work_per_token(self) -> float:
        """A product and a sum for each number of a matrix, except those of the embeddings and of the output head."""
        tables = ("wte.weight", "wpe.weight", "lm_head.weight")
        shapes = self._shapes.items()
        return 2.0 * sum(math.prod(shape) for name, shape in shapes if len(shape) == 2 and name not in tables)

    @property
    def _work_per_sample(self) -> float:
        """The same for the output head. Only a prompt's last token goes through it."""
        return 2.0 * self.config.vocab_size * self.config.token_width


def keys_seen(tokens: int, band: int | None) -> int:
    """Pairs of a query and a key that it sees, in a causal window."""
    reach = tokens if band is None else min(band, tokens)
    return reach * (reach + 1) // 2 + (tokens - reach) * reach


def training_cost(parameters: int, training: Training) -> tuple[float, float, float]:
    """FLOPs, GPU-years and dollars. 6 N D: for every token, each weight takes two operations forward and four backward."""
    flops = 6.0 * parameters * training.tokens
    seconds = flops / training.flops
    return flops, seconds / SECONDS_PER_YEAR, seconds / 3600 * training.dollars_per_hour


def report(name: str, capacity: Capacity, gpu_name: str, prompt: int, training: Training) -> str:
    """Everything as text, inputs next to results."""
    config, gpu, count = capacity.config, capacity.gpu, capacity.count
    billions, gigabytes = capacity.parameters / 1e9, capacity.weights / GB
    lines = [
        f"{name}: {billions:,.3f} billion parameters, {config.n_layer} layers of width {config.n_embd}, "
        f"context {config.n_positions}",
        f"{count} x {gpu_name}: {gpu.memory / GB:g} GB of which {USABLE:.0%} are used, {gpu.bandwidth / 1e12:g} TB/s, "
        f"{gpu.flops / 1e12:g} TFLOP/s in 16 bits (data sheet)",
        "",
        f"weights, {8 * ITEM_BYTES} bits each as keys and values are: {gigabytes:,.1f} GB, "
        f"{gigabytes / count:,.1f} GB per GPU",
    ]
    if capacity.sequences:
        lines += [f"left for keys and values: {capacity.kv_room / GB / count:,.1f} GB per GPU", "", *table(capacity, prompt)]
    else:
        need = math.ceil((capacity.weights + capacity.sequence) / (gpu.memory * USABLE))
        lines.append(f"too little memory: weights and one sequence need {need} such GPUs")
    flops, gpu_years, dollars = training_cost(capacity.parameters, training)
    return "\n".join(
        [
            *lines,
            "",
            f"training: 6 x {billions:,.3f} billion parameters x {training.tokens / 1e9:,.0f} billion tokens = "
            f"{flops:.3g} FLOPs",
            f"at {training.flops / 1e12:g} TFLOP/s per GPU and {training.dollars_per_hour:.2f} $/h: "
            f"{gpu_years:,.1f} GPU-years, {dollars / 1e6:,.2f} million $",
        ]
    )


def table(capacity: Capacity, prompt: int) -> list[str]:
    """Concurrency and roofline of the model, next to the same with dense layers only."""

    def figures(one: Capacity) -> list[str]:
        many = one.sequences
        return [
            f"{one.sequence / 1e6:,.1f}",
            f"{many:,}",
            f"{1 / one.decode_seconds(1):,.1f}",
            f"{many / one.decode_seconds(many):,.0f}" if many else "-",
            f"{1e3 * one.prefill_seconds(prompt):,.1f}",
        ]

    names = [
        f"keys and values of {capacity.config.n_positions} tokens, MB",
        "such sequences at a time",
        "tokens/s, one such stream, at most",
        "tokens/s, all of them, at most",
        f"ms to the first token of {prompt}, at least",
    ]
    rows = zip(names, figures(capacity), figures(capacity.dense), strict=True)
    return [f"{'':<42}{'as it is':>14}{'all dense':>14}", *(f"{name:<42}{own:>14}{dense:>14}" for name, own, dense in rows)]
