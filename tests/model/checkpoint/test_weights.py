import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from safetensors.torch import save_model as save_whole
from torch import Tensor

from model.checkpoint.architectures import BANDED_FIELDS, read_architecture
from model.checkpoint.files import CheckpointError
from model.checkpoint.prompt_format import load_prompt_format
from model.checkpoint.tokenizer import r50k_base
from model.checkpoint.vocabulary import load_tokenizer
from model.checkpoint.weights import load_model, save_model
from model.config import GPTConfig
from model.gpt import GPT
from tests.model.checkpoint.checkpoints import FIELDS, tiny
from tests.model.checkpoint.vocabularies import spelled, write_vocabulary
from tests.model.logits import our_logits, transformers_logits

Tensors = dict[str, Tensor]
REMOVED = object()
HUGGING_FACE = [arch for arch in FIELDS if arch != "banded"]


def load(directory: Path) -> GPT:
    return load_model(directory, torch.float32)


def some_tokens(length: int) -> Tensor:
    return torch.randint(331, (2, length), generator=torch.Generator().manual_seed(1))


def edit_config(directory: Path, **fields: Any) -> Path:
    """Set fields of config.json, or remove those whose value is REMOVED."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not REMOVED}))
    return directory


def edit_tensors(directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    path = directory / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(path)).items()}, path)
    return directory


def refused(directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(directory)


# (architecture, fields, prompt length). With a band, the prompt is at least 3 bands long.
PARITY: dict[str, tuple[str, dict[str, Any], int]] = {
    "gpt2": ("gpt2", {}, 100),
    "gpt2, inverse layers, upcast": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        100,
    ),
    "gpt2, unscaled": ("gpt2", {"scale_attn_weights": False}, 100),
    "gpt2, unscaled, inverse layers": (
        "gpt2",
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        100,
    ),
    "gpt2, narrow, untied": ("gpt2", {"n_inner": 96, "tie_word_embeddings": False}, 100),
    "gpt2, large epsilon, relu": ("gpt2", {"layer_norm_epsilon": 0.5, "activation_function": "relu"}, 100),
    "gpt2, other tanh gelu": ("gpt2", {"activation_function": "gelu_fast"}, 100),
    "cerebras": ("cerebras", {}, 100),
    "gpt_neo": ("gpt_neo", {}, 100),
    "gpt_neo, all local": ("gpt_neo", {"attention_types": [[["local"], 4]], "window_size": 33}, 100),
    "gpt_neo, all global": ("gpt_neo", {"attention_types": [[["global"], 4]]}, 100),
    "gpt_neo, global global local": (
        "gpt_neo",
        {"attention_types": [[["global", "global", "local"], 1], [["local"], 1]], "window_size": 32},
        100,
    ),
    "gpt_neo, window of 1": ("gpt_neo", {"window_size": 1}, 64),
    "gpt_neo, window of 64": ("gpt_neo", {"window_size": 64}, 200),
    "gpt_neo, window larger than the prompt": ("gpt_neo", {"window_size": 128}, 100),
    "gpt_neo, narrow, gelu, untied": (
        "gpt_neo",
        {"intermediate_size": 96, "activation_function": "gelu", "tie_word_embeddings": False},
        100,
    ),
    "opt": ("opt", {}, 100),
    "opt, gelu, untied": ("opt", {"activation_function": "gelu", "tie_word_embeddings": False}, 100),
    "opt, no bias": ("opt", {"enable_bias": False}, 100),
    "opt, no affine norms": ("opt", {"layer_norm_elementwise_affine": False}, 100),
    "opt, neither": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}, 100),
    "opt, no final norm": ("opt", {"_remove_final_layer_norm": True}, 100),
    "opt, projected": ("opt", {"word_embed_proj_dim": 96}, 100),
    "opt-350m": ("opt-350m", {}, 100),
    "opt-350m, untied": ("opt-350m", {"tie_word_embeddings": False}, 100),
    "opt, norms after": ("opt", {"do_layer_norm_before": False}, 100),
}


@pytest.mark.parametrize(("arch", "fields", "length"), PARITY.values(), ids=PARITY.keys())
def test_logits_are_those_of_transformers(arch: str, fields: dict[str, Any], length: int, tmp_path: Path) -> None:
    directory, tokens = tiny(arch, tmp_path, **fields), some_tokens(length)
    expected = transformers_logits(directory, tokens)
    assert expected.std() > 0.5  # or agreement would mean little
    difference = (our_logits(directory, tokens) - expected).abs().max().item()
    assert difference <= 1e-4


def test_flags_that_change_the_maths_do_so_in_these_models(tmp_path: Path) -> None:
    """So the parity above means something: each flag moves the logits far beyond the tolerance."""
    tokens = some_tokens(64)
    base = our_logits(tiny("gpt2", tmp_path), tokens)
    for flag in ({"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}):
        changed = our_logits(edit_config(tiny("gpt2", tmp_path), **flag), tokens)
        assert (changed - base).abs().max() > 0.1
    assert torch.equal(our_logits(edit_config(tiny("gpt2", tmp_path), reorder_and_upcast_attn=True), tokens), base)


@pytest.mark.parametrize("arch", HUGGING_FACE)
def test_every_stored_tensor_reaches_the_logits(arch: str, tmp_path: Path) -> None:
    """No tensor can be dropped, or read in the place of another, without the parity tests noticing."""
    directory, tokens = tiny(arch, tmp_path), some_tokens(48)
    base, tensors = our_logits(directory, tokens), load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("k_proj.bias"):
            continue  # moves all scores of a query alike, which the softmax forgets
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
        edit_tensors(directory, lambda _, name=name, noise=noise: {**tensors, name: tensors[name] + noise})  # type: ignore[misc]
        assert (our_logits(directory, tokens) - base).abs().max() > 1e-2, name


# Other places for the same weights


@pytest.mark.parametrize("arch", HUGGING_FACE)
def test_shards_hold_the_same_weights(arch: str, tmp_path: Path) -> None:
    whole = load(tiny(arch, tmp_path / "whole"))
    sharded = tiny(arch, tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    for name, tensor in load(sharded).state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


@pytest.mark.parametrize(
    ("arch", "written", "root"),
    [
        ("gpt2", "transformer.", ""),
        ("cerebras", "transformer.", ""),
        ("gpt_neo", "transformer.", ""),
        ("opt", "model.decoder.", "decoder."),
        ("opt", "model.decoder.", ""),
        ("opt-350m", "model.decoder.", "decoder."),
    ],
)
def test_keys_may_lack_their_root(arch: str, written: str, root: str, tmp_path: Path) -> None:
    directory = tiny(arch, tmp_path)
    before = load(directory).state_dict()
    assert all(name.startswith(written) for name in load_file(directory / "model.safetensors"))
    edit_tensors(directory, lambda tensors: {root + name.removeprefix(written): t for name, t in tensors.items()})
    after = load(directory).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("arch", "legacy"),
    [
        ("gpt2", ["transformer.h.0.attn.bias", "h.2.attn.masked_bias"]),
        ("gpt_neo", ["transformer.h.0.attn.attention.bias", "transformer.h.3.attn.attention.masked_bias"]),
        ("opt", ["decoder.version"]),
    ],
)
def test_legacy_buffers_are_passed_over(arch: str, legacy: list[str], tmp_path: Path) -> None:
    directory = edit_tensors(tiny(arch, tmp_path), lambda tensors: {**tensors, **dict.fromkeys(legacy, torch.ones(1))})
    load(directory)


@pytest.mark.parametrize(
    ("arch", "embedding"),
    [
        ("gpt2", "transformer.wte.weight"),
        ("gpt_neo", "transformer.wte.weight"),
        ("opt", "model.decoder.embed_tokens.weight"),
        ("opt-350m", "model.decoder.embed_tokens.weight"),
    ],
)
def test_a_tied_head_may_be_repeated_but_not_differ(arch: str, embedding: str, tmp_path: Path) -> None:
    directory = tiny(arch, tmp_path)
    edit_tensors(directory, lambda tensors: {**tensors, "lm_head.weight": tensors[embedding]})
    assert load(directory).lm_head is None
    edit_tensors(directory, lambda tensors: {**tensors, "lm_head.weight": tensors[embedding] + 1})
    refused(directory, f"lm_head.weight differs from {embedding} though config.json ties them")


@pytest.mark.parametrize(
    ("arch", "class_name"),
    [
        ("gpt2", "GPT2LMHeadModel"),
        ("gpt_neo", "GPTNeoForCausalLM"),
        ("opt", "OPTForCausalLM"),
        ("opt-350m", "OPTForCausalLM"),
    ],
)
@pytest.mark.parametrize("kept", ["head", "embedding"])
def test_tied_weights_may_be_stored_under_either_name(arch: str, class_name: str, kept: str, tmp_path: Path) -> None:
    """As safetensors.torch.save_model writes them, which keeps the name that sorts first."""
    directory = tiny(arch, tmp_path)
    before = load(directory).state_dict()
    theirs = getattr(transformers, class_name).from_pretrained(directory)
    save_whole(theirs, str(directory / "model.safetensors"))
    if kept == "embedding":
        embedding = next(name for name, _ in theirs.named_parameters() if "wte" in name or "embed_tokens" in name)
        edit_tensors(directory, lambda t: {embedding if name == "lm_head.weight" else name: t[name] for name in t})
    assert ("lm_head.weight" in load_file(directory / "model.safetensors")) == (kept == "head")
    after = load(directory).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_tied_model_needs_one_of_both_names(tmp_path: Path) -> None:
    directory = edit_tensors(tiny("gpt2", tmp_path), lambda t: {n: t[n] for n in t if not n.endswith("wte.weight")})
    refused(directory, "lacks 1 tensor that config.json asks for: wte.weight$")


@pytest.mark.parametrize(
    ("arch", "class_name", "heads"),
    [
        ("gpt2", "GPT2ForSequenceClassification", "1 tensor of a head for another task: score.weight"),
        ("gpt2", "GPT2ForTokenClassification", "2 tensors of a head for another task: classifier.bias, classifier.weight"),
        ("gpt2", "GPT2ForQuestionAnswering", "2 tensors of a head for another task: qa_outputs.bias, qa_outputs.weight"),
        (
            "gpt2",
            "GPT2DoubleHeadsModel",
            "2 tensors of a head for another task: multiple_choice_head.summary.bias, multiple_choice_head.summary.weight",
        ),
        ("gpt_neo", "GPTNeoForSequenceClassification", "1 tensor of a head for another task: score.weight"),
        ("gpt_neo", "GPTNeoForTokenClassification", "classifier.bias, classifier.weight"),
        ("gpt_neo", "GPTNeoForQuestionAnswering", "qa_outputs.bias, qa_outputs.weight"),
        ("opt", "OPTForSequenceClassification", "1 tensor of a head for another task: score.weight"),
        ("opt", "OPTForQuestionAnswering", "qa_outputs.bias, qa_outputs.weight"),
        ("opt-350m", "OPTForSequenceClassification", "1 tensor of a head for another task: score.weight"),
    ],
)
def test_heads_of_other_tasks_are_left_out(
    arch: str, class_name: str, heads: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tiny(arch, tmp_path)
    before = load(directory).state_dict()
    assert caplog.text == ""
    getattr(transformers, class_name).from_pretrained(directory, num_labels=2).save_pretrained(directory)
    after = load(directory).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert heads in caplog.text


def test_a_value_head_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The keys are those of trl's AutoModelForCausalLMWithValueHead."""
    head = {"v_head.summary.weight": torch.ones(1, 64), "v_head.summary.bias": torch.ones(1)}
    load(edit_tensors(tiny("gpt2", tmp_path), lambda tensors: tensors | head))
    assert "gpt2: left out 2 tensors of a head for another task: v_head.summary.bias, v_head.summary.w" in caplog.text


