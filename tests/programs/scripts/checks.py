"""What the scripts share. They run in the environments of their programs, so this needs no package.

A script prints a line of JSON for the version of its program, and one for each check, when it ends:

    {"version": "1.2.3"}
    {"check": "a completion", "error": null}
"""

import asyncio
import inspect
import json
import os
import socket
import subprocess
import sys
import time
import traceback
import urllib.request
from contextlib import contextmanager

URL = os.environ["BANDED_URL"]
MODEL = os.environ["BANDED_MODEL"]
# The model's files.
DIRECTORY = os.environ["BANDED_DIRECTORY"]
# Seconds after which the server closes an idle connection.
KEEP_ALIVE = float(os.environ["BANDED_KEPT"])

PROMPT = "Once upon a time there was a"
# More than the model's context of 2048 tokens.
TOO_LONG = "and then " * 3000
# Line ends to Unicode, and to readers of lines that follow it, but not to server-sent events.
LINE_SEPARATORS = "one\u2028two\u2029three\x85four"
PATIENCE = 60.0


def tell(**line):
    print(json.dumps(line), flush=True)


def check(name):
    """Runs the function below it, which may be a coroutine, and tells how it ended."""

    def run(function):
        try:
            running = function()
            if inspect.iscoroutine(running):
                asyncio.run(running)
        except Exception as error:
            traceback.print_exc()
            message = str(error) or traceback.extract_tb(error.__traceback__)[-1].line  # the condition that did not hold
            tell(check=name, error=f"{type(error).__name__}: {message}")
        else:
            tell(check=name, error=None)

    return run


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def wait_for(condition, what, seconds=PATIENCE):
    """Returns what `condition` returns as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)
    return found


@contextmanager
def running(command, port, **environment):
    """A program that listens on a port of this machine; ended with the block. Its output goes to stderr."""
    with subprocess.Popen(command, stdout=sys.stderr, env=os.environ | environment) as process:

        def listens():
            assert process.poll() is None, f"{command[0]} ended with status {process.returncode}"
            with socket.socket() as asking:
                return asking.connect_ex(("127.0.0.1", port)) == 0

        try:
            wait_for(listens, f"{command[0]} listens")
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def metric(name, labels=""):
    """The sum of a metric of the server's, over its other labels."""
    with urllib.request.urlopen(f"{URL}/metrics", timeout=PATIENCE) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{") and labels in line)


@contextmanager
def refused(kind, *words):
    """The block must raise an exception of `kind` whose message or code has the words."""
    try:
        yield
    except kind as error:
        said = f"{error} {getattr(error, 'code', '')}"
        if missing := [word for word in words if word not in said]:
            raise AssertionError(f"no {missing} in {said}") from error
    else:
        raise AssertionError(f"no {kind.__name__}")
