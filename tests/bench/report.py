"""The results of a benchmark: a table with targets and the samples that it comes from, both as CSV, and plots."""

import csv
import math
import os
import platform
import re
import statistics
import subprocess
from collections import defaultdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from service.tools.bench import Result, percentile

OURS = "Banded"


class Target(NamedTuple):
    """A figure must reach `must` and should reach `aim`. If `aim` is the smaller one, both are upper limits."""

    must: float
    aim: float
    unit: str = "x"  # x: the target is for the ratio to another side's figure; otherwise for the figure itself

    def verdict(self, value: float) -> str:
        """The verdict on the value as it is printed."""
        shown, sign = round(value, 2), 1 if self.aim >= self.must else -1
        if math.isnan(value):
            return "not measured"
        return "aim met" if sign * (shown - self.aim) >= 0 else "met" if sign * (shown - self.must) >= 0 else "MISSED"


class Line(NamedTuple):
    """A line of the table."""

    scenario: str
    figure: str  # what was measured, with its unit
    ours: float
    against: str = ""  # the side that ours is compared with
    theirs: float = math.nan
    target: Target | None = None
    ceiling: float = math.nan  # what `ours` would be if a step were only products, and keys and values read

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    @property
    def compared(self) -> float:
        """The number that the target is for."""
        return self.ratio if self.target is None or self.target.unit == "x" else self.ours

    def cells(self) -> list[str]:
        target, share = self.target, self.ours / self.ceiling
        unit = "" if target is None else target.unit if target.unit == "x" else f" {target.unit}"
        return [
            self.scenario,
            self.figure,
            shown(self.ours),
            f"{self.against} {shown(self.theirs)}" if self.against else "-",
            "-" if math.isnan(self.ratio) else f"{self.ratio:.2f}x",
            f"{target.must:g}{unit}" if target else "-",
            f"{target.aim:g}{unit}" if target else "-",
            target.verdict(self.compared) if target else "-",
            "-" if math.isnan(share) else f"{share:.0%}",
        ]


COLUMNS = {
    "scenario": 14,
    "figure": 52,
    "ours": 9,
    "against": 26,
    "ratio": 8,
    "must": 7,
    "aim": 7,
    "verdict": 13,
    "of ceiling": 10,
}


