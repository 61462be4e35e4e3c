"""What a served name stands for, and how a request's choices become sequences of its engine."""

import secrets
from typing import NamedTuple

from model.config import GPTConfig
from model.step import SamplingParams
from model.tokenizer import Tokenizer
from service.engine import Engine
from service.scheduler import Sequence
from service.schema import CompletionRequest


class ServedModel(NamedTuple):
    """A name that clients may ask for, and the engine behind it."""

    name: str
    created: int  # Unix time at which serving began
    config: GPTConfig
    tokenizer: Tokenizer
    engine: Engine


def sequences_of(body: CompletionRequest, prompts: list[list[int]], tokenizer: Tokenizer) -> list[Sequence]:
    """A sequence for each choice of each prompt, in the order of their index: prompt * n + k."""
    seed = body.seed if body.seed is not None else secrets.randbits(63)
    eos = None if body.ignore_eos else tokenizer.eos_id
    # -1 is what some clients send for no top-k.
    top_k = max(body.top_k, 0)
    return [
        Sequence(prompt, body.max_tokens, SamplingParams(body.temperature, top_k, body.top_p, seed, i * body.n + k), eos)
        for i, prompt in enumerate(prompts)
        for k in range(body.n)
    ]
