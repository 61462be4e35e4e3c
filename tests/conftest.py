"""Settings of every run of the tests."""

import os
from collections import Counter

import pytest
from hypothesis import settings

# Triton decides when it is imported whether it interprets, as it must on CPU tensors. `make gpu-check` says 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Threads that wait leave the cores to others: to the tests' servers, or to a second worker.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Shared machines stall; a slow example is not a wrong one.
settings.register_profile("banded", deadline=None)
settings.register_profile("quick", parent=settings.get_profile("banded"), max_examples=25)  # see the Makefile
settings.register_profile("mutants", parent=settings.get_profile("quick"), derandomize=True)
settings.load_profile("banded")


# The tests that a run collected and left out, for tests/test_conformance.py.
DESELECTED = pytest.StashKey[list[pytest.Item]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[DESELECTED] = []


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        item.config.stash[DESELECTED].append(item)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the skipped tests by reason, so that a run says what it did not test."""
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")