def shown(value: float) -> str:
    """Three significant digits, and no exponent."""
    return "-" if math.isnan(value) else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def print_cells(cells: list[str]) -> None:
    print(" ".join(f"{cell:<{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True)).rstrip(), flush=True)


class Sample(NamedTuple):
    """One measurement. Times are in ms. Under a load, `value` is the figure that its scenario compares."""

    scenario: str
    round: int
    side: str
    dtype: str
    figure: str
    value: float
    at: float = math.nan  # its x in the plot
    streams: int | None = None
    requests: int | None = None
    prompt: int | None = None
    output: int | None = None
    sampling: str = ""
    guessed: float = math.nan  # percent of the output tokens
    tokens_per_second: float = math.nan
    ttft_p50: float = math.nan
    ttft_p99: float = math.nan
    gap_p50: float = math.nan
    gap_p99: float = math.nan

    def of(self, result: Result) -> "Sample":
        p50, p99 = ([1e3 * percentile(times, share) for times in (result.first_token, result.gaps)] for share in (0.5, 0.99))
        return self._replace(
            **result.load._asdict() | {"sampling": result.load.drawn},
            tokens_per_second=result.tokens_per_second,
            ttft_p50=p50[0],
            ttft_p99=p99[0],
            gap_p50=p50[1],
            gap_p99=p99[1],
        )


def environment(peers: dict[str, str]) -> dict[str, str]:
    """The revision, machine and versions that the figures come from."""
    describe = ["git", "describe", "--always", "--dirty"]
    revision = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        "revision": revision.stdout.strip(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": version("torch"),
        **peers,
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def machine_name(facts: dict[str, str]) -> str:
    """A file name for the machine, such as intel-xeon-processor-2-cores. AMD's names do not tell the instructions."""
    without = "" if "512" in facts["instructions"] else f" {facts['instructions']}"
    words = f"{facts['cpu']} {facts['cores']} cores{without}".lower().replace("(r)", "").replace("(tm)", "")
    return re.sub("[^a-z0-9]+", "-", words).strip("-")


def write(stem: Path, facts: dict[str, str], lines: list[Line], samples: list[Sample]) -> list[Path]:
    """Write STEM.csv (a row a line of the table), STEM-samples.csv (a row a measurement) and, for curves, STEM.png.

    Each scenario keeps its last run: new rows replace those of the same scenario and leave the others alone.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    table, raw, picture = stem.with_suffix(".csv"), stem.with_name(f"{stem.name}-samples.csv"), stem.with_suffix(".png")
    update_rows(table, [dict(zip(COLUMNS, line.cells(), strict=True)) | facts for line in lines])
    update_rows(raw, [rounded(sample) | facts for sample in samples])
    return [table, raw, *([picture] if plot(picture, facts, [sample_of(row) for row in read_rows(raw)]) else [])]


def rounded(sample: Sample) -> dict[str, str]:
    """A sample's cells, with four significant digits. Unmeasured cells are empty."""
    return {name: cell(value) for name, value in sample._asdict().items()}


def cell(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else str(float(f"{value:.4g}"))
    return "" if value is None else str(value)


def sample_of(row: dict[str, str]) -> Sample:
    """The part of a sample that a plot needs, read from its row."""
    value, at = (float(row[name] or "nan") for name in ("value", "at"))
    return Sample(row["scenario"], int(row["round"]), row["side"], row["dtype"], row["figure"], value, at)


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def update_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Replace the rows of the same scenarios in a file. Runs may differ in their columns, such as their peers' versions."""
    replaced = {row["scenario"] for row in rows}
    rows = [row for row in read_rows(path) if row["scenario"] not in replaced] + rows
    if rows:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), restval="")
            writer.writeheader()
            writer.writerows(rows)


class Curve(NamedTuple):
    """A plot of some samples' values."""

    scenarios: str  # the beginning of their names
    figure: str
    title: str
    x: str
    y: str


CURVES = [
    Curve("peaked", "tokens/s", "Output tokens/s, 128 + 128, temperature 1", "streams", "tokens/s"),
    Curve("top-p", "tokens/s", "Output tokens/s, 128 + 128, top-p 0.95", "streams", "tokens/s"),
    Curve("ttft", "TTFT ms", "Time to first token, 1 stream", "prompt tokens", "ms"),
    Curve("context", "step ms", "A decode step, by its layers", "keys of each sequence", "ms"),
]


def plot(path: Path, facts: dict[str, str], samples: list[Sample]) -> bool:
    """Draw one picture of all curves that have points, which are medians of the rounds. False if no curve has any."""
    found = [(curve, series(curve, samples)) for curve in CURVES]
    found = [(curve, lines) for curve, lines in found if lines]
    if not found:
        return False
    figure = Figure(figsize=(5.5 * len(found), 4.5), layout="constrained")
    figure.suptitle(f"{facts['cpu']}, {facts['cores']} cores, {facts['date']}, {facts['revision']}", fontsize="small")
    for axes, (curve, lines) in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        draw(axes, curve, lines)
    figure.savefig(path, dpi=120)
    return True


def series(curve: Curve, samples: list[Sample]) -> dict[str, dict[float, float]]:
    """For each side, y by x."""
    values: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        if sample.scenario.startswith(curve.scenarios) and sample.figure == curve.figure and not math.isnan(sample.at):
            values[sample.side][sample.at].append(sample.value)
    return {side: {at: statistics.median(found) for at, found in sorted(points.items())} for side, points in values.items()}


def draw(axes: Axes, curve: Curve, lines: dict[str, dict[float, float]]) -> None:
    for side, points in lines.items():
        axes.plot(list(points), list(points.values()), marker="o", linewidth=2 if side.startswith(OURS) else 1, label=side)
    axes.set(title=curve.title, xlabel=curve.x, ylabel=curve.y)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
