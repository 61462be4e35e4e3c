"""Corpus files to tokens to windows."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model.tokenizer import END_OF_TEXT, Tokenizer


def read_tokens(paths: list[Path], tokenizer: Tokenizer) -> Tensor:
    """All tokens (N,) int32 of text files in which a line `<|endoftext|>` separates documents. Every document ends in eos.

    Raises ValueError naming the file that holds no text, or none in UTF-8.
    """
    tokens: list[int] = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from error
        documents = [document.strip("\n") for document in text.split(f"\n{END_OF_TEXT}\n")]
        if not any(documents):
            raise ValueError(f"{path} holds no text to train on")
        for document in filter(None, documents):
            tokens += tokenizer.encode(document)
            tokens.append(tokenizer.eos_id)
    return torch.tensor(tokens, dtype=torch.int32)


def random_windows(tokens: Tensor, length: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`batch` windows at random places: inputs and next-token targets, each (batch, length) int64."""
    starts = torch.randint(len(tokens) - length, (batch,), generator=generator)
    windows = torch.stack([tokens[start : start + length + 1] for start in starts.tolist()]).long()
    return windows[:, :-1], windows[:, 1:]


def consecutive_windows(tokens: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole text once, in windows of at most `length`: inputs and targets, each (1, <= length) int64."""
    for start in range(0, len(tokens) - 1, length):
        window = tokens[start : start + length + 1].long()[None]
        yield window[:, :-1], window[:, 1:]
