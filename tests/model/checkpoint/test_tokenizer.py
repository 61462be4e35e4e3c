"""Our tokenizers give the ids and the text that transformers gives. What they would get wrong they refuse."""

import functools
import json
import random
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import model.checkpoint.tokenizer
from model.checkpoint.files import CheckpointError
from model.checkpoint.tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    LongWordError,
    PromptPart,
    Tokenizer,
    TokenizerError,
    r50k_base,
)
from model.checkpoint.vocabulary import BYTE_OF, load_tokenizer
from service.engine.request import GenerationRequest, Prompt, RequestError, SamplingParams, text_prompt
from tests.model.checkpoint.vocabularies import TEXTS, r50k_merges, r50k_vocab, write_vocabulary

Json = dict[str, Any]


def write(directory: Path, name: str, content: Json) -> None:
    (directory / name).write_text(json.dumps(content), encoding="utf-8")


def described(content: str, **options: bool) -> Json:
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True} | options


def write_gpt2(directory: Path) -> None:
    """As openai-community/gpt2 without its tokenizer.json: only numbers tell which token is special."""
    write_vocabulary(directory, r50k_vocab() | {END_OF_TEXT: 50256}, r50k_merges())
    write(directory, "config.json", {"model_type": "gpt2", "vocab_size": 50257, "eos_token_id": 50256})


def write_gpt_neo(directory: Path) -> None:
    """As EleutherAI/gpt-neo-125m."""
    write_vocabulary(directory, r50k_vocab() | {END_OF_TEXT: 50256}, r50k_merges())
    write(directory, "config.json", {"model_type": "gpt_neo", "vocab_size": 50257, "eos_token_id": 50256})
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    write(directory, "special_tokens_map.json", roles)
    names = {"tokenizer_class": "GPT2Tokenizer", "pad_token": None, "add_bos_token": False, "add_prefix_space": False}
    write(directory, "tokenizer_config.json", roles | names)


def write_opt(directory: Path) -> None:
    """As facebook/opt-125m: first four special tokens, ids in another order than merges, words that no merge makes."""
    ids = random.Random(0).sample(range(4, 50260), 50256)
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | dict(zip(r50k_vocab(), ids, strict=True))
    vocab |= {END_OF_TEXT: 50260} | {f"madeupword000{n}": 50261 + n for n in range(4)}
    write_vocabulary(directory, vocab, r50k_merges())
    write(directory, "config.json", {"model_type": "opt", "vocab_size": 50272, "eos_token_id": 2, "bos_token_id": 2})
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), described("</s>")) | {"pad_token": described("<pad>")}
    write(directory, "special_tokens_map.json", roles)
    typed = {role: token | {"__type": "AddedToken"} for role, token in roles.items()}
    names = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False, "errors": "replace"}
    write(directory, "tokenizer_config.json", typed | names)


def write_gpt2_with_added_tokens(directory: Path) -> None:
    """A fine-tuned GPT-2 with its own tokens. One is not special, so it is recognised in every text."""
    write_gpt2(directory)
    write(directory, "config.json", {"model_type": "gpt2", "vocab_size": 50260, "eos_token_id": 50256})
    write(directory, "added_tokens.json", {"<user>": 50257, "<user>s": 50258, "<bot é>": 50259})
    roles = {"eos_token": END_OF_TEXT, "additional_special_tokens": ["<user>", "<user>s"]}
    write(directory, "tokenizer_config.json", roles)


def resave(write_original: Callable[[Path], None]) -> Callable[[Path], None]:
    """What transformers 5 writes: tokenizer.json and tokenizer_config.json, but no vocab.json."""

    def write_again(directory: Path) -> None:
        original = directory / "original"
        write_original(original)
        AutoTokenizer.from_pretrained(str(original)).save_pretrained(str(directory))
        (directory / "config.json").write_bytes((original / "config.json").read_bytes())
        assert not (directory / "vocab.json").exists()

    return write_again


WRITERS = {
    "gpt2": write_gpt2,
    "gpt_neo": write_gpt_neo,
    "opt": write_opt,
    "added": write_gpt2_with_added_tokens,
    "opt resaved": resave(write_opt),
    "added resaved": resave(write_gpt2_with_added_tokens),
}


@pytest.fixture(scope="module")
def r50k() -> Tokenizer:
    return r50k_base()


