"""`make gpu-check`: the tests that need a GPU, every kernel's speed next to PyTorch's, and random models served over HTTP.

Writes one report, tests/bench/results/gpu-check-<device>.md. Exits with 1 if a test fails, a result is wrong or our own code
does not run. A missed goal is no failure. `make gpu-check DRY=1` is the same command at toy size on a CPU, in Triton's
interpreter: it shows that the command works, and measures nothing.
"""

import argparse
import gc
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch

from kernels.dispatch import choose
from kernels.patterns import Pattern
from model.checkpoint.weights import load_model, save_model
from model.config import GPT3_SIZES, GPTConfig
from model.gpt import GPT
from model.runner import Runner
from model.step import Sampling
from service.engine.pages import PageAllocator, pool_sizes
from service.engine.scheduler import Scheduler, Sequence
from service.tools.bench import GREEDY, Result, Workload, banded, measure, percentile, running
from tests.bench import kernels
from tests.bench.kernels import OURS, Row, Shapes, attention_name, first_line

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).parent / "results"
START_SECONDS = 600.0  # a server that starts compiles kernels and records graphs
NO_GPU = "no CUDA device; `make gpu-check DRY=1` runs the same command at toy size on a CPU"


class Run(NamedTuple):
    """What the command does. REAL and DRY differ only in this."""

    command: str
    label: str  # next to every figure, in place of the verdict on its goal
    tests: tuple[str, ...]  # arguments of pytest
    shapes: Shapes
    models: dict[str, GPTConfig]
    streams: tuple[int, ...]
    tokens: int  # of a prompt, and of a completion
    rows: int  # sequences in the steps whose CPU time is measured

    @property
    def remark(self) -> str:
        return f" ({self.label})" if self.label else ""


SERVED = {name: GPT3_SIZES[name] for name in ("gpt3-125m", "gpt3-1.3b")}
TINY = replace(GPT3_SIZES["gpt3-125m"], n_layer=2, n_embd=64, n_head=1, n_inner=128, n_positions=256, band=64)
REAL = Run("make gpu-check", "", ("-m", "gpu"), kernels.REAL, SERVED, (1, 8, 32), 128, 32)
DRY_TESTS = ("-m", "not gpu", "tests/kernels/test_band.py")
DRY = Run("make gpu-check DRY=1", "dry run: not a measurement", DRY_TESTS, kernels.DRY, {"tiny": TINY}, (1, 2), 8, 2)


class Limits(NamedTuple):
    """A device's TB/s of memory and TFLOP/s of dense bf16 products."""

    bandwidth: float
    compute: float
    chip: str = ""  # the one whose prefill goals apply


# By torch.cuda.get_device_name. Source: NVIDIA's data sheets of A100, H100 and H200. TFLOP/s "with sparsity" are halved.
LIMITS = {
    "NVIDIA A100-PCIE-40GB": Limits(1.555, 312, "A100"),
    "NVIDIA A100-SXM4-40GB": Limits(1.555, 312, "A100"),
    "NVIDIA A100 80GB PCIe": Limits(1.935, 312, "A100"),
    "NVIDIA A100-SXM4-80GB": Limits(2.039, 312, "A100"),
    "NVIDIA H100 PCIe": Limits(2.0, 756, "H100"),
    "NVIDIA H100 80GB HBM3": Limits(3.35, 989, "H100"),
    "NVIDIA H200": Limits(4.8, 989, "H100"),
}


class Goal(NamedTuple):
    """A figure must reach `floor` and should reach `target`."""

    floor: float
    target: float
    unit: str

    def verdict(self, value: float) -> str:
        met = "target met" if value >= self.target else "floor met" if value >= self.floor else "missed"
        return f"{met} ({self.floor:g} -> {self.target:g} {self.unit})"


