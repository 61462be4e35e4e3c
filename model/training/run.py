"""A training run and its directory:

tokens/                         the corpus as shards of tokens
state.safetensors               what a run that was stopped goes on from
loss.csv, loss.png              the loss curve
lock                            held by the process that writes here
config.json, model.safetensors  the model so far, in bf16, as it is served
"""

import csv
import dataclasses
import fcntl
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from model.checkpoint.architectures import WEIGHTS_FILE
from model.checkpoint.files import write_atomically
from model.checkpoint.tokenizer import Tokenizer
from model.checkpoint.weights import INDEX_FILE, save_model
from model.gpt import GPT
from model.lora import ADAPTER_WEIGHTS
from model.training.data import Windows, open_shard, write_shard
from model.training.state import load_state, save_state
from model.training.trainer import Batches, Trainer, TrainingPlan, Update, mean_loss, next_token_loss

log = logging.getLogger("banded.training")

# What a run's result is made of, which may be somebody's only copy.
MODEL_FILES = (WEIGHTS_FILE, INDEX_FILE, ADAPTER_WEIGHTS)
STATE_FILE, CURVE_FILE, PICTURE_FILE, LOCK_FILE = "state.safetensors", "loss.csv", "loss.png", "lock"
COLUMNS = ["update", "tokens", "loss", "learning_rate", "gradient_norm", "held_out_loss"]
# Held-out tokens that the curve shows on the way; at the end all of them are read.
GLANCE = 16384


def train(
    directory: Path,
    model: GPT,
    plan: TrainingPlan,
    corpus: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    held_out: Tensor | None = None,
    resume: bool = False,
    save_every: float = 300,
    origin: Path | None = None,
) -> float | None:
    """Train `model`, fp32, on text files in `directory`: see `follow`. The loss on `held_out` at the end.

    `origin` is the checkpoint that the model began as, see `save_model`.

    In a process group of torch.distributed every rank calls this; the first one writes. Raises ValueError for a corpus that
    does not fit the plan too.
    """
    if plan.batch_softmax and dist.is_initialized():
        raise ValueError("a softmax over a batch's tokens would depend on how ranks share it: train in one process")
    check_directory(directory, resume=resume)  # before the corpus is written there
    if is_first_rank():
        for path in corpus:
            write_shard(path, tokenizer, directory / "tokens")
    if dist.is_initialized():
        dist.barrier()
    shards = [write_shard(path, tokenizer, directory / "tokens") for path in corpus]
    lengths = reversed(plan.windows)  # a corpus shorter than the longest is refused with that one's number
    windows = {length: Windows([open_shard(path) for path in shards], length, plan.seed) for length in lengths}
    device = model.head.device
    model.requires_grad_(True)
    loss = partial(next_token_loss, model, batch_softmax=plan.batch_softmax)
    trainer = Trainer(dict(model.named_parameters()), plan, loss)

    def batches(first: int, count: int, window: int) -> tuple[Tensor, Tensor]:
        inputs, targets = windows[window].batch(first, count)
        return inputs.to(device), targets.to(device)

    return follow(
        directory,
        trainer,
        batches,
        {"model": dataclasses.asdict(model.config), "corpus": [path.name for path in shards]},
        write_model=lambda: save_model(directory, model, torch.bfloat16, origin=origin),
        held_out_loss=None if held_out is None else lambda whole: mean_loss(model, held_out if whole else held_out[:GLANCE]),
        resume=resume,
        save_every=save_every,
    )


