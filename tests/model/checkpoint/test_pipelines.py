"""Every form of tokenizer.json that we accept gives the ids that tokenizers gives for it, over random text."""

import functools
import itertools
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from model.checkpoint.tokenizer import END_OF_TEXT, NFC_SHRINKS, Tokenizer
from model.checkpoint.vocabulary import BYTE_OF, SPLITS, load_tokenizer
from tests.model.checkpoint.vocabularies import TEXTS, r50k_merges, r50k_vocab

FAST = settings(max_examples=75, deadline=None)
CODE = (
    """def area(radius):
    return 3.14159 * radius ** 2  # it's \u03c0

for n in range(10):
    print(n, area(n), 2024, '1000 2000')\n\n\n"""
    * 3
)
MANY_DIGITS = st.text("0123456789\u0663\u216b\u00bd\u4e03 \n\t'sa-", max_size=20)


def load(directory: Path, theirs: tokenizers.Tokenizer) -> Tokenizer:
    theirs.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    return load_tokenizer(directory)


WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES_ONLY = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@functools.cache
def trained(form: str, *, alphabet: bool, **options: Any) -> tokenizers.Tokenizer:
    """Trained with GPT-2's words, so that it holds tokens which other cuts can't give, and then cut by `form`."""
    theirs = tokenizers.Tokenizer(BPE(**options))
    theirs.pre_tokenizer = WORDS
    trainer = BpeTrainer(
        vocab_size=500,
        special_tokens=[END_OF_TEXT, "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        show_progress=False,
    )
    theirs.train_from_iterator([CODE], trainer)
    theirs.pre_tokenizer = CUTS[form]
    return theirs


def with_r50k(form: str) -> tokenizers.Tokenizer:
    merges = [(left, right) for left, right in (merge.split(" ") for merge in r50k_merges())]
    theirs = tokenizers.Tokenizer(BPE(vocab=r50k_vocab() | {END_OF_TEXT: 50256}, merges=merges))
    theirs.pre_tokenizer = CUTS[form]
    return theirs


def split(regex: str, behavior: str = "isolated", *, invert: bool = False) -> Any:
    return pre_tokenizers.Split(tokenizers.Regex(regex), behavior, invert)


CUTS: dict[str, Any] = {
    "words": WORDS,
    "wrapped": pre_tokenizers.Sequence([WORDS]),
    "wrapped twice": pre_tokenizers.Sequence([pre_tokenizers.Sequence([WORDS])]),
    **{f"split {n}": pre_tokenizers.Sequence([split(regex), BYTES_ONLY]) for n, regex in enumerate(SPLITS)},
    "split, inverted": pre_tokenizers.Sequence([split(SPLITS[0], "removed", invert=True), BYTES_ONLY]),
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]),
    "numbers": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), WORDS]),
    "digits, split": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), split(SPLITS[1]), BYTES_ONLY]),
}


@pytest.fixture(scope="module", params=CUTS)
def cutting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    theirs = trained(request.param, alphabet=True)
    assert {"Ġ2", "00", "ĠĠ", "'s"} <= theirs.get_vocab().keys()
    return load(tmp_path_factory.mktemp("cuts"), theirs), theirs


