"""`make bench`: Banded next to llama.cpp and vLLM, where they are installed, on random models of GPT-2 125M's shape.

Text is drawn at temperature 1, as people draw it, and does not repeat itself; the share of tokens that Banded guessed is a
line of its own. The peaked model has the probabilities of real ones, the flat one none that counts: see checkpoints.py.
Every side is told all of `temperature`, `top_k`, `top_p` and `min_p`.

Each scenario measures all sides in turn, several times, and only one server runs at a time. It prints medians, their ratio
and the target. Tables, samples and plots go to tests/bench/results/, under the machine's name. Each scenario keeps its last
run. Options or environment variables name the peers:

    BENCH_LLAMA_SERVER=.../llama-server BENCH_LLAMA_CONVERT=.../llama.cpp BENCH_VLLM_PYTHON=.../bin/python make bench
    python -m tests.bench.run --only peaked-1 top-p-8 --rounds 5

llama.cpp's q8_0 crashes on some CPUs with AMX; LLAMA_ARG_REPACK=0 in the environment keeps it running.

Figures of one machine change within the hour, and those of two machines differ more: compare only figures of one table.
"""

import argparse
import asyncio
import functools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from kernels.torch_ops import HAS_TILES
from model.config import GPTConfig
from service.commands.options import positive
from service.engine.options import Dtype
from service.engine.pages import PageAllocator, pool_sizes, sequence_bytes
from service.engine.process import freeze_loaded_objects
from service.tools import bench as http
from service.tools.bench import (
    GREEDY,
    WHOLE,
    BenchError,
    Result,
    Workload,
    banded,
    keep,
    measure,
    percentile,
    random_prompts,
    run_async,
    running,
)
from tests.bench.checkpoints import ALTERNATING_125M, all_dense, write_gpt2, write_own
from tests.bench.peers import Peers, Servers, Side
from tests.bench.report import COLUMNS, OURS, Line, Sample, Target, environment, machine_name, print_cells, write

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).parent / "results"


class Sizes(NamedTuple):
    """How much is measured: REAL and QUICK differ in nothing else. Lengths are in tokens."""

    model: GPTConfig  # dense and banded layers in turn; with dense layers only, it has GPT-2's shape
    waves: int  # requests of each stream
    prompt: int
    output: int
    long: Workload  # long prompts
    full: Workload  # prompt and output fill the context
    gaps: Workload
    arriving: int  # tokens of the prompts that arrive
    every: float  # seconds from one arriving prompt to the next
    shared: Workload  # pairs of prompts that share `prefix` tokens, one request after the other
    prefix: int
    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    chunk: int  # prompt tokens that a step computes
    megabytes: int
    seconds: float  # for which a call is repeated


REAL = Sizes(
    model=ALTERNATING_125M,
    waves=2,
    prompt=128,
    output=128,
    long=Workload(4, 8, 1500, 64),
    full=Workload(16, 16, 1920, 128),
    gaps=Workload(8, 8, 128, 512),
    arriving=2000,
    every=2.0,
    shared=Workload(1, 6, 1564, 8),
    prefix=1500,
    prompts=(64, 128, 256, 512, 1024, 1536, 1984),
    contexts=(64, 256, 512, 1024, 1536, 2048),
    chunk=512,
    megabytes=1024,
    seconds=1.0,
)
QUICK = Sizes(
    model=replace(ALTERNATING_125M, n_layer=2, n_embd=64, n_head=1, n_inner=256, n_positions=256, band=64),
    waves=1,
    prompt=8,
    output=4,
    long=Workload(4, 4, 150, 4),
    full=Workload(4, 4, 192, 64),
    gaps=Workload(2, 2, 8, 240),
    arriving=200,
    every=0.05,
    shared=Workload(1, 2, 200, 2),
    prefix=150,
    prompts=(64, 200),
    contexts=(64, 256),
    chunk=64,
    megabytes=16,
    seconds=0.0,
)

# Decode rows of the steps whose matrix products are timed alone.
ROWS = [1, 8, 16, 32]
BF16_BYTES = 2  # of a key's or value's element, next to weights of int8 too
# KV memory that keeps 16 whole prompts cached, even the pages that left the band: 5 GB, committed at the start.
ROOMY = (("BANDED_MAX_SLOTS", "104"), ("BANDED_KV_BYTES", str(5 << 30)))

