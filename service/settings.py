"""Every knob of the server: one frozen object, read from BANDED_* environment variables and the command line."""

import ipaddress
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from kernels.names import KernelChoice
from service.scheduler import MIN_CHUNK

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]


class Settings(BaseSettings):
    """Settings of one server. A field `x` is set by BANDED_X; the command line overrides the environment.

    Raises pydantic's ValidationError naming the field for anything out of range.
    """

    model_config = SettingsConfigDict(env_prefix="BANDED_", frozen=True, extra="forbid")

    model: str = Field("demo", description="'demo', or a checkpoint directory; it is served under the directory's name")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free port")
    dtype: Dtype = Field("auto", description="auto: bfloat16 where the hardware multiplies it, else float32")
    device: Device = "auto"
    kernels: KernelChoice = Field("auto", description="triton: run the GPU path in Triton's interpreter on a CPU, for tests")
    doctor: bool = Field(False, description="compare the kernels with the reference at start, and refuse where they differ")
    kv_bytes: int | None = Field(
        None, gt=0, description="memory for KV pages, in bytes; by default 2 GiB on a CPU, what weights leave free on a GPU"
    )
    max_slots: int = Field(32, ge=1, le=1024, description="sequences that run at once")
    max_queue: int = Field(1024, ge=0, description="choices that may wait for a slot; one more is a 429")
    step_tokens: int = Field(512, ge=1, description="tokens computed in one step, prompt and generated together")
    queue_timeout: float = Field(120.0, gt=0, description="seconds that a choice may wait for a slot before a 503")
    drain_timeout: float = Field(30.0, ge=0, description="seconds that running requests get to finish after SIGTERM")
    api_keys: Annotated[tuple[str, ...], NoDecode] = Field((), description="comma-separated; one of them opens the API")
    open_metrics: bool = Field(False, description="/metrics needs no key")
    allow_unauthenticated: bool = Field(False, description="serve a non-loopback address without keys")

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        return tuple(key.strip() for key in value.split(",") if key.strip()) if isinstance(value, str) else value

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for place, key in enumerate(keys, 1):
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(f"key {place} can't be sent in a header: it may hold printable ASCII only, and no space")
        return keys

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if self.step_tokens < self.max_slots + MIN_CHUNK:
            raise ValueError(f"step_tokens {self.step_tokens} is less than max_slots {self.max_slots} + {MIN_CHUNK}")
        if not (self.api_keys or self.allow_unauthenticated or is_loopback(self.host)):
            raise ValueError(
                f"host {self.host} can be reached from outside: set BANDED_API_KEYS, or say --allow-unauthenticated"
            )
        return self


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
