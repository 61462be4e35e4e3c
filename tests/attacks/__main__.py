"""`python -m tests.attacks [--only NAME ...]`: the project's own adversary, a program after the other.

Each program runs in a process of its own and prints its table; one that misses a figure does not stop the others. The table
at the end has them all. Exits with 1 if a figure was missed or a program did not come to its end.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tests.attacks.table import LAST_LINE, run

# By the harm that they would do: what is lost for good, who reads what, who stops the server, who makes others wait.
PROGRAMS = (
    "stored_data",
    "full_disk",
    "tenants",
    "poison",
    "before_the_key",
    "model_directories",
    "event_loop",
    "fairness",
)


class Outcome(NamedTuple):
    """What a program counted; None if it did not come to its last line."""

    counts: tuple[int, int, int] | None  # cases, missed, skipped
    status: int
    minutes: float

    @property
    def is_kept(self) -> bool:
        return self.counts is not None and self.status == self.counts[1] == 0


def outcome_of(command: Iterable[str]) -> Outcome:
    """Run a program and show what it prints as it comes."""
    started, last = time.monotonic(), ""
    with subprocess.Popen([*command], stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdout
        try:
            for last in process.stdout:
                print(last, end="", flush=True)
        except BaseException:  # this one is told to end
            process.terminate()
            raise
    found = LAST_LINE.fullmatch(last.strip())
    counts = (int(found["cases"]), int(found["missed"]), int(found["skipped"])) if found else None
    return Outcome(counts, process.returncode, (time.monotonic() - started) / 60)


def report(names: Iterable[str], command_of: Callable[[str], Iterable[str]]) -> int:
    """Run programs one after the other and print what came of all. Returns the exit status."""
    found = {}
    for name in names:
        print(f"\n== {name}", flush=True)
        found[name] = outcome_of(command_of(name))
    print(f"\n{'program':<20}{'cases':>8}{'missed':>8}{'skipped':>9}{'minutes':>9}")
    for name, (counts, status, minutes) in found.items():
        cells = f"{counts[0]:>8}{counts[1]:>8}{counts[2]:>9}" if counts else f"{f'ended with {status}':>25}"
        print(f"{name:<20}{cells}{minutes:>9.1f}")
    return int(not all(outcome.is_kept for outcome in found.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=PROGRAMS, metavar="NAME", help=", ".join(PROGRAMS))
    return report(parser.parse_args().only, lambda name: (sys.executable, "-u", "-m", f"tests.attacks.{name}"))


if __name__ == "__main__":
    run(main)
