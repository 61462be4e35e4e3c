"""Penalties of a token by how often it was generated, in each implementation of sampling, as greedy choices show them."""

import pytest
import torch

from kernels.sampling_state import COLUMNS, TABLES, SamplingState
from tests.kernels.paths import SAMPLERS, Sample

VOCABULARY = 8


def penalized(generated: list[int], *, presence: float = 0.0, frequency: float = 0.0) -> SamplingState:
    """A greedy row for each count, all of which have generated token 3 that often."""
    num_rows = len(generated)
    fields = {name: torch.zeros(num_rows, dtype=dtype) for name, dtype in COLUMNS.items()}
    fields |= {name: torch.zeros(num_rows, VOCABULARY, dtype=dtype) for name, dtype in TABLES.items()}
    fields["top_p"] += 1
    fields["repetition_penalty"] += 1
    fields["adjusted"] |= True
    fields["presence_penalty"] += presence
    fields["frequency_penalty"] += frequency
    fields["generated"][:, 3] = torch.tensor(generated)
    return SamplingState(**fields)


@pytest.fixture(params=SAMPLERS)
def sample(request: pytest.FixtureRequest) -> Sample:
    return SAMPLERS[request.param]


def chosen(sample: Sample, state: SamplingState, lead: float) -> list[int]:
    """The tokens of rows where token 3 is ahead of token 5 by so much, and of all others by more."""
    num_rows = len(state.temperature)
    logits = torch.full((num_rows, VOCABULARY), -9.0)
    logits[:, 5], logits[:, 3] = 1.0, 1.0 + lead
    return sample(logits, state, torch.arange(num_rows), torch.arange(num_rows)).tolist()


def test_the_presence_penalty_is_taken_once_from_the_first_time_on(sample: Sample) -> None:
    state = penalized([0, 1, 2, 3], presence=0.5)
    assert chosen(sample, state, 0.25) == [3, 5, 5, 5]
    assert chosen(sample, state, 0.75) == [3, 3, 3, 3]


def test_the_frequency_penalty_is_taken_as_often_as_the_token_was_generated(sample: Sample) -> None:
    state = penalized([0, 1, 2, 3], frequency=0.5)
    assert chosen(sample, state, 0.25) == [3, 5, 5, 5]
    assert chosen(sample, state, 0.75) == [3, 3, 5, 5]
    assert chosen(sample, state, 1.25) == [3, 3, 3, 5]
