"""The programs that tests run: `make tools` installs them, and tests/demand.py says what happens without them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.demand import demand

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
TOOLS = dict(
    pair.split("=") for pair in re.findall(r"[\w.+-]+=[\w.+-]+", MAKEFILE[MAKEFILE.index("TOOLS :=") :].split("\n\n")[0])
)


def make_tools(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`make tools` where only the programs in `path` are found; without what an outer make may have set."""
    make = shutil.which("make")
    assert make
    command = [make, "-C", str(ROOT), "--no-print-directory", "tools"]
    return subprocess.run(command, env={"PATH": str(path)} | environment, capture_output=True, text=True, timeout=60)


def stub(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_make_is_silent_where_every_tool_is_installed(tmp_path: Path) -> None:
    assert {"prometheus", "promtool"} <= TOOLS.keys()
    for tool in TOOLS:
        stub(tmp_path, tool, "")
    found = make_tools(tmp_path)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_make_says_what_to_install_where_it_may_not_and_fails_where_that_is_demanded(tmp_path: Path) -> None:
    stub(tmp_path, "id", "echo 1000")
    missing = make_tools(tmp_path)
    assert missing.returncode == 0
    assert "install Debian's packages" in missing.stderr
    assert TOOLS["prometheus"] in missing.stderr
    assert make_tools(tmp_path, DEMAND_TOOLS="1").returncode != 0


def test_make_installs_what_is_missing_for_root_and_leaves_no_service(tmp_path: Path) -> None:
    stub(tmp_path, "id", "echo 0")
    for name in ("apt-get", "service", "update-rc.d"):
        stub(tmp_path, name, f'echo {name} "$@"')
    for tool in TOOLS.keys() - {"prometheus", "qemu-aarch64"}:
        stub(tmp_path, tool, "")
    done = make_tools(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "apt-get update -q",
        "apt-get install -y -q --no-install-recommends prometheus qemu-user",
        "service prometheus stop",
        "update-rc.d prometheus disable",
    ]
    for name in ("apt-get", "service", "update-rc.d"):
        stub(tmp_path, name, "exit 1")
        assert make_tools(tmp_path).returncode != 0
        stub(tmp_path, name, "exit 0")


def test_a_missing_tool_skips_its_test_and_fails_it_where_tools_are_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert demand("sh") == demand("no-such-tool", "sh") == shutil.which("sh")
    monkeypatch.setenv("DEMAND_TOOLS", "0")
    with pytest.raises(pytest.skip.Exception, match=r"^no-such-tool is not installed: compiles; `make tools` installs it$"):
        demand("no-such-tool", why="compiles")
    monkeypatch.setenv("DEMAND_TOOLS", "1")
    with pytest.raises(pytest.fail.Exception, match=r"DEMAND_TOOLS=1, but no-such-tool or another is not installed"):
        demand("no-such-tool", "another")


def test_ci_demands_the_tools() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "export DEMAND_TOOLS=1\n" in script[: script.index("make check")]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
