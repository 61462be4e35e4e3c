"""Logprobs: the likeliest tokens in order, and sums that have the same bits in any batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import reference, torch_ops
from kernels.logprobs import likeliest
from kernels.ops import Ops
from tests.kernels.compiled import compiled_ops

COMPILED = ["compiled", "compiled for AVX2"]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=["cpu", *COMPILED])
def ops(request: pytest.FixtureRequest) -> Ops:
    return torch_ops if request.param == "cpu" else compiled_ops(16, torch.float32, request.param)


@pytest.mark.parametrize("num_equal", [2, 9, 40, 331])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_the_likeliest_is_argmax_however_many_are_equal(num_equal: int, count: int) -> None:
    generator = torch.Generator().manual_seed(num_equal)
    logits = torch.rand(50, 331, generator=generator)
    for row in logits:
        row[torch.randperm(331, generator=generator)[:num_equal]] = 2.0
    ids, values = likeliest(logits, count)
    assert torch.equal(ids[:, 0], logits.argmax(-1))
    assert torch.equal(values, logits.topk(count).values)
    assert torch.equal(values, logits.gather(1, ids))
    assert all(len(set(row)) == count for row in ids.tolist()), "no token twice"


@pytest.mark.parametrize("name", COMPILED)
@given(
    vocab_size=st.integers(1, 1500),
    count=st.integers(0, 40),
    num_values=st.sampled_from([1, 3, 50, 1 << 20]),
    banned=st.sampled_from([0.0, 0.5, 0.99]),
    seed=st.integers(0, 1 << 32),
)
def test_compiled_they_are_in_the_reference_s_order(
    name: str, vocab_size: int, count: int, num_values: int, banned: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.full((3, vocab_size + 5), NAN)  # as logits are a part of the padded vocabulary's
    logits = whole[:, :vocab_size]
    logits[:] = torch.randint(num_values, logits.shape, generator=generator) / num_values * 20 - 15
    logits[:, 1:].masked_fill_(torch.rand(3, vocab_size - 1, generator=generator) < banned, -INF)
    ours, expected = compiled_ops(16, torch.float32, name).top_logprobs(logits, count), reference.top_logprobs(logits, count)
    assert torch.equal(ours.ids, expected.ids)
    torch.testing.assert_close(ours.totals, expected.totals, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(ours.logprobs, expected.logprobs, atol=4e-6, rtol=1e-6)
    assert torch.equal(ours.logprobs, logits.gather(1, ours.ids) - ours.totals)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_a_row_has_the_same_bits_in_any_batch(ops: Ops, num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        logits = 3 * torch.randn(64, 50257, generator=torch.Generator().manual_seed(0))
        together = ops.top_logprobs(logits, 5)
        assert together.totals.shape == (64, 1)
        assert torch.allclose(together.totals, logits.double().logsumexp(-1, keepdim=True).float(), atol=1e-5)
        for size in (1, 2, 3, 7):
            parts = [ops.top_logprobs(part, 5) for part in logits.split(size)]
            for found, whole in zip(map(torch.cat, zip(*parts, strict=True)), together, strict=True):
                assert torch.equal(found, whole), size
        assert [x.shape for x in ops.top_logprobs(logits[:0], 5)] == [(0, 1), (0, 5), (0, 5)]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_a_row_that_is_not_finite_has_no_finite_logprob_and_disturbs_no_other(ops: Ops, count: int) -> None:
    logits = torch.randn(6, 301, generator=torch.Generator().manual_seed(1))
    before = ops.top_logprobs(logits[5:], count)
    logits[0] = NAN
    logits[1, 300] = NAN
    logits[2, 7] = INF
    logits[3] = -INF
    logits[4, :200], logits[4, 200] = -INF, NAN
    found = ops.top_logprobs(logits, count)
    chosen = logits - found.totals
    assert not chosen[:5].isfinite().any()
    assert not found.logprobs[:5].isfinite().any()
    assert ((found.ids >= 0) & (found.ids < 301)).all()
    assert torch.equal(found.ids[5], before.ids[0])
    assert torch.equal(found.logprobs[5], before.logprobs[0])
