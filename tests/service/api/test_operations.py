"""Health, versions and metrics."""

import asyncio
from importlib.metadata import version

import pytest

import service.engine.engine
from tests.conformance import contract
from tests.service.api.helpers import Api, request, serving
from tests.service.helpers import run, until


async def unready(api: Api) -> str:
    """Why the server is not ready, in its own words."""
    assert (await api.client.get("/health/live")).json() == {"status": "live"}
    for path in ("/health", "/ping"):
        assert (await api.client.get(path)).status_code == 503
    answer = await api.client.get("/health/ready")
    assert answer.status_code == 503
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "unavailable")
    message: str = error["message"]
    return message


@contract("health", "ready", "weights loaded, warmed up, idle")
def test_ready() -> None:
    async def test() -> None:
        async with serving() as api:
            assert (await api.client.get("/health/live")).json() == {"status": "live"}
            for path in ("/health/ready", "/health", "/ping"):
                answer = await api.client.get(path)
                assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
                assert (await api.client.head(path)).status_code == 200

    run(test)


@contract("health", "ready", "503 while draining")
def test_not_ready_while_draining() -> None:
    async def test() -> None:
        async with serving() as api:
            await api.fake.engine.drain(0)
            assert await unready(api) == "not ready: the server is shutting down"

    run(test)


@contract("health", "ready", "503 when no step finishes")
def test_not_ready_when_no_step_finishes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with serving() as api:
            monkeypatch.setattr(service.engine.engine, "STALL_SECONDS", 0.0)
            assert (await api.client.get("/health/ready")).status_code == 200  # idle is fine
            api.fake.runner.gate.clear()
            hanging = asyncio.create_task(api.choices(prompt="a", max_tokens=1))
            await until(lambda: bool(api.fake.scheduler.running))
            assert await unready(api) == "not ready: no step has finished for 0 s"
            api.fake.runner.gate.set()
            await hanging
            await until(lambda: api.fake.engine.unready_reason is None)  # soon after the last token
            assert (await api.client.get("/health/ready")).status_code == 200

    run(test)


def test_not_ready_once_a_step_fails_that_is_known_to_be_good() -> None:
    async def test() -> None:
        async with serving() as api:

            def fault(step: object) -> None:
                raise RuntimeError("again")

            api.fake.runner.fault = fault
            assert (await api.complete(prompt="a")).status_code == 500
            await api.fake.engine.failed()
            assert await unready(api) == "not ready: the engine has failed"
            refused = await api.complete(prompt="a")
            assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the engine has failed")

    run(test)


@contract("health", "version", "versions of banded and torch")
def test_version() -> None:
    assert request("GET", "/version").json() == {"version": version("banded"), "torch": version("torch")}


@contract("metrics", "banded_*", "a completed request shows")
def test_metrics_show_a_completed_request() -> None:
    async def test() -> None:
        async with serving() as api:
            await api.complete(prompt="Once upon", n=2, max_tokens=3)
            answer = await api.client.get("/metrics")
            assert answer.headers["content-type"].startswith("text/plain; version=")
            samples = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
            for name, value in {
                'banded_http_requests_total{model="fake",route="/v1/completions",status="200"}': 1,
                'banded_requests_total{model="fake",outcome="length"}': 2,
                'banded_prompt_tokens_total{model="fake"}': 2,
                'banded_prefix_cache_queries_total{model="fake"}': 2,
                'banded_prefix_cache_hits_total{model="fake"}': 0,
                'banded_generated_tokens_total{model="fake"}': 6,
                'banded_time_to_first_token_seconds_count{model="fake"}': 2,
                'banded_inter_token_latency_seconds_count{model="fake"}': 4,
                'banded_request_time_per_output_token_seconds_count{model="fake"}': 2,
                'banded_e2e_time_seconds_count{model="fake"}': 2,
                'banded_requests_running{model="fake"}': 0,
                'banded_requests_waiting{model="fake"}': 0,
                'banded_queue_limit{model="fake"}': 8,
                'banded_put_back_total{model="fake"}': 0,
                'banded_kv_pages_held{group="dense",model="fake"}': 0,
                'banded_kv_usage_ratio{group="banded",model="fake"}': 0,
                'banded_stream_errors_total{model="fake"}': 0,
                'banded_non_finite_logits_total{model="fake"}': 0,
            }.items():
                assert float(samples[name]) == value, name

    run(test)


@contract("metrics", "banded_*", "a running request shows")
def test_metrics_show_a_running_request() -> None:
    async def test() -> None:
        async with serving() as api:
            api.fake.runner.gate.clear()
            running = asyncio.create_task(api.choices(prompt=[5] * 60, max_tokens=1))
            await until(lambda: bool(api.fake.scheduler.running))
            assert api.fake.metric("requests_running") == 1
            assert api.fake.metric("kv_usage_ratio", group="dense") == 1 / 16
            assert api.fake.metric("kv_usage_ratio", group="banded") == 1 / 9
            api.fake.runner.gate.set()
            await running

    run(test)


def test_a_choice_of_one_token_has_no_time_between_tokens() -> None:
    async def test() -> None:
        async with serving() as api:
            await api.choices(prompt="a", max_tokens=1)
            assert api.fake.metric("request_time_per_output_token_seconds_count") == 0
            await api.choices(prompt="a", max_tokens=3)
            assert api.fake.metric("request_time_per_output_token_seconds_count") == 1
            latency = api.fake.metric("inter_token_latency_seconds_sum")
            assert api.fake.metric("request_time_per_output_token_seconds_sum") == pytest.approx(latency / 2)

    run(test)


@pytest.mark.parametrize(("alias", "expected"), [(None, False), ("vllm", True)])
def test_vllms_names_are_there_on_demand(alias: str | None, expected: bool) -> None:
    async def test() -> None:
        async with serving(metrics_alias=alias) as api:
            await api.complete(prompt="Once upon", max_tokens=3)
            text = (await api.client.get("/metrics")).text
            assert ('vllm:generation_tokens_total{engine="0",model_name="fake"} 3.0' in text) == expected
            assert 'banded_generated_tokens_total{model="fake"} 3.0' in text

    run(test)


def test_kernel_errors_show_where_they_were_measured() -> None:
    async def test() -> None:
        async with serving() as api:
            assert "banded_kernel_logit_error{" not in (await api.client.get("/metrics")).text
            api.fake.metrics.kernel_logit_error("banded").set(0.25)
            assert 'banded_kernel_logit_error{kind="banded",model="fake"} 0.25' in (await api.client.get("/metrics")).text

    run(test)
