"""Requests that make every step raise which computes them: they end with an error, and no other request notices."""

import asyncio
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file, save_file

from service.engine.engine import Engine, StepFailedError
from service.engine.loading import load_served
from service.engine.metrics import Metrics
from service.engine.request import GenerationRequest, Prompt, SamplingParams
from service.settings import Settings
from tests.model.checkpoint.checkpoints import tiny
from tests.service.engine.poison import POISON, PoisonedRunner
from tests.service.helpers import run, until


def request(rng: random.Random, *, poisoned: bool) -> GenerationRequest:
    """One of many kinds: greedy texts that are drafted, sampled ones with penalties, forks, scores, common beginnings."""
    length = rng.choice([3, 20, 64, 130, 200])
    prompt = [100 + rng.randrange(3), *range(1, length)]  # three beginnings, to be found in the prefix cache
    prompt += [rng.randrange(200, 50257) for _ in range(rng.randrange(1, 9))]
    if poisoned:
        prompt[:2] = [POISON, rng.choice([0, len(prompt) - 1, len(prompt) + 3, len(prompt) + 12])]
    fields: dict[str, Any] = rng.choice(
        [
            {"temperature": 0.0, "max_tokens": 250 - len(prompt)},
            {"frequency_penalty": 1.9, "allowed_token_ids": tuple(range(300, 306))},
            {"repetition_penalty": 1.7, "min_tokens": 3},
            {"n": 3},
            {"n": 2, "logprobs": 2},
            {"bad_words": (" the", "a"), "allowed_token_ids": tuple(range(300, 400))},
            {"echo": True, "logprobs": 1},
        ]
    )
    return GenerationRequest([Prompt(prompt)], SamplingParams(**{"max_tokens": 14, "seed": rng.randrange(99)} | fields))


async def texts_of(engine: Engine, request: GenerationRequest) -> Any:
    """The tokens and logprobs of every choice, or the error."""
    generation = engine.generate(request)
    try:
        async for _ in generation.outputs():
            pass
    except StepFailedError as error:
        return str(error)
    return [(choice.tokens, [*choice.shown], [*choice.prompt_logprobs]) for choice in generation.best()]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny("banded", tmp_path_factory.mktemp("tiny"), vocab_size=50257, n_layer=2, band=40)
    weights = load_file(directory / "model.safetensors")
    weights["wpe.weight"].zero_()  # without position embeddings, greedy texts soon repeat themselves, and are drafted
    save_file(weights, directory / "model.safetensors")
    return directory


def run_all(
    directory: Path, requests: list[GenerationRequest], when: str | None, *, overlap: bool, kv_bytes: int = 6 << 20
) -> tuple[list[Any], int]:
    """What becomes of `requests`, which all come at once, and how many steps raised."""
    settings: dict[str, Any] = {"dtype": "float32", "compile": False, "max_slots": 7, "step_tokens": 90}
    settings["kv_bytes"] = kv_bytes
    entry = load_served(Settings(model=str(directory), **settings).engine, metrics := Metrics("tiny")).base
    steps, scheduler = entry.engine._steps, entry.engine._scheduler
    steps._num_ahead = int(overlap)
    if overlap:
        scheduler.max_draft = 0
    runner = PoisonedRunner(steps._runner, when or "never")
    if when:
        steps._runner = runner
    found: list[Any] = []

    async def test() -> None:
        entry.engine.start()
        found.extend(await asyncio.gather(*(texts_of(entry.engine, each) for each in requests)))
        await until(lambda: scheduler.idle)
        assert entry.engine.unready_reason is None
        assert scheduler.check_integrity() == []
        assert all(usage.held == 0 for usage in scheduler.cache.usage().values())
        await entry.engine.stop()

    run(test)
    value = metrics.registry.get_sample_value
    assert value("banded_page_accounting_faults_total", {"model": "tiny"}) == 0
    assert overlap or (value("banded_accepted_draft_tokens_total", {"model": "tiny"}) or 0) > 10
    return found, runner.num_raised


class Requests(NamedTuple):
    good: list[GenerationRequest]
    poisoned: list[GenerationRequest]
    expected: list[Any]  # what becomes of the good ones where nothing raises


@pytest.fixture(scope="module")
def requests(directory: Path) -> Requests:
    rng = random.Random(5)
    good, poisoned = ([request(rng, poisoned=bad) for _ in range(count)] for bad, count in ((False, 26), (True, 6)))
    return Requests(good, poisoned, run_all(directory, good, None, overlap=False)[0])


@pytest.mark.parametrize(
    ("when", "overlap", "kv_kib"),
    [
        ("before", 0, 6144),
        ("after", 1, 6144),
        ("result", 0, 6144),
        ("result", 1, 6144),
        ("result", 1, 400),
        ("result", 0, 400),
    ],
)
def test_poisoned_requests_end_with_an_error_and_all_others_are_the_same(
    when: str, overlap: bool, kv_kib: int, requests: Requests, directory: Path
) -> None:
    together = requests.good + requests.poisoned
    order = random.Random(when).sample(range(len(together)), len(together))
    found, num_raised = run_all(directory, [together[i] for i in order], when, overlap=bool(overlap), kv_bytes=kv_kib << 10)
    assert num_raised >= len(requests.poisoned)
    by_number = dict(zip(order, found, strict=True))
    for i, expected in enumerate(requests.expected):
        assert by_number.pop(i) == expected, requests.good[i]
    assert set(by_number.values()) == {"the engine failed while it ran this request"}
