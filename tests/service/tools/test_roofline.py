"""`banded plan`: the published figures, and arithmetic compared with a slow count."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from model.config import DEMO, GPT3_SIZES, GPTConfig
from model.gpt import GPT
from service.cli import main
from service.tools.roofline import GPUS, Capacity, Training, keys_seen, training_cost

LARGEST = Capacity(GPT3_SIZES["gpt3-175b"], GPUS["h100-80gb"], 8)


def count_parameters(config: GPTConfig) -> int:
    return Capacity(config, GPUS["h100-80gb"], 1).parameters


def test_training_gpt3_costs_what_was_published() -> None:
    """3.14e23 FLOPs; at 28 TFLOP/s on V100s for 1.50 $/h about 355 GPU-years and 4.6 million $."""
    flops, gpu_years, dollars = training_cost(count_parameters(GPT3_SIZES["gpt3-175b"]), Training())
    assert flops == pytest.approx(3.14e23, rel=0.002)
    assert gpu_years == pytest.approx(355, rel=0.005)
    assert dollars == pytest.approx(4.6e6, rel=0.02)


@pytest.mark.parametrize("name", GPT3_SIZES)
def test_sizes_have_the_parameters_of_their_names(name: str) -> None:
    digits, unit = name.removeprefix("gpt3-")[:-1], name[-1]
    billions = float(digits) / (1000 if unit == "m" else 1)
    assert count_parameters(GPT3_SIZES[name]) / 1e9 == pytest.approx(billions, rel=0.05)


@pytest.mark.parametrize("changes", [{}, {"tied_head": False}, {"embedding_width": 64}, {"vocab_size": 100}])
def test_parameters_are_those_of_the_model_without_padding(changes: dict[str, int]) -> None:
    config = replace(DEMO, **changes)  # type: ignore[arg-type]
    unpadded = {"wte.weight", "lm_head.weight"}
    expected = sum(
        config.vocab_size * parameter.shape[1] if name in unpadded else parameter.numel()
        for name, parameter in GPT(config).named_parameters()
    )
    assert count_parameters(config) == expected


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("band", [None, 1, 7, 64])
def test_keys_seen(tokens: int, band: int | None) -> None:
    expected = sum(j <= i and (band is None or i - j < band) for i in range(tokens) for j in range(tokens))
    assert keys_seen(tokens, band) == expected


def test_memory_bounds_concurrency_and_banded_layers_save_some() -> None:
    assert LARGEST.sequences * LARGEST.sequence <= LARGEST.kv_room < (LARGEST.sequences + 1) * LARGEST.sequence
    assert LARGEST.dense.sequence / LARGEST.sequence == pytest.approx(1.73, abs=0.01)
    assert LARGEST.dense.sequence == 2 * 96 * 12288 * 2 * 2048


def test_a_step_takes_what_it_reads_or_what_it_multiplies() -> None:
    gpu = LARGEST.gpu
    one = (LARGEST.weights + LARGEST.sequence) / (8 * gpu.bandwidth)
    assert LARGEST.decode_seconds(1) == pytest.approx(one)
    tiny = Capacity(replace(DEMO, n_positions=64), gpu._replace(bandwidth=math.inf), 1)
    assert tiny.decode_seconds(100_000) == pytest.approx(100_000 * 2 * (tiny.parameters - POSITIONS_AND_VECTORS) / gpu.flops)
    assert LARGEST.prefill_seconds(1) == pytest.approx(LARGEST.weights / (8 * gpu.bandwidth))
    assert LARGEST.prefill_seconds(2048) == pytest.approx(
        prompt_operations(LARGEST.config, 2048) / (8 * gpu.flops), rel=1e-3
    )


# Of DEMO with 64 positions: all parameters that no product uses.
POSITIONS_AND_VECTORS = 64 * 256 + 4 * (4 * 256 + 3 * 256 + 256 + 1024 + 256) + 2 * 256


def prompt_operations(config: GPTConfig, tokens: int) -> float:
    """Counted layer by layer."""
    width = config.n_embd
    total = 2.0 * config.vocab_size * width
    for layer in range(config.n_layer):
        band = config.band if layer % 2 else tokens
        total += 2.0 * 12 * width * width * tokens
        total += sum(4.0 * width * min(query + 1, band or tokens) for query in range(tokens))
    return total


def test_the_command_prints_inputs_beside_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "gpt3-175b", "--gpu", "h100-80gb", "--count", "8"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "gpt3-175b: 174.604 billion parameters, 96 layers of width 12288, context 2048",
        "weights, 16 bits each as keys and values are: 349.2 GB, 43.7 GB per GPU",
        f"such sequences at a time{LARGEST.sequences:>32}{LARGEST.dense.sequences:>14}",
        "training: 6 x 174.604 billion parameters x 300 billion tokens = 3.14e+23 FLOPs",
        "at 28 TFLOP/s per GPU and 1.50 $/h: 355.7 GPU-years, 4.68 million $",
    ):
        assert line in shown


def test_too_little_memory_is_said_with_how_many_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "gpt3-175b", "--gpu", "h100-80gb", "--count", "4"]) == 0
    assert "too little memory: weights and one sequence need 5 such GPUs" in capsys.readouterr().out


def test_what_can_not_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu", "abacus"]) == 2
    assert "banded: --gpu abacus: known are v100-32gb, a100-40gb" in capsys.readouterr().err
    assert main(["plan", "--prompt", "2049"]) == 2
    assert "banded: --prompt 2049: the model's context is 2048 tokens" in capsys.readouterr().err
    assert main(["plan", "--model", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
