"""Compiled CPU kernels: decode attention's values and bits; the cache; libraries that can't be made or loaded."""

import ctypes
import logging
import shutil
from pathlib import Path

import pytest
import torch

from kernels import reference
from kernels.cpu import abi
from kernels.cpu import build as cpu_build
from kernels.cpu import compiled as cpu_compiled
from kernels.cpu.build import Shape
from kernels.cpu.compiled import CompiledOps, load
from kernels.patterns import Pattern
from kernels.plan import DecodePlan
from tests.kernels.cases import DENSE, TOLERANCE, alone, assert_close, decode, patterns
from tests.kernels.compiled import VARIANTS, compiled_ops
from tests.kernels.paged import DecodeCase, decode_case

NUM_HEADS, DIM = 3, 32


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def shape(request: pytest.FixtureRequest) -> Shape:
    return Shape(DIM, request.param)


@pytest.fixture(scope="module", params=[name for name in VARIANTS if "products" not in name])
def ops(shape: Shape, request: pytest.FixtureRequest) -> CompiledOps:
    return compiled_ops(*shape, request.param)


def case_of(shape: Shape, lengths: list[int], pattern: Pattern) -> DecodeCase:
    return decode_case(lengths, pattern, heads=NUM_HEADS, dim=DIM, dtype=shape.dtype)


@patterns
def test_it_equals_the_reference(ops: CompiledOps, shape: Shape, pattern: Pattern) -> None:
    # All that is not a live key is NaN.
    case = case_of(shape, [1, 63, 64, 65, 256, 257, 2048, 700, 320], pattern)
    assert_close(decode(ops, case), decode(reference, case))


@pytest.mark.parametrize("length", [1, 64, 65, 700])
def test_a_lone_sequence(ops: CompiledOps, shape: Shape, length: int) -> None:
    case = case_of(shape, [length], DENSE)
    out = decode(ops, case)
    assert out.shape == case.q.shape
    assert_close(out, decode(reference, case))


@patterns
def test_a_row_has_the_same_bits_in_any_batch(ops: CompiledOps, shape: Shape, pattern: Pattern) -> None:
    lengths = [64 * 20 + 7, 3, 900, 2048, 65, 64, 700]
    case = case_of(shape, lengths, pattern)
    together = decode(ops, case)
    for i in range(len(lengths)):
        assert torch.equal(decode(ops, alone(case, i))[0], together[i])
    plan = DecodePlan(case.plan.page_table[2:5], case.plan.lengths[2:5], pattern, case.plan.layout)
    assert torch.equal(decode(ops, DecodeCase(case.q[2:5], case.cache, plan)), together[2:5])


def test_scores_far_from_0_do_not_overflow(ops: CompiledOps, shape: Shape) -> None:
    case = case_of(shape, [300, 70], DENSE)
    tolerance = max(1e-3, TOLERANCE[shape.dtype])
    torch.testing.assert_close(decode(ops, case, 100.0), decode(reference, case, 100.0), atol=tolerance, rtol=tolerance)


def test_the_second_start_takes_what_the_first_has_compiled(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = []

    def build(shape: Shape, library: Path) -> None:
        library.parent.mkdir(parents=True, exist_ok=True)
        library.write_bytes(b"a library")
        built.append(shape)

    monkeypatch.setattr(cpu_build, "build", build)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: path)
    monkeypatch.setattr(cpu_compiled, "CompiledOps", lambda library: library)
    with caplog.at_level(logging.INFO):
        first = load(shape)
        second = load(shape)
    assert first == second
    assert len(built) == 1
    assert [record.message for record in caplog.records] == [
        "compiling the CPU kernels for this machine and size of heads: once, it takes seconds"
    ]
    load(shape._replace(head_dim=48))
    assert len(built) == 2, "another shape, another library"


def test_without_a_compiler_it_says_so_and_serves_op_by_op(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with caplog.at_level(logging.WARNING):
        assert load(Shape(16, torch.float32)) is None
    assert "the CPU kernels are not compiled, so that steps take several times as long: " in caplog.text
    assert "no-such-compiler" in caplog.text
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load(Shape(16, torch.float32)) is None
    assert "no C++ compiler: none of c++, g++, clang++ is installed, and CXX names none" in caplog.text
    assert not list(tmp_path.rglob("*.so"))


def test_what_the_compiler_says_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "sh -c 'echo this is too new for me >&2; exit 3'")
    assert load(Shape(16, torch.float32)) is None
    assert "this is too new for me" in caplog.text


def test_a_library_that_cannot_be_loaded_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape = Shape(16, torch.float32)
    library = tmp_path / "banded" / f"cpu-{cpu_build.key(shape)}.so"
    library.parent.mkdir()
    library.write_bytes(b"half a file")
    assert load(shape) is None
    assert "the compiled CPU kernels can't be loaded, so that steps take several times as long: " in caplog.text


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(occupied))
    assert load(Shape(16, torch.float32)) is None
    assert "Not a directory" in caplog.text


def test_every_source_file_changes_the_name_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(DIM, torch.float32)
    shutil.copytree(cpu_build.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(cpu_build, "SOURCES", tmp_path / "csrc")
    keys = {cpu_build.key(shape)}
    files = sorted(cpu_build.SOURCES.iterdir())
    for file in files:
        file.write_text(file.read_text() + "\n")
        keys.add(cpu_build.key(shape))
    assert len(keys) == 1 + len(files)


def test_no_library_is_made_whose_structures_differ_from_python_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor loaded: the structures are part of the name in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = cpu_build.key(Shape(16, torch.float32))
    layout = abi.layout().replace("static_assert(sizeof(PlanArgs) == 152)", "static_assert(sizeof(PlanArgs) == 144)")
    monkeypatch.setattr(cpu_build, "layout", lambda: layout)
    assert cpu_build.key(Shape(16, torch.float32)) != before
    assert load(Shape(16, torch.float32)) is None
    assert "static assertion failed" in caplog.text