@pytest.fixture(scope="module", params=WRITERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Ours and transformers' tokenizer of one checkpoint directory."""
    directory = tmp_path_factory.mktemp("checkpoint")
    WRITERS[request.param](directory)
    return load_tokenizer(directory), AutoTokenizer.from_pretrained(str(directory))


FAST = settings(max_examples=75, deadline=None)


class TestR50k:
    def test_docstring_examples(self, r50k: Tokenizer) -> None:
        assert r50k.encode("Once upon a time") == [7454, 2402, 257, 640]
        assert r50k.token_bytes(7454) == b"Once"
        assert r50k.encode(END_OF_TEXT, allow_special=True) == [50256] == [r50k.eos_id]

    def test_published_size(self, r50k: Tokenizer) -> None:
        assert 50256 in r50k
        assert 50257 not in r50k
        assert -1 not in r50k
        assert r50k.max_token_bytes == 128
        assert r50k.bos_id is None
        assert r50k.special_tokens == {END_OF_TEXT: 50256}

    def test_id_beyond_the_vocabulary_has_no_bytes(self, r50k: Tokenizer) -> None:
        with pytest.raises(KeyError):
            r50k.token_bytes(50257)

    def test_special_tokens_and_unused_ids_add_no_text(self, r50k: Tokenizer) -> None:
        assert [r50k.text_bytes(token) for token in (7454, 50256, 50257)] == [b"Once", b"", b""]

    def test_damaged_file_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        damaged = tmp_path / "r50k_base.tiktoken"
        damaged.write_bytes(model.checkpoint.tokenizer.R50K_FILE.read_bytes()[:-1])
        monkeypatch.setattr(model.checkpoint.tokenizer, "R50K_FILE", damaged)
        with pytest.raises(TokenizerError, match=r"r50k_base\.tiktoken has sha256 [0-9a-f]{64}, expected 306cd27f"):
            r50k_base()

    @FAST
    @given(text=TEXTS, allow_special=st.booleans())
    def test_bytes_of_tokens_are_bytes_of_text(self, r50k: Tokenizer, text: str, allow_special: bool) -> None:
        tokens = r50k.encode(text, allow_special=allow_special)
        assert b"".join(map(r50k.token_bytes, tokens)) == text.encode()
        assert r50k.decode(tokens) == text

    @FAST
    @given(text=TEXTS)
    def test_special_text_stays_text_unless_allowed(self, r50k: Tokenizer, text: str) -> None:
        assert 50256 not in r50k.encode(text)
        assert r50k.encode(text, allow_special=True).count(50256) == text.count(END_OF_TEXT)

    def test_lone_surrogates_become_replacement_characters(self, r50k: Tokenizer) -> None:
        assert r50k.encode("a\ud800b") == r50k.encode("a\ufffdb")
        assert r50k.encode("\udc00", allow_special=True) == r50k.encode("\ufffd")

    def test_million_letters_without_a_space(self, r50k: Tokenizer) -> None:
        assert len(r50k.encode("a" * 1_000_000)) == 250_000

    @pytest.mark.parametrize(("space", "count"), [(" ", 1_000_000), ("\n", 1_000_000), ("\u3000", 340_000)])
    def test_million_spaces(self, r50k: Tokenizer, space: str, count: int) -> None:
        """tiktoken alone panics on the first of these texts."""
        spaces = r50k.encode(space * count)
        assert r50k.encode(space * (count + 1) + "word") == spaces + r50k.encode(space + "word")
        assert r50k.encode("word" + space * count) == r50k.encode("word") + spaces

    @FAST
    @given(text=st.text("a1\x1c \n\u2003", max_size=30))
    def test_cutting_long_space_changes_nothing(self, r50k: Tokenizer, text: str) -> None:
        expected = r50k.encode(text)
        with pytest.MonkeyPatch.context() as patch:
            pattern = model.checkpoint.tokenizer.LONG_SPACE.pattern.replace("100000", "2")
            patch.setattr(model.checkpoint.tokenizer, "LONG_SPACE", re.compile(pattern))
            assert r50k.encode(text) == expected


class TestNames:
    def test_docstring_examples(self, r50k: Tokenizer) -> None:
        names = ["Once", r"bytes:\xe2\x80", END_OF_TEXT, "token_id:50257"]
        assert [r50k.token_name(token) for token in (7454, 447, 50256, 50257)] == names

    def test_of_the_whole_vocabulary(self, r50k: Tokenizer) -> None:
        names = [r50k.token_name(token) for token in range(50304)]
        assert len(set(names)) == 50304
        for token, name in enumerate(names[:50257]):
            escaped = name.removeprefix("bytes:").replace(r"\x", "") if name.startswith(r"bytes:\x") else None
            assert r50k.token_bytes(token) == (name.encode() if escaped is None else bytes.fromhex(escaped))
        assert names[50257:] == [f"token_id:{token}" for token in range(50257, 50304)]

    def test_of_an_odd_vocabulary(self) -> None:
        """Tokens with the same text, or with a text that is another token's name."""
        tokens = {byte: bytes([byte]) for byte in range(256)}
        odd = [b"<s>", b"<s>", rb"bytes:\xff", rb"bytes:\xfe\xfe", b"\xfe\xfe", b"token_id:255", b"token_id:700", b"a", b""]
        tokens |= dict(enumerate([*odd, b"", "é".encode()], 256))
        tokenizer = Tokenizer(tokens, range(256), special={"<s>": 257, "token_id:3": 700}, added={}, eos_id=257)
        names = [tokenizer.token_name(token) for token in range(800)]
        assert len(set(names)) == 800
        assert names[255:267] == [
            r"bytes:\xff",
            "token_id:256",
            "<s>",
            "token_id:258",
            r"bytes:\xfe\xfe",
            "token_id:260",
            "token_id:261",
            "token_id:262",
            "token_id:263",
            "",
            "token_id:265",
            "é",
        ]
        assert (names[3], names[700]) == ("\x03", "token_id:700")


def encode_slowly(tokenizer: Tokenizer, added: list[str], parts: list[tuple[str, bool]]) -> list[int]:
    """Cuts each part alone at its special tokens, and encodes all else piece by piece as plain text."""
    runs: list[str | int] = [""]
    for text, allow_special in parts:
        place = 0
        while place < len(text):
            found = [name for name in [*tokenizer.special_tokens, *added] if allow_special and text.startswith(name, place)]
            piece = max([text[place], *found], key=len)
            if piece in found and piece in tokenizer.special_tokens:
                runs += [tokenizer.special_tokens[piece], ""]
            else:
                runs[-1] = str(runs[-1]) + piece
            place += len(piece)
    return [token for run in runs for token in ([run] if isinstance(run, int) else tokenizer.encode(run))]


ADDED = {"<bot é>": 50257, "<us": 50260, "<user>s": 50258, "x</s>x": 50261}


@pytest.fixture(scope="module")
def overlapping(r50k: Tokenizer) -> Tokenizer:
    """A vocabulary in which added tokens begin as special ones do, or contain one."""
    special = {END_OF_TEXT: 50256, "<user>": 50259, "</s>": 50262}
    tokens = {token: r50k.token_bytes(token) for token in range(50256)}
    named = {token: name.encode() for name, token in {**special, **ADDED}.items()}
    return Tokenizer(tokens | named, range(50256), special=special, added=ADDED, eos_id=50256)


class TestParts:
    PIECES = st.sampled_from(
        ["User: ", "hello", " ", "\n", "<", "us", "er", ">", "s", "x", "</", "s>", "<user>", "<user>s", "</s>", END_OF_TEXT]
    )
    PARTS = st.lists(st.tuples(st.lists(PIECES | st.text(max_size=3), max_size=6).map("".join), st.booleans()), max_size=6)

    @settings(max_examples=500, deadline=None)
    @given(parts=PARTS)
    def test_against_the_oracle(self, overlapping: Tokenizer, parts: list[tuple[str, bool]]) -> None:
        assert overlapping.encode_parts(parts) == encode_slowly(overlapping, list(ADDED), parts)

    @FAST
    @given(parts=PARTS)
    def test_plain_parts_are_one_text(self, overlapping: Tokenizer, parts: list[tuple[str, bool]]) -> None:
        texts = [text for text, _ in parts]
        assert overlapping.encode_parts((text, False) for text in texts) == overlapping.encode("".join(texts))

    def test_examples(self, overlapping: Tokenizer) -> None:
        encode, encode_parts = overlapping.encode, overlapping.encode_parts
        plain, special = (
            functools.partial(PromptPart, allow_special=False),
            functools.partial(PromptPart, allow_special=True),
        )
        assert encode_parts([]) == []
        assert encode_parts([plain("User: "), special("hello")]) == encode("User: hello")
        assert encode_parts([plain("</s>"), special("</s>")]) == [*encode("</s>"), 50262]
        assert encode_parts([special("</s"), special(">")]) == encode("</s>")
        # An added token is found across a border, even if the text ahead of it was searched for special ones.
        assert encode_parts([special("</s><bot "), plain("é>")]) == [50262, 50257]


@FAST
@given(text=TEXTS, allow_special=st.booleans(), piece=st.integers(2, 9))
def test_encoding_in_pieces_changes_nothing(pair: tuple[Tokenizer, Any], text: str, allow_special: bool, piece: int) -> None:
    # Only regex, which looks for the words where no space stands, knows Unicode's newest letters.
    assume(all(unicodedata.category(char) != "Cn" for char in text))
    expected = pair[0].encode(text, allow_special=allow_special)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.checkpoint.tokenizer, "PIECE", piece)
        assert pair[0].encode(text, allow_special=allow_special) == expected