DECODE_GOAL = Goal(70, 85, "%")
PREFILL_GOALS = {
    ("A100", 64): Goal(125, 150, "TFLOP/s"),
    ("A100", 128): Goal(135, 155, "TFLOP/s"),
    ("H100", 64): Goal(250, 300, "TFLOP/s"),
    ("H100", 128): Goal(300, 380, "TFLOP/s"),
}
# How many times faster banded is than dense.
SPEEDUP_GOALS = {"decode_attention": Goal(4, 4, "x"), "prefill_attention": Goal(2.3, 2.3, "x")}
ROOFLINE_GOAL, ROOFLINE_PARAMETERS = Goal(50, 70, "%"), 1.3e9  # at batch 1, for models with at least so many parameters
STEP_CPU_MS = 0.3  # at most


class Setting(NamedTuple):
    run: Run
    device: torch.device
    name: str  # of the device
    measured: Limits
    scratch: Path

    @property
    def limits(self) -> Limits:
        """What every "of the limit" refers to: the data sheet, or the measured limits if the device is not in the table."""
        return LIMITS.get(self.name, self.measured)


class Section(NamedTuple):
    """A section of the report in Markdown, and what failed in it."""

    text: str
    failures: list[str]


def describe(setting: Setting) -> Section:
    run, sheet, measured = setting.run, LIMITS.get(setting.name), setting.measured
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    facts = {
        "command": f"`{run.command}`",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "revision": output_of("git", "describe", "--always", "--dirty"),
        "device": f"{setting.name}, driver {driver}, CUDA {torch.version.cuda}",
        "versions": f"torch {torch.__version__}, triton {version('triton')}, Python {platform.python_version()}",
        "limits, data sheet": f"{sheet.bandwidth:g} TB/s, {sheet.compute:g} TFLOP/s dense bf16" if sheet else "not known",
        "limits, measured": f"{measured.bandwidth:.3g} TB/s by a copy, {measured.compute:.3g} TFLOP/s by a bf16 product of "
        f"{run.shapes.matmul}^3{run.remark}",
    }
    lines = "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
    work = "Achieved is useful work over the median time: only seen keys count, whatever else a kernel reads and multiplies."
    return Section(f"# GPU check: {setting.name}\n\n{lines}\n\n{work}", [])


def run_tests(setting: Setting) -> Section:
    """Run pytest in a process of its own: Triton decides at its first import whether it interprets."""
    arguments, results = setting.run.tests, setting.scratch / "tests.xml"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", *arguments, f"--junit-xml={results}"]
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    outcomes = {
        f"{test.get('classname')}::{test.get('name')}": {child.tag for child in test}
        for test in ElementTree.parse(results).iter("testcase")
    }
    failures = [f"test {name}" for name, tags in outcomes.items() if tags & {"failure", "error"}]
    skipped = sum("skipped" in tags for tags in outcomes.values())
    passed = len(outcomes) - len(failures) - skipped
    counts = f"{passed} passed, {len(failures)} failed, {skipped} skipped"
    if not failures and (status or not passed):
        failures = [f"pytest ended with status {status}: {counts}"]
    return Section(f"## Tests\n\n`pytest {' '.join(arguments)}`: {counts}{setting.run.remark}", failures)


def time_kernels(setting: Setting) -> Section:
    run, device, rows, failures = setting.run, setting.device, list[Row](), list[str]()
    torch.manual_seed(0)
    for build in kernels.cases(run.shapes, choose(device, "triton"), device):
        print(f"{build.func.__name__} {build.args[:-3]}", file=sys.stderr, flush=True)
        try:
            rows += kernels.measure(build(), device)
        except Exception as problem:  # the reference failed, or an earlier kernel broke the device
            failures.append(f"{build.func.__name__} {build.args[:-3]}: {first_line(problem)}")
        release(device)
    header = "op | by | p20 ms | p50 ms | p80 ms | achieved | of the limit | relative error | goal"
    times = table(header, [kernel_line(row, setting) for row in rows])
    failures += [f"{row.task.name}, {row.way}: {row.problem}" for row in rows if row.failed]
    return Section(f"## Kernels\n\n{times}\n\n{speedups(rows, run)}", failures)


