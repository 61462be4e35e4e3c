"""A store with some of everything, and what it tells of it."""

from collections import Counter
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest

from service.jobs.store import Event, Hyperparameters, Job, Store, StoredFile

PARAMETERS = Hyperparameters(2, 8, 1e-3, 4)


class Kept(NamedTuple):
    """What a store tells of all that it keeps."""

    files: list[StoredFile]
    jobs: list[Job]
    events: list[list[Event]]
    adapters: list[tuple[str, str]]  # of a model: names and their directories' names

    @staticmethod
    def of(store: Store) -> "Kept":
        adapters = [(name, directory.name) for _, name, directory in store.results("demo", [""])]
        return Kept(store.files(""), store.jobs(""), [store.events(job.id, 1000) for job in store.jobs("")], adapters)


def content(directory: Path) -> Counter[bytes]:
    """What was sent and what was learnt, wherever it is."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return Counter(path.read_bytes() for path in paths if ".jsonl" in path.name or path.name.startswith("adapter"))


def fill(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    """Files, a job of each kind, and an adapter. Returns what the store told at its end."""
    monkeypatch.setattr("time.time", partial(next, count(1700000000)))
    store = Store(directory)
    files = [store.add_file("", f"{number}.jsonl", "fine-tune", b"x" * (100 + number)) for number in range(3)]
    jobs = [store.add_job("", "demo", "a", number, PARAMETERS, files[0].id, files[1].id) for number in range(3)]
    for job in jobs:
        store.update_job(job.id, status="running", trained_tokens=20)
        store.add_metrics(job.id, [(f"Step {step}", {"step": step, "train_loss": 1.5}) for step in range(1, 4)])
        store.run_directory(job.id).mkdir()
        (store.run_directory(job.id) / "adapter.safetensors").write_bytes(job.id.encode() * 50)
    store.end_job(jobs[0].id, "succeeded", fine_tuned_model="ft:demo:a:1")
    store.end_job(jobs[1].id, "failed", error="it went wrong")
    store.remove_run(jobs[1].id)
    kept = Kept.of(store)
    store.close()
    return kept
