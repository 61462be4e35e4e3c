"""Read and check the tokenizer of a checkpoint directory, and turn it into tiktoken's ranks."""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from model.checkpoint.files import CONFIG_FILE, VOCABULARY_BYTES, Json, few, is_there, optional_json, read_json, read_text
from model.checkpoint.tokenizer import (
    DIGIT_PATTERN,
    END_OF_TEXT,
    GPT2_PATTERN,
    GPT2_RULES,
    NUMBER_PATTERN,
    R50K_VOCAB_SIZE,
    TextRules,
    Tokenizer,
    TokenizerError,
    r50k_base,
)

PIPELINE_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_MAP_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
GENERATION_FILE = "generation_config.json"
# What only a directory with a vocabulary holds, of whatever kind.
VOCABULARIES = (PIPELINE_FILE, "vocab.*", "merges.*", "encoder.json", "*.model", "*.spm", "*.tiktoken", "*.bpe", "*.codes")
VOCABULARY_FILES = (
    PIPELINE_FILE,
    SETTINGS_FILE,
    SPECIAL_MAP_FILE,
    ADDED_FILE,
    VOCAB_FILE,
    MERGES_FILE,
    GENERATION_FILE,
)

# What it may take to check a vocabulary: its pieces' lengths, each squared, added up. r50k_base's add up to 2 million.
MAX_WORK = 2**24
# No vocabulary has as many tokens that are found ahead of merging, nor as many ids.
MAX_ADDED = 2**13
MAX_ID = 2**24

# GPT-2's pattern as its authors and as tiktoken write it, where a Split cuts the words.
SPLITS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    GPT2_PATTERN,
)
# No UTF-8 text holds these bytes.
NEVER_IN_TEXT = {0xC0, 0xC1, *range(0xF5, 0x100)}

log = logging.getLogger("banded.checkpoint")

# Of r50k_base's pieces and merges, as GPT-2's files have them. Checking 50,000 merges takes half a second.
R50K_FILES_SHA256 = "ebb9658fd14b781754d0da75bfde3cbd29d1485ba35914e28fda43437e115289"

# Classes that add nothing to GPT-2's way of encoding; the last two mean "as tokenizer.json says".
TOKENIZER_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
R50K_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")  # without a tokenizer.json
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ROLE_LISTS = ("additional_special_tokens", "extra_special_tokens")


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory. It gives the ids that transformers gives.

    The vocabulary is tokenizer.json or, without one, vocab.json with merges.txt. A directory with neither gets r50k_base
    if the model is our own, or a GPT-2 or GPT-Neo of 50257 tokens, whose vocabulary r50k_base is. That is an assumption: it
    is logged, and refused if anything in the directory tells of another tokenizer.

    Raises CheckpointError naming what can't be read, or what encodes text in another way than GPT-2's: a normalizer other
    than NFC, a pre-tokenizer other than GPT-2's with or without Digits, a prefix space.

    >>> load_tokenizer(Path("opt-125m")).encode("Hello")
    [31414]
    """
    extras = (
        optional_json(directory / name) or {} for name in (SETTINGS_FILE, SPECIAL_MAP_FILE, ADDED_FILE, GENERATION_FILE)
    )
    pipeline = optional_json(directory / PIPELINE_FILE, VOCABULARY_BYTES)
    files = CheckpointFiles(read_json(directory / CONFIG_FILE), pipeline, *extras)
    try:
        vocabulary = read_vocabulary(directory, files)
        return build_tokenizer(files, vocabulary) if vocabulary else embedded_tokenizer(directory, files)
    except TokenizerError as error:
        raise TokenizerError(f"{directory}: {error}") from None


class CheckpointFiles(NamedTuple):
    """The JSON files that describe a checkpoint's tokenizer. Those that only add to others are empty when missing."""

    config: Json
    pipeline: Json | None
    settings: Json
    special_map: Json
    added: Json
    generation: Json


class Vocabulary(NamedTuple):
    """`ids` of all pieces, written in the byte alphabet. `merge_order`: ids of the bytes, then of what each merge makes."""

    ids: Mapping[str, int]
    merge_order: Sequence[int]
    rules: TextRules = GPT2_RULES


