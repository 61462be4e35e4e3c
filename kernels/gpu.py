"""The served GPU path: the Triton launchers, one file each. See kernels.ops.Ops."""

import torch.nn.functional as F
from torch import Tensor

from kernels.add_layernorm import add_layernorm
from kernels.bias_activation import bias_activation
from kernels.block_sparse_attention import block_sparse_attention
from kernels.decode_attention import decode_attention
from kernels.kv_write import kv_write
from kernels.prefill_attention import prefill_attention
from kernels.sampling import sample

__all__ = [
    "add_layernorm",
    "bias_activation",
    "block_sparse_attention",
    "decode_attention",
    "kv_write",
    "linear",
    "prefill_attention",
    "sample",
]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)
