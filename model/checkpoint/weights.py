"""Read, write and identify weights. safetensors only: no pickle is ever opened."""

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from model.checkpoint.architectures import (
    OTHER_HEADS,
    TEXT_FIELDS,
    WEIGHTS_FILE,
    Architecture,
    Source,
    read_architecture,
)
from model.checkpoint.files import CONFIG_FILE, CheckpointError, check_file, conversion, few, read_json, write_atomically
from model.checkpoint.prompt_format import PROMPT_FORMAT_FILE, TEMPLATE_DIRECTORY, TEMPLATE_FILE
from model.checkpoint.vocabulary import VOCABULARY_FILES
from model.config import GPTConfig
from model.gpt import GPT

log = logging.getLogger("banded.checkpoint")

INDEX_FILE = "model.safetensors.index.json"
# What turns text into tokens and prompts: a model that is saved takes these along from its origin.
TEXT_FILES = (*VOCABULARY_FILES, PROMPT_FORMAT_FILE, TEMPLATE_FILE)
# Rows of these are padded to a round vocabulary in memory, never on disk.
VOCAB_ROWS = ("wte.weight", "lm_head.weight")
# Bytes of the header of a file of weights, many times what thousands of tensors take.
HEADER_BYTES = 8 << 20
FORMAT = {"format": "pt"}  # the metadata by which other programs know how to read a file
# What a stored weight may be. Any other type is quantised, and its numbers are not weights.
FLOATS = ("F64", "F32", "F16", "BF16")
CPU = torch.device("cpu")
INTEGERS = {2: torch.int16, 4: torch.int32}  # by bytes of an element: a fingerprint reads parameters as integers
SUMMED_ROWS = 4096  # of a parameter, at a time


def counted(tensors: list[str]) -> str:
    return f"{len(tensors)} tensor{'s' * (len(tensors) != 1)}"


class StoredTensor(NamedTuple):
    """A tensor in an open file, not read yet."""

    file: Path
    key: str
    handle: Any

    def read(self) -> Tensor:
        return self.handle.get_tensor(self.key)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.handle.get_slice(self.key).get_shape())

    @property
    def dtype(self) -> str:
        """As safetensors spells it: F32, BF16."""
        return str(self.handle.get_slice(self.key).get_dtype())


def load_model(directory: Path, dtype: torch.dtype, device: torch.device = CPU) -> GPT:
    """The model in `directory`, ready for inference, its weights cast to `dtype` one by one on `device`.

    Every weight is allocated once. The files are mapped only until this returns. Raises CheckpointError, before it
    reads the first weight, when tensors are missing, left over or of another shape than config.json says.
    """
    architecture, config = read_architecture(directory)
    with torch.device("meta"):
        model = GPT(config)
    with ExitStack() as open_files:
        stored = open_tensors(weight_files(directory), architecture, open_files)
        leave_out_other_heads(directory, stored)
        sources = {name: architecture.source_of(name) for name, _ in model.named_parameters()}
        head = stored.pop("lm_head.weight", None) if config.tied_head else None
        if head is not None:  # a file may hold either of the tied weights, or both
            stored.setdefault(sources["wte.weight"].keys[0], head)
        check_keys(directory, sources, stored)
        if device.type == "cpu":
            check_memory(directory, sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize)
        for name, parameter in model.named_parameters():
            check_shapes(tuple(unpadded(name, parameter, config).shape), sources[name], stored)
        if head is not None:
            check_same(head, stored[sources["wte.weight"].keys[0]])
        state = {
            name: assemble(parameter.shape, sources[name], stored, dtype, device)
            for name, parameter in tqdm(list(model.named_parameters()), f"loading {directory.name}", disable=None)
        }
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of `directory`: the single one, or the shards that its index names."""
    if (directory / WEIGHTS_FILE).exists():
        return [directory / WEIGHTS_FILE]
    if (directory / INDEX_FILE).exists():
        return shard_files(directory / INDEX_FILE)
    raise CheckpointError(f"{directory} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}{conversion(directory)}")


def shard_files(index: Path) -> list[Path]:
    """The files that `index` names, all of them in its directory."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must map tensors to files, got {weight_map!r:.80}")
    names = sorted(set(map(str, weight_map.values())))
    strangers = [name for name in names if Path(name).name != name]
    if strangers:
        raise CheckpointError(f"{index} names {few(strangers)}: not a file of this directory")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} names {few(missing)}, which {'is' if len(missing) == 1 else 'are'} not there")
    return [index.parent / name for name in names]