def kernel_line(row: Row, setting: Setting) -> list[str]:
    if not row.ms:
        return [row.task.name, row.way, *["-"] * 6, row.problem.replace("|", "/")]
    limits = setting.limits
    share = 100 * row.rate / (limits.bandwidth if row.task.unit == "TB/s" else limits.compute)
    goal = goals(setting.run.shapes, limits.chip).get(row.task.name) if row.way == OURS else None
    verdict = goal.verdict(share if goal.unit == "%" else row.rate) if goal else ""
    figures = [*(f"{ms:.4g}" for ms in row.ms), f"{row.rate:.3g} {row.task.unit}", f"{share:.3g} %", f"{row.error:.1g}"]
    return [row.task.name, row.way, *figures, setting.run.label or verdict]


def goals(shapes: Shapes, chip: str) -> dict[str, Goal]:
    """The goals by the name of the task."""
    dense, banded = Pattern("dense"), Pattern("banded", shapes.band)
    decode = {attention_name("decode_attention", p, dim): DECODE_GOAL for p in (dense, banded) for dim in shapes.head_dims}
    prefill = {
        attention_name("prefill_attention", dense, dim): goal for (c, dim), goal in PREFILL_GOALS.items() if c == chip
    }
    return decode | prefill


def speedups(rows: list[Row], run: Run) -> str:
    median = {row.task.name: row.ms[1] for row in rows if row.way == OURS and row.ms}
    lines = []
    for op, goal in SPEEDUP_GOALS.items():
        for dim in run.shapes.head_dims:
            dense = median.get(attention_name(op, Pattern("dense"), dim))
            banded = median.get(attention_name(op, Pattern("banded", run.shapes.band), dim))
            if dense and banded:
                lines.append([f"{op}, D {dim}", f"{dense / banded:.2f} x", run.label or goal.verdict(dense / banded)])
    return table("banded next to dense | faster | goal", lines)


def serve(model: str, setting: Setting) -> Section:
    """Measure a random model over HTTP (a trained one takes as long), and the CPU time of its decode steps."""
    run, device, config = setting.run, setting.device, setting.run.models[model]
    print(f"serving {model}", file=sys.stderr, flush=True)
    path = setting.scratch / model
    save_random_model(path, config)
    lines = []
    with running(banded(path, "--dtype", "bfloat16", "--device", device.type), timeout=START_SECONDS) as server:
        measure(server.url, model, Workload(1, 1, run.tokens, run.tokens))
        for streams in run.streams:
            asked = Workload(streams, max(3, 2 * streams), run.tokens, run.tokens, GREEDY)
            result = measure(server.url, model, asked, seed=streams)
            lines.append([str(streams), *served_line(asked, result, config, setting)])
    cpu_ms = step_cpu_ms(load_model(path, torch.bfloat16, device), run)
    release(device)
    header = "streams | tokens/s | TTFT p50 ms | ms a token | of the weight roofline | goal"
    met = f"{'met' if cpu_ms <= STEP_CPU_MS else 'missed'} (at most {STEP_CPU_MS} ms)"
    cpu = f"CPU time of a decode step of {run.rows} sequences, median: {cpu_ms:.3f} ms, {run.label or met}"
    title = f"## {model} with random weights in bf16, {run.tokens} + {run.tokens} tokens, greedy, streaming over HTTP"
    return Section(f"{title}\n\n{table(header, lines)}\n\n{cpu}", [])


def served_line(asked: Workload, result: Result, config: GPTConfig, setting: Setting) -> list[str]:
    label = setting.run.label
    seconds = sum(result.gaps) / (asked.requests * (asked.output - 1))  # per token after the first
    first = percentile_ms(result.first_token)
    figures = [f"{result.tokens_per_second:.1f}", f"{first:.1f}", f"{1e3 * seconds:.2f}"]
    if asked.streams > 1:
        return [*figures, "", label]
    weights = weights_read(config)
    share = 100 * weights * torch.bfloat16.itemsize / seconds / (1e12 * setting.limits.bandwidth)
    return [*figures, f"{share:.3g} %", label or (ROOFLINE_GOAL.verdict(share) if weights >= ROOFLINE_PARAMETERS else "")]