@FAST
@given(text=TEXTS | MANY_DIGITS)
@example("a  12   3's 4x\n5 \t 6")
def test_words_are_cut_as_in_tokenizers(cutting: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = cutting
    assert ours.encode(text, allow_special=True) == theirs.encode(text).ids


@pytest.mark.parametrize("form", ["digits", "numbers"])
def test_every_character_is_a_digit_or_none(form: str, tmp_path: Path) -> None:
    theirs = with_r50k(form)
    ours = load(tmp_path, theirs)
    characters = [chr(code) for code in [*range(0xD800), *range(0xE000, 0x11000), *range(0x1F000, 0x1FB00)]]
    text = "".join(f" {character}a {character}1" for character in characters)
    assert ours.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize("before", ["1", "a"])
def test_a_million_spaces_ahead_of(before: str, tmp_path: Path) -> None:
    theirs = trained("digits", alphabet=True)
    text = " " * 1_000_001 + before
    assert load(tmp_path, theirs).encode(text) == theirs.encode(text).ids


@pytest.fixture(scope="module")
def composing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    theirs = tokenizers.Tokenizer.from_str(trained("wrapped", alphabet=True).to_str())
    theirs.normalizer = normalizers.Sequence([normalizers.NFC()])
    return load(tmp_path_factory.mktemp("nfc"), theirs), theirs


@pytest.fixture(scope="module")
def newer_marks() -> set[str]:
    """Combining characters that the tables of tokenizers lack: Python's order them next to others, and theirs do not."""
    nfc, before = normalizers.NFC(), "\u0345"
    marks = (chr(code) for code in range(sys.maxunicode + 1) if unicodedata.combining(chr(code)))
    marks = (mark for mark in marks if nfc.normalize_str(before + mark) != unicodedata.normalize("NFC", before + mark))
    return set(marks)


def test_marks_that_are_ordered_otherwise_are_few_and_rare(newer_marks: set[str]) -> None:
    assert len(newer_marks) < 200
    assert min(newer_marks) > "\u07f3", "none of Latin, Greek, Cyrillic, Hebrew or Arabic's first block"


class TestNfc:
    @FAST
    @given(text=TEXTS | st.text("eE\u0301\u0338\u0327>\u1100\u1161\u11a8\u212b\u0344\u1fbe\u0308", max_size=12))
    @example(END_OF_TEXT + "\u0338e\u0301")
    def test_text_is_composed_as_in_tokenizers(
        self, composing: tuple[Tokenizer, Any], newer_marks: set[str], text: str
    ) -> None:
        ours, theirs = composing
        text = "".join(character for character in text if character not in newer_marks)
        assert ours.encode(text, allow_special=True) == theirs.encode(text).ids

    def test_every_character(self, composing: tuple[Tokenizer, Any]) -> None:
        """Those that Python's tables know: later versions of Unicode only add characters."""
        ours, theirs = composing
        known = (chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
        text = "".join(f"{character} " for character in known if unicodedata.category(character) != "Cn")
        assert ours.encode(text) == theirs.encode(text).ids

    def test_text_shrinks_less_than_the_bound_on_its_tokens_allows(self) -> None:
        def shrinks(text: str) -> float:
            return len(text.encode()) / len(unicodedata.normalize("NFC", text).encode())

        changed = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.decomposition(chr(code))]
        # What is spelled out in full may hold a longer spelling of each of its characters.
        longest: dict[str, str] = {}
        for character in changed:
            parts = unicodedata.normalize("NFD", character)
            longest[parts] = max(character, longest.get(parts, parts), key=lambda text: len(text.encode()))
        spelled = ("".join(longest.get(part, part) for part in parts) for parts in list(longest))
        assert 3 < max(map(shrinks, itertools.chain(spelled, longest.values()))) <= NFC_SHRINKS


UNKNOWN: dict[str, dict[str, Any]] = {
    "left out": {},
    "unk": {"unk_token": "<unk>"},
    "fused unk": {"unk_token": "<unk>", "fuse_unk": True},
}


@pytest.fixture(scope="module", params=UNKNOWN)
def incomplete(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Trained as in Hugging Face's course: without an initial alphabet, so only bytes of the corpus have tokens."""
    theirs = trained("words", alphabet=False, **UNKNOWN[request.param])
    theirs.post_processor = processors.ByteLevel(trim_offsets=False)
    assert 30 < sum(character in theirs.get_vocab() for character in BYTE_OF) < 60
    return load(tmp_path_factory.mktemp("incomplete"), theirs), theirs


class TestIncompleteAlphabet:
    @settings(max_examples=300, deadline=None)
    @given(text=TEXTS | st.text("redtn \n(1\xe9\u03c0QZ\x00\x1c\u3000", max_size=24))
    @example("reQtZurn")  # what stands around a byte without a token merges only where such bytes are left out
    @example("Q")
    @example("QZ QZ\xe9")
    def test_a_byte_without_a_token(self, incomplete: tuple[Tokenizer, Any], text: str) -> None:
        ours, theirs = incomplete
        assume(all(unicodedata.category(char) != "Cn" for char in text))  # only regex knows Unicode's newest letters
        assert ours.encode(text, allow_special=True) == theirs.encode(text).ids

    @FAST
    @given(text=st.text("redtn \n(1\xe9\u03c0QZ", max_size=40))
    def test_least_tokens(self, incomplete: tuple[Tokenizer, Any], text: str) -> None:
        ours, _ = incomplete
        assert ours.least_tokens(ours.num_known_bytes(text)) <= len(ours.encode(text))

    def test_lone_surrogates_become_replacement_characters(self, incomplete: tuple[Tokenizer, Any]) -> None:
        ours, _ = incomplete
        assert ours.encode("re\ud800turn") == ours.encode("re\ufffdturn")

    def test_a_long_text_takes_no_longer(self, incomplete: tuple[Tokenizer, Any]) -> None:
        ours, theirs = incomplete
        for text in ("Q" * 300_000 + "e" * 300_000, " " * 1_000_001 + "Q"):
            assert ours.encode(text) == theirs.encode(text).ids


class TestInPieces:
    """A text that is encoded in pieces of a few characters has the tokens of the whole."""

    def check(self, ours: Tokenizer, text: str) -> None:
        assume(all(unicodedata.category(char) != "Cn" for char in text))  # only regex knows Unicode's newest letters
        expected = ours.encode(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("model.checkpoint.tokenizer.PIECE", 3)
            assert ours.encode(text) == expected

    @FAST
    @given(text=TEXTS | MANY_DIGITS)
    def test_of_other_words(self, cutting: tuple[Tokenizer, Any], text: str) -> None:
        self.check(cutting[0], text)

    @FAST
    @given(text=TEXTS | st.text("eE\u0301\u0338 >\u1100\u1161\u11a8\u212b\n", max_size=20))
    def test_of_composed_text(self, composing: tuple[Tokenizer, Any], text: str) -> None:
        self.check(composing[0], text)

    @FAST
    @given(text=TEXTS | st.text("redtn \n(1\xe9QZ\x00", max_size=24))
    def test_of_bytes_without_a_token(self, incomplete: tuple[Tokenizer, Any], text: str) -> None:
        self.check(incomplete[0], text)


@pytest.mark.parametrize(
    ("options", "fate"), [({}, "text loses them"), (UNKNOWN["unk"], "token 1 stands for them")], ids=["left out", "unk"]
)
def test_bytes_without_a_token_are_told(
    options: dict[str, Any], fate: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = (character for character, byte in BYTE_OF.items() if byte not in (7, 200))
    vocab = {piece: token_id for token_id, piece in enumerate([END_OF_TEXT, "<unk>", *known])}
    theirs = tokenizers.Tokenizer(BPE(vocab=vocab, merges=[], **options))
    theirs.pre_tokenizer = WORDS
    load(tmp_path, theirs)
    assert f"2 bytes have no token, 0x07 among them: {fate}" in caplog.text


@FAST
@given(text=TEXTS)
def test_ignore_merges_changes_nothing_where_merges_make_every_piece(eager: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = eager
    assert ours.encode(text, allow_special=True) == theirs.encode(text).ids


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """As transformers converts a vocabulary of tiktoken."""
    theirs = trained("words", alphabet=True, ignore_merges=True)
    return load(tmp_path_factory.mktemp("eager"), theirs), theirs


def test_fingerprints_tell_the_forms_apart(tmp_path: Path) -> None:
    prints = []
    for form in ("words", "digits", "numbers"):
        (tmp_path / form).mkdir()
        prints.append(load(tmp_path / form, trained(form, alphabet=True)).fingerprint())
    assert len(set(prints)) == 3
