"""`make clients`: programs that people use with such servers, each in an environment of its own, against a real server.

    python -m tests.programs.run                       all of them
    python -m tests.programs.run --only nginx curl     those whose name begins with one of the words
    python -m tests.programs.run --tree DIR            the server of another checkout

Each program has a server of its own, with the embedded model at default settings. What a program shows
replaces its entry in results.json, and the table in CONFORMANCE.md is written again. Environments stay in build/programs:
delete them for newer versions. Nothing but installing needs a network. The status is 1 where a check failed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from tests.programs.programs import PROGRAMS, Program
from tests.programs.results import Checks, Result, read, write, write_section
from tests.serving import banded_serve

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
BUILD = ROOT / "build/programs"
# Seconds. The largest environments have gigabytes.
TO_INSTALL = 1800
TO_RUN = 600
MODEL = "demo"
# Prints for how many seconds the server that would be imported keeps an idle connection.
KEPT_CODE = "from service.settings import Settings; print(getattr(Settings(), 'keep_alive', 5.0))"
# The scripts' own HTTP goes to this machine only, and no program reports home or looks for updates.
QUIET = {
    "ANONYMIZED_TELEMETRY": "false",
    "DO_NOT_TRACK": "1",
    "DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "NEXT_TELEMETRY_DISABLED": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    "OPENAI_API_KEY": "sk-none",
    "SCARF_NO_ANALYTICS": "true",
}
# Debian's installer refuses to run twice at once.
ONE_APT = threading.Lock()
ONE_WRITER = threading.Lock()


class NotInstalledError(Exception):
    """The program can't be had on this machine."""


def install(program: Program) -> tuple[Path, Path]:
    """The folder of a program's environment and the interpreter of its script. Raises NotInstalledError."""
    folder = BUILD / program.folder
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "installed"
    wanted = "\n".join(program.pip + program.npm)
    python = folder / "bin/python" if program.pip else Path(sys.executable)
    interpreter = python if program.script.endswith(".py") else Path(shutil.which("node") or "node")
    with ONE_APT:
        install_debian([pair.split("=")[1] for pair in program.debian if not shutil.which(pair.split("=")[0])])
    if stamp.exists() and stamp.read_text() == wanted:
        return folder, interpreter
    if program.pip:
        call(program, [sys.executable, "-m", "venv", "--clear", str(folder)])
        call(program, [str(python), "-m", "pip", "install", "--quiet", *program.pip])
    if program.npm:
        (folder / "package.json").write_text('{"private": true, "type": "module"}')
        call(program, ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", *program.npm])
    stamp.write_text(wanted)
    return folder, interpreter


def install_debian(packages: list[str]) -> None:
    if not packages:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise NotInstalledError(f"install Debian's {' '.join(packages)}")
    # Their services are not started: a script starts the program that it needs.
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for arguments in ("update -q", f"install -y -q --no-install-recommends {' '.join(packages)}"):
        done = subprocess.run(["apt-get", *arguments.split()], capture_output=True, text=True, env=quiet)
        if done.returncode:
            raise NotInstalledError(f"apt-get: {last_line(done.stderr)}")


def call(program: Program, command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=BUILD / program.folder, timeout=TO_INSTALL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalledError(str(error)) from None
    if done.returncode:
        raise NotInstalledError(last_line(done.stderr))


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")[:300]


def outcome_of(program: Program) -> Result:
    """Installs and runs a program."""
    if program.not_run:
        return Result("", {}, program.not_run)
    try:
        folder, interpreter = install(program)
    except NotInstalledError as error:
        return Result("", {}, str(error))
    home, log = folder / "home", folder / "log"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    script = SCRIPTS / program.script
    if program.npm:  # Node finds packages in the folders above a script
        script = Path(shutil.copytree(SCRIPTS, folder / "scripts", dirs_exist_ok=True)) / program.script
    with banded_serve(Path(MODEL), folder / "server.log") as server, log.open("w") as stderr:
        told, problem = run([str(interpreter), str(script)], environment_of(folder, server.url), home, stderr)
    version, checks = read_lines(told)
    if problem or not checks:
        checks["its script"] = f"{problem or 'no check'}: {last_line(log.read_text())}"
    return Result(version, checks)


def environment_of(folder: Path, url: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("BANDED_", "PYTHON"))}
    kept = subprocess.run([sys.executable, "-c", KEPT_CODE], capture_output=True, text=True, check=True).stdout.strip()
    return (
        inherited
        | QUIET
        | {
            "HOME": str(folder / "home"),
            "PATH": f"{folder / 'bin'}:{folder / 'node_modules/.bin'}:{os.environ['PATH']}",
            "BANDED_URL": url,
            "BANDED_MODEL": MODEL,
            "BANDED_DIRECTORY": str(Path.cwd() / "model/data" / MODEL),
            "BANDED_KEPT": kept,
        }
    )


def run(command: list[str], environment: dict[str, str], folder: Path, stderr: IO[str]) -> tuple[str, str]:
    """What a script printed, and what went wrong with it as a whole."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment, cwd=folder, start_new_session=True
    ) as process:
        try:
            stdout, _ = process.communicate(timeout=TO_RUN)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
            return process.communicate()[0], f"not done within {TO_RUN} s"
    return stdout, f"exit status {process.returncode}" if process.returncode else ""


def read_lines(told: str) -> tuple[str, Checks]:
    """The version and the checks that a script told of."""
    version, checks = "", Checks()
    for line in told.splitlines():
        if line.startswith('{"version"'):
            version = json.loads(line)["version"]
        elif line.startswith('{"check"'):
            found = json.loads(line)
            checks[found["check"]] = found["error"]
    return version, checks


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="programs by the start of their names")
    args.add_argument("--tree", type=Path, default=ROOT, help="the checkout whose server runs")
    args.add_argument("--jobs", type=int, default=2, help="programs at once; most of them wait most of the time")
    options = args.parse_args()
    os.chdir(options.tree)  # `python -c`, as the server is started, imports from there first
    chosen = [program for program in PROGRAMS if any(program.name.lower().startswith(word.lower()) for word in options.only)]

    def timed(program: Program) -> Result:
        started = time.monotonic()
        result = outcome_of(program)
        print(f"{program.name:24} {result.version:12} {time.monotonic() - started:5.0f} s  {result.outcome}", flush=True)
        with ONE_WRITER:  # after each, so that a run that is stopped has not been for nothing
            write(read() | {program.name: result})
            write_section()
        return result

    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(timed, chosen))
    return any(result.failed for result in results)


if __name__ == "__main__":
    sys.exit(main())
