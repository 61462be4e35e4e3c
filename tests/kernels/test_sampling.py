"""Sampling: all implementations against values worked out by hand, each other, and the distribution."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import noise, reference, torch_sampling
from kernels.gpu import sampling
from kernels.names import NONE_LEFT, NOT_FINITE
from kernels.sampling_state import TABLES, SamplingState
from tests.kernels.interpreter import Work
from tests.kernels.paths import SAMPLERS, Sample

INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=SAMPLERS)
def sample(request: pytest.FixtureRequest) -> Sample:
    return SAMPLERS[request.param]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 256)


def make_state(num_batch_rows: int, vocab_size: int, **given: Any) -> SamplingState:
    """Batch rows that only sample at temperature 1. `adjusted` is off, and the tables are poisoned."""
    columns = {
        "temperature": (1.0, torch.float32),
        "top_k": (0, torch.int64),
        "top_p": (1.0, torch.float32),
        "min_p": (0.0, torch.float32),
        "repetition_penalty": (NAN, torch.float32),
        "presence_penalty": (NAN, torch.float32),
        "frequency_penalty": (NAN, torch.float32),
        "adjusted": (False, torch.bool),
        "seed": (0, torch.int64),
        "choice": (0, torch.int64),
    }
    state = {name: torch.full((num_batch_rows,), value, dtype=dtype) for name, (value, dtype) in columns.items()}
    state["bias"] = torch.full((num_batch_rows, vocab_size), NAN)
    state["generated"] = torch.full((num_batch_rows, vocab_size), 1000, dtype=torch.int32)
    state["in_prompt"] = torch.ones(num_batch_rows, vocab_size, dtype=torch.bool)
    for name, value in given.items():
        state[name][:] = torch.as_tensor(value, dtype=state[name].dtype)
    return SamplingState(**state)


def adjusted_state(num_batch_rows: int, vocab_size: int, **given: Any) -> SamplingState:
    """The same with `adjusted` on. Its penalties and tables have no effect unless given."""
    neutral = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    tables = {"bias": 0, "generated": 0, "in_prompt": 0}
    return make_state(num_batch_rows, vocab_size, adjusted=True, **{**neutral, **tables, **given})


def random_state(num_batch_rows: int, vocab_size: int, generator: torch.Generator) -> SamplingState:
    """Batch rows whose parameters are on or off at random."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num_batch_rows, generator=generator)

    def sometimes(share: float, value: Tensor, off: float) -> Tensor:
        return torch.where(uniform(0, 1) < share, value, off)

    def seen(shape: tuple[int, int]) -> Tensor:
        return torch.rand(shape, generator=generator) < 0.1

    shape = (num_batch_rows, vocab_size)
    return make_state(
        num_batch_rows,
        vocab_size,
        temperature=sometimes(0.9, uniform(0.2, 1.7), 0),
        top_k=sometimes(0.4, uniform(1, 1.2 * vocab_size) ** uniform(0.2, 1), 0),
        top_p=sometimes(0.5, uniform(0, 1), 1),
        min_p=sometimes(0.3, uniform(0, 0.2), 0),
        repetition_penalty=uniform(0.7, 1.7),
        presence_penalty=uniform(-1, 1),
        frequency_penalty=uniform(-1, 1),
        adjusted=uniform(0, 1) < 0.5,
        seed=torch.randint(-(2**63), 2**63 - 1, (num_batch_rows,), generator=generator),
        choice=torch.randint(0, 8, (num_batch_rows,), generator=generator),
        bias=torch.randn(shape, generator=generator) * seen(shape),
        generated=torch.randint(1, 5, shape, generator=generator) * seen(shape),
        in_prompt=seen(shape),
    )


