"""Byte-pair tokenizers, and the embedded one: r50k_base, GPT-2's and GPT-3's. No network."""

import base64
import copy
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import regex
import tiktoken

from model.checkpoint.files import CheckpointError

R50K_FILE = Path(__file__).parents[1] / "data" / "r50k_base.tiktoken"
R50K_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
R50K_VOCAB_SIZE = 50257
END_OF_TEXT = "<|endoftext|>"

# How GPT-2 cuts text into words before merging bytes inside each.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# The same where every digit, or every number, is a word of its own, without the space ahead of it.
DIGITS_PATTERN = GPT2_PATTERN.replace(r"| ?\p{N}++", "").replace(r"\s++$", r"\s++(?=\p{N}|$)")
DIGIT_PATTERN, NUMBER_PATTERN = r"\p{N}|" + DIGITS_PATTERN, r"\p{N}++|" + DIGITS_PATTERN
# NFC makes a text so many times shorter at most: U+1FBE U+0308 U+0301, of 7 bytes, becomes U+0390, of 2.
NFC_SHRINKS = 4

# How a token is named that has no other name. So no other name may begin like this.
NUMBERED = "token_id:"

# Characters that are searched or encoded in one go.
PIECE = 2**16
SPACE = re.compile(r"(?<=[!-~])[ \n]")
# Bytes of a word, which may also be white space or a line of dashes. Merging takes 50 bytes of memory for each.
MAX_WORD = 2**20

# A run of white space that a word follows. Unicode's white space lacks four separators that Python's \s has.
LONG_SPACE = re.compile(r"(?<![^\S\x1c-\x1f])[^\S\x1c-\x1f]{100000,}+(?!\Z)")


class TokenizerError(CheckpointError):
    """A vocabulary that can't be used: which file, and what is wrong with it."""


class LongWordError(ValueError):
    """A text that takes too much memory to tokenize. The message goes on after the text's name."""


class PromptPart(NamedTuple):
    """Part of a text, and whether a special token's name in it stands for the token."""

    text: str
    allow_special: bool


class TextRules(NamedTuple):
    """What happens to text before bytes merge, where it differs between tokenizers. The defaults are GPT-2's."""

    pattern: str = GPT2_PATTERN  # cuts words
    nfc: bool = False  # text is brought into Unicode's composed form first
    unknown_id: int | None = None  # stands for a byte without a token; None: such bytes are left out
    fuse_unknown: bool = False  # a run of such bytes in a word is one `unknown_id`


GPT2_RULES = TextRules()


