"""What sampling knows of every slot: one row a slot, on the device, written by the runner."""

from typing import NamedTuple

from torch import Tensor


class SamplingState(NamedTuple):
    """Columns (S,) and tables (S, V) of S slots."""

    temperature: Tensor  # fp32, 0 is greedy
    top_k: Tensor  # int64, 0 keeps all
    top_p: Tensor  # fp32
    min_p: Tensor  # fp32, 0 keeps all: least probability, as a share of the likeliest token's
    repetition_penalty: Tensor  # fp32, 1 is off: divides positive and multiplies negative logits of tokens seen
    presence_penalty: Tensor  # fp32: taken once from the logit of a generated token
    frequency_penalty: Tensor  # fp32: taken as often as the token was generated
    adjusted: Tensor  # bool: whether the slot has a penalty or a bias, so that its tables are read at all
    seed: Tensor  # int64
    choice: Tensor  # int64
    bias: Tensor  # (S, V) fp32, added to the logits
    generated: Tensor  # (S, V) int32: how often each token was generated
    in_prompt: Tensor  # (S, V) bool: tokens of the prompt
