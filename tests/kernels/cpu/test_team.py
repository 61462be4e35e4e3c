"""Threads that share: bits that do not depend on who does what, and helpers that get no core.

team_selftest.cpp has what needs no Python.
"""

import gc
import os
import random
import shlex
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels.cpu import build as cpu_build
from kernels.cpu import compiled
from kernels.cpu.compiled import CompiledOps
from tests.kernels.compiled import compiled_ops
from tests.kernels.paths import ServedPath
from tests.model.checkpoint.checkpoints import FIELDS, tiny
from tests.model.paged_run import PagedRun, random_steps


@pytest.fixture
def ops() -> CompiledOps:
    """Of a variant that every processor has."""
    return compiled_ops(FIELDS["banded"]["n_embd"] // 2, torch.bfloat16, "portable products")


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("quantize", [False, True])
def test_a_step_has_the_same_bits_on_any_number_of_threads(
    ops: CompiledOps, quantize: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny("banded", tmp_path, n_head=2)
    generator, path = torch.Generator().manual_seed(3), ServedPath(ops, torch.device("cpu"))
    sequences = [torch.randint(331, (length,), generator=generator) for length in (150, 1, 64, 65)]
    rng, choices, logits = random.Random(1), [1], []
    monkeypatch.setattr(torch, "get_num_threads", lambda: rng.choice(choices))
    for choices in ([1], [1, 2, 3, 4, 5]):  # noqa: B007 - the lambda reads it
        run = PagedRun(directory, sequences, torch.bfloat16, path, pack="int8" if quantize else "as it is")
        assert run.is_native
        random_steps(run, random.Random(4))
        logits.append(torch.cat(run.logits))
    assert not logits[0].isnan().any()
    assert torch.equal(*logits)


def test_threads_that_openmp_does_not_give_leave_their_part_to_the_others() -> None:
    script = """
import torch
from kernels import reference
from tests.kernels.compiled import compiled_ops
ops, x = compiled_ops(32, torch.float32), torch.randn(37, 96)
torch.set_num_threads(4)
normed, _ = ops.add_layernorm(x, None, None, None, 1e-5)
torch.testing.assert_close(normed, reference.add_layernorm(x, None, None, None, 1e-5)[0])
"""
    environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_what_a_late_helper_reads_is_kept() -> None:
    """Memory that is freed can't be read any more here, and helpers are late in a quarter of their pieces."""
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "1024",
        "CXX": f"{shlex.join(cpu_build.compiler())} -DLATE_HELPERS",
    }
    tests = "tests/model/test_native_forward.py::test_the_doctor_measures_the_native_forward"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, __file__, "-k", "doctor or same_bits"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_what_a_late_helper_reads_outlives_the_ops(ops: CompiledOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine is closed, and its weights are let go of, while a helper that was put aside still reads them."""
    engine, helpers = CompiledOps(ops._library), ops._helpers
    monkeypatch.setattr(helpers, "_oldest_job", lambda: 7)
    engine._library = SimpleNamespace(late=lambda *arguments: 7)  # type: ignore[assignment]
    weights = torch.zeros(3)
    read = weakref.ref(weights)
    engine.call("late", keep=weights)
    del engine, weights
    gc.collect()
    assert read() is not None
    monkeypatch.setattr(helpers, "_oldest_job", lambda: 8)
    ops.linear(torch.zeros(1, 32).bfloat16(), ops.pack(torch.zeros(32, 32).bfloat16(), quantize=False), None)
    assert read() is None


@contextmanager
def starved(core: int, threads: list[int]) -> Iterator[None]:
    """Give threads what one busy process leaves of a core: a millisecond in each third of a second."""
    # It ends with this process, which may crash.
    spin = f"import os; os.sched_setaffinity(0, [{core}]); print(flush=True)\nwhile os.getppid() == {os.getpid()}: pass"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as busy:
        assert busy.stdout
        busy.stdout.readline()
        try:
            for thread in threads:
                os.sched_setaffinity(thread, [core])
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
            yield
        finally:
            busy.kill()
            for thread in threads:
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
                os.sched_setaffinity(thread, os.sched_getaffinity(0))


def helpers() -> set[int]:
    tasks = Path("/proc/self/task").iterdir()
    return {int(task.name) for task in tasks if (task / "comm").read_text() == "banded-helper\n"}


needs_starving = pytest.mark.skipif(
    not hasattr(os, "SCHED_IDLE") or len(os.sched_getaffinity(0)) < 2, reason="takes Linux and two cores"
)


@needs_starving
def test_helpers_without_a_core_cost_a_piece_and_not_the_step(ops: CompiledOps) -> None:
    weight = ops.pack(torch.randn(1024, 2048).bfloat16(), quantize=False)
    x = torch.randn(64, 2048).bfloat16()
    others = helpers()

    def seconds(threads: int, calls: int) -> float:
        with num_threads(threads):
            times = []
            for _ in range(calls):
                started = time.perf_counter()
                assert torch.equal(ops.linear(x, weight, None), expected)
                times.append(time.perf_counter() - started)
        return sum(times)

    with num_threads(1):
        expected = ops.linear(x, weight, None)
    seconds(3, 3)  # hires the helpers
    alone = seconds(1, 20)
    core = max(os.sched_getaffinity(0))
    with starved(core, sorted(helpers() - others)):
        beside = seconds(3, 20)
        # Half of the caller's own core may be taken too; a helper comes back only after a third of a second.
        assert beside < 3 * alone + 0.3, "a call waits for helpers"
    deadline = time.monotonic() + 30
    while ops._helpers.kept and time.monotonic() < deadline:
        ops.linear(x[:1], weight, None)
        time.sleep(0.01)
    assert not ops._helpers.kept, "what a late helper reads is kept, and no longer than it may read it"


@needs_starving
def test_what_is_kept_for_late_helpers_is_bounded(ops: CompiledOps, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = ops.pack(torch.randn(1024, 2048).bfloat16(), quantize=False)
    x = torch.randn(64, 2048).bfloat16()
    others = helpers()
    most = 3 * (x.nbytes + 64 * 1024 * 2)
    monkeypatch.setattr(compiled, "MAX_KEPT", most)
    with num_threads(3):
        ops.linear(x, weight, None)  # hires the helpers
        kept = []
        with starved(max(os.sched_getaffinity(0)), sorted(helpers() - others)):
            for _ in range(20):
                ops.linear(x, weight, None)
                kept.append(sum(each.num_bytes for each in ops._helpers.kept.values()))
    assert 0 < max(kept) <= most
