"""A training run and its directory:

tokens/                         the corpus as shards of tokens
state.safetensors               where a stopped run resumes
loss.csv, loss.png              the loss curve
lock                            held by the process that writes here
config.json, model.safetensors  the model so far, in bf16, ready to serve
"""

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
from model.checkpoint.tokenizer import Tokenizer
from model.checkpoint.weights import INDEX_FILE, save_model
from model.gpt import GPT
from model.lora import ADAPTER_WEIGHTS
from model.training.data import Windows, open_shard, write_shard
from model.training.plans import TrainingPlan
from model.training.records import CURVE_FILE, LossRow, read_curve, write_curve
from model.training.trainer import Batches, Trainer, mean_loss, next_token_loss

log = logging.getLogger("banded.training")

# The result of a run. It may be somebody's only copy.
MODEL_FILES = (WEIGHTS_FILE, INDEX_FILE, ADAPTER_WEIGHTS)
STATE_FILE, PICTURE_FILE, LOCK_FILE = "state.safetensors", "loss.png", "lock"
# The curve shows the loss on so many held-out tokens during the run, and on all of them at the end.
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
    """Train `model`, fp32, on the text files of `corpus`, and return the loss on `held_out` at the end: see `follow`.

    `origin` is the checkpoint that training begins with: see `save_model`.

    In a process group of torch.distributed every rank calls this, and the first one writes. Raises ValueError as `follow`
    does, and for a corpus that does not fit the plan.
    """
    if plan.batch_softmax and dist.is_initialized():
        raise ValueError("a softmax over a batch's tokens would depend on how ranks share it: train in one process")
    check_directory(directory, resume=resume)  # ahead of writing the corpus there
    if is_first_rank():
        for path in corpus:
            write_shard(path, tokenizer, directory / "tokens")
    if dist.is_initialized():
        dist.barrier()
    shards = [write_shard(path, tokenizer, directory / "tokens") for path in corpus]
    lengths = reversed(plan.windows)  # the longest first: its length is named to a corpus that is shorter
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
) -> float | None:
    """Follow a trainer's plan. Write state, curve and model to `directory` every `save_every` seconds and at the end.

    `about` is JSON that must be the same when the run resumes. `held_out_loss(False)` is the loss on a few held-out texts,
    which the curve shows during the run; `held_out_loss(True)` is that on all, shown and returned at the end.

    Raises ValueError if the directory holds a model without a run, a run while `resume` is false, or another run. Raises
    KeyboardInterrupt if it was stopped, with its state saved.
    """
    state, curve = directory / STATE_FILE, directory / CURVE_FILE
    plan, is_first = trainer.plan, is_first_rank()
    with one_writer(directory), interruptions() as is_interrupted:
        if dist.is_initialized():
            dist.barrier()  # until no other run writes there
        check_directory(directory, resume=resume)
        if state.exists():
            trainer.load(state, about)
        elif resume:
            log.info("%s holds no training run yet: starting one", directory)
        # Rows after the saved state come again. A state needs its rows, so they are written first.
        rows = read_curve(curve)[: trainer.num_updates] if trainer.num_updates else []

        def save() -> None:
            write_curve(curve, rows, plan.unit)
            trainer.save(state, about)
            write_model()

        with tqdm(total=plan.total, initial=trainer.seen, unit=plan.unit, unit_scale=True, disable=not is_first) as progress:
            average: float | None = None  # of the loss, smoothed
            saved = time.monotonic()
            while not (stopped := any_rank(is_interrupted())) and (row := trainer.update(batches)):
                rows.append(row)
                average = row.loss if average is None else 0.98 * average + 0.02 * row.loss
                progress.update(row.seen - progress.n)
                progress.set_postfix(loss=f"{average:.3f}", refresh=False)
                if is_first and time.monotonic() - saved > save_every and trainer.seen < plan.total:
                    if held_out_loss is not None:
                        rows[-1] = row._replace(held_out_loss=held_out_loss(False))
                    save()
                    saved = time.monotonic()
        last_loss = None
        if is_first and trainer.num_updates:
            save()
            if held_out_loss is not None and not stopped:
                last_loss = held_out_loss(True)
                rows[-1] = rows[-1]._replace(held_out_loss=last_loss)
                write_curve(curve, rows, plan.unit)
            draw(rows, plan.unit, directory / PICTURE_FILE)
        if stopped or is_interrupted():
            raise KeyboardInterrupt
        return last_loss


def check_directory(directory: Path, *, resume: bool) -> None:
    """Raises ValueError if a run would overwrite another run, or a model that is no run's."""
    if (directory / STATE_FILE).exists():
        if not resume:
            raise ValueError(f"{directory} holds a training run: go on with it (--resume) or choose another directory")
    elif models := [name for name in MODEL_FILES if (directory / name).exists()]:
        raise ValueError(f"{directory} holds {models[0]}, but no training run: choose another directory")


def any_rank(flag: bool) -> bool:
    """Whether it is set on any rank. All must stop at the same update, because each waits for the others' gradients."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(float(flag))
    dist.all_reduce(votes)
    return votes.item() > 0


@contextmanager
def one_writer(directory: Path) -> Iterator[None]:
    """Waits until no other run writes to `directory`: a job's run outlives a server that is killed."""
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


def draw(rows: Sequence[LossRow], unit: str, picture: Path) -> None:
    """The loss over what was seen, smoothed, and held-out losses as points. No picture without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 4.5), layout="tight")
    axes = figure.add_subplot(xlabel=f"{unit}s", ylabel="loss, nats a token")
    size = max(1, len(rows) // 400)
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    axes.plot(
        [group[-1].seen for group in groups],
        [sum(row.loss for row in group) / len(group) for group in groups],
        label=f"training, mean of {size} updates",
    )
    held_out = [(row.seen, row.held_out_loss) for row in rows if row.held_out_loss is not None]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o", markersize=3, label="held out")
    axes.legend()
    figure.savefig(picture)


@contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether SIGINT or SIGTERM came. Updates are never cut short."""
    came: list[bool] = []
    previous = {number: signal.signal(number, lambda *_: came.append(True)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
