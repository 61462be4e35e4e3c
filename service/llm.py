"""The Python API: a model in this process, without a server. See docs/python.md."""

import asyncio
import math
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self, TypeVar, cast

from model.step import TokenLogprobs
from service.engine.choice import Choice, Score
from service.engine.engine import EngineError
from service.engine.loading import load_served
from service.engine.metrics import Metrics
from service.engine.models import ModelEntry
from service.engine.options import NOBODY
from service.engine.request import (
    SCORING,
    GenerationRequest,
    Prompt,
    RequestError,
    SamplingParams,
    check_length,
    check_token_ids,
    read_prompt,
    shown,
)
from service.settings import Settings

T = TypeVar("T")

# A prompt is a text or token ids.
Text = str | Sequence[int]
# The server's settings that a model without a server has too.
SETTINGS = ("dtype", "device", "kernels", "compile", "doctor", "kv_bytes", "max_slots", "step_tokens", "max_adapters")


@dataclass(frozen=True)
class Completion:
    """One choice of one prompt."""

    text: str
    tokens: list[int]  # generated, those without text included
    finish_reason: str  # "stop" or "length"
    # With `logprobs`: of each token of the text, prompt tokens included where it is echoed. None for the first of a prompt.
    logprobs: list[TokenLogprobs | None] | None
    # With `prompt_logprobs`: the same of each token of the prompt.
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class AsyncLLM:
    """A model in this process, for code that runs in an event loop. LLM is the same for code that doesn't.

    >>> async with AsyncLLM("demo") as llm:
    ...     async for text in llm.stream("Once upon a time"):
    ...         print(text, end="")
    """

    def __init__(self, model: str | Path = "demo", *, adapters: Mapping[str, str | Path] | None = None, **settings: Any):
        """Load 'demo' or a checkpoint directory, with adapters by name. This takes seconds, and is done when it returns.

        `settings` are those of SETTINGS, as the server has them (service/settings.py): dtype, device, max_slots, kv_bytes
        and the like. Raises ValueError, with one line that says why, for what can't be loaded.
        """
        if unknown := settings.keys() - set(SETTINGS):
            raise ValueError(f"{', '.join(sorted(unknown))}: no such setting; there are {', '.join(SETTINGS)}")
        named = {name: str(directory) for name, directory in (adapters or {}).items()}
        # Nothing listens, so the address doesn't matter; a server may be using the data directory; all prompts may wait.
        fixed = {"host": "127.0.0.1", "data_dir": None, "max_queue": 2**31, "queue_timeout": math.inf}
        given = settings | {"model": str(model), "adapters": named} | fixed
        self._models = load_served(Settings(**given).engine, Metrics("python"))

    async def __aenter__(self) -> Self:
        self._models.base.engine.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the engine. Requests that still run fail with EngineError."""
        engine = self._models.base.engine
        await engine.drain(0.0)
        await engine.stop()

    async def generate(
        self, prompts: Text | Sequence[Text], params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> list[Completion]:
        """Completions of one prompt or several, n of each prompt, in the order of the prompts.

        Raises RequestError naming the field that the model can't honour, EngineError if the engine can't run the request.
        """
        params, entry = params or SamplingParams(), self._entry(adapter)
        params.check_tokens(entry.config.vocab_size)
        read = [self._read(text, entry, params.max_tokens) for text in list_of(prompts)]
        return [completion_of(choice, params) for choice in await self._finish(entry, read, params)]

    async def stream(
        self, prompt: Text, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> AsyncGenerator[str, None]:
        """The text of one completion, piece by piece, as it becomes certain. Errors are those of `generate`."""
        params, entry = params or SamplingParams(), self._entry(adapter)
        if params.num_candidates > 1:
            raise RequestError(f"a stream is of one choice, not of {params.num_candidates}", "n")
        params.check_tokens(entry.config.vocab_size)
        request = GenerationRequest([self._read(prompt, entry, params.max_tokens)], params, entry.adapter)
        async with aclosing(entry.engine.generate(request).outputs()) as steps:
            async for outputs in steps:
                for output in outputs:
                    if output.text:
                        yield output.text

    async def score(self, prompt: Text, continuations: Sequence[Text], *, adapter: str | None = None) -> list[Score]:
        """How likely each continuation is after `prompt`, which is computed once for all.

        A text is tokenized by itself, so begin a continuation with its space. Errors are those of `generate`.
        """
        entry = self._entry(adapter)
        start = self._read(prompt, entry, 0).tokens
        found = [self.tokenize(text) if isinstance(text, str) else list(text) for text in continuations]
        if not all(found):
            raise RequestError("a continuation is empty, so that there is nothing to score", "continuations")
        for tokens in found:
            check_token_ids(tokens, entry.config.vocab_size, "continuations")
            check_length(len(start), len(tokens), entry.config.n_positions, "continuations")
        choices = await self._finish(entry, [Prompt(start + tokens, logprobs_from=len(start)) for tokens in found], SCORING)
        return [Score.of(*each, entry.tokenizer) for each in zip(found, choices, strict=True)]

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text; special-token text is plain text."""
        return self._models.base.tokenizer.encode(text, allow_special=False)

    def detokenize(self, tokens: Sequence[int]) -> str:
        return self._models.base.tokenizer.decode(tokens)

    async def _finish(self, entry: ModelEntry, prompts: list[Prompt], params: SamplingParams) -> list[Choice]:
        generation = entry.engine.generate(GenerationRequest(prompts, params, entry.adapter))
        async with aclosing(generation.outputs()) as steps:
            async for _ in steps:
                pass
        return generation.best()

    def _entry(self, adapter: str | None) -> ModelEntry:
        entry = self._models.find(adapter, NOBODY)
        if entry is None:
            known = ", ".join(each.name for each in self._models.seen_by(NOBODY) if each.parent)
            raise RequestError(f"no adapter is called '{shown(str(adapter))}'; there are {known or 'none'}", "adapter")
        return entry

    def _read(self, text: Text, entry: ModelEntry, max_tokens: int) -> Prompt:
        prompt = read_prompt(text, entry.tokenizer, entry.config, "prompts")
        if not prompt.tokens:
            raise RequestError("a prompt of token ids is empty", "prompts")
        check_length(len(prompt.tokens), max_tokens, entry.config.n_positions, "prompts")
        return prompt


