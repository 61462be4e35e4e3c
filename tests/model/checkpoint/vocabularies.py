"""GPT-2's vocabulary in the files that other tools read, made from the ranks that we ship, and texts to encode."""

import functools
import json
from pathlib import Path

from hypothesis import strategies as st

from model.checkpoint.tokenizer import END_OF_TEXT, R50K_VOCAB_SIZE, r50k_base
from model.checkpoint.vocabulary import BYTE_OF, merge

CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}

SPELLINGS = [END_OF_TEXT, "<s>", "</s>", "<pad>", "<unk>", "<user>", "<user>s", "<bot é>", "<|endof", "madeupword0000"]
FRAGMENTS = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(categories=["Cc", "Cf", "Mn", "Zs", "Zl", "Zp", "So", "No"]), max_size=6),
    st.text(" \t\n\r\x0b\x0c\x1c\x85\xa0\u2003\u3000", max_size=6),
    st.sampled_from(["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "\u2019s", "''", "it's", " 'd", "don't", "1234"]),
    st.sampled_from(["🙂", "👩‍👩‍👧", "🇫🇷", "e\u0301", "ﬁ", "한국어", "漢字", "שלום", "ก็", "\ufeff", "\ufffd", "\U0010ffff"]),
    st.sampled_from(SPELLINGS),
)
TEXTS = st.lists(FRAGMENTS, max_size=12).map("".join)


def spelled(token: bytes) -> str:
    return "".join(CHARACTER_OF[byte] for byte in token)


@functools.cache
def r50k_vocab() -> dict[str, int]:
    tokenizer = r50k_base()
    return {spelled(tokenizer.token_bytes(rank)): rank for rank in range(R50K_VOCAB_SIZE - 1)}


@functools.cache
def r50k_merges() -> list[str]:
    """merges.txt from the ranks. A token's pair is what lower ranks merge its bytes into."""
    tokenizer = r50k_base()
    words = [tokenizer.token_bytes(rank) for rank in range(R50K_VOCAB_SIZE - 1)]
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
