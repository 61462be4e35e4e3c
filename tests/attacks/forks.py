"""`banded serve` in a process that is forked from one that has imported it, so that a hundred starts take minutes."""

import gc
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tests.serving import JOB_COMMAND, PATIENCE, is_ready

# A job's process that never gets anywhere, and ends with its server.
IDLE_JOB = ("sh", "-c", "while kill -0 $PPID; do sleep 1; done", "job")
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d ")


class Start(NamedTuple):
    """A server that is ready at `url`, or one that has ended with a status."""

    pid: int
    url: str
    status: int | None
    log: Path

    def said(self) -> list[str]:
        """What it has said besides its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if line and not LOG_LINE.match(line)]


def import_server() -> None:
    """Import what a server needs, without running anything: a fork inherits no thread."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # starts wait for each other more than they compute
    import service.api.app
    import service.engine.loading
    import service.jobs.runner
    import service.llm  # noqa: F401

    gc.freeze()


def fork(arguments: list[str], log: Path, job: tuple[str, ...]) -> int:
    """The process id of `banded ARGUMENTS`, with jobs that run the command `job`."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        from fastapi import FastAPI

        from service.cli import main
        from service.jobs import runner

        setattr(runner, "COMMAND", job)  # noqa: B010
        # The document takes two thirds of a start, and nobody reads it here.
        setattr(FastAPI, "openapi", lambda _: {"paths": {}, "components": {"schemas": {}}})  # noqa: B010
        status = main(arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # as the interpreter does it
        logging.exception("")
    finally:
        with suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


@contextmanager
def started(checkpoint: Path, data: Path, log: Path, job: tuple[str, ...] = JOB_COMMAND) -> Iterator[Start]:
    """A server over a data directory. It is killed at the end, unless it has ended."""
    arguments = ["serve", "--model", str(checkpoint), "--port", "0", "--dtype", "float32", "--data-dir", str(data)]
    log.write_bytes(b"")
    pid = fork(arguments, log, job)
    is_waited_for = False
    deadline = time.monotonic() + PATIENCE
    try:
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                is_waited_for = True
                yield Start(pid, "", os.waitstatus_to_exitcode(status), log)
                return
            found = re.search(r"running on (http://\S+)", log.read_text(errors="replace"))
            if found and is_ready(found[1]):
                yield Start(pid, found[1], None, log)
                return
            if time.monotonic() > deadline:
                yield Start(pid, "", -signal.SIGKILL, log)
                return
            time.sleep(0.05)
    finally:
        if not is_waited_for:
            with suppress(ProcessLookupError, ChildProcessError):  # who ended it may have waited for it
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def end(start: Start) -> int:
    """Have a server drain and end. Its status."""
    os.kill(start.pid, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(start.pid, 0)[1])
