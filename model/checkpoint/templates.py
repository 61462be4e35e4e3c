"""Chat templates of checkpoints, compiled and rendered in a process of their own with limits of time and memory."""

import atexit
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2

from model.checkpoint.render import LENGTH_BYTES, write_message

log = logging.getLogger("banded.checkpoint")

# What the process may use for a template: seconds of a core, seconds in all if others have the cores, and bytes of memory.
SECONDS, PATIENCE = 2, 3
BYTES = 256 << 20
START_SECONDS = 30  # that it may take to start


class TemplateProcessError(Exception):
    """The process does not start, which is no template's fault."""


class TemplateProcess:
    """Renders one template at a time. It starts when it is first asked, and again after a template had to be stopped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, template: str, variables: dict[str, Any] | None, max_chars: int | None = None) -> str:
        """The text of a template, or nothing if there are no `variables`: then it is compiled only.

        Raises jinja2.TemplateError with what the template raises, or the limit that it exceeds: more than `max_chars`
        characters are an error too. Raises TemplateProcessError if the process does not start.
        """
        request = {"template": template, "variables": variables, "max_chars": max_chars}
        with self._lock:
            answer = self._ask(json.dumps(request).encode())
        if "text" in answer:
            return str(answer["text"])
        place = f"line {answer['line']}: " if answer.get("line") else ""
        raise jinja2.TemplateError(place + answer["error"])

    def close(self) -> None:
        """End the process. The next request starts a new one."""
        process, self._process = self._process, None
        if process:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # what it has not read is lost
                    pipe.close()  # type: ignore[union-attr]

    def _ask(self, request: bytes) -> dict[str, Any]:
        if self._process and self._process.poll() is not None:
            self.close()
        try:
            process = self._process or self._start()
            with suppress(BrokenPipeError):  # it ended while it read, and why is seen below
                write_message(process.stdin, request)  # type: ignore[arg-type]
            return self._receive(PATIENCE)
        except TimeoutError:
            self.close()
            return {"error": f"it takes more than {PATIENCE} s"}
        except EOFError:
            status = process.wait()
            self.close()
            is_late = status == -signal.SIGPROF
            return {"error": f"it takes more than {SECONDS} s" if is_late else f"its process ended with status {status}"}
        except BaseException:
            self.close()  # or its answer would be taken for that to the next request
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            self._process = start()
            self._receive(START_SECONDS)
            return self._process
        except (OSError, EOFError) as error:
            log.error("the process for chat templates does not start: %r", error)
            raise TemplateProcessError("the process for chat templates does not start") from error

    def _receive(self, seconds: float) -> dict[str, Any]:
        """Its next message. Raises TimeoutError after `seconds`, EOFError if it has ended."""
        deadline = time.monotonic() + seconds
        length = int.from_bytes(self._read(LENGTH_BYTES, deadline))
        message: dict[str, Any] = json.loads(self._read(length, deadline))
        return message

    def _read(self, count: int, deadline: float) -> bytes:
        """The next `count` bytes of it."""
        data, pipe = bytearray(), self._process.stdout.fileno()  # type: ignore[union-attr]
        waiting = select.poll()
        waiting.register(pipe, select.POLLIN)
        while len(data) < count:
            if not waiting.poll(max(deadline - time.monotonic(), 0) * 1000):
                raise TimeoutError
            found = os.read(pipe, count - len(data))
            if not found:
                raise EOFError
            data += found
        return bytes(data)


def start() -> subprocess.Popen[bytes]:
    """The process. It gets no secrets from the environment, and ends with this process's end of its standard input."""
    command = [sys.executable, "-I", str(Path(__file__).with_name("render.py")), str(SECONDS), str(BYTES)]
    environment = {name: os.environ[name] for name in ("TZ", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    pipe = subprocess.PIPE
    # In a group of its own: Ctrl-C lets the server drain, and chats that wait go on.
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment, cwd="/", process_group=0
    )


process = TemplateProcess()
atexit.register(process.close)
