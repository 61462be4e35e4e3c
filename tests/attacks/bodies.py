"""The requests of `python -m tests.attacks.event_loop`, each large in one way, by what they are made of."""

import json
import random
from collections.abc import Callable
from typing import NamedTuple

SIZE = 15_000_000  # bytes of a large body
TEXT = 4_190_000  # of the largest that a route of texts takes
MOST_MEMORY = 150 << 20  # bytes by which a request may have the server's resident memory grow
JSON_HEADERS = {"content-type": "application/json"}
FORM_HEADERS = {"content-type": "multipart/form-data; boundary=b"}

COMPLETIONS, CHAT, SCORE = "/v1/completions", "/v1/chat/completions", "/v1/score"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
JOBS, FILES = "/v1/fine_tuning/jobs", "/v1/files"
EXAMPLE = {"input": "a", "output": "b"}
EMPTY = {"input": "", "output": ""}
SPECIAL = "<|endoftext|>"
PART = '{"type":"text","text":"a"}'
PAIR = '{"prompt": "the king said", "completion": " that"}\n'

Content = Callable[[], object]


class Attack(NamedTuple):
    """A request, or so many `times` at once. `runs`: it computes a full context or more, and others' completions, which wait
    for its steps, are not judged."""

    name: str
    path: str
    content: Content = bytes  # made when it is sent: together they would take gigabytes
    headers: dict[str, str] = JSON_HEADERS
    method: str = "POST"
    runs: bool = False
    times: int = 1
    most_memory: int = MOST_MEMORY

    def body(self) -> bytes:
        """Bytes as they are, anything else as JSON."""
        content = self.content()
        return content if isinstance(content, bytes) else json.dumps(content).encode()


# The kinds of content.


