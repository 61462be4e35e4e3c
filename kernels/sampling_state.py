"""What sampling knows of every batch row. It lies on the device, and the runner writes it."""

from typing import NamedTuple

import torch
from torch import Tensor


class SamplingState(NamedTuple):
    """Columns (S,) and tables (S, V) of S batch rows."""

    temperature: Tensor  # 0 is greedy
    top_k: Tensor  # 0 keeps all
    top_p: Tensor
    min_p: Tensor  # least probability, as a share of the likeliest token's; 0 keeps all
    repetition_penalty: Tensor  # divides positive and multiplies negative logits of tokens seen; 1 is off
    presence_penalty: Tensor  # subtracted once from the logit of a generated token
    frequency_penalty: Tensor  # subtracted as often as the token was generated
    adjusted: Tensor  # whether the row has a penalty or a bias; if not, its tables are not read
    seed: Tensor
    choice: Tensor
    bias: Tensor  # (S, V), added to the logits
    generated: Tensor  # (S, V): how often each token was generated
    in_prompt: Tensor  # (S, V): tokens of the prompt


# The dtypes of the columns, each filled from the sampling parameter of its name, and of the tables.
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
