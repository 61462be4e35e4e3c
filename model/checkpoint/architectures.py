"""What the checkpoints of each architecture look like: the fields of their config.json and the names of their tensors."""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from kernels.names import Activation, PatternKind
from model.checkpoint.files import CONFIG_FILE, CheckpointError, Json, conversion, few, read_json
from model.config import GPTConfig

WEIGHTS_FILE = "model.safetensors"
# Fields of config.json about text, not about the decoder.
TEXT_FIELDS = ("bos_token_id", "eos_token_id")


def integer(raw: Json, name: str, default: int | None = None) -> int:
    """A whole number. Absent or null means `default`; ValueError when there is none."""
    value = default if raw.get(name) is None else raw[name]
    if value is None:
        raise ValueError(f"{name} is missing")
    if type(value) is not int:
        raise ValueError(f"{name} must be a whole number, got {value!r:.80}")
    return value


def number(raw: Json, name: str, default: float | None = None) -> float:
    """A positive number, `default` when absent."""
    value: Any = raw.get(name, default)
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} must be a positive number, got {value!r:.80}")
    return float(value)


def flag(raw: Json, name: str, default: bool | None = None) -> bool:
    """True or false, `default` when absent."""
    value = raw.get(name, default)
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, got {value!r:.80}")
    return value


# The names that checkpoints give to our activations; the first three are one function.
ACTIVATION_NAMES: dict[str, Activation] = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu": "gelu",
    "relu": "relu",
}


