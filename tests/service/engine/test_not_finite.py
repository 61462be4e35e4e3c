"""Logits of NaN or infinity, and requests that ban every token: who gets an error, and what stays as it was."""

import asyncio
import json
import logging
import math
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.names import NONE_LEFT, NOT_FINITE
from model.gpt import GPT
from model.step import RowStart, TokenLogprobs
from service import LLM, RequestError, SamplingParams
from service.api.app import create_app
from service.engine.loading import load_served
from service.engine.metrics import Metrics
from service.settings import Settings
from tests.conformance import contract
from tests.demand import needs_vnni
from tests.model.checkpoint.checkpoints import tiny
from tests.service.api.helpers import error_of, serving
from tests.service.engine import fakes
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run, settings_of, until

TOKENIZER = FakeEngine.tokenizer
INT8 = pytest.param("int8", True, marks=needs_vnni)


class Server:
    """A server of a real checkpoint, and a client for it."""

    def __init__(self, directory: Path, *, max_draft: int | None = None, **settings: Any):
        self.name, self._metrics = directory.name, Metrics("tiny")
        plain: dict[str, Any] = {"kv_bytes": 64 << 20, "dtype": "float32", "compile": False, "step_tokens": 100}
        self._served = load_served(Settings(model=str(directory), **plain | settings).engine, self._metrics)
        self.engine = self._served.base.engine
        self.app = create_app(self._served, self._metrics, settings_of())
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test", timeout=120)
        if max_draft is not None:
            self.engine._scheduler.max_draft = max_draft

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Server"]:
        async with self.app.router.lifespan_context(self.app), self.client:
            yield self

    @property
    def model(self) -> GPT:
        model: GPT = self.engine._steps._runner.model  # type: ignore[attr-defined]
        return model

    @contextmanager
    def poisoned(self, weight: torch.Tensor, row: int) -> Iterator[None]:
        """A row of a weight is NaN for a while."""
        with torch.inference_mode():
            before = weight[row].clone()
            weight[row] = math.nan
        yield
        with torch.inference_mode():
            weight[row] = before

    async def post(self, route: str = "completions", **fields: Any) -> httpx.Response:
        return await self.client.post(f"/v1/{route}", json={"model": self.name, **fields})

    async def choices(self, **fields: Any) -> list[dict[str, Any]]:
        answer = await self.post(**fields)
        assert answer.status_code == 200, answer.text
        choices: list[dict[str, Any]] = answer.json()["choices"]
        return choices

    async def stream(self, **fields: Any) -> tuple[str, dict[str, Any]]:
        """The text of a stream that must end in an error event, and the error."""
        answer = await self.post(stream=True, **fields)
        assert answer.status_code == 200, answer.text
        *events, error, done, end = answer.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        pieces = [json.loads(each.removeprefix("data: "))["choices"][0]["text"] for each in events]
        return "".join(pieces), json.loads(error.removeprefix("data: "))["error"]

    def metric(self, name: str, **labels: str) -> float:
        return self._metrics.registry.get_sample_value(f"banded_{name}", {"model": "tiny", **labels}) or 0.0

    async def assert_all_freed(self) -> None:
        await until(lambda: self.engine._scheduler.idle)
        assert self.engine._scheduler.cache.check_integrity() == []
        assert {usage.held for usage in self.engine._scheduler.cache.usage().values()} == {0}
        assert self.metric("page_accounting_faults_total") == 0


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny("banded", tmp_path, vocab_size=50257, n_layer=2, band=40, n_positions=256)


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(50257) for _ in range(count)]


def texts_of(answers: list[list[dict[str, Any]]]) -> list[list[str]]:
    return [[choice["text"] for choice in choices] for choices in answers]


def assert_not_finite(error: dict[str, Any], choice: str) -> None:
    assert (error["type"], error["param"], error["code"]) == ("server_error", None, "internal_error")
    assert error["message"] == (
        f"the model's logits are NaN or infinite, so that no token can be chosen for {choice}; "
        "try dtype float32 if 16 bits overflow; 'banded doctor' checks the kernels on these weights"
    )


# A real model