def kept_tokens(sample: Sample, logits: list[float], **given: Any) -> set[int]:
    """The tokens of a row that truncation keeps. Each is tried at a position where it wins if nothing is truncated."""
    state = make_state(1, len(logits), temperature=given.pop("temperature", 1.0), seed=5)
    n = 4000
    rows = torch.tensor(logits).expand(n, -1)
    winners = torch_sampling.sample(rows, state, torch.zeros(n, dtype=torch.int64), torch.arange(n)).tolist()
    positions = torch.tensor([winners.index(token) for token in range(len(logits))])
    for name, value in given.items():
        getattr(state, name)[:] = value
    tokens = sample(rows[: len(logits)].contiguous(), state, torch.zeros_like(positions), positions)
    return {token for token, drawn in enumerate(tokens.tolist()) if token == drawn}


# The distribution


def oracle(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """Token -> probability, for logits that all differ."""
    peak = max(logits.tolist())
    weights = {i: math.exp((x - peak) / temperature) for i, x in enumerate(logits.tolist())}
    ranked = sorted(weights, key=lambda i: -weights[i])[: top_k or None]
    ranked = [i for i in ranked if weights[i] >= min_p]
    mass = sum(weights[i] for i in ranked)
    kept: dict[int, float] = {}
    for token in ranked:
        if kept and sum(kept.values()) >= top_p * mass:
            break
        kept[token] = weights[token]
    total = sum(kept.values())
    return {token: weight / total for token, weight in kept.items()}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.5, 5, 1.0, 0.0),
        (1.3, 0, 0.3, 0.0),
        (1.0, 20, 0.6, 0.0),
        (1.0, 1, 1.0, 0.0),
        (2.0, 0, 0.0, 0.0),
        (1.0, 0, 0.999, 0.0),
        (1.5, 0, 1.0, 0.1),
        (1.5, 20, 0.9, 0.2),
    ],
)
@pytest.mark.parametrize("name", ["cpu", "compiled"])
def test_draws_follow_the_truncated_distribution(
    name: str, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    expected = oracle(logits, temperature, top_k, top_p, min_p)
    n = 20_000
    state = make_state(1, 40, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=3)
    tokens = SAMPLERS[name](logits.expand(n, -1), state, torch.zeros(n, dtype=torch.int64), torch.arange(n))
    counts = torch.bincount(tokens, minlength=40).tolist()
    assert {i for i, c in enumerate(counts) if c} <= set(expected)
    for token, probability in expected.items():
        spread = math.sqrt(n * probability * (1 - probability))
        assert abs(counts[token] - n * probability) <= 5 * spread + 1


# Equal tokens


@pytest.mark.parametrize(("name", "count", "vocab_size"), [("cpu", 150, 600), ("compiled", 150, 600), ("triton", 20, 400)])
@pytest.mark.usefixtures("small_tiles")
def test_random_rows_get_the_reference_s_tokens(
    name: str, count: int, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_sampling, "SHORTLIST", 128)
    generator = torch.Generator().manual_seed(2)
    state = random_state(count, vocab_size, generator)
    scale = 10 ** (2 * torch.rand(count, 1, generator=generator) - 1)
    logits = torch.randn(count, vocab_size, generator=generator) * scale
    batch_rows = torch.randperm(count, generator=generator)
    positions = torch.randint(0, 2048, (count,), generator=generator)
    expected = reference.sample(logits, state, batch_rows, positions)
    tokens = SAMPLERS[name](logits, state, batch_rows, positions)
    different = torch.nonzero(tokens != expected).squeeze(1).tolist()
    for i in different:
        assert is_close_call(logits[i], state, int(batch_rows[i]), int(positions[i])), f"row {i}"
    assert len(different) <= count // 50


def is_close_call(logits: Tensor, state: SamplingState, batch_row: int, position: int) -> bool:
    """Whether less than 1e-5 decides the row's top-p cut, its min-p cut or its best noised logit."""
    if state.adjusted[batch_row]:
        logits = reference.adjust(logits, state, batch_row)
    x = (logits - logits.max()).double() / state.temperature[batch_row].double()
    top_k, top_p, min_p = int(state.top_k[batch_row]), float(state.top_p[batch_row]), float(state.min_p[batch_row])
    weight = x.exp()
    if top_k > 0:
        weight[(x > x[:, None]).sum(-1) >= top_k] = 0
    if min_p > 0 and (weight - min_p).abs().min() < 1e-5:
        return True
    weight[weight < min_p] = 0
    heavier = (x > x[:, None]).double() @ weight / weight.sum()
    if top_p < 1 and (heavier - top_p).abs().min() < 1e-5:
        return True
    key = noise.row_keys(state.seed[batch_row, None], state.choice[batch_row, None], torch.tensor([position]))
    noised = (x + noise.gumbel(key, torch.arange(len(x)))[0])[(weight > 0) & ((heavier < top_p) | (x == 0))]
    best = noised.max()
    return int((noised > best - 1e-5).sum()) > 1


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 0.9, 0), (0, 0.99, 0), (2000, 1, 0), (3000, 0.7, 0), (9999, 1, 0), (50, 0.5, 0), (0, 0.9, 0.01), (0, 1, 0.5)],
)
def test_the_shortlist_never_changes_the_token(
    top_k: int, top_p: float, min_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    flat, peaked = torch.randn(32, 5000, generator=generator) * 0.1, torch.randn(32, 5000, generator=generator) * 6
    tied = (torch.randn(32, 5000, generator=generator) * 2).round()
    logits = torch.cat((flat, peaked, tied))
    state = make_state(1, 5000, top_k=top_k, top_p=top_p, min_p=min_p, seed=9)
    batch_rows, positions = torch.zeros(96, dtype=torch.int64), torch.arange(96)
    with_shortlist = torch_sampling.sample(logits, state, batch_rows, positions)
    monkeypatch.setattr(torch_sampling, "SHORTLIST", 5000)
    assert torch.equal(with_shortlist, torch_sampling.sample(logits, state, batch_rows, positions))


def test_the_whole_vocabulary_is_sorted_only_for_rows_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(6, 5000, generator=generator) * 6
    logits[5] *= 0.01
    looked_at: list[tuple[int, int]] = []

    def counted(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, width: int) -> Any:
        looked_at.append((len(scaled), width))
        return shortlist(scaled, top_k, top_p, min_p, width)

    shortlist = torch_sampling.shortlist
    monkeypatch.setattr(torch_sampling, "shortlist", counted)
    state = make_state(
        6,
        5000,
        temperature=[0, 1, 1, 1, 1, 1],
        top_k=[7, 0, 40, 0, 0, 0],
        top_p=[1, 1, 1, 0.9, 1, 0.9],
        min_p=[0, 0, 0, 0, 0.1, 0],
    )
    torch_sampling.sample(logits, state, torch.arange(6), torch.arange(6))
    assert looked_at == [(4, 1024), (1, 5000)]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_row_draws_the_same_alone_and_in_any_batch_and_batch_row(sample: Sample) -> None:
    generator = torch.Generator().manual_seed(5)
    state = random_state(7, 300, generator)._replace(
        temperature=torch.tensor([0.0, 1.0, 0.7, 2.0, 1.0, 1.0, 0.9]),
        top_k=torch.tensor([0, 0, 40, 0, 200, 7, 0]),
        top_p=torch.tensor([1.0, 1.0, 0.9, 0.5, 1.0, 0.1, 1.0]),
    )
    logits = torch.randn(7, 300, generator=generator)
    logits[4] = NAN
    positions = torch.tensor([10, 20, 30, 40, 50, 60, 2**62])
    together = sample(logits, state, torch.arange(7), positions)
    order = torch.tensor([3, 6, 0, 5, 1, 2])
    moved = SamplingState(*(column.roll(2, 0) for column in state))
    assert torch.equal(sample(logits[order], moved, (order + 2) % 7, positions[order]), together[order])
    for i in (0, 1, 2, 3):
        assert sample(logits[i : i + 1], state, torch.tensor([i]), positions[i : i + 1]) == together[i]


# Greedy


def test_a_temperature_of_0_takes_the_first_maximum(sample: Sample) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [-5.0, -4.0, -4.0, -9.0], [7.0, 7.0, 7.0, 7.0]])
    state = make_state(3, 4, temperature=0, top_k=2, top_p=0.9, min_p=0.1)
    assert sample(logits, state, torch.arange(3), torch.arange(3)).tolist() == [1, 1, 0]


