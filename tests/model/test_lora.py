"""Adapters add a low-rank change to weights. Files that don't fit the model are refused."""

import json
from pathlib import Path

import pytest
import torch

from kernels import torch_ops
from model.attention import TrainingAttention
from model.checkpoint.files import CheckpointError
from model.config import GPTConfig
from model.gpt import GPT
from model.lora import (
    ADAPTER_CONFIG,
    TARGETS,
    Adapter,
    AdapterConfig,
    LowRank,
    adapt_all,
    adaptable,
    load_adapter,
    new_adapter,
    save_adapter,
)

CONFIG = GPTConfig(
    vocab_size=97,
    n_positions=48,
    n_embd=32,
    n_layer=2,
    n_head=2,
    n_inner=64,
    attention=("dense", "banded"),
    band=16,
)
TOKENS = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(0))


def make_model(seed: int = 0) -> GPT:
    model = GPT(CONFIG)
    model.init_weights(seed)
    return model


def random_adapter(model: GPT, config: AdapterConfig, seed: int = 1) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    new = new_adapter(model, config, "digest", seed)
    return Adapter(
        config,
        {name: LowRank(a, torch.randn(b.shape, generator=generator)) for name, (a, b) in new.parts.items()},
        "digest",
    )


@torch.no_grad()
def hidden(model: GPT, adapter: Adapter | None) -> torch.Tensor:
    adapt = None if adapter is None else adapt_all(adapter)
    out: torch.Tensor = model(TOKENS, torch.arange(20), TrainingAttention(CONFIG), torch_ops, adapt)
    return out


@pytest.mark.parametrize("targets", [TARGETS, ("c_attn",), ("c_fc", "c_proj")])
def test_an_adapter_is_a_change_of_the_weights(targets: tuple[str, ...]) -> None:
    model, merged = make_model(), make_model()
    adapter = random_adapter(model, AdapterConfig(3, 6.0, targets))
    with torch.no_grad():
        for name, linear in adaptable(merged, targets).items():
            a, b = adapter.parts[name]
            linear.weight += 2.0 * b @ a
    torch.testing.assert_close(hidden(model, adapter), hidden(merged, None), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(hidden(model, None), hidden(merged, None), atol=0.1)


def test_a_new_one_changes_nothing() -> None:
    model = make_model()
    assert torch.equal(hidden(model, new_adapter(model, AdapterConfig(4, 8.0), "digest", 0)), hidden(model, None))


def test_targets_are_found_by_their_names() -> None:
    linears = adaptable(make_model(), ("c_proj", "c_fc"))
    assert sorted(linears) == sorted(f"h.{i}.{part}" for i in range(2) for part in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"))


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    model = make_model()
    adapter = random_adapter(model, AdapterConfig(3, 6.0, ("c_attn", "c_fc")))
    save_adapter(tmp_path, adapter)
    found = load_adapter(tmp_path, model)
    assert found.config == adapter.config
    assert torch.equal(hidden(model, found), hidden(model, adapter))
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["base"] == "digest"


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, random_adapter(make_model(), AdapterConfig(3, 6.0)))
    wider = GPT(GPTConfig(vocab_size=97, n_positions=48, n_embd=40, n_layer=2, n_head=2, n_inner=64))
    with pytest.raises(CheckpointError, match=r"does not fit the model: h\.0\.attn\.c_attn\.a is \(3, 32\), not \(3, 40\)"):
        load_adapter(tmp_path, wider)
    deeper = GPT(GPTConfig(vocab_size=97, n_positions=48, n_embd=32, n_layer=3, n_head=2, n_inner=64))
    with pytest.raises(CheckpointError, match=r"h\.2\.attn\.c_attn\.a is None, not \(3, 32\)"):
        load_adapter(tmp_path, deeper)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": -1.0}, r"alpha must be positive, got -1\.0"),
        ({"targets": []}, "targets must be some of c_attn, c_proj, c_fc, got none"),
        ({"targets": ["wte"]}, "targets must be some of c_attn, c_proj, c_fc, got wte"),
        ({"rank": "eight"}, "adapter.json: "),
    ],
)
def test_configs_that_can_not_be(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    model = make_model()
    save_adapter(tmp_path, random_adapter(model, AdapterConfig(3, 6.0)))
    path = tmp_path / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        load_adapter(tmp_path, model)
