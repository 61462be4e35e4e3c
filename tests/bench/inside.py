"""The benchmark's measurements without HTTP: `python -m tests.bench.inside NAME ARGUMENTS`.

NAME is a function of MEASURES, and ARGUMENTS is a JSON object of its arguments. The result is printed as JSON. Each
measurement runs in a process of its own, because a process sets up torch's threads only once. It sets them up as
`banded serve` does: see service/engine/process.py.
"""

import asyncio
import json
import logging
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch

from kernels.band import PAGE_SIZE
from kernels.cpu.compiled import CompiledOps
from kernels.ops import Ops
from model.config import GPTConfig, KVGroup
from model.gpt import GPT
from model.runner import PendingStep, Runner
from model.step import DecodeToken, NewPages, RowStart, Sample, Sampled, Sampling, StepInput
from service import AsyncLLM, SamplingParams
from service.engine.loading import Checkpoint, choose_ops, load_checkpoint
from service.engine.options import EngineOptions
from service.engine.pages import groups, pages_for
from service.engine.process import freeze_loaded_objects, keep_freed_memory, one_torch_thread
from service.settings import Settings
from service.tools.bench import Workload, random_prompts
from tests.bench.checkpoints import random_model

GREEDY = Sampling(temperature=0.0)


def median_seconds(work: Callable[[], object], seconds: float) -> float:
    """The median time of a call. Repeats it for `seconds` and at least 5 times, after a first call that is not counted."""
    work()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def options(model: str, dtype: str) -> EngineOptions:
    given: dict[str, Any] = {"model": model, "dtype": dtype}
    return Settings(**given).engine


def bandwidth(megabytes: int, seconds: float) -> float:
    """GB/s at which all cores read memory, measured as the sum over a tensor that no cache can hold."""
    numbers = torch.ones(megabytes << 18)
    return megabytes * (1 << 20) / median_seconds(numbers.sum, seconds) / 1e9


def limits(model: str, dtype: str, rows: list[int], chunk: int, seconds: float) -> dict[str, float]:
    """Seconds of a step's matrix products, by its number of decode rows. "prompt" is a step with only a prompt chunk."""
    keep_freed_memory()
    with one_torch_thread():
        checkpoint = load_checkpoint(options(model, dtype))
    works = {str(count): (count, count) for count in rows} | {"prompt": (chunk, 1)}
    return {name: products_seconds(checkpoint, *work, seconds) for name, work in works.items()}


@torch.inference_mode()
def products_seconds(checkpoint: Checkpoint, num_tokens: int, num_sampled: int, seconds: float) -> float:
    """Seconds of all products of a step, one after the other, with nothing in between."""
    calls = products(checkpoint, num_tokens, num_sampled)

    def replay() -> None:
        for call in calls:
            call()

    return median_seconds(replay, seconds)


class Recording:
    """Ops that remember every call to a matrix product."""

    def __init__(self, ops: Ops):
        self.ops = ops
        self.calls: list[partial[torch.Tensor]] = []

    def linear(self, *arguments: Any) -> torch.Tensor:
        self.calls.append(partial(self.ops.linear, *arguments))
        return self.ops.linear(*arguments)

    def project(self, *arguments: Any) -> torch.Tensor:
        self.calls.append(partial(self.ops.project, *arguments))
        return self.ops.project(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)


@torch.inference_mode()
def products(checkpoint: Checkpoint, num_tokens: int, num_sampled: int) -> list[partial[torch.Tensor]]:
    """All products of a step: every linear layer over `num_tokens` rows, the output head over `num_sampled`."""
    model, recording = checkpoint.model, Recording(checkpoint.ops)
    ops, positions = cast(Ops, recording), torch.arange(num_tokens) % model.config.n_positions
    hidden = model(positions % model.config.vocab_size, positions, lambda layer, q, k, v: v, ops)
    model.logits(hidden[:num_sampled], ops)
    return recording.calls


def engine(model: str, dtype: str, load: list[Any], seed: str) -> float:
    """Output tokens/s of the engine alone: what a client over HTTP would see if HTTP were free."""
    return asyncio.run(drive(model, dtype, Workload(*load), seed))


async def drive(model: str, dtype: str, load: Workload, seed: str) -> float:
    sampling: dict[str, Any] = {**load.sampling}
    params = SamplingParams(max_tokens=load.output, ignore_eos=True, **sampling)
    waiting = random_prompts(load, seed)
    async with AsyncLLM(model, dtype=dtype) as llm:
        freeze_loaded_objects()

        async def work() -> None:
            while waiting:
                await llm.generate(waiting.pop(), params)

        await llm.generate([0], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(load.streams)))
        return load.requests * load.output / (time.perf_counter() - started)