@pytest.mark.usefixtures("small_tiles")
def test_a_tiny_temperature_does_not_overflow(sample: Sample) -> None:
    logits = torch.randn(4, 600, generator=torch.Generator().manual_seed(6)) * 30
    state = make_state(4, 600, temperature=1e-6, top_p=[1, 1, 0.9, 0.9])
    assert torch.equal(sample(logits, state, torch.arange(4), torch.arange(4)), logits.argmax(-1))


# Truncation


def test_ties_at_the_cut_of_top_k_stay_together(sample: Sample) -> None:
    assert kept_tokens(sample, [0.0, 1.5, 1.0, 1.0, 0.9, 1.0], top_k=2) == {1, 2, 3, 5}


def test_ties_at_the_cut_of_top_p_stay_together(sample: Sample) -> None:
    # Weights 3, 2, 2, 2, 1: half of 10 is reached among the twos.
    logits = [math.log(w) for w in (2, 1, 2, 3, 2)]
    assert kept_tokens(sample, logits, top_p=0.5) == {0, 2, 3, 4}
    assert kept_tokens(sample, logits, top_p=0.29) == {3}


def test_ties_that_reach_the_end_of_the_shortlist_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_sampling, "SHORTLIST", 4)
    logits = [2.0] + [1.0] * 5
    for given in ({"top_k": 2}, {"top_k": 4}, {"top_p": 0.45}):
        assert kept_tokens(torch_sampling.sample, logits, **given) == {0, 1, 2, 3, 4, 5}


