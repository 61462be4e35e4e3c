"""Block by block, but what PyTorch's own argmax and topk find."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.long_rows import first_argmax, highest


@given(
    num_columns=st.integers(1, 300),
    num_values=st.integers(1, 400),
    count=st.integers(1, 8),
    padding=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_they_are_argmax_and_topk(num_columns: int, num_values: int, count: int, padding: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(num_values, (3, num_columns + padding), generator=generator).float()
    whole[:, num_columns:] = float("inf")
    whole[0, :num_columns] = float("-inf")
    rows = whole[:, :num_columns]  # as logits are a part of the padded vocabulary's
    assert torch.equal(first_argmax(rows), rows.argmax(-1))
    count = min(count, num_columns)
    found = highest(rows, count)
    assert torch.equal(rows.gather(1, found).sort(descending=True).values, rows.topk(count).values)
    assert all(len(set(row)) == count for row in found[1:].tolist()), "no column twice"


@pytest.mark.parametrize("column", [0, 63, 64, 299])
def test_nan_is_found_as_argmax_finds_it(column: int) -> None:
    rows = torch.randn(2, 300)
    rows[1, column] = float("nan")
    assert torch.equal(first_argmax(rows), rows.argmax(-1))