TOP_P = {**WHOLE, "top_p": 0.95}
CHAIN = {**WHOLE, "top_k": 40, "top_p": 0.95, "min_p": 0.05}  # what llama.cpp does by default, but for its temperature
LOGPROBS = {**WHOLE, "logprobs": 5}
PENALTIES = {**WHOLE, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1}
NO_DRAFTS = ("BANDED_DRAFTS", "0")
ACCEPTED = re.compile(r"^banded_accepted_draft_tokens_total\S* (\S+)", re.MULTILINE)
# Percent of the output tokens. A text with more of them repeats itself.
FEW_GUESSED = Target(5, 1, "%")

# Holds our kernels and PyTorch, and so vLLM, to what a CPU without AVX-512 has.
AVX2 = {"CXX": "c++ -mno-avx512f -mno-amx-tile", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

LLAMA_BF16, LLAMA_Q8, VLLM = "llama.cpp bf16", "llama.cpp q8_0", "vLLM bf16"
BF16_PEERS = (LLAMA_BF16, VLLM)


class Skip(Exception):
    """Why a scenario can't be measured."""


class Bench:
    """What the scenarios share: sizes, peers, running servers and the samples so far."""

    def __init__(self, sizes: Sizes, rounds: int, peers: Peers, servers: Servers):
        self.sizes, self.rounds, self.peers, self.servers = sizes, rounds, peers, servers
        self.samples: list[Sample] = []
        self._products: dict[str, dict[str, float]] = {}

    @functools.cached_property
    def gpt2(self) -> Path:
        return self._model("gpt2", write_gpt2, all_dense(self.sizes.model))

    @functools.cached_property
    def peaked(self) -> Path:
        return self._model("peaked", functools.partial(write_gpt2, peaked=True), all_dense(self.sizes.model))

    @functools.cached_property
    def alternating(self) -> Path:
        return self._model("alternating", write_own, self.sizes.model)

    @functools.cached_property
    def dense(self) -> Path:
        return self._model("dense", write_own, all_dense(self.sizes.model))

    def _model(self, name: str, write_model: Callable[[Path, GPTConfig], Path], config: GPTConfig) -> Path:
        """Write a model into the work folder once. Later runs find it there."""
        directory = self.peers.work / f"{name}-{config.n_layer}x{config.n_embd}"
        if not directory.exists():
            unfinished = directory.with_suffix(".tmp")
            write_model(unfinished, config)
            unfinished.rename(directory)
        return directory

    def ours(self, model: Path, dtype: str, *settings: tuple[str, str], name: str = "") -> Side:
        if dtype not in get_args(Dtype):
            raise Skip(f"`banded serve` has no --dtype {dtype}")
        return Side(name or f"{OURS} {dtype}", dtype, banded(model, "--dtype", dtype)._replace(environment=settings))

    def in_turn(self, scenario: str, sides: Iterable[Side], take: Callable[[str, str, str], Any]) -> dict[Side, list[Any]]:
        """Results of `take(url, model, seed)` by side, taken in the order A, B, A, B. A peer that fails is left out."""
        found: dict[Side, list[Any]] = {side: [] for side in sides}
        for turn in range(self.rounds):
            for side in list(found):
                progress(f"{scenario}, round {turn + 1} of {self.rounds}: {side.name}")
                try:
                    with self.servers.only(side.program) as (url, model):
                        found[side].append(take(url, model, f"{scenario} {turn}"))
                except BenchError as error:
                    if side.name.startswith(OURS):
                        raise
                    print(f"{scenario}: {side.name} is left out: {error}", flush=True)
                    del found[side]
        return found

    def loaded(
        self, scenario: str, figure: str, sides: Iterable[Side], load: Workload, value: Callable[[Result], float], at: float
    ) -> dict[str, float]:
        """For each side, the median of `value` under a load. Ours comes first."""

        def take(url: str, model: str, seed: str) -> tuple[Result, float]:
            before = num_accepted(url)
            return measure(url, model, load, seed=seed), num_accepted(url) - before

        results = self.in_turn(scenario, sides, take)
        for side, found in results.items():
            for turn, (result, accepted) in enumerate(found):
                sample = Sample(scenario, turn, side.name, side.dtype, figure, value(result), at).of(result)
                self.samples.append(sample._replace(guessed=100 * accepted / (load.requests * load.output)))
        return {side.name: statistics.median(value(result) for result, _ in found) for side, found in results.items()}

    def guessed(self, scenario: str) -> Line:
        """How much of our text was guessed, in the round in which that was most."""
        shares = [each.guessed for each in self.samples if each.scenario == scenario and each.side.startswith(OURS)]
        return Line(scenario, "% of the output tokens that were guessed", max(shares), target=FEW_GUESSED)

    def note(self, scenario: str, side: Side, figure: str, values: Iterable[float]) -> float:
        """Keep the value of each round as a sample. Returns the median."""
        kept = list(values)
        self.samples += [Sample(scenario, turn, side.name, side.dtype, figure, value) for turn, value in enumerate(kept)]
        return statistics.median(kept)

    def inside(self, measure_name: str, **arguments: Any) -> Any:
        """Run a measurement of tests.bench.inside, in a process of its own."""
        progress(f"in process: {measure_name}")
        command = [sys.executable, "-m", "tests.bench.inside", measure_name, json.dumps(arguments)]
        return json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)

    @functools.cached_property
    def bandwidth(self) -> float:
        """GB/s at which memory is read."""
        found: float = self.inside("bandwidth", megabytes=self.sizes.megabytes, seconds=self.sizes.seconds)
        return found

    def products(self, dtype: str) -> dict[str, float]:
        """Seconds of a step's matrix products, by its decode rows. "prompt" is a step with only a prompt chunk."""
        if dtype not in self._products:
            sizes = self.sizes
            self._products[dtype] = self.inside(
                "limits", model=str(self.gpt2), dtype=dtype, rows=ROWS, chunk=sizes.chunk, seconds=sizes.seconds
            )
        return self._products[dtype]


