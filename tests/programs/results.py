"""What the last run of each program showed, and the table of it in CONFORMANCE.md."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tests.programs.programs import PROGRAMS

FILE = Path(__file__).parent / "results.json"
CONFORMANCE = Path(__file__).parents[2] / "CONFORMANCE.md"
TITLE = "## Programs"
MAX_ERROR = 200  # characters of an error in the table

Checks = dict[str, str | None]  # what was shown, and the error where it failed


class Result(NamedTuple):
    """How a program did."""

    version: str
    checks: Checks
    not_run: str = ""  # why

    @property
    def failed(self) -> bool:
        return any(error is not None for error in self.checks.values())

    @property
    def outcome(self) -> str:
        if self.not_run:
            return f"not run: {self.not_run}"
        errors = [f"{check}: {shortened(error)}" for check, error in self.checks.items() if error is not None]
        return f"FAILED {len(errors)} of {len(self.checks)}: {'; '.join(errors)}" if errors else "passed"


def shortened(error: str) -> str:
    """An error on one line, cut in length."""
    line = " ".join(error.split())
    return line if len(line) <= MAX_ERROR else f"{line[:MAX_ERROR]}..."


def read() -> dict[str, Result]:
    return {name: Result(**found) for name, found in json.loads(FILE.read_text("utf-8")).items()}


def write(results: Mapping[str, Result]) -> None:
    """Writes the results of today's programs, in their order."""
    found = {program.name: results[program.name]._asdict() for program in PROGRAMS if program.name in results}
    FILE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def section(results: Mapping[str, Result]) -> str:
    """The table in Markdown, the last section of CONFORMANCE.md."""
    rows = ["| program | version | shown | outcome |", "|---|---|---|---|"]
    for name, result in results.items():
        cells = (name, result.version, "; ".join(result.checks), result.outcome)
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    about = (
        "Each program in an environment of its own, against a real `banded serve` with the embedded model. Written by\n"
        "`make clients`; do not edit."
    )
    return "\n".join([TITLE, "", about, "", *rows]) + "\n"


def write_section() -> None:
    """Replaces the table in CONFORMANCE.md."""
    rest = CONFORMANCE.read_text("utf-8").split(f"\n{TITLE}\n")[0]
    CONFORMANCE.write_text(f"{rest}\n{section(read())}", encoding="utf-8")