def open_tensors(files: Iterable[Path], architecture: Architecture, open_files: ExitStack) -> dict[str, StoredTensor]:
    """The tensors in `files` by key without root, except ignored ones, readable until `open_files` closes."""
    stored: dict[str, StoredTensor] = {}
    for file in files:
        handle = open_safetensors(file, open_files)
        for key in handle.keys():  # noqa: SIM118 - not a mapping
            name = key.removeprefix(next(filter(key.startswith, architecture.roots), ""))
            if re.fullmatch(architecture.ignored, name):
                continue
            if name in stored:
                first = stored[name]
                raise CheckpointError(f"{file} holds {key}, and {first.file.name} holds it too, as {first.key}")
            stored[name] = StoredTensor(file, key, handle)
    return stored


def open_safetensors(file: Path, open_files: ExitStack) -> Any:
    """A regular file of safetensors, readable until `open_files` closes."""
    check_file(file)
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
        if length > HEADER_BYTES:
            raise CheckpointError(f"{file} can't be read as safetensors: its header has {length} bytes")
        return open_files.enter_context(safe_open(file, "pt"))
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: too large to be mapped
        raise CheckpointError(f"{file} can't be read as safetensors: {error}") from error


def check_memory(directory: Path, num_bytes: int) -> None:
    """CheckpointError if weights of `num_bytes` are more than the machine's free memory, where the system tells of it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return
    free = sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("MemAvailable:", "SwapFree:")))
    if num_bytes > free:
        raise CheckpointError(f"{directory}: the weights take {num_bytes / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free")


def leave_out_other_heads(directory: Path, stored: dict[str, StoredTensor]) -> None:
    """Remove the tensors of heads that a language model does without, with a line in the log."""
    heads = [name for name in sorted(stored) if re.fullmatch(OTHER_HEADS, stored[name].key)]
    if heads:
        log.warning("%s: left out %s of a head for another task: %s", directory, counted(heads), few(heads))
    for name in heads:
        del stored[name]


def check_keys(directory: Path, sources: Mapping[str, Source], stored: Mapping[str, StoredTensor]) -> None:
    """CheckpointError unless exactly the keys of `sources` are stored."""
    wanted = [key for source in sources.values() for key in source.keys]
    missing = [key for key in wanted if key not in stored]
    if missing:
        raise CheckpointError(f"{directory} lacks {counted(missing)} that {CONFIG_FILE} asks for: {few(missing)}")
    extra = [stored[key].key for key in sorted(stored.keys() - set(wanted))]
    if extra:
        raise CheckpointError(f"{directory} holds {counted(extra)} that {CONFIG_FILE} has no place for: {few(extra)}")


def check_shapes(shape: tuple[int, ...], source: Source, stored: Mapping[str, StoredTensor]) -> None:
    """CheckpointError unless the tensors of `source` are floats that make up a parameter of `shape`."""
    shape = (shape[0] // len(source.keys), *shape[1:])
    expected = shape[::-1] if source.transposed else shape
    for key in source.keys:
        tensor = stored[key]
        if tensor.shape != expected:
            raise CheckpointError(f"{tensor.file}: {tensor.key} has shape {tensor.shape}, expected {expected}")
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{tensor.file}: {tensor.key} is {tensor.dtype}, expected one of {', '.join(FLOATS)}")


def check_same(head: StoredTensor, embedding: StoredTensor) -> None:
    """CheckpointError unless the head of a tied model, which some files repeat, is the embedding."""
    if head.shape != embedding.shape or head.dtype != embedding.dtype or not torch.equal(head.read(), embedding.read()):
        raise CheckpointError(
            f"{head.file}: {head.key} differs from {embedding.key} though {CONFIG_FILE} ties them; "
            "if the head is meant, set tie_word_embeddings to false"
        )


def unpadded(name: str, parameter: Tensor, config: GPTConfig) -> Tensor:
    """The part of a parameter that is on disk: without the padding of the vocabulary."""
    return parameter[: config.vocab_size] if name in VOCAB_ROWS else parameter


def assemble(
    shape: torch.Size, source: Source, stored: Mapping[str, StoredTensor], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A parameter of `shape`: the tensors of `source` stacked, then zeros, which pad the vocabulary.

    Raises CheckpointError naming a tensor that holds NaN or infinity, or numbers too large for `dtype`.
    """
    parameter = torch.empty(shape, dtype=dtype, device=device)
    row = 0
    for key in source.keys:
        tensor = stored[key].read()
        tensor = tensor.T if source.transposed else tensor
        part = parameter[row : row + len(tensor)]
        part.copy_(tensor)
        # A finite sum has finite terms only, and costs a fraction of a look at each. A sum of sound weights may overflow.
        if not part.sum().isfinite() and not part.isfinite().all():
            raise CheckpointError(f"{stored[key].file}: {why_not_finite(stored[key].key, tensor, dtype)}")
        row += len(tensor)
    parameter[row:] = 0
    return parameter