def ceiling(products: dict[str, float], load: Workload, chunk: int, reading: float) -> float:
    """Output tokens/s if a step were only its matrix products, those of prompts too, and the reading of keys and values.

    `products` has the products' seconds; `reading` is the seconds in which the keys and values of one token are read.
    """
    prompts = load.streams * load.prompt * products["prompt"] / chunk
    keys = load.streams * (load.prompt + load.output / 2) * reading
    return load.streams * load.output / (prompts + load.output * (products[str(load.streams)] + keys))


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def num_accepted(url: str) -> float:
    """Output tokens of a server of ours, so far, that it had guessed. 0 of others."""
    found = ACCEPTED.search(http.get(url, "/metrics")[1])
    return float(found[1]) if found else 0.0


def rivals(bench: Bench, model: Path, names: tuple[str, ...], load: Workload) -> list[Side]:
    """The named peers on a model, if installed, with room for a load."""
    whole = bench.sizes.model.n_positions
    slot = min(whole, -(-(load.prompt + load.output + 1) // 256) * 256)
    found = {
        LLAMA_BF16: lambda: bench.peers.llama(model, "bf16", load.streams, slot),
        LLAMA_Q8: lambda: bench.peers.llama(model, "q8_0", load.streams, slot),
        VLLM: lambda: bench.peers.vllm(model, whole),
    }
    return [side for name in names for side in found[name]()]


def compare(
    scenario: str,
    figure: str,
    medians: dict[str, float],
    target: Target | None = None,
    *,
    best: Callable[..., tuple[str, float]] = max,
    most: float = math.nan,
) -> Line:
    """Our figure, the first one, next to the best of the others. `most` is the ceiling."""
    (_, ours), *others = medians.items()
    against, theirs = best(others, key=lambda side: side[1]) if others else ("", math.nan)
    return Line(scenario, figure, ours, against, theirs, target, most)


def limits(bench: Bench, name: str) -> list[Line]:
    sizes = bench.sizes
    lines = [Line(name, "memory read, GB/s", bench.bandwidth)]
    for dtype in ("bfloat16", "int8"):
        if dtype in get_args(Dtype):
            for rows, seconds in bench.products(dtype).items():
                count = sizes.chunk if rows == "prompt" else int(rows)
                what = f"a prompt of {count}" if rows == "prompt" else f"{count} decoding"
                lines.append(Line(name, f"tokens/s of products alone, {dtype}, {what}", count / seconds))
    return lines


def profile(bench: Bench, name: str) -> list[Line]:
    """Where the time of a sampled step goes, and how far one row is from the speed at which memory is read."""
    sizes, model = bench.sizes, bench.peaked
    found = bench.inside(
        "profile",
        model=str(model),
        dtype="bfloat16",
        rows=[1, 8, 32],
        context=min(192, sizes.model.n_positions),
        seconds=sizes.seconds,
    )
    if not found:
        raise Skip("no ops are compiled, whose time it tells")
    lines = []
    for rows, parts in found.items():
        whole = parts.pop("step")
        parts["host"] = whole - sum(parts.values())
        told = ", ".join(f"{part} {1e3 * seconds:.3g}" for part, seconds in parts.items())
        lines.append(Line(name, f"ms of a step, {rows} rows: {told}", 1e3 * whole))
    config = sizes.model
    weights = config.n_layer * (4 * config.n_embd + 2 * config.n_inner) * config.n_embd + config.vocab_size * config.n_embd
    read = 2 * weights / 1e6 / lines[0].ours  # bytes in 1e6 a millisecond
    return [*lines, Line(name, "GB/s of weights, 1 row", read, "memory read", bench.bandwidth)]


def throughput(
    bench: Bench,
    name: str,
    *,
    streams: int,
    model: Literal["peaked", "gpt2"] = "peaked",
    dtype: str = "bfloat16",
    sampling: Mapping[str, float] = WHOLE,
    against: tuple[str, ...] = BF16_PEERS,
    target: Target | None = None,
) -> list[Line]:
    load, path = decoding(bench, streams, sampling), getattr(bench, model)
    sides = [bench.ours(path, dtype), *rivals(bench, path, against, load)]
    medians = bench.loaded(name, "tokens/s", sides, load, lambda result: result.tokens_per_second, streams)
    config = all_dense(bench.sizes.model)
    token_bytes = sequence_bytes(config, config.n_positions, BF16_BYTES) / config.n_positions
    most = ceiling(bench.products(dtype), load, bench.sizes.chunk, token_bytes / (1e9 * bench.bandwidth))
    return [compare(name, f"tokens/s, {load.drawn}, streams: {streams}", medians, target, most=most), bench.guessed(name)]


def decoding(bench: Bench, streams: int, sampling: Mapping[str, float]) -> Workload:
    sizes = bench.sizes
    return Workload(streams, max(3, sizes.waves * streams), sizes.prompt, sizes.output, sampling)


def looping(bench: Bench, name: str) -> list[Line]:
    """Greedy text of the flat model, which repeats itself. Most of it is guessed, and no token is drawn."""
    streams, without = 8, f"{OURS} without guesses"
    load, model = decoding(bench, streams, GREEDY), bench.gpt2
    sides = [bench.ours(model, "bfloat16"), bench.ours(model, "bfloat16", NO_DRAFTS, name=without)]
    sides += rivals(bench, model, BF16_PEERS, load)
    medians = bench.loaded(name, "tokens/s", sides, load, lambda result: result.tokens_per_second, streams)
    figure, plain = f"tokens/s, greedy text that loops, streams: {streams}", medians.pop(without)
    return [
        compare(name, figure, medians),
        Line(name, figure, next(iter(medians.values())), "without guesses", plain),
        bench.guessed(name)._replace(target=None),
    ]


def cost(
    bench: Bench, name: str, *, streams: int, sampling: Mapping[str, float], target: Target, busy: bool = False
) -> list[Line]:
    """What a way of drawing, or a busy process beside, leaves of our tokens/s at temperature 1, on the flat model."""
    side, plain = bench.ours(bench.gpt2, "bfloat16"), bench.sizes.gaps if busy else decoding(bench, streams, WHOLE)
    other = plain._replace(sampling=sampling)

    def both(url: str, model: str, seed: str) -> list[Result]:
        return [
            measure(url, model, plain, seed=f"{seed} a"),
            beside(busy, url, model, other, f"{seed} b"),
            beside(busy, url, model, other, f"{seed} c"),
            measure(url, model, plain, seed=f"{seed} d"),
        ]

    rounds = bench.in_turn(name, [side], both)[side]
    rates = [[result.tokens_per_second for result in results] for results in rounds]
    what = "beside a busy process" if busy else other.drawn
    without = bench.note(name, side, "tokens/s, temperature 1", ((a + d) / 2 for a, _, _, d in rates))
    changed = bench.note(name, side, f"tokens/s, {what}", ((b + c) / 2 for _, b, c, _ in rates))
    lines = [Line(name, f"tokens/s, {what}, streams: {streams}", changed, "temperature 1", without, target)]
    if busy:
        gaps = [[1e3 * gap for result in (b, c) for gap in gaps_together(result)] for _, b, c, _ in rounds]
        middle = bench.note(name, side, "gap p50 ms", map(statistics.median, gaps))
        longest = bench.note(name, side, "longest gap, ms", map(max, gaps))
        lines.append(Line(name, "longest gap beside a busy process, ms", longest, "p50", middle, Target(5, 2.5)))
    return lines


def beside(busy: bool, url: str, model: str, load: Workload, seed: str) -> Result:
    """Put a load on a server; if `busy`, next to a process that holds one core."""
    if not busy:
        return measure(url, model, load, seed=seed)
    # In a session of its own, as another program or container is: the kernel shares cores out among sessions too.
    busy_while_we_live = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    process = subprocess.Popen([sys.executable, "-c", busy_while_we_live], start_new_session=True)
    try:
        return measure(url, model, load, seed=seed)
    finally:
        process.kill()
        process.wait()


def first_token_ms(result: Result) -> float:
    return 1e3 * statistics.median(result.first_token)


def long_prompts(bench: Bench, name: str) -> list[Line]:
    load = bench.sizes.long
    sides = [bench.ours(bench.gpt2, "bfloat16"), *rivals(bench, bench.gpt2, BF16_PEERS, load)]
    medians = bench.loaded(name, "TTFT ms", sides, load, first_token_ms, load.prompt)
    figure = f"TTFT p50 ms, {load.streams} clients of {load.prompt} + {load.output}"
    return [compare(name, figure, medians, Target(0.7, 0.5), best=min)]


def alternating(bench: Bench, name: str) -> list[Line]:
    load = bench.sizes.full
    sides = [
        bench.ours(bench.alternating, "bfloat16", *ROOMY, name=f"{OURS}, dense and banded"),
        bench.ours(bench.dense, "bfloat16", *ROOMY, name=f"{OURS}, all dense"),
    ]
    rates = bench.in_turn(name, sides, lambda url, model, seed: decode_phase(url, model, load, seed))
    for side in sides:
        bench.servers.end(side.program)  # no other scenario needs so much memory
    medians = {side.name: bench.note(name, side, "decode tokens/s", found) for side, found in rates.items()}
    figure = f"decode tokens/s, {load.streams} x {load.prompt} + {load.output}"
    return [compare(name, figure, medians, Target(1.15, 1.3))]


def decode_phase(url: str, model: str, load: Workload, seed: str) -> float:
    """Output tokens/s while all streams decode. A first run puts their prompts into the prefix cache: otherwise the first
    stream would end before the last prompt is computed."""
    prompts = random_prompts(load, seed)
    run_async(keep(url, model, load._replace(streams=1, output=1), prompts))
    result = run_async(keep(url, model, load, prompts))
    if min(stream.cached for stream in result.streams) < load.prompt // 2:
        raise BenchError("the prompts were not in the prefix cache, so that the streams did not decode together")
    begin, end = together(result)
    events = [time for stream in result.streams for time in stream.events]
    tokens_per_event = len(result.streams) * load.output / len(events)
    return sum(begin < time <= end for time in events) * tokens_per_event / (end - begin)


def kv_memory(bench: Bench, name: str) -> list[Line]:
    """How many full-context sequences the page accounting admits at once, in memory for 1000 sequences of a dense model."""
    config = bench.sizes.model
    kv_bytes = 1000 * sequence_bytes(all_dense(config), config.n_positions, item_bytes=2)
    ours, theirs = (admitted(kind, kv_bytes) for kind in (config, all_dense(config)))
    figure = f"sequences of {config.n_positions} admitted in {kv_bytes / 1e9:.0f} GB"
    return [Line(name, figure, ours, "all dense", theirs, Target(1.7, 1.73))]


def admitted(config: GPTConfig, kv_bytes: int) -> int:
    many, step_tokens = 1 << 14, 512
    sizes = pool_sizes(config, kv_bytes=kv_bytes, item_bytes=2, max_rows=many, step_tokens=step_tokens)
    cache = PageAllocator(config, sizes, step_tokens=step_tokens)
    return next(row for row in range(many) if not cache.try_reserve(row, config.n_positions))


def http_cost(bench: Bench, name: str) -> list[Line]:
    streams, sizes = 32, bench.sizes
    load = Workload(streams, sizes.waves * streams, sizes.prompt, sizes.output)
    side = bench.ours(bench.gpt2, "bfloat16")
    over_http, alone = [], []
    for turn in range(bench.rounds):
        with bench.servers.only(side.program) as (url, model):
            over_http.append(measure(url, model, load, seed=f"{name} {turn}").tokens_per_second)
        # Both sides get a new process in every round: after a pause, a process can be up to a tenth slower.
        bench.servers.end(side.program)
        seed = f"{name} {turn}"
        alone.append(bench.inside("engine", model=str(bench.gpt2), dtype=side.dtype, load=list(load), seed=seed))
    ours = bench.note(name, side, "tokens/s over HTTP", over_http)
    theirs = bench.note(name, side._replace(name=f"{OURS}, in process"), "tokens/s in process", alone)
    return [Line(name, f"tokens/s over HTTP, {streams} streams", ours, "in process", theirs, Target(0.9, 0.95))]


def gaps(bench: Bench, name: str) -> list[Line]:
    """How much arriving prompts disturb streams that decode."""
    sizes, side = bench.sizes, bench.ours(bench.gpt2, "bfloat16")

    def quiet_then_busy(url: str, model: str, seed: str) -> tuple[Result, Result]:
        quiet = measure(url, model, sizes.gaps, seed=seed)
        return quiet, run_async(disturbed(url, model, sizes, f"{seed}, busy"))

    results = bench.in_turn(name, [side], quiet_then_busy)[side]
    pairs = [(gaps_together(calm), gaps_together(busy)) for calm, busy in results]
    quiet = bench.note(name, side, "gap p50 ms, undisturbed", (1e3 * percentile(gaps, 0.5) for gaps, _ in pairs))
    busy = bench.note(name, side, "gap p99 ms, disturbed", (1e3 * percentile(gaps, 0.99) for _, gaps in pairs))
    figure = f"gap p99 ms, {sizes.gaps.streams} streams, a prompt of {sizes.arriving} every {sizes.every:g} s"
    return [Line(name, figure, busy, "p50 without", quiet, Target(3, 2))]


async def disturbed(url: str, model: str, sizes: Sizes, seed: str) -> Result:
    """Run the streams of `sizes.gaps` while prompts of other clients arrive."""
    arrivals: list[asyncio.Task[http.Answer]] = []

    async def arrive() -> None:
        try:
            while True:
                await asyncio.sleep(sizes.every)  # the streams have begun by then
                (prompt,) = random_prompts(Workload(1, 1, sizes.arriving), f"{seed} {len(arrivals)}")
                arrivals.append(asyncio.create_task(http.exchange(url, http.request(url, model, prompt, 1))))
        finally:
            for task in arrivals:
                task.cancel()
            await asyncio.gather(*arrivals, return_exceptions=True)

    arriving = asyncio.create_task(arrive())
    try:
        result = await keep(url, model, sizes.gaps, random_prompts(sizes.gaps, seed))
    finally:
        arriving.cancel()
        await asyncio.gather(arriving, return_exceptions=True)
    for task in arrivals:
        if not task.cancelled():
            http.read_stream(url, task.result(), 1)  # raises if the request failed
    return result


def gaps_together(result: Result) -> list[float]:
    """Seconds between the events of a stream while all streams decode, sorted."""
    begin, end = together(result)
    gaps = (pair for stream in result.streams for pair in pairwise(stream.events))
    return sorted(later - earlier for earlier, later in gaps if begin <= earlier and later <= end)


def together(result: Result) -> tuple[float, float]:
    """When the last stream began and the first one ended. Raises BenchError if the first ended before the last began."""
    begin = max(stream.events[0] for stream in result.streams)
    end = min(stream.events[-1] for stream in result.streams)
    if begin >= end:
        raise BenchError("the streams did not decode together")
    return begin, end


def start(bench: Bench, name: str) -> list[Line]:
    """Seconds from the start of the process until it is ready. The first start may have had to prepare something."""
    side = bench.ours(bench.gpt2, "bfloat16")
    seconds = []
    for turn in range(bench.rounds + 1):
        progress(f"{name}, start {turn + 1} of {bench.rounds + 1}")
        with running(side.program) as server:
            seconds.append(server.seconds)
    again = bench.note(name, side, "start to ready, s", seconds[1:])
    return [
        Line(name, "first start to ready, s", seconds[0]),
        Line(name, "later start to ready, s", again, target=Target(10, 3, "s")),
    ]


def shared_prefix(bench: Bench, name: str) -> list[Line]:
    """Two prompts begin alike: how much sooner the second one is answered."""
    sizes, side = bench.sizes, bench.ours(bench.gpt2, "bfloat16")
    load, prefix = sizes.shared, sizes.prefix

    def pairs(url: str, model: str, seed: str) -> Result:
        prompts = random_prompts(load, seed)
        for first, second in zip(prompts[::2], prompts[1::2], strict=True):
            second[:prefix] = first[:prefix]
        return run_async(keep(url, model, load, prompts))

    results = bench.in_turn(name, [side], pairs)[side]
    firsts = [1e3 * statistics.median(stream.first_token for stream in result.streams[::2]) for result in results]
    seconds = [1e3 * statistics.median(stream.first_token for stream in result.streams[1::2]) for result in results]
    cold = bench.note(name, side, "TTFT ms, first", firsts)
    warm = bench.note(name, side, "TTFT ms, second", seconds)
    return [Line(name, f"TTFT ms, {load.prompt} tokens, {prefix} seen before", warm, "unseen", cold, Target(0.15, 0.08))]


def first_tokens(bench: Bench, name: str) -> list[Line]:
    loads = [Workload(1, 3, prompt, 1) for prompt in bench.sizes.prompts]
    sides = [bench.ours(bench.gpt2, "bfloat16"), *rivals(bench, bench.gpt2, BF16_PEERS, loads[-1])]
    lines = []
    for load in loads:
        medians = bench.loaded(f"{name} {load.prompt}", "TTFT ms", sides, load, first_token_ms, load.prompt)
        lines.append(compare(name, f"TTFT ms, a prompt of {load.prompt}", medians, best=min))
        if load.prompt == bench.sizes.chunk:
            speeds = {side: 1e3 * load.prompt / ms for side, ms in medians.items()}
            most = load.prompt / bench.products("bfloat16")["prompt"]
            lines.append(compare(name, f"prompt tokens/s, a prompt of {load.prompt}", speeds, most=most))
    return lines


def context(bench: Bench, name: str) -> list[Line]:
    """How much of a step the band saves as the context grows."""
    sizes, batch = bench.sizes, 8
    found = bench.inside(
        "step_times",
        sizes=asdict(all_dense(sizes.model)),
        band=sizes.model.band,
        batch=batch,
        contexts=sizes.contexts,
        seconds=sizes.seconds,
    )
    for kind, times in found.items():
        bench.samples += [
            Sample(name, 0, f"{OURS}, layers {kind}", "bfloat16", "step ms", 1e3 * seconds, keys, batch)
            for keys, seconds in zip(sizes.contexts, times, strict=True)
        ]
    longest = sizes.contexts[-1]
    dense, *others = ((kind, 1e3 * times[-1]) for kind, times in found.items())
    return [Line(name, f"step ms, {batch} at {longest} keys, layers {kind}", ms, *dense) for kind, ms in others]


def with_tiles(must: float, aim: float) -> Target:
    """A target of CPUs without AMX; with it, half as much again."""
    times = 1.5 if HAS_TILES else 1.0
    return Target(times * must, times * aim)


part = functools.partial
SCENARIOS: dict[str, Callable[[Bench, str], list[Line]]] = {
    "limits": limits,
    "alternating": alternating,
    "peaked-1": part(throughput, streams=1, against=(LLAMA_BF16,), target=Target(1.0, 1.2)),
    "peaked-8": part(throughput, streams=8, target=Target(2.0, 2.5)),
    "peaked-32": part(throughput, streams=32, target=with_tiles(2.2, 3.5)),
    "top-p-1": part(throughput, streams=1, sampling=TOP_P, against=(LLAMA_BF16,), target=Target(1.0, 1.2)),
    "top-p-8": part(throughput, streams=8, sampling=TOP_P, target=Target(2.5, 3.5)),
    "top-p-32": part(throughput, streams=32, sampling=TOP_P, target=with_tiles(3.0, 4.0)),
    "chain-8": part(throughput, streams=8, sampling=CHAIN, against=(LLAMA_BF16,), target=Target(2.0, 2.5)),
    "chain-32": part(throughput, streams=32, sampling=CHAIN, against=(LLAMA_BF16,), target=Target(2.0, 2.5)),
    "flat-8": part(throughput, model="gpt2", streams=8),
    "flat-32": part(throughput, model="gpt2", streams=32),
    "flat-top-p-8": part(throughput, model="gpt2", streams=8, sampling=TOP_P),
    "flat-top-p-32": part(throughput, model="gpt2", streams=32, sampling=TOP_P),
    "int8-1": part(throughput, dtype="int8", streams=1, against=(LLAMA_Q8,)),
    "int8-16": part(throughput, dtype="int8", streams=16, against=(LLAMA_Q8, *BF16_PEERS), target=Target(2.5, 4)),
    "greedy-loop": looping,
    "profile": profile,
    "cost-top-p-8": part(cost, streams=8, sampling=TOP_P, target=Target(0.9, 0.97)),
    "cost-top-p-32": part(cost, streams=32, sampling=TOP_P, target=Target(0.9, 0.97)),
    "cost-logprobs": part(cost, streams=8, sampling=LOGPROBS, target=Target(0.95, 0.98)),
    "cost-penalties": part(cost, streams=8, sampling=PENALTIES, target=Target(0.95, 0.98)),
    "cost-busy": part(cost, streams=8, sampling=WHOLE, busy=True, target=Target(0.5, 0.6)),
    "long-prompts": long_prompts,
    "kv-memory": kv_memory,
    "http": http_cost,
    "gaps": gaps,
    "start": start,
    "prefix": shared_prefix,
    "ttft": first_tokens,
    "context": context,
}


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 if a scenario failed. A missed target is no failure."""
    args = parser().parse_args(argv)
    freeze_loaded_objects()  # clients make little garbage, and collecting it takes a core from the servers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # otherwise the servers would keep running
    if args.quick:
        # A toy model has too little work for two threads: they would wait for each other. Nor is it worth compiling.
        os.environ |= {"OMP_NUM_THREADS": "1", "BANDED_COMPILE": "0"}
    if args.avx2:
        os.environ |= AVX2
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peers = Peers(args.llama_server, args.llama_convert, args.vllm_python, work)
        facts = environment(peers.versions())
        print(", ".join(f"{name} {fact}" for name, fact in facts.items()))
        for name, given in (("llama.cpp", args.llama_server), ("vLLM", args.vllm_python)):
            if not given:
                print(f"{name} is not measured: see `python -m tests.bench.run --help`")
        bench = Bench(QUICK if args.quick else REAL, args.rounds, peers, stack.enter_context(Servers()))
        lines, failed = measure_all(bench, args.only)
    label = ("quick-" if args.quick else "") + ("held-" if args.avx2 else "")
    stem = args.results / f"{label}{machine_name(facts)}"
    for path in write(stem, facts, lines, bench.samples):
        print(path)
    return 1 if failed else 0


def measure_all(bench: Bench, names: Iterable[str]) -> tuple[list[Line], bool]:
    """Measure the scenarios and print their lines. Returns the table, and whether a scenario failed."""
    print_cells(list(COLUMNS))
    table, failed = list[Line](), False
    for name in names:
        try:
            lines = SCENARIOS[name](bench, name)
        except Skip as reason:
            print(f"{name}: skipped: {reason}", flush=True)
            continue
        except (ValueError, subprocess.SubprocessError) as error:
            print(f"{name}: failed: {error}", flush=True)
            failed = True
            continue
        if bench.sizes == QUICK:
            lines = [line._replace(target=None) for line in lines]
        for line in lines:
            print_cells(line.cells())
        table += lines
    return table, failed


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(SCENARIOS)
    options.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="of: %(choices)s")
    options.add_argument("--rounds", type=positive, default=3, help="how often each side is measured (default %(default)d)")
    options.add_argument("--quick", action="store_true", help="a toy model and short runs: shows that the benchmark works")
    options.add_argument(
        "--avx2", action="store_true", help="hold Banded and vLLM to AVX2; llama.cpp has what it was built for"
    )
    options.add_argument("--results", type=Path, default=RESULTS, help="folder for tables and plots")
    options.add_argument("--work", type=Path, help="folder that keeps checkpoints for later runs")
    for name, what in (
        ("llama-server", "llama.cpp's server"),
        ("llama-convert", "folder of its convert_hf_to_gguf.py"),
        ("vllm-python", "Python of an environment with vLLM"),
    ):
        variable = f"BENCH_{name.replace('-', '_').upper()}"
        options.add_argument(f"--{name}", type=Path, default=os.environ.get(variable), help=f"{what}, or {variable}")
    return options


if __name__ == "__main__":
    sys.exit(main())