def is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def follow(
    directory: Path,
    trainer: Trainer,
    batches: Batches,
    about: dict[str, Any],
    *,
    write_model: Callable[[], None],
    held_out_loss: Callable[[bool], float] | None,
    resume: bool,
    save_every: float,
    unit: str = "tok",
) -> float | None:
    """Follow a trainer's plan in `directory`, which gets its state and the model every `save_every` seconds and at the end.

    `about`, which is JSON, is what must be the same again when the run goes on. `held_out_loss` is that of a few held-out
    texts, or of all; the curve shows the first on the way and the second at the end, where it is returned. Raises ValueError
    for a directory that holds a model, or a run when `resume` is false, and where that run was another one;
    KeyboardInterrupt when it was stopped, its state saved.
    """
    state = directory / STATE_FILE
    is_first = is_first_rank()
    with one_writer(directory), interruptions() as is_interrupted:
        if dist.is_initialized():
            dist.barrier()  # until nobody writes there any more
        check_directory(directory, resume=resume)
        if state.exists():
            load_state(state, trainer, about)
        elif resume:
            log.info("%s holds no training run yet: one begins", directory)
        curve = Curve(directory / CURVE_FILE, trainer.num_updates)

        def save() -> None:
            curve.write()  # before the state: rows that it doesn't know will come again
            save_state(state, trainer, about)
            write_model()

        with progress_bar(trainer, unit, shown=is_first) as show:
            saved = time.monotonic()
            while not (stopped := any_rank(is_interrupted())) and (update := trainer.update(batches)):
                curve.add(trainer, update)
                show(update)
                if is_first and time.monotonic() - saved > save_every and trainer.seen < trainer.plan.num_tokens:
                    if held_out_loss is not None:
                        curve.note_held_out(held_out_loss(False))
                    save()
                    saved = time.monotonic()
        last_loss = None
        if is_first and trainer.num_updates:
            save()
            if held_out_loss is not None and not stopped:
                last_loss = held_out_loss(True)
                curve.note_held_out(last_loss)
                curve.write()
            draw(directory / CURVE_FILE, directory / PICTURE_FILE)
        if stopped or is_interrupted():
            raise KeyboardInterrupt
        return last_loss


def check_directory(directory: Path, *, resume: bool) -> None:
    """Raises ValueError where a run would overwrite another one, or a model that is none's."""
    if (directory / STATE_FILE).exists():
        if not resume:
            raise ValueError(f"{directory} holds a training run: go on with it (--resume) or choose another directory")
    elif models := [name for name in MODEL_FILES if (directory / name).exists()]:
        raise ValueError(f"{directory} holds {models[0]}, but no training run: choose another directory")


def any_rank(flag: bool) -> bool:
    """Whether it is set on some rank: all must stop at the same update, for each waits for the others' gradients."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(float(flag))
    dist.all_reduce(votes)
    return votes.item() > 0


@contextmanager
def one_writer(directory: Path) -> Iterator[None]:
    """Waits until no other run writes to `directory`, such as that of a job whose server was killed."""
    if not is_first_rank():
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process trains in %s; waiting for it to end", directory)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Curve:
    """The loss curve as a table on disk, a row for every update."""

    def __init__(self, path: Path, num_updates: int):
        """Keeps the rows of the first `num_updates`: those behind a saved state will come again."""
        self._path = path
        self._rows: list[dict[str, Any]] = []
        if num_updates:
            with path.open(newline="") as file:
                self._rows = list(csv.DictReader(file))[:num_updates]

    def add(self, trainer: Trainer, update: Update) -> None:
        numbers = (trainer.num_updates, trainer.seen, update.loss, update.step.learning_rate, update.gradient_norm)
        self._rows.append(dict(zip(COLUMNS, numbers, strict=False)))

    def note_held_out(self, loss: float) -> None:
        self._rows[-1]["held_out_loss"] = loss

    def write(self) -> None:
        with write_atomically(self._path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self._rows)


def draw(curve: Path, picture: Path) -> None:
    """The loss over the tokens seen, smoothed, and held-out losses as points; no picture without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    with curve.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(8, 4.5), layout="tight")
    axes = figure.add_subplot(xlabel="tokens", ylabel="loss, nats a token")
    size = max(1, len(rows) // 400)
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    axes.plot(
        [float(group[-1]["tokens"]) for group in groups],
        [sum(float(row["loss"]) for row in group) / len(group) for group in groups],
        label=f"training, mean of {size} updates",
    )
    held_out = [(float(row["tokens"]), float(row["held_out_loss"])) for row in rows if row["held_out_loss"]]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o", markersize=3, label="held out")
    axes.legend()
    figure.savefig(picture)


@contextmanager
def progress_bar(trainer: Trainer, unit: str, *, shown: bool) -> Iterator[Callable[[Update], None]]:
    """Tokens seen, or what `unit` says, how many a second, time left and the loss, smoothed."""
    average: float | None = None
    with tqdm(
        total=trainer.plan.num_tokens, initial=trainer.seen, unit=unit, unit_scale=True, disable=not shown
    ) as progress:

        def show(update: Update) -> None:
            nonlocal average
            average = update.loss if average is None else 0.98 * average + 0.02 * update.loss
            progress.update(update.step.num_tokens)
            progress.set_postfix(loss=f"{average:.3f}", refresh=False)

        yield show


@contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came: an update is never left half done."""
    came = False

    def note(*_: Any) -> None:
        nonlocal came
        came = True

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
