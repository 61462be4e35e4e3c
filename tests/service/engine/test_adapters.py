"""Adapters over a real model, on every kind of weights: right logprobs, and the same text in any batch."""

import asyncio
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from model.checkpoint.files import CheckpointError
from model.checkpoint.weights import load_model, save_model, weights_digest
from model.gpt import GPT
from model.lora import TARGETS, Adapter, AdapterConfig, LowRank, adaptable, new_adapter, save_adapter
from service.commands.serve import load_app
from service.engine.loading import LoadError, load_served
from service.engine.metrics import Metrics
from service.jobs.store import Hyperparameters, Store
from service.settings import Settings
from tests.demand import needs_vnni
from tests.model.checkpoint.checkpoints import tiny
from tests.model.peft_models import wrapped
from tests.service.engine.test_exactness import client_of, complete, random_tokens, reference
from tests.service.helpers import run

# Ranks below, at and above the number that the compiled products read at once.
CONFIGS = {
    "all": AdapterConfig(3, 6.0),
    "some": AdapterConfig(32, 16.0, ("c_attn", "c_fc")),
    "large": AdapterConfig(40, 40.0, ("c_proj",)),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("banded", tmp_path_factory.mktemp("model"), vocab_size=50257, n_layer=2, band=40, n_positions=512)


@pytest.fixture(scope="module")
def adapters(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    model = load_model(directory, torch.float32)
    return {name: str(write(model, directory, tmp_path_factory.mktemp(name), config)) for name, config in CONFIGS.items()}


def write(model: GPT, base: Path, directory: Path, config: AdapterConfig) -> Path:
    save_adapter(directory, random_adapter(model, weights_digest(base), config))
    return directory


def random_adapter(model: GPT, base: str, config: AdapterConfig) -> Adapter:
    generator = torch.Generator().manual_seed(config.rank)
    new = new_adapter(model, config, base, config.rank)
    parts = {name: LowRank(a, 0.3 * torch.randn(b.shape, generator=generator)) for name, (a, b) in new.parts.items()}
    return Adapter(config, parts, base)


def merged(directory: Path, config: AdapterConfig, target: Path) -> Path:
    """The model with the adapter merged into its weights."""
    model = load_model(directory, torch.float32)
    adapter = random_adapter(model, "", config)
    with torch.no_grad():
        for name, linear in adaptable(model, config.targets).items():
            a, b = adapter.parts[name]
            linear.weight += config.scale * b @ a
    save_model(target, model, torch.float32)
    return target


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_are_those_of_the_merged_weights(
    name: str, compiled: bool, directory: Path, adapters: dict[str, str], tmp_path: Path
) -> None:
    prompt = random_tokens(random.Random(1), 150)
    expected = reference(merged(directory, CONFIGS[name], tmp_path), prompt)
    base = reference(directory, prompt)

    async def test() -> None:
        async with client_of(directory, dtype="float32", compile=compiled, step_tokens=64, adapters=adapters) as client:
            answer = await client.post(
                "/v1/completions", json={"model": name, "prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0}
            )
            found = answer.json()["choices"][0]["logprobs"]["token_logprobs"][1:]
            rows = torch.arange(149), torch.tensor(prompt[1:])
            assert found == pytest.approx(expected[rows].tolist(), abs=2e-3)
            assert found != pytest.approx(base[rows].tolist(), abs=0.1)

    run(test)  # a clean machine compiles first


@pytest.mark.parametrize(
    ("dtype", "compiled"),
    [
        ("bfloat16", False),
        ("float32", False),
        ("bfloat16", True),
        pytest.param("int8", False, marks=needs_vnni),
        pytest.param("int8", True, marks=needs_vnni),
    ],
)
def test_a_text_is_the_same_alone_and_beside_other_adapters(
    dtype: str, compiled: bool, directory: Path, adapters: dict[str, str]
) -> None:
    """The prompts have a common prefix: reading keys that the cache holds for another adapter would change a text."""
    rng = random.Random(3)
    shared = random_tokens(rng, 130)
    bodies: list[dict[str, Any]] = [
        {
            "model": model,
            "prompt": [*shared, *random_tokens(rng, rng.randrange(1, 40))],
            "max_tokens": 12,
            "seed": seed,
            "temperature": rng.choice([0, 0.8]),
            "logprobs": 2,
            "ignore_eos": True,
        }
        for seed in range(2)
        for model in (directory.name, *adapters)
    ]
    settings: dict[str, Any] = {
        "dtype": dtype,
        "compile": compiled,
        "max_slots": 8,
        "step_tokens": 100,
        "adapters": adapters,
    }

    async def test() -> None:
        async with client_of(directory, **settings) as client:

            async def post(body: dict[str, Any]) -> Any:
                answer = await client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                assert answer.json()["model"] == body["model"]
                return answer.json()

            together = await asyncio.gather(*map(post, bodies))
            cached = [await post(body) for body in bodies]
        async with client_of(directory, **settings) as client:
            fresh = [await post(body) for body in bodies]
        for answers in (cached, fresh):
            assert [texts_of(answer) for answer in answers] == [texts_of(answer) for answer in together]
            for alone, beside in zip(answers, together, strict=True):
                assert logprobs_of(alone) == pytest.approx(logprobs_of(beside), abs=1e-5)
        assert [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in cached] == [128] * 8
        assert len({logprobs_of(answer)[0] for answer in fresh[:4]}) == 4, "each adapter must change the logprobs"

    run(test)


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_peft_are_served_next_to_each_other(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ranks that differ from one module to the next, and q, k and v in one matrix."""
    caplog.set_level(logging.INFO)
    base = tiny("gpt_neo", tmp_path, vocab_size=50257, window_size=40)
    prompt = random_tokens(random.Random(1), 150)
    expected, adapters = {"gpt_neo": reference(base, prompt)}, {}
    for name, fields in {
        "qv": {"r": 3, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 40}},
        "mlp": {"r": 33, "target_modules": ["c_fc", "c_proj"]},
    }.items():
        adapted = wrapped(base, **fields)
        adapted.save_pretrained(tmp_path / name)
        adapters[name] = str(tmp_path / name)
        with torch.no_grad():
            expected[name] = adapted(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)

    async def test() -> None:
        async with client_of(base, dtype="float32", step_tokens=64, adapters=adapters) as client:
            body = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0}
            answers = await asyncio.gather(
                *(client.post("/v1/completions", json=body | {"model": name}) for name in expected)
            )
            rows = torch.arange(149), torch.tensor(prompt[1:])
            for name, answer in zip(expected, answers, strict=True):
                assert logprobs_of(answer.json())[1:] == pytest.approx(expected[name][rows].tolist(), abs=2e-3), name

    run(test)
    assert not [message for message in caplog.messages if "made for" in message]

    def load(model: Path) -> None:
        settings: dict[str, Any] = {"model": str(model), "dtype": "float32", "adapters": {"qv": adapters["qv"]}}
        load_served(Settings(**settings).engine, Metrics("tiny"))

    with pytest.raises(CheckpointError, match=r"holds transformer\.h\.0\.attn\.attention\.q_proj\.lora_A, .* has no place"):
        load(directory)
    shutil.copytree(base, tmp_path / "copy")
    load(tmp_path / "copy")
    assert f"adapter qv: made for {str(base)!r}, served on copy" in caplog.messages


def texts_of(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def logprobs_of(answer: dict[str, Any]) -> list[float]:
    logprobs: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"]
    return logprobs


def test_models_are_listed_with_their_parents(directory: Path, adapters: dict[str, str]) -> None:
    async def test() -> None:
        async with client_of(directory, dtype="float32", adapters=adapters) as client:
            listed = (await client.get("/v1/models")).json()["data"]
            assert [(model["id"], model["parent"]) for model in listed] == [
                (directory.name, None),
                *((name, directory.name) for name in adapters),
            ]
            assert (await client.get("/v1/models/some")).json() == listed[2]
            answers = [
                await complete(client, Path(name), prompt="a", max_tokens=1) for name in ("all", "some", directory.name)
            ]
            assert len({answer["system_fingerprint"] for answer in answers}) == 3
            error = (await client.get("/v1/models/nobody")).json()["error"]
            names = ", ".join(f"'{name}'" for name in (directory.name, *adapters))
            assert error["message"] == f"the model 'nobody' does not exist; this server has {names}"

    run(test)


def test_deleting_a_model_harms_no_request(directory: Path, adapters: dict[str, str], tmp_path: Path) -> None:
    """Requests that run with the model finish. Requests that come too late get a 404. All others go on."""
    store = Store(tmp_path)
    for _ in range(2):
        job = store.add_job("", directory.name, "", 0, Hyperparameters(1, 1, 1.0, 1), "file-x", None)
        shutil.copytree(adapters["all"], store.run_directory(job.id))
        store.end_job(job.id, "succeeded", fine_tuned_model=f"ft:{job.id}")
    broken, name = (str(job.fine_tuned_model) for job in store.jobs(""))
    weights = store.run_directory(broken.removeprefix("ft:")) / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    store.close()
    prompt = " understanding" * 300  # long enough to be tokenized in a thread while other requests come and go
    settings: dict[str, Any] = {"model": str(directory), "dtype": "float32", "data_dir": tmp_path, "kv_bytes": 64 << 20}
    app = load_app(Settings(**settings))

    async def test() -> None:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60) as client,
        ):
            listed = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
            assert listed == [directory.name, name], "an unreadable result must not be listed"

            async def post(model: str, prompt: str) -> httpx.Response:
                body = {"model": model, "prompt": prompt, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
                return await client.post("/v1/completions", json=body)

            before = [asyncio.create_task(post(model, "a")) for model in (name, directory.name) for _ in range(3)]
            late = [asyncio.create_task(post(name, prompt)) for _ in range(5)]
            await asyncio.sleep(0.01)
            deleted = await asyncio.gather(*(client.delete(f"/v1/models/{each}") for each in (name, broken)))
            assert [answer.status_code for answer in deleted] == [200, 200]
            assert [(await answer).status_code for answer in before] == [200] * 6
            for answer in late:
                response = await answer
                assert response.status_code in (200, 404), response.text
                if response.status_code == 404:
                    assert response.json()["error"]["message"] in (
                        "the model has been deleted",
                        NOT_THERE % (name, directory.name),
                    )
            assert (await post(directory.name, "a")).status_code == 200
            assert [path for path in (tmp_path / "jobs").iterdir() if path.is_dir()] == []

    run(test, seconds=60)


def test_results_are_served_to_their_owners(
    directory: Path, adapters: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    for owner in ("alice", "bob", "alice", "carol", ""):
        job = store.add_job(owner, directory.name, "", 0, Hyperparameters(1, 1, 1.0, 1), "file-x", None)
        shutil.copytree(adapters["all"], store.run_directory(job.id))
        store.end_job(job.id, "succeeded", fine_tuned_model=f"ft:{owner}{len(store.jobs(owner))}")
    store.add_file("carol", "a", "fine-tune", b"x")
    store.close()
    settings: dict[str, Any] = {"model": str(directory), "dtype": "float32", "data_dir": tmp_path, "kv_bytes": 64 << 20}
    settings |= {"api_keys": "alice:sk-a,alice:sk-a2,bob:sk-b", "adapters": {"given": adapters["some"]}, "max_adapters": 2}
    with caplog.at_level("INFO", "banded"):
        models = load_app(Settings(**settings)).state.shared.models
    seen = {owner: [entry.name for entry in models.seen_by(owner)] for owner in ("alice", "bob", "carol", "")}
    others = [directory.name, "given"]
    assert seen == {"alice": [*others, "ft:alice1"], "bob": [*others, "ft:bob1"], "carol": others, "": others}
    assert "keys: 2 of alice, 1 of bob" in caplog.messages
    assert "2 files and jobs of carol are kept, but no key sees them" in caplog.messages
    assert "1 files and jobs of nobody are kept, but no key sees them" in caplog.messages
    assert "ft:alice2 is not served: max_adapters is 2" in caplog.messages


NOT_THERE = "the model '%s' does not exist; this server has '%s'"


def test_adapters_that_can_not_be_served(directory: Path, adapters: dict[str, str], tmp_path: Path) -> None:
    model = load_model(directory, torch.float32)
    save_adapter(tmp_path, random_adapter(model, "another", AdapterConfig(2, 2.0, TARGETS)))

    def load(named: dict[str, str], max_adapters: int = 16) -> None:
        settings: dict[str, Any] = {"model": str(directory), "dtype": "float32", "max_adapters": max_adapters}
        load_served(Settings(**settings | {"adapters": named}).engine, Metrics("tiny"))

    digest = weights_digest(directory)
    with pytest.raises(LoadError, match=f"adapter mine: made for weights another, but those of the model are {digest}"):
        load({"mine": str(tmp_path)})
    with pytest.raises(LoadError, match="adapter banded: the model itself has that name"):
        load({directory.name: adapters["all"]})
    with pytest.raises(LoadError, match="3 adapters are named, but max_adapters is 2"):
        load(adapters, max_adapters=2)
    with pytest.raises(ValueError, match=r"nowhere/adapter\.json"):
        load({"mine": "/nowhere"})
