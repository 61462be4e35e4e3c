"""CPU time of the draw: a table of microseconds a row on one thread, in PyTorch and compiled, and how often they differ.

    python -m tests.bench.draw [--agreement 100000]

The logits are normal. Flat ones have a deviation of 1, as from random weights. Peaked ones are scaled until their
distribution has 3.7 nats, about what trained models have. Each line takes both ways in turn.

With --agreement it draws so many tokens both ways for each setting instead, and counts those that are not the same.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import torch_ops
from kernels.cpu.build import Shape
from kernels.cpu.compiled import load
from kernels.ops import Ops
from kernels.sampling_state import COLUMNS, TABLES, SamplingState

VOCABULARY, PADDED = 50257, 50304
NATS = 3.7
SECONDS = 0.15  # that each way of a line takes, about


class Setting(NamedTuple):
    name: str
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    penalties: bool = False


SETTINGS = [
    Setting("greedy", temperature=0.0),
    Setting("temperature 1"),
    Setting("top-p 0.95", top_p=0.95),
    Setting("top-p 0.5", top_p=0.5),
    Setting("top-k 50", top_k=50),
    Setting("top-k 5000", top_k=5000),
    Setting("top-k 40, top-p 0.95, min-p 0.05", top_k=40, top_p=0.95, min_p=0.05),
    Setting("penalties", penalties=True),
    Setting("penalties, top-p 0.95", top_p=0.95, penalties=True),
]


def state_of(setting: Setting, num_rows: int, generator: torch.Generator) -> SamplingState:
    """Rows that have had a prompt of 300 tokens and generated 200."""
    columns = {name: torch.zeros(num_rows, dtype=dtype) for name, dtype in COLUMNS.items()}
    tables = {name: torch.zeros(num_rows, PADDED, dtype=dtype)[:, :VOCABULARY] for name, dtype in TABLES.items()}
    for name in ("temperature", "top_k", "top_p", "min_p"):
        columns[name] += getattr(setting, name)
    columns["seed"] += torch.arange(num_rows)
    columns["repetition_penalty"] += 1.1
    columns["presence_penalty"] += 0.3
    columns["frequency_penalty"] += 0.2
    columns["adjusted"] |= setting.penalties
    for row in range(num_rows):
        tables["in_prompt"][row, torch.randint(VOCABULARY, (300,), generator=generator)] = True
        tables["generated"][row, torch.randint(VOCABULARY, (200,), generator=generator)] += 1
    return SamplingState(**columns, **tables)


def normal_logits(num_rows: int, scale: float, generator: torch.Generator) -> Tensor:
    return scale * torch.randn(num_rows, PADDED, generator=generator)[:, :VOCABULARY]


def scale_for(nats: float) -> float:
    """The factor of normal logits whose distribution has that entropy, by bisection."""
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0))
    low, high = 1.0, 20.0
    for _ in range(30):
        middle = (low + high) / 2
        entropy = torch.distributions.Categorical(logits=middle * logits).entropy().mean()
        low, high = (middle, high) if entropy > nats else (low, middle)
    return low


def cpu_microseconds(calls: list[Callable[[], object]]) -> list[float]:
    """The median of each call, made in turn."""
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    start = time.perf_counter()
    while len(taken[0]) < 3 or time.perf_counter() - start < len(calls) * SECONDS:
        for call, times in zip(calls, taken, strict=True):
            began = time.process_time_ns()
            call()
            times.append((time.process_time_ns() - began) / 1e3)
    return [median(times) for times in taken]


def table(ways: list[Ops], scales: dict[str, float], sizes: list[int]) -> None:
    def line(name: str, call: Callable[[Ops, int], object]) -> None:
        cells = []
        for n in sizes:
            times = cpu_microseconds([partial(call, ops, n) for ops in ways])
            cells.append(" / ".join(f"{us / n:.0f}" for us in times))
        print(f"{name:<48}" + "".join(f"{cell:>18}" for cell in cells), flush=True)

    def draws(logits: Tensor, state: SamplingState, ops: Ops, n: int) -> Tensor:
        rows = torch.arange(n)
        return ops.sample(logits[:n], state, rows, rows + next(positions))  # other noise each time

    def logprobs(logits: Tensor, ops: Ops, n: int) -> object:
        return ops.top_logprobs(logits[:n], 5)

    generator, positions = torch.Generator().manual_seed(1), count()
    torch.set_num_threads(1)
    print(f"{'CPU microseconds a row, PyTorch / compiled':<48}" + "".join(f"{f'{n} rows':>18}" for n in sizes))
    for kind, scale in scales.items():
        logits = normal_logits(max(sizes), scale, generator)
        for setting in SETTINGS:
            line(f"{kind}, {setting.name}", partial(draws, logits, state_of(setting, max(sizes), generator)))
        line(f"{kind}, logprobs 5", partial(logprobs, logits))


def agreement(ways: list[Ops], scales: dict[str, float], draws: int) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.arange(32)
    for kind, scale in scales.items():
        for setting in SETTINGS:
            state, different, drawn = state_of(setting, len(rows), generator), 0, 0
            while drawn < draws:
                logits = normal_logits(len(rows), scale, generator)
                for position in range(8):
                    first, second = (ops.sample(logits, state, rows, rows + position) for ops in ways)
                    different += int((first != second).sum())
                    drawn += len(rows)
            print(f"{kind}, {setting.name}: {different} of {drawn} differ", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agreement", type=int, metavar="DRAWS", help="compare tokens, not times")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args()
    compiled = load(Shape(64, torch.bfloat16))
    if compiled is None:
        raise SystemExit("the CPU kernels can't be compiled here")
    ways: list[Ops] = [torch_ops, compiled]
    scales = {"flat": 1.0, "peaked": scale_for(NATS)}
    if args.agreement:
        agreement(ways, scales, args.agreement)
    else:
        table(ways, scales, args.rows)


if __name__ == "__main__":
    main()
