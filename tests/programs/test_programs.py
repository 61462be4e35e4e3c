"""The table of programs in CONFORMANCE.md is that of the last run, and says what went wrong."""

import sys
from pathlib import Path

from tests.programs import run
from tests.programs.programs import PROGRAMS
from tests.programs.results import CONFORMANCE, MAX_ERROR, Result, read, section

SCRIPTS = Path(__file__).parent / "scripts"


def test_every_program_has_a_script_or_a_reason_and_a_result() -> None:
    assert all((SCRIPTS / program.script).is_file() != bool(program.not_run) for program in PROGRAMS)
    assert len({program.folder for program in PROGRAMS}) == len(PROGRAMS)
    assert list(read()) == [program.name for program in PROGRAMS], "run `make clients`"


def test_every_program_passed_when_it_was_run_last() -> None:
    assert {name: result.outcome for name, result in read().items() if result.failed} == {}


def test_the_table_is_in_the_file() -> None:
    assert CONFORMANCE.read_text("utf-8").endswith(section(read())), "run `make clients`"


def test_a_failure_and_a_program_that_did_not_run_show() -> None:
    table = section(
        {
            "one": Result("1.0", {"a completion": None, "a | b": "Error:\nwhat\n it was"}),
            "two": Result("", {}, "in no registry"),
            "three": Result("3", {"a stream": "x" * 1000}),
            "four": Result("4", {"a stream": None}),
        }
    )
    assert "| one | 1.0 | a completion; a \\| b | FAILED 1 of 2: a \\| b: Error: what it was |" in table
    assert "| two |  |  | not run: in no registry |" in table
    assert f": {'x' * MAX_ERROR}... |" in table
    assert "| four | 4 | a stream | passed |" in table


def test_a_script_tells_its_version_and_its_checks(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "from checks import check, tell\n"
        "tell(version='1.2')\n"
        "print('not a line of the table')\n"
        "@check('right')\n"
        "def _(): pass\n"
        "@check('wrong')\n"
        "async def _(): assert 1 == 2\n"
        "@check('refused')\n"
        "def _(): raise ValueError('no')\n"
        "sys.exit(3)\n"
    )
    environment = run.environment_of(tmp_path, "http://127.0.0.1:1")
    with (tmp_path / "log").open("w") as stderr:
        told, problem = run.run([sys.executable, str(script)], environment, tmp_path, stderr)
    version, checks = run.read_lines(told)
    assert (version, problem) == ("1.2", "exit status 3")
    wrong = checks.pop("wrong")
    assert wrong is not None
    assert wrong.startswith("AssertionError")
    assert "1 == 2" in wrong
    assert checks == {"right": None, "refused": "ValueError: no"}