def words(size: int) -> str:
    return ("the king said that " * (size // 19 + 1))[:size]


def letters(size: int) -> str:
    return "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=size))


def unescaped(**fields: object) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


def repeated(before: str, item: str, after: str, *, count: int | None = None, separator: str = ",") -> Content:
    """Bytes: TEXT of them, or `count` items, between the two texts."""

    def content() -> bytes:
        number = count or TEXT // (len(item.encode()) + len(separator))
        return (before + (item + separator) * (number - 1) + item + after).encode()

    return content


def numbered(before: str, item: str, after: str, count: int) -> Content:
    """Items that differ in a number, which stands for the # in each."""
    return lambda: (before + ",".join(item.replace("#", str(i)) for i in range(count)) + after).encode()


def multipart(*parts: tuple[str, bytes], repeat: int = 1) -> Content:
    """A form of the parts, each with the value of its content-disposition."""

    def content() -> bytes:
        each = b"".join(
            b"--b\r\ncontent-disposition: form-data; " + about.encode() + b"\r\n\r\n" + part + b"\r\n"
            for about, part in parts
        )
        return each * repeat + b"--b--\r\n"

    return content


# The kinds of requests.


def completion(name: str, fields: Callable[[], dict[str, object]], *, runs: bool = False) -> Attack:
    """A completion of one token, unless the fields say otherwise."""
    return Attack(name, COMPLETIONS, lambda: {"max_tokens": 1} | fields(), runs=runs)


def few_shot(name: str, fields: Callable[[], dict[str, object]], **others: object) -> Attack:
    return completion(name, lambda: {"prompt": "x"} | others | {"few_shot": fields()})


def chat(name: str, content: Callable[[], str], **fields: object) -> Attack:
    return Attack(name, CHAT, lambda: fields | {"messages": [{"role": "user", "content": content()}]})


def form(name: str, content: Content, charset: str = "") -> Attack:
    headers = {"content-type": f"{FORM_HEADERS['content-type']}; charset={charset}"} if charset else FORM_HEADERS
    return Attack(name, FILES, content, headers)


def upload(name: str, lines: Callable[[], bytes]) -> Attack:
    return form(name, lambda: multipart(('name="purpose"', b"fine-tune"), ('name="file"; filename="x.jsonl"', lines()))())


# The table of the design.
DESIGN = [
    few_shot("few_shot, separator 15 MB, n 6", lambda: {"separator": "x" * SIZE}, n=6),
    few_shot("few_shot, separator 1 MB, n 32", lambda: {"separator": " " * 1_000_000}, n=32),
    form(
        "form, 4 fields 1 MB, punycode",
        lambda: multipart(*((f'name="{"n" * 10}{i}"', b"\xc3\xa4a" * 333_333) for i in range(4)))(),
        "punycode",
    ),
    form(
        "form, 4 names 1 MB, punycode",
        lambda: multipart(*((f'name="{letters(1_000_000)}{i}"', b"") for i in range(4)))(),
        "punycode",
    ),
    Attack(
        "chat, 300 k text parts",
        CHAT,
        repeated('{"max_tokens":1,"messages":[{"role":"user","content":[', PART, "]}]}", count=300_000),
    ),
    Attack("detokenize, 5 M ids", DETOKENIZE, repeated('{"tokens":[', "12", "]}", count=5_000_000)),
    few_shot("few_shot, 2048 examples, separator 4 MB", lambda: {"examples": [EMPTY] * 2048, "separator": "x" * 4_000_000}),
    Attack("tokenize, 15 MB of words, strings", TOKENIZE, lambda: {"prompt": words(SIZE), "return_token_strs": True}),
    Attack(
        "metadata, 15 MB nested",
        COMPLETIONS,
        repeated('{"max_tokens":1,"metadata":{"a":[', '{"a":[{}]}', "]}}", count=SIZE // 11),
    ),
    completion(
        "1000 choices, 4 stops of 1024",
        lambda: {"prompt": ["a"] * 10, "n": 100, "stop": [letters(1023) + str(i) for i in range(4)]},
        runs=True,
    ),
    Attack("prompt, 5 M ids", COMPLETIONS, repeated('{"prompt":[', "12", "]}", count=5_000_000)),
    Attack("tokenize, one word 15 MB", TOKENIZE, lambda: {"prompt": letters(SIZE)}),
]

# Texts, as large as their routes take them.
TEXTS = [
    Attack("tokenize, 4 MB of words, strings", TOKENIZE, lambda: {"prompt": words(TEXT), "return_token_strs": True}),
    Attack("tokenize, one word 4 MB", TOKENIZE, lambda: {"prompt": letters(TEXT)}),
    Attack("metadata, 4 MB nested", COMPLETIONS, repeated('{"max_tokens":1,"metadata":{"a":[', '{"a":[{}]}', "]}}")),
    Attack(
        "metadata, 130 k objects", COMPLETIONS, repeated('{"max_tokens":1,"metadata":{"a":[', '{"":0}', "]}}", count=131_000)
    ),
    Attack("tokenize, one word 1 MB", TOKENIZE, lambda: {"prompt": letters(1_000_000)}),
    Attack("tokenize, 4 MB of spaces", TOKENIZE, lambda: {"prompt": " " * TEXT}),
    Attack("tokenize, 4 MB and an emoji", TOKENIZE, lambda: unescaped(prompt=words(TEXT) + "\U0001f600")),
    Attack("tokenize, 4 MB of emoji", TOKENIZE, lambda: unescaped(prompt="\U0001f600" * (TEXT // 4))),
    Attack("tokenize, 4 MB of Chinese", TOKENIZE, lambda: unescaped(prompt="天地玄黃，宇宙洪荒。" * (TEXT // 30))),
    Attack("tokenize, 4 MB of escapes", TOKENIZE, repeated('{"prompt":"', "\\u0041", '"}', separator="")),
    Attack("tokenize, 4 MB of special tokens", TOKENIZE, repeated('{"prompt":"', SPECIAL, '"}', separator="")),
    Attack(
        "tokenize, 4 MB of quotes", TOKENIZE, repeated('{"return_token_strs":true,"prompt":"', '\\"', '"}', separator="")
    ),
    Attack(
        "tokenize, 4 MB of numbers", TOKENIZE, repeated('{"return_token_strs":true,"prompt":"', "12 ", '"}', separator="")
    ),
    Attack(
        "tokenize, 2048 messages of 2 kB", TOKENIZE, lambda: {"messages": [{"role": "user", "content": words(2000)}] * 2048}
    ),
    completion("prompt, 4 MB of words", lambda: {"prompt": words(TEXT)}),
    Attack("prompt, 4 MB and an emoji", COMPLETIONS, lambda: unescaped(prompt=letters(TEXT) + "\U0001f600")),
    completion("prompt, 250 kB of letters", lambda: {"prompt": letters(250_000)}),
    completion("prompt, 4 MB of words, truncated", lambda: {"prompt": words(TEXT), "truncate_prompt_tokens": 10}),
    completion("prompt, one word 4 MB, truncated", lambda: {"prompt": letters(TEXT), "truncate_prompt_tokens": 10}),
    completion("suffix of 4 MB", lambda: {"prompt": "x", "suffix": words(TEXT)}),
    completion("1024 prompts of 4 kB", lambda: {"prompt": [words(4_000)] * 1024}, runs=True),
    completion("1024 prompts of 100 words", lambda: {"prompt": [str(i) + words(400) for i in range(1024)]}, runs=True),
    few_shot(
        "few_shot, 2048 examples of 2 kB", lambda: {"examples": [{"input": words(2000), "output": "x"}] * 2048}
    )._replace(runs=True),
    few_shot(
        "few_shot, 2048 examples of 120 B", lambda: {"examples": [{"input": "a " * 30, "output": " " * 60}] * 2048}
    )._replace(runs=True),
    few_shot("few_shot, separator 250 kB, n 128", lambda: {"separator": " " * 250_000}, n=128),
    few_shot("few_shot, separator 200 kB, 100 examples", lambda: {"examples": [EXAMPLE] * 100, "separator": " " * 200_000}),
    few_shot("few_shot, instruction 4 MB", lambda: {"instruction": words(TEXT)}),
    chat("chat, one message 1 MB", lambda: words(1_000_000)),
    chat("chat, one message 900 kB, truncated", lambda: words(900_000), max_tokens=1, truncate_prompt_tokens=9),
    chat("chat, 900 kB of special tokens", lambda: SPECIAL * 70_000, max_tokens=1, truncate_prompt_tokens=9),
    Attack(
        "chat, 2048 messages of 400 B",
        CHAT,
        lambda: {"max_tokens": 1, "messages": [{"role": "user", "content": words(400)}] * 2048},
    ),
    Attack(
        "chat, 30 k text parts",
        CHAT,
        repeated('{"max_tokens":1,"messages":[{"role":"user","content":[', PART, "]}]}", count=30_000),
    ),
    Attack("chat, 10^5 messages", CHAT, repeated('{"messages":[', '{"role":"user"}', "]}", count=100_000)),
    Attack("chat, 20 k wrong messages", CHAT, repeated('{"messages":[', '{"role":1,"content":[1]}', "]}", count=20_000)),
    Attack("score, 1024 continuations of 4 kB", SCORE, lambda: {"prompt": "x", "continuations": [words(4_000)] * 1024}),
    Attack(
        "score, 1024 continuations of 100 ids",
        SCORE,
        lambda: {"prompt": "x", "continuations": [[11] * 100] * 1024},
        runs=True,
    ),
    Attack("score, continuation of 1.3 M ids", SCORE, repeated('{"continuations":[[', "12", "]]}", count=1_300_000)),
    Attack("score, 10^5 continuations", SCORE, repeated('{"continuations":[', '"a"', "]}", count=100_000)),
]

VALUES_OF_A_PROMPT = {
    "empty arrays": "[]",
    "objects": '{"":0}',
    "empty strings": '""',
    "nulls": "null",
    "floats": "1.5",
    "whole floats": "1.0",
    "numbers of 4000 digits": "7" * 4000,
    "strings": '"abc"',
}

# Numbers, arrays and objects.
VALUES = [
    completion(
        "prompt, 300 x 2047 ids",
        lambda: {"prompt": [[i * 40 + k % 40 for k in range(2047)] for i in range(1024)]},
        runs=True,
    ),
    Attack("prompt, 600 k ids above the vocabulary", COMPLETIONS, repeated('{"prompt":[', "912345", "]}", count=600_000)),
    *(
        Attack(f"prompt, 4 MB of {name}", COMPLETIONS, repeated('{"prompt":[', item, "]}"))
        for name, item in VALUES_OF_A_PROMPT.items()
    ),
    Attack("detokenize, 680 k ids", DETOKENIZE, repeated('{"tokens":[', "12345", "]}", count=680_000)),
    Attack("detokenize, 10^5 strings", DETOKENIZE, repeated('{"tokens":[', '"a"', "]}", count=100_000)),
    Attack("a number of 4 MB", COMPLETIONS, lambda: b'{"max_tokens":' + b"7" * TEXT + b"}"),
    Attack("nesting of 10^6", COMPLETIONS, lambda: b'{"metadata":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"),
    Attack("nesting of 900", COMPLETIONS, lambda: b'{"metadata":{"a":' + b"[" * 900 + b"]" * 900 + b"}}"),
    Attack("300 k unknown fields", COMPLETIONS, numbered("{", '"f#":0', "}", 300_000)),
    Attack("60 k unknown fields", COMPLETIONS, numbered("{", '"f#":0', "}", 60_000)),
    Attack(
        "60 k unknown fields of a job",
        JOBS,
        numbered('{"model":"demo","training_file":"x","hyperparameters":{', '"f#":0', "}}", 60_000),
    ),
]

# Fields that change what is sampled.
SAMPLING = [
    Attack("logit_bias, 130 k entries", COMPLETIONS, numbered('{"logit_bias":{', '"#":1', "}}", 130_000)),
    Attack(
        "logit_bias, 50 k entries, n 128",
        COMPLETIONS,
        numbered('{"max_tokens":1,"n":128,"logit_bias":{', '"#":1', "}}", 50_000),
        runs=True,
    ),
    Attack(
        "allowed_token_ids, 600 k",
        COMPLETIONS,
        repeated('{"max_tokens":1,"allowed_token_ids":[', "12345", "]}", count=600_000),
    ),
    Attack(
        "allowed_token_ids, 50 k, n 128",
        COMPLETIONS,
        numbered('{"max_tokens":1,"n":128,"allowed_token_ids":[', "#", "]}", 50_000),
        runs=True,
    ),
    Attack("stop_token_ids, 680 k", COMPLETIONS, repeated('{"stop_token_ids":[', "12", "]}", count=680_000)),
    completion(
        "stop_token_ids, 1024, 1000 prompts",
        lambda: {"prompt": ["a"] * 1000, "stop_token_ids": list(range(1024))},
        runs=True,
    ),
    Attack("stop, 10^5 strings", COMPLETIONS, numbered('{"stop":[', '"s#"', "]}", 100_000)),
    completion("bad_words, 256 of 1024 letters", lambda: {"bad_words": [letters(1024)] * 256}),
    Attack("bad_words, 10^5", COMPLETIONS, numbered('{"bad_words":[', '"s#"', "]}", 100_000)),
    completion("1000 choices of one long prompt", lambda: {"prompt": [[11] * 2000] * 8, "n": 125, "logprobs": 0}, runs=True),
    completion(
        "32 choices, echo and logprobs 20",
        lambda: {"prompt": [[11, 12] * 1000], "n": 32, "echo": True, "logprobs": 20},
        runs=True,
    ),
    completion(
        "64 prompts, echo and logprobs 20",
        lambda: {"prompt": [[i, 12] * 1000 for i in range(64)], "echo": True, "logprobs": 20, "max_tokens": 0},
        runs=True,
    ),
]


def named_4_mb(field: str) -> Attack:
    return completion(f"{field} of 4 MB", lambda: {field: letters(TEXT)})


# Names of things, and what is hardly JSON.
STRINGS = [
    *map(named_4_mb, ("model", "user", "prompt_cache_key", "modell")),
    Attack("training_file of 1 MB", JOBS, lambda: {"model": "demo", "training_file": letters(1_000_000)}),
    Attack(
        "UTF-16, 4 MB of values",
        COMPLETIONS,
        lambda: ('{"metadata":{"a":"∢","b":[' + "[]," * (TEXT // 6) + "0]}}").encode("utf-16"),
    ),
    Attack("one string that never ends", COMPLETIONS, lambda: b'{"a":"' + b'\\"' * (TEXT // 2) + b"\\"),
    Attack("4 MB of opening quotes", COMPLETIONS, lambda: b'{"a":"' + b'"' * TEXT),
    Attack("4 MB of opening brackets", COMPLETIONS, lambda: b"[" * TEXT),
    Attack("4 MB of white space", COMPLETIONS, lambda: b" " * TEXT + b"{}"),
]

CHARSETS = ["undefined", "punycode", "unicode_escape", "raw_unicode_escape", "idna", "utf-7", "utf-16", "rot13", "zlib"]

# Forms and files.
FORMS = [
    *(form(f"form, charset {name}", multipart(('name="purpose"', b"\\ud800" * 150_000)), name) for name in CHARSETS),
    # It says that it is JSON.
    Attack("form, 10^5 parts", FILES, multipart(('name="x"', b""), repeat=100_000)),
    form(
        "form, 10^6 header bytes",
        lambda: b'--b\r\ncontent-disposition: form-data; name="x"\r\nx: ' + b"h" * 10**6 + b"\r\n\r\n\r\n--b--\r\n",
    ),
    form("form, 10^6 options", multipart(('name="x"' + '; a="b"' * 500, b""))),
    upload("upload, 15 MB of lines", lambda: (PAIR * (SIZE // len(PAIR))).encode()),
    upload("upload, 15 MB of short lines", lambda: b'{"prompt":"","completion":"a"}\n' * (SIZE // 31)),
    upload("upload, 15 MB of empty lines", lambda: b"\n" * SIZE),
    upload("upload, one line of 15 MB", lambda: json.dumps({"prompt": words(SIZE), "completion": "a"}).encode()),
    upload("upload, a word of 15 MB", lambda: json.dumps({"prompt": letters(SIZE), "completion": "a"}).encode()),
    upload("upload, one line of 15 MB of values", lambda: b'{"prompt": [' + b"[]," * (SIZE // 3) + b"0]}"),
    upload("upload, 15 MB of line ends", lambda: b"\r" * SIZE),
    upload("upload, 15 MB of almost boundaries", lambda: b"\r\n--" * (SIZE // 4)),
    upload("upload, 15 MB of wrong lines", lambda: b"[]\n" * (SIZE // 3)),
    # Four are taken, and copied once. Of each of the others what the kernel has is read, to see that it is too much.
    upload("200 uploads of 15 MB at once", lambda: b"x" * SIZE)._replace(runs=True, times=200, most_memory=256 << 20),
]

PATHS = ("/openapi.json", "/docs", "/metrics", "/v1/files", "/v1/models/" + "x" * 10_000)
WITHOUT_BODY = [Attack(f"GET {path[:30]}", path, headers={}, method="GET") for path in PATHS]

ATTACKS = (*DESIGN, *TEXTS, *VALUES, *SAMPLING, *STRINGS, *FORMS, *WITHOUT_BODY)