def test_a_long_text_is_encoded_in_short_pieces(r50k: Tokenizer) -> None:
    for text in ("the king " * 50_000, "\u5929\uff0c" * 100_000, "ab-" * 100_000):
        pieces = list(r50k.encode_slowly([(text, False)]))
        assert 5 < len(pieces) < 20
        assert [token for piece in pieces for token in piece] == r50k._bpe.encode_ordinary(text)


def test_a_word_too_long(r50k: Tokenizer) -> None:
    for word in ("a" * (2**20 + 1), "\u5929" * 349_526, "\ud800" * 349_526):
        with pytest.raises(LongWordError, match=r"^holds a word of 10485\d\d bytes, at most 1048576 can be tokenized$"):
            r50k.encode(f"b {word} c")


class TestAgainstTransformers:
    @FAST
    @given(text=TEXTS)
    def test_encode(self, pair: tuple[Tokenizer, Any], text: str) -> None:
        ours, theirs = pair
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)

    @FAST
    @given(text=TEXTS)
    def test_encode_with_special_tokens(self, pair: tuple[Tokenizer, Any], text: str) -> None:
        ours, theirs = pair
        assert ours.encode(text, allow_special=True) == theirs.encode(text, add_special_tokens=False)

    @FAST
    @given(text=TEXTS)
    def test_prompt(self, pair: tuple[Tokenizer, Any], text: str) -> None:
        ours, theirs = pair
        assert text_prompt(text, ours, allow_special=True).tokens == (theirs.encode(text) or [theirs.eos_token_id])

    @FAST
    @given(data=st.data())
    def test_decode(self, pair: tuple[Tokenizer, Any], data: st.DataObject) -> None:
        ours, theirs = pair
        known = st.integers(0, len(theirs) - 1).filter(ours.__contains__)
        tokens = data.draw(st.lists(known | st.sampled_from(sorted(ours.special_tokens.values())), max_size=20))
        assert ours.decode(tokens) == theirs.decode(tokens, clean_up_tokenization_spaces=False)

    def test_vocabulary(self, pair: tuple[Tokenizer, Any]) -> None:
        ours, theirs = pair
        assert {token_id for token_id in range(60_000) if token_id in ours} == set(theirs.get_vocab().values())
        assert ours.eos_id == theirs.eos_token_id
        assert set(ours.special_tokens) == set(theirs.all_special_tokens)