def read_vocabulary(directory: Path, files: CheckpointFiles) -> Vocabulary | None:
    """None when the directory has no vocabulary at all."""
    if files.pipeline is not None:
        return pipeline_vocabulary(files.pipeline)
    if not any(is_there(directory / name) for name in (VOCAB_FILE, MERGES_FILE)):
        return None
    ids = read_json(directory / VOCAB_FILE, VOCABULARY_BYTES)
    merges = read_text(directory / MERGES_FILE, VOCABULARY_BYTES)
    if hashlib.sha256(repr((list(ids.items()), merges)).encode()).hexdigest() == R50K_FILES_SHA256:
        return Vocabulary(ids, range(R50K_VOCAB_SIZE - 1))
    lines = merges.removesuffix("\n").split("\n")
    first = 2 if lines[0].startswith("#version") else 1
    return checked_vocabulary(ids, VOCAB_FILE, lines[first - 1 :], f"{MERGES_FILE} line", first)


def pipeline_vocabulary(pipeline: Json) -> Vocabulary:
    """The vocabulary of tokenizer.json, which must encode text as GPT-2 does."""
    model = pipeline.get("model")
    # Old files lack the field "type".
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise TokenizerError(f"{PIPELINE_FILE}: model {type_of(model)} is not supported, only BPE")
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise TokenizerError(f"{PIPELINE_FILE}: the model lacks vocab or merges")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise TokenizerError(f"{PIPELINE_FILE}: model.{option} {model[option]!r} is not supported")
    vocabulary = checked_vocabulary(model["vocab"], PIPELINE_FILE, model["merges"], f"{PIPELINE_FILE} merge", 1)
    normalizers = list(map(type_of, steps_of(pipeline.get("normalizer"), "normalizers")))
    if set(normalizers) - {"NFC"}:
        raise TokenizerError(f"{PIPELINE_FILE}: normalizer {', '.join(normalizers)} is not supported, only NFC")
    rules = TextRules(word_pattern(pipeline.get("pre_tokenizer")), bool(normalizers), *unknown_bytes(model))
    added = [
        token for token in listed(pipeline.get("added_tokens"), f"{PIPELINE_FILE}: added_tokens") if isinstance(token, dict)
    ]
    if model.get("ignore_merges"):  # changes nothing where merges make every piece
        made = {*vocabulary.merge_order, *(token.get("id") for token in added)}
        loose = [piece for piece, token_id in vocabulary.ids.items() if token_id not in made]
        if loose:
            why = f"no merge makes {loose[0]!r}"
            raise TokenizerError(f"{PIPELINE_FILE}: model.ignore_merges True is not supported where {why}")
    late = [token.get("content") for token in added if token.get("normalized")]
    if rules.nfc and late:
        raise TokenizerError(f"{PIPELINE_FILE}: normalizer NFC ahead of added token {late[0]!r} is not supported")
    return vocabulary._replace(rules=rules)


def steps_of(part: Any, members: str) -> list[Any]:
    """The steps of a part of tokenizer.json, with those of each Sequence, which lie in its field `members`, in its place."""
    if type_of(part) == "Sequence":
        inner_steps = listed(part.get(members), f"{PIPELINE_FILE}: {members}")
        return [step for inner in inner_steps for step in steps_of(inner, members)]
    return [] if part is None else [part]


def word_pattern(pre_tokenizer: Any) -> str:
    """The pattern that cuts words as a pre-tokenizer does: GPT-2's, perhaps with Digits ahead of it."""
    steps = steps_of(pre_tokenizer, "pretokenizers")
    types = ", ".join(map(type_of, steps)) or type_of(pre_tokenizer)
    pattern = GPT2_PATTERN
    match steps:
        case [{"type": "Digits", "individual_digits": bool(individual)}, *steps]:
            pattern = DIGIT_PATTERN if individual else NUMBER_PATTERN
    match steps:
        case [{"type": "ByteLevel"} as last] if last.get("use_regex", True):
            pass
        case [{"type": "Split", "pattern": {"Regex": cut}} as split, {"type": "ByteLevel", "use_regex": False} as last] if (
            cut in SPLITS and (split.get("behavior"), split.get("invert")) in (("Isolated", False), ("Removed", True))
        ):
            pass
        case _:
            raise TokenizerError(f"{PIPELINE_FILE}: pre_tokenizer {types} does not cut words as GPT-2 does")
    if last.get("add_prefix_space"):
        raise TokenizerError(f"{PIPELINE_FILE}: pre_tokenizer.add_prefix_space is not supported")
    return pattern


