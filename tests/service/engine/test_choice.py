"""What a choice adds up from the deltas of its sequence: text, logprobs, and the times and counts of its metrics."""

from typing import Any

import pytest

from model.step import Sampling, TokenLogprobs
from service.engine.choice import Choice, LogprobColumns
from service.engine.metrics import Metrics
from service.engine.request import GenerationRequest, Prompt, SamplingParams
from service.engine.scheduler import Delta, FinishReason, Sequence, Start
from tests.service.engine.fakes import FakeEngine

TOKENIZER = FakeEngine.tokenizer
PROMPT = Prompt(TOKENIZER.encode("One two"))
TOKENS = TOKENIZER.encode(" three four five")
SEQUENCE = Sequence(PROMPT.tokens, 16, Sampling())


def make(metrics: Metrics, **params: Any) -> Choice:
    """A choice submitted at 1.0 that got its row at 3.0."""
    request = GenerationRequest([PROMPT], SamplingParams(**params))
    choice = Choice(0, PROMPT, request, LogprobColumns(), TOKENIZER, metrics, 1.0)
    choice.begin(Start(admitted=3.0, num_looked_up=100, num_cached=64))
    return choice


def delta(tokens: list[int], finish: FinishReason | None = None, logprobs: tuple[float, ...] = ()) -> Delta:
    return Delta(SEQUENCE, tokens, finish, tuple(TokenLogprobs(each, []) for each in logprobs))


def test_metrics_are_of_the_steps_times() -> None:
    metrics = Metrics("fake")
    choice = make(metrics)
    choice.advance(delta(TOKENS[:1]), 7.0)
    choice.advance(delta(TOKENS[1:2]), 8.5)
    choice.advance(delta(TOKENS[2:], "length"), 10.0)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"banded_{name}", {"model": "fake", **labels})

    assert {name: value(f"{name}_total") for name in ("prefix_cache_queries", "prefix_cache_hits", "generated_tokens")} == {
        "prefix_cache_queries": 100,
        "prefix_cache_hits": 64,
        "generated_tokens": 3,
    }
    assert value("requests_total", outcome="length") == 1
    seconds = {
        "queue_time_seconds": (1, 2.0),
        "prefill_time_seconds": (1, 4.0),
        "time_to_first_token_seconds": (1, 6.0),
        "inter_token_latency_seconds": (2, 3.0),
        "decode_time_seconds": (1, 3.0),
        "request_time_per_output_token_seconds": (1, 1.5),
        "e2e_time_seconds": (1, 9.0),
        "request_generated_tokens": (1, 3.0),
    }
    assert {name: (value(f"{name}_count"), value(f"{name}_sum")) for name in seconds} == seconds


def test_a_choice_that_ends_with_its_first_token_has_no_time_per_token() -> None:
    metrics = Metrics("fake")
    make(metrics).advance(delta(TOKENS[:1], "length"), 7.0)
    name = "banded_request_time_per_output_token_seconds_count"
    assert metrics.registry.get_sample_value(name, {"model": "fake"}) == 0


def test_the_prompt_is_echoed_once() -> None:
    choice = make(Metrics("fake"), echo=True)
    pieces = [output.text for token in TOKENS for output in choice.advance(delta([token]), 7.0)]
    assert pieces == ["One two three", " four", " five"]
    assert choice.text == "One two three four five"


def test_the_mean_logprob_is_of_the_generated_tokens() -> None:
    choice = make(Metrics("fake"), logprobs=0)
    assert choice.mean_logprob == 0
    choice.advance(delta(TOKENS[:1], logprobs=(-1.0,)), 7.0)
    choice.advance(delta(TOKENS[1:], "length", (-2.0, -6.0)), 8.0)
    assert choice.mean_logprob == pytest.approx(-3.0)
