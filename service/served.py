"""What a served name stands for."""

from typing import NamedTuple

from model.config import GPTConfig
from model.tokenizer import Tokenizer
from service.engine import Engine


class ServedModel(NamedTuple):
    """A name that clients may ask for, and the engine behind it."""

    name: str
    created: int  # Unix time at which serving began
    config: GPTConfig
    tokenizer: Tokenizer
    engine: Engine
