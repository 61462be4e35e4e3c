"""Banded's Python API.

>>> from service import LLM, SamplingParams
>>> LLM("demo").generate(["Once upon a time"], SamplingParams(max_tokens=40))

A name is loaded when it is first used: `import service` takes no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.engine.engine import EngineError as EngineError
    from service.engine.request import RequestError as RequestError
    from service.engine.request import SamplingParams as SamplingParams
    from service.llm import LLM as LLM
    from service.llm import AsyncLLM as AsyncLLM
    from service.llm import Completion as Completion

HOMES = {
    "LLM": "service.llm",
    "AsyncLLM": "service.llm",
    "Completion": "service.llm",
    "SamplingParams": "service.engine.request",
    "RequestError": "service.engine.request",
    "EngineError": "service.engine.engine",
}
__all__ = ["LLM", "AsyncLLM", "Completion", "EngineError", "RequestError", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'service' has no attribute '{name}'")
    return getattr(import_module(HOMES[name]), name)
