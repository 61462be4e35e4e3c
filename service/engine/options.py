"""What an engine can be told. service/settings.py reads the values and has their defaults and descriptions."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kernels.names import KernelChoice

# Whose things are that came without a key, or with one that has no name.
NOBODY = ""
Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    model: str
    names: tuple[str, ...]  # that it is served under; none: the directory's
    adapters: Mapping[str, str]  # directories by name
    max_adapters: int
    data_dir: Path | None  # where jobs leave adapters that are served later
    dtype: Dtype
    device: Device
    kernels: KernelChoice
    compile: bool
    doctor: bool
    drafts: bool
    kv_bytes: int | None
    max_slots: int
    max_queue: int
    step_tokens: int
    queue_timeout: float