@pytest.mark.parametrize(
    "aliases",
    [
        {"num_hidden_layers": 3, "n_layer": REMOVED},
        {"hidden_size": 64, "n_embd": REMOVED, "num_attention_heads": 4, "n_head": REMOVED},
        {"max_position_embeddings": 256},
    ],
)
def test_gpt2_fields_may_have_their_general_names(aliases: dict[str, Any], tmp_path: Path) -> None:
    directory = tiny("gpt2", tmp_path)
    expected = read_architecture(directory)
    assert read_architecture(edit_config(directory, **aliases)) == expected


# What is loaded


@pytest.mark.parametrize("arch", FIELDS)
def test_model_is_ready_for_inference(arch: str, tmp_path: Path) -> None:
    model = load_model(tiny(arch, tmp_path), torch.bfloat16)
    assert not model.training
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
        assert parameter.device.type == "cpu", name
        assert parameter.is_contiguous(), name
        assert not parameter.requires_grad, name


@pytest.mark.parametrize("arch", HUGGING_FACE)
def test_weights_are_cast_not_changed(arch: str, tmp_path: Path) -> None:
    directory = tiny(arch, tmp_path)
    full, half = load(directory).state_dict(), load_model(directory, torch.bfloat16).state_dict()
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in full.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_stored_floats_may_have_any_width(dtype: torch.dtype, tmp_path: Path) -> None:
    directory = tiny("gpt2", tmp_path)
    full = load(directory).state_dict()
    edit_tensors(directory, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    assert all(torch.equal(tensor, full[name].to(dtype).float()) for name, tensor in load(directory).state_dict().items())


@pytest.mark.parametrize("arch", ["banded", "gpt2", "opt-350m"])
def test_padding_rows_of_the_vocabulary_are_zero(arch: str, tmp_path: Path) -> None:
    untied: dict[str, Any] = {"tied_head" if arch == "banded" else "tie_word_embeddings": False}
    model = load(tiny(arch, tmp_path, **untied))
    assert model.lm_head is not None
    for rows in (model.wte.weight, model.lm_head.weight):
        assert rows.shape[0] == 384
        assert not rows[331:].any()
        assert rows[:331].any(-1).all()


def test_weights_do_not_depend_on_the_file_after_loading(tmp_path: Path) -> None:
    """A mapped file that is overwritten in place would change, or kill, the process that serves it."""
    directory = tiny("gpt2", tmp_path)
    model = load(directory)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (directory / "model.safetensors").open("r+b") as file:
        file.write(bytes(os.fstat(file.fileno()).st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Our own format


@pytest.mark.parametrize("arch", FIELDS)
def test_save_and_load_is_a_round_trip(arch: str, tmp_path: Path) -> None:
    model = load(tiny(arch, tmp_path))
    save_model(tmp_path / "saved", model, torch.float32)
    again = load(tmp_path / "saved")
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_saving_twice_replaces_the_first(tmp_path: Path) -> None:
    model = load(tiny("banded", tmp_path))
    save_model(tmp_path / "saved", model, torch.float32)
    model.wte.weight[:331] += 1
    save_model(tmp_path / "saved", model, torch.float32)
    assert torch.equal(load(tmp_path / "saved").wte.weight, model.wte.weight)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_keeps_the_tokenizer_and_the_card_of_its_origin(tmp_path: Path) -> None:
    origin = tiny("opt", tmp_path)
    write_vocabulary(origin, {**{spelled(bytes([byte])): byte for byte in range(256)}, "</s>": 256}, [])
    raw = json.loads((origin / "config.json").read_text())
    (origin / "config.json").write_text(json.dumps(raw | {"bos_token_id": 256, "eos_token_id": [256, 66]}))
    (origin / "tokenizer_config.json").write_text(json.dumps({"bos_token": "</s>", "add_bos_token": True}))
    (origin / "banded.json").write_text(json.dumps({"separator": " ; "}))
    (origin / "additional_chat_templates").mkdir()
    (origin / "additional_chat_templates" / "default.jinja").write_text("theirs")
    (origin / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 65], "temperature": 0.7}))
    save_model(tmp_path / "saved", load(origin), torch.float32, origin=origin)
    ours, theirs = load_tokenizer(tmp_path / "saved"), load_tokenizer(origin)
    assert ours.bos_id == theirs.bos_id == 256
    assert ours.eos_ids == theirs.eos_ids == {256, 65, 66}
    assert ours.encode("ab") == theirs.encode("ab") == [97, 98]
    assert ours.fingerprint() == theirs.fingerprint() != r50k_base().fingerprint()
    prompt_format = load_prompt_format(tmp_path / "saved")
    assert (prompt_format.separator, prompt_format.chat_template) == (" ; ", "theirs")
    assert load(tmp_path / "saved").config == load(origin).config


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path: Path) -> None:
    directory = tiny("banded", tmp_path)
    assert (directory / "model.safetensors").stat().st_mode == (directory / "config.json").stat().st_mode


