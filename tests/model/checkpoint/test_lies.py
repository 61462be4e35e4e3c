"""The attack's lying model directories, in this process: each is refused in one line. Templates: test_templates.py."""

import shutil
import time
from pathlib import Path

import pytest
import torch

from model.checkpoint.files import CheckpointError
from model.checkpoint.prompt_format import load_prompt_format
from model.checkpoint.vocabulary import load_tokenizer
from model.checkpoint.weights import load_model
from tests.attacks.model_directories import Lie, lies
from tests.model.checkpoint.checkpoints import tiny

# What harms nobody where it stands.
SERVED = (
    *("config: band is 100000", "banded.json: default_max_tokens 10000000000000000000"),
    *(f"tokenizer: {part} {depth} deep" for part in ("normalizer", "post_processor") for depth in (100, 240)),
)


def found() -> list[tuple[str, str, Lie]]:
    """Three in four of those that this process survives: the command runs all of them."""
    return [lie for i, lie in enumerate(lies()) if not lie[0].startswith("template") and i % 4]


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
