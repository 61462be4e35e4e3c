"""Banded's Python API.

>>> from service import LLM, SamplingParams
>>> LLM("demo").generate(["Once upon a time"], SamplingParams(max_tokens=40))

A name is loaded when it is first used: `import service` takes no torch.
"""

import os
import platform
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.engine.engine import EngineError
    from service.engine.request import RequestError, SamplingParams
    from service.llm import LLM, AsyncLLM, Completion

# Where the names come from that need no torch. All others come from service.llm.
HOMES = {
    "SamplingParams": "service.engine.request",
    "RequestError": "service.engine.request",
    "EngineError": "service.engine.engine",
}
# How often OpenMP's waiting threads look for work before they sleep: for 0.2 ms on x86, as long as PyTorch takes from one
# product to the next. By itself it is 50 times as often, and other threads miss the cores. Read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ and platform.machine() in ("x86_64", "AMD64"):
    os.environ.setdefault("GOMP_SPINCOUNT", "6000")

__all__ = ["LLM", "AsyncLLM", "Completion", "EngineError", "RequestError", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'service' has no attribute '{name}'")
    return getattr(import_module(HOMES.get(name, "service.llm")), name)
