"""What sampling knows of every slot: one row a slot, on the device, written by the runner."""

from typing import NamedTuple

import torch
from torch import Tensor


class SamplingState(NamedTuple):
    """Columns (S,) and tables (S, V) of S slots."""

    temperature: Tensor  # 0 is greedy
    top_k: Tensor  # 0 keeps all
    top_p: Tensor
    min_p: Tensor  # 0 keeps all: least probability, as a share of the likeliest token's
    repetition_penalty: Tensor  # 1 is off: divides positive and multiplies negative logits of tokens seen
    presence_penalty: Tensor  # taken once from the logit of a generated token
    frequency_penalty: Tensor  # taken as often as the token was generated
    adjusted: Tensor  # whether the slot has a penalty or a bias, so that its tables are read at all
    seed: Tensor
    choice: Tensor
    bias: Tensor  # (S, V), added to the logits
    generated: Tensor  # (S, V): how often each token was generated
    in_prompt: Tensor  # (S, V): tokens of the prompt


# The fields that are columns, each filled from the parameter of a choice that has its name, and those that are tables.
COLUMNS = {
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "repetition_penalty": torch.float32,
    "presence_penalty": torch.float32,
    "frequency_penalty": torch.float32,
    "adjusted": torch.bool,
    "seed": torch.int64,
    "choice": torch.int64,
}
TABLES = {"bias": torch.float32, "generated": torch.int32, "in_prompt": torch.bool}
