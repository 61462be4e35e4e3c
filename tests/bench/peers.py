"""Other servers, if they are installed: how each is started on a checkpoint, and how one server runs at a time.

Nothing here installs them. llama.cpp is a `llama-server` and the folder of its convert_hf_to_gguf.py. vLLM is the Python of
an environment that has it. See `python -m tests.bench.run --help`.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

from service.tools.bench import Program, RunningServer, Workload, measure, running, served_model

START_SECONDS = 600.0  # vLLM compiles when it starts

# For another environment's Python: it must not import our folders in place of packages with the same names.
ALONE = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1"}


class Side(NamedTuple):
    """One side of a comparison: a server on a checkpoint in a dtype."""

    name: str
    dtype: str
    program: Program


class Peers(NamedTuple):
    """The peers that are installed. Converted checkpoints go to `work` and are found there again."""

    llama_server: Path | None
    llama_convert: Path | None
    vllm_python: Path | None
    work: Path

    def llama(self, model: Path, outtype: Literal["bf16", "q8_0"], streams: int, context: int) -> list[Side]:
        """llama.cpp with a slot of `context` tokens for each stream. Empty if it is not installed."""
        if not self.llama_server:
            return []
        cores = str(len(os.sched_getaffinity(0)))
        options = {"-m": str(self.gguf(model, outtype)), "-t": cores, "-np": str(streams), "-c": str(streams * context)}
        command = (str(self.llama_server), *chain(*options.items()))
        return [Side(f"llama.cpp {outtype}", outtype, Program(command, "/health"))]

    def gguf(self, model: Path, outtype: str) -> Path:
        """Convert a checkpoint with llama.cpp's own script. The result is named after the model's folder."""
        target = self.work / f"{model.name}-{outtype}.gguf"
        if not target.exists():
            if not self.llama_convert:
                raise ValueError(f"{target.name} has to be made: say where convert_hf_to_gguf.py is, --llama-convert DIR")
            script, unfinished = self.llama_convert / "convert_hf_to_gguf.py", target.with_suffix(".tmp")
            command = [sys.executable, str(script), str(model), "--outfile", str(unfinished), "--outtype", outtype]
            library = {"PYTHONPATH": str(self.llama_convert / "gguf-py")}
            done = subprocess.run(command, env=os.environ | library, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ValueError(f"{script} failed: {done.stderr[-500:]}")
            unfinished.rename(target)
        return target

    def vllm(self, model: Path, context: int) -> list[Side]:
        """vLLM in bf16. Empty if it is not installed."""
        if not self.vllm_python:
            return []
        options = {"--model": str(model), "--dtype": "bfloat16", "--max-model-len": str(context)}
        command = (str(self.vllm_python), "-m", "vllm.entrypoints.openai.api_server", *chain(*options.items()))
        environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", **ALONE}
        return [Side("vLLM bf16", "bfloat16", Program(command, "/health", tuple(environment.items())))]

    def versions(self) -> dict[str, str]:
        found = {}
        if self.llama_server:
            done = subprocess.run([self.llama_server, "--version"], capture_output=True, text=True, check=True)
            found["llama.cpp"] = next(line for line in (done.stdout + done.stderr).splitlines() if "version" in line)
        if self.vllm_python:
            ask = "from importlib.metadata import version; print(version('vllm'))"
            done = subprocess.run(
                [self.vllm_python, "-c", ask], env=os.environ | ALONE, capture_output=True, text=True, check=True
            )
            found["vLLM"] = done.stdout.strip()
        return found


class Servers:
    """Starts each program when it is first needed. Halts all but the measured one, because they share the cores."""

    def __init__(self) -> None:
        self.kept: dict[Program, tuple[RunningServer, ExitStack]] = {}

    def __enter__(self) -> "Servers":
        return self

    def __exit__(self, *error: object) -> None:
        for program in list(self.kept):
            self.end(program)

    @contextmanager
    def only(self, program: Program) -> Iterator[tuple[str, str]]:
        """The URL and the model of a server that runs alone and has just answered a request."""
        if program not in self.kept:
            with ExitStack() as started:
                server = started.enter_context(running(program, timeout=START_SECONDS))
                self.kept[program] = server, started.pop_all()
        server, _ = self.kept[program]
        os.killpg(server.process.pid, signal.SIGCONT)
        try:
            model = served_model(server.url)
            measure(server.url, model, Workload(1, 1, 16, 8), seed="warm-up")
            yield server.url, model
        finally:
            pid = server.process.pid
            os.killpg(pid, signal.SIGSTOP)
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # it runs until the kernel gets to it

    def end(self, program: Program) -> None:
        server, ending = self.kept.pop(program)
        os.killpg(server.process.pid, signal.SIGCONT)  # a stopped process would not react to the signal to end
        ending.close()
