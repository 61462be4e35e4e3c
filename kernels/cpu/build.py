"""Compiles csrc/ on the machine that will run it, and caches the library.

That takes a C++ compiler, and seconds for each head size, dtype and machine.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.cpu.abi import layout

log = logging.getLogger("banded.kernels")

SOURCES = Path(__file__).with_name("csrc")
# A product and a sum become one instruction. NaN and infinity stay as the standard has them.
FLAGS = (
    "-std=c++17 -O3 -march=native -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math -fwrapv -shared -fPIC "
    "-w -Wno-psabi"
)
COMPILERS = ("c++", "g++", "clang++")
BUILD_TIMEOUT = 300.0  # seconds

ELEMENTS = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Shape(NamedTuple):
    """What the code is compiled for: the head size, and the dtype of activations, keys and values."""

    head_dim: int
    dtype: torch.dtype


def compiled_library(shape: Shape) -> ctypes.CDLL | None:
    """The compiled code, built first if the cache lacks it; None, and a line in the log, if that fails."""
    library = cache_directory() / f"cpu-{key(shape)}.so"
    if not library.exists():
        log.info("compiling the CPU kernels for this machine and size of heads: once, it takes seconds")
        if problem := build(shape, library):
            log.warning("the CPU kernels are not compiled, so that steps take several times as long: %s", problem)
            return None
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:  # a broken file, or a directory from which no code may be run
        log.warning("the compiled CPU kernels can't be loaded, so that steps take several times as long: %s", error)
        return None


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "banded"


def key(shape: Shape) -> str:
    """A hash of everything that the machine code depends on."""
    sources = (f"{path.name}\0{path.read_text(encoding='utf-8')}" for path in sorted(SOURCES.iterdir()))
    facts = (*sources, layout(), FLAGS, os.environ.get("CXX", ""), *map(str, shape), processor())
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def processor() -> str:
    """The features of this processor, which say what instructions the compiler may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def compiler() -> list[str]:
    """The command in CXX, or the first installed one of COMPILERS. Raises FileNotFoundError."""
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise FileNotFoundError(f"no C++ compiler: none of {', '.join(COMPILERS)} is installed, and CXX names none")


def build(shape: Shape, library: Path) -> str | None:
    """Compile. Returns what went wrong, or None."""
    defines = (f"-DELEMENT={ELEMENTS[shape.dtype]}", f"-DHEAD_DIM={shape.head_dim}")
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch) / "built.so"
            finished = subprocess.run(
                [*compiler(), *FLAGS.split(), *defines, "-iquote", str(SOURCES), "-xc++", "-", "-o", str(built)],
                input=f'#include "kernels.cpp"\n{layout()}',
                capture_output=True,
                text=True,
                timeout=BUILD_TIMEOUT,
                check=False,
            )
            if finished.returncode:
                lines = finished.stderr.strip().splitlines() or [f"the compiler ended with {finished.returncode}"]
                return next((line for line in lines if "error: " in line), lines[-1])
            built.replace(library)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None
