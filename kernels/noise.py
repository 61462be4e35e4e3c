"""Random numbers as hashes of (seed, choice, position, token), which are the same in any batch and order, on any device."""

import torch
from torch import Tensor


def row_keys(seed: Tensor, choice: Tensor, position: Tensor) -> Tensor:
    """A 64-bit hash (B,) of each row's seed, choice and position, (B,) int64 each."""
    return mix(mix(mix(seed) ^ choice) ^ position)


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Gumbel noise (B, n) fp32. It depends only on each row's key (B,) and on the token ids, (n,) or (B, n)."""
    numbers = shift_right(mix(keys[:, None] ^ (ids + 1)), 11)
    # u is finest near 0, where -log(1 - u) makes the largest noise.
    exponential = -torch.log1p(-((numbers.float() + 0.5) * 2.0**-53).clamp_max(1 - 2.0**-24))
    return -exponential.log()


def mix(x: Tensor) -> Tensor:
    """The splitmix64 step (Steele, Lea and Flood 2014) on int64, which wraps like uint64."""
    x = x + -0x61C8864680B583EB
    x = (x ^ shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ shift_right(x, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; >> on int64 copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
