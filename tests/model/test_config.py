import dataclasses
from typing import Any

import pytest

from kernels.names import PatternKind
from kernels.patterns import Pattern
from model.config import DEMO, GPT3_SIZES, GPTConfig

SMALL = GPTConfig(vocab_size=331, n_positions=256, n_embd=64, n_layer=4, n_head=4, n_inner=256)


def num_parameters(config: GPTConfig) -> int:
    """Independently of gpt.py: embeddings, and per layer two norms, attention and MLP with their biases."""
    c, inner = config.n_embd, config.n_inner
    attention = 3 * c * c + 3 * c + c * c + c
    layer = attention + 2 * c * inner + inner + c + 4 * c
    return (config.vocab_size + config.n_positions) * c + config.n_layer * layer + 2 * c


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt3-125m", 125e6),
        ("gpt3-350m", 356e6),  # the paper's name says 350M; it multiplies out to 356M
        ("gpt3-760m", 760e6),
        ("gpt3-1.3b", 1.3e9),
        ("gpt3-2.7b", 2.7e9),
        ("gpt3-6.7b", 6.7e9),
        ("gpt3-13b", 13.0e9),
        ("gpt3-175b", 175.0e9),
    ],
)
def test_sizes_have_the_papers_parameter_counts(name: str, published: float) -> None:
    assert num_parameters(GPT3_SIZES[name]) == pytest.approx(published, rel=0.02)


def test_the_table_has_the_eight_sizes_of_the_paper() -> None:
    assert len(GPT3_SIZES) == 8


@pytest.mark.parametrize("config", [*GPT3_SIZES.values(), DEMO])
def test_sizes_share_the_shape_of_gpt3(config: GPTConfig) -> None:
    assert (config.vocab_size, config.n_positions, config.n_inner) == (50257, 2048, 4 * config.n_embd)
    assert config.head_dim in (64, 80, 96, 128)
    assert [config.kind(layer) for layer in range(4)] == ["dense", "banded", "dense", "banded"]
    assert [config.pattern(config.kind(layer)).band for layer in range(4)] == [None, 256, None, 256]


def test_pattern_repeats_over_the_layers() -> None:
    config = dataclasses.replace(SMALL, attention=("dense", "dense", "banded"), band=16, n_layer=7)
    assert [config.kind(layer) for layer in range(7)] == ["dense", "dense", "banded"] * 2 + ["dense"]
    assert [config.pattern(config.kind(layer)).band for layer in range(3)] == [None, None, 16]


def test_dense_layers_have_no_band_even_if_the_config_has() -> None:
    assert dataclasses.replace(SMALL, band=16).pattern("dense").band is None


def test_sparse_layers_keep_their_keys_with_the_dense_ones() -> None:
    kinds: tuple[PatternKind, ...] = ("dense", "banded", "strided", "fixed")
    config = dataclasses.replace(SMALL, attention=kinds, band=16, stride=32, summary=4)
    assert [config.group(layer) for layer in range(4)] == ["dense", "banded", "dense", "dense"]
    assert [config.pattern(config.kind(layer)) for layer in range(4)] == [
        Pattern("dense"),
        Pattern("banded", 16),
        Pattern("strided", 32),
        Pattern("fixed", 32, 4),
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0.25, 0.25, 0.25]),
        ({"softmax_scale": 1.0}, [1.0, 1.0, 1.0]),
        ({"scale_by_inverse_layer": True}, [0.25, 0.125, 0.25 / 3]),
        ({"softmax_scale": 1.0, "scale_by_inverse_layer": True}, [1.0, 0.5, 1 / 3]),
    ],
)
def test_scale(fields: dict[str, Any], expected: list[float]) -> None:
    config = dataclasses.replace(SMALL, **fields)
    assert [config.scale_of(layer) for layer in range(3)] == pytest.approx(expected)


@pytest.mark.parametrize(("vocab_size", "padded"), [(1, 64), (64, 64), (65, 128), (50257, 50304), (50272, 50304)])
def test_vocabulary_is_padded_to_whole_64s(vocab_size: int, padded: int) -> None:
    assert dataclasses.replace(SMALL, vocab_size=vocab_size).padded_vocab_size == padded


def test_token_width_is_the_models_unless_projected() -> None:
    assert SMALL.token_width == 64
    assert dataclasses.replace(SMALL, embedding_width=32).token_width == 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"n_positions": -1}, "n_positions must be at least 1, got -1"),
        ({"n_embd": 0}, "n_embd must be at least 1, got 0"),
        ({"n_layer": 0}, "n_layer must be at least 1, got 0"),
        ({"n_head": 0}, "n_head must be at least 1, got 0"),
        ({"n_inner": 0}, "n_inner must be at least 1, got 0"),
        ({"n_head": 5}, "n_embd 64 is not a multiple of n_head 5"),
        ({"attention": ()}, r"attention must name one of dense, banded, strided, fixed for each layer, got \(\)"),
        ({"attention": ("dense", "sparse")}, "attention must name one of .* for each layer, got .*'sparse'"),
        ({"attention": ("banded",)}, "band must be at least 1 when a layer is banded, got None"),
        ({"attention": ("banded",), "band": 0}, "band must be at least 1 when a layer is banded, got 0"),
        ({"attention": ("strided",)}, "stride must be at least 1 when a layer is strided, got None"),
        ({"attention": ("fixed",), "stride": 8}, "summary must be at least 1 when a layer is fixed, got None"),
        ({"attention": ("fixed",), "stride": 8, "summary": 9}, "summary 9 is more than the stride 8 that it is a part of"),
        ({"embedding_width": 0}, "embedding_width must be at least 1, got 0"),
        ({"softmax_scale": 0.0}, "softmax_scale must be positive, got 0.0"),
        ({"position_offset": -1}, "position_offset must not be negative, got -1"),
    ],
)
def test_contradictions_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **fields)
