"""Read and write checkpoint directories. safetensors only: no pickle is ever opened.

Reading has three steps: config.json becomes a GPTConfig; a literal table per architecture names the stored tensors that
make up each parameter; all keys and shapes are checked, and only then is the first weight read.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from kernels.names import Activation, PatternKind
from model.checkpoint.prompt_format import PROMPT_FORMAT_FILE, TEMPLATE_FILE
from model.checkpoint.vocabulary import ADDED_FILE, MERGES_FILE, PIPELINE_FILE, SETTINGS_FILE, SPECIAL_MAP_FILE, VOCAB_FILE
from model.config import GPTConfig
from model.gpt import GPT

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# How text becomes tokens and prompts, beside the weights and no part of them: files, and fields of config.json.
TEXT_FILES = (
    PIPELINE_FILE,
    SETTINGS_FILE,
    SPECIAL_MAP_FILE,
    ADDED_FILE,
    VOCAB_FILE,
    MERGES_FILE,
    PROMPT_FORMAT_FILE,
    TEMPLATE_FILE,
)
TEXT_FIELDS = ("bos_token_id", "eos_token_id")
# Rows of these are padded to a round vocabulary in memory, never on disk.
VOCAB_ROWS = ("wte.weight", "lm_head.weight")
# What a stored weight may be; anything else is quantised, and its numbers are not weights.
FLOATS = ("F64", "F32", "F16", "BF16")
CPU = torch.device("cpu")

# A config.json as it was parsed.
Raw = Mapping[str, Any]


class CheckpointError(ValueError):
    """A model directory that can't be served, and what is wrong with it."""


def few(names: list[str]) -> str:
    rest = len(names) - 5
    return ", ".join(names[:5]) + (f" and {rest} more" if rest > 0 else "")


def counted(tensors: list[str]) -> str:
    return f"{len(tensors)} tensor{'s' * (len(tensors) != 1)}"


def integer(raw: Raw, name: str, default: int | None = None) -> int:
    """A whole number. Absent or null means `default`; ValueError when there is none."""
    value = default if raw.get(name) is None else raw[name]
    if value is None:
        raise ValueError(f"{name} is missing")
    if type(value) is not int:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return value


def number(raw: Raw, name: str, default: float | None = None) -> float:
    """A positive number, `default` when absent."""
    value = raw.get(name, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def flag(raw: Raw, name: str, default: bool | None = None) -> bool:
    """True or false, `default` when absent."""
    value = raw.get(name, default)
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


# The names that checkpoints give to our activations; the first three are one function.
ACTIVATION_NAMES: dict[str, Activation] = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu": "gelu",
    "relu": "relu",
}


