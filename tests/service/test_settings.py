"""Settings: environment, bounds, rules among fields, and the messages for each."""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.commands.options import settings_from
from service.settings import Settings, is_loopback, read_key


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("BANDED_")]:
        monkeypatch.delenv(name)


def settings(**fields: Any) -> Settings:
    return Settings(**fields)


def refused(**fields: Any) -> list[tuple[str, str]]:
    """The faults of some settings, as (field, message)."""
    with pytest.raises(ValidationError) as caught:
        settings(**fields)
    return [(".".join(map(str, error["loc"])), error["msg"]) for error in caught.value.errors()]


def test_every_field_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "model": "/models/small",
        "names": "small, org/small",
        "keep_alive": "75",
        "max_connections": "100",
        "root_path": "/llm",
        "host": "::1",
        "port": "0",
        "dtype": "float32",
        "device": "cpu",
        "adapters": "one=runs/one",
        "data_dir": "/var/banded",
        "max_adapters": "3",
        "kernels": "triton",
        "compile": "0",
        "doctor": "1",
        "drafts": "0",
        "kv_bytes": "1000000",
        "max_slots": "4",
        "max_queue": "0",
        "step_tokens": "20",
        "queue_timeout": "0.5",
        "drain_timeout": "0",
        "api_keys": "one, two ,,three",
        "open_metrics": "true",
        "limit_requests": "60",
        "limit_tokens": "90000",
        "max_body_bytes": "1000",
        "max_text_bytes": "500",
        "max_logprobs": "5",
        "max_stops": "4",
        "cors_origins": "https://one.example, http://localhost:3000",
        "allowed_hosts": "llm.example, fd00::1",
        "lenient": "1",
        "metrics_alias": "vllm",
        "allow_unauthenticated": "1",
    }
    assert set(values) == set(Settings.model_fields)
    for name, value in values.items():
        monkeypatch.setenv(f"BANDED_{name.upper()}", value)
    read = settings()
    assert (read.model, read.host, read.port, read.dtype) == ("/models/small", "::1", 0, "float32")
    assert (read.names, read.keep_alive, read.root_path) == (("small", "org/small"), 75, "/llm")
    assert (read.max_slots, read.max_queue, read.step_tokens, read.queue_timeout) == (4, 0, 20, 0.5)
    assert (read.device, read.kernels, read.kv_bytes, read.drain_timeout) == ("cpu", "triton", 1_000_000, 0)
    assert (read.adapters, read.data_dir, read.max_adapters) == ({"one": "runs/one"}, Path("/var/banded"), 3)
    assert read.api_keys == ("one", "two", "three")
    assert (read.limit_requests, read.limit_tokens) == (60, 90000)
    assert (read.max_body_bytes, read.max_text_bytes) == (1000, 500)
    assert (read.max_logprobs, read.max_stops) == (5, 4)
    assert read.cors_origins == ("https://one.example", "http://localhost:3000")
    assert (read.allowed_hosts, read.max_connections) == (("llm.example", "fd00::1"), 100)
    assert read.metrics_alias == "vllm"
    assert read.drafts is read.compile is False
    assert read.doctor is read.open_metrics is read.lenient is read.allow_unauthenticated is True
    assert settings(port=8123, api_keys=("x",)).port == 8123  # given values win


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("port", "65536", "Input should be less than or equal to 65535"),
        ("port", "-1", "Input should be greater than or equal to 0"),
        ("port", "http", "Input should be a valid integer, unable to parse string as an integer"),
        ("dtype", "int4", "Input should be 'auto', 'float32', 'bfloat16', 'float16' or 'int8'"),
        ("device", "tpu", "Input should be 'auto', 'cpu' or 'cuda'"),
        ("kv_bytes", "0", "Input should be greater than 0"),
        ("kv_bytes", "2GB", "Input should be a valid integer, unable to parse string as an integer"),
        ("max_slots", "0", "Input should be greater than or equal to 1"),
        ("max_slots", "1025", "Input should be less than or equal to 1024"),
        ("max_connections", "0", "Input should be greater than or equal to 1"),
        ("max_queue", "-1", "Input should be greater than or equal to 0"),
        ("step_tokens", "0", "Input should be greater than or equal to 1"),
        ("queue_timeout", "0", "Input should be greater than 0"),
        ("queue_timeout", "nan", "Input should be greater than 0"),
        ("drain_timeout", "-1", "Input should be greater than or equal to 0"),
        ("drain_timeout", "nan", "Input should be greater than or equal to 0"),
        ("limit_requests", "-1", "Input should be greater than or equal to 0"),
        ("limit_tokens", "1e3", "Input should be a valid integer, unable to parse string as an integer"),
        ("max_body_bytes", "0", "Input should be greater than 0"),
        ("max_text_bytes", "0", "Input should be greater than 0"),
        ("max_logprobs", "1001", "Input should be less than or equal to 1000"),
        ("max_stops", "65", "Input should be less than or equal to 64"),
        ("metrics_alias", "tgi", "Input should be 'vllm'"),
        ("open_metrics", "perhaps", "Input should be a valid boolean, unable to interpret input"),
    ],
)
def test_bounds(name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"BANDED_{name.upper()}", value)
    assert refused() == [(name, message)]