def test_every_character_belongs_to_the_same_class(r50k: Tokenizer, tmp_path: Path) -> None:
    """Letter, digit, space or other. Two Unicode tables must agree on each, or words are cut differently."""
    write_gpt2(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    characters = [chr(code) for code in [*range(0xD800), *range(0xE000, 0x11000), *range(0x1F000, 0x1FB00)]]
    text = "".join(f"a{character}1{character}!{character} {character}" for character in characters)
    assert r50k.encode(text) == theirs.encode(text, add_special_tokens=False)


DEMO = Path(__file__).parents[3] / "model" / "data" / "demo"


@pytest.fixture(scope="module")
def embedded() -> Any:
    return AutoTokenizer.from_pretrained(str(DEMO))


class TestEmbeddedDirectory:
    @FAST
    @given(text=TEXTS)
    def test_hugging_face_reads_the_same_tokenizer(self, embedded: Any, r50k: Tokenizer, text: str) -> None:
        theirs = embedded
        assert theirs.encode(text) == r50k.encode(text, allow_special=True)
        assert (theirs.eos_token_id, len(theirs), theirs.model_max_length) == (r50k.eos_id, 50257, 2048)

    def test_the_files_are_those_of_the_ranks(self, r50k: Tokenizer, tmp_path: Path) -> None:
        assert load_tokenizer(DEMO).fingerprint() == r50k.fingerprint()
        write_vocabulary(tmp_path, r50k_vocab() | {END_OF_TEXT: 50256}, r50k_merges())
        for name in ("vocab.json", "merges.txt"):
            assert (DEMO / name).read_bytes() == (tmp_path / name).read_bytes()


def test_opt_starts_prompts_with_its_end_of_text(tmp_path: Path) -> None:
    write_opt(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 2)
    assert text_prompt("Hello", tokenizer).tokens == [2, *tokenizer.encode("Hello")]
    assert text_prompt("", tokenizer).tokens == [2]
    assert tokenizer.token_bytes(50261) == b"madeupword0000"
    assert 50265 not in tokenizer


def test_tokens_outside_the_byte_alphabet_stand_for_themselves(tmp_path: Path) -> None:
    write_gpt2_with_added_tokens(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.token_bytes(50259) == "<bot é>".encode()
    assert tokenizer.encode("a<bot é>") == [64, 50259]


# Merges over three letters, in an order that no training would give: pairs that others make, and lines that never fire.
MERGE_PLANS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=12)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=MERGE_PLANS, texts=st.lists(st.text("abc", max_size=20), min_size=5, max_size=5))
def test_untrained_merges_work_as_in_tokenizers(tmp_path: Path, plan: list[tuple[int, int]], texts: list[str]) -> None:
    pieces, merges = ["a", "b", "c"], []
    for left, right in plan:
        pair = pieces[left % len(pieces)], pieces[right % len(pieces)]
        if pair not in merges:
            merges.append(pair)
            pieces.append("".join(pair))
    # The same word may be made twice. Its place in `pieces` is then drawn again, which is harmless.
    vocab = {piece: token_id for token_id, piece in enumerate(dict.fromkeys([*BYTE_OF, *pieces]))}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "config.json", {"model_type": "gpt2", "eos_token_id": 0})
    ours = load_tokenizer(tmp_path)
    for text in texts:
        assert ours.encode(text) == theirs.encode(text).ids


