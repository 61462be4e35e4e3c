"""Which test shows which line of the HTTP contract: `make conformance` writes CONFORMANCE.md from it.

As a pytest plugin (`-p tests.conformance --conformance FILE`) it writes the table of what ran; the outcome of each line is
that of its worst test. The last section is the table of programs, which `make clients` ran (tests/programs).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

from tests.programs.results import read, section

F = TypeVar("F", bound=Callable[..., Any])

# Sections of the table, in order.
ROUTES = {
    "completions": "POST /v1/completions",
    "engines": "POST /v1/engines/{id}/completions",
    "chat": "POST /v1/chat/completions",
    "score": "POST /v1/score",
    "tokenize": "POST /tokenize",
    "detokenize": "POST /detokenize",
    "tokenizer_info": "GET /tokenizer_info",
    "models": "GET /v1/models",
    "fine_tuning": "/v1/files, /v1/fine_tuning/jobs",
    "health": "GET /health, /health/live, /health/ready, /ping, /version",
    "metrics": "GET /metrics",
    "connections": "Connections, paths and encodings",
    "errors": "Errors, headers, keys and limits",
    "clients": "Clients that nobody here wrote",
}


class Line(NamedTuple):
    route: str
    field: str
    behaviour: str


def contract(route: str, field: str, *behaviours: str) -> Callable[[F], F]:
    """Marks a test that shows how a field of a route, a key of ROUTES, behaves."""
    assert route in ROUTES, route
    assert behaviours, "what does the test show?"

    def mark(test: F) -> F:
        marked: F = pytest.mark.contract(route, field, behaviours)(test)
        return marked

    return mark


def lines_of(item: pytest.Item) -> Iterator[Line]:
    for mark in item.iter_markers("contract"):
        route, field, behaviours = mark.args
        for behaviour in behaviours:
            yield Line(route, field, behaviour)


class Table:
    """Collects how the tests of each line ended."""

    def __init__(self, path: Path):
        self._path = path
        self._lines: dict[str, list[Line]] = {}
        self._outcomes: dict[Line, list[str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self._lines = {item.nodeid: list(lines_of(item)) for item in items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            for line in self._lines.get(report.nodeid, []):
                self._outcomes.setdefault(line, []).append(report.outcome)

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(table(self._outcomes))


class Collected:
    """The lines of a collection, as if all of it passed."""

    def __init__(self) -> None:
        self.outcomes: dict[Line, list[str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for line in lines_of(item):
                self.outcomes.setdefault(line, []).append("passed")


def table(outcomes: dict[Line, list[str]]) -> str:
    """The table in Markdown."""
    parts = [
        "# Conformance",
        "",
        "What the tests show of the HTTP contract, field by field. Written by `make conformance`; do not edit.",
    ]
    for route, title in ROUTES.items():
        rows = sorted(line for line in outcomes if line.route == route)
        if not rows:
            continue
        parts += ["", f"## {title}", "", "| field | behaviour | tests | outcome |", "|---|---|---|---|"]
        for line in rows:
            found = outcomes[line]
            outcome = "passed" if set(found) == {"passed"} else "FAILED"
            behaviour = line.behaviour.replace("|", "\\|")
            parts.append(f"| {line.field} | {behaviour} | {len(found)} | {outcome} |")
    return "\n".join([*parts, "", section(read())])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance", type=Path, help="write the table of the contract to this file")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--conformance"):
        config.pluginmanager.register(Table(path))