def test_unknown_settings_are_refused() -> None:
    assert refused(prot=8000) == [("prot", "Extra inputs are not permitted")]


def test_slots_and_step_tokens_must_agree() -> None:
    assert refused(max_slots=100, step_tokens=115) == [("", "Value error, step_tokens 115 is less than max_slots 100 + 16")]
    assert settings(max_slots=100, step_tokens=116).max_slots == 100


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.com", "localhost.example.com", ""])
def test_a_host_others_can_reach_needs_keys(host: str) -> None:
    message = f"host {host} can be reached from outside: set BANDED_API_KEYS, or say --allow-unauthenticated"
    assert refused(host=host) == [("", f"Value error, {message}")]
    assert refused(host=host, api_keys=" , ") == [("", f"Value error, {message}")]
    assert settings(host=host, api_keys="key").api_keys == ("key",)
    assert settings(host=host, allow_unauthenticated=True).api_keys == ()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    assert settings(host=host).host == host


@pytest.mark.parametrize("key", ["schlüssel", "two words", "tab\tbed", "\udcff"])
def test_keys_that_no_header_can_carry_are_refused_and_not_repeated(key: str) -> None:
    message = "Value error, key 2 can't be sent in a header: it may hold printable ASCII only, and no space"
    assert refused(api_keys=f"fine,{key}") == [("api_keys", message)]


def test_keys_may_have_names() -> None:
    found = settings(api_keys=f"alice:sk-a, alice:sk-a2,b-_0{'b' * 60}:b:c,sk-c,sk-c")
    assert [read_key(key) for key in found.api_keys] == [
        ("alice", "sk-a"),
        ("alice", "sk-a2"),
        ("b-_0" + "b" * 60, "b:c"),
        ("", "sk-c"),
        ("", "sk-c"),
    ]
    assert found.owners == {"alice", "b-_0" + "b" * 60, ""}
    assert settings(api_keys="alice:sk-a").owners == {"alice"}
    assert settings().owners == {""}


@pytest.mark.parametrize("key", ["Alice:sk-a", ":sk-a", "alice:", "a.b:sk-a", ":", "a" * 65 + ":sk-a", "bob/:sk-a"])
def test_a_key_with_a_colon_that_is_none_of_a_name_is_refused(key: str) -> None:
    message = (
        "Value error, key 2 has a colon, but is not NAME:KEY with a name of at most 64 of a-z, 0-9, _ and -. "
        "A key without a name can't have a colon"
    )
    assert refused(api_keys=f"fine,{key}") == [("api_keys", message)]


@pytest.mark.parametrize("key", ["bob:sk-a", "sk-a"])
def test_a_key_has_one_name(key: str) -> None:
    message = "Value error, key 3 is also that of another name or of none: a key has one name at most"
    assert refused(api_keys=f"alice:sk-a,alice:sk-a,{key}") == [("api_keys", message)]


@pytest.mark.parametrize("name", ["limit_requests", "limit_tokens"])
def test_limits_of_a_key_need_keys(name: str) -> None:
    message = "Value error, limit_requests and limit_tokens are limits of a key: set BANDED_API_KEYS"
    assert refused(**{name: 5}) == [("", message)]
    assert getattr(settings(**{name: 5}, api_keys="key"), name) == 5


@pytest.mark.parametrize(
    "origin", ["example.org", "https://example.org/", "https://example.org/app", "https://", "HTTPS://Example.org", "null"]
)
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    message = f"Value error, '{origin}' is no origin: * or, in lower case and without a path, https://host:port"
    assert refused(cors_origins=f"*,{origin}") == [("cors_origins", message)]