class TestDirectoriesWithoutVocabulary:
    @pytest.mark.parametrize(
        "config",
        [
            {"model_type": "banded", "vocab_size": 50257},
            {"model_type": "banded", "vocab_size": 50304},
            {"model_type": "gpt2", "vocab_size": 50257},
            {"model_type": "gpt_neo", "vocab_size": 50257},
        ],
    )
    def test_get_r50k(self, tmp_path: Path, config: Json) -> None:
        write(tmp_path, "config.json", config)
        assert load_tokenizer(tmp_path).encode("Once upon a time") == [7454, 2402, 257, 640]
        assert load_tokenizer(tmp_path).eos_id == 50256
        write(tmp_path, "config.json", config | {"eos_token_id": 11})
        assert load_tokenizer(tmp_path).eos_id == 11

    def test_the_assumption_is_logged(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write(tmp_path, "config.json", {"model_type": "gpt2", "vocab_size": 50257})
        settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END_OF_TEXT, "add_prefix_space": False}
        write(tmp_path, "tokenizer_config.json", settings)  # what fits is no contradiction
        load_tokenizer(tmp_path)
        assert caplog.messages == [f"{tmp_path} holds no vocabulary: GPT-2's, r50k_base, is assumed"]
        caplog.clear()
        write(tmp_path, "config.json", {"model_type": "banded", "vocab_size": 50257})
        load_tokenizer(tmp_path)
        assert caplog.messages == []

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            (
                "vocab.txt",
                {},
                "vocab.txt tells of another tokenizer than r50k_base, but there is neither tokenizer.json nor",
            ),
            ("spiece.model", {}, "spiece.model tells of another"),
            ("encoder.json", {}, "encoder.json tells of another"),
            ("r.tiktoken", {}, "r.tiktoken tells of another"),
            ("config.json", {"tokenizer_class": "BertTokenizer"}, "config.json: tokenizer_class 'BertTokenizer' tells of"),
            ("config.json", {"bos_token_id": 50257}, "config.json: bos_token_id 50257 is not in the vocabulary"),
            ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer"}, "tokenizer_config.json: tokenizer_class 'BertT"),
            (
                "tokenizer_config.json",
                {"tokenizer_class": "PreTrainedTokenizerFast"},
                "tokenizer_class 'PreTrainedTokenizerF",
            ),
            ("tokenizer_config.json", {"eos_token": "</s>"}, "the special token '</s>' tells of another"),
            ("tokenizer_config.json", {"add_bos_token": True}, "tokenizer_config.json: add_bos_token tells of another"),
            (
                "tokenizer_config.json",
                {"add_prefix_space": True},
                "tokenizer_config.json: add_prefix_space tells of another",
            ),
            ("tokenizer_config.json", {"added_tokens_decoder": {"5": described("[UNK]")}}, r"the special token '\[UNK\]'"),
            ("special_tokens_map.json", {"pad_token": "<pad>"}, "the special token '<pad>' tells of another"),
            ("added_tokens.json", {"<pad>": 7}, "the special token '<pad>' tells of another"),
        ],
    )
    def test_are_refused_where_something_contradicts_r50k(
        self, name: str, content: Json, message: str, tmp_path: Path
    ) -> None:
        write(tmp_path, "config.json", {"model_type": "gpt2", "vocab_size": 50257})
        content |= json.loads((tmp_path / name).read_text()) if (tmp_path / name).exists() else {}
        write(tmp_path, name, content)
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"model_type": "banded", "vocab_size": 50256}, "vocab_size is 50256, r50k_base needs 50257"),
            ({"model_type": "banded"}, "vocab_size is None"),
            ({"model_type": "gpt2", "vocab_size": 50258}, "neither tokenizer.json nor vocab.json with merges.txt"),
            ({"model_type": "gpt2", "vocab_size": 50257, "eos_token_id": 50257}, "eos_token_id 50257 is not in the"),
            ({"model_type": "opt", "vocab_size": 50257}, "neither tokenizer.json nor vocab.json with merges.txt"),
        ],
    )
    def test_are_refused_where_r50k_may_be_wrong(self, tmp_path: Path, config: Json, message: str) -> None:
        write(tmp_path, "config.json", config)
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(tmp_path)


BYTES = {character: token_id for token_id, character in enumerate(BYTE_OF)}


def tiny_vocab() -> dict[str, int]:
    """Every byte, "ab", "abc" and an end."""
    return {piece: token_id for token_id, piece in enumerate([*BYTE_OF, "ab", "abc", "<end>"])}


def write_tiny(directory: Path) -> None:
    write_vocabulary(directory, tiny_vocab(), ["a b", "ab c"])
    write(directory, "config.json", {"model_type": "gpt2", "vocab_size": 259})
    write(directory, "tokenizer_config.json", {"eos_token": "<end>"})


def tiny_pipeline(**changes: Any) -> Json:
    """The same as tokenizer.json."""
    model = {"type": "BPE", "vocab": tiny_vocab(), "merges": ["a b", ["ab", "c"]]}
    words = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return {"model": model, "normalizer": None, "pre_tokenizer": words, "added_tokens": []} | changes


def template(*parts: str) -> Json:
    """The post-processor that surrounds a text, written "$", with special tokens."""
    single = [{"Sequence": {"id": "A"}} if part == "$" else {"SpecialToken": {"id": part}} for part in parts]
    return {"type": "TemplateProcessing", "single": single}


def without(mapping: dict[str, int], key: str) -> dict[str, int]:
    return {other: value for other, value in mapping.items() if other != key}


def sequence(members: str, *steps: Json) -> Json:
    return {"type": "Sequence", members: list(steps)}


def split(regex: str, behavior: str = "Isolated") -> Json:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": False}


def bytes_missing(**options: Any) -> Json:
    return tiny_pipeline(model=tiny_pipeline()["model"] | {"vocab": without(tiny_vocab(), "Ċ"), **options})


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny(tmp_path)
    return tmp_path


