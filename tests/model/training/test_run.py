"""Runs and their directories. A run killed at any moment resumes to the same bits, and two ranks are as good as one."""

import multiprocessing
import os
import random
import signal
import socket
import time
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from model.checkpoint.weights import load_model
from model.training.records import CURVE_FILE, LossRow, read_curve
from model.training.run import PICTURE_FILE, STATE_FILE
from tests.model.training import tiny_run
from tests.model.training.tiny_run import PLAN, run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "tales.txt"
    words = "the king had a daughter and she found a golden bird in the deep dark forest"
    path.write_text(" ".join(random.Random(0).choices(words.split(), k=800)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    assert status(start(directory, corpus)) == 0
    return directory


# Processes fork from one that has imported what a run imports, which takes longer than the run.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([tiny_run.__name__, "matplotlib.figure", "torch._dynamo"])


def start(directory: Path, corpus: Path, *options: str, **environment: str) -> ForkServerProcess:
    process = FORKS.Process(target=tiny_run.main, args=(directory, corpus, options, environment), daemon=True)
    process.start()
    return process


def interrupt(process: ForkServerProcess) -> None:
    assert process.pid
    os.kill(process.pid, signal.SIGINT)


def status(process: ForkServerProcess) -> int | None:
    """The exit status, once the process has ended."""
    process.join(60)
    return process.exitcode


def curve(directory: Path) -> list[LossRow]:
    return read_curve(directory / CURVE_FILE)


def assert_same(directory: Path, other: Path) -> None:
    first, second = load_file(directory / STATE_FILE), load_file(other / STATE_FILE)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert (directory / CURVE_FILE).read_bytes() == (other / CURVE_FILE).read_bytes()
    assert (directory / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_run_leaves_a_model_that_has_learnt_a_curve_and_a_picture(uninterrupted: Path) -> None:
    rows = curve(uninterrupted)
    assert rows[-1].seen >= PLAN.num_tokens
    assert [row.update for row in rows] == list(range(1, len(rows) + 1))
    assert rows[0].loss > 5
    assert rows[-1].loss < 2.5
    assert load_model(uninterrupted, torch.float32).config.n_embd == 16
    assert (uninterrupted / PICTURE_FILE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(
    uninterrupted: Path, corpus: Path, tmp_path: Path, seed: int
) -> None:
    rng, kills = random.Random(seed), 0
    for _ in range(3):
        process = start(tmp_path, corpus, "--resume")
        wait_for_updates(process, tmp_path, rng.randrange(1, 10))
        time.sleep(rng.random() * 0.2)
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills
    assert status(start(tmp_path, corpus, "--resume")) == 0
    assert_same(tmp_path, uninterrupted)


def wait_for_updates(process: ForkServerProcess, directory: Path, count: int) -> None:
    """Until the process has replaced the state `count` times, or ended."""
    last = None
    while process.is_alive() and count:
        state = directory / STATE_FILE
        time.sleep(0.01)
        now = state.stat().st_ino if state.exists() else None
        count -= now != last
        last = now


def test_interrupted_it_finishes_the_update_and_saves(uninterrupted: Path, corpus: Path, tmp_path: Path) -> None:
    process = start(tmp_path, corpus)
    wait_for_updates(process, tmp_path, 3)
    interrupt(process)
    assert status(process) == 130
    assert len(curve(tmp_path)) < len(curve(uninterrupted))
    assert status(start(tmp_path, corpus, "--resume")) == 0
    assert_same(tmp_path, uninterrupted)


def start_ranks(directory: Path, corpus: Path, *options: str) -> list[ForkServerProcess]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(directory, corpus, *options, RANK=str(rank), **common) for rank in range(2)]


def test_two_ranks_make_the_bits_of_one_and_stop_together(corpus: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert status(start(alone, corpus, "--pairs")) == 0
    ranks = start_ranks(together, corpus, "--pairs")
    wait_for_updates(ranks[0], together, 3)
    interrupt(ranks[1])  # one is enough
    assert [status(rank) for rank in ranks] == [130, 130], "the other one stops too, without an error"
    assert 0 < len(curve(together)) < len(curve(alone))
    assert [status(rank) for rank in start_ranks(together, corpus, "--pairs", "--resume")] == [0, 0]
    assert_same(together, alone)


def test_a_batch_softmax_is_of_one_process(corpus: Path, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="would depend on how ranks share it: train in one process"):
            run(tmp_path / "run", corpus, replace(PLAN, batch_softmax=True))
    finally:
        dist.destroy_process_group()


def test_batches_of_any_size_are_shared_by_ranks(uninterrupted: Path, corpus: Path, tmp_path: Path) -> None:
    """One process computes up to four windows at a time, each of two ranks half of them, so the sums round differently."""
    assert [status(rank) for rank in start_ranks(tmp_path, corpus)] == [0, 0]
    ours, theirs = curve(tmp_path), curve(uninterrupted)
    assert [row.seen for row in ours] == [row.seen for row in theirs]
    assert [row.loss for row in ours] == pytest.approx([row.loss for row in theirs], rel=0.02)


def test_a_second_process_waits_for_the_first(uninterrupted: Path, corpus: Path, tmp_path: Path) -> None:
    both = [start(tmp_path, corpus, "--resume") for _ in range(2)]
    assert [status(process) for process in both] == [0, 0]
    assert_same(tmp_path, uninterrupted)


def test_a_directory_with_a_run_is_not_overwritten(uninterrupted: Path, corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a training run: go on with it \(--resume\) or choose another directory"):
        run(uninterrupted, corpus)


def test_a_model_that_is_no_run_s_is_not_overwritten(uninterrupted: Path, corpus: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes((uninterrupted / "model.safetensors").read_bytes())
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"holds model\.safetensors, but no training run: choose another directory"):
            run(tmp_path, corpus, resume=resume)
    assert model.read_bytes() == (uninterrupted / "model.safetensors").read_bytes()


def test_another_plan_is_not_gone_on_with(uninterrupted: Path, corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"is the state of another run: learning_rate 0\.1, not 0\.01"):
        run(uninterrupted, corpus, replace(PLAN, learning_rate=0.1), resume=True)


def test_another_corpus_is_not_gone_on_with(uninterrupted: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("something else " * 100, encoding="utf-8")
    with pytest.raises(ValueError, match=r"is the state of another run: corpus \['other-.*, not \['tales-"):
        run(uninterrupted, other, resume=True)
