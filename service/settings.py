"""Every knob of the server: one frozen object, read from BANDED_* environment variables and the command line."""

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from kernels.names import KernelChoice
from service.engine.options import NOBODY, Device, Dtype, EngineOptions
from service.engine.scheduler import MIN_CHUNK

HOST_NAME = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
KEY_NAME = re.compile(r"[a-z0-9_-]{1,64}")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")
# What Kubernetes puts into every pod's environment for a Service called banded, or banded-NAME: variables and their values.
ADDRESS, NUMBER, URL = r"[0-9a-f.:]+", r"[0-9]+", r"(tcp|udp|sctp)://[0-9a-f.:\[\]]+:[0-9]+"
PORT = r"([A-Z0-9_]+_)?PORT_[0-9]+_(TCP|UDP|SCTP)"
SERVICE_VARIABLES = {
    r"([A-Z0-9_]+_)?SERVICE_HOST": ADDRESS,
    r"([A-Z0-9_]+_)?SERVICE_PORT(_[A-Z0-9_]+)?": NUMBER,
    r"([A-Z0-9_]+_)?PORT": URL,
    PORT: URL,
    f"{PORT}_PROTO": "tcp|udp|sctp",
    f"{PORT}_PORT": NUMBER,
    f"{PORT}_ADDR": ADDRESS,
}