def test_mass_beyond_the_shortlist_is_that_which_min_p_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_sampling, "SHORTLIST", 4)
    # The first two weigh 1.9. That reaches 45 % of the 4.0 that min-p leaves, but not of the 4.3 of all tokens.
    logits = [math.log(w) for w in (1, 0.9, 0.8, 0.7, 0.6, 0.3)]
    assert kept_tokens(torch_sampling.sample, logits, top_p=0.45, min_p=0.5) == {0, 1}
    assert kept_tokens(torch_sampling.sample, logits, top_p=0.45) == {0, 1, 2}


def test_a_top_p_of_1_keeps_what_is_too_light_to_move_the_sum() -> None:
    one = torch.ones(1)
    _, kept, _ = torch_sampling.shortlist(torch.tensor([[0.0, -90.0]]), one.long() * 2, one, one * 0, 2)
    assert kept.tolist() == [[0, -90]]


def test_a_top_p_of_0_keeps_the_maxima(sample: Sample) -> None:
    assert kept_tokens(sample, [1.0, 2.0, 1.9, 2.0], top_p=0) == {1, 3}


def test_min_p_is_a_share_of_the_likeliest_token_after_the_temperature(sample: Sample) -> None:
    logits = [math.log(w) for w in (0.24, 1.0, 0.26, 0.5)]
    assert kept_tokens(sample, logits, min_p=0.25) == {1, 2, 3}
    assert kept_tokens(sample, logits, min_p=0.2, temperature=0.5) == {1, 3}
    assert kept_tokens(sample, logits, min_p=1) == {1}


def test_top_p_is_a_share_of_what_top_k_and_min_p_leave(sample: Sample) -> None:
    # The weights are 4, 3, 2, 1, 1. The 4 is 36 % of all, 57 % of the first two, 44 % of the first three.
    logits = [math.log(w) for w in (4, 3, 2, 1, 1)]
    assert kept_tokens(sample, logits, top_p=0.5) == {0, 1}
    assert kept_tokens(sample, logits, top_p=0.5, top_k=2) == {0}
    assert kept_tokens(sample, logits, top_p=0.5, top_k=3) == {0, 1}
    assert kept_tokens(sample, logits, top_p=0.5, min_p=0.7) == {0}
    assert kept_tokens(sample, logits, top_k=4, min_p=0.4) == {0, 1, 2}
    assert kept_tokens(sample, logits, top_k=2, min_p=0.1) == {0, 1}