@contract("errors", "500", "logits of NaN or infinity end their own request, streamed or not")
@pytest.mark.parametrize(("dtype", "compiled"), [("bfloat16", False), ("float32", False), ("bfloat16", True), INT8])
def test_a_request_that_meets_nan_fails_alone_and_succeeds_when_the_fault_is_gone(
    dtype: str, compiled: bool, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The embedding of position 70 is NaN. Two requests meet it in their prompt, one later; four stay ahead of it."""
    rng = random.Random(5)
    shared = random_tokens(rng, 64)
    long: dict[str, Any] = {"prompt": [*shared, *random_tokens(rng, 120)], "max_tokens": 4, "seed": 1}  # in two chunks
    longest: dict[str, Any] = {"prompt": random_tokens(rng, 200), "max_tokens": 3, "temperature": 0, "logprobs": 2}
    growing: dict[str, Any] = {"prompt": random_tokens(rng, 61), "max_tokens": 20, "seed": 3, "ignore_eos": True}
    others: list[dict[str, Any]] = [
        {"prompt": random_tokens(rng, 30), "max_tokens": 40, "temperature": 0, "ignore_eos": True},
        {"prompt": random_tokens(rng, 50), "max_tokens": 20, "seed": 4, "top_p": 0.9, "logprobs": 3},
        {"prompt": shared[:40], "max_tokens": 30, "seed": 5, "n": 2, "repetition_penalty": 1.3},
        {"prompt": [*shared, 5], "max_tokens": 5, "seed": 6},
    ]
    settings: dict[str, Any] = {"dtype": dtype, "compile": compiled, "max_slots": 8}
    log: list[str] = []

    async def test() -> None:
        async with Server(directory, **settings).running() as clean:
            expected = [await clean.choices(**body) for body in (long, longest, growing, *others)]
        async with Server(directory, **settings).running() as server:
            with server.poisoned(server.model.wpe.weight, 70):
                failed = asyncio.gather(server.post(**long), server.post(**longest), server.stream(**growing))
                found = await asyncio.gather(*(server.choices(**body) for body in others))
                first, second, (text, error) = await failed
            assert texts_of(found) == texts_of(expected[3:])
            for answer, prompt in ((first, 184), (second, 200)):
                error_of(answer, 500, "server_error")
                assert_not_finite(
                    answer.json()["error"], f"choice 0 ({prompt} prompt tokens, 0 of them cached, and 0 generated)"
                )
            assert_not_finite(error, "choice 0 (61 prompt tokens, 0 of them cached, and 10 generated)")
            assert expected[2][0]["text"].startswith(text.rstrip("\ufffd"))
            assert text
            assert server.metric("non_finite_logits_total") == server.metric("requests_total", outcome="error") == 3
            assert server.metric("stream_errors_total") == 1
            log.extend(record.getMessage() for record in caplog.records if record.name == "banded.engine")
            await server.assert_all_freed()
            for body, choices in zip((long, longest, growing), expected, strict=False):
                answer = await server.post(**body)
                assert answer.json()["choices"] == choices
                cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert cached in ({0, 64} if body is long else {0}), "the other pages held NaN"  # `shared` has another owner
            assert await server.choices(**long) == expected[0]
            assert server.metric("non_finite_logits_total") == 3
            await server.assert_all_freed()

    with caplog.at_level(logging.WARNING, "banded.engine"):
        run(test)
    assert sorted(log) == [
        "logits are NaN or infinite: choice 0 (184 prompt tokens, 0 of them cached, and 0 generated), adapter 0",
        "logits are NaN or infinite: choice 0 (200 prompt tokens, 0 of them cached, and 0 generated), adapter 0",
        "logits are NaN or infinite: choice 0 (61 prompt tokens, 0 of them cached, and 10 generated), adapter 0",
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_nan_in_the_prompt_fails_all_its_choices_with_one_error(stream: bool, directory: Path) -> None:
    prompt = random_tokens(random.Random(6), 90)

    async def test() -> None:
        async with Server(directory).running() as server:
            with server.poisoned(server.model.wpe.weight, 70):
                answer = await server.post(prompt=prompt, n=3, stream=stream)
                error_of(answer, 500, "server_error")
                chat = await server.post(
                    "chat/completions", messages=[{"role": "user", "content": "word " * 80}], stream=stream, max_tokens=3
                )
                error_of(chat, 500, "server_error")
            assert server.metric("non_finite_logits_total") == 2
            await server.assert_all_freed()
            assert len(await server.choices(prompt=prompt, n=3)) == 3

    run(test)


@pytest.mark.parametrize("fields", [{"n": 3}, {"n": 1, "best_of": 3}])
def test_one_bad_choice_ends_its_request(fields: dict[str, Any], tmp_path: Path) -> None:
    """The embedding of a token is NaN that a single choice samples ahead of its end."""
    directory = tiny("banded", tmp_path, vocab_size=50257, n_layer=2, band=40, tied_head=False)
    body: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 6, "seed": 5, "ignore_eos": True}

    async def test() -> None:
        async with Server(directory).running() as server:
            every = await server.choices(**body, n=3, logprobs=0)
            names = {TOKENIZER.token_name(token): token for token in range(50257)}
            texts = [[names[name] for name in choice["logprobs"]["tokens"]] for choice in every]
            token = texts[1][2]
            assert token not in [*texts[0], *texts[1][:2], *texts[2]]
            with server.poisoned(server.model.wte.weight, token):
                answer, other = await asyncio.gather(server.post(**body, **fields), server.choices(prompt=[9], seed=1))
            error_of(answer, 500, "server_error")
            assert_not_finite(answer.json()["error"], "choice 1 (3 prompt tokens, 0 of them cached, and 3 generated)")
            assert server.metric("non_finite_logits_total") == 1
            await server.assert_all_freed()
            assert await server.choices(prompt=[9], seed=1) == other
            assert texts_of([await server.choices(**body, n=3)]) == texts_of([every])

    run(test)


@pytest.mark.parametrize("end", [61, 90])
def test_prompt_logprobs_that_are_not_finite_end_their_request(end: int, directory: Path) -> None:
    """In a score, and in an echo that generates nothing. Position 60 is in the prompt's first page, at its end or inside."""
    prompt = random_tokens(random.Random(7), end)

    async def test() -> None:
        async with Server(directory).running() as server:
            echo: dict[str, Any] = {"prompt": [*prompt, 3], "echo": True, "logprobs": 1, "max_tokens": 0}
            score: dict[str, Any] = {"prompt": prompt[:50], "continuations": [[1, 2], [*prompt[50:], 3], [4]]}
            with server.poisoned(server.model.wpe.weight, 60):
                error_of(await server.post(**echo), 500, "server_error")
                error_of(await server.post("score", **score), 500, "server_error")
                short = await server.post("score", prompt=prompt[:50], continuations=[[1, 2]])
            assert server.metric("non_finite_logits_total") == 2
            await server.assert_all_freed()
            (choice,) = await server.choices(**echo)
            assert all(logprob < 0 for logprob in choice["logprobs"]["token_logprobs"][1:])
            found = (await server.post("score", **score)).json()["results"]
            assert found[:1] == short.json()["results"]
            assert all(math.isfinite(each["logprob"]) for each in found)

    run(test)


def test_drafts_change_no_text_ahead_of_a_fault(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["wpe.weight"].zero_()  # without position embeddings, texts soon repeat themselves
    save_file(weights, directory / "model.safetensors")
    rng = random.Random(8)
    bodies: list[dict[str, Any]] = [
        {"prompt": random_tokens(rng, 20 + i), "max_tokens": 200, "temperature": 0, "ignore_eos": True} for i in range(6)
    ]

    def streams(max_draft: int) -> tuple[list[Any], float]:
        server = Server(directory, max_draft=max_draft)

        async def test() -> list[Any]:
            async with server.running():
                with server.poisoned(server.model.wpe.weight, 150):
                    found = await asyncio.gather(*(server.stream(**body) for body in bodies))
                await server.assert_all_freed()
                return found

        return asyncio.run(test()), server.metric("accepted_draft_tokens_total")

    (plain, none), (drafted, accepted) = streams(0), streams(7)
    assert drafted == plain
    assert none == 0
    assert accepted > 100
    for (_, error), body in zip(plain, bodies, strict=True):
        num_prompt = len(body["prompt"])
        choice = f"choice 0 ({num_prompt} prompt tokens, 0 of them cached, and {151 - num_prompt} generated)"
        assert_not_finite(error, choice)


@pytest.mark.parametrize(("name", "factor"), [("h.1.mlp.c_fc.weight", 2e4), ("lm_head.weight", 4e4)])
def test_an_overflow_of_float16_is_an_error_and_float32_a_remedy(name: str, factor: float, tmp_path: Path) -> None:
    """In a block, which gives NaN, and in the head, which gives infinity. The weights themselves fit 16 bits."""
    directory = tiny("banded", tmp_path, vocab_size=50257, n_layer=2, band=40, tied_head=False)
    weights = load_file(directory / "model.safetensors")
    weights[name] *= factor
    assert weights[name].half().isfinite().all()
    save_file(weights, directory / "model.safetensors")

    async def test() -> None:
        bodies: list[dict[str, Any]] = [{"temperature": 0}, {"seed": 1}, {"logprobs": 2}]
        for body in bodies:
            async with Server(directory, dtype="float16").running() as server:
                answer = await server.post(prompt="Once upon a time", max_tokens=3, **body)
                assert "try dtype float32" in error_of(answer, 500, "server_error")["message"]
            async with Server(directory).running() as server:
                await server.choices(prompt="Once upon a time", max_tokens=3, **body)

    run(test)


def test_a_request_that_bans_every_token_is_told_so(directory: Path) -> None:
    banning = SamplingParams(max_tokens=3, min_tokens=2, stop_token_ids=tuple(range(50257)))
    with LLM(directory, dtype="float32", kv_bytes=64 << 20) as llm:
        expected = "^'min_tokens': every token is a stop token or banned, so that none is left for choice 0 "
        for params in (banning, SamplingParams(**vars(banning) | {"temperature": 0, "logprobs": 2})):
            with pytest.raises(RequestError, match=expected) as refused:
                llm.generate("Once", params)
            assert refused.value.param == "min_tokens"
        only = SamplingParams(max_tokens=1, allowed_token_ids=(1169,), bad_words=("the",))
        with pytest.raises(RequestError, match=r"^'allowed_token_ids': every token is a stop token or banned") as refused:
            llm.generate("Once", only)
        assert refused.value.param == "allowed_token_ids"
        one_left = SamplingParams(max_tokens=2, min_tokens=2, stop_token_ids=tuple({*range(50257)} - {11}))
        assert llm.generate("Once", one_left)[0].tokens == [11, 11]


# A scripted runner


@pytest.fixture(params=[False, True])
def overlap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "overlap", request.param)


def bad_after(num_good: int, fault: int) -> FakeEngine:
    """Prompts that begin with 1 get `fault` after so many good tokens, until `fake.runner.script_of` is set again."""
    fake = FakeEngine()
    script = fake.runner.script
    bad = [*(script * 20)[:num_good], fault]
    fake.runner.script_of = lambda start: bad if start.prompt[0] == 1 else script
    return fake


def all_good(start: RowStart) -> list[int]:
    return TOKENIZER.encode(" one two three four", allow_special=True)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("num_good", [0, 1, 5])
def test_the_prefix_cache_forgets_the_prompt_of_a_sequence_that_failed(num_good: int) -> None:
    fake = bad_after(num_good, NOT_FINITE)
    prompt = [1] * 200

    async def test() -> None:
        async with serving(fake) as api:

            async def cached() -> int:
                answer = await api.complete(prompt=prompt, max_tokens=30)
                return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

            bad, fake.runner.script_of = fake.runner.script_of, all_good
            assert [await cached(), await cached()] == [0, 192]
            fake.runner.script_of = bad
            failed = await api.complete(prompt=prompt, max_tokens=30)
            assert "(200 prompt tokens, 192 of them cached, and " in error_of(failed, 500, "server_error")["message"]
            fake.runner.script_of = all_good
            assert [await cached(), await cached()] == [0, 192]
            await until(lambda: fake.scheduler.idle)
            assert fake.scheduler.cache.check_integrity() == []

    run(test)


@pytest.mark.usefixtures("overlap")
def test_a_row_that_shares_pages_with_one_that_failed_goes_on() -> None:
    fake = bad_after(3, NOT_FINITE)
    bad = fake.runner.script_of
    prompt = [1] * 130

    async def test() -> None:
        async with serving(fake) as api:
            fake.runner.script_of = all_good
            await api.choices(prompt=prompt, max_tokens=1)
            good = [api.complete(prompt=[*prompt, 2], max_tokens=n) for n in (40, 3)]
            fake.runner.script_of = lambda start: all_good(start) if len(start.prompt) == 131 else bad(start)
            *found, failed = await asyncio.gather(*good, api.complete(prompt=prompt, max_tokens=9))
            error_of(failed, 500, "server_error")
            texts = [answer.json()["choices"][0]["text"] for answer in found]
            assert texts == [" one two three four" * 10, " one two three"]
            await until(lambda: fake.scheduler.idle)
            assert fake.scheduler.cache.check_integrity() == []
            assert fake.metric("page_accounting_faults_total") == 0

    run(test)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_good", [0, 2])
def test_a_ban_of_every_token_is_the_clients_error(num_good: int, stream: bool) -> None:
    fake = bad_after(num_good, NONE_LEFT)

    async def test() -> None:
        async with serving(fake) as api:
            prompt = [1] * 70
            answer, other = await asyncio.gather(
                api.complete(prompt=prompt, stream=stream), api.choices(prompt=[2], max_tokens=4)
            )
            if stream and num_good:
                assert answer.status_code == 200
                error = json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))["error"]
            else:
                error = error_of(answer, 400)
            assert error["param"] == "min_tokens"
            assert error["message"].endswith(f"choice 0 (70 prompt tokens, 0 of them cached, and {num_good} generated)")
            assert other[0]["text"] == " one two three four"
            assert fake.metric("non_finite_logits_total") == 0
            fake.runner.script_of = all_good
            again = (await api.complete(prompt=prompt)).json()
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 64, "its pages are in order"

    run(test)