class Settings(BaseSettings):
    """Settings of one server. BANDED_X sets field `x`, and the command line overrides the environment.

    Raises pydantic's ValidationError, with the field, for anything out of range.
    """

    model_config = SettingsConfigDict(env_prefix="BANDED_", frozen=True, extra="forbid")

    model: str = Field("demo", description="'demo', or a checkpoint directory")
    names: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="comma-separated names for the model; by default the directory's, all after the first are aliases"
    )
    adapters: Annotated[dict[str, str], NoDecode] = Field(
        {}, description="comma-separated NAME=DIR: adapters of the model, each served under its name"
    )
    data_dir: Path | None = Field(None, description="where files and fine-tuning jobs are kept; without it there are none")
    max_adapters: int = Field(16, ge=0, le=1024, description="adapters that are served at once, to each name that keys have")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free port")
    dtype: Dtype = Field(
        "auto",
        description="auto: bfloat16 where the hardware multiplies it, else float32. int8: products in integers, on CPUs",
    )
    device: Device = "auto"
    kernels: KernelChoice = Field("auto", description="triton: run the GPU path in Triton's interpreter on a CPU, for tests")
    compile: bool = Field(
        True, description="on a CPU, compile the CPU kernels at the first start, in a few seconds; takes a C++ compiler"
    )
    doctor: bool = Field(False, description="compare the kernels with the reference at start, and refuse where they differ")
    drafts: bool = Field(
        True, description="on a CPU, compute guesses of the next tokens where a text repeats itself: the text stays the same"
    )
    kv_bytes: int | None = Field(
        None, gt=0, description="memory for KV pages, in bytes; by default 2 GiB on a CPU, what weights leave free on a GPU"
    )
    max_slots: int = Field(32, ge=1, le=1024, description="sequences that run at once")
    max_queue: int = Field(
        1024, ge=0, description="choices of a key, or of all without keys, that may wait; one more is a 429"
    )
    step_tokens: int = Field(512, ge=1, description="tokens computed in one step, prompt and generated together")
    queue_timeout: float = Field(120.0, gt=0, description="seconds that a choice may wait for a slot before a 503")
    max_connections: int = Field(
        4096,
        ge=1,
        description="connections open at once; at the limit those that wait for their client give way, or it is a 503",
    )
    keep_alive: int = Field(
        90, ge=1, description="seconds that an idle connection stays open, longer than proxies keep theirs, often 60 or 75"
    )
    root_path: str = Field("", description="/PREFIX of all paths, if a proxy serves the API below one, removed or not")
    drain_timeout: float = Field(30.0, ge=0, description="seconds that running requests get to finish after SIGTERM")
    api_keys: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="comma-separated; one of them opens the API. NAME:KEY is a key of NAME, who sees its own only"
    )
    open_metrics: bool = Field(False, description="/metrics needs no key")
    limit_requests: int = Field(0, ge=0, description="requests that each key may post in a minute; 0: any number")
    limit_tokens: int = Field(
        0, ge=0, description="tokens, of prompts and completions, that each key may ask for in a minute; 0: any number"
    )
    max_body_bytes: int = Field(16 * 2**20, gt=0, description="bytes of a request's body; one more is a 413")
    max_text_bytes: int = Field(
        4 * 2**20, gt=0, description="the same where a request has many prompts, or a text of any length to be tokenized"
    )
    max_logprobs: int = Field(20, ge=0, le=1000, description="likeliest tokens that a request may ask for with each token")
    max_stops: int = Field(16, ge=1, le=64, description="stop strings of a request")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="comma-separated origins whose pages may use the API from a browser; * lets all"
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="comma-separated names of the server besides loopback's, as the Host header has them; without keys on "
        "loopback any other is refused, and where this is set; * lets all",
    )
    lenient: bool = Field(False, description="a field without an effect is a warning in the response instead of a 400")
    metrics_alias: Literal["vllm"] | None = Field(
        None, description="vllm: /metrics has vLLM's names too, for its dashboards"
    )
    allow_unauthenticated: bool = Field(False, description="serve a non-loopback address without keys")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic passes all of these by name
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What is given counts before the environment, of which Kubernetes' variables are no settings."""
        assert isinstance(env_settings, EnvSettingsSource)
        left_out = {name.lower() for name in service_variables(os.environ)}
        env_settings.env_vars = {name: value for name, value in env_settings.env_vars.items() if name not in left_out}
        return init_settings, env_settings

    @property
    def engine(self) -> EngineOptions:
        """Those that are about the engine."""
        return EngineOptions(**{field.name: getattr(self, field.name) for field in fields(EngineOptions)})

    @property
    def owners(self) -> frozenset[str]:
        """The names that keys have, with NOBODY if one has none or there are none."""
        return frozenset(owner for owner, _ in map(read_key, self.api_keys)) or frozenset({NOBODY})

    @field_validator("names", "api_keys", "cors_origins", "allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(item.strip() for item in value.split(",") if item.strip()) if isinstance(value, str) else value

    @field_validator("adapters", mode="before")
    @classmethod
    def _read_adapters(cls, value: object) -> object:
        items = [item for item in value.split(",") if item.strip()] if isinstance(value, str) else value
        if not isinstance(items, list):
            return items
        adapters: dict[str, str] = {}
        for item in items:
            name, equals, directory = (part.strip() for part in str(item).partition("="))
            if not (name and equals and directory):
                raise ValueError(f"'{item}' is not NAME=DIR")
            if name in adapters:
                raise ValueError(f"two adapters are called {name}")
            adapters[name] = directory
        return adapters

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for place, key in enumerate(keys, 1):
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(f"key {place} can't be sent in a header: it may hold printable ASCII only, and no space")
        owner_of: dict[str, str] = {}
        for place, key in enumerate(keys, 1):
            owner, secret = read_key(key)
            if ":" in key and not (KEY_NAME.fullmatch(owner) and secret):
                raise ValueError(
                    f"key {place} has a colon, but is not NAME:KEY with a name of at most 64 of a-z, 0-9, _ and -. "
                    "A key without a name can't have a colon"
                )
            if owner_of.setdefault(secret, owner) != owner:
                raise ValueError(f"key {place} is also that of another name or of none: a key has one name at most")
        return keys

    @field_validator("names")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not name or name != name.strip("/ ") or not name.isprintable() or names.count(name) > 1:
                raise ValueError(
                    f"'{name[:80]}' is no name for the model: names differ, are printable and begin with no slash"
                )
        return names

    @field_validator("root_path")
    @classmethod
    def _check_root_path(cls, path: str) -> str:
        if path and (not path.startswith("/") or path.endswith("/")):
            raise ValueError(f"'{path[:80]}' must begin with a slash and not end with one, like /llm")
        return path

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            # Browsers send exactly this form. Any other would silently match nothing.
            if origin != "*" and (not ORIGIN.fullmatch(origin) or origin != origin.lower()):
                raise ValueError(f"'{origin[:80]}' is no origin: * or, in lower case and without a path, https://host:port")
        return origins

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if host != "*" and not HOST_NAME.fullmatch(host) and not address(host):
                raise ValueError(
                    f"'{host[:80]}' is no host: * or a name or address without scheme and port, like llm.example"
                )
        return hosts

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if self.step_tokens < self.max_slots + MIN_CHUNK:
            raise ValueError(f"step_tokens {self.step_tokens} is less than max_slots {self.max_slots} + {MIN_CHUNK}")
        if not (self.api_keys or self.allow_unauthenticated or is_loopback(self.host)):
            raise ValueError(
                f"host {self.host} can be reached from outside: set BANDED_API_KEYS, or say --allow-unauthenticated"
            )
        if (self.limit_requests or self.limit_tokens) and not self.api_keys:
            raise ValueError("limit_requests and limit_tokens are limits of a key: set BANDED_API_KEYS")
        return self


def service_variables(environment: Mapping[str, str]) -> list[str]:
    """The variables that begin as settings do and that Kubernetes has set for a Service, by their names and values."""
    prefix = "BANDED_"
    return sorted(
        name
        for name, value in environment.items()
        if name.startswith(prefix)
        and any(
            re.fullmatch(pattern, name.removeprefix(prefix)) and re.fullmatch(expected, value)
            for pattern, expected in SERVICE_VARIABLES.items()
        )
    )


def read_key(key: str) -> tuple[str, str]:
    """The owner of a key of BANDED_API_KEYS, and what a client sends: NAME and KEY of NAME:KEY."""
    owner, colon, secret = key.partition(":")
    return (owner, secret) if colon else (NOBODY, key)


def is_loopback(host: str) -> bool:
    found = address(host)
    return host == "localhost" or (found is not None and found.is_loopback)


def address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that `host` is, if it is one."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