class LLM:
    """A model in this process.

    >>> from service import LLM, SamplingParams
    >>> with LLM("demo") as llm:
    ...     llm.generate(["Once upon a time"], SamplingParams(max_tokens=40, temperature=0))[0].text

    Methods may be called from several threads at once, and then share batches. Arguments and errors are AsyncLLM's.
    """

    def __init__(self, model: str | Path = "demo", *, adapters: Mapping[str, str | Path] | None = None, **settings: Any):
        self._async = AsyncLLM(model, adapters=adapters, **settings)
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm", daemon=True)
        self._thread.start()
        self._run(self._async.__aenter__())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine and its threads; harmless the second time."""
        if not self._closed:
            self._run(self._async.close())
            self._closed = True
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def generate(
        self, prompts: Text | Sequence[Text], params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> list[Completion]:
        return self._run(self._async.generate(prompts, params, adapter=adapter))

    def stream(
        self, prompt: Text, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Generator[str, None, None]:
        """Closing the iterator ends the generation soon after."""
        pieces: SimpleQueue[str | None] = SimpleQueue()

        async def pump() -> None:
            async with aclosing(self._async.stream(prompt, params, adapter=adapter)) as texts:
                async for text in texts:
                    pieces.put(text)

        generating = self._submit(pump())
        generating.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := pieces.get()) is not None:
                yield piece
            if self._closed and generating.exception():
                raise EngineError("the model has been closed")
            generating.result()  # raises what ended it early
        finally:
            generating.cancel()

    def score(self, prompt: Text, continuations: Sequence[Text], *, adapter: str | None = None) -> list[Score]:
        return self._run(self._async.score(prompt, continuations, adapter=adapter))

    def tokenize(self, text: str) -> list[int]:
        return self._async.tokenize(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        return self._async.detokenize(tokens)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._submit(work)
        try:
            return future.result()
        except BaseException:  # Ctrl-C too: what nobody waits for must not run on
            future.cancel()
            raise

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._closed:
            work.close()
            raise EngineError("the model has been closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def list_of(prompts: Text | Sequence[Text]) -> list[Text]:
    """One prompt, or several, as a list."""
    if isinstance(prompts, str):
        return [prompts]
    if not prompts:
        raise RequestError("there is no prompt", "prompts")
    return [cast(Text, prompts)] if isinstance(prompts[0], int) else list(cast(Sequence[Text], prompts))


def completion_of(choice: Choice, params: SamplingParams) -> Completion:
    logprobs = None if params.logprobs is None else [token.logprobs for token in choice.shown]
    prompt_logprobs = None if params.prompt_logprobs is None else [None, *choice.prompt_logprobs]
    return Completion(choice.text, choice.tokens, str(choice.finish_reason), logprobs, prompt_logprobs)