@pytest.mark.parametrize("given", [{"top_k": 4000}, {"top_k": 200}, {"min_p": 1e-45}])
def test_truncation_that_keeps_all_changes_nothing(sample: Sample, given: dict[str, float]) -> None:
    logits = torch.linspace(-200, 0, 200).flip(0).expand(4, -1).contiguous()
    batch_rows, positions = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    plain = make_state(1, 200, temperature=50.0, seed=8)
    given = {"temperature": 50.0, "seed": 8, **given}
    assert torch.equal(
        sample(logits, make_state(1, 200, **given), batch_rows, positions), sample(logits, plain, batch_rows, positions)
    )


# Penalties and bias


@pytest.mark.parametrize(
    ("given", "logit", "expected"),
    [
        ({"repetition_penalty": 2, "generated": 3}, 3.0, 1.5),
        ({"repetition_penalty": 2, "in_prompt": 1}, 3.0, 1.5),
        ({"repetition_penalty": 2, "in_prompt": 1}, -3.0, -6.0),
        ({"repetition_penalty": 0.5, "generated": 1}, -3.0, -1.5),
        ({"repetition_penalty": 2}, 3.0, 3.0),
        ({"presence_penalty": 0.75, "generated": 3}, 1.0, 0.25),
        ({"presence_penalty": 0.75, "in_prompt": 1}, 1.0, 1.0),
        ({"frequency_penalty": 0.5, "generated": 3}, 1.0, -0.5),
        ({"frequency_penalty": -0.5, "generated": 3}, 1.0, 2.5),
        ({"frequency_penalty": 0.5, "in_prompt": 1}, 1.0, 1.0),
        ({"bias": -1.25}, 1.0, -0.25),
        # 3 / 2 - 0.5 * 3 - 0.75 + 4: the repetition penalty applies to the bare logit.
        (
            {"repetition_penalty": 2, "frequency_penalty": 0.5, "presence_penalty": 0.75, "generated": 3, "bias": 4},
            3.0,
            3.25,
        ),
        ({"repetition_penalty": 2, "in_prompt": 1, "bias": 4}, -1.0, 2.0),
    ],
)
def test_adjusted_logits_worked_out_by_hand(sample: Sample, given: dict[str, float], logit: float, expected: float) -> None:
    """Token 2 beats a rival just below its expected logit and loses to one just above. Only token 2 has table entries."""
    tables = {name: torch.tensor([0, 0, value]) for name, value in given.items() if name in TABLES}
    state = adjusted_state(1, 3, temperature=0, **{**given, **tables})
    logits = torch.tensor([[expected - 0.01, -99.0, logit], [expected + 0.01, -99.0, logit]])
    assert sample(logits, state, torch.zeros(2, dtype=torch.int64), torch.arange(2)).tolist() == [2, 0]


def test_batch_rows_without_adjustment_read_no_tables() -> None:
    logits = torch.randn(3, 301, generator=torch.Generator().manual_seed(7))
    state = make_state(3, 301, temperature=[0, 1, 1], top_k=[0, 0, 9])
    with Work(bias=state.bias, generated=state.generated, in_prompt=state.in_prompt) as work:
        tokens = sampling.sample(logits, state, torch.arange(3), torch.arange(3))
    assert not work.touched["bias"] | work.touched["generated"] | work.touched["in_prompt"]
    assert not work.out_of_bounds, "the storage ends with the last row, at 301 tokens, no multiple of 4"
    # The poison in the tables would show in any token.
    neutral = adjusted_state(3, 301, temperature=[0, 1, 1], top_k=[0, 0, 9])
    for sample in SAMPLERS.values():
        assert torch.equal(sample(logits, state, torch.arange(3), torch.arange(3)), tokens)
        assert torch.equal(sample(logits, neutral, torch.arange(3), torch.arange(3)), tokens)


