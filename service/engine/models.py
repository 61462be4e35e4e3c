"""What a served name stands for, and how a request's choices become sequences of its engine."""

import secrets
from collections.abc import Iterator
from collections.abc import Sequence as Items
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple, Protocol

from model.checkpoint.prompt_format import Card
from model.checkpoint.tokenizer import Tokenizer
from model.config import GPTConfig
from model.step import SamplingParams
from service.api.schema.sampling import SamplingFields
from service.engine.choice import ChoiceRequest
from service.engine.engine import Engine
from service.engine.prompts import Prompt
from service.engine.scheduler import NO_ADAPTER, AdapterRef, Family, Sequence


class ServedModel(NamedTuple):
    """A name that clients may ask for, and the engine behind it."""

    name: str
    created: int  # Unix time at which serving began
    config: GPTConfig
    tokenizer: Tokenizer
    card: Card
    fingerprint: str  # changes with the weights, the kernels and the dtype
    engine: Engine
    adapter: AdapterRef = NO_ADAPTER
    parent: str | None = None  # the model that it is an adapter of
    num_parameters: int = 0
    item_bytes: int = 2  # of a key, and of a weight where it isn't quantised


class AdapterLoader(Protocol):
    """Puts adapters beside a model that is served, and takes them away."""

    async def load(self, name: str, directory: Path) -> ServedModel: ...

    async def unload(self, served: ServedModel) -> None: ...


class Models:
    """What clients may ask for, by name; the first is what a request gets that names none. Its engine serves them all.

    Belongs to the event loop.
    """

    def __init__(self, models: Items[ServedModel], loader: AdapterLoader | None = None):
        """Without a `loader` they stay as they are."""
        self._by_name = {served.name: served for served in models}
        self._loader = loader
        self.base = models[0]

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._by_name.values())

    def find(self, name: str | None) -> ServedModel | None:
        return self.base if name is None else self._by_name.get(name)

    async def add(self, name: str, directory: Path) -> None:
        """Serve the adapter in `directory`. Raises CheckpointError where it doesn't fit."""
        assert self._loader is not None
        self._by_name[name] = await self._loader.load(name, directory)

    async def remove(self, served: ServedModel) -> None:
        """No request finds it any more; those that run have ended when this returns."""
        assert self._loader is not None
        del self._by_name[served.name]
        await self._loader.unload(served)


def choice_requests(
    fields: SamplingFields,
    prompts: Items[Prompt],
    served: ServedModel,
    *,
    max_tokens: int,
    num_candidates: int,
    top_logprobs: int | None = None,
    echo: bool = False,
    echo_logprobs: bool = False,
) -> list[ChoiceRequest]:
    """`num_candidates` choices of each prompt, in the order of their index: prompt * num_candidates + k.

    With `echo_logprobs` the first choice of a prompt brings the prompt's logprobs, for all of them.
    """
    tokenizer = served.tokenizer
    seed = fields.seed if fields.seed is not None else secrets.randbits(63)
    # A special token has no text in which its name could be found; ordinary ones may spell it.
    special = {name: token for name, token in tokenizer.special_tokens.items() if name in fields.stop}
    requests = []
    together = None
    if len(prompts) > 1 and num_candidates == 1:
        together = Family(num_common([prompt.tokens for prompt in prompts]), one_prompt=False)
    for i, prompt in enumerate(prompts):
        stop_ids = {*fields.stop_token_ids, *prompt.stop_token_ids, *special.values()}
        if not fields.ignore_eos:
            stop_ids.add(tokenizer.eos_id)
        family = Family(len(prompt.tokens), one_prompt=True) if num_candidates > 1 else together
        for k in range(num_candidates):
            sequence = Sequence(
                prompt.tokens,
                max_tokens,
                sampling_params(fields, seed, i * num_candidates + k),
                frozenset(stop_ids),
                min_tokens=fields.min_tokens,
                top_logprobs=top_logprobs,
                scored_from=1 if echo_logprobs and k == 0 else None,
                family=family,
                adapter=served.adapter,
            )
            stops = (*fields.stop, *prompt.stops)
            requests.append(ChoiceRequest(sequence, stops, fields.include_stop_str_in_output, echo, prompt.num_implicit))
    return requests


def num_common(prompts: Items[list[int]]) -> int:
    """How many tokens the prompts begin with alike."""
    columns = zip(*prompts, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def sampling_params(fields: SamplingFields, seed: int, choice: int) -> SamplingParams:
    return SamplingParams(
        temperature=fields.temperature,
        top_k=max(fields.top_k, 0),  # -1 is what some clients send for no top-k
        top_p=fields.top_p,
        seed=seed,
        choice=choice,
        min_p=fields.min_p,
        repetition_penalty=fields.repetition_penalty,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        logit_bias=fields.logit_bias,
    )