def unknown_bytes(model: Json) -> tuple[int | None, bool]:
    """What stands for a byte without a token, and whether it does so for a run of them: see TextRules."""
    if BYTE_OF.keys() <= model["vocab"].keys():
        return None, False
    if model.get("byte_fallback"):
        raise TokenizerError(f"{PIPELINE_FILE}: model.byte_fallback is not supported where a byte has no token")
    unknown = model.get("unk_token")
    if unknown is None:
        return None, False
    if unknown not in model["vocab"]:
        raise TokenizerError(f"{PIPELINE_FILE}: model.unk_token {unknown!r} is not in the vocabulary")
    return model["vocab"][unknown], bool(model.get("fuse_unk"))


def listed(value: Any, place: str) -> list[Any]:
    """A list; null is an empty one."""
    if value is not None and not isinstance(value, list):
        raise TokenizerError(f"{place} must be a list, got {value!r:.80}")
    return value or []


def type_of(part: Any) -> str:
    """The type that a part of tokenizer.json declares."""
    return str(part.get("type")) if isinstance(part, dict) else str(part)


def checked_vocabulary(ids: Json, ids_from: str, merges: Iterable[Any], merges_from: str, first: int) -> Vocabulary:
    """The vocabulary of `ids` and `merges`. `first` is the number of the first merge.

    Raises TokenizerError naming the wrong id or merge and its place, such as "merges.txt line 2".

    Hugging Face merges the two pieces that a line names; tiktoken merges any two that spell the token. They agree if
    the earlier lines split the token into just these two pieces, as in every trained vocabulary. Any other line never
    fires, and is left out.
    """
    for piece, token_id in ids.items():
        check_id(piece, token_id, ids_from)
    for token_id, count in Counter(ids.values()).most_common(1):
        if count > 1:
            pieces = [piece for piece, other in ids.items() if other == token_id]
            raise TokenizerError(f"{ids_from}: {pieces} share the id {token_id}")
    alphabet = {character: byte for character, byte in BYTE_OF.items() if character in ids}
    if not alphabet:
        raise TokenizerError(f"{ids_from}: no token for any byte")
    order = [ids[character] for character in alphabet]
    ranks = {bytes([byte]): rank for rank, byte in enumerate(alphabet.values())}
    made, seen, work = set(alphabet), set(), 0
    for place, entry in enumerate(merges, first):
        left, right = split_merge(entry, f"{merges_from} {place}")
        problem = None
        if left not in made or right not in made:
            unknown = right if left in made else left
            problem = f"{unknown!r} is neither a byte nor made by an earlier merge"
        elif left + right not in ids:
            problem = f"{left + right!r} is not in {ids_from}"
        elif (left, right) in seen:
            problem = f"{left!r} and {right!r} are merged before"
        if problem:
            raise TokenizerError(f"{merges_from} {place}: {problem}")
        work += len(left + right) ** 2
        if work > MAX_WORK:
            raise TokenizerError(f"{merges_from} {place}: the pieces up to here are longer than any vocabulary's")
        made.add(left + right)
        seen.add((left, right))
        parts = [piece_bytes(left), piece_bytes(right)]
        if merge(b"".join(parts), ranks) == parts:
            ranks[b"".join(parts)] = len(order)
            order.append(ids[left + right])
    return Vocabulary(ids, order)


def split_merge(merge: Any, place: str) -> tuple[str, str]:
    pieces = merge.removesuffix("\r").split(" ") if isinstance(merge, str) else merge
    match pieces:
        case [str(left), str(right)] if left and right:
            return left, right
    raise TokenizerError(f"{place}: expected two pieces, got {merge!r:.80}")


def check_id(token: str, token_id: Any, source: str) -> int:
    if type(token_id) is not int or not 0 <= token_id <= MAX_ID:
        raise TokenizerError(
            f"{source}: the id of {token!r:.80} is {token_id!r:.80}, expected an integer from 0 to {MAX_ID}"
        )
    return token_id