class Tokenizer:
    """Text to token ids and back to bytes.

    Bytes, not text: a token may hold part of a character, so joining decoded strings token by token breaks them.

    >>> r50k_base().encode("Once upon a time")
    [7454, 2402, 257, 640]
    >>> r50k_base().token_bytes(7454)
    b'Once'
    """

    def __init__(
        self,
        tokens: Mapping[int, bytes],
        merge_order: Sequence[int],
        *,
        special: Mapping[str, int],
        added: Mapping[str, int],
        eos_id: int | None,
        eos_ids: Iterable[int] = (),
        bos_id: int | None = None,
        start_id: int | None = None,
        num_rows: int | None = None,
        rules: TextRules = GPT2_RULES,
    ):
        """`tokens` holds the bytes of every id, `merge_order` the ids that bytes merge into, first merge first.

        `special` tokens are recognised in text only if the caller allows it, `added` ones always. `eos_id` ends a
        document, and a text that is generated ends there or at any of `eos_ids`; None if no token does. `bos_id` starts
        every prompt; None if the checkpoint starts them with nothing. `start_id`, or else `eos_id`, is the whole prompt
        for an empty text. The model has no row for ids from `num_rows` on. Bytes that no id stands for follow `rules`.
        """
        self.special_tokens = dict(special)
        self.eos_id = eos_id
        self.eos_ids = frozenset(eos_ids) | ({eos_id} if eos_id is not None else set())
        self.bos_id = bos_id
        self.start_id = eos_id if start_id is None else start_id
        self.max_id = max(*tokens, *special.values(), *added.values())
        self.max_token_bytes = max(map(len, tokens.values()))
        self.rules = rules
        self._num_rows = self.max_id + 1 if num_rows is None else num_rows
        self._tokens = dict(tokens)
        self._special_ids = frozenset(special.values())
        # OPT numbers its tokens by frequency, so the first merge does not have the lowest id.
        self._id_of_rank = None if list(merge_order) == list(range(len(merge_order))) else list(merge_order)
        ranks = {tokens[token_id]: rank for rank, token_id in enumerate(merge_order)}
        self._bpe = tiktoken.Encoding("banded", pat_str=rules.pattern, mergeable_ranks=ranks, special_tokens={})
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        self._missing = re.compile(b"([%b]+)" % re.escape(bytes(missing))) if missing else None
        self._added = dict(added)
        self._added_in_text = any_of(added)
        self._any_in_text = any_of({**added, **special})
        self._longest_name = max(map(len, (*added, *special)), default=0)
        self._words = regex.compile(rules.pattern)
        self._names = name_tokens(self._tokens, special)

    @property
    def ending(self) -> list[int]:
        """What ends a document that a model learns from: eos, or nothing."""
        return [] if self.eos_id is None else [self.eos_id]

    def __contains__(self, token_id: int) -> bool:
        return token_id in self._tokens

    def has_row(self, token_id: int) -> bool:
        return token_id < self._num_rows

    def num_known_bytes(self, text: str) -> int:
        """Bytes of a text, without those that no token stands for."""
        if text.isascii() and not self._missing:
            return len(text)
        data = text.encode(errors="replace")
        return len(self._missing.sub(b"", data)) if self._missing else len(data)

    def least_tokens(self, num_known_bytes: int) -> int:
        """A lower bound on the tokens of a text of so many bytes, known without encoding it."""
        return -(-num_known_bytes // (self.max_token_bytes * (NFC_SHRINKS if self.rules.nfc else 1)))

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of `text`, without bos. The name of a special token stays text unless `allow_special`.

        A lone surrogate, which is no character, is encoded as U+FFFD. Raises LongWordError.

        >>> r50k_base().encode("<|endoftext|>", allow_special=True)
        [50256]
        """
        return self.encode_parts([(text, allow_special)])

    def encode_parts(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        """Token ids of one text, given as `PromptPart`s in order.

        Only special tokens inside parts that allow them cut the text. All other text merges across the borders of parts.

        >>> r50k_base().encode_parts([("Once up", False), ("on a time", False), ("<|endoftext|>", True)])
        [7454, 2402, 257, 640, 50256]
        """
        return list(chain.from_iterable(self.encode_slowly(parts)))

    def encode_slowly(self, parts: Iterable[tuple[str, bool]]) -> Iterator[list[int]]:
        """What `encode_parts` gives, piece by piece, so that a long text takes little memory and lets other threads run."""
        plain: list[str] = []
        for text, allow_special in parts:
            for piece in split_slowly(self._any_in_text, self._longest_name, text) if allow_special else [text]:
                if allow_special and piece in self.special_tokens:
                    yield from self._encode_unsplit("".join(plain))
                    yield [self.special_tokens[piece]]
                    plain = []
                else:
                    plain.append(piece)
        yield from self._encode_unsplit("".join(plain))

    def without_bos(self) -> "Tokenizer":
        """The same tokens, for prompts that start with nothing."""
        other = copy.copy(self)
        other.bos_id = None
        return other

    def encode_prompt(self, text: str) -> list[int]:
        """The prompt that the model gets for `text`. Raises TokenizerError as `started` does."""
        return self.started(self.encode(text))

    def started(self, tokens: list[int]) -> list[int]:
        """The prompt that the model gets for `tokens`: after bos if the checkpoint has one. Never empty.

        Without both it is `start_id`. Raises TokenizerError if there is none, or as `checked` does.
        """
        if self.bos_id is not None:
            return [self.bos_id, *self.checked(tokens)]
        if tokens:
            return self.checked(tokens)
        if self.start_id is None:
            raise TokenizerError("an empty prompt needs a token that starts a document, and the model has none")
        return [self.start_id]

    def checked(self, tokens: list[int]) -> list[int]:
        """`tokens`. Raises TokenizerError naming the first for which the model has no row."""
        if self.max_id >= self._num_rows:
            for token in tokens:
                if not self.has_row(token):
                    name = self.token_name(token)
                    raise TokenizerError(f"{name!r} is token {token}, but the model's ids end at {self._num_rows - 1}")
        return tokens

    def _encode_unsplit(self, text: str) -> Iterator[list[int]]:
        """Token ids of text in which nothing is special."""
        for piece in split_slowly(self._added_in_text, self._longest_name, text) if self._added else [text]:
            if piece in self._added:
                yield [self._added[piece]]
            else:
                # Composing makes other words, so it comes first.
                plain = unicodedata.normalize("NFC", piece) if self.rules.nfc else piece
                yield from map(self._encode_plain, cut_between_words(plain, self._words))

    def _encode_plain(self, text: str) -> list[int]:
        if self._missing and self._missing.search(text.encode(errors="surrogatepass")):
            # As tiktoken does it: a lone surrogate becomes U+FFFD.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            words = regex.findall(self.rules.pattern, text)
            return [token for word in words for token in self._encode_lossy(self._missing, word.encode())]
        ranks = []
        for piece in cut_long_space(text, before_numbers=self.rules.pattern == GPT2_PATTERN):
            ranks += self._bpe.encode_ordinary(piece)
        return self._ids_of(ranks)

    def _encode_lossy(self, missing: re.Pattern[bytes], word: bytes) -> list[int]:
        """A word in which bytes may lack a token. What stands around a byte that is left out merges."""
        if self.rules.unknown_id is None:
            known = missing.sub(b"", word)
            return self._ids_of(self._bpe._encode_single_piece(known)) if known else []
        tokens: list[int] = []
        for place, part in enumerate(missing.split(word)):
            if place % 2:
                tokens += [self.rules.unknown_id] * (1 if self.rules.fuse_unknown else len(part))
            elif part:
                tokens += self._ids_of(self._bpe._encode_single_piece(part))
        return tokens

    def _ids_of(self, ranks: list[int]) -> list[int]:
        return ranks if self._id_of_rank is None else [self._id_of_rank[rank] for rank in ranks]

    def fingerprint(self) -> str:
        """A hash in hexadecimal, equal for tokenizers that encode every text alike."""
        merges = self._id_of_rank or self._bpe.n_vocab
        special, added = sorted(self.special_tokens.items()), sorted(self._added.items())
        told = (sorted(self._tokens.items()), merges, special, added, self.bos_id, self.eos_id, self.rules)
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token.

        KeyError for an unused id: OPT's model has 50272 rows, its vocabulary 50265 tokens.
        """
        return self._tokens[token_id]

    def text_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text that people read: its bytes, or nothing for special tokens and unused ids."""
        return b"" if token_id in self._special_ids else self._tokens.get(token_id, b"")

    def token_name(self, token_id: int) -> str:
        """The name of a token in lists of tokens. No two ids have the same name.

        It is the token's text, or its bytes if they are not whole characters, or `token_id:` with the number if neither
        exists or another token has that name. Special tokens and lower ids choose first.

        >>> [r50k_base().token_name(token) for token in (7454, 447, 50256, 50257)]
        ['Once', 'bytes:\\xe2\\x80', '<|endoftext|>', 'token_id:50257']
        """
        return self._names.get(token_id, f"{NUMBERED}{token_id}")

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of whole `tokens`. Bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode(errors="replace")


def name_tokens(tokens: Mapping[int, bytes], special: Mapping[str, int]) -> dict[int, str]:
    """The names that `Tokenizer.token_name` gives, without the numbered ones."""
    wanted = {token_id: name for name, token_id in special.items()}
    wanted |= {token_id: spelled(tokens[token_id]) for token_id in sorted(tokens.keys() - wanted.keys())}
    owners: dict[str, int] = {}
    for token_id, name in wanted.items():
        if not name.startswith(NUMBERED):
            owners.setdefault(name, token_id)
    return {token_id: name for name, token_id in owners.items()}


def spelled(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern whose `split` cuts text at the leftmost longest of `words` and keeps them."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def split_slowly(pattern: re.Pattern[str], longest: int, text: str) -> Iterator[str]:
    """What `pattern.split` gives, without the empty strings. No match has more than `longest` characters.

    It searches PIECE characters at a time, so that other threads get to run.
    """
    start = searched = 0
    while searched < len(text):
        match = pattern.search(text, searched, searched + PIECE + longest)
        if match is None or match.start() >= searched + PIECE:
            searched += PIECE
            continue
        if match.start() > start:
            yield text[start : match.start()]
        yield match[0]
        start = searched = match.end()
    if start < len(text):
        yield text[start:]


def cut_between_words(text: str, words: "regex.Pattern[str]") -> Iterator[str]:
    """`text` in pieces of about PIECE characters. Their tokens are those of the whole: no word reaches across a cut.

    A word is what a match of `words` holds. None holds white space after other characters, so that a cut ahead of a space is
    right whatever surrounds it. Where there is no space, the words themselves are searched.
    Raises LongWordError.
    """
    start = 0
    while len(text) - start > PIECE:
        found = SPACE.search(text, start + PIECE // 2, start + PIECE)
        if found:
            end = found.start()
        else:
            ends = (word.end() for word in words.finditer(text, start))
            end = next((end for end in ends if end - start >= PIECE // 2 and not text[end - 1].isspace()), len(text))
        if end - start > MAX_WORD // 4:
            size = len(text[start:end].encode("utf-8", "surrogatepass"))
            if size > MAX_WORD:
                raise LongWordError(f"holds a word of {size} bytes, at most {MAX_WORD} can be tokenized")
        yield text[start:end]
        start = end
    yield text[start:]


def cut_long_space(text: str, *, before_numbers: bool = True) -> Iterator[str]:
    """`text` cut where GPT2_PATTERN cuts long white space anyway: ahead of its last character, which joins the next word.

    The other patterns don't cut white space before numbers. tiktoken's regex engine backtracks over the run to get there,
    and panics if the run is 999,999 long.
    """
    start = 0
    for run in LONG_SPACE.finditer(text):
        if not before_numbers and unicodedata.category(text[run.end()]).startswith("N"):
            continue
        yield text[start : run.end() - 1]
        start = run.end() - 1
    yield text[start:]


def r50k_base(eos_ids: Sequence[int] = ()) -> Tokenizer:
    """GPT-2's and GPT-3's tokenizer from the vendored ranks. <|endoftext|> ends a text unless a model has other ids.

    Raises TokenizerError if the file is not the published one.
    """
    data = R50K_FILE.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != R50K_SHA256:
        raise TokenizerError(f"{R50K_FILE} has sha256 {digest}, expected {R50K_SHA256}: the file is damaged")
    lines = (line.split() for line in data.splitlines())
    tokens = {int(rank): base64.b64decode(token) for token, rank in lines}
    end = len(tokens)
    return Tokenizer(
        tokens | {end: END_OF_TEXT.encode()},
        range(end),
        special={END_OF_TEXT: end},
        added={},
        eos_id=eos_ids[0] if eos_ids else end,
        eos_ids=eos_ids,
    )
