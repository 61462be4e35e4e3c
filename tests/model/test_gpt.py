import dataclasses
import math

import pytest
import torch
from torch import Tensor

from kernels import torch_ops
from model.attention import TrainingAttention
from model.config import GPT3_SIZES, GPTConfig
from model.gpt import GPT
from tests.model.checkpoint.checkpoints import randomise
from tests.model.logits import window_logits

SMALL = GPTConfig(
    vocab_size=331, n_positions=256, n_embd=64, n_layer=4, n_head=4, n_inner=256, attention=("dense", "banded"), band=16
)


def small_model(**fields: object) -> GPT:
    model = GPT(dataclasses.replace(SMALL, **fields))  # type: ignore[arg-type]
    randomise(model, seed=0)
    return model.requires_grad_(False).eval()


def some_tokens(*shape: int) -> Tensor:
    return torch.randint(331, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def gpt3_175b() -> GPT:
    with torch.device("meta"):
        return GPT(GPT3_SIZES["gpt3-175b"])


def test_175b_has_the_published_shape(gpt3_175b: GPT) -> None:
    assert len(gpt3_175b.h) == 96
    assert gpt3_175b.wpe.weight.shape == (2048, 12288)
    assert sum(p.numel() for p in gpt3_175b.h[0].parameters()) == pytest.approx(1.812e9, rel=1e-3)


def test_175b_has_174_6_billion_parameters(gpt3_175b: GPT) -> None:
    config = gpt3_175b.config
    padding_rows = config.padded_vocab_size - config.vocab_size  # in memory only, not parameters of the model
    num_parameters = sum(p.numel() for p in gpt3_175b.parameters()) - padding_rows * config.n_embd
    assert num_parameters == pytest.approx(174.6e9, rel=1e-4)


@pytest.mark.parametrize("tied_head", [True, False])
def test_padding_of_the_vocabulary_is_hidden(tied_head: bool) -> None:
    model = small_model(tied_head=tied_head)
    tokens = some_tokens(2, 24)
    assert model.wte.weight.shape[0] == 384
    assert window_logits(model, tokens).shape == (2, 24, 331)
    before = window_logits(model, tokens)
    head = model.wte if model.lm_head is None else model.lm_head
    head.weight[331:] = math.nan
    torch.testing.assert_close(window_logits(model, tokens), before, rtol=0, atol=0)


def test_no_token_sees_what_comes_after_it() -> None:
    model = small_model()
    tokens = some_tokens(1, 60)
    changed = tokens.clone()
    changed[0, 40:] = (changed[0, 40:] + 1) % 331
    before, after = window_logits(model, tokens), window_logits(model, changed)
    torch.testing.assert_close(before[0, :40], after[0, :40])
    assert not torch.allclose(before[0, 40:], after[0, 40:])


def test_a_banded_stack_forgets_what_no_layer_can_reach() -> None:
    model = small_model(attention=("banded",), n_layer=2)  # reaches back 2 * (16 - 1) tokens
    tokens = some_tokens(1, 60)
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 331
    before, after = window_logits(model, tokens), window_logits(model, changed)
    assert not torch.allclose(before[0, 30], after[0, 30])
    torch.testing.assert_close(before[0, 31:], after[0, 31:], rtol=0, atol=0)


def test_positions_may_be_any_shape_and_offset_into_the_table() -> None:
    model = small_model(position_offset=2)
    x, update = model.wte.weight[torch.tensor([[5]])] + model.wpe.weight[torch.tensor([[7 + 2]])], None
    for block in model.h:
        x, update = block(x, update, TrainingAttention(model.config), torch_ops)
    hidden = model(torch.tensor([[5]]), torch.tensor([[7]]), TrainingAttention(model.config), torch_ops)
    assert model.ln_f is not None
    assert update is not None
    torch.testing.assert_close(hidden, model.ln_f(x + update))


def test_initialisation_goes_by_the_width_and_follows_its_seed() -> None:
    models = [GPT(SMALL) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.init_weights(seed)
    one, same, other = (dict(model.named_parameters()) for model in models)
    assert torch.equal(one["wte.weight"], same["wte.weight"])
    assert not torch.equal(one["wte.weight"], other["wte.weight"])
    assert one["h.0.attn.c_attn.weight"].std().item() == pytest.approx(1 / 8, rel=0.05)
    for residual in ("h.0.attn.c_proj.weight", "h.3.mlp.c_proj.weight"):
        assert one[residual].std().item() == pytest.approx(1 / 8 / math.sqrt(8), rel=0.05)
    seen = torch.randn(100, 64, generator=torch.Generator().manual_seed(3))
    added = seen @ one["h.2.attn.c_attn.weight"][-64:].T @ one["h.2.attn.c_proj.weight"].T
    assert torch.cosine_similarity(seen, added).min() > 0.4, "attention adds what it attends to"
    assert torch.equal(one["h.0.ln_1.weight"], torch.ones(64))
    assert not one["h.0.mlp.c_fc.bias"].any()
    positions = one["wpe.weight"]
    assert positions.square().mean().sqrt().item() == pytest.approx(1 / 8)
    later, earlier = positions[5:], positions[:-5]
    distances = (later - earlier).norm(dim=1)
    assert distances.tolist() == pytest.approx([distances[0].item()] * len(distances), rel=1e-4), "wherever they are"
    assert distances[0] > 0.3