def embedded_tokenizer(directory: Path, files: CheckpointFiles) -> Tokenizer:
    """r50k_base for a directory without a vocabulary, if no other fits the model. config.json says which token is eos."""
    model_type, vocab_size = files.config.get("model_type"), files.config.get("vocab_size")
    if model_type == "banded":
        if not isinstance(vocab_size, int) or vocab_size < R50K_VOCAB_SIZE:
            raise TokenizerError(f"{CONFIG_FILE}: vocab_size is {vocab_size}, r50k_base needs {R50K_VOCAB_SIZE}")
    elif model_type not in ("gpt2", "gpt_neo") or vocab_size != R50K_VOCAB_SIZE:
        raise TokenizerError(f"there is neither {PIPELINE_FILE} nor {VOCAB_FILE} with {MERGES_FILE}")
    eos_ids = numbered("eos", files)
    for name, token_ids in (("eos", eos_ids), ("bos", numbered("bos", files))):
        for token_id in token_ids:
            if not 0 <= token_id < R50K_VOCAB_SIZE:
                raise TokenizerError(f"{CONFIG_FILE}: {name}_token_id {token_id} is not in the vocabulary")
    if found := next(other_tokenizer(directory, files), None):
        raise TokenizerError(
            f"{found} tells of another tokenizer than r50k_base, but there is neither {PIPELINE_FILE} nor {VOCAB_FILE} with "
            f"{MERGES_FILE}: copy the tokenizer's files from where the model was trained"
        )
    if model_type != "banded":  # our own models lack a vocabulary only if it is r50k_base
        log.warning("%s holds no vocabulary: GPT-2's, r50k_base, is assumed", directory)
    return r50k_base(eos_ids)


def other_tokenizer(directory: Path, files: CheckpointFiles) -> Iterator[str]:
    """What in a directory without a readable vocabulary tells of another tokenizer than r50k_base."""
    for path in sorted(path for pattern in VOCABULARIES for path in directory.glob(pattern)):
        yield path.name
    for source, settings in ((CONFIG_FILE, files.config), (SETTINGS_FILE, files.settings)):
        if settings.get("tokenizer_class") not in R50K_CLASSES:
            yield f"{source}: tokenizer_class {settings['tokenizer_class']!r}"
    for option in ("add_prefix_space", "add_bos_token", "add_eos_token"):
        if files.settings.get(option):
            yield f"{SETTINGS_FILE}: {option}"
    declared = (token_text(token, source) for source, _, token in declared_tokens(files))
    for name in (*special_roles(files.settings, files.special_map).values(), *declared):
        if name != END_OF_TEXT:
            yield f"the special token {name!r}"


def build_tokenizer(files: CheckpointFiles, vocabulary: Vocabulary) -> Tokenizer:
    refuse_other_settings(files)
    roles = special_roles(files.settings, files.special_map)
    added, flagged = added_tokens(files, vocabulary)
    ids = {**vocabulary.ids, **added}
    num_rows = rows_of(files.config, ids)
    check_rows(vocabulary, ids, num_rows)
    bos_ids, eos_ids = (ids_in_role(role, roles, files, ids) for role in ("bos", "eos"))
    if not eos_ids:
        log.warning("no token ends a text: %s has no eos_token, %s no eos_token_id", SETTINGS_FILE, CONFIG_FILE)
    # A role's word may have no id, such as a pad token that the model never learnt: it is no token.
    names = flagged.union(roles.values())
    # Of tokens that are known by their numbers alone, those that text merges into are text, such as a line's end.
    ends = {*bos_ids[:1], *eos_ids} - set(vocabulary.merge_order)
    special = {name: token_id for name, token_id in ids.items() if name in names or token_id in ends}
    tokens = {token_id: piece_bytes(piece) for piece, token_id in vocabulary.ids.items()}
    tell_unknown(tokens.values(), vocabulary.rules)
    bos_id = start_of_prompt(files, next(iter(bos_ids), None), ids)
    if bos_id is not None and bos_id >= num_rows:
        raise TokenizerError(f"token {bos_id} starts every prompt, but {CONFIG_FILE} says vocab_size {num_rows}")
    return Tokenizer(
        tokens | {token_id: name.encode() for name, token_id in {**added, **special}.items()},
        vocabulary.merge_order,
        special=special,
        added={name: token_id for name, token_id in added.items() if name not in special},
        eos_id=next(iter(eos_ids), None),
        eos_ids=eos_ids,
        bos_id=bos_id,
        start_id=next(iter(bos_ids), None),
        num_rows=num_rows,
        rules=vocabulary.rules,
    )


