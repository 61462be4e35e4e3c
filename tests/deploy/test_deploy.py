"""Deployment files name only what exists: metrics and labels, settings, build targets, each other."""

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from pydantic import ValidationError

from service.cli import parser
from service.commands.options import settings_from
from service.engine.metrics import Metrics
from service.settings import Settings
from tests.deploy.deployed import DASHBOARD, DEPLOY, ROOT, Query, dashboard_queries, read_yaml

Series = Mapping[str, frozenset[str]]

GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
# A name and what follows it: a selector, or the parenthesis that makes it a function.
NAME = re.compile(r"(?<![\w.:])([a-zA-Z_:][\w:]*)\s*(\{[^}]*\}|\()?")
OPERATORS = {"and", "or", "unless", "bool", "offset"}
# Prometheus adds these to what it scrapes.
TARGET_LABELS = {"job", "instance"}


def alert_queries() -> list[Query]:
    rules = [rule for group in read_yaml("alerts.yml")["groups"] for rule in group["rules"]]
    return [Query(rule["expr"], rule["annotations"]["summary"]) for rule in rules]


def exported_series() -> Series:
    """Names and labels of the samples that Prometheus gets from a server, and of its own `up`."""
    metrics = Metrics("demo")
    # A family with more labels than `model` appears when it is first used.
    metrics.kv_held("dense")
    metrics.kv_total("dense")
    metrics.kv_usage("dense")
    metrics.outcome("stop")
    metrics.http_responses("/v1/completions", 200)
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    return {"up": frozenset()} | {sample.name: frozenset(sample.labels) for sample in samples}


def faults(query: Query, series: Series) -> list[str]:
    """The metrics and labels of a query that no server has."""
    expression = re.sub(r'"[^"]*"|\[[^\]]*\]', "", query.expression)
    grouping = {label.strip() for labels in GROUPING.findall(expression) for label in labels.split(",")}
    shown = set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", query.shown))
    found = []
    for name, selector in NAME.findall(GROUPING.sub("", expression)):
        if selector == "(" or name in OPERATORS:
            continue
        if name not in series:
            found.append(f"no metric {name}")
            continue
        labels = grouping | shown | set(re.findall(r"(\w+)\s*[=!]", selector))
        found += [f"{name} has no label {label}" for label in sorted(labels - series[name] - TARGET_LABELS)]
    if grouping and not shown <= grouping:
        found.append(f"{shown - grouping} is shown but not grouped by")
    return found


@pytest.mark.parametrize("query", dashboard_queries() + alert_queries(), ids=lambda query: query.expression)
def test_queries_name_what_a_server_exports(query: Query) -> None:
    assert not faults(query, exported_series())


@pytest.mark.parametrize(
    ("expression", "shown", "fault"),
    [
        ("rate(banded_prompt_tokens[1m])", "", "no metric banded_prompt_tokens"),
        ("bandit_requests_running > 0", "", "no metric bandit_requests_running"),
        ('sum(rate(banded_step_time_seconds{model="a"}[1m]))', "", "no metric banded_step_time_seconds"),
        ("banded_requests_running and banded_requests_walking > 1", "", "no metric banded_requests_walking"),
        ('banded_kv_pages{kind="dense"}', "", "banded_kv_pages has no label kind"),
        ('banded_kv_pages{group="dense",kind!~"x"}', "", "banded_kv_pages has no label kind"),
        ("sum by (le, outcome) (banded_queue_limit)", "", "banded_queue_limit has no label le"),
        ("banded_queue_limit", "{{ $labels.queue }}", "banded_queue_limit has no label queue"),
        ("sum by (group) (banded_kv_pages)", "{{model}}", "{'model'} is shown but not grouped by"),
    ],
)
def test_a_wrong_name_in_a_query_is_found(expression: str, shown: str, fault: str) -> None:
    assert fault in faults(Query(expression, shown), exported_series())


def test_a_right_query_has_no_faults() -> None:
    rates = 'sum by (model, le) (rate(banded_step_tokens_bucket{model=~"a =~ b",instance!=""}[5m] offset 1h))'
    assert not faults(Query(f"histogram_quantile(0.9, {rates}) > 1.5e3", "{{model}}: {{ $value }}"), exported_series())
    assert not faults(Query("banded_queue_limit * on (model) banded_load_seconds > bool 2", "{{model}}"), exported_series())


def test_dashboard_variables_are_what_its_queries_use() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__all"}
    assert used == set(variables)
    question = re.fullmatch(r"label_values\((\w+), (\w+)\)", variables["model"]["query"]["query"])
    assert question
    assert question[2] in exported_series()[question[1]]


def dockerfile_stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of every stage by its name, in order. Those of the stage it builds on come first."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", "")
    stages: dict[str, list[tuple[str, str]]] = {}
    for line in filter(str.strip, text.splitlines()):
        instruction, arguments = line.split(maxsplit=1)
        if instruction == "FROM":
            base, _, name = arguments.split()
            stages[name] = list(stages.get(base, []))
        else:
            stages[name].append((instruction, arguments))
    return stages


def last(stage: str, instruction: str) -> str:
    return [arguments for name, arguments in dockerfile_stages()[stage] if name == instruction][-1]


def image_environment(stage: str) -> dict[str, str]:
    return dict(item.split("=", 1) for item in last(stage, "ENV").split())


