"""Adapters that PEFT saved change the logits as PEFT itself does. What can't be served is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels import torch_ops
from model.attention import TrainingAttention
from model.checkpoint.architectures import read_architecture
from model.checkpoint.files import CheckpointError
from model.checkpoint.weights import load_model
from model.lora import Adapter, adapt_all
from model.peft import load_peft_adapter
from tests.model.checkpoint.checkpoints import tiny
from tests.model.peft_models import wrapped

TOKENS = torch.randint(331, (2, 40), generator=torch.Generator().manual_seed(3))


def load(base: Path, directory: Path) -> Adapter:
    return load_peft_adapter(directory, load_model(base, torch.float32), read_architecture(base)[0])


@torch.no_grad()
def our_logits(base: Path, adapter: Adapter | None) -> Tensor:
    model = load_model(base, torch.float32)
    adapt = None if adapter is None else adapt_all(adapter)
    hidden = model(TOKENS, torch.arange(40), TrainingAttention(model.config), torch_ops, adapt)
    return model.logits(hidden, torch_ops)


GPT2 = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2 | {"r": 5, "lora_alpha": 9}),
    "gpt2, every linear": ("gpt2", {"r": 3, "target_modules": "all-linear", "fan_in_fan_out": True}),
    "gpt2, rank-stabilised, one layer": ("gpt2", GPT2 | {"r": 7, "use_rslora": True, "layers_to_transform": [1]}),
    "gpt2, patterns": (
        "gpt2",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["c_attn", "c_fc", "attn.c_proj"],
            "fan_in_fan_out": True,
            "rank_pattern": {"h.1.attn.c_attn": 9, "c_fc": 2},
            "alpha_pattern": {"^transformer.h.0.attn.c_attn": 40, r".*\.[12]\..*c_proj": 3},
        },
    ),
    "gpt2, a regular expression": ("gpt2", {"r": 2, "target_modules": r".*\.[02]\.mlp\.c_proj", "fan_in_fan_out": True}),
    "gpt_neo, q and v": ("gpt_neo", {"r": 6, "target_modules": ["q_proj", "v_proj"]}),
    "gpt_neo, k alone and the rest": ("gpt_neo", {"r": 2, "target_modules": ["k_proj", "out_proj", "c_fc", "c_proj"]}),
    "opt, q and v": ("opt", {"r": 40, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]}),
    "opt, all, ranks that differ": (
        "opt",
        {"r": 3, "target_modules": "all-linear", "rank_pattern": {"q_proj": 8, "v_proj": 1}, "use_rslora": True},
    ),
    "opt-350m": ("opt-350m", {"r": 3, "target_modules": ["k_proj", "v_proj", "fc1", "fc2"]}),
}


@pytest.mark.parametrize(("arch", "fields"), CASES.values(), ids=CASES.keys())
@pytest.mark.filterwarnings("ignore")
def test_logits_are_those_of_peft(arch: str, fields: dict[str, Any], tmp_path: Path) -> None:
    base = tiny(arch, tmp_path)
    adapted = wrapped(base, **fields)
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(TOKENS).logits
    found = our_logits(base, load(base, tmp_path / "adapter"))
    assert (found - expected).abs().max() <= 2e-4 * expected.std()
    assert (our_logits(base, None) - expected).abs().max() > 0.1 * expected.std()


def saved(tmp_path: Path, arch: str = "gpt2", **fields: Any) -> tuple[Path, Path]:
    base = tiny(arch, tmp_path)
    wrapped(base, **GPT2 | {"r": 3} | fields).save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] is not supported"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices \[1, 2\] is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"lora_bias": True}, "lora_bias True is not supported"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication .* is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported: it changes the model's own weights"),
        ({"something_new": {"x": 1}}, "something_new {'x': 1} is not supported"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported, only 'LORA'"),
        ({"r": None}, "r is missing"),
        ({"lora_alpha": -1}, "lora_alpha must be a positive number, got -1"),
        ({"use_rslora": 1}, "use_rslora must be true or false, got 1"),
        ({"rank_pattern": {"c_attn": "8"}}, "rank_pattern must map modules to positive numbers, got {'c_attn': '8'}"),
        ({"alpha_pattern": {"(": 8}}, r"alpha_pattern '\(' is no regular expression"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_fields_that_can_not_be_served(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    base, directory = saved(tmp_path)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(CheckpointError, match=f"adapter_config.json: {message}"):
        load(base, directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors | {"base_model.model.transformer.wte.lora_embedding_A": torch.ones(3, 331)},
            "base_model.model.transformer.wte.lora_embedding_A is not supported, only lora_A and lora_B of linear layers",
        ),
        (
            lambda tensors: tensors | {f"base_model.model.lm_head.lora_{side}.weight": torch.ones(3, 3) for side in "AB"},
            "holds lm_head.lora_A, lm_head.lora_B, for which the model has no place",
        ),
        (
            lambda tensors: tensors | {"base_model.model.transformer.h.3.attn.c_attn.lora_A.weight": torch.ones(3, 64)},
            "holds transformer.h.3.attn.c_attn.lora_A, for which the model has no place",
        ),
        (
            lambda tensors: {name: tensor for name, tensor in tensors.items() if "h.0.attn.c_attn.lora_B" not in name},
            r"does not fit the model: transformer.h.0.attn.c_attn.lora_B is None, not \(192, 3\)",
        ),
        (
            lambda tensors: {name: tensor[:2] for name, tensor in tensors.items()},
            r"does not fit the model: transformer.h.0.attn.c_attn.lora_A is \(2, 64\), not \(3, 64\)",
        ),
        (lambda tensors: {}, "holds no adapter, for which the model has no place"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_can_not_be_served(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    base, directory = saved(tmp_path)
    path = directory / "adapter_model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(path)).items()}, path)
    with pytest.raises(CheckpointError, match=message):
        load(base, directory)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    _, directory = saved(tmp_path)
    wider = tiny("gpt2", tmp_path / "wider", n_embd=128)
    with pytest.raises(CheckpointError, match=r"c_attn.lora_A is \(3, 64\), not \(3, 128\)"):
        load(wider, directory)
    other = tiny("opt", tmp_path)
    with pytest.raises(CheckpointError, match=r"holds transformer.h.0.attn.c_attn.lora_A, .* has no place"):
        load(other, directory)


@pytest.mark.filterwarnings("ignore")
def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    base, directory = saved(tmp_path)
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match=r"adapter_model.bin is a pickle: save it by PEFT with safe_serialization=True"
    ):
        load(base, directory)