def test_saved_vocabulary_has_no_padding(tmp_path: Path) -> None:
    directory = tiny("banded", tmp_path, tied_head=False)
    tensors = load_file(directory / "model.safetensors")
    assert tensors["wte.weight"].shape == tensors["lm_head.weight"].shape == (331, 64)


def test_every_field_of_our_config_is_written_and_read(tmp_path: Path) -> None:
    config = GPTConfig(
        vocab_size=331,
        n_positions=256,
        n_embd=64,
        n_layer=4,
        n_head=2,
        n_inner=96,
        attention=("banded", "dense", "dense"),
        band=16,
        stride=32,
        summary=4,
        activation="relu",
        softmax_scale=0.5,
        scale_by_inverse_layer=True,
        qkv_bias=False,
        bias=False,
        norm_affine=False,
        norm_eps=1e-3,
        pre_norm=False,
        final_norm=False,
        position_offset=3,
        embedding_width=32,
        tied_head=False,
    )
    for field in dataclasses.fields(GPTConfig):
        assert getattr(config, field.name) != field.default, f"{field.name} tests nothing"
    assert [field.name for field in dataclasses.fields(GPTConfig)] == list(BANDED_FIELDS)
    save_model(tmp_path, GPT(config), torch.float32)
    assert read_architecture(tmp_path)[1] == config


