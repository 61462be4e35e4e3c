"""Prometheus itself judges what is served and deployed: its linter, and a Prometheus that scrapes real servers."""

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from service.api.metrics_alias import VLLM
from tests.conformance import contract
from tests.demand import demand
from tests.deploy.deployed import DEPLOY, Query, dashboard_queries, read_yaml
from tests.model.checkpoint.checkpoints import tiny
from tests.service.api.helpers import serving
from tests.service.helpers import run
from tests.serving import PATIENCE, banded_serve


def program(name: str) -> str:
    return demand(name, why="Prometheus judges what is served and deployed")


def promtool(*arguments: object, text: str | None = None) -> str:
    """The output of promtool, which must succeed."""
    command = [program("promtool"), *map(str, arguments)]
    checked = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    said = checked.stdout + checked.stderr
    assert checked.returncode == 0, said
    return said


class Scraped(NamedTuple):
    """Two servers, the second with vLLM's names, and the API of the Prometheus that scrapes both."""

    plain: str
    aliased: str
    prometheus: str

    def query(self, expression: str) -> dict[str, float]:
        """The value of a query at each server that has one, by its URL."""
        answer = httpx.get(f"{self.prometheus}/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", answer
        return {f"http://{item['metric']['instance']}": float(item["value"][1]) for item in answer["data"]["result"]}


def until(there: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    """The deployed configuration with other targets and short intervals. Both servers have completed a request."""
    folder = tmp_path_factory.mktemp("prometheus")
    checkpoint = tiny("banded", folder, vocab_size=50257)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with ExitStack() as stack:
        plain = stack.enter_context(banded_serve(checkpoint, folder / "plain.log")).url
        aliased = stack.enter_context(banded_serve(checkpoint, folder / "aliased.log", "--metrics-alias", "vllm")).url
        for url in (plain, aliased):
            body = {"model": "banded", "prompt": "Once", "max_tokens": 4, "ignore_eos": True}
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200

        config = read_yaml("prometheus.yml")
        config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "200ms"}
        config["rule_files"] = [str(DEPLOY / name) for name in config["rule_files"]]
        targets = [url.removeprefix("http://") for url in (plain, aliased)]
        config["scrape_configs"][0]["static_configs"][0]["targets"] = targets
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = [
            program("prometheus"),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
        ]
        log = folder / "prometheus.log"
        process = stack.enter_context(subprocess.Popen(command, stderr=stack.enter_context(log.open("wb"))))
        stack.callback(process.kill)
        found = Scraped(plain, aliased, f"http://{address}")

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            return answers(f"{found.prometheus}/-/ready")

        until(ready)
        until(lambda: len(found.query("banded_generated_tokens_total > 0")) == 2)
        yield found


@contract("metrics", "promtool", "check metrics is clean")
def test_the_linter_has_nothing_to_say_of_the_page(scraped: Scraped) -> None:
    page = httpx.get(f"{scraped.plain}/metrics").text
    assert "vllm" not in page
    assert promtool("check", "metrics", text=page) == ""


def test_the_linter_has_nothing_to_say_of_what_a_page_may_have() -> None:
    async def test() -> None:
        async with serving() as api:
            await api.choices(prompt="Once", max_tokens=3)
            api.fake.metrics.kernel_logit_error("banded").set(0.25)
            # The linter skips families without samples.
            assert [family.name for family in api.fake.metrics.registry.collect() if not family.samples] == []
            assert promtool("check", "metrics", text=(await api.client.get("/metrics")).text) == ""

    run(test)


def test_the_linter_would_say_so() -> None:
    with pytest.raises(AssertionError, match="counter metrics should have"):
        promtool("check", "metrics", text="# HELP banded_tokens Tokens\n# TYPE banded_tokens counter\nbanded_tokens 1\n")


def test_the_deployed_files_are_valid() -> None:
    assert "SUCCESS" in promtool("check", "rules", DEPLOY / "alerts.yml")
    assert "SUCCESS" in promtool("check", "config", DEPLOY / "prometheus.yml")


@contract("clients", "Prometheus", "scrapes the running service and answers queries")
def test_prometheus_scrapes_every_kind_of_series(scraped: Scraped) -> None:
    both = (scraped.plain, scraped.aliased)
    assert scraped.query("up") == dict.fromkeys(both, 1)
    for expression, value in {
        "banded_generated_tokens_total": 4,
        'banded_requests_total{outcome="length"}': 1,
        "banded_requests_running": 0,
        'banded_kv_usage_ratio{group="banded"}': 0,
        "banded_prefix_cache_hits_total": 0,
        "banded_time_to_first_token_seconds_count": 1,
        'banded_inter_token_latency_seconds_bucket{le="+Inf"}': 3,
        'banded_http_requests_total{route="/v1/completions",status="200"}': 1,
        "count by (instance) (banded_build_info)": 1,
    }.items():
        assert scraped.query(expression) == dict.fromkeys(both, value), expression
    quantiles = scraped.query('histogram_quantile(0.9, banded_step_time_seconds_bucket{model="banded"})')
    assert set(quantiles) == set(both)
    assert all(value > 0 for value in quantiles.values())  # NaN is what an empty histogram answers


@contract("clients", "Grafana dashboard", "every panel's query has a result")
@pytest.mark.parametrize("query", dashboard_queries(), ids=lambda query: query.expression)
def test_a_panel_shows_something(scraped: Scraped, query: Query) -> None:
    expression = query.expression.replace("$__rate_interval", "1m").replace("$model", "banded")
    assert "$" not in expression

    def shown() -> list[Any]:
        answer = httpx.get(f"{scraped.prometheus}/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", answer
        result: list[Any] = answer["data"]["result"]
        return result

    until(shown)  # a rate needs two scrapes


def test_the_alerts_can_be_evaluated(scraped: Scraped) -> None:
    def rules() -> list[dict[str, Any]]:
        found = httpx.get(f"{scraped.prometheus}/api/v1/rules").json()["data"]["groups"]
        return [rule for group in found for rule in group["rules"]]

    until(lambda: all(rule["health"] != "unknown" for rule in rules()))
    expected = {rule["alert"] for group in read_yaml("alerts.yml")["groups"] for rule in group["rules"]}
    assert {rule["name"]: rule["health"] for rule in rules()} == dict.fromkeys(expected, "ok")
    # The machine of a test may be so busy that it holds the event loop up for a moment.
    assert {rule["name"] for rule in rules() if rule["state"] != "inactive"} <= {"BandedEventLoopLags"}
    assert not [rule for rule in rules() if rule["state"] == "firing"]


def test_vllms_series_are_there_with_the_alias_only(scraped: Scraped) -> None:
    names = httpx.get(f"{scraped.prometheus}/api/v1/label/__name__/values").json()["data"]
    families = {name.removeprefix("vllm:") for name in names if name.startswith("vllm:")}
    shortened = {name.removesuffix(suffix) for name in families for suffix in ("", "_total", "_bucket")}
    assert set(VLLM.values()) <= shortened
    for expression, value in {
        "vllm:generation_tokens_total": 4,
        'vllm:request_success_total{finished_reason="length",model_name="banded",engine="0"}': 1,
        "vllm:kv_cache_usage_perc": 0,
        "vllm:time_to_first_token_seconds_count": 1,
        'vllm:request_time_per_output_token_seconds_bucket{le="+Inf"}': 1,
    }.items():
        assert scraped.query(expression) == {scraped.aliased: value}, expression
