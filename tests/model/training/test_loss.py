"""The chunked loss against torch's own cross-entropy and autograd."""

import pytest
import torch
import torch.nn.functional as F

from model.training.loss import CHUNK, LinearCrossEntropy


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 3, 2 * CHUNK])
def test_loss_and_gradients_are_those_of_torch(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, 16, generator=generator, requires_grad=True)
    weight = torch.randn(384, 16, generator=generator, requires_grad=True)
    targets = torch.randint(331, (count,), generator=generator)
    expected = F.cross_entropy((hidden @ weight.T)[:, :331], targets)
    expected_grads = torch.autograd.grad(expected * 3, (hidden, weight))
    loss = LinearCrossEntropy.apply(hidden, weight, targets, 331)
    grads = torch.autograd.grad(loss * 3, (hidden, weight))
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    assert not grads[1][331:].any(), "the padding of the vocabulary must not learn"