def percentile_ms(seconds: list[float]) -> float:
    return 1e3 * percentile(sorted(seconds), 0.5)


def weights_read(config: GPTConfig) -> int:
    """Parameters that a decode step reads: all but the position embeddings. The tied head reads all of wte."""
    with torch.device("meta"):
        model = GPT(config)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name != "wpe.weight")


def save_random_model(path: Path, config: GPTConfig) -> None:
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    model.init_weights(0)
    save_model(path, model, torch.bfloat16)


def step_cpu_ms(model: GPT, run: Run) -> float:
    """Median time to schedule, launch and commit a decode step, without the wait for the device.

    On a CPU, `launch` also computes.
    """
    device, config, prompt = model.wte.weight.device, model.config, 16
    step_tokens = run.rows * prompt
    sizes = pool_sizes(config, kv_bytes=4 << 30, item_bytes=2, max_rows=run.rows, step_tokens=step_tokens)
    runner = Runner(model, choose(device, "auto"), run.rows, sizes)
    if device.type == "cuda":
        runner.capture()
    scheduler = Scheduler(PageAllocator(config, sizes, step_tokens=step_tokens), max_rows=run.rows, step_tokens=step_tokens)
    for _ in range(run.rows):
        scheduler.submit([Sequence([0] * prompt, run.tokens, Sampling(temperature=0.0))])
    times = []
    start = time.perf_counter()
    while step := scheduler.schedule(0.0):
        pending = runner.launch(step)
        launched = time.perf_counter()
        sampled = pending.result()
        ready = time.perf_counter()
        scheduler.commit(sampled, ready - start)
        if not step.chunks:
            times.append(launched - start + time.perf_counter() - ready)
        start = time.perf_counter()
    return percentile_ms(times)


def table(header: str, rows: list[list[str]]) -> str:
    columns = header.split(" | ")
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def release(device: torch.device) -> None:
    """Free unused memory: a server takes all that is left on a GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def attempt(name: str, section: Callable[[Setting], Section], setting: Setting) -> Section:
    """Run a section. If it raises, that counts as a failure, and the other sections still run."""
    try:
        return section(setting)
    except Exception as problem:
        text = "".join(traceback.format_exception(problem))
        return Section(f"## {name}\n\n```\n{text}```", [f"{name}: {first_line(problem)}"])


def check(run: Run, device: torch.device, directory: Path) -> int:
    """Run everything, write the report into `directory` and print it. Returns the exit status."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(run, device, name, Limits(*kernels.measured_limits(run.shapes, device)), Path(scratch))
        release(device)
        sections = [describe(setting), attempt("Tests", run_tests, setting), attempt("Kernels", time_kernels, setting)]
        sections += [attempt(model, partial(serve, model), setting) for model in run.models]
    failures = [failure for section in sections for failure in section.failures]
    summary = "\n".join(["## Failed", "", *(f"- {failure}" for failure in failures)]) if failures else "Nothing failed."
    report = "\n\n".join([sections[0].text, summary, *(section.text for section in sections[1:])]) + "\n"
    directory.mkdir(exist_ok=True)
    path = directory / f"gpu-check-{re.sub(r'[^a-z0-9]+', '-', name.lower())}.md"
    path.write_text(report)
    print(report)
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="at toy size on a CPU")
    dry = parser.parse_args(argv).dry
    if not dry and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    os.environ["TRITON_INTERPRET"] = str(int(dry))  # read when a kernel's file is imported: none is yet
    if not dry:
        return check(REAL, torch.device("cuda"), RESULTS)
    with tempfile.TemporaryDirectory() as directory:
        return check(DRY, torch.device("cpu"), Path(directory))


if __name__ == "__main__":
    sys.exit(main())