@pytest.mark.parametrize(
    "host", ["http://llm.example", "llm.example:8000", "llm.example/", "[::1]", "*.example", "a b", "a..b"]
)
def test_a_host_that_no_header_names_so_is_refused(host: str) -> None:
    message = f"Value error, '{host}' is no host: * or a name or address without scheme and port, like llm.example"
    assert refused(allowed_hosts=f"localhost,{host}") == [("allowed_hosts", message)]


@pytest.mark.parametrize("host", ["*", "banded", "llm.example", "10.0.0.1", "fd00::1", "my_host"])
def test_hosts(host: str) -> None:
    assert settings(allowed_hosts=host).allowed_hosts == (host,)


@pytest.mark.parametrize("origin", ["*", "https://example.org", "http://[::1]:8080", "app://obsidian.md"])
def test_origins(origin: str) -> None:
    assert settings(cors_origins=origin).cors_origins == (origin,)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="Instance is frozen"):
        settings().port = 1


def test_adapters_are_names_and_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANDED_ADAPTERS", "one=/a/b, two = runs/two,")
    assert settings().adapters == {"one": "/a/b", "two": "runs/two"}
    assert settings(adapters=["three=c=d"]).adapters == {"three": "c=d"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one", "'one' is not NAME=DIR"),
        ("=dir", "'=dir' is not NAME=DIR"),
        ("one=", "'one=' is not NAME=DIR"),
        ("one=a,one=b", "two adapters are called one"),
    ],
)
def test_adapters_that_are_none(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANDED_ADAPTERS", text)
    with pytest.raises(ValidationError, match=message):
        settings()


@pytest.mark.parametrize("names", ["a,a", "/a", "a/", "a,b\x00", "\u200b"])
def test_names_that_clients_could_not_ask_for(names: str) -> None:
    [(field, message)] = refused(names=names)
    assert field == "names"
    assert message.endswith("is no name for the model: names differ, are printable and begin with no slash")


@pytest.mark.parametrize("path", ["llm", "/llm/", "/"])
def test_a_root_path_begins_with_a_slash(path: str) -> None:
    message = f"Value error, '{path}' must begin with a slash and not end with one, like /llm"
    assert refused(root_path=path) == [("root_path", message)]


# As Kubernetes writes them for the Services `banded` and `banded-canary`, the latter over IPv6.
SERVICES = {
    "BANDED_SERVICE_HOST": "10.96.12.7",
    "BANDED_SERVICE_PORT": "8000",
    "BANDED_SERVICE_PORT_HTTP": "8000",
    "BANDED_PORT": "tcp://10.96.12.7:8000",
    "BANDED_PORT_8000_TCP": "tcp://10.96.12.7:8000",
    "BANDED_PORT_8000_TCP_PROTO": "tcp",
    "BANDED_PORT_8000_TCP_PORT": "8000",
    "BANDED_PORT_8000_TCP_ADDR": "10.96.12.7",
    "BANDED_CANARY_SERVICE_HOST": "fd00::7",
    "BANDED_CANARY_SERVICE_PORT_WEB_UI": "53",
    "BANDED_CANARY_PORT": "udp://[fd00::7]:53",
    "BANDED_CANARY_PORT_53_UDP": "udp://[fd00::7]:53",
    "BANDED_CANARY_PORT_53_UDP_ADDR": "fd00::7",
}


def test_variables_of_a_kubernetes_service_are_no_settings(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name, value in SERVICES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BANDED_MAX_SLOTS", "3")
    read = settings_from(argparse.Namespace())
    assert (read.port, read.max_slots) == (8000, 3)
    assert caplog.messages == [f"left out, since Kubernetes sets them for a Service: {', '.join(sorted(SERVICES))}"]
    assert settings(port=8123).port == 8123


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SERVICE_HOST", "localhost"),
        ("SERVICE_PORT", "many"),
        ("SERVICES_HOST", "10.0.0.1"),
        ("PORT_8000_TCP", "8000"),
        ("PORT_8000_HTTP", "tcp://10.0.0.1:8000"),
        ("PORT_TCP", "tcp://10.0.0.1:8000"),
        ("PORT_8000_TCP_NAME", "http"),
        ("CANARY_PORT", "8000"),
    ],
)
def test_other_variables_are_still_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"BANDED_{name}", value)
    with pytest.raises(ValueError, match=f"^BANDED_{name}: no such setting"):
        settings_from(argparse.Namespace())


@pytest.mark.parametrize("value", ["http://10.0.0.1:8000", "tcp://10.0.0.1", "tcp://10.0.0.1:8000/"])
def test_a_port_that_no_service_has_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANDED_PORT", value)
    assert refused() == [("port", "Input should be a valid integer, unable to parse string as an integer")]
