"""The container's quota of CPUs, and a log line when others hold the cores."""

import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from service.engine import cores, process
from service.engine.cores import WATCH_SECONDS, CoreWatch, cpu_quota, seconds_waited
from service.engine.process import keep_to_quota


def quota(root: Path, own: str, **files: str) -> float:
    """The quota of a process whose /proc/self/cgroup is `own`; `files` by their paths, with __ for /."""
    for name, text in files.items():
        file = root / "groups" / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / file.name.replace("cpu_", "cpu.")).write_text(text)
    (root / "own").write_text(own)
    return cpu_quota(root / "groups", root / "own")


def test_the_least_quota_of_a_group_and_those_above_it_counts(tmp_path: Path) -> None:
    files = {"cpu_max": "max 100000\n", "pod__cpu_max": "250000 100000\n", "pod__app__cpu_max": "max 100000\n"}
    assert quota(tmp_path, "0::/pod/app\n", **files) == 2.5
    assert quota(tmp_path, "0::/pod/app\n", pod__app__cpu_max="50000 100000\n") == 0.5
    assert quota(tmp_path, "0::/\n") == math.inf


def test_a_container_s_own_group_is_the_root(tmp_path: Path) -> None:
    for path in ("/", "/kubepods/burstable/pod1/abc", "/../../other"):
        assert quota(tmp_path, f"0::{path}\n", cpu_max="150000 100000\n") == 1.5


def test_version_1_has_the_quota_in_two_files(tmp_path: Path) -> None:
    own = "5:memory:/m\n3:cpu,cpuacct:/docker/abc\n1:cpuset:/\n"
    files = {"cpu,cpuacct__docker__abc__cpu_cfs_quota_us": "300000\n", "cpu,cpuacct__cpu_cfs_quota_us": "-1\n"}
    files |= {name.replace("quota", "period"): "100000\n" for name in files}
    assert quota(tmp_path, own, **files) == 3.0


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path / "own") == math.inf
    assert cpu_quota() > 0


@pytest.mark.parametrize(("allowed", "threads"), [(math.inf, 4), (4.0, 4), (3.5, 3), (2.0, 2), (0.25, 1)])
def test_threads_keep_to_the_quota(
    allowed: float, threads: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "cpu_quota", lambda: allowed)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with caplog.at_level(logging.INFO):
            keep_to_quota()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    said = [f"threads: {threads}, because the container's quota is {allowed:.4g} CPUs"] if threads < 4 else []
    assert [record.message for record in caplog.records] == said


def test_other_processes_on_our_cores_are_noticed_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waited = [0.0]
    monkeypatch.setattr(cores, "seconds_waited", lambda: waited[0])
    watch = CoreWatch()

    def steps(share: float) -> None:
        for _ in range(101):
            waited[0] += share * WATCH_SECONDS / 100
            watch.add_step(WATCH_SECONDS / 100)

    steps(0.3)
    assert not caplog.records
    steps(0.9)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "in 10 s of steps our threads waited 9" in record.message
    steps(0.9)
    assert len(caplog.records) == 1


def test_the_kernel_says_how_long_threads_waited() -> None:
    before = seconds_waited()
    assert 0 <= before <= seconds_waited() < 1e6


@pytest.mark.parametrize(
    ("policy", "spins"), [({}, "6000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")]
)
def test_threads_of_openmp_spin_briefly_unless_told_otherwise(policy: dict[str, str], spins: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    script = "import service, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment | policy, capture_output=True, text=True, check=True
    )
    assert run.stdout == f"{spins} False\n"