# What is refused: the directory


def test_missing_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere: no such directory")


def test_file_instead_of_a_directory(tmp_path: Path) -> None:
    refused(tiny("gpt2", tmp_path) / "model.safetensors", "model.safetensors is a file; a model is a directory with")


def test_no_config(tmp_path: Path) -> None:
    refused(tmp_path, f"{re.escape(str(tmp_path))} holds no config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": "gpt2",', "config.json can't be read as JSON: Expecting property name"),
        (b"", "config.json can't be read as JSON: Expecting value"),
        (b'{"model_type": "\xff"}', "config.json can't be read as JSON: .*utf-8"),
        (b'{"model_type": ' + 100_000 * b"[", "config.json can't be read as JSON: maximum recursion depth"),
        (b"[1]", "config.json must hold a JSON object, got list"),
        (b"{}", "config.json: model_type None is not supported, only banded, gpt2, gpt_neo, opt"),
        (b'{"model_type": "llama"}', "model_type 'llama' is not supported, only banded, gpt2, gpt_neo, opt"),
        (b'{"model_type": ["gpt2"]}', r"model_type \['gpt2'\] is not supported"),
    ],
)
def test_config_that_is_none(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    refused(tmp_path, message)


def test_config_that_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    refused(tmp_path, "config.json can't be read: it is no regular file")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "last.ckpt", "gpt2.gguf"]
)
def test_pickles_are_not_opened(name: str, tmp_path: Path) -> None:
    directory = tiny("gpt2", tmp_path)
    (directory / "model.safetensors").rename(directory / name)
    convert = f"to make a model of {name}: banded convert {re.escape(str(directory))} NEW_DIRECTORY"
    refused(directory, f"holds neither model.safetensors nor model.safetensors.index.json; {convert}")
    (directory / "config.json").unlink()
    refused(directory, f"holds no config.json; {convert}")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt", "gpt2.gguf"])