def activation(raw: Raw, name: str, default: Activation | None = None) -> Activation:
    value = raw.get(name, default)
    if not isinstance(value, str) or value not in ACTIVATION_NAMES:
        raise ValueError(f"{name} {value!r} is not supported, only {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[value]


def canonical(raw: Raw, aliases: Mapping[str, str]) -> Raw:
    """`raw` with its aliases renamed. ValueError when a field and its alias contradict each other."""
    renamed = dict(raw)
    for alias, name in aliases.items():
        if alias in renamed:
            value = renamed.pop(alias)
            if renamed.setdefault(name, value) != value:
                raise ValueError(f"{alias} is {value!r} but {name}, the same thing, is {renamed[name]!r}")
    return renamed


# Fields that would change the maths, each with the only value that is served; absent and null are fine too.
ONLY = {
    "add_cross_attention": False,
    "attention_head_type": "multihead",  # SantaCoder calls itself gpt2 and has a single key head
    "auto_map": {},  # code of its own
    "is_causal": True,
    "is_encoder_decoder": False,
    "learned_embeddings": True,
    "mup_embeddings_scale": 1,
    "mup_output_alpha": 1,
    "mup_scale_qk_dot_by_d": False,
    "mup_width_scale": 1,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
    "quantization_config": {},
    "scale_embeddings": False,
    "sliding_window": None,
}


def refuse_unserved(raw: Raw) -> None:
    """ValueError naming the first field that asks for maths that gpt.py does not do."""
    for name, only in ONLY.items():
        value = raw.get(name)
        if value is not None and value != only:
            raise ValueError(f"{name} {value!r} is not supported, only {only!r}")


class Source(NamedTuple):
    """The stored tensors that make up one parameter, one below the other; {i} stands for the layer."""

    keys: tuple[str, ...]
    transposed: bool = False


def same(key: str) -> Source:
    return Source((key,))


def transposed(key: str) -> Source:
    """GPT-2's Conv1D keeps its weights as (in, out)."""
    return Source((key,), transposed=True)


def stacked(*keys: str) -> Source:
    """Separate projections, which we compute as one matrix."""
    return Source(keys)


def gpt2_config(raw: Raw) -> GPTConfig:
    """GPT-2 and Cerebras-GPT, which is a GPT-2 with the exact GELU.

    `reorder_and_upcast_attn` is not read: scores are always summed up in fp32 here, which is what it asks for.
    """
    raw = canonical(
        raw,
        {
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
    )
    width = integer(raw, "n_embd")
    return GPTConfig(
        vocab_size=integer(raw, "vocab_size"),
        n_positions=integer(raw, "n_positions"),
        n_embd=width,
        n_layer=integer(raw, "n_layer"),
        n_head=integer(raw, "n_head"),
        n_inner=integer(raw, "n_inner", 4 * width),
        activation=activation(raw, "activation_function", "gelu_new"),
        softmax_scale=None if flag(raw, "scale_attn_weights", True) else 1.0,
        scale_by_inverse_layer=flag(raw, "scale_attn_by_inverse_layer_idx", False),
        norm_eps=number(raw, "layer_norm_epsilon", 1e-5),
        tied_head=flag(raw, "tie_word_embeddings", True),
    )


GPT2 = {
    "wte.weight": same("wte.weight"),
    "wpe.weight": same("wpe.weight"),
    "h.{i}.ln_1.weight": same("h.{i}.ln_1.weight"),
    "h.{i}.ln_1.bias": same("h.{i}.ln_1.bias"),
    "h.{i}.attn.c_attn.weight": transposed("h.{i}.attn.c_attn.weight"),
    "h.{i}.attn.c_attn.bias": same("h.{i}.attn.c_attn.bias"),
    "h.{i}.attn.c_proj.weight": transposed("h.{i}.attn.c_proj.weight"),
    "h.{i}.attn.c_proj.bias": same("h.{i}.attn.c_proj.bias"),
    "h.{i}.ln_2.weight": same("h.{i}.ln_2.weight"),
    "h.{i}.ln_2.bias": same("h.{i}.ln_2.bias"),
    "h.{i}.mlp.c_fc.weight": transposed("h.{i}.mlp.c_fc.weight"),
    "h.{i}.mlp.c_fc.bias": same("h.{i}.mlp.c_fc.bias"),
    "h.{i}.mlp.c_proj.weight": transposed("h.{i}.mlp.c_proj.weight"),
    "h.{i}.mlp.c_proj.bias": same("h.{i}.mlp.c_proj.bias"),
    "ln_f.weight": same("ln_f.weight"),
    "ln_f.bias": same("ln_f.bias"),
    "lm_head.weight": same("lm_head.weight"),
}


NEO_KINDS: dict[str, PatternKind] = {"global": "dense", "local": "banded"}


def neo_attention(raw: Raw, num_layers: int) -> tuple[PatternKind, ...]:
    """`attention_types`, [[["global", "local"], 12]] for 24 layers in turn, written out layer by layer."""
    types: Any = [[["global", "local"], 12]] if raw.get("attention_types") is None else raw["attention_types"]
    try:
        layers = [name for names, count in types for _ in range(count) for name in names]
        kinds = tuple(NEO_KINDS[name] for name in layers)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"attention_types must be like [[['global', 'local'], 12]], got {types!r}") from error
    if len(layers) != num_layers:
        raise ValueError(f"attention_types describes {len(layers)} layers, num_layers is {num_layers}")
    if raw.get("attention_layers") not in (None, layers):
        raise ValueError(f"attention_layers {raw['attention_layers']!r} contradicts attention_types {types!r}")
    return kinds


def gpt_neo_config(raw: Raw) -> GPTConfig:
    """GPT-Neo: scores are not scaled, and q, k and v have no bias. Its local layers are our banded ones."""
    raw = canonical(raw, {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"})
    width, num_layers = integer(raw, "hidden_size"), integer(raw, "num_layers")
    attention = neo_attention(raw, num_layers)
    return GPTConfig(
        vocab_size=integer(raw, "vocab_size"),
        n_positions=integer(raw, "max_position_embeddings"),
        n_embd=width,
        n_layer=num_layers,
        n_head=integer(raw, "num_heads"),
        n_inner=integer(raw, "intermediate_size", 4 * width),
        attention=attention,
        band=integer(raw, "window_size", 256) if "banded" in attention else None,
        activation=activation(raw, "activation_function", "gelu_new"),
        softmax_scale=1.0,
        qkv_bias=False,
        norm_eps=number(raw, "layer_norm_epsilon", 1e-5),
        tied_head=flag(raw, "tie_word_embeddings", True),
    )


GPT_NEO = {
    "wte.weight": same("wte.weight"),
    "wpe.weight": same("wpe.weight"),
    "h.{i}.ln_1.weight": same("h.{i}.ln_1.weight"),
    "h.{i}.ln_1.bias": same("h.{i}.ln_1.bias"),
    "h.{i}.attn.c_attn.weight": stacked(
        "h.{i}.attn.attention.q_proj.weight",
        "h.{i}.attn.attention.k_proj.weight",
        "h.{i}.attn.attention.v_proj.weight",
    ),
    "h.{i}.attn.c_proj.weight": same("h.{i}.attn.attention.out_proj.weight"),
    "h.{i}.attn.c_proj.bias": same("h.{i}.attn.attention.out_proj.bias"),
    "h.{i}.ln_2.weight": same("h.{i}.ln_2.weight"),
    "h.{i}.ln_2.bias": same("h.{i}.ln_2.bias"),
    "h.{i}.mlp.c_fc.weight": same("h.{i}.mlp.c_fc.weight"),
    "h.{i}.mlp.c_fc.bias": same("h.{i}.mlp.c_fc.bias"),
    "h.{i}.mlp.c_proj.weight": same("h.{i}.mlp.c_proj.weight"),
    "h.{i}.mlp.c_proj.bias": same("h.{i}.mlp.c_proj.bias"),
    "ln_f.weight": same("ln_f.weight"),
    "ln_f.bias": same("ln_f.bias"),
    "lm_head.weight": same("lm_head.weight"),
}


def opt_config(raw: Raw) -> GPTConfig:
    """OPT: positions start at row 2 of their table, and the epsilon of its norms is always 1e-5.

    OPT-350m normalises after the residual sums, has no final norm and projects its narrower token embedding.
    """
    width = integer(raw, "hidden_size")
    token_width = integer(raw, "word_embed_proj_dim", width)
    bias, pre_norm = flag(raw, "enable_bias", True), flag(raw, "do_layer_norm_before", True)
    return GPTConfig(
        vocab_size=integer(raw, "vocab_size"),
        n_positions=integer(raw, "max_position_embeddings"),
        n_embd=width,
        n_layer=integer(raw, "num_hidden_layers"),
        n_head=integer(raw, "num_attention_heads"),
        n_inner=integer(raw, "ffn_dim"),
        activation=activation(raw, "activation_function", "relu"),
        qkv_bias=bias,
        bias=bias,
        norm_affine=flag(raw, "layer_norm_elementwise_affine", True),
        pre_norm=pre_norm,
        final_norm=pre_norm and not flag(raw, "_remove_final_layer_norm", False),
        position_offset=2,
        embedding_width=None if token_width == width else token_width,
        tied_head=flag(raw, "tie_word_embeddings", True),
    )


OPT = {
    "wte.weight": same("embed_tokens.weight"),
    "wpe.weight": same("embed_positions.weight"),
    "project_in.weight": same("project_in.weight"),
    "project_out.weight": same("project_out.weight"),
    "h.{i}.ln_1.weight": same("layers.{i}.self_attn_layer_norm.weight"),
    "h.{i}.ln_1.bias": same("layers.{i}.self_attn_layer_norm.bias"),
    "h.{i}.attn.c_attn.weight": stacked(
        "layers.{i}.self_attn.q_proj.weight",
        "layers.{i}.self_attn.k_proj.weight",
        "layers.{i}.self_attn.v_proj.weight",
    ),
    "h.{i}.attn.c_attn.bias": stacked(
        "layers.{i}.self_attn.q_proj.bias",
        "layers.{i}.self_attn.k_proj.bias",
        "layers.{i}.self_attn.v_proj.bias",
    ),
    "h.{i}.attn.c_proj.weight": same("layers.{i}.self_attn.out_proj.weight"),
    "h.{i}.attn.c_proj.bias": same("layers.{i}.self_attn.out_proj.bias"),
    "h.{i}.ln_2.weight": same("layers.{i}.final_layer_norm.weight"),
    "h.{i}.ln_2.bias": same("layers.{i}.final_layer_norm.bias"),
    "h.{i}.mlp.c_fc.weight": same("layers.{i}.fc1.weight"),
    "h.{i}.mlp.c_fc.bias": same("layers.{i}.fc1.bias"),
    "h.{i}.mlp.c_proj.weight": same("layers.{i}.fc2.weight"),
    "h.{i}.mlp.c_proj.bias": same("layers.{i}.fc2.bias"),
    "ln_f.weight": same("final_layer_norm.weight"),
    "ln_f.bias": same("final_layer_norm.bias"),
    "lm_head.weight": same("lm_head.weight"),
}


def attention_kinds(raw: Raw, name: str) -> tuple[str, ...]:
    value = raw.get(name)
    if not isinstance(value, list) or not all(isinstance(kind, str) for kind in value):
        raise ValueError(f"{name} must be a list of names, got {value!r}")
    return tuple(value)


def optional(read: Callable[[Raw, str], Any]) -> Callable[[Raw, str], Any]:
    return lambda raw, name: None if name in raw and raw[name] is None else read(raw, name)


def if_given(read: Callable[[Raw, str], Any]) -> Callable[[Raw, str], Any]:
    """For fields that checkpoints written before they came don't have."""
    return lambda raw, name: None if raw.get(name) is None else read(raw, name)


BANDED_FIELDS: dict[str, Callable[[Raw, str], Any]] = {
    "vocab_size": integer,
    "n_positions": integer,
    "n_embd": integer,
    "n_layer": integer,
    "n_head": integer,
    "n_inner": integer,
    "attention": attention_kinds,
    "band": optional(integer),
    "stride": if_given(integer),
    "summary": if_given(integer),
    "activation": activation,
    "softmax_scale": optional(number),
    "scale_by_inverse_layer": flag,
    "qkv_bias": flag,
    "bias": flag,
    "norm_affine": flag,
    "norm_eps": number,
    "pre_norm": flag,
    "final_norm": flag,
    "position_offset": integer,
    "embedding_width": optional(integer),
    "tied_head": flag,
}


def banded_config(raw: Raw) -> GPTConfig:
    """Our own, as save_model writes it: every field of GPTConfig and no other but the tokenizer's."""
    unknown = raw.keys() - BANDED_FIELDS.keys() - {"model_type", *TEXT_FIELDS}
    if unknown:
        raise ValueError(f"unknown field {few(sorted(unknown))}")
    return GPTConfig(**{name: read(raw, name) for name, read in BANDED_FIELDS.items()})


BANDED = {name: same(name) for name in (*GPT2, "project_in.weight", "project_out.weight")}


class Architecture(NamedTuple):
    """How checkpoints of one model_type are read."""

    config: Callable[[Raw], GPTConfig]
    sources: Mapping[str, Source]
    # What may stand before every key but the head's, depending on which class wrote the file.
    roots: tuple[str, ...] = ()
    # Keys, without root, of what old files hold beside the weights: masks and format versions.
    ignored: str = ""


ARCHITECTURES = {
    "banded": Architecture(banded_config, BANDED),
    "gpt2": Architecture(gpt2_config, GPT2, ("transformer.",), r"h\.\d+\.attn\.(masked_)?bias"),
    "gpt_neo": Architecture(gpt_neo_config, GPT_NEO, ("transformer.",), r"h\.\d+\.attn\.attention\.(masked_)?bias"),
    "opt": Architecture(opt_config, OPT, ("model.decoder.", "decoder."), "version"),
}


class StoredTensor(NamedTuple):
    """A tensor in an open file, not read yet."""

    file: Path
    key: str
    handle: Any

    def read(self) -> Tensor:
        tensor: Tensor = self.handle.get_tensor(self.key)
        return tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.handle.get_slice(self.key).get_shape())

    @property
    def dtype(self) -> str:
        """As safetensors spells it: F32, BF16."""
        return str(self.handle.get_slice(self.key).get_dtype())


def read_config(directory: Path) -> GPTConfig:
    """The dimensions of the model in `directory`.

    Raises CheckpointError naming the file and the field that is missing, malformed or asks for what is not served.
    """
    return read_architecture(directory)[1]


def load_model(directory: Path, dtype: torch.dtype, device: torch.device = CPU) -> GPT:
    """The model in `directory`, ready for inference, its weights cast to `dtype` one by one on `device`.

    Every weight is allocated once; the files are mapped, and let go of before this returns. Raises CheckpointError,
    before the first weight is read, when tensors are missing, left over or of another shape than config.json says.
    """
    architecture, config = read_architecture(directory)
    with torch.device("meta"):
        model = GPT(config)
    with ExitStack() as open_files:
        stored = open_tensors(weight_files(directory), architecture, open_files)
        head = stored.pop("lm_head.weight", None) if config.tied_head else None
        sources = layer_by_layer(architecture.sources, config.n_layer)
        sources = {name: sources[name] for name, _ in model.named_parameters()}
        check_keys(directory, sources, stored)
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


def read_architecture(directory: Path) -> tuple[Architecture, GPTConfig]:
    """What kind of checkpoint `directory` holds, and its dimensions."""
    if not directory.exists():
        raise CheckpointError(f"{directory}: no such directory")
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; a model is a directory with {CONFIG_FILE} and {WEIGHTS_FILE}")
    path = directory / CONFIG_FILE
    if not path.exists():
        raise CheckpointError(f"{directory} holds no {CONFIG_FILE}")
    raw = read_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{path}: model_type {model_type!r} is not supported, only {supported}")
    architecture = ARCHITECTURES[model_type]
    try:
        refuse_unserved(raw)
        return architecture, architecture.config(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or not JSON
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of `directory`: the single one, or the shards that its index names."""
    if (directory / WEIGHTS_FILE).exists():
        return [directory / WEIGHTS_FILE]
    if (directory / INDEX_FILE).exists():
        return shard_files(directory / INDEX_FILE)
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} holds {few(pickles)} but no {WEIGHTS_FILE}. A pickle can run code and is never opened here; "
            "where you trust it, convert it once with transformers: "
            "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
        )
    raise CheckpointError(f"{directory} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")


def weights_digest(directory: Path) -> str:
    """A hash of the bytes of the weight files, which is the same in whatever dtype they are loaded."""
    digest = hashlib.sha256()
    for path in weight_files(directory):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def shard_files(index: Path) -> list[Path]:
    """The files that `index` names, all of them beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must map tensors to files, got {weight_map!r}")
    names = sorted(set(map(str, weight_map.values())))
    strangers = [name for name in names if Path(name).name != name]
    if strangers:
        raise CheckpointError(f"{index} names {few(strangers)}: not a file of this directory")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} names {few(missing)}, which {'is' if len(missing) == 1 else 'are'} not there")
    return [index.parent / name for name in names]


def open_tensors(files: Iterable[Path], architecture: Architecture, open_files: ExitStack) -> dict[str, StoredTensor]:
    """The tensors in `files` by key, without root and without what is ignored, readable until `open_files` closes."""
    stored: dict[str, StoredTensor] = {}
    for file in files:
        try:
            handle = open_files.enter_context(safe_open(file, "pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} can't be read as safetensors: {error}") from error
        for key in handle.keys():  # noqa: SIM118 - not a mapping
            name = without_root(key, architecture.roots)
            if re.fullmatch(architecture.ignored, name):
                continue
            if name in stored:
                first = stored[name]
                raise CheckpointError(f"{file} holds {key}, and {first.file.name} holds it too, as {first.key}")
            stored[name] = StoredTensor(file, key, handle)
    return stored


def without_root(key: str, roots: Iterable[str]) -> str:
    root = next((root for root in roots if key.startswith(root)), "")
    return key.removeprefix(root)


def layer_by_layer(sources: Mapping[str, Source], n_layer: int) -> dict[str, Source]:
    """`sources` with every {i} written out as 0, 1, ... n_layer - 1."""
    return {
        name.format(i=i): Source(tuple(key.format(i=i) for key in source.keys), source.transposed)
        for name, source in sources.items()
        for i in range(n_layer if "{i}" in name else 1)
    }


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
    """A parameter of `shape`: the tensors of `source` one below the other, then zeros, the padding of a vocabulary."""
    parameter = torch.empty(shape, dtype=dtype, device=device)
    row = 0
    for key in source.keys:
        tensor = stored[key].read()
        tensor = tensor.T if source.transposed else tensor
        parameter[row : row + len(tensor)] = tensor
        row += len(tensor)
    parameter[row:] = 0
    return parameter


def save_model(directory: Path, model: GPT, dtype: torch.dtype, *, origin: Path | None = None) -> None:
    """Write config.json and model.safetensors, each replaced atomically, weights in `dtype`.

    `origin` is the checkpoint that the model began as: its tokenizer, prompt format and chat template come along.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "banded", **dataclasses.asdict(model.config)}
    if origin is not None:
        raw = read_json(origin / CONFIG_FILE)
        config |= {name: raw[name] for name in TEXT_FIELDS if name in raw}
        for name in TEXT_FILES:
            if (origin / name).exists():
                write_atomically(directory / name, (origin / name).read_bytes())
    write_atomically(directory / CONFIG_FILE, json.dumps(config, indent=2).encode() + b"\n")
    tensors = {
        name: unpadded(name, tensor, model.config).to(dtype).contiguous() for name, tensor in model.state_dict().items()
    }
    write_tensors(directory / WEIGHTS_FILE, tensors)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace `path` atomically, readable for whom other new files are: safetensors makes them their owner's only, which
    is seldom who serves them."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    save_file(dict(tensors), temporary, metadata={"format": "pt"})
    temporary.chmod(mode)
    os.replace(temporary, path)


def write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
