"""From options to models that can be served: reads weights and tokenizer, sizes the KV pools, builds the engine."""

import asyncio
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from kernels import dispatch
from kernels.cpu import build as cpu_build
from kernels.cpu import compiled as cpu_compiled
from kernels.names import KernelChoice
from kernels.ops import Ops
from model.checkpoint.architectures import Architecture, read_architecture
from model.checkpoint.prompt_format import PromptFormat, load_prompt_format
from model.checkpoint.tokenizer import Tokenizer
from model.checkpoint.vocabulary import load_tokenizer
from model.checkpoint.weights import load_model, weights_digest, weights_fingerprint
from model.config import GPTConfig
from model.doctor import kernel_errors
from model.gpt import GPT
from model.lora import Adapter, load_adapter
from model.peft import PEFT_CONFIG, load_peft_adapter
from model.runner import Runner
from model.step import Sampling
from service.engine.drafting import MAX_DRAFT
from service.engine.engine import Engine
from service.engine.metrics import Metrics
from service.engine.models import ModelEntry, Models
from service.engine.options import EngineOptions
from service.engine.pages import PageAllocator, page_bytes, pool_sizes, sequence_bytes
from service.engine.process import MAPPED_BYTES, keep_freed_memory, keep_to_quota, one_torch_thread, switch_threads_often
from service.engine.scheduler import MIN_CHUNK, AdapterRef, Scheduler, Sequence

log = logging.getLogger("banded")

DEMO_DIRECTORY = Path(__file__).parents[2] / "model" / "data" / "demo"
# The kernels multiply bfloat16 on tensor cores and copy asynchronously: Ampere and later.
MIN_CAPABILITY = (8, 0)
# Default budget for KV pages on a CPU, and the share of a GPU's memory that is left to activations and captured graphs.
CPU_KV_BYTES = 2 << 30
CUDA_RESERVE = 0.1
# int8 is a format of products only: activations, keys and values then have the dtype that "auto" takes.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadError(ValueError):
    """Options that this machine can't serve."""


class Checkpoint(NamedTuple):
    """A model directory in memory."""

    name: str
    model: GPT  # its weights packed for the ops that serve it
    tokenizer: Tokenizer
    prompt_format: PromptFormat
    ops: Ops
    kernels: str  # what `ops` are, in words
    dtype: str  # as the options name it
    fingerprint: str  # changes with the weights, the kernels and the dtype
    num_parameters: int


def model_directory(model: str) -> Path:
    """Where a model named on the command line lies."""
    return DEMO_DIRECTORY if model == "demo" else Path(model)


def served_name(model: str, names: tuple[str, ...] = ()) -> str:
    """The first of `names`. Without any, a directory's own name, and in Hugging Face's cache the repository's.

    >>> served_name("hub/models--openai-community--gpt2/snapshots/607a30d783dfa663caf39e06633721c8d4cfcd7e")
    'openai-community/gpt2'
    """
    if names:
        return names[0]
    directory = Path(os.path.abspath(model))  # a link keeps its own name
    repository = directory.parents[1].name if directory.parent.name == "snapshots" else ""
    if repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return directory.name


