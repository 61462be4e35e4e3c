"""A real model through the API: logprobs equal those of a whole-window pass, and texts are the same in any batch."""

import asyncio
import math
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from service.api.app import create_app
from service.engine.loading import load_served
from service.engine.metrics import Metrics
from service.settings import Settings
from tests.conformance import contract
from tests.demand import needs_vnni
from tests.model.checkpoint.checkpoints import tiny
from tests.model.logits import our_logits
from tests.service.helpers import run, settings_of

BAND = 40
INT8 = pytest.param("int8", True, marks=needs_vnni)


@asynccontextmanager
async def client_of(directory: Path, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    metrics = Metrics("tiny")
    served = load_served(Settings(model=str(directory), kv_bytes=64 << 20, **settings).engine, metrics)
    app = create_app(served, metrics, settings_of())
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=120) as client,
    ):
        yield client


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny("banded", tmp_path, vocab_size=50257, n_layer=2, band=BAND, n_positions=512)


async def complete(client: httpx.AsyncClient, directory: Path, **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/completions", json={"model": directory.name, **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def reference(directory: Path, tokens: list[int]) -> Tensor:
    """Log probabilities (T, V) of the token after each token: an fp64 softmax of one pass over the whole window."""
    return our_logits(directory, torch.tensor([tokens]))[0].double().log_softmax(-1)


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(50257) for _ in range(count)]


@contract("completions", "logprobs", "equal a pass over the whole window within 1e-4")
def test_echoed_and_generated_logprobs_are_those_of_the_model(directory: Path) -> None:
    prompt = random_tokens(random.Random(1), 230)

    async def test() -> None:
        async with client_of(directory, dtype="float32", step_tokens=100) as client:
            body = await complete(
                client, directory, prompt=prompt, echo=True, logprobs=5, max_tokens=30, seed=3, presence_penalty=1.5,
                logit_bias={"7": 8.0}, temperature=0.7,
            )  # fmt: skip
            found = body["choices"][0]["logprobs"]
            names = {client_name(token): token for token in range(50257)}
            tokens = [names[name] for name in found["tokens"]]
            assert tokens[:230] == prompt
            assert len(tokens) == 260
            expected = reference(directory, tokens)
            assert found["token_logprobs"][0] is None
            assert found["top_logprobs"][0] is None
            for i in range(1, 260):
                row = expected[i - 1]
                assert found["token_logprobs"][i] == pytest.approx(row[tokens[i]].item(), abs=1e-4)
                top = list(found["top_logprobs"][i].items())
                assert [value for _, value in top[:5]] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)
                assert dict(top)[found["tokens"][i]] == found["token_logprobs"][i]
                assert len(top) == 5 + (found["tokens"][i] not in dict(top[:5]))

    run(test)


def client_name(token: int) -> str:
    from tests.service.engine.fakes import FakeEngine

    return FakeEngine.tokenizer.token_name(token)


@contract("completions", "best_of", "ranks by the model's own logprobs")
def test_best_of_returns_the_candidates_that_the_model_finds_likeliest(directory: Path) -> None:
    async def test() -> None:
        async with client_of(directory, dtype="float32") as client:
            fields: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 8, "seed": 5, "logprobs": 0, "ignore_eos": True}
            every = await complete(client, directory, **fields, n=6)
            ranked = await complete(client, directory, **fields, n=2, best_of=6)
            means = {choice["text"]: sum(choice["logprobs"]["token_logprobs"]) / 8 for choice in every["choices"]}
            best = sorted(means, key=lambda text: -means[text])[:2]
            assert [choice["text"] for choice in ranked["choices"]] == best

    run(test)


@contract("score", "results", "equal a pass over the whole window within 1e-4")
def test_scores_are_those_of_the_model(directory: Path) -> None:
    rng = random.Random(2)
    prompt, continuations = random_tokens(rng, 200), [random_tokens(rng, n) for n in (1, 5, 70, 2)]

    async def test() -> None:
        async with client_of(directory, dtype="float32", step_tokens=64) as client:
            likeliest = reference(directory, prompt)[-1].argmax().item()
            body = {"model": directory.name, "prompt": prompt, "continuations": [*continuations, [likeliest]]}
            results = (await client.post("/v1/score", json=body)).json()["results"]
            for continuation, result in zip(continuations, results, strict=False):
                rows = reference(directory, prompt + continuation)[199:-1]
                logprob = rows.gather(1, torch.tensor(continuation)[:, None]).sum().item()
                assert result["logprob"] == pytest.approx(logprob, abs=1e-4 * len(continuation))
                assert result["mean_logprob"] == pytest.approx(logprob / len(continuation), abs=1e-4)
                assert result["is_greedy"] is False
                num_bytes = sum(len(client_bytes(token)) for token in continuation)
                assert result["bits_per_byte"] == pytest.approx(-logprob / math.log(2) / num_bytes, abs=1e-3)
            assert results[-1]["is_greedy"] is True

    run(test)