def test_a_file_of_another_format_is_refused_with_the_command(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"never read")
    refused(tmp_path / name, f"is a file; a model is .*; to make a model of {name}: banded convert .*/{name} NEW_DIRECTORY")


def test_pickles_next_to_safetensors_do_not_matter(tmp_path: Path) -> None:
    directory = tiny("gpt2", tmp_path)
    (directory / "pytorch_model.bin").write_bytes(b"never read")
    load(directory)


def test_no_weights_at_all(tmp_path: Path) -> None:
    directory = tiny("gpt2", tmp_path)
    (directory / "model.safetensors").unlink()
    refused(directory, "holds neither model.safetensors nor model.safetensors.index.json")


# What is refused: the files


def test_shard_that_is_not_there(tmp_path: Path) -> None:
    directory = tiny("gpt2", tmp_path, max_shard_size="100KB")
    shards = sorted(directory.glob("model-*.safetensors"))
    shards[1].unlink()
    refused(directory, f"model.safetensors.index.json names {shards[1].name}, which is not there")
    shards[0].unlink()
    refused(directory, f"names {shards[0].name}, {shards[1].name}, which are not there")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index.json can't be read as JSON"),
        ("{}", "weight_map must map tensors to files, got None"),
        ('{"weight_map": {}}', "weight_map must map tensors to files, got {}"),
        ('{"weight_map": ["a"]}', r"weight_map must map tensors to files, got \['a'\]"),
        ('{"weight_map": {"a": "../gpt2/b.safetensors"}}', "names ../gpt2/b.safetensors: not a file of this directory"),
    ],
)
def test_index_that_is_none(index: str, message: str, tmp_path: Path) -> None:
    directory = tiny("gpt2", tmp_path)
    (directory / "model.safetensors").rename(directory / "b.safetensors")
    (directory / "model.safetensors.index.json").write_text(index)
    refused(directory, message)


@pytest.mark.parametrize("num_bytes", [0, 4, 2000, -1])
def test_truncated_file(num_bytes: int, tmp_path: Path) -> None:
    directory = tiny("gpt2", tmp_path)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    refused(directory, "model.safetensors can't be read as safetensors: .*header")


def test_file_that_is_something_else(tmp_path: Path) -> None:
    directory = tiny("gpt2", tmp_path)
    (directory / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(1000))
    refused(directory, "model.safetensors can't be read as safetensors")


