"""The ops on a GPU: Triton launchers, one file each. See kernels.ops.Ops."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gpu.add_layernorm import add_layernorm as add_layernorm
from kernels.gpu.bias_activation import bias_activation as bias_activation
from kernels.gpu.decode_attention import decode_attention as decode_attention
from kernels.gpu.kv_write import kv_write as kv_write
from kernels.gpu.prefill_attention import prefill_attention as prefill_attention
from kernels.gpu.sampling import sample as sample
from kernels.logprobs import top_logprobs as top_logprobs
from kernels.names import Activation
from kernels.ops import BlockParts, Weight


def pack(weight: Tensor, *, quantize: bool) -> Weight:
    assert not quantize, "int8 products are for CPUs"
    return weight


def linear(x: Tensor, weight: Weight, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
    assert isinstance(weight, Tensor), "int8 products are for CPUs"
    if activation is None:
        return F.linear(x, weight, bias)
    # Adding the bias with the activation saves a pass over the product.
    return bias_activation(F.linear(x, weight), bias, activation)


def project(x: Tensor, weight: Weight) -> Tensor:
    return linear(x, weight, None)


def native_forward(
    blocks: Sequence[BlockParts], final_norm: nn.LayerNorm | None, activation: Activation, *, pre_norm: bool
) -> None:
    """Ops run one by one."""
