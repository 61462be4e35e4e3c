"""From settings to something that can be served: reads weights and tokenizer, sizes the KV pools, builds the engine."""

import logging
import time
from pathlib import Path
from typing import NamedTuple

import torch

from model.gpt import GPT
from model.runner import Runner
from model.step import SamplingParams
from model.tokenizer import Tokenizer
from model.vocabulary import load_tokenizer
from model.weights import load_model
from service.engine import Engine
from service.kv_cache import KVCache, page_bytes, pool_sizes, sequence_bytes
from service.metrics import Metrics
from service.process import keep_freed_memory, one_torch_thread
from service.scheduler import Scheduler, Sequence
from service.served import ServedModel
from service.settings import Settings

log = logging.getLogger("banded")

DEMO_DIRECTORY = Path(__file__).parent.parent / "model" / "data" / "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadError(ValueError):
    """Settings that can't be served on this machine."""


class Checkpoint(NamedTuple):
    """A model directory in memory."""

    name: str
    model: GPT
    tokenizer: Tokenizer


def model_directory(model: str) -> Path:
    """Where a model named on the command line lies."""
    return DEMO_DIRECTORY if model == "demo" else Path(model)


def served_name(model: str) -> str:
    """A directory is served under its own name."""
    return "demo" if model == "demo" else Path(model).resolve().name


def choose_device(device: str) -> torch.device:
    if device == "cuda":
        raise LoadError("device cuda: the CUDA kernels are not built yet; use --device cpu")
    return torch.device("cpu")


def choose_dtype(dtype: str) -> torch.dtype:
    """auto is bfloat16 where the CPU multiplies it natively, float32 elsewhere."""
    if dtype != "auto":
        return DTYPES[dtype]
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def load_checkpoint(settings: Settings) -> Checkpoint:
    """Weights and tokenizer of the model that the settings name.

    Raises CheckpointError or TokenizerError naming what is wrong with the directory, LoadError for device or dtype.
    """
    directory = model_directory(settings.model)
    device, dtype = choose_device(settings.device), choose_dtype(settings.dtype)
    log.info("loading %s from %s as %s on %s", served_name(settings.model), directory, str(dtype)[6:], device)
    model = load_model(directory, dtype, device)
    tokenizer = load_tokenizer(directory)
    return Checkpoint(served_name(settings.model), model, tokenizer)


def build_engine(checkpoint: Checkpoint, settings: Settings, metrics: Metrics) -> Engine:
    """An engine, warmed up and not yet started. Raises ValueError when the KV budget can't hold one sequence."""
    config, dtype = checkpoint.model.config, checkpoint.model.wte.weight.dtype
    sizes = pool_sizes(
        config,
        kv_bytes=settings.kv_bytes,
        item_bytes=dtype.itemsize,
        max_slots=settings.max_slots,
        step_tokens=settings.step_tokens,
    )
    total = sum(pages * page_bytes(config, kind, dtype.itemsize) for kind, pages in sizes.items())
    log.info(
        "KV cache: %s of %.0f MB; %d sequences run at once, %.1f of them at the full %d tokens",
        " and ".join(f"{pages} {kind} pages" for kind, pages in sizes.items()),
        total / 1e6,
        settings.max_slots,
        min(settings.max_slots, total / sequence_bytes(config, config.n_positions, dtype.itemsize)),
        config.n_positions,
    )
    runner = Runner(checkpoint.model, settings.max_slots, sizes)
    cache = KVCache(config, sizes, step_tokens=settings.step_tokens)
    scheduler = Scheduler(cache, max_slots=settings.max_slots, step_tokens=settings.step_tokens)
    warm_up(runner, scheduler, checkpoint.tokenizer.eos_id)
    return Engine(
        runner,
        scheduler,
        checkpoint.tokenizer,
        metrics,
        max_slots=settings.max_slots,
        max_queue=settings.max_queue,
        queue_timeout=settings.queue_timeout,
    )


def warm_up(runner: Runner, scheduler: Scheduler, token: int) -> None:
    """Run a prompt chunk and a decode step, so that the first client doesn't pay for what the first step sets up."""
    scheduler.submit([Sequence([token], 2, SamplingParams(), eos_id=None)])
    while step := scheduler.schedule(0.0):
        started = time.perf_counter()
        scheduler.commit(runner.launch(step).result(), time.perf_counter() - started)


def load_served(settings: Settings, metrics: Metrics) -> ServedModel:
    """Everything between a model's directory and its engine."""
    started = time.perf_counter()
    keep_freed_memory()
    with one_torch_thread():
        checkpoint = load_checkpoint(settings)
        engine = build_engine(checkpoint, settings, metrics)
    seconds = time.perf_counter() - started
    metrics.load_time.set(seconds)
    config = checkpoint.model.config
    parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    log.info("%s: %.1f M parameters, %d layers, ready in %.1f s", checkpoint.name, parameters / 1e6, config.n_layer, seconds)
    return ServedModel(checkpoint.name, int(time.time()), config, checkpoint.tokenizer, engine)