def why_not_finite(key: str, tensor: Tensor, dtype: torch.dtype) -> str:
    """Why `tensor`, stored as `key`, is not finite as `dtype`, and which dtype holds it."""
    if broken := int((~tensor.isfinite()).sum()):
        return f"{key} holds {broken} of {tensor.numel()} numbers that are NaN or infinite"
    fitting = [each for each in (torch.bfloat16, torch.float32) if tensor.to(each).isfinite().all()]
    advice = f"use --dtype {str(fitting[0])[6:]}" if fitting else "no dtype holds it"
    most, limit = tensor.abs().max().item(), torch.finfo(dtype).max
    return f"{key} reaches {most:g}, but {str(dtype)[6:]} ends at {limit:g}; {advice}"


def save_model(directory: Path, model: GPT, dtype: torch.dtype, *, origin: Path | None = None) -> None:
    """Write config.json and model.safetensors, each atomically, weights in `dtype`.

    `origin` is the checkpoint that training began with: its tokenizer, prompt format and chat template are copied.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "banded", **dataclasses.asdict(model.config)}
    if origin is not None:
        raw = read_json(origin / CONFIG_FILE)
        config |= {name: raw[name] for name in TEXT_FIELDS if name in raw}
        for path in [*(origin / name for name in TEXT_FILES), *(origin / TEMPLATE_DIRECTORY).glob("*.jinja")]:
            if path.exists():
                copy = directory / path.relative_to(origin)
                copy.parent.mkdir(exist_ok=True)
                with write_atomically(copy) as file:
                    file.write_bytes(path.read_bytes())
    with write_atomically(directory / CONFIG_FILE) as file:
        file.write_text(json.dumps(config, indent=2) + "\n")
    tensors = {
        name: unpadded(name, tensor, model.config).to(dtype).contiguous() for name, tensor in model.state_dict().items()
    }
    write_tensors(directory / WEIGHTS_FILE, tensors)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = FORMAT, *, durable: bool = False
) -> None:
    """Replace `path`, see write_atomically. Raises OSError, also where safetensors raises an error of its own."""
    with write_atomically(path, durable=durable) as file:
        try:
            save_file(dict(tensors), file, metadata=dict(metadata))
        except SafetensorError as error:
            found = re.search(r"\(os error (\d+)\)", str(error))
            if not found:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def weights_digest(directory: Path) -> str:
    """A hash of the bytes of the weight files, which is the same in whatever dtype they are loaded."""
    digest = hashlib.sha256()
    for path in weight_files(directory):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def weights_fingerprint(model: GPT, *extra: str) -> str:
    """A hash over the bits of every parameter and `extra`, such as the kernels and the dtype.

    Answers with the same fingerprint are comparable. It hashes the sums of each parameter's rows and columns, read as
    integers: they change if any element changes, or if rows or columns trade places, and cost a single pass.
    """
    digest = hashlib.sha256()
    for text in extra:
        digest.update(text.encode() + b"\0")
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\0".encode())
        for sums in bit_sums(parameter):
            digest.update(sums.cpu().numpy().tobytes())
    return f"fp_{digest.hexdigest()[:10]}"


def bit_sums(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the rows and of the columns of a parameter's bits, both int64. A vector is one column."""
    bits = parameter.view(INTEGERS[parameter.element_size()])
    bits = bits.flatten(1) if bits.dim() > 1 else bits[:, None]
    columns = torch.zeros(bits.shape[1], dtype=torch.int64, device=bits.device)
    rows = []
    for part in bits.split(SUMMED_ROWS):
        rows.append(part.sum(1, dtype=torch.int64))
        columns += part.sum(0, dtype=torch.int64)
    return torch.cat(rows), columns
