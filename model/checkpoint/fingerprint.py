"""A short name for a set of weights and what runs them. Answers with the same fingerprint are comparable."""

import hashlib

import torch
from torch import Tensor

from model.gpt import GPT

INTEGERS = {2: torch.int16, 4: torch.int32}  # by bytes of an element
ROWS = 4096  # of a matrix, summed at a time


@torch.inference_mode()
def weights_fingerprint(model: GPT, *extra: str) -> str:
    """A hash over the bits of every parameter and `extra`, such as the kernels and the dtype.

    It hashes the sums of each parameter's rows and columns, read as integers. They change if any element changes, or if
    rows or columns trade places, and they cost a single pass over the weights.
    """
    digest = hashlib.sha256()
    for text in extra:
        digest.update(text.encode() + b"\0")
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\0".encode())
        for sums in bit_sums(parameter):
            digest.update(sums.cpu().numpy().tobytes())
    return f"fp_{digest.hexdigest()[:10]}"


def bit_sums(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the rows and of the columns of a parameter's bits, both int64. A vector is one column."""
    bits = parameter.view(INTEGERS[parameter.element_size()])
    bits = bits.flatten(1) if bits.dim() > 1 else bits[:, None]
    columns = torch.zeros(bits.shape[1], dtype=torch.int64, device=bits.device)
    rows = []
    for part in bits.split(ROWS):
        rows.append(part.sum(1, dtype=torch.int64))
        columns += part.sum(0, dtype=torch.int64)
    return torch.cat(rows), columns