def choose_device(device: str) -> torch.device:
    """auto is the GPU if PyTorch sees one. Raises LoadError if the GPU can't be used."""
    available = torch.cuda.is_available()
    if device == "cpu" or (device == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise LoadError("device cuda: PyTorch sees no GPU here; use --device cpu, or install a CUDA build of torch")
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        raise LoadError(
            f"device cuda: {torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, "
            f"the kernels need {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}; use --device cpu"
        )
    return torch.device("cuda")


def choose_dtype(options: EngineOptions, device: torch.device, head_dim: int) -> torch.dtype:
    """The dtype of activations, keys and values, and of weights unless they are int8.

    auto is bfloat16 where the hardware or the compiled kernels multiply it faster than float32, and float32 elsewhere.
    """
    if options.dtype not in ("auto", "int8"):
        return DTYPES[options.dtype]
    if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    compiled = compiled_ops(head_dim, torch.bfloat16, options)
    return torch.bfloat16 if compiled is not None and compiled.has_bf16 else torch.float32


def kv_budget(kv_bytes: int | None, device: torch.device) -> int:
    """Bytes for KV pages: `kv_bytes`, or what `device` has to spare now that it holds the weights.

    Raises LoadError with the numbers if a GPU has less.
    """
    if device.type == "cpu":
        return CPU_KV_BYTES if kv_bytes is None else kv_bytes
    free, total = torch.cuda.mem_get_info(device)
    if kv_bytes is not None:
        if kv_bytes > free:
            raise LoadError(f"kv_bytes is {kv_bytes}, but the weights leave {free} of the GPU's {total} bytes")
        return kv_bytes
    reserve = int(total * CUDA_RESERVE)
    if free <= reserve:
        raise LoadError(
            f"the weights leave {free / 1e9:.1f} GB of the GPU's {total / 1e9:.1f} GB; {reserve / 1e9:.1f} GB are kept for "
            "activations, so none are left for KV pages"
        )
    return free - reserve


def load_checkpoint(options: EngineOptions) -> Checkpoint:
    """Weights and tokenizer of the model that the options name.

    Raises CheckpointError naming what is wrong with the directory, LoadError for device or dtype, ValueError if the kernels
    that the options name can't run.
    """
    directory = model_directory(options.model)
    device = choose_device(options.device)
    _, config = read_architecture(directory)
    dtype = choose_dtype(options, device, config.head_dim)
    if options.dtype == "int8" and (device.type == "cuda" or options.kernels == "triton"):
        raise LoadError(
            "dtype int8: its products run on CPUs only; use --dtype bfloat16, or --device cpu without BANDED_KERNELS"
        )
    if options.dtype == "int8" and not torch.cpu._is_vnni_supported():
        # Older instructions add pairs of products in 16 bits, which overflow.
        raise LoadError("dtype int8: this CPU has no VNNI instructions to multiply integers; use --dtype float32")
    shown = "int8" if options.dtype == "int8" else str(dtype)[6:]
    log.info("loading %s from %s as %s on %s", served_name(options.model, options.names), directory, shown, device)
    model = load_model(directory, dtype, device)
    served_ops = choose_ops(model, options)
    tokenizer, prompt_format = load_tokenizer(directory), load_prompt_format(directory)
    kernels = kernels_in_words(device, options.kernels, compiled=isinstance(served_ops, cpu_compiled.CompiledOps))
    fingerprint = weights_fingerprint(model, kernels, shown)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    model.pack(served_ops, quantize=options.dtype == "int8")
    name = served_name(options.model, options.names)
    return Checkpoint(name, model, tokenizer, prompt_format, served_ops, kernels, shown, fingerprint, num_parameters)


def kernels_in_words(device: torch.device, kernels: KernelChoice, *, compiled: bool = False) -> str:
    """Which implementation `choose_ops` takes."""
    if device.type == "cuda":
        return f"Triton on {torch.cuda.get_device_name(device)}"
    if kernels == "triton":
        return "Triton, interpreted on CPU"
    return "compiled on CPU" if compiled else "PyTorch on CPU"


def choose_ops(model: GPT, options: EngineOptions) -> Ops:
    """The ops that serve `model`. Raises ValueError if the kernels that the options name can't run."""
    weight = model.wte.weight
    compiled = compiled_ops(model.config.head_dim, weight.dtype, options) if weight.device.type == "cpu" else None
    return compiled or dispatch.choose(weight.device, options.kernels)


def compiled_ops(head_dim: int, dtype: torch.dtype, options: EngineOptions) -> cpu_compiled.CompiledOps | None:
    """The compiled ops of a CPU, if the options allow them and they can be compiled."""
    if options.kernels != "auto" or not options.compile:
        return None
    return cpu_compiled.load(cpu_build.Shape(head_dim, dtype))


def check_kernels(checkpoint: Checkpoint, metrics: Metrics) -> None:
    """Compare the kernels with the reference and export the difference. Raises LoadError if it is above the limit."""
    measured = kernel_errors(checkpoint.model, checkpoint.ops)
    for kind, error in measured.errors.items():
        metrics.kernel_logit_error(kind).set(error)
    if faults := measured.faults():
        raise LoadError(f"doctor: {'; '.join(faults)}")
    log.info("doctor: %s within the limit", ", ".join(measured.errors))
    # torch keeps freed memory, but kv_budget asks the GPU what is free.
    torch.cuda.empty_cache()


def explained_weight(config: GPTConfig) -> float:
    """How many prompt tokens take about as long as one with logprobs, which goes through the head too; at most MIN_CHUNK."""
    blocks = config.n_layer * (4 * config.n_embd + 2 * config.n_inner) * config.n_embd
    return min(1 + config.padded_vocab_size * config.token_width / blocks, MIN_CHUNK)


def build_engine(checkpoint: Checkpoint, options: EngineOptions, metrics: Metrics) -> tuple[Engine, Runner]:
    """An engine, warmed up and not yet started, and its runner.

    Raises ValueError when the KV budget can't hold one sequence.
    """
    config, weight = checkpoint.model.config, checkpoint.model.wte.weight
    device, dtype = weight.device, weight.dtype
    sizes = pool_sizes(
        config,
        kv_bytes=kv_budget(options.kv_bytes, device),
        item_bytes=dtype.itemsize,
        max_rows=2 * options.max_slots,  # those that were put back keep theirs while there is memory
        step_tokens=options.step_tokens,
    )
    total = sum(pages * page_bytes(config, kind, dtype.itemsize) for kind, pages in sizes.items())
    log.info(
        "KV cache: %s of %.0f MB; %d sequences run at once, %.1f of them at the full %d tokens",
        " and ".join(f"{pages} {kind} pages" for kind, pages in sizes.items()),
        total / 1e6,
        options.max_slots,
        min(options.max_slots, total / sequence_bytes(config, config.n_positions, dtype.itemsize)),
        config.n_positions,
    )
    runner = Runner(checkpoint.model, checkpoint.ops, options.max_slots, sizes)
    cache = PageAllocator(config, sizes, step_tokens=options.step_tokens)
    # On a CPU nothing runs in parallel with the host, which can then use each token before it lays out the next step.
    overlap = device.type == "cuda"
    max_draft = MAX_DRAFT if options.drafts and not overlap else 0
    scheduler = Scheduler(
        cache,
        max_rows=options.max_slots,
        step_tokens=options.step_tokens,
        explained_weight=explained_weight(config),
        max_draft=max_draft,
    )
    warm_up(runner, scheduler)
    if device.type == "cuda":
        runner.capture()
    engine = Engine(
        runner,
        scheduler,
        checkpoint.tokenizer,
        metrics,
        max_queue=options.max_queue,
        queue_timeout=options.queue_timeout,
        overlap=overlap,
    )
    return engine, runner


def warm_up(runner: Runner, scheduler: Scheduler) -> None:
    """Run a prompt chunk and a decode step: the first step sets things up that no client should wait for."""
    scheduler.submit([Sequence([0], 2, Sampling())])
    while step := scheduler.schedule(0.0):
        started = time.perf_counter()
        scheduler.commit(runner.launch(step).result(), time.perf_counter() - started)


class EngineAdapters:
    """The adapters of a served model, numbered from 1. No number is used twice."""

    def __init__(
        self,
        base: ModelEntry,
        aliases: tuple[str, ...],
        model: GPT,
        runner: Runner,
        architecture: Architecture,
        digest: str,
    ):
        """`digest` is weights_digest of the model."""
        self._base, self._model, self._runner = base, model, runner
        self._architecture, self._digest = architecture, digest
        self._taken = (base.name, *aliases)
        self._numbers = itertools.count(1)

    async def load(self, name: str, directory: Path) -> ModelEntry:
        adapter = await asyncio.to_thread(self._read, name, directory)
        served = self._with(name, adapter)
        await self._base.engine.between_steps(lambda: self._runner.adapters.put(served.adapter.number, adapter))
        return served

    def load_first(self, name: str, directory: Path) -> ModelEntry:
        """Load before the engine runs. Raises CheckpointError if the adapter does not fit, LoadError if its base differs."""
        adapter = self._read(name, directory)
        served = self._with(name, adapter)
        self._runner.adapters.put(served.adapter.number, adapter)
        return served

    async def unload(self, served: ModelEntry) -> None:
        await self._base.engine.retire(served.adapter, lambda: self._runner.adapters.remove(served.adapter.number))

    def _read(self, name: str, directory: Path) -> Adapter:
        if name in self._taken:
            raise LoadError(f"adapter {name}: the model itself has that name")
        if (directory / PEFT_CONFIG).exists():
            adapter = load_peft_adapter(directory, self._model, self._architecture)
            if Path(adapter.made_for).name != self._base.name:
                log.info("adapter %s: made for %r, served on %s", name, adapter.made_for, self._base.name)
            return adapter
        adapter = load_adapter(directory, self._model)
        if adapter.base != self._digest:
            raise LoadError(f"adapter {name}: made for weights {adapter.base}, but those of the model are {self._digest}")
        return adapter

    def _with(self, name: str, adapter: Adapter) -> ModelEntry:
        number, digest = next(self._numbers), adapter.fingerprint
        fingerprint = "fp_" + hashlib.sha256(f"{self._base.fingerprint} {digest}".encode()).hexdigest()[:10]
        ref = AdapterRef(number, digest.encode())
        base, now = self._base, int(time.time())
        return base._replace(name=name, created=now, fingerprint=fingerprint, adapter=ref, parent=base.name)


def load_served(options: EngineOptions, metrics: Metrics, finished: Iterable[tuple[str, str, Path]] = ()) -> Models:
    """Load the model, its adapters and those in `finished`: owner, name and directory of what each job has made."""
    started = time.perf_counter()
    keep_freed_memory(MAPPED_BYTES)
    keep_to_quota()
    switch_threads_often()
    try:
        with one_torch_thread():
            checkpoint = load_checkpoint(options)
            if options.doctor:
                check_kernels(checkpoint, metrics)
            engine, runner = build_engine(checkpoint, options, metrics)
    except torch.OutOfMemoryError as error:
        raise LoadError(f"the GPU is out of memory: {error}") from error
    seconds = time.perf_counter() - started
    metrics.load_time.set(seconds)
    config = checkpoint.model.config
    millions = checkpoint.num_parameters / 1e6
    log.info("%s: %.1f M parameters, %d layers, ready in %.1f s", checkpoint.name, millions, config.n_layer, seconds)
    base = ModelEntry(
        checkpoint.name,
        int(time.time()),
        config,
        checkpoint.tokenizer,
        checkpoint.prompt_format,
        checkpoint.fingerprint,
        engine,
        num_parameters=checkpoint.num_parameters,
        item_bytes=checkpoint.model.wte.weight.element_size(),
    )
    if len(options.adapters) > options.max_adapters:
        raise LoadError(f"{len(options.adapters)} adapters are named, but max_adapters is {options.max_adapters}")
    digest = weights_digest(model_directory(options.model)) if options.adapters or options.data_dir else ""
    aliases, (architecture, _) = options.names[1:], read_architecture(model_directory(options.model))
    loader = EngineAdapters(base, aliases, checkpoint.model, runner, architecture, digest)
    adapters = [loader.load_first(name, Path(directory)) for name, directory in options.adapters.items()]
    for owner, name, directory in finished:
        try:
            if sum(adapter.owner in (None, owner) for adapter in adapters) >= options.max_adapters:
                raise LoadError(f"max_adapters is {options.max_adapters}")
            adapters.append(loader.load_first(name, directory)._replace(owner=owner))
        except ValueError as error:  # DELETE /v1/models takes it away
            log.error("%s is not served: %s", name, error)
    return Models([base, *(base._replace(name=name, alias_of=base.name) for name in aliases), *adapters], loader)