def client_bytes(token: int) -> bytes:
    from tests.service.engine.fakes import FakeEngine

    return FakeEngine.tokenizer.text_bytes(token)


@contract("completions", "seed", "the same text alone, in a full batch and after a prefix hit")
@pytest.mark.parametrize(("dtype", "compiled"), [("bfloat16", False), ("float32", False), ("bfloat16", True), INT8])
def test_the_same_request_and_seed_give_the_same_text(dtype: str, compiled: bool, directory: Path) -> None:
    """tests/bench/same_seed.py does the same over HTTP, with 200 requests."""
    rng = random.Random(3)
    shared = random_tokens(rng, 150)
    bodies: list[dict[str, Any]] = [
        {
            "prompt": [*shared[: 150 * (i % 2)], *random_tokens(rng, rng.randrange(1, 120))],
            "max_tokens": 10,
            "seed": i,
            "n": 1 + (i % 5 == 0) * 2,
            "temperature": (0, 0.8, 1.1)[i % 3],
            "top_p": (1, 0.9)[i % 2],
            "repetition_penalty": (1, 1.2)[i % 4 == 3],
        }
        for i in range(8)
    ]

    async def test() -> None:
        def texts(answer: dict[str, Any]) -> list[str]:
            return [choice["text"] for choice in answer["choices"]]

        async with client_of(directory, dtype=dtype, compile=compiled, max_slots=8, step_tokens=100) as client:
            alone = [await complete(client, directory, **body) for body in bodies]
            again = [await complete(client, directory, **body) for body in bodies]
            batch = await asyncio.gather(*(complete(client, directory, **body) for body in bodies))
        async with client_of(directory, dtype=dtype, compile=compiled, max_slots=8, step_tokens=100) as client:
            cold_batch = await asyncio.gather(*(complete(client, directory, **body) for body in bodies))
        cached = [sum(a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers) for answers in (alone, again)]
        assert cached[1] > cached[0] > 0
        for answers in (again, batch, cold_batch):
            assert [texts(answer) for answer in answers] == [texts(answer) for answer in alone]

    if compiled:  # compile up front: on a clean machine it takes longer than a request may
        settings: dict[str, Any] = {"model": str(directory), "kv_bytes": 64 << 20, "dtype": dtype, "compile": True}
        load_served(Settings(**settings).engine, Metrics("tiny"))
    run(test)


@pytest.mark.parametrize(("dtype", "compiled"), [("bfloat16", False), ("float32", False), INT8])
def test_drafts_change_no_text(dtype: str, compiled: bool, directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["wpe.weight"].zero_()  # without position embeddings, texts soon repeat themselves
    save_file(weights, directory / "model.safetensors")
    rng = random.Random(4)
    bodies: list[dict[str, Any]] = [
        {
            "prompt": random_tokens(rng, rng.randrange(1, 120)),
            "max_tokens": 90,
            "seed": i,
            "temperature": (0, 0, 0.05)[i % 3],
            "logprobs": (None, 2)[i % 2],
            "ignore_eos": True,
        }
        for i in range(8)
    ]
    settings: dict[str, Any] = {
        "kv_bytes": 64 << 20,
        "dtype": dtype,
        "compile": compiled,
        "max_slots": 8,
        "step_tokens": 100,
    }

    def answers(drafts: bool) -> tuple[list[Any], int]:
        metrics = Metrics("tiny")
        served = load_served(Settings(model=str(directory), drafts=drafts, **settings).engine, metrics)

        async def test() -> list[Any]:
            app = create_app(served, metrics, settings_of())
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=120) as client,
            ):
                found = await asyncio.gather(*(complete(client, directory, **body) for body in bodies))
                return [(answer["choices"], answer["usage"]["completion_tokens"]) for answer in found]

        found = asyncio.run(test())
        accepted = metrics.registry.get_sample_value("banded_accepted_draft_tokens_total", {"model": "tiny"})
        return found, int(accepted or 0)

    (plain, none), (drafted, accepted) = answers(False), answers(True)
    assert drafted == plain
    assert none == 0
    assert accepted > 100