def activation(raw: Json, name: str, default: Activation | None = None) -> Activation:
    value = raw.get(name, default)
    if not isinstance(value, str) or value not in ACTIVATION_NAMES:
        raise ValueError(f"{name} {value!r:.80} is not supported, only {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[value]


def canonical(raw: Json, aliases: Mapping[str, str]) -> Json:
    """`raw` with its aliases renamed. ValueError when a field and its alias contradict each other."""
    renamed = dict(raw)
    for alias, name in aliases.items():
        if alias in renamed:
            value = renamed.pop(alias)
            if renamed.setdefault(name, value) != value:
                raise ValueError(f"{alias} is {value!r:.80} but {name}, the same thing, is {renamed[name]!r:.80}")
    return renamed


# Fields that would change the maths, each with the only value that we serve. They may be absent or null.
ONLY = {
    "add_cross_attention": False,
    "attention_head_type": "multihead",  # SantaCoder calls itself gpt2 and has a single key head
    "auto_map": {},  # the checkpoint brings its own code
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


# Tensors of heads that other tasks put on a decoder: classes, answers, rewards. The logits of the next token need none.
OTHER_HEADS = r"(classifier|multiple_choice_head|qa_outputs|reward_head|score|v_head|value_head)\..+"


def refuse_unserved(raw: Json) -> None:
    """ValueError naming the first field for which gpt.py lacks the maths."""
    for name, only in ONLY.items():
        value = raw.get(name)
        if value is not None and value != only:
            raise ValueError(f"{name} {value!r:.80} is not supported, only {only!r}")


class Source(NamedTuple):
    """The stored modules, or tensors, whose rows make up one of ours, in this order; {i} stands for the layer."""

    keys: tuple[str, ...]
    transposed: bool = False


def sizes(raw: Json, positions: str, width: str, layers: str, heads: str) -> dict[str, Any]:
    """The five sizes that every architecture has. Only `vocab_size` has the same name in all of them."""
    names = {"vocab_size": "vocab_size", "n_positions": positions, "n_embd": width, "n_layer": layers, "n_head": heads}
    return {field: integer(raw, name) for field, name in names.items()}


def gpt2_config(raw: Json) -> GPTConfig:
    """GPT-2 and Cerebras-GPT, which is a GPT-2 with the exact GELU.

    `reorder_and_upcast_attn` is not read: it asks for scores in fp32, and here they always are.
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
    return GPTConfig(
        **sizes(raw, "n_positions", "n_embd", "n_layer", "n_head"),
        n_inner=integer(raw, "n_inner", 4 * integer(raw, "n_embd")),
        activation=activation(raw, "activation_function", "gelu_new"),
        softmax_scale=None if flag(raw, "scale_attn_weights", True) else 1.0,
        scale_by_inverse_layer=flag(raw, "scale_attn_by_inverse_layer_idx", False),
        norm_eps=number(raw, "layer_norm_epsilon", 1e-5),
        tied_head=flag(raw, "tie_word_embeddings", True),
    )


# The modules of gpt.py that have parameters. Our own checkpoints call them the same.
LINEARS = ("h.{i}.attn.c_attn", "h.{i}.attn.c_proj", "h.{i}.mlp.c_fc", "h.{i}.mlp.c_proj")
OTHERS = ("wte", "wpe", "project_in", "project_out", "h.{i}.ln_1", "h.{i}.ln_2", "ln_f", "lm_head")
BANDED = {name: Source((name,)) for name in LINEARS + OTHERS}
# GPT-2's Conv1D keeps its weights as (in, out).
GPT2 = BANDED | {name: Source((name,), transposed=True) for name in LINEARS}

NEO_KINDS: dict[str, PatternKind] = {"global": "dense", "local": "banded"}


def neo_attention(raw: Json, num_layers: int) -> tuple[PatternKind, ...]:
    """`attention_types`, [[["global", "local"], 12]] for 24 layers in turn, written out layer by layer."""
    types: Any = [[["global", "local"], 12]] if raw.get("attention_types") is None else raw["attention_types"]
    try:
        total = sum(len(names) * max(count, 0) for names, count in types)
        layers = [name for names, count in types for _ in range(count) for name in names] if total == num_layers else []
        kinds = tuple(NEO_KINDS[name] for name in layers)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"attention_types must be like [[['global', 'local'], 12]], got {types!r:.80}") from error
    if total != num_layers:
        raise ValueError(f"attention_types describes {total!s:.20} layers, num_layers is {num_layers}")
    if raw.get("attention_layers") not in (None, layers):
        raise ValueError(f"attention_layers {raw['attention_layers']!r:.80} contradicts attention_types {types!r:.80}")
    return kinds


def gpt_neo_config(raw: Json) -> GPTConfig:
    """GPT-Neo: scores are not scaled, and q, k and v have no bias. Its local layers are our banded ones."""
    raw = canonical(raw, {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"})
    attention = neo_attention(raw, integer(raw, "num_layers"))
    return GPTConfig(
        **sizes(raw, "max_position_embeddings", "hidden_size", "num_layers", "num_heads"),
        n_inner=integer(raw, "intermediate_size", 4 * integer(raw, "hidden_size")),
        attention=attention,
        band=integer(raw, "window_size", 256) if "banded" in attention else None,
        activation=activation(raw, "activation_function", "gelu_new"),
        softmax_scale=1.0,
        qkv_bias=False,
        norm_eps=number(raw, "layer_norm_epsilon", 1e-5),
        tied_head=flag(raw, "tie_word_embeddings", True),
    )


# Separate projections, which we compute as one matrix.
GPT_NEO = BANDED | {
    "h.{i}.attn.c_attn": Source(tuple(f"h.{{i}}.attn.attention.{name}_proj" for name in "qkv")),
    "h.{i}.attn.c_proj": Source(("h.{i}.attn.attention.out_proj",)),
}


def opt_config(raw: Json) -> GPTConfig:
    """OPT: positions start at row 2 of their table, and the epsilon of its norms is always 1e-5.

    OPT-350m normalises after the residual sums, has no final norm and projects its narrower token embedding.
    """
    width = integer(raw, "hidden_size")
    token_width = integer(raw, "word_embed_proj_dim", width)
    bias, pre_norm = flag(raw, "enable_bias", True), flag(raw, "do_layer_norm_before", True)
    return GPTConfig(
        **sizes(raw, "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads"),
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


OPT = BANDED | {
    "wte": Source(("embed_tokens",)),
    "wpe": Source(("embed_positions",)),
    "h.{i}.ln_1": Source(("layers.{i}.self_attn_layer_norm",)),
    "h.{i}.attn.c_attn": Source(tuple(f"layers.{{i}}.self_attn.{name}_proj" for name in "qkv")),
    "h.{i}.attn.c_proj": Source(("layers.{i}.self_attn.out_proj",)),
    "h.{i}.ln_2": Source(("layers.{i}.final_layer_norm",)),
    "h.{i}.mlp.c_fc": Source(("layers.{i}.fc1",)),
    "h.{i}.mlp.c_proj": Source(("layers.{i}.fc2",)),
    "ln_f": Source(("final_layer_norm",)),
}


def attention_kinds(raw: Json, name: str) -> tuple[str, ...]:
    value = raw.get(name)
    if not isinstance(value, list) or not all(isinstance(kind, str) for kind in value):
        raise ValueError(f"{name} must be a list of names, got {value!r:.80}")
    return tuple(value)


def optional(read: Callable[[Json, str], Any]) -> Callable[[Json, str], Any]:
    """Null is None. The field must be there."""
    return lambda raw, name: None if name in raw and raw[name] is None else read(raw, name)


READERS: dict[Any, Callable[[Json, str], Any]] = {
    int: integer,
    float: number,
    bool: flag,
    int | None: optional(integer),
    float | None: optional(number),
    Activation: activation,
    tuple[PatternKind, ...]: attention_kinds,
}
BANDED_FIELDS = {name: READERS[hint] for name, hint in get_type_hints(GPTConfig).items()}


def banded_config(raw: Json) -> GPTConfig:
    """Our own, as save_model writes it: every field of GPTConfig, those about text, and no other."""
    unknown = raw.keys() - BANDED_FIELDS.keys() - {"model_type", *TEXT_FIELDS}
    if unknown:
        raise ValueError(f"unknown field {few(sorted(unknown))}")
    raw = {"stride": None, "summary": None, **raw}  # older checkpoints lack the fields of sparse patterns
    return GPTConfig(**{name: read(raw, name) for name, read in BANDED_FIELDS.items()})


class Architecture(NamedTuple):
    """How checkpoints of one model_type are read."""

    config: Callable[[Json], GPTConfig]
    modules: Mapping[str, Source]
    # What may precede every key but the head's, depending on the class that wrote the file.
    roots: tuple[str, ...] = ()
    # Keys, without root, that old files hold in addition to the weights: masks and format versions.
    ignored: str = ""

    def source_of(self, parameter: str) -> Source:
        """The stored tensors that make up a parameter of the model, h.3.attn.c_attn.bias for example."""
        module, kind = parameter.rsplit(".", 1)
        layer = "".join(re.findall(r"^h\.(\d+)", module))
        keys, transposed = self.modules[re.sub(r"^h\.\d+", "h.{i}", module)]
        return Source(tuple(f"{key.format(i=layer)}.{kind}" for key in keys), transposed and kind == "weight")


ARCHITECTURES = {
    "banded": Architecture(banded_config, BANDED),
    "gpt2": Architecture(gpt2_config, GPT2, ("transformer.",), r"h\.\d+\.attn\.(masked_)?bias"),
    "gpt_neo": Architecture(gpt_neo_config, GPT_NEO, ("transformer.",), r"h\.\d+\.attn\.attention\.(masked_)?bias"),
    "opt": Architecture(opt_config, OPT, ("model.decoder.", "decoder."), "version"),
}


def read_architecture(directory: Path) -> tuple[Architecture, GPTConfig]:
    """What kind of checkpoint `directory` holds, and the model's dimensions.

    Raises CheckpointError naming the file and the field that is missing, malformed or asks for what is not served.
    """
    if not directory.exists():
        raise CheckpointError(f"{directory}: no such directory")
    if not directory.is_dir():
        expected = f"a model is a directory with {CONFIG_FILE} and {WEIGHTS_FILE}"
        raise CheckpointError(f"{directory} is a file; {expected}{conversion(directory)}")
    path = directory / CONFIG_FILE
    if not path.exists():
        raise CheckpointError(f"{directory} holds no {CONFIG_FILE}{conversion(directory)}")
    raw = read_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{path}: model_type {model_type!r:.80} is not supported, only {supported}")
    architecture = ARCHITECTURES[model_type]
    try:
        refuse_unserved(raw)
        return architecture, architecture.config(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
