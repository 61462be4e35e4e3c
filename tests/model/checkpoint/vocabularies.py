"""GPT-2's vocabulary in the files that other tools read: vocab.json and merges.txt, made from the ranks that we ship."""

import functools
import json
from pathlib import Path

from model.checkpoint.tokenizer import r50k_base
from model.checkpoint.vocabulary import BYTE_OF, merge

CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def spelled(token: bytes) -> str:
    return "".join(CHARACTER_OF[byte] for byte in token)


@functools.cache
def r50k_vocab() -> dict[str, int]:
    tokenizer = r50k_base()
    return {spelled(tokenizer.token_bytes(rank)): rank for rank in range(tokenizer.eos_id)}


@functools.cache
def r50k_merges() -> list[str]:
    """merges.txt from the ranks. A token's pair is what lower ranks merge its bytes into."""
    tokenizer = r50k_base()
    words = [tokenizer.token_bytes(rank) for rank in range(tokenizer.eos_id)]
    merges: list[str] = []
    ranks = {word: rank for rank, word in enumerate(words[:256])}
    for rank, word in enumerate(words[256:], 256):
        left, right = merge(word, ranks)
        merges.append(f"{spelled(left)} {spelled(right)}")
        ranks[word] = rank
    return merges


def write_vocabulary(directory: Path, vocab: dict[str, int], merges: list[str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
