"""A real `banded serve` in a process of its own, for tests that go over HTTP."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

# Seconds after which something that a test waits for is taken to hang, however busy the machine is.
PATIENCE = 240.0

# A fine-tuning job's process at the priority of its server: on a busy machine the lowest one hardly ever gets a core.
JOB_CODE = (
    "import os, sys; from unittest.mock import Mock; from service.jobs import runner;"
    "os.nice = runner.Path = Mock(); runner.give_way(); from service.cli import main; sys.exit(main())"
)
JOB_COMMAND = (sys.executable, "-c", JOB_CODE, "finetune")
SERVER_CODE = (
    f"from service.cli import main; from service.jobs import runner; runner.COMMAND = {JOB_COMMAND!r};"
    "raise SystemExit(main())"
)
COMMAND = (sys.executable, "-c", SERVER_CODE, "serve")


class Served(NamedTuple):
    """A server that is ready. The model is named after the checkpoint's folder."""

    process: subprocess.Popen[bytes]
    url: str
    checkpoint: Path

    def ended(self) -> int:
        return self.process.wait(timeout=PATIENCE)


@contextmanager
def banded_serve(
    checkpoint: Path, log: Path, *options: str, command: Sequence[str] = COMMAND, **environment: str
) -> Iterator[Served]:
    """Serves a checkpoint in float32 on a free port; killed at the end. `environment` are further variables."""
    command = [*command, "--model", str(checkpoint), "--port", "0", "--dtype", "float32", *options]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BANDED_")}
    deadline = time.monotonic() + PATIENCE
    with (
        log.open("wb") as stderr,
        subprocess.Popen(command, stderr=stderr, env=inherited | environment) as process,
    ):

        def wait() -> None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

        try:
            while not (found := re.search(r"running on (http://\S+)", log.read_text())):
                wait()
            while not is_ready(found[1]):
                wait()
            yield Served(process, found[1], checkpoint)
        finally:
            process.kill()


def is_ready(url: str) -> bool:
    """Whether a server is. One that ends while it is asked is not."""
    try:
        return httpx.get(f"{url}/health/ready", timeout=PATIENCE).status_code == 200
    except httpx.TransportError:
        return False
