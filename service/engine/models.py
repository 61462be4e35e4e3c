"""The models that clients may ask for by name."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from model.checkpoint.prompt_format import PromptFormat
from model.checkpoint.tokenizer import Tokenizer
from model.config import GPTConfig
from service.engine.engine import Engine
from service.engine.scheduler import NO_ADAPTER, AdapterRef


class ModelEntry(NamedTuple):
    """A name that clients may ask for, and the engine that runs it."""

    name: str
    created: int  # Unix time at which serving began
    config: GPTConfig
    tokenizer: Tokenizer
    prompt_format: PromptFormat
    fingerprint: str  # changes with the weights, the kernels and the dtype
    engine: Engine
    adapter: AdapterRef = NO_ADAPTER
    parent: str | None = None  # the model that it is an adapter of
    num_parameters: int = 0
    item_bytes: int = 2  # of a key, and of a weight unless it is quantised
    alias_of: str | None = None

    @property
    def root(self) -> str:
        """The name that an alias stands for, else the entry's own."""
        return self.alias_of or self.name


class AdapterLoader(Protocol):
    """Adds adapters to a model that is served, and takes them away."""

    async def load(self, name: str, directory: Path) -> ModelEntry: ...

    async def unload(self, entry: ModelEntry) -> None: ...


class Models:
    """What clients may ask for, by name. One engine serves them all. Belongs to the event loop."""

    def __init__(self, models: Sequence[ModelEntry], loader: AdapterLoader | None = None):
        """The first of `models` answers requests that name none. Without a `loader` the models stay as they are."""
        self._by_name = {entry.name: entry for entry in models}
        self._loader = loader
        self.base = models[0]

    def __iter__(self) -> Iterator[ModelEntry]:
        return iter(self._by_name.values())

    def find(self, name: str | None) -> ModelEntry | None:
        return self.base if name is None else self._by_name.get(name)

    async def add(self, name: str, directory: Path) -> None:
        """Serve the adapter in `directory`. Raises CheckpointError if it does not fit."""
        assert self._loader is not None
        self._by_name[name] = await self._loader.load(name, directory)

    async def remove(self, entry: ModelEntry) -> None:
        """Hide a model from new requests at once; returns when those that run have ended."""
        assert self._loader is not None
        del self._by_name[entry.name]
        await self._loader.unload(entry)
