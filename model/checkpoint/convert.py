"""Turn weights of other programs into a directory that is served: safetensors, config.json and the tokenizer's files.

Reads pytorch_model.bin in one file or shards, nanoGPT's ckpt.pt, llm.c's .bin, and GGUF of a GPT-2 with the package gguf. A
pickle is only opened in a process of its own (unpickle.py).
"""

import json
import logging
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from model.checkpoint.architectures import WEIGHTS_FILE, flag, integer, read_architecture
from model.checkpoint.files import (
    CONFIG_FILE,
    FOREIGN,
    VOCABULARY_BYTES,
    CheckpointError,
    Json,
    check_file,
    few,
    optional_json,
    read_json,
)
from model.checkpoint.tokenizer import R50K_VOCAB_SIZE
from model.checkpoint.vocabulary import ADDED_FILE, MERGES_FILE, PIPELINE_FILE, SETTINGS_FILE, VOCAB_FILE, load_tokenizer
from model.checkpoint.weights import INDEX_FILE, TEXT_FILES, VOCAB_ROWS, load_model, shard_files, write_tensors
from model.gpt import GPT

log = logging.getLogger("banded")

# The files of r50k_base.
DEMO = Path(__file__).parents[1] / "data" / "demo"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# What a process that unpickles may use: in addition to its imports, per byte of the file.
SECONDS, SECONDS_PER_BYTE = 60, 1e-7
BYTES, BYTES_PER_BYTE = 4 << 30, 3
# What a directory of a model holds besides weights. All of it is taken along.
TEXT_SUFFIXES = (".json", ".txt", ".jinja", ".md")
# nanoGPT and llm.c round r50k_base's 50257 tokens up to a multiple of 128.
PADDED_R50K = 50304
GGUF_MODULES = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f", "output": "lm_head"}
GGUF_MODULES |= {"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj"}
GGUF_MODULES |= {"ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
LLM_C_MAGIC, LLM_C_HEADER = 20240326, 256  # int32
LLM_C_DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by version
# The parameters of an llm.c file, in order. Those with {i} are stored for all layers, one after another.
LLM_C_LAYER = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
LLM_C_ORDER = (
    "wte.weight",
    "wpe.weight",
    *(f"h.{{i}}.{module}.{kind}" for module in LLM_C_LAYER for kind in ("weight", "bias")),
    "ln_f.weight",
    "ln_f.bias",
)


def convert(source: Path, target: Path) -> None:
    """Write the model in `source`, a file or a directory, to the new directory `target`, which then can be served.

    Nothing is left at `target` where that fails. Raises CheckpointError naming the file and what is wrong with it.
    """
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or directory")
    file = weights_in(source) if source.is_dir() else source
    check_file(file)
    with new_directory(target) as directory:
        with file.open("rb") as opened:
            magic = opened.read(4)
        try:
            {LLM_C_MAGIC.to_bytes(4, "little"): convert_llm_c, b"GGUF": convert_gguf}.get(magic, convert_pickles)(
                file, directory
            )
            load_model(directory, torch.float32)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(directory), str(source))) from error


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory that becomes `target` when the block ends without an error, and is removed when it does not."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists already; a model is converted into a new directory")
    temporary = target.resolve().with_name(f"{target.resolve().name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def weights_in(directory: Path) -> Path:
    """The file in `directory` to convert: the one by its usual name, or else the only one of another format."""
    for name in (PICKLE, PICKLE_INDEX, "ckpt.pt"):
        if (directory / name).is_file():
            return directory / name
    found = sorted(path for path in directory.iterdir() if path.suffix in FOREIGN)
    if len(found) == 1:
        return found[0]
    if (directory / WEIGHTS_FILE).exists() or (directory / INDEX_FILE).exists():
        raise CheckpointError(f"{directory} holds safetensors, which are served as they are")
    held = f"{few([path.name for path in found])}: name one of them" if found else f"no {PICKLE}, ckpt.pt or the like"
    raise CheckpointError(f"{directory} holds {held}")


def copy_texts(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.suffix in TEXT_SUFFIXES and path.is_file() and not path.name.endswith(".index.json"):
            check_file(path, VOCABULARY_BYTES)
            shutil.copyfile(path, target / path.name)


def convert_pickles(file: Path, target: Path) -> None:
    """The tensors of a pickle, or of the shards that an index names, either nanoGPT's or those of a config.json's model."""
    sharded = file.name == PICKLE_INDEX
    files = shard_files(file) if sharded else [file]
    names = [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)] if sharded else [WEIGHTS_FILE]
    described = (file.parent / CONFIG_FILE).exists()
    if described:  # what can't be served is refused before the weights are read
        copy_texts(file.parent, target)
        read_architecture(target)
        add_embedded_vocabulary(target)
    weight_map: dict[str, str] = {}
    for pickled, name in zip(files, names, strict=True):
        unpickle(pickled, target / name)
        with safe_open(target / name, "pt") as opened:
            model_args = (opened.metadata() or {}).get("model_args")
            weight_map |= dict.fromkeys(opened.keys(), name)
    if model_args is not None and not described:
        convert_nanogpt(file, json.loads(model_args), target)
    elif not described:
        raise CheckpointError(f"{file} is no checkpoint of nanoGPT, and there is no {CONFIG_FILE} next to it to describe it")
    elif sharded:
        (target / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")


def unpickle(file: Path, target: Path) -> None:
    """Write the tensors that torch.save wrote to `file` to `target`, in a process of its own."""
    size = file.stat().st_size
    limits = SECONDS + int(size * SECONDS_PER_BYTE), BYTES + size * BYTES_PER_BYTE
    program = Path(__file__).with_name("unpickle.py")
    command = [sys.executable, "-P", str(program), str(file), str(target), *map(str, limits)]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if run.returncode:
        ended = f"the process that read it ended with status {run.returncode}, after {limits[0]} s of a core at most"
        raise CheckpointError(f"{file} can't be read: {run.stdout.strip() or ended}")


def convert_nanogpt(file: Path, args: Json, target: Path) -> None:
    """A checkpoint of nanoGPT, whose tensors `unpickle` wrote to `target`. It lacks biases where `args` say so."""
    tensors = {
        re.sub(r"^(_orig_mod\.)?(transformer\.)?", "", name): tensor
        for name, tensor in load_file(target / WEIGHTS_FILE).items()
    }
    try:
        if not isinstance(args, dict):
            raise ValueError(f"must be an object, got {type(args).__name__}")
        names = {"n_positions": "block_size", **{name: name for name in ("vocab_size", "n_embd", "n_layer", "n_head")}}
        fields = {field: integer(args, name) for field, name in names.items()}
        biased = flag(args, "bias", True)
    except ValueError as error:
        raise CheckpointError(f"{file}: model_args: {error}") from error
    log.info("nanoGPT's exact GELU is assumed: where the model was trained with tanh's, set activation_function to gelu_new")
    write_gpt2(file, target, {**fields, "activation_function": "gelu"}, tensors, biased=biased)


def convert_llm_c(file: Path, target: Path) -> None:
    """A checkpoint of llm.c: a header, then all parameters of a GPT-2, its vocabulary padded."""
    header = np.fromfile(file, "<i4", LLM_C_HEADER).tolist()
    if len(header) < LLM_C_HEADER:
        raise CheckpointError(f"{file} ends within llm.c's header")
    if header[1] not in LLM_C_DTYPES:
        versions = " and ".join(map(str, LLM_C_DTYPES))
        raise CheckpointError(f"{file}: llm.c's version {header[1]} is not supported, only {versions}")
    dtype = LLM_C_DTYPES[header[1]]
    names = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd", "padded_vocab_size")
    fields = dict(zip(names, header[2:], strict=False))
    if min(fields.values()) < 1:
        raise CheckpointError(f"{file}: the header names sizes below 1: {fields}")
    padded, width, layers = fields.pop("padded_vocab_size"), fields["n_embd"], fields["n_layer"]
    sizes = {"wte": (padded, width), "wpe": (fields["n_positions"], width), "c_attn": (3 * width, width)}
    sizes |= {"attn.c_proj": (width, width), "c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}

    def shape(name: str) -> tuple[int, ...]:
        found = next((size for module, size in sizes.items() if f"{module}." in name), (width,))
        return found[:1] if name.endswith("bias") else found

    counts = {name: math.prod(shape(name)) for name in LLM_C_ORDER}
    total = sum(count * (layers if "{i}" in name else 1) for name, count in counts.items())
    expected = 4 * LLM_C_HEADER + total * dtype.itemsize
    if file.stat().st_size != expected:
        raise CheckpointError(f"{file} has {file.stat().st_size} bytes, but its header tells of {expected}")
    stored = torch.from_file(str(file), size=expected // dtype.itemsize, dtype=dtype)[-total:]
    tensors, start = {}, 0
    for name, count in counts.items():
        for layer in range(layers if "{i}" in name else 1):
            tensors[name.format(i=layer)] = stored[start : start + count].view(shape(name))
            start += count
    tensors["wte.weight"] = tensors["wte.weight"][: fields["vocab_size"]]
    write_gpt2(file, target, fields, tensors)


def convert_gguf(file: Path, target: Path) -> None:
    """A GPT-2 of llama.cpp, of whatever quantisation, and its tokenizer."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"{file}: a package of its own reads GGUF: pip install 'banded[gguf]'") from None
    try:
        reader = gguf.GGUFReader(file)
        about = {name: field.contents() for name, field in reader.fields.items()}
        if about["general.architecture"] != "gpt2" or about["tokenizer.ggml.model"] != "gpt2":
            raise ValueError(f"architecture {about['general.architecture']!r} is not supported, only 'gpt2'")
        if about.get("tokenizer.ggml.pre", "gpt-2") not in ("gpt-2", "default"):
            raise ValueError(f"tokenizer.ggml.pre {about['tokenizer.ggml.pre']!r} is not supported, only 'gpt-2'")
        tokens, kinds = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"]
        merges, eos_id = about["tokenizer.ggml.merges"], about["tokenizer.ggml.eos_token_id"]
        bos_id = about["tokenizer.ggml.bos_token_id"] if about.get("tokenizer.ggml.add_bos_token") else eos_id
        if len(kinds) != len(tokens) or max(eos_id, bos_id) >= len(tokens):
            raise ValueError(f"{len(tokens)} tokens have {len(kinds)} kinds, and their ends are {bos_id} and {eos_id}")
        names = {"n_positions": "context_length", "n_embd": "embedding_length", "n_inner": "feed_forward_length"}
        names |= {"n_layer": "block_count", "n_head": "attention.head_count"}
        fields: Json = {field: int(about[f"gpt2.{name}"]) for field, name in names.items()}
        fields |= {"layer_norm_epsilon": float(about["gpt2.attention.layer_norm_epsilon"]), "vocab_size": len(tokens)}
        tensors = {}
        for tensor in reader.tensors:
            *layer, module, kind = tensor.name.removeprefix("blk.").split(".")
            name = ".".join([*(f"h.{number}" for number in layer), GGUF_MODULES.get(module, module), kind])
            tensors[name] = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    except Exception as error:  # a damaged file fails anywhere in the reader
        told = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{file} can't be read as GGUF: {told}") from error
    special = [token for token, kind in zip(tokens, kinds, strict=False) if kind == gguf.TokenType.CONTROL]
    added = {token: n for n, token in enumerate(tokens) if kinds[n] == gguf.TokenType.USER_DEFINED}
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": tokens[eos_id], "additional_special_tokens": special}
    settings |= {"model_max_length": fields["n_positions"], "bos_token": tokens[bos_id]}
    settings["add_bos_token"] = bool(about.get("tokenizer.ggml.add_bos_token"))
    if "tokenizer.chat_template" in about:
        settings["chat_template"] = about["tokenizer.chat_template"]
    vocabulary = dict(zip(tokens, range(len(tokens)), strict=True))
    for name, content in {VOCAB_FILE: vocabulary, SETTINGS_FILE: settings, ADDED_FILE: added}.items():
        (target / name).write_text(json.dumps(content) + "\n", encoding="utf-8")
    (target / MERGES_FILE).write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    write_gpt2(file, target, fields | {"eos_token_id": eos_id}, tensors)


def write_gpt2(file: Path, target: Path, fields: Json, tensors: dict[str, Tensor], *, biased: bool = True) -> None:
    """A directory of transformers' GPT-2. `fields` are some of its config.json, `tensors` the parameters by our names.

    The tokenizer is that in `target`, or else the one next to `file`, or else r50k_base. A bias may be missing, and is zero,
    unless the model is `biased`.
    """
    if "lm_head.weight" in tensors and torch.equal(tensors["lm_head.weight"], tensors.get("wte.weight", torch.empty(0))):
        del tensors["lm_head.weight"]
    if not has_vocabulary(target):
        for name in filter(lambda name: (file.parent / name).exists(), TEXT_FILES):
            shutil.copyfile(file.parent / name, target / name)
    if not has_vocabulary(target):
        if fields["vocab_size"] == PADDED_R50K:
            log.info("%s: %d tokens are taken for r50k_base's %d, padded", file, PADDED_R50K, R50K_VOCAB_SIZE)
            fields["vocab_size"] = R50K_VOCAB_SIZE
            tensors |= {name: tensors[name][:R50K_VOCAB_SIZE] for name in VOCAB_ROWS if name in tensors}
        if fields["vocab_size"] != R50K_VOCAB_SIZE:
            raise CheckpointError(
                f"{file} has a vocabulary of {fields['vocab_size']} tokens, which is not r50k_base's {R50K_VOCAB_SIZE}: put "
                "the model's tokenizer.json, or vocab.json and merges.txt, next to it"
            )
        fields |= dict.fromkeys(("bos_token_id", "eos_token_id"), R50K_VOCAB_SIZE - 1)
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **fields}
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    add_embedded_vocabulary(target)
    architecture, gpt_config = read_architecture(target)
    with torch.device("meta"):
        parameters = dict(GPT(gpt_config).named_parameters())
    zeros = [] if biased else [name for name in parameters if name.endswith("bias") and name not in tensors]
    tensors |= {name: torch.zeros(parameters[name].shape) for name in zeros}
    tensors = {name: tensor for name, tensor in tensors.items() if not re.fullmatch(architecture.ignored, name)}
    differing = sorted(tensors.keys() ^ parameters.keys())
    if differing:
        raise CheckpointError(f"{file} is no GPT-2 of its sizes; missing or left over: {few(differing)}")
    stored = {}
    for name, tensor in tensors.items():
        (key,), transposed = architecture.source_of(name)
        stored[key if key == "lm_head.weight" else f"transformer.{key}"] = (tensor.T if transposed else tensor).contiguous()
    write_tensors(target / WEIGHTS_FILE, stored)


def add_embedded_vocabulary(target: Path) -> None:
    """Check the tokenizer of `target`. If r50k_base is assumed there, write it, so that no one has to assume it again."""
    eos_id = load_tokenizer(target).eos_id
    if not has_vocabulary(target):
        settings = read_json(DEMO / SETTINGS_FILE) | {"model_max_length": read_architecture(target)[1].n_positions}
        if eos_id != R50K_VOCAB_SIZE - 1:  # a name would overrule config.json's number
            del settings["eos_token"]
        settings |= optional_json(target / SETTINGS_FILE) or {}
        for name in (VOCAB_FILE, MERGES_FILE):
            shutil.copyfile(DEMO / name, target / name)
        (target / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def has_vocabulary(directory: Path) -> bool:
    return (directory / PIPELINE_FILE).exists() or (directory / VOCAB_FILE).exists()