# Rows with NaN or infinity


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("make", [make_state, adjusted_state])
@pytest.mark.parametrize("given", [{"temperature": 0}, {}, {"top_p": 0.9, "top_k": 5, "min_p": 0.1}])
def test_a_row_that_no_token_can_be_sampled_from_says_so_and_disturbs_no_other(
    sample: Sample, make: Callable[..., SamplingState], given: dict[str, float]
) -> None:
    logits = torch.randn(9, 300, generator=torch.Generator().manual_seed(8))
    state = make(1, 300, **given)
    batch_rows, positions = torch.zeros(9, dtype=torch.int64), torch.arange(9)
    before = sample(logits, state, batch_rows, positions)
    logits[0] = NAN
    logits[1] = -INF
    logits[2, 100:] = NAN
    logits[3, [7, 9]] = INF
    logits[4, 299] = NAN  # the last token, in a tile of its own
    logits[5, 0] = NAN
    logits[6] = -INF
    logits[6, 255] = NAN
    logits[7] = -INF
    logits[7, 290] = 3.0
    after = sample(logits, state, batch_rows, positions).tolist()
    assert after == [NOT_FINITE, NONE_LEFT, *[NOT_FINITE] * 5, 290, before[8]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_of_minus_infinity_on_all_tokens_leaves_none(sample: Sample, temperature: float) -> None:
    bias = torch.full((2, 300), -INF)
    bias[1, 299] = 0.0
    state = adjusted_state(2, 300, temperature=temperature, bias=bias)
    assert sample(torch.zeros(2, 300), state, torch.arange(2), torch.arange(2)).tolist() == [NONE_LEFT, 299]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_a_penalty_makes_infinite_is_no_fault_of_the_model(sample: Sample) -> None:
    """A repetition penalty may be so small that fp32 holds 0."""
    state = adjusted_state(2, 300, temperature=[0.0, 1.0], repetition_penalty=0.0, in_prompt=1)
    assert (sample(torch.ones(2, 300), state, torch.arange(2), torch.arange(2)) >= 0).all()


def test_tokens_of_minus_infinity_are_never_drawn(sample: Sample) -> None:
    logits = torch.tensor([-INF, 0.0, -INF, 0.0]).expand(16, -1).contiguous()
    state = make_state(16, 4, top_k=[0] * 10 + [3] * 6)
    assert set(sample(logits, state, torch.arange(16), torch.arange(16)).tolist()) == {1, 3}


# Noise


@triton.jit
def _noise(keys_ptr, mixed_ptr, gumbel_ptr, ids_ptr, BLOCK: tl.constexpr):
    row, lanes = tl.program_id(0), tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + row).to(tl.uint64, bitcast=True)
    tl.store(mixed_ptr + row, sampling._mix(key).to(tl.int64, bitcast=True))
    tl.store(gumbel_ptr + row * BLOCK + lanes, sampling._gumbel(key, tl.load(ids_ptr + lanes)))


def splitmix64(x: int) -> int:
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def unmixed(x: int) -> int:
    """The number whose splitmix64 is x."""

    def unshifted(y: int, bits: int) -> int:
        x = y
        for _ in range(64 // bits):
            x = y ^ (x >> bits)
        return x

    x = unshifted(x, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) % (1 << 64)
    x = unshifted(x, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) % (1 << 64)
    return (unshifted(x, 30) - 0x9E3779B97F4A7C15) % (1 << 64)


def signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


EXTREMES = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]


