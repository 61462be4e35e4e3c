"""The models that clients may ask for by name."""

from collections.abc import Sequence
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
    owner: str | None = None  # who alone may ask for it; None: everybody

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
        self._entries = {(entry.owner, entry.name): entry for entry in models}
        self._loader = loader
        self.base = models[0]

    def seen_by(self, owner: str) -> list[ModelEntry]:
        """Everybody's models, and those of `owner`."""
        return [entry for entry in self._entries.values() if entry.owner in (None, owner)]

    def find(self, name: str | None, owner: str) -> ModelEntry | None:
        """The model of that name that `owner` sees."""
        return self.base if name is None else next((each for each in self.seen_by(owner) if each.name == name), None)

    async def add(self, name: str, directory: Path, owner: str) -> None:
        """Serve the adapter in `directory` to `owner`. Raises CheckpointError if it does not fit."""
        assert self._loader is not None
        entry = await self._loader.load(name, directory)
        self._entries[owner, name] = entry._replace(owner=owner)

    async def remove(self, entry: ModelEntry) -> None:
        """Hide a model from new requests at once; returns when those that run have ended."""
        assert self._loader is not None
        del self._entries[entry.owner, entry.name]
        await self._loader.unload(entry)
