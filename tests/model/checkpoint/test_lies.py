"""The attack's lying model directories, in this process: each is refused in one line. Templates: test_templates.py."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

from model.checkpoint.architectures import ARCHITECTURES
from model.checkpoint.files import CheckpointError
from model.checkpoint.prompt_format import load_prompt_format
from model.checkpoint.vocabulary import load_tokenizer
from model.checkpoint.weights import check_memory, load_model
from model.lora import load_adapter
from model.peft import load_peft_adapter
from tests.attacks.model_directories import Lie, lies
from tests.model.checkpoint.checkpoints import tiny

# What harms nobody where it stands.
SERVED = (
    *("config: band is 100000", "config: window_size is 100000", "banded.json: default_max_tokens 10000000000000000000"),
    *(f"tokenizer: {part} {depth} deep" for part in ("normalizer", "post_processor") for depth in (100, 240)),
)


def found() -> list[tuple[str, str, Lie]]:
    """Half of those about files: the command tries all of them, and the templates."""
    return [lie for i, lie in enumerate(lies()) if not lie[0].startswith("template") and i % 2]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("honest")
    return {arch: tiny(arch, root, vocab_size=50257) for arch in ("banded", "gpt2", "gpt_neo")}


def why_refused(directory: Path) -> str | None:
    """The error of the directory, or of all its chats."""
    try:
        load_model(directory, torch.float32)
        load_tokenizer(directory)
        return load_prompt_format(directory).chat_problem
    except CheckpointError as error:
        return str(error)


def test_every_lie_is_refused_in_one_line(honest: dict[str, Path], tmp_path: Path) -> None:
    wrong = []
    for name, arch, lie in found():
        directory = shutil.copytree(honest[arch], tmp_path / "lie")
        lie(directory)
        started = time.perf_counter()
        said = why_refused(directory)
        seconds = time.perf_counter() - started
        shutil.rmtree(directory)
        is_right = said is None if name in SERVED else said and "\n" not in said and len(said) < 1000
        if not is_right or seconds > 60:
            wrong.append((name, said, seconds))
    assert wrong == []


MESSAGES = {
    "config: n_layer is 100000": "config.json: n_layer must be at most 1024, got 100000",
    "config: n_embd is 9223372036854775808": "config.json: n_embd must be at most 65536, got 9223372036854775808",
    "config: 10^5 kinds of attention": "config.json: attention must name at most 1024 layers, got 100000",
    "config: attention_types [[['global'], 100000000]]": "attention_types describes 100000000 layers, num_layers is 4",
    "config: norm_eps 10000000000000000000": r"config.json: norm_eps must be a positive number, got 10{79}",
    "config: 10^6 brackets": "config.json can't be read as JSON: maximum recursion depth exceeded",
    "config.json: pipe": "config.json can't be read: it is no regular file",
    "config.json: device": "config.json can't be read: it is no regular file",
    "model.safetensors: socket": "model.safetensors can't be read: it is no regular file",
    "vocab.json: loop": "vocab.json can't be read: Too many levels of symbolic links",
    "tokenizer.json: 50 GB": "tokenizer.json can't be read: it has 53687091200 bytes, at most 20971520 are expected",
    "weights: header of 2^63 bytes": "can't be read as safetensors: its header has 9223372036854775808 bytes",
    "tokenizer: tokenizer.json doubles": "merge 12: the pieces up to here are longer than any vocabulary's",
    "tokenizer: 10^6 lists": "tokenizer.json can't be read as JSON: it holds more than 2000000 values",
    "tokenizer: added_tokens [{'id': 256, 'content': '<0>',": "the added tokens are more, or longer, than any vocabulary's",
    "tokenizer: added_tokens 5": "tokenizer.json: added_tokens must be a list, got 5",
    "tokenizer: normalizer of 5": "tokenizer.json: normalizers must be a list, got 5",
    "tokenizer_config: additional_special_tokens 5": "additional_special_tokens must be a list, got 5",
    "tokenizer_config: added_tokens_decoder [5]": r"added_tokens_decoder must be an object, got \[5\]",
    "banded.json: separator": "separator must be at most 64 strings of 4096 characters",
    "banded.json: stop": "stop must be at most 64 strings of 4096 characters",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_is_said_of_a_lie(name: str, honest: dict[str, Path], tmp_path: Path) -> None:
    _, arch, lie = next(each for each in lies() if each[0].startswith(name))
    directory = shutil.copytree(honest[arch], tmp_path / "lie")
    lie(directory)
    assert re.search(MESSAGES[name], why_refused(directory) or "")


def test_weights_that_do_not_fit_the_memory_are_refused_before_they_are_read() -> None:
    with pytest.raises(CheckpointError, match=r"tmp: the weights take 1000000\.0 GB, but [0-9.]+ GB are free"):
        check_memory(Path("tmp"), 10**15)
    check_memory(Path("tmp"), 10**6)


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter_model.safetensors"])
def test_an_adapter_that_is_no_file_or_larger_than_its_model_is_refused(
    name: str, honest: dict[str, Path], tmp_path: Path
) -> None:
    model = load_model(honest["banded"], torch.float32)
    if name == "adapter.safetensors":
        (tmp_path / "adapter.json").write_text('{"rank": 1, "alpha": 1, "targets": ["c_fc"], "base": ""}')
    else:
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')

    def load() -> None:
        if name == "adapter.safetensors":
            load_adapter(tmp_path, model)
        else:
            load_peft_adapter(tmp_path, model, ARCHITECTURES["banded"])

    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} can't be read: it is no regular file"):
        load()
    (tmp_path / name).unlink()
    with (tmp_path / name).open("wb") as file:
        file.truncate(50 << 30)
    with pytest.raises(CheckpointError, match=f"{name} can't be read: it has 53687091200 bytes, at most "):
        load()
