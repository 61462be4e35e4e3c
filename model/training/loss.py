"""Next-token cross-entropy that never holds the logits of a whole batch.

Shapes: N tokens, C the width, V' the vocabulary with its padding.
"""

from typing import Any

import torch
from torch import Tensor

# Tokens whose logits exist at a time: at 50k tokens of vocabulary in bf16 about 103 MB.
CHUNK = 1024


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ weight.T`. The forward pass makes the gradients too, chunk by chunk.

    That halves the passes over the logits, by far the largest tensor of a small model with a large vocabulary.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        """Mean loss in nats (fp32 scalar) of hidden states (N, C) under the output projection `weight` (V', C).

        Targets are (N,). Rows of the weight from vocab_size on are padding.
        """
        count, dtype = hidden.shape[0], hidden.dtype
        low = weight.to(dtype)
        logits = hidden.new_empty(min(CHUNK, count), weight.shape[0])
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, count, CHUNK):
            rows, labels = hidden[start : start + CHUNK], targets[start : start + CHUNK, None]
            chunk = torch.mm(rows, low.T, out=logits[: rows.shape[0]])
            chunk[:, vocab_size:] = float("-inf")
            torch.softmax(chunk, 1, out=chunk)
            loss -= chunk.gather(1, labels).float().log().sum()
            chunk[torch.arange(len(chunk), device=chunk.device), labels.squeeze(1)] -= 1
            grad_hidden[start : start + CHUNK] = chunk @ low
            if grad_weight is not None:
                grad_weight += chunk.T @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0] / grad_hidden.shape[0]
        grad_weight = None if grad_weight is None else grad_weight * scale
        return grad_hidden * scale.to(grad_hidden.dtype), grad_weight, None, None
