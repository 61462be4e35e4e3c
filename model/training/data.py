"""From corpus files to shards of tokens, and from shards to windows of training."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.checkpoint.files import write_atomically
from model.checkpoint.tokenizer import END_OF_TEXT, Tokenizer

# Tokens on disk, mapped into memory and never read whole.
Shard = NDArray[np.uint16] | NDArray[np.uint32]


def documents(path: Path) -> Iterator[str]:
    """The documents of a text file. A line `<|endoftext|>` separates them.

    Raises ValueError naming a file without text, or one that is not UTF-8.
    """
    count = 0
    lines: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as file:  # a byte-order mark is no text
            for line in chain(file, [END_OF_TEXT]):
                if line.rstrip("\n") != END_OF_TEXT:
                    lines.append(line)
                elif document := "".join(lines).strip("\n"):
                    count += 1
                    yield document
                    lines = []
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    if not count:
        raise ValueError(f"{path} holds no text to train on")


def tokens_of(document: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a document, and eos if the tokenizer has one."""
    return [*tokenizer.checked(tokenizer.encode(document)), *tokenizer.ending]


def read_tokens(paths: list[Path], tokenizer: Tokenizer) -> Tensor:
    """All tokens (N,) int32 of text files that fit into memory. Raises ValueError as `documents` does."""
    tokens = [token for path in paths for document in documents(path) for token in tokens_of(document, tokenizer)]
    return torch.tensor(tokens, dtype=torch.int32)


def write_shard(text: Path, tokenizer: Tokenizer, directory: Path) -> Path:
    """The file of a text's tokens in `directory`, written unless it is there for this content and tokenizer.

    Its suffix is the type of a token. Raises ValueError as `documents` does.
    """
    with text.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(tokenizer.fingerprint().encode())
    dtype = np.dtype(np.uint16 if tokenizer.max_id < 1 << 16 else np.uint32)
    path = directory / f"{text.stem}-{digest.hexdigest()[:16]}.{dtype.name}"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with write_atomically(path, shared=True) as temporary, temporary.open("wb") as file:
            for document in documents(text):
                file.write(np.asarray(tokens_of(document, tokenizer), dtype).tobytes())
    return path


def open_shard(path: Path) -> Shard:
    return np.memmap(path, dtype=path.suffix.removeprefix("."), mode="r")


def shuffled(seed: int, epoch: int, count: int) -> Tensor:
    """The order (count,) of an epoch."""
    return torch.randperm(count, generator=epoch_generator(seed, epoch))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


class Windows:
    """Windows over shards that are read as one text, numbered without end.

    An epoch goes through the text once. Its offset and the order of its windows depend only on the seed and the epoch, so
    all that a resumed run needs to know is how far it came.
    """

    def __init__(self, shards: Sequence[Shard], length: int, seed: int):
        """Raises ValueError if the text is shorter than one window and its last target."""
        self.length = length
        self._seed, self._shards = seed, shards
        *self._firsts, self._total = accumulate(map(len, shards), initial=0)  # where each shard begins, and the end
        if self._total <= length:
            raise ValueError(f"the corpus has {self._total} tokens; at least {length + 1} are needed")
        self.per_epoch = max(1, (self._total - length) // length)
        self._epoch, self._offset, self._order = -1, 0, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, index: int) -> Tensor:
        """Window `index` and its last target: (length + 1,) int64."""
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            slack = min(self.length, self._total - self.per_epoch * self.length)
            self._offset = int(torch.randint(slack, (), generator=epoch_generator(self._seed, epoch)))
            self._epoch, self._order = epoch, shuffled(self._seed, epoch, self.per_epoch)
        return self._read(self._offset + int(self._order[place]) * self.length, self.length + 1)

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and next-token targets of `count` windows from `first` on, each (count, length) int64."""
        windows = torch.stack([self[index] for index in range(first, first + count)])
        return windows[:, :-1], windows[:, 1:]

    def _read(self, start: int, count: int) -> Tensor:
        parts = [
            shard[max(0, start - first) : max(0, start + count - first)]
            for first, shard in zip(self._firsts, self._shards, strict=True)
        ]
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))