def check_rows(vocabulary: Vocabulary, ids: Mapping[str, int], num_rows: int) -> None:
    """TokenizerError if text can merge into ids for which the model has no row; added ones are told to the log."""
    beyond = {token_id: name for name, token_id in ids.items() if token_id >= num_rows}
    merged = sorted(beyond.keys() & set(vocabulary.merge_order))
    if merged:
        last = merged[-1]
        raise TokenizerError(f"token {beyond[last]!r} has id {last}, but {CONFIG_FILE} says vocab_size {num_rows}")
    if beyond:
        log.warning("the model has no row for %s: a prompt that holds one is refused", few(list(map(repr, beyond.values()))))


def tell_unknown(tokens: Iterable[bytes], rules: TextRules) -> None:
    """Log how many bytes of texts have no token."""
    missing = set(range(256)) - {token[0] for token in tokens if len(token) == 1} - NEVER_IN_TEXT
    if missing:
        fate = "text loses them" if rules.unknown_id is None else f"token {rules.unknown_id} stands for them"
        log.warning("%d bytes have no token, 0x%02x among them: %s", len(missing), min(missing), fate)


def refuse_other_settings(files: CheckpointFiles) -> None:
    settings = files.settings
    if settings.get("tokenizer_class") not in TOKENIZER_CLASSES:
        raise TokenizerError(f"{SETTINGS_FILE}: tokenizer_class {settings['tokenizer_class']!r} is not supported")
    if settings.get("add_prefix_space"):
        raise TokenizerError(f"{SETTINGS_FILE}: add_prefix_space is not supported")
    if settings.get("add_eos_token") and files.pipeline is None:
        raise TokenizerError(f"{SETTINGS_FILE}: add_eos_token is not supported")


def special_roles(settings: Json, special_map: Json) -> dict[str, str]:
    """Which token plays which role: {"eos_token": "</s>", "additional_special_tokens 0": "<user>"}."""
    sources = {SETTINGS_FILE: settings}
    # As in transformers: newer settings replace this older file.
    if "added_tokens_decoder" not in settings:
        sources[SPECIAL_MAP_FILE] = special_map
    roles: dict[str, str] = {}
    for source, named in sources.items():
        played = {role: named.get(role) for role in ROLES}
        for role_list in ROLE_LISTS:
            extra = named.get(role_list)
            values = extra.values() if isinstance(extra, dict) else listed(extra, f"{source}: {role_list}")
            played |= {f"{role_list} {n}": value for n, value in enumerate(values)}
        roles |= {role: token_text(token, source) for role, token in played.items() if token is not None}
    return roles


def added_tokens(files: CheckpointFiles, vocabulary: Vocabulary) -> tuple[dict[str, int], set[str]]:
    """Ids of the tokens that are found in text before it is merged, and the names of those flagged as special."""
    ids: dict[str, int] = {}
    flagged, work = set(), 0
    name_of = {token_id: piece for piece, token_id in vocabulary.ids.items()}
    for source, token_id, token in declared_tokens(files):
        name = token_text(token, source)
        token_id = check_id(name, token_id, source)
        known_id = ids.get(name, vocabulary.ids.get(name, token_id))
        if known_id != token_id:
            raise TokenizerError(f"{source}: {name!r} has id {token_id}, elsewhere {known_id}")
        if name_of.setdefault(token_id, name) != name:
            raise TokenizerError(f"{source}: {name!r} and {name_of[token_id]!r} share the id {token_id}")
        ids[name] = token_id
        work += len(name) ** 2
        if len(ids) > MAX_ADDED or work > MAX_WORK:
            raise TokenizerError(f"{source}: the added tokens are more, or longer, than any vocabulary's")
        if isinstance(token, dict) and token.get("special"):
            flagged.add(name)
    return ids, flagged


def declared_tokens(files: CheckpointFiles) -> Iterator[tuple[str, Any, Any]]:
    """(file, id, token) of every added token."""
    for token in listed((files.pipeline or {}).get("added_tokens"), f"{PIPELINE_FILE}: added_tokens"):
        yield PIPELINE_FILE, token.get("id") if isinstance(token, dict) else None, token
    decoder = files.settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{SETTINGS_FILE}: added_tokens_decoder must be an object, got {decoder!r:.80}")
    for key, token in decoder.items():
        yield SETTINGS_FILE, int(key) if key.isdecimal() else key, token
    for name, token_id in files.added.items():
        yield ADDED_FILE, token_id, name