def step_times(sizes: dict[str, Any], band: int, batch: int, contexts: list[int], seconds: float) -> dict[str, list[float]]:
    """Seconds of a bf16 decode step of `batch` sequences at each context, by the attention of the model's layers."""
    config = GPTConfig(**sizes)
    banded = replace(config, attention=("banded",), band=band)
    kinds = {"dense": config, "banded": banded, "in turn": replace(banded, attention=("dense", "banded"))}
    keep_freed_memory()
    found = {}
    for name, kind in kinds.items():
        launch = full_runner(kind, batch).launch
        steps = [decode(batch, context) for context in contexts]
        found[name] = [median_seconds(partial(run_step, launch, step), seconds) for step in steps]
    return found


# The parts of a step, by the ops that they consist of. What is left is the host's: Python, and tensors that are made.
PARTS = {
    "blocks": ("run_blocks", "linear_panels", "decode_attention", "kv_write"),
    "head": ("project_panels",),
    "draw": ("sample",),
}


def profile(model: str, dtype: str, rows: list[int], context: int, seconds: float) -> dict[str, dict[str, float]]:
    """Seconds of a decode step that draws at temperature 1, and of its PARTS, by its number of rows.

    Empty where no ops are compiled.
    """
    keep_freed_memory()
    with one_torch_thread():
        checkpoint = load_checkpoint(options(model, dtype))
    found: dict[str, dict[str, float]] = {}
    if not isinstance(checkpoint.ops, CompiledOps):
        return found
    for count in rows:
        runner = filled(checkpoint.model, checkpoint.ops, count, Sampling())
        spent, undo = timed_calls(checkpoint.ops)
        step, times = decode(count, context), list[dict[str, float]]()
        while len(times) < 20 or sum(each["step"] for each in times) < seconds:
            spent.clear()
            started = time.perf_counter()
            run_step(runner.launch, step)
            parts = {part: sum(spent[name] for name in names) for part, names in PARTS.items()}
            times.append({"step": time.perf_counter() - started, **parts})
        undo()
        found[str(count)] = {part: statistics.median(each[part] for each in times) for part in times[0]}
    return found


def timed_calls(ops: CompiledOps) -> tuple[dict[str, float], Callable[[], None]]:
    """Seconds of each compiled function from now on, and what ends the counting."""
    spent, call = defaultdict[str, float](float), ops.call

    def timed(function: str, *arguments: object, keep: object = None) -> None:
        started = time.perf_counter()
        call(function, *arguments, keep=keep)
        spent[function] += time.perf_counter() - started

    ops.call = timed  # type: ignore[method-assign]
    return spent, lambda: delattr(ops, "call")


def run_step(launch: Callable[[StepInput], PendingStep], step: StepInput) -> Sampled:
    return launch(step).result()


@torch.inference_mode()
def full_runner(config: GPTConfig, batch: int) -> Runner:
    """A runner with random weights, whose batch rows hold a whole context each."""
    with one_torch_thread():
        model = random_model(config).to(torch.bfloat16).requires_grad_(False).eval()
        ops = choose_ops(model, options("random", "bfloat16"))
        model.pack(ops)
    return filled(model, ops, batch, GREEDY)


@torch.inference_mode()
def filled(model: GPT, ops: Ops, batch: int, sampling: Sampling) -> Runner:
    """A runner whose batch rows hold a whole context each."""
    config = model.config
    each = pages_for(config.n_positions)
    sizes: dict[KVGroup, int] = {group: batch * each for group, _ in groups(config)}
    runner = Runner(model, ops, batch, sizes)
    for pool in runner.pools:
        for pages in pool:
            pages.fill_(0.01)  # all unwritten memory is one page of zeros, which stays in the cache
    starts = [RowStart(row, sampling, [0]) for row in range(batch)]
    pages_of = [
        NewPages(row, group, 0, list(range(row * each, (row + 1) * each))) for row in range(batch) for group in sizes
    ]
    runner.launch(decode(batch, PAGE_SIZE)._replace(starts=starts, pages=pages_of)).result()
    return runner


def decode(batch: int, context: int) -> StepInput:
    """A step in which every row computes the last of its `context` tokens."""
    tokens = [DecodeToken(row, context - 1) for row in range(batch)]
    return StepInput([], [], tokens, [], [Sample(row, row) for row in range(batch)], [], [])


MEASURES: dict[str, Callable[..., object]] = {f.__name__: f for f in (bandwidth, limits, engine, step_times, profile)}


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    print(json.dumps(MEASURES[sys.argv[1]](**json.loads(sys.argv[2]))))
