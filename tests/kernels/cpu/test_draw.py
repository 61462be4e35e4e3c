"""The compiled draw against kernels.torch_sampling and the reference: odd shapes and values, threads, real sizes."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference, torch_sampling
from kernels.names import NONE_LEFT, NOT_FINITE
from kernels.sampling_state import TABLES, SamplingState
from tests.kernels.compiled import VARIANTS, compiled_ops
from tests.kernels.paths import SAMPLERS, Sample
from tests.kernels.test_sampling import adjusted_state, is_close_call, kept_tokens, make_state, random_state

INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=[name for name in VARIANTS if "products" not in name])
def sample(request: pytest.FixtureRequest) -> Sample:
    ops = compiled_ops(16, torch.float32, request.param)
    return ops.sample


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def apart(rows: Tensor, padding: int) -> Tensor:
    """The same rows as a part of longer ones, which hold NaN or the greatest integers after them."""
    poison = NAN if rows.is_floating_point() else True if rows.dtype == torch.bool else torch.iinfo(rows.dtype).max
    whole = torch.full((len(rows), rows.shape[1] + padding), poison, dtype=rows.dtype)
    whole[:, : rows.shape[1]] = rows
    return whole[:, : rows.shape[1]]


@given(
    vocab_size=st.one_of(st.integers(1, 200), st.integers(201, 700)),
    num_values=st.sampled_from([1, 2, 7, 100, 1 << 23]),
    scale=st.sampled_from([1e-38, 1e-5, 0.1, 1, 5, 30, 1e30]),
    banned=st.sampled_from([0, 0, 0.3, 0.98]),
    heat=st.sampled_from([1e-6, 1e-3, 1, 1, 1, 1e3, 1e30]),
    padding=st.integers(0, 20),
    seed=st.integers(0, 1 << 32),
)
def test_any_rows_get_the_reference_s_tokens(
    vocab_size: int, num_values: int, scale: float, banned: float, heat: float, padding: int, seed: int
) -> None:
    """Few values make ties, also at the cuts."""
    generator = torch.Generator().manual_seed(seed)
    count = 8
    state = random_state(count, vocab_size, generator)
    state.temperature[:] *= heat
    state.top_k[0], state.top_p[1], state.min_p[2] = 1, 1e-6, 1
    state.top_k[3] = vocab_size + int(torch.randint(-1, 2, (1,), generator=generator))
    state = state._replace(**{name: apart(getattr(state, name), padding) for name in TABLES})
    logits = torch.randint(num_values, (count, vocab_size), generator=generator) / num_values * 6 - 3
    logits = apart(logits * scale, padding)
    logits.masked_fill_(torch.rand(logits.shape, generator=generator) < banned, -INF)
    if seed % 4 == 0:
        logits[4, seed % vocab_size], logits[5, seed % vocab_size] = NAN, INF
    batch_rows = torch.randperm(count, generator=generator)
    positions = torch.randint(0, 2048, (count,), generator=generator)
    expected = reference.sample(logits, state, batch_rows, positions)
    for name in ("compiled", "compiled for AVX2"):
        tokens = SAMPLERS[name](logits, state, batch_rows, positions)
        for i in torch.nonzero(tokens != expected).squeeze(1).tolist():
            assert is_close_call(logits[i], state, int(batch_rows[i]), int(positions[i])), f"{name}, row {i}"


@pytest.mark.parametrize("scale", [1.0, 3.3])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1, 0), (0, 0.95, 0), (0, 0.5, 0), (0, 0.99999, 0), (50, 1, 0), (5000, 1, 0), (40, 0.95, 0.05), (3000, 0.9, 0)],
)
def test_a_vocabulary_of_real_size_gets_the_same_tokens_as_from_torch(
    sample: Sample, scale: float, top_k: int, top_p: float, min_p: float
) -> None:
    generator = torch.Generator().manual_seed(11)
    logits = apart(scale * torch.randn(24, 50257, generator=generator), 47)
    state = make_state(1, 50257, top_k=top_k, top_p=top_p, min_p=min_p, seed=7)
    rows, positions = torch.zeros(24, dtype=torch.int64), torch.arange(24)
    assert torch.equal(sample(logits, state, rows, positions), torch_sampling.sample(logits, state, rows, positions))


def test_a_mix_of_rows_gets_the_same_tokens_as_from_torch(sample: Sample) -> None:
    generator = torch.Generator().manual_seed(12)
    state = random_state(40, 20_000, generator)
    logits = torch.randn(40, 20_000, generator=generator) * torch.linspace(0.1, 5, 40)[:, None]
    rows, positions = torch.randperm(40, generator=generator), torch.arange(40)
    assert torch.equal(sample(logits, state, rows, positions), torch_sampling.sample(logits, state, rows, positions))


@pytest.mark.usefixtures("threads")
def test_a_row_draws_the_same_in_any_batch_and_by_any_number_of_threads(sample: Sample) -> None:
    generator = torch.Generator().manual_seed(13)
    state = random_state(30, 5003, generator)
    logits, positions = torch.randn(30, 5003, generator=generator), torch.arange(30)
    logits[7, 5002], logits[8] = NAN, -INF
    together = sample(logits, state, torch.arange(30), positions)
    for num_threads in (1, 2, 3, 8):
        torch.set_num_threads(num_threads)
        order = torch.randperm(30, generator=generator)
        assert torch.equal(sample(logits[order], state, order, positions[order]), together[order])
        for i in range(30):
            assert sample(logits[i : i + 1], state, torch.tensor([i]), positions[i : i + 1]) == together[i]
    assert sample(logits[:0], state, torch.arange(0), positions[:0]).shape == (0,)


def test_transposed_logits_are_copied(sample: Sample) -> None:
    logits = torch.randn(300, 5, generator=torch.Generator().manual_seed(14)).T
    state = make_state(5, 300, temperature=0)
    assert torch.equal(sample(logits, state, torch.arange(5), torch.arange(5)), logits.argmax(-1))


def test_columns_of_another_dtype_are_refused(sample: Sample) -> None:
    state = make_state(1, 8)
    with pytest.raises(AssertionError, match=r"top_k: torch\.int32"):
        sample(torch.zeros(1, 8), state._replace(top_k=state.top_k.int()), torch.zeros(1).long(), torch.zeros(1).long())


@pytest.mark.parametrize("name", ["compiled", "cpu"])
def test_many_equal_logits_are_cut_as_one(name: str) -> None:
    """All in one bin of the histogram, however narrow."""
    logits = [0.0] + [-1.0] * 50 + [-1 - 2.0**-22] * 50
    assert kept_tokens(SAMPLERS[name], logits, top_k=2) == set(range(51))
    assert kept_tokens(SAMPLERS[name], logits, top_k=52) == set(range(101))
    assert kept_tokens(SAMPLERS[name], logits, top_p=0.5) == set(range(51))
    assert kept_tokens(SAMPLERS[name], logits, top_p=0.52) == set(range(101))


@pytest.mark.parametrize("adjusted", [0, 1])
def test_adjusted_logits_have_the_bits_of_torch(sample: Sample, adjusted: int) -> None:
    """One token is adjusted, the other has the result for a logit: with the same bits they tie, and the first one wins."""
    generator = torch.Generator().manual_seed(16)
    count = 500

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    penalties = {"repetition_penalty": uniform(0.7, 1.7), "presence_penalty": uniform(-1, 1)}
    state = adjusted_state(count, 2, temperature=0, frequency_penalty=uniform(-1, 1), **penalties)
    state.generated[:, adjusted] = torch.randint(0, 9, (count,), generator=generator)
    state.in_prompt[:, adjusted] = uniform(0, 1) < 0.5
    state.bias[:, adjusted] = uniform(-1, 1)
    logits, rows = 3 * torch.randn(count, 2, generator=generator), torch.arange(count)
    logits[:, 1 - adjusted] = torch_sampling.adjust(logits, state, rows)[:, adjusted]
    assert not sample(logits, state, rows, rows).any()


def test_what_a_penalty_makes_infinite_is_no_fault_of_the_model(sample: Sample) -> None:
    logits = torch.zeros(2, 100)
    logits[:, 40] = 3e38
    logits[1, 80] = -INF
    for temperature in (0, 1):
        state = adjusted_state(1, 100, temperature=temperature, repetition_penalty=1e-3, in_prompt=1)
        assert sample(logits, state, torch.zeros(2).long(), torch.arange(2)).tolist() == [40, 40]
        state = adjusted_state(1, 100, temperature=temperature, bias=-INF)
        logits[0, 99] = NAN
        assert sample(logits, state, torch.zeros(2).long(), torch.arange(2)).tolist() == [NOT_FINITE, NONE_LEFT]
        logits[0, 99] = 0


def weights_of(logits: Tensor, state: SamplingState, row: int) -> Tensor:
    """What each token's share of many draws should be, by the reference's truncation."""
    if state.adjusted[row]:
        logits = reference.adjust(logits, state, row)
    x = (logits - logits.max()) / state.temperature[row]
    stays = reference.truncate(x, int(state.top_k[row]), float(state.top_p[row]), float(state.min_p[row]))
    weights = x.double().exp() * stays
    return weights / weights.sum()


def test_the_draws_of_any_mix_of_settings_have_the_reference_s_distribution() -> None:
    generator = torch.Generator().manual_seed(15)
    state = random_state(24, 200, generator)
    state.temperature.clamp_(min=0.3)
    draws = 20_000
    for row in range(24):
        logits = 2 * torch.randn(200, generator=generator)
        rows = torch.full((draws,), row)
        tokens = SAMPLERS["compiled"](logits.expand(draws, -1), state, rows, torch.arange(draws))
        counts, expected = tokens.bincount(minlength=200).double(), draws * weights_of(logits, state, row)
        assert not counts[expected == 0].any()
        # Cells of fewer than 5 are one.
        few = expected < 5
        counts = torch.cat((counts[~few], counts[few].sum(0, keepdim=True)))
        expected = torch.cat((expected[~few], expected[few].sum(0, keepdim=True)))
        counts, expected = counts[expected > 0], expected[expected > 0]
        chi_square, freedom = float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1
        assert chi_square <= freedom + 4.5 * (2 * max(freedom, 1)) ** 0.5 + 4, f"row {row}: {chi_square} of {freedom}"
