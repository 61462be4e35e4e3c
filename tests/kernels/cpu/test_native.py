"""The C++ by itself: no warnings, and self-tests by several compilers, under sanitizers and emulated on aarch64.

The compilers also check the layout of what it shares with Python.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from kernels.cpu import build
from kernels.cpu.abi import layout
from tests.demand import demand

HERE = Path(__file__).parent
FLAGS = [flag for flag in build.FLAGS.split() if flag not in ("-w", "-shared", "-march=native", "-O3")]
STRICT = ["-Wall", "-Wextra", "-Werror", f"-I{build.SOURCES}"]
AARCH64 = "aarch64-linux-gnu-g++"


class Target(NamedTuple):
    """A compiler, its flags, and what runs the programs."""

    compiler: str
    flags: str
    runner: tuple[str, ...] = ()


SERVED = Target("g++", "-O3 -march=native")
GCC, GCC_AMX = Target("g++", "-O1 -march=native"), Target("g++", "-O1 -march=sapphirerapids")
AVX2, PORTABLE = Target("g++", "-O1 -march=x86-64-v3"), Target("g++", "-O1")
CLANG, CLANG_AMX = Target("clang++-14", "-O1 -march=native"), Target("clang++-14", "-O1 -march=sapphirerapids")
SANITIZED = Target("g++", "-O0 -g -march=native -fsanitize=address,undefined -fno-sanitize-recover=all")
RACES = Target("g++", "-O1 -g -march=native -fsanitize=thread")
ARM = Target(AARCH64, "-O1", ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"))


def compiled(target: Target, *arguments: str) -> None:
    demand(target.compiler)
    if "sapphirerapids" in target.flags and os.uname().machine != "x86_64":
        pytest.skip("these instructions are x86's")
    command = [target.compiler, *FLAGS, *target.flags.split(), *STRICT, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def passes(target: Target, source: str, directory: Path, *defines: str) -> None:
    if target.runner:
        demand(target.runner[0])
    program = directory / "selftest"
    compiled(target, *defines, str(HERE / source), "-o", str(program))
    # A sanitizer's look for leaks would need a right to trace, which containers deny.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run([*target.runner, program], capture_output=True, text=True, check=False, env=environment)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("target", "element"),
    [
        # Each dtype by each compiler, and those that products have instructions for with and without AMX.
        *((target, element) for target in (GCC_AMX, CLANG, ARM) for element in build.ELEMENTS.values()),
        (GCC, "bfloat16"),
        (CLANG_AMX, "bfloat16"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.compiler} {value.flags}",
)
def test_the_source_has_no_warnings(target: Target, element: str) -> None:
    # Warnings of uninitialized variables need the optimizer, which one target has to be enough for.
    goal = ("-c", "-o", os.devnull) if target is GCC_AMX else ("-fsyntax-only",)
    compiled(target, *goal, f"-DELEMENT={element}", "-DHEAD_DIM=64", str(build.SOURCES / "kernels.cpp"))


def with_layout(directory: Path) -> tuple[str, ...]:
    """Arguments that compile what a library is made of; a copy of the sources in `directory` comes first."""
    source = directory / "library.cpp"
    source.write_text(f'#include "kernels.cpp"\n{layout()}')
    return "-fsyntax-only", "-DELEMENT=bfloat16", "-DHEAD_DIM=64", str(source)


@pytest.mark.parametrize("target", [GCC, CLANG, ARM], ids=lambda t: t.compiler)
def test_python_and_cpp_agree_on_structures_and_constants(target: Target, tmp_path: Path) -> None:
    compiled(target, *with_layout(tmp_path))


@pytest.mark.parametrize(
    ("before", "after", "fact"),
    [
        ("float eps;", "double eps;", "sizeof(NormArgs::eps) == 4"),
        ("int64_t channels, columns;", "int64_t columns, channels;", "offsetof(ProductArgs, channels) == 40"),
        ("int64_t num_tiles;", "int64_t num_tiles, more;", "sizeof(PlanArgs) == 152"),
        ("OFFSET = 128;", "OFFSET = 127;", "OFFSET == 128"),
        ("RELU, GELU,", "GELU, RELU,", "RELU == 1"),
    ],
)
def test_the_compiler_says_where_they_differ(before: str, after: str, fact: str, tmp_path: Path) -> None:
    demand("g++")
    sources = shutil.copytree(build.SOURCES, tmp_path / "csrc")
    header = sources / "abi.h"
    header.write_text(header.read_text().replace(before, after))
    run = subprocess.run(["g++", *FLAGS, *with_layout(sources)], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert f"static_assert({fact})" in run.stderr


@pytest.mark.parametrize(
    "target",
    [SERVED, AVX2, PORTABLE, CLANG, SANITIZED, ARM],
    ids=["native", "AVX2", "portable", "clang", "sanitized", "aarch64"],
)
def test_simd(target: Target, tmp_path: Path) -> None:
    passes(target, "simd_selftest.cpp", tmp_path)


@pytest.mark.parametrize(
    ("target", "element"),
    [
        pytest.param(GCC, "bfloat16", id="native"),
        pytest.param(CLANG, "float16", id="clang"),
        pytest.param(SANITIZED, "bfloat16", id="sanitized"),
        pytest.param(RACES, "bfloat16", id="races"),
        # As it is served, with the optimizer, in the dtype that it is served in: that takes the compiler twice as long.
        pytest.param(ARM, "float", id="aarch64 float"),
        pytest.param(ARM, "float16", id="aarch64 float16"),
        pytest.param(ARM._replace(flags="-O2"), "bfloat16", id="aarch64 bfloat16"),
    ],
)
def test_attention_norms_products_and_sampling(target: Target, element: str, tmp_path: Path) -> None:
    defines = f"-DELEMENT={element}", "-DHEAD_DIM=40", "-DPORTABLE_PRODUCTS"
    passes(target, "kernels_selftest.cpp", tmp_path, *defines)


@pytest.mark.parametrize(
    "target", [SERVED, CLANG, SANITIZED, RACES, ARM], ids=["native", "clang", "sanitized", "races", "aarch64"]
)
def test_threads_that_share(target: Target, tmp_path: Path) -> None:
    passes(target, "team_selftest.cpp", tmp_path)


def test_a_self_test_says_what_differs(tmp_path: Path) -> None:
    demand("g++")
    sources = shutil.copytree(build.SOURCES, tmp_path / "csrc")
    simd = sources / "simd.h"
    simd.write_text(simd.read_text().replace("raw + 0x7fff", "raw + 0x8000"))
    program = tmp_path / "selftest"
    subprocess.run(["g++", *FLAGS, f"-I{sources}", HERE / "simd_selftest.cpp", "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stdout.startswith("bfloat16 of ")