class TestTinyCheckpoint:
    def test_loads(self, tiny: Path) -> None:
        tokenizer = load_tokenizer(tiny)
        assert tokenizer.encode("abcab") == [257, 256]
        assert (tokenizer.eos_id, tokenizer.bos_id) == (258, None)

    def test_pipeline_is_read_before_vocab_and_merges(self, tiny: Path) -> None:
        (tiny / "vocab.json").write_text("damaged")
        write(tiny, "tokenizer.json", tiny_pipeline())
        assert load_tokenizer(tiny).encode("abcab") == [257, 256]

    def test_pipeline_of_the_first_generation_has_no_model_type(self, tiny: Path) -> None:
        pipeline = tiny_pipeline()
        del pipeline["model"]["type"]
        write(tiny, "tokenizer.json", pipeline)
        assert load_tokenizer(tiny).encode("abcab") == [257, 256]

    @pytest.mark.parametrize(
        ("processor", "bos_id"),
        [
            (None, None),
            ({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}, None),
            (template("$"), None),
            (template("<end>", "$"), 258),
            (sequence("processors", {"type": "ByteLevel"}, template("<end>", "$")), 258),
            (sequence("processors", sequence("processors", {"type": "ByteLevel"})), None),
        ],
    )
    def test_post_processor_decides_about_bos(self, tiny: Path, processor: Json | None, bos_id: int | None) -> None:
        write(tiny, "tokenizer.json", tiny_pipeline(post_processor=processor))
        assert load_tokenizer(tiny).bos_id == bos_id

    def test_merges_may_lack_the_version_line_and_the_last_newline(self, tiny: Path) -> None:
        (tiny / "merges.txt").write_bytes(b"a b\r\nab c")
        assert load_tokenizer(tiny).encode("abcab") == [257, 256]

    def test_special_tokens_map_overrules_what_is_older_than_added_tokens_decoder(self, tiny: Path) -> None:
        write(tiny, "special_tokens_map.json", {"eos_token": "abc"})
        assert load_tokenizer(tiny).eos_id == 257
        write(tiny, "tokenizer_config.json", {"eos_token": "<end>", "added_tokens_decoder": {}})
        assert load_tokenizer(tiny).eos_id == 258

    @pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json"])
    def test_empty_additions_add_nothing(self, tiny: Path, name: str) -> None:
        write(tiny, name, {})
        assert load_tokenizer(tiny).special_tokens == {"<end>": 258}

    @pytest.mark.parametrize(
        ("role", "config", "generation", "ends"),
        [
            ("<end>", None, None, [258]),
            ("<end>", 258, [258], [258]),
            ("<end>", 257, 10, [258, 257, 10]),
            (None, [257, 258], 258, [257, 258]),
            (None, None, [198, 257], [198, 257]),
            (None, [], None, []),
            (None, None, None, []),
        ],
    )
    def test_every_end_of_text_that_a_file_names(
        self, tiny: Path, role: str | None, config: Any, generation: Any, ends: list[int]
    ) -> None:
        write(tiny, "tokenizer_config.json", {"eos_token": role})
        write(tiny, "config.json", {"model_type": "gpt2", "vocab_size": 259, "eos_token_id": config})
        write(tiny, "generation_config.json", {"eos_token_id": generation})
        tokenizer = load_tokenizer(tiny)
        assert tokenizer.eos_ids == set(ends)
        assert tokenizer.eos_id == tokenizer.start_id == (ends[0] if ends else None)

    def test_ids_that_the_model_lacks_end_nothing_and_are_logged(self, tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
        """As in a config.json that was copied from GPT-2's for a smaller vocabulary."""
        write(tiny, "tokenizer_config.json", {})
        config = {"model_type": "gpt2", "vocab_size": 259, "bos_token_id": 50256, "eos_token_id": [50256, -1, 258]}
        write(tiny, "config.json", config)
        assert load_tokenizer(tiny).eos_ids == {258}
        assert [record.getMessage() for record in caplog.records] == [
            f"{role}_token_id {token_id} is left out: the model's ids end at 258"
            for role, token_id in (("bos", 50256), ("eos", 50256), ("eos", -1))
        ]

    def test_bos_starts_a_document_that_follows_no_prompt(self, tiny: Path) -> None:
        write(tiny, "config.json", {"model_type": "gpt2", "vocab_size": 259, "bos_token_id": 257})
        tokenizer = load_tokenizer(tiny)
        assert tokenizer.bos_id is None
        assert (tokenizer.eos_id, tokenizer.encode_prompt(""), tokenizer.encode_prompt("a")) == (258, [257], [64])
        assert text_prompt("", tokenizer) == Prompt([257], num_implicit=1)

    def test_no_token_starts_a_document(self, tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
        write(tiny, "tokenizer_config.json", {})
        tokenizer = load_tokenizer(tiny)
        assert "no token ends a text: tokenizer_config.json has no eos_token" in caplog.text
        with pytest.raises(TokenizerError, match="an empty prompt needs a token that starts a document, and the model has"):
            tokenizer.encode_prompt("")
        with pytest.raises(RequestError, match="'prompt': an empty prompt needs a token that starts a document, and"):
            text_prompt("", tokenizer)

    def test_a_line_end_that_ends_texts_stays_text(self, tiny: Path) -> None:
        write(tiny, "config.json", {"model_type": "gpt2", "vocab_size": 259, "eos_token_id": BYTES["Ċ"]})
        tokenizer = load_tokenizer(tiny)
        assert tokenizer.eos_ids == {258, BYTES["Ċ"]}
        assert tokenizer.special_tokens == {"<end>": 258}
        assert tokenizer.text_bytes(BYTES["Ċ"]) == b"\n"

    def test_tokens_beyond_the_model_are_known_and_refused_in_prompts(
        self, tiny: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As after tokenizer.add_tokens without resize_token_embeddings. An end of text among them can't end anything."""
        write(tiny, "added_tokens.json", {"<tool>": 259})
        write(tiny, "config.json", {"model_type": "gpt2", "vocab_size": 258, "eos_token_id": 257})
        tokenizer = load_tokenizer(tiny)
        assert "the model has no row for '<end>', '<tool>': a prompt that holds one is refused" in caplog.text
        assert tokenizer.eos_ids == {257}
        assert tokenizer.special_tokens == {"<end>": 258}
        assert tokenizer.encode("ab<tool>") == [256, 259]
        assert text_prompt("ab<end>", tokenizer).tokens == tokenizer.encode("ab<end>") == [256, *map(BYTES.get, "<end>")]
        for text, message in (("a<tool>b", "'<tool>' is token 259, but"), ("a<end>", "'<end>' is token 258, but")):
            with pytest.raises(RequestError, match=f"'prompt': {message} the model's ids end at 257"):
                text_prompt(text, tokenizer, allow_special=True)
        with pytest.raises(TokenizerError, match="'<tool>' is token 259, but the model's ids end at 257"):
            tokenizer.encode_prompt("<tool>")
        params = SamplingParams(stop=("<end>",), stop_token_ids=(5,))
        assert GenerationRequest([], params).stop_ids(Prompt([1], stop_token_ids=(258,)), tokenizer) == {5, 257}

    def test_a_start_of_every_prompt_beyond_the_model_is_refused(self, tiny: Path) -> None:
        write(tiny, "tokenizer.json", tiny_pipeline(post_processor=template("<end>", "$")))
        write(tiny, "config.json", {"model_type": "gpt2", "vocab_size": 258})
        with pytest.raises(TokenizerError, match=r"token 258 starts every prompt, but config\.json says vocab_size 258"):
            load_tokenizer(tiny)

    def test_role_without_an_id_is_no_token(self, tiny: Path) -> None:
        write(tiny, "tokenizer_config.json", {"eos_token": "<end>", "pad_token": "[PAD]"})
        assert load_tokenizer(tiny).special_tokens == {"<end>": 258}


SPECIAL = {"id": 258, "content": "<end>", "special": True}

REFUSED_JSON: list[tuple[str, Any, str]] = [
    ("config.json", {"vocab_size": 257}, r"token 'abc' has id 257, but config\.json says vocab_size 257"),
    ("vocab.json", without(tiny_vocab(), "abc"), r"merges\.txt line 3: 'abc' is not in vocab\.json"),
    ("vocab.json", tiny_vocab() | {"ab": 5, "abc": 5}, r"vocab\.json: \['&', 'ab', 'abc'\] share the id 5"),
    ("vocab.json", {}, r"vocab\.json: no token for any byte"),
    ("vocab.json", without(tiny_vocab(), "b"), r"merges\.txt line 2: 'b' is neither a byte nor made by an earlier merge"),
    ("vocab.json", tiny_vocab() | {"ab": "5"}, r"vocab\.json: the id of 'ab' is '5', expected an integer"),
    ("vocab.json", tiny_vocab() | {"ab": True}, r"vocab\.json: the id of 'ab' is True, expected an integer"),
    ("vocab.json", tiny_vocab() | {"ab": -1}, r"vocab\.json: the id of 'ab' is -1, expected an integer"),
    ("tokenizer_config.json", {"eos_token": "</s>"}, "eos_token '</s>' is not in the vocabulary"),
    ("config.json", {"eos_token_id": "258"}, r"config\.json: eos_token_id is '258', expected a whole number or a list"),
    (
        "generation_config.json",
        {"eos_token_id": [258, None]},
        r"generation_config\.json: eos_token_id is \[258, None\], exp",
    ),
    ("tokenizer_config.json", {"eos_token": 258}, r"tokenizer_config\.json: 258 describes no token"),
    ("tokenizer_config.json", {"add_prefix_space": True}, r"tokenizer_config\.json: add_prefix_space is not supported"),
    ("tokenizer_config.json", {"add_eos_token": True}, r"tokenizer_config\.json: add_eos_token is not supported"),
    ("tokenizer_config.json", {"eos_token": "<end>", "add_bos_token": True}, "add_bos_token without a bos_token"),
    ("tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer"}, "tokenizer_class 'RobertaTokenizer' is not"),
    ("tokenizer_config.json", {"mask_token": described("<m>", lstrip=True)}, "lstrip of token '<m>' is not supported"),
    (
        "tokenizer_config.json",
        {"eos_token": "<end>", "added_tokens_decoder": {"7": described("<end>")}},
        r"tokenizer_config\.json: '<end>' has id 7, elsewhere 258",
    ),
    ("added_tokens.json", {"<new>": 258}, r"added_tokens\.json: '<new>' and '<end>' share the id 258"),
    ("added_tokens.json", {"<new>": "259"}, r"added_tokens\.json: the id of '<new>' is '259', expected an integer"),
    ("tokenizer.json", {}, r"tokenizer\.json: model None is not supported, only BPE"),
    ("tokenizer.json", tiny_pipeline(model={"type": "WordPiece"}), "model WordPiece is not supported, only BPE"),
    ("tokenizer.json", tiny_pipeline(model={"type": "BPE", "vocab": tiny_vocab()}), "the model lacks vocab or merges"),
    (
        "tokenizer.json",
        tiny_pipeline(model=tiny_pipeline()["model"] | {"ignore_merges": True}),
        "model.ignore_merges True is not supported where no merge makes '<end>'",
    ),
    (
        "tokenizer.json",
        tiny_pipeline(model=tiny_pipeline()["model"] | {"merges": [["a", "b"], ["b", "a", "b"]]}),
        r"tokenizer\.json merge 2: expected two pieces, got \['b', 'a', 'b'\]",
    ),
    ("tokenizer.json", tiny_pipeline(normalizer={"type": "NFKC"}), "normalizer NFKC is not supported, only NFC"),
    ("tokenizer.json", tiny_pipeline(pre_tokenizer=None), "pre_tokenizer None does not cut words as GPT-2 does"),
    ("tokenizer.json", tiny_pipeline(pre_tokenizer={"type": "Sequence"}), "pre_tokenizer Sequence does not cut words"),
    (
        "tokenizer.json",
        tiny_pipeline(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}),
        "normalizer NFC, Lowercase is not supported, only NFC",
    ),
    (
        "tokenizer.json",
        tiny_pipeline(normalizer={"type": "NFC"}, added_tokens=[SPECIAL | {"normalized": True}]),
        "normalizer NFC ahead of added token '<end>' is not supported",
    ),
    (
        "tokenizer.json",
        tiny_pipeline(pre_tokenizer=sequence("pretokenizers", BYTE_LEVEL, {"type": "Digits", "individual_digits": True})),
        "pre_tokenizer ByteLevel, Digits does not cut words",
    ),
    (
        "tokenizer.json",
        tiny_pipeline(pre_tokenizer=sequence("pretokenizers", BYTE_LEVEL, BYTE_LEVEL)),
        "pre_tokenizer ByteLevel, ByteLevel does not cut words",
    ),
    (
        "tokenizer.json",
        tiny_pipeline(pre_tokenizer=sequence("pretokenizers", split(r"\s+"), BYTE_LEVEL | {"use_regex": False})),
        "pre_tokenizer Split, ByteLevel does not cut words",
    ),
    (
        "tokenizer.json",
        tiny_pipeline(
            pre_tokenizer=sequence(
                "pretokenizers", split(GPT2_PATTERN, behavior="MergedWithNext"), BYTE_LEVEL | {"use_regex": False}
            )
        ),
        "pre_tokenizer Split, ByteLevel does not cut words",
    ),
    (
        "tokenizer.json",
        tiny_pipeline(pre_tokenizer=sequence("pretokenizers", BYTE_LEVEL | {"add_prefix_space": True})),
        r"pre_tokenizer\.add_prefix_space is not supported",
    ),
    ("tokenizer.json", bytes_missing(unk_token="<unk>"), r"model\.unk_token '<unk>' is not in the vocabulary"),
    ("tokenizer.json", bytes_missing(byte_fallback=True), r"model\.byte_fallback is not supported where a byte has no to"),
    (
        "tokenizer.json",
        tiny_pipeline(pre_tokenizer={"type": "ByteLevel", "use_regex": False}),
        "pre_tokenizer ByteLevel does not cut words as GPT-2 does",
    ),
    (
        "tokenizer.json",
        tiny_pipeline(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}),
        r"pre_tokenizer\.add_prefix_space is not supported",
    ),
    (
        "tokenizer.json",
        tiny_pipeline(post_processor={"type": "RobertaProcessing"}),
        "post_processor RobertaProcessing does more than start a text with bos",
    ),
    ("tokenizer.json", tiny_pipeline(post_processor=template("$", "<end>")), "post_processor TemplateProcessing does"),
    (
        "tokenizer.json",
        tiny_pipeline(post_processor=sequence("processors", template("<end>", "$"), template("<end>", "$"))),
        "post_processor TemplateProcessing, TemplateProcessing does more than start a text with bos",
    ),
    ("tokenizer.json", tiny_pipeline(post_processor=template("<s>", "$")), "post_processor's '<s>' is not in the voca"),
    (
        "tokenizer.json",
        tiny_pipeline(added_tokens=[SPECIAL | {"rstrip": True}]),
        r"tokenizer\.json: rstrip of token '<end>' is not supported",
    ),
    ("tokenizer.json", tiny_pipeline(added_tokens=["<end>"]), "the id of '<end>' is None, expected an integer"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED_JSON)
def test_json_that_would_encode_wrongly_is_refused(tiny: Path, name: str, content: Any, message: str) -> None:
    write(tiny, name, content)
    with pytest.raises(TokenizerError, match=message) as refusal:
        load_tokenizer(tiny)
    assert str(refusal.value).startswith(f"{tiny}: ")


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        ("#version: 0.2\na b\nabc d\n", r"merges\.txt line 3: 'abc' is neither a byte nor made by an earlier merge"),
        ("ab c\na b\n", r"merges\.txt line 1: 'ab' is neither a byte nor made by an earlier merge"),
        ("a é\n", r"merges\.txt line 1: 'aé' is not in vocab\.json"),
        ("a b\n\nab c\n", r"merges\.txt line 2: expected two pieces, got ''"),
        ("a b c\n", r"merges\.txt line 1: expected two pieces, got 'a b c'"),
        ("a b\na b\n", r"merges\.txt line 2: 'a' and 'b' are merged before"),
    ],
)
def test_merges_of_unknown_pieces_are_refused(tiny: Path, merges: str, message: str) -> None:
    (tiny / "merges.txt").write_text(merges, encoding="utf-8")
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tiny)


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "merges.txt"])
def test_missing_file_is_named(tiny: Path, name: str) -> None:
    (tiny / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} can't be read( as JSON)?: No such file"):
        load_tokenizer(tiny)


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": ', "can't be read as JSON: Expecting value"),
        (b'{"a": ' + 100_000 * b"[", "can't be read as JSON: maximum recursion depth"),
        (b'{"\xff": 1}', "can't decode byte"),
        (b"[1]", "must hold a JSON object, got list"),
    ],
)
def test_invalid_json_is_named(tiny: Path, name: str, data: bytes, message: str) -> None:
    (tiny / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
        load_tokenizer(tiny)