# What is refused: the tensors


def test_missing_tensors(tmp_path: Path) -> None:
    def without_biases(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if not name.endswith("bias")}

    refused(
        edit_tensors(tiny("gpt2", tmp_path), without_biases),
        "gpt2 lacks 19 tensors that config.json asks for: "
        "h.0.ln_1.bias, h.0.attn.c_attn.bias, h.0.attn.c_proj.bias, h.0.ln_2.bias, h.0.mlp.c_fc.bias and 14 more",
    )


def test_missing_layer(tmp_path: Path) -> None:
    refused(edit_config(tiny("gpt2", tmp_path), n_layer=4), r"lacks 12 tensors .*: h.3.ln_1.weight")


def test_missing_head(tmp_path: Path) -> None:
    directory = edit_config(tiny("gpt2", tmp_path), tie_word_embeddings=False)
    refused(directory, "lacks 1 tensor that config.json asks for: lm_head.weight$")


def test_extra_tensors(tmp_path: Path) -> None:
    directory = edit_config(tiny("gpt2", tmp_path), n_layer=2)
    refused(directory, "gpt2 holds 12 tensors that config.json has no place for: transformer.h.2.attn.c_attn.bias, .*more")


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("gpt2", "transformer.score.h.weight"),
        ("gpt2", "score_weight"),
        ("opt", "model.score.weight"),
        ("gpt2", "lm_head.bias"),
        ("gpt2", "transformer.h.0.crossattention.c_attn.weight"),
        ("gpt_neo", "transformer.h.0.attn.attention.q_proj.bias"),
        ("opt", "model.decoder.project_in.weight"),
        ("opt-350m", "model.decoder.final_layer_norm.weight"),
        ("banded", "transformer.wte.weight"),
    ],
)
def test_extra_tensor_is_named(arch: str, name: str, tmp_path: Path) -> None:
    directory = edit_tensors(tiny(arch, tmp_path), lambda tensors: {**tensors, name: torch.ones(2)})
    refused(directory, f"holds 1 tensor that config.json has no place for: {name}$")


def test_tensor_that_is_stored_twice(tmp_path: Path) -> None:
    directory = edit_tensors(tiny("gpt2", tmp_path), lambda t: {**t, "wte.weight": t["transformer.wte.weight"]})
    refused(directory, "holds wte.weight, and model.safetensors holds it too, as transformer.wte.weight")


