"""CONFORMANCE.md is what `make conformance` would write now, and names every field of every request."""

import subprocess
import sys
from pathlib import Path

import pytest

from service.api.schema.base import Body
from service.api.schema.chat import ChatRequest
from service.api.schema.completions import CompletionRequest
from service.api.schema.score import ScoreRequest
from service.api.schema.tokenization import DetokenizeRequest, TokenizeRequest
from tests.conformance import ROUTES, Collected, Line, lines_of, table
from tests.conftest import DESELECTED

FILE = Path(__file__).parent.parent / "CONFORMANCE.md"


def files_of_the_contract() -> set[Path]:
    return {file for file in Path(__file__).parent.rglob("test_*.py") if "@contract(" in file.read_text("utf-8")}


def has_all_of_the_contract(session: pytest.Session) -> bool:
    """Whether the session has every test that shows a line: no file is missing, and of no file a test was left out."""
    return (
        files_of_the_contract() <= {item.path for item in session.items}
        and not any("::" in argument for argument in session.config.args)
        and not any(line for item in session.config.stash[DESELECTED] for line in lines_of(item))
    )


def test_the_table_is_up_to_date(request: pytest.FixtureRequest) -> None:
    """All of it passed when it was written, and the lines and tests are those of today."""
    if has_all_of_the_contract(request.session):
        found = Collected()
        found.pytest_collection_modifyitems(request.session.items)
        assert table(found.outcomes) == FILE.read_text(), "run `make conformance`"
        return
    # Importing the files that show nothing of the contract would take most of the time.
    files = map(str, files_of_the_contract())
    code = (
        "import sys, pytest; from tests.conformance import Collected, table; found = Collected();"
        "status = pytest.main(['--collect-only', '-qq', '-m', 'contract', *sorted(sys.argv[1:])], plugins=[found]);"
        "sys.stderr.write(table(found.outcomes)); sys.exit(status)"
    )
    made = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, cwd=FILE.parent)
    assert made.returncode == 0, made.stdout
    assert made.stderr.endswith(FILE.read_text()), "run `make conformance`"


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("completions", CompletionRequest),
        ("chat", ChatRequest),
        ("score", ScoreRequest),
        ("tokenize", TokenizeRequest),
        ("detokenize", DetokenizeRequest),
    ],
)
def test_every_field_has_a_line(route: str, body: type[Body]) -> None:
    section = FILE.read_text().split(f"## {ROUTES[route]}\n")[1].split("\n## ")[0]
    fields = {row.split("|")[1].strip() for row in section.splitlines() if row.startswith("|")}
    named = {name for field in fields for name in field.split(", ")}
    assert body.model_fields.keys() <= named


def test_a_failure_shows() -> None:
    line = Line("score", "results", "a | b")
    assert "| results | a \\| b | 2 | FAILED |" in table({line: ["passed", "failed"]})