@pytest.mark.usefixtures("overlap")
def test_tokens_ahead_of_a_fault_may_end_the_choice_first() -> None:
    """By a stop string or as the last one. With overlap a step that finds the fault may be in flight then."""
    fake = bad_after(3, NOT_FINITE)

    async def test() -> None:
        async with serving(fake) as api:
            for fields, text in (({"stop": "ree"}, " one two th"), ({"max_tokens": 3}, " one two three")):
                assert [each["text"] for each in await api.choices(prompt=[1], **fields)] == [text]
            assert fake.metric("non_finite_logits_total") == 0
            assert fake.metric("requests_total", outcome="error") == 0

    run(test)


@pytest.mark.parametrize("fields", [{}, {"stop": "o thr"}, {"stop_token_ids": TOKENIZER.encode(" two")}])
def test_a_draft_changes_no_outcome(fields: dict[str, Any]) -> None:
    """The script is computed from its own beginning, so that guesses come true up to the fault."""
    answers: list[Any] = []
    for max_draft in (0, 7):
        fake = FakeEngine(max_draft=max_draft)
        script = [*fake.runner.script * 12, NOT_FINITE]
        if fields:
            script = [5, 6, 7, 8, 9] * 9 + [*fake.runner.script[:3], NOT_FINITE]
        fake.runner.script = script

        async def test(fake: FakeEngine = fake, script: list[int] = script) -> None:
            async with serving(fake) as api:
                answer = await api.complete(prompt=script[-30:-1], stream=True, max_tokens=100, **fields)
                answers.append([json.loads(each[6:]).get("error", each) for each in answer.text.split("\n\n")[:-2]][-1:])
                texts = [json.loads(each[6:]).get("choices") for each in answer.text.split("\n\n")[:-2]]
                answers[-1].append("".join(choices[0]["text"] for choices in texts if choices))
                assert (fake.metric("accepted_draft_tokens_total") > 0) == bool(fake.scheduler.max_draft)

        run(test)
    for answer in answers:
        if fields:
            answer[0] = "stop" in answer[0]
    assert answers[0] == answers[1]
    assert "error" not in answers[0] if fields else answers[0][0]["code"] == "internal_error"


@pytest.mark.parametrize("logprob", [math.nan, math.inf, -math.inf])
def test_any_prompt_logprob_without_a_number_ends_the_request(logprob: float, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fakes.fake_logprobs

    def faulty(token: int, num_top: int) -> TokenLogprobs:
        return plain(token, num_top)._replace(logprob=logprob) if token == 77 else plain(token, num_top)

    monkeypatch.setattr(fakes, "fake_logprobs", faulty)
    fake = FakeEngine()

    async def test() -> None:
        async with serving(fake) as api:
            body: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 2}
            failed, other = await asyncio.gather(
                api.complete(prompt=[5] * 64 + [77] + [5] * 80, n=2, **body), api.complete(prompt=[5] * 70, **body)
            )
            error_of(failed, 500, "server_error")
            assert other.status_code == 200
            assert fake.metric("non_finite_logits_total") == 1
            await until(lambda: fake.scheduler.idle)
            assert fake.scheduler.cache.check_integrity() == []

    run(test)