@pytest.mark.parametrize(
    ("arch", "fields", "message"),
    [
        ("gpt2", {"n_inner": 255}, r"h.0.mlp.c_fc.weight has shape \(64, 256\), expected \(64, 255\)"),
        ("gpt2", {"vocab_size": 332}, r"transformer.wte.weight has shape \(331, 64\), expected \(332, 64\)"),
        ("gpt2", {"n_positions": 128}, r"transformer.wpe.weight has shape \(256, 64\), expected \(128, 64\)"),
        ("gpt_neo", {"hidden_size": 32}, r"transformer.wte.weight has shape \(331, 64\), expected \(331, 32\)"),
        (
            "opt",
            {"max_position_embeddings": 258},
            r"embed_positions.weight has shape \(258, 64\), expected \(260, 64\)",
        ),
        ("opt", {"ffn_dim": 100}, r"layers.0.fc1.weight has shape \(160, 64\), expected \(100, 64\)"),
        ("banded", {"vocab_size": 384}, r"wte.weight has shape \(331, 64\), expected \(384, 64\)"),
    ],
)
def test_wrong_shapes(arch: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(edit_config(tiny(arch, tmp_path), **fields), message)


def test_conv1d_weights_are_not_read_the_wrong_way_round(tmp_path: Path) -> None:
    key = "transformer.h.1.attn.c_attn.weight"
    directory = edit_tensors(tiny("gpt2", tmp_path), lambda tensors: {**tensors, key: tensors[key].T.contiguous()})
    refused(directory, rf"{key} has shape \(192, 64\), expected \(64, 192\)")


def test_quantised_weights(tmp_path: Path) -> None:
    key = "model.decoder.layers.0.fc1.weight"
    directory = edit_tensors(tiny("opt", tmp_path), lambda tensors: {**tensors, key: tensors[key].to(torch.int8)})
    refused(directory, f"{key} is I8, expected one of F64, F32, F16, BF16")


INFINITE, LARGEST = float("inf"), torch.finfo(torch.bfloat16).max


@pytest.mark.parametrize(
    ("dtype", "value", "problem"),
    [
        (torch.float32, float("nan"), "holds 1 of 12288 numbers that are NaN or infinite"),
        (torch.bfloat16, -INFINITE, "holds 1 of 12288 numbers that are NaN or infinite"),
        (torch.float16, 70000.0, "reaches 70000, but float16 ends at 65504; use --dtype bfloat16"),
        (torch.float16, -70000.0, "reaches 70000, but float16 ends at 65504; use --dtype bfloat16"),
        (torch.float16, 3.4e38, r"reaches 3.4e\+38, but float16 ends at 65504; use --dtype float32"),
        (torch.bfloat16, 3.4e38, r"reaches 3.4e\+38, but bfloat16 ends at 3.38953e\+38; use --dtype float32"),
        (torch.float32, 1e300, r"reaches 1e\+300, but float32 ends at 3.40282e\+38; no dtype holds it"),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_weights_that_do_not_stay_finite(
    dtype: torch.dtype, value: float, problem: str, transposed: bool, tmp_path: Path
) -> None:
    arch, key = ("gpt2", "transformer.h.1.attn.c_attn.weight") if transposed else ("banded", "h.1.attn.c_attn.weight")

    def spoil(tensors: Tensors) -> Tensors:
        tensors[key] = tensors[key].double()
        tensors[key][-1, -1] = value
        return tensors

    directory = edit_tensors(tiny(arch, tmp_path), spoil)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {key} {problem}$"):
        load_model(directory, dtype)


def test_opposite_infinities_and_the_last_of_three_parts_are_seen(tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        tensors["transformer.h.2.attn.attention.v_proj.weight"][0, :2] = torch.tensor([INFINITE, -INFINITE])
        return tensors

    refused(edit_tensors(tiny("gpt_neo", tmp_path), spoil), r"h\.2\.attn\.attention\.v_proj\.weight holds 2 of 4096 num")


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 65504.0), (torch.bfloat16, LARGEST)])
def test_large_weights_load_though_their_sum_overflows(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    directory = edit_tensors(tiny("banded", tmp_path), lambda t: t | {"wpe.weight": torch.full_like(t["wpe.weight"], value)})
    assert (load_model(directory, dtype).wpe.weight == value).all()


def test_nothing_is_read_before_all_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.checkpoint.weights.assemble", lambda *_: pytest.fail("a weight was read"))
    last = edit_tensors(tiny("gpt2", tmp_path), lambda t: {**t, "transformer.ln_f.bias": torch.ones(63)})
    refused(last, "ln_f.bias has shape")


# What is refused: the config

ATTENTION_TYPES = "attention_types must be like"


@pytest.mark.parametrize(
    ("arch", "fields", "message"),
    [
        ("gpt2", {"n_layer": "x"}, "n_layer must be a whole number, got 'x'"),
        ("gpt2", {"n_layer": REMOVED}, "n_layer is missing"),
        ("gpt2", {"n_layer": None}, "n_layer is missing"),
        ("gpt2", {"n_layer": 3.0}, "n_layer must be a whole number, got 3.0"),
        ("gpt2", {"n_layer": True}, "n_layer must be a whole number, got True"),
        ("gpt2", {"n_layer": 0}, "n_layer must be at least 1, got 0"),
        ("gpt2", {"n_inner": 0}, "n_inner must be at least 1, got 0"),
        ("gpt2", {"n_head": 5}, "n_embd 64 is not a multiple of n_head 5"),
        ("gpt2", {"vocab_size": [331]}, r"vocab_size must be a whole number, got \[331\]"),
        ("gpt2", {"num_attention_heads": 8}, "num_attention_heads is 8 but n_head, the same thing, is 4"),
        ("gpt2", {"activation_function": "silu"}, "activation_function 'silu' is not supported, only gelu_new, "),
        ("gpt2", {"activation_function": ["gelu"]}, r"activation_function \['gelu'\] is not supported"),
        ("gpt2", {"activation_function": None}, "activation_function None is not supported"),
        ("gpt2", {"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon must be a positive number, got '1e-5'"),
        ("gpt2", {"layer_norm_epsilon": 0}, "layer_norm_epsilon must be a positive number, got 0"),
        ("gpt2", {"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon must be a positive number, got nan"),
        ("gpt2", {"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon must be a positive number, got inf"),
        ("gpt2", {"scale_attn_weights": "yes"}, "scale_attn_weights must be true or false, got 'yes'"),
        ("gpt2", {"tie_word_embeddings": None}, "tie_word_embeddings must be true or false, got None"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True is not supported, only False"),
        ("gpt2", {"attention_head_type": "multiquery"}, "attention_head_type 'multiquery' is not supported"),
        ("gpt2", {"auto_map": {"AutoModel": "a.B"}}, "auto_map {'AutoModel': 'a.B'} is not supported"),
        ("gpt2", {"is_causal": False}, "is_causal False is not supported"),
        ("gpt2", {"is_encoder_decoder": True}, "is_encoder_decoder True is not supported"),
        ("gpt2", {"mup_output_alpha": 2.2}, "mup_output_alpha 2.2 is not supported"),
        ("gpt2", {"position_embedding_type": "alibi"}, "position_embedding_type 'alibi' is not supported"),
        ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads {'0': .*} is not supported"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4} is not supported"),
        ("gpt2", {"sliding_window": 64}, "sliding_window 64 is not supported"),
        ("gpt_neo", {"num_layers": REMOVED}, "num_layers is missing"),
        ("gpt_neo", {"num_heads": "4"}, "num_heads must be a whole number, got '4'"),
        ("gpt_neo", {"num_layers": 6}, "attention_types describes 4 layers, num_layers is 6"),
        ("gpt_neo", {"attention_types": None}, "attention_types describes 24 layers, num_layers is 4"),
        ("gpt_neo", {"attention_types": []}, "attention_types describes 0 layers, num_layers is 4"),
        ("gpt_neo", {"attention_types": [[["global", "sparse"], 2]]}, ATTENTION_TYPES),
        ("gpt_neo", {"attention_types": ["global", 4]}, ATTENTION_TYPES),
        ("gpt_neo", {"attention_types": [[["global"], "4"]]}, ATTENTION_TYPES),
        ("gpt_neo", {"attention_types": 4}, ATTENTION_TYPES),
        ("gpt_neo", {"attention_layers": ["local"] * 4}, "attention_layers .* contradicts attention_types"),
        ("gpt_neo", {"window_size": 0}, "band must be at least 1 when a layer is banded, got 0"),
        ("gpt_neo", {"window_size": "16"}, "window_size must be a whole number, got '16'"),
        ("gpt_neo", {"activation_function": "silu"}, "activation_function 'silu' is not supported"),
        ("opt", {"ffn_dim": REMOVED}, "ffn_dim is missing"),
        ("opt", {"hidden_size": "64"}, "hidden_size must be a whole number, got '64'"),
        ("opt", {"enable_bias": 1}, "enable_bias must be true or false, got 1"),
        ("opt", {"do_layer_norm_before": "no"}, "do_layer_norm_before must be true or false, got 'no'"),
        ("opt", {"_remove_final_layer_norm": None}, "_remove_final_layer_norm must be true or false, got None"),
        ("opt", {"word_embed_proj_dim": 0}, "embedding_width must be at least 1, got 0"),
        ("opt", {"activation_function": "swish"}, "activation_function 'swish' is not supported"),
        ("opt", {"scale_embeddings": True}, "scale_embeddings True is not supported"),
        ("opt", {"learned_embeddings": False}, "learned_embeddings False is not supported"),
        ("banded", {"n_layer": REMOVED}, "n_layer is missing"),
        ("banded", {"bias": REMOVED}, "bias must be true or false, got None"),
        ("banded", {"band": REMOVED}, "band is missing"),
        ("banded", {"band": None}, "band must be at least 1 when a layer is banded, got None"),
        ("banded", {"attention": "dense"}, "attention must be a list of names, got 'dense'"),
        ("banded", {"attention": [["dense"]]}, "attention must be a list of names"),
        (
            "banded",
            {"attention": ["sparse"]},
            r"attention must name one of dense, banded, strided, fixed for each layer, got \('sparse',\)",
        ),
        ("banded", {"activation": "silu"}, "activation 'silu' is not supported"),
        ("banded", {"softmax_scale": -1}, "softmax_scale must be a positive number, got -1"),
        ("banded", {"rotary": True, "n_ctx": 1}, "unknown field n_ctx, rotary"),
    ],
)
def test_config_values(arch: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(edit_config(tiny(arch, tmp_path), **fields), rf"config.json: .*{message}")


def test_harmless_fields_are_passed_over(tmp_path: Path) -> None:
    fields = {
        "embd_pdrop": 0.5,
        "n_ctx": 256,
        "quantization_config": None,
        "task_specific_params": {"a": 1},
        "note": "x",
    }
    load(edit_config(tiny("gpt2", tmp_path), **fields))