def token_text(token: Any, source: str) -> str:
    """The text of a token, which is either a string or an object with options."""
    if isinstance(token, str):
        return token
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise TokenizerError(f"{source}: {token!r:.80} describes no token")
    for option in ("single_word", "lstrip", "rstrip"):
        if token.get(option):
            raise TokenizerError(f"{source}: {option} of token {token['content']!r} is not supported")
    return str(token["content"])


def ids_in_role(role: str, roles: Mapping[str, str], files: CheckpointFiles, ids: Mapping[str, int]) -> list[int]:
    """The ids that are bos or eos: by the tokenizer's name, then by number. The model may generate any of them.

    Published configurations carry numbers of the vocabulary that they were copied from. One without a row in the model's
    embedding is never sampled, so it is left out, with a line in the log.
    """
    name = roles.get(f"{role}_token")
    if name is not None and name not in ids:
        raise TokenizerError(f"{role}_token {name!r} is not in the vocabulary")
    found = dict.fromkeys([*([] if name is None else [ids[name]]), *numbered(role, files)])
    num_rows = rows_of(files.config, ids)
    for token_id in found:
        if not 0 <= token_id < num_rows:
            log.warning("%s_token_id %d is left out: the model's ids end at %d", role, token_id, num_rows - 1)
    return [token_id for token_id in found if 0 <= token_id < num_rows]


def numbered(role: str, files: CheckpointFiles) -> list[int]:
    """The ids that config.json and generation_config.json give to a role: a number, a list of them, or none."""
    found: list[int] = []
    for source, settings in ((CONFIG_FILE, files.config), (GENERATION_FILE, files.generation)):
        value = settings.get(f"{role}_token_id")
        listed = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(token_id) is int for token_id in listed):
            raise TokenizerError(f"{source}: {role}_token_id is {value!r:.80}, expected a whole number or a list of them")
        found += listed
    return found


def rows_of(config: Json, ids: Mapping[str, int]) -> int:
    """How many ids the model has. Without a number in config.json all of the vocabulary counts."""
    vocab_size = config.get("vocab_size")
    return vocab_size if isinstance(vocab_size, int) else max(ids.values()) + 1


def start_of_prompt(files: CheckpointFiles, bos_id: int | None, ids: Mapping[str, int]) -> int | None:
    """The id ahead of every prompt. As in transformers, add_bos_token counts only without a tokenizer.json.

    The post-processor of a tokenizer.json may put one token ahead of a text and add nothing else.
    """
    if files.pipeline is None:
        if files.settings.get("add_bos_token") and bos_id is None:
            raise TokenizerError(f"{SETTINGS_FILE}: add_bos_token without a bos_token")
        return bos_id if files.settings.get("add_bos_token") else None
    steps = steps_of(files.pipeline.get("post_processor"), "processors")
    # ByteLevel changes offsets only.
    match [step for step in steps if type_of(step) != "ByteLevel"]:
        case [] | [{"type": "TemplateProcessing", "single": [{"Sequence": _}]}]:
            return None
        case [{"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(name)}}, {"Sequence": _}]}]:
            if name not in ids:
                raise TokenizerError(f"{PIPELINE_FILE}: the post_processor's {name!r} is not in the vocabulary")
            return ids[name]
    types = ", ".join(map(type_of, steps))
    raise TokenizerError(f"{PIPELINE_FILE}: post_processor {types} does more than start a text with bos")


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in vocab.json, as GPT-2's authors chose it."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


BYTE_OF = byte_alphabet()


def piece_bytes(piece: str) -> bytes:
    """The bytes of a vocabulary entry. An entry outside the byte alphabet was added by hand and stands for itself."""
    try:
        return bytes([BYTE_OF[character] for character in piece])
    except KeyError:
        return piece.encode()


def merge(word: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """`word` in pieces that merge no further: byte-pair encoding by its definition."""
    pieces = [word[place : place + 1] for place in range(len(word))]
    while len(pieces) > 1:
        found = [ranks.get(left + right, math.inf) for left, right in pairwise(pieces)]
        place = found.index(min(found))
        if found[place] == math.inf:
            break
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return pieces
