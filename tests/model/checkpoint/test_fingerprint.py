"""The fingerprint changes with the weights and with nothing else."""

import re
from pathlib import Path

import pytest
import torch

from model.checkpoint.weights import load_model, weights_fingerprint
from model.gpt import GPT
from tests.model.checkpoint.checkpoints import tiny


@pytest.fixture
def model(tmp_path: Path) -> GPT:
    return load_model(tiny("banded", tmp_path, n_layer=1), torch.bfloat16)


def test_the_same_weights_have_the_same_fingerprint(model: GPT, tmp_path: Path) -> None:
    again = load_model(tiny("banded", tmp_path, n_layer=1), torch.bfloat16)
    assert weights_fingerprint(model, "cpu") == weights_fingerprint(again, "cpu")
    assert re.fullmatch("fp_[0-9a-f]{10}", weights_fingerprint(model))


def test_kernels_and_dtype_are_part_of_it(model: GPT, tmp_path: Path) -> None:
    fp32 = load_model(tiny("banded", tmp_path, n_layer=1), torch.float32)
    found = [weights_fingerprint(model, "a", "b"), weights_fingerprint(model, "ab"), weights_fingerprint(model)]
    assert len({*found, weights_fingerprint(fp32)}) == 4


def test_the_same_bits_read_as_another_dtype_are_other_weights(model: GPT) -> None:
    before = weights_fingerprint(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.view(torch.float16)
    assert weights_fingerprint(model) != before


def test_one_bit_two_rows_or_two_columns_change_it(model: GPT) -> None:
    before = weights_fingerprint(model)
    weight = dict(model.named_parameters())["h.0.mlp.c_fc.weight"].data
    swapped_rows, swapped_columns = weight.clone(), weight.clone()
    swapped_rows[[3, 5]] = weight[[5, 3]]
    swapped_columns[:, [3, 5]] = weight[:, [5, 3]]
    flipped = weight.clone()
    flipped.view(torch.int16)[7, 7] ^= 1
    original = weight.clone()
    for changed in (swapped_rows, swapped_columns, flipped):
        weight.copy_(changed)
        assert weights_fingerprint(model) != before
    weight.copy_(original)
    assert weights_fingerprint(model) == before