def settings_of(*arguments: str) -> Settings:
    return settings_from(parser().parse_args(arguments))


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server whose readiness route answers with `status`; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/ready" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_starts_banded_as_a_user_who_is_not_root(target: str) -> None:
    user, _, group = last(target, "USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert json.loads(last(target, "ENTRYPOINT")) == ["banded"]
    assert json.loads(last(target, "CMD")) == ["serve"]
    assert last(target, "STOPSIGNAL") == "SIGTERM"
    assert last(target, "COPY") == f"--from=install-{target} /opt/banded /opt/banded"


def test_a_build_without_target_makes_the_cpu_image() -> None:
    assert list(dockerfile_stages())[-1] == "cpu"


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_health_check_asks_for_readiness(status: int, healthy: bool) -> None:
    program, *arguments = json.loads(last("cpu", "HEALTHCHECK").partition(" CMD ")[2])
    assert program == "python"
    with answering(status) as port:
        environment = os.environ | {"BANDED_PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
        check = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, timeout=60)
    assert (check.returncode == 0) == healthy, check.stderr


def test_a_container_needs_a_key_or_says_that_it_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("BANDED_")]:
        monkeypatch.delenv(name)
    for name, value in image_environment("cpu").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match="BANDED_API_KEYS"):
        settings_of("serve")
    assert settings_of("serve", "--allow-unauthenticated").host == "0.0.0.0"
    monkeypatch.setenv("BANDED_API_KEYS", "key")
    assert settings_of("serve").api_keys == ("key",)


def test_the_cpu_target_takes_torch_from_a_given_index_only() -> None:
    stage = dockerfile_stages()["install-cpu"]
    assert ("ARG", "TORCH_INDEX_URL") in stage
    [line] = [arguments for _, arguments in stage if "--index-url" in arguments]
    assert '--no-deps --index-url "$TORCH_INDEX_URL" --constraint constraints.txt torch' in line


def test_the_lock_has_no_local_build_tag() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert any(line.startswith("torch==") for line in pins)
    assert not [line for line in pins if re.search(r"\+[a-z]", line)]


def test_the_build_gets_all_that_the_package_is_made_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    needed = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *(name.rstrip("*") for name in packages)}
    rules = (ROOT / ".dockerignore").read_text().split()
    assert "*" in rules
    assert needed <= {rule.removeprefix("!") for rule in rules if rule.startswith("!")}


def services() -> dict[str, Any]:
    found: dict[str, Any] = read_yaml("compose.yaml")["services"]
    return found


@pytest.mark.parametrize(("service", "variable"), [("banded", "BANDED_API_KEYS"), ("grafana", "GRAFANA_ADMIN_PASSWORD")])
def test_compose_has_no_default_for_a_secret(service: str, variable: str) -> None:
    assert [value for value in services()[service]["environment"].values() if value.startswith(f"${{{variable}:?")]


def test_compose_confines_what_it_runs() -> None:
    for service in services().values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert services()["banded"]["read_only"]
    assert services()["banded"]["tmpfs"] == ["/tmp:exec"], "what the server compiles there is run"


def test_compose_lets_banded_drain() -> None:
    assert float(services()["banded"]["stop_grace_period"].rstrip("s")) > Settings.model_fields["drain_timeout"].default + 5


def test_compose_builds_a_target_with_arguments_it_has() -> None:
    build = services()["banded"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert build["target"] in dockerfile_stages()
    arguments = {text for stage in dockerfile_stages().values() for name, text in stage if name == "ARG"}
    assert set(build["args"]) <= arguments


def test_banded_variables_are_settings() -> None:
    names = {*services()["banded"]["environment"], *image_environment("cpu")} - {"PATH"}
    texts = [(ROOT / "Dockerfile").read_text(), *(path.read_text() for path in DEPLOY.rglob("*") if path.is_file())]
    names |= {name for text in texts for name in re.findall(r"\bBANDED_\w*\w", text)}
    assert {name.removeprefix("BANDED_").lower() for name in names} - {""} <= set(Settings.model_fields)


def test_mounted_files_exist() -> None:
    mounts = [volume.split(":") for service in services().values() for volume in service.get("volumes", [])]
    hosted = {parts[1]: DEPLOY / parts[0] for parts in mounts if parts[0].startswith(".")}
    assert all(path.exists() for path in hosted.values())
    config = read_yaml("prometheus.yml")
    for rules in config["rule_files"]:
        assert f"/etc/prometheus/{rules}" in hosted
    [provider] = read_yaml("grafana/provisioning/dashboards/banded.yml")["providers"]
    assert (hosted[provider["options"]["path"]] / "banded.json").exists()


def test_prometheus_scrapes_banded_and_grafana_asks_prometheus() -> None:
    config = read_yaml("prometheus.yml")
    [job] = config["scrape_configs"]
    assert job["job_name"] == "banded"  # what alerts.yml selects
    assert job["static_configs"] == [{"targets": [f"banded:{image_environment('cpu')['BANDED_PORT']}"]}]
    assert services()["banded"]["environment"]["BANDED_OPEN_METRICS"] == "true"
    [source] = read_yaml("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_no_file_names_a_host_outside() -> None:
    for path in [ROOT / "Dockerfile", ROOT / ".dockerignore", *(path for path in DEPLOY.rglob("*") if path.is_file())]:
        text = path.read_text()
        assert set(re.findall(r"\w+://([\w.-]+)", text)) <= set(services())
        assert not re.findall(r"[\w-]+\.(?:com|dev|io|net|org)\b", text)