def test_mix_is_splitmix64_in_both_languages() -> None:
    keys, ids = torch.tensor(EXTREMES), torch.arange(8, dtype=torch.int32)
    mixed, gumbel = torch.empty_like(keys), torch.empty(len(keys), 8)
    _noise[(len(keys),)](keys, mixed, gumbel, ids, BLOCK=8)
    assert mixed.tolist() == [signed(splitmix64(x % (1 << 64))) for x in EXTREMES]
    assert torch.equal(mixed, noise.mix(keys))
    torch.testing.assert_close(gumbel, noise.gumbel(keys, ids.long()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("number", [0, 1, 2**64 - 1, 2**64 - 2**40, 2**63])
def test_the_least_and_the_largest_noise_are_finite_and_the_same_in_both_languages(number: int) -> None:
    # The key whose hash with token 4 is `number`.
    keys, ids = torch.tensor([signed(unmixed(number) ^ 5)]), torch.full((2,), 4, dtype=torch.int32)
    assert noise.mix(keys ^ 5).item() == signed(number)
    gumbel = torch.empty(1, 2)
    _noise[(1,)](keys, torch.empty_like(keys), gumbel, ids, BLOCK=2)
    assert gumbel.isfinite().all()
    torch.testing.assert_close(gumbel, noise.gumbel(keys, ids.long()), atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("small_tiles")
def test_seed_choice_and_position_of_any_size_give_the_reference_s_tokens(sample: Sample) -> None:
    n = len(EXTREMES)
    state = make_state(n, 300, seed=EXTREMES, choice=EXTREMES[1:] + EXTREMES[:1])
    positions = torch.tensor(EXTREMES[2:] + EXTREMES[:2])
    tokens = sample(torch.zeros(n, 300), state, torch.arange(n), positions)
    keys = noise.row_keys(state.seed, state.choice, positions)
    assert torch.equal(tokens, noise.gumbel(keys, torch.arange(300)).argmax(-1))


def test_noise_depends_on_seed_choice_position_and_token_and_is_gumbel() -> None:
    def one(seed: int, choice: int, position: int, token: int) -> float:
        key = noise.row_keys(*(torch.tensor([x]) for x in (seed, choice, position)))
        return float(noise.gumbel(key, torch.tensor([token])))

    changes = [(5, 1, 9, 4), (6, 1, 9, 4), (5, 2, 9, 4), (5, 1, 10, 4), (5, 1, 9, 5), (1, 5, 9, 4), (9, 1, 5, 4)]
    assert len({one(*change) for change in changes}) == len(changes)
    n, vocab_size = 200, 5000
    zeros = torch.zeros(n, dtype=torch.int64)
    many = noise.gumbel(noise.row_keys(zeros, zeros, torch.arange(n)), torch.arange(vocab_size))
    assert many.isfinite().all()
    # exp(-exp(-g)) of Gumbel noise is uniform.
    counts = torch.histc((-(-many.double()).exp()).exp(), 100, 0, 1)
    expected = n * vocab_size / 100
    assert ((counts - expected) ** 2 / expected).sum() < 160, "99 degrees of freedom: the 0.9999 quantile is about 155"
    assert abs(torch.corrcoef(torch.stack((many[:-1].flatten(), many[1:].flatten())))[0, 1]) < 0.005
    assert abs(torch.corrcoef(torch.stack((many[:, :-1].flatten(), many[:, 1:].flatten())))[0, 1]) < 0.005


def test_rounding_errors_of_the_logits_hardly_ever_change_the_token() -> None:
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(1000, 5000, generator=generator)
    noisy = logits * (1 + 1e-6 * torch.randn(1000, 5000, generator=generator))
    state = make_state(1, 5000, seed=11)
    batch_rows, positions = torch.zeros(1000, dtype=torch.int64), torch.arange(1000)
    tokens = torch_sampling.sample(logits, state, batch_rows, positions)
    assert (tokens != torch_sampling.sample(noisy, state, batch_rows, positions)).sum() <= 1


# The launcher


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("vocab_size", "stride", "aligned"), [(301, 304, True), (301, 305, False), (512, 512, True)])
def test_rows_apart_are_read_to_their_end_and_no_further(vocab_size: int, stride: int, aligned: bool) -> None:
    generator = torch.Generator().manual_seed(10)
    state = random_state(5, vocab_size, generator)._replace(adjusted=torch.tensor([True, False, True, False, True]))
    logits = torch.randn(5, vocab_size, generator=generator)
    logits[:, -1] += torch.tensor([9.0, 9.0, 0.0, 0.0, 0.0])
    batch_rows = positions = torch.arange(5)
    expected = reference.sample(logits, state, batch_rows, positions)
    assert expected[0] == expected[1] == vocab_size - 1

    def apart(rows: Tensor, poison: float) -> Tensor:
        wide = torch.full((5, stride), poison).to(rows.dtype)
        wide[:, :vocab_size] = rows
        return wide[:, :vocab_size]

    state = state._replace(
        bias=apart(state.bias, 1e9), generated=apart(state.generated, 1e9), in_prompt=apart(state.in_prompt, 1)
    )
    for poison in (NAN, 1e9):
        rows = apart(logits, poison)
        assert sampling.has_aligned_rows(rows) == aligned
        assert torch.equal(sampling.sample(rows, state, batch_rows, positions), expected)


def test_rows_whose_padding_ends_with_the_storage_are_not_read_beyond_it() -> None:
    assert sampling.has_aligned_rows(torch.empty(304 + 304).as_strided((2, 301), (304, 1)))
    assert not sampling.has_aligned_rows(torch.empty(304 + 303).as_strided((2, 301), (304, 1)))


def test_the_launcher_refuses_what_the_kernel_would_misread() -> None:
    state = make_state(4, 64)
    logits, batch_rows, positions = torch.zeros(2, 64), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(AssertionError, match=r"logits is torch\.float64, not torch\.float32"):
        sampling.sample(logits.double(), state, batch_rows, positions)
    with pytest.raises(AssertionError, match=r"rows of logits must be contiguous, strides are \(1, 2\)"):
        sampling.sample(torch.zeros(64, 2).T, state, batch_rows, positions)
    with pytest.raises(AssertionError, match=r"batch_rows is torch\.int32, not torch\.int64"):
        sampling.sample(logits, state, batch_rows.int(), positions)
    with pytest.raises(AssertionError, match=r"positions has shape \(1,\), not \(2,\)"):
        sampling.sample(logits, state, batch_rows, positions[:1])
    with pytest.raises(AssertionError, match=r"top_k is torch\.int32, not torch\.int64"):
        sampling.sample(logits, state._replace(top_k=state.top_k.int()), batch_rows, positions)
    with pytest.raises(AssertionError, match=r"^seed must be contiguous"):
        sampling.sample(logits, state._replace(seed=torch.zeros(8, dtype=torch.int64)[::2]), batch_rows, positions)
    with pytest.raises(AssertionError, match=r"bias has shape \(4, 63\), not \(4, 64\)"):
        sampling.sample(logits, state._replace(bias=torch.zeros(4, 63)), batch_rows, positions)
    apart = torch.zeros(4, 65, dtype=torch.bool)[:, :64]
    with pytest.raises(AssertionError, match="rows of in_prompt lie 65 elements apart, those of bias 64"):
        sampling.sample(logits, state._replace(in_prompt=apart), batch_rows, positions)


def test_only_tokens_without_an_infinite_bias_are_sampled(sample: Sample) -> None:
    generator = torch.Generator().manual_seed(11)
    num_rows, vocab_size = 60 if sample is not sampling.sample else 15, 300  # slow to interpret
    state = random_state(num_rows, vocab_size, generator)._replace(adjusted=torch.ones(num_rows, dtype=torch.bool))
    allowed = torch.rand(num_rows, vocab_size, generator=generator) < 0.02
    allowed[torch.arange(num_rows), torch.randint(vocab_size, (num_rows,), generator=generator)] = True
    state.bias[~allowed] = -INF
    logits = 5 * torch.randn(num_rows, vocab_size, generator=generator)
    rows = torch.arange(num_rows)
    tokens = sample(logits, state, rows, rows)
    assert allowed[rows, tokens].all()
    greedy = state._replace(temperature=torch.zeros(num_rows))
    adjusted = torch_sampling.adjust(logits, state, rows)
    assert torch.equal(sample(logits, greedy, rows, rows), adjusted.argmax(-1))
