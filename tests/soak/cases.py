"""What clients of a soak ask for, drawn from a seeded generator, and what each request may be answered.

A Case knows the statuses that the contract allows for it. `fault` says what is wrong with an answer, `substance` is what of
it must be the same whenever the same is asked.
"""

import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from kernels.torch_ops import rounded_up
from tests.soak.wire import Answer, Request, post

Body = dict[str, Any]

CONTEXT, VOCABULARY = 2048, 50_257
MOST_ROWS = 512  # that a step computes
# Under load every request for the engine may find the queue full (429) or wait too long (503).
SERVED = frozenset({200, 429, 503})
REFUSED = frozenset({400})
TALE = (
    "the king said that once upon a time there was wolf and sister who had daughter of golden castle in wood bread "
    "cheese spoke dreamt saw he she it they went home again never until night came with rain over sea"
)
WORDS = TALE.split()
ODD = (
    "\u00e9",
    "\u4e16\u754c",
    "\U0001f469\u200d\U0001f680",
    "\n",
    "\t",
    "\x00",
    '"',
    "\\",
    "<|endoftext|>",
    "e\u0301\u0302",
    "###",
    "{}",
)
STOPS = ("the", "\n", "ing", " a", ".", "<|endoftext|>", "\u4e16", " king said", "zzzz", "\n\n")
# What makes the template of the soak's model run without end, and what makes it raise.
ENDLESS, RAISING = "run for ever", "raise an exception"
# Values that no field takes, by field.
WRONG: tuple[tuple[str, Any], ...] = (
    ("temperature", -0.1),
    ("temperature", 2.5),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", "hot"),
    ("temperature", [1]),
    ("top_p", 1e308),
    ("top_p", -1),
    ("top_k", 2**63),
    ("top_k", 0.5),
    ("min_p", 2),
    ("n", 0),
    ("n", 129),
    ("n", True),
    ("n", 10**30),
    ("best_of", 21),
    ("logprobs", 21),
    ("logprobs", -1),
    ("logprobs", "all"),
    ("max_tokens", -1),
    ("max_tokens", 2**64),
    ("max_tokens", 10**200),
    ("max_tokens", 2048),
    ("seed", 2**64),
    ("seed", "1"),
    ("stop", ["a"] * 65),
    ("stop", [""]),
    ("stop", 7),
    ("stop", "x" * 1025),
    ("stop_token_ids", [VOCABULARY]),
    ("stop_token_ids", ["a"]),
    ("logit_bias", {"king": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"99999999": 1}),
    ("logit_bias", [1]),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [-1]),
    ("bad_words", [""]),
    ("bad_words", [" "]),
    ("repetition_penalty", 0),
    ("presence_penalty", 3),
    ("min_tokens", 2000),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("echo", 1),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", [1, "a"]),
    ("prompt", [VOCABULARY]),
    ("prompt", [2**70]),
    ("prompt", {"text": "a"}),
    ("prompt", [1] * 2049),
    ("prompt", "a" * 600_000),
    ("truncate_prompt_tokens", 0),
    ("few_shot", {"examples": [{"input": "a"}]}),
    ("few_shot", {"separator": ""}),
    ("temperatur", 0),
    ("\ud800", 0),
    ("guided_json", {}),
    ("response_format", {"type": "json_object"}),
    ("user", 7),
    ("metadata", []),
)
# Bodies that are no JSON objects, or hardly.
GARBAGE = (
    b"",
    b"{",
    b"null",
    b"[]",
    b'"a"',
    b"\xff\xfe",
    b"\x00" * 100,
    b'{"prompt": "a"',
    b'{"prompt": "a"}}',
    b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"seed": ' + b"9" * 5000 + b"}",
    b'{"temperature": 1e400}',
    b"{'prompt': 'a'}",
    b'{"prompt": "\xe9"}',
)


class Case(NamedTuple):
    """A request, and what it may be answered."""

    kind: str
    request: Request
    allowed: frozenset[int] = SERVED
    num_choices: int = 0  # that a 200 has, for those that generate


def length(rng: random.Random, most: int, least: int = 1) -> int:
    """Short ones are likelier: uniform in the logarithm."""
    return min(most, int(least * (most / least + 1) ** rng.random()))


class Cases:
    """Draws cases. Some prompts begin as earlier ones did."""

    def __init__(self, seed: int, model: str, keys: tuple[str, ...], *, most_choices: int):
        """`most_choices` of one request are what an idle server takes."""
        rng = random.Random(seed)
        self._model, self.keys, self._most_choices = model, keys, most_choices
        self._documents = [self._tokens(rng, CONTEXT) for _ in range(12)]

    def any(self, rng: random.Random) -> Case:
        """A request as a client with good manners may send it."""
        kinds = {
            self.completion: 56,
            self.chat: 12,
            self.score: 8,
            self.tokenize: 6,
            self.upload: 4,
            self.look: 8,
            self.wrong: 6,
        }
        return rng.choices(list(kinds), list(kinds.values()))[0](rng)

    def key(self, rng: random.Random) -> str:
        return rng.choice(self.keys)

    # -- prompts ------------------------------------------------------------------------------------------------------

    def _tokens(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(count)]

    def text(self, rng: random.Random, most: int) -> str:
        """A text of at most so many bytes, and so of at most so many tokens."""
        size, parts = length(rng, most), []
        while size > 0:
            parts.append(rng.choice(ODD) if rng.random() < 0.05 else rng.choice(WORDS) + " ")
            size -= len(parts[-1].encode())
        return "".join(parts if size == 0 else parts[:-1]) or "a"

    def prompt(self, rng: random.Random, most: int) -> str | list[int]:
        """Of at most so many tokens."""
        size = most - rng.randrange(min(most, 64)) if rng.random() < 0.05 else length(rng, most)
        match rng.randrange(4):
            case 0:
                return self.text(rng, size)
            case 1:
                return self._tokens(rng, size)
            case _:  # perhaps in the prefix cache
                known = rng.choice(self._documents)[:size]
                return known[: max(1, size - 8)] + self._tokens(rng, min(8, size - 1))

    # -- requests that are right --------------------------------------------------------------------------------------

    def sampling(self, rng: random.Random, max_tokens: int) -> tuple[Body, bool]:
        """Fields that completions and chats share, and whether these may leave no token to sample."""
        body: Body = {}

        def sometimes(share: float, name: str, value: Any) -> None:
            if rng.random() < share:
                body[name] = value

        sometimes(0.6, "temperature", rng.choice([0, 1e-300, 0.3, 0.7, 1, 1.0, 2]))
        sometimes(0.2, "top_p", rng.choice([0, 1e-9, 0.5, 0.9, 1]))
        sometimes(0.2, "top_k", rng.choice([-1, 0, 1, 5, 40, 10**6, 2**63 - 1]))
        sometimes(0.1, "min_p", rng.choice([0, 0.05, 0.5, 1]))
        sometimes(0.1, "presence_penalty", rng.uniform(-2, 2))
        sometimes(0.1, "frequency_penalty", rng.uniform(-2, 2))
        sometimes(0.1, "repetition_penalty", rng.choice([0.1, 0.9, 1.3, 10]))
        sometimes(0.1, "logit_bias", {str(token): rng.uniform(-100, 100) for token in self._tokens(rng, length(rng, 300))})
        sometimes(0.5, "seed", rng.randrange(-(2**63), 2**63))
        sometimes(0.3, "stop", rng.choice([rng.choice(STOPS), rng.sample(STOPS, rng.randint(1, len(STOPS)))]))
        sometimes(0.1, "stop_token_ids", self._tokens(rng, length(rng, 100)))
        sometimes(0.1, "min_tokens", rng.randint(0, max_tokens))
        sometimes(0.2, "ignore_eos", True)
        sometimes(0.1, "include_stop_str_in_output", True)
        sometimes(0.1, "skip_special_tokens", False)
        sometimes(0.1, "allow_special", True)
        sometimes(0.1, "cache_prompt", False)
        sometimes(0.2, "return_token_ids", True)
        sometimes(0.05, "allowed_token_ids", self._tokens(rng, length(rng, 1000)))
        sometimes(0.1, "bad_words", [self.text(rng, 12).strip() or "a" for _ in range(rng.randint(1, 5))])
        sometimes(0.2, "user", self.text(rng, 20))
        sometimes(0.05, "metadata", {"note": self.text(rng, 50)})
        sometimes(0.1, "truncate_prompt_tokens", rng.choice([-1, 1, 100, 5000]))
        if rng.random() < 0.5:
            body["stream"] = True
            names = ("include_usage", "include_obfuscation", "continuous_usage_stats")
            sometimes(0.5, "stream_options", {name: rng.random() < 0.5 for name in names})
        else:
            sometimes(0.1, "prompt_logprobs", rng.randint(0, 20))
        return body, bool({"allowed_token_ids", "bad_words"} & body.keys())

    def completion(self, rng: random.Random, *, longest: int = 400, key: str = "") -> Case:
        max_tokens = length(rng, longest) - 1
        body, may_be_empty = self.sampling(rng, max_tokens)
        body["max_tokens"] = max_tokens
        num_prompts = rng.choice([1] * 9 + [rng.randint(2, 6)])
        most = CONTEXT - max_tokens if num_prompts == 1 else 200
        prompts = [self.prompt(rng, most) for _ in range(num_prompts)]
        kinds = {type(prompt) for prompt in prompts}
        body["prompt"] = prompts[0] if num_prompts == 1 else prompts if len(kinds) == 1 else [str(each) for each in prompts]
        if body["prompt"] == prompts[0] and rng.random() < 0.02:
            del body["prompt"]
        n = body["n"] = rng.choice([1] * 6 + [2, 3, 5])
        if "stream" not in body and rng.random() < 0.2:
            body["best_of"] = min(rng.randint(n, n + 3), self._most_choices // num_prompts)
        if rng.random() < 0.3:
            body["logprobs"] = rng.randint(0, 20)
        if rng.random() < 0.2:
            body["echo"] = True
        if isinstance(body.get("prompt"), str) and rng.random() < 0.2:
            body.pop("truncate_prompt_tokens", None)
            if rng.random() < 0.5:
                body["prompt"], body["suffix"] = body["prompt"][: most // 20], self.text(rng, max(1, most // 20))
            else:
                examples = [{"input": self.text(rng, 30), "output": self.text(rng, 9)} for _ in range(rng.randint(0, 40))]
                body["prompt"], body["few_shot"] = body["prompt"][:100], {"examples": examples}
                if rng.random() < 0.3:
                    body["few_shot"]["instruction"] = self.text(rng, 60)
        path = "/v1/completions"
        if rng.random() < 0.1:
            path = f"/v1/engines/{self._model}/completions"
        else:  # while an adapter is served, the key that sees it has to name one
            body["model"] = self._model
        allowed = SERVED | REFUSED if may_be_empty else SERVED
        return Case("completion", post(path, body, key or self.key(rng)), allowed, n * num_prompts)

    def chat(self, rng: random.Random, *, longest: int = 200) -> Case:
        max_tokens = length(rng, longest)
        body, may_be_empty = self.sampling(rng, max_tokens)
        body["model"], body["max_tokens"], body["n"] = self._model, max_tokens, rng.choice([1, 1, 1, 2, 4])
        roles = ["user", "assistant", "system", "developer"]
        messages: list[Body] = [{"role": "user", "content": self.text(rng, 300)}]
        for _ in range(rng.randint(0, 5)):
            content: Any = self.text(rng, 100)
            if rng.random() < 0.2:
                content = [{"type": "text", "text": content}]
            messages.append({"role": rng.choice(roles), "content": content})
        body["messages"] = messages
        if rng.random() < 0.3:
            body["logprobs"] = True
            body["top_logprobs"] = rng.randint(0, 20)
        if rng.random() < 0.1:
            body["continue_final_message"] = True
        allowed = SERVED | REFUSED if may_be_empty else SERVED
        trick = rng.random()
        if trick < 0.04:
            messages[0]["content"], allowed = ENDLESS if trick < 0.01 else RAISING, REFUSED
        return Case("chat", post("/v1/chat/completions", body, self.key(rng)), allowed, body["n"])

    def score(self, rng: random.Random) -> Case:
        prompt = self.prompt(rng, 1500) if rng.random() < 0.9 else ""
        continuations = [self.prompt(rng, 60) for _ in range(rng.randint(1, self._most_choices))]
        body = {"prompt": prompt, "continuations": continuations, "model": self._model}
        return Case("score", post("/v1/score", body, self.key(rng)))

    def tokenize(self, rng: random.Random) -> Case:
        allowed, large = frozenset({200}), rng.random() < 0.1
        match rng.randrange(3):
            case 0:
                text = self.text(rng, 3000) * (100 if large else 1)
                body: Body = {"prompt": text, "return_token_strs": rng.random() < 0.3}
                return Case("tokenize", post("/tokenize", body, self.key(rng)), allowed)
            case 1:
                body = {"messages": [{"role": "user", "content": self.text(rng, 1000)}]}
                return Case("tokenize", post("/tokenize", body, self.key(rng)), allowed)
        tokens = self._tokens(rng, length(rng, 3000)) * (20 if large else 1)
        return Case("detokenize", post("/detokenize", {"tokens": tokens}, self.key(rng)), allowed)

    def file(self, rng: random.Random, most: int = 300) -> bytes:
        """Examples to learn from."""
        count = length(rng, most)
        lines = [{"prompt": self.text(rng, 60), "completion": " " + self.text(rng, 20)} for _ in range(count)]
        return b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    def upload(self, rng: random.Random, key: str = "", content: bytes = b"") -> Case:
        content, allowed = content or self.file(rng), frozenset({200})
        if rng.random() < 0.2 and not key:
            content, allowed = rng.choice([b"", b"{}\n", content[:-5], b"\xff" * 1000]), REFUSED
        return Case("upload", form(content, key or self.key(rng)), allowed)

    def look(self, rng: random.Random) -> Case:
        paths = {
            "/v1/models": 200,
            f"/v1/models/{self._model}": 200,
            "/v1/models/none": 404,
            "/v1/engines": 200,
            "/v1/files": 200,
            "/v1/files?limit=2&order=asc": 200,
            "/v1/files?limit=0": 400,
            "/v1/files?after=nothing": 400,
            "/v1/files/file-none": 404,
            "/v1/files/file-none/content": 404,
            "/v1/fine_tuning/jobs": 200,
            "/v1/fine_tuning/jobs/ftjob-none/events": 404,
            "/health": 200,
            "/health/live": 200,
            "/version": 200,
            "/metrics": 200,
            "/tokenizer_info": 200,
            "/openapi.json": 200,
            "/docs": 200,
            "/nothing": 404,
            "/v1/completions": 405,
        }
        path = rng.choice(list(paths))
        method = "GET"
        if path == "/v1/files/file-none" and rng.random() < 0.5:
            method = "DELETE"
        return Case("look", Request(method, path, key=self.key(rng)), frozenset({paths[path]}))

    def of_each_size(self) -> Iterator[Case]:
        """Prompts of every number of rows that a product is compiled for, and with logprobs, so that the head's are too.

        oneDNN, which multiplies in float32, keeps what it compiles. A round grows with each size that is new in it.
        """
        rng = random.Random("sizes")
        for rows in sorted({rounded_up(count) for count in range(1, MOST_ROWS + 1)}):
            for wanted in ({}, {"echo": True, "logprobs": 0}):  # a step has fewer rows of those with logprobs
                body = {"prompt": self._tokens(rng, rows), "max_tokens": 1, "model": self._model} | wanted
                yield Case("size", post("/v1/completions", body, self.key(rng)), frozenset({200}), 1)

    # -- requests that are wrong --------------------------------------------------------------------------------------

    def wrong(self, rng: random.Random) -> Case:
        """A request that must be refused."""
        key, right = self.key(rng), {"prompt": "a", "max_tokens": 1, "model": self._model}
        match rng.randrange(8):
            case 0:
                request = Request("POST", "/v1/completions", rng.choice(GARBAGE), key)
                return Case("garbage", request, REFUSED)
            case 1:
                wrong_key = rng.choice(["", "sk-none", key + "x", "alice:" + key])
                return Case("wrong key", post("/v1/completions", right, wrong_key), frozenset({401}))
            case 2:
                path = rng.choice(["/v1/chat/completions", "/v1/score", "/tokenize", "/detokenize", "/v1/fine_tuning/jobs"])
                body = {
                    rng.choice(["messages", "prompt", "continuations", "tokens", "extra"]): rng.choice([0, "", [{}], {}])
                }
                return Case("wrong body", post(path, body, key), REFUSED | (SERVED if path == "/tokenize" else frozenset()))
            case 3:
                size = rng.choice([4 << 20, 5 << 20]) + 1
                return Case("too large", Request("POST", "/v1/completions", b" " * size, key), frozenset({413}))
            case 4:
                headers = (("Content-Encoding", "gzip"),)
                return Case("compressed", post("/v1/completions", right, key)._replace(headers=headers), frozenset({415}))
            case 5:
                body = {"prompt": "a", "n": 128, "model": self._model}
                return Case("too many choices", post("/v1/completions", body, key), REFUSED)
        name, value = rng.choice(WRONG)
        return Case(f"wrong {name}", post("/v1/completions", right | {name: value}, key), REFUSED)


def form(content: bytes, key: str, purpose: str = "fine-tune") -> Request:
    """An upload."""
    border = "a-border-between-parts"
    parts = [
        f'--{border}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n'.encode(),
        f'--{border}\r\nContent-Disposition: form-data; name="file"; filename="file.jsonl"\r\n\r\n'.encode() + content,
        f"\r\n--{border}--\r\n".encode(),
    ]
    return Request("POST", "/v1/files", b"".join(parts), key, f"multipart/form-data; boundary={border}")


def seeded(cases: Cases, seed: int, count: int) -> list[Case]:
    """Requests whose answers must be the same whenever they are asked."""
    rng, found = random.Random(f"{seed} seeded"), list[Case]()
    while len(found) < count:
        kind = rng.choices(["completion", "chat", "score"], [8, 1, 1])[0]
        longest = 48 if len(found) % 10 else 300
        case = cases.score(rng) if kind == "score" else getattr(cases, kind)(rng, longest=longest)
        body = json.loads(case.request.body)
        if case.kind != "score":
            body |= {"seed": rng.randrange(1 << 40), "temperature": rng.choice([1, 1, 1, 0])}
            body.pop("stream_options", None)
        if 400 not in case.allowed:
            found.append(case._replace(request=case.request._replace(body=json.dumps(body).encode())))
    return found


def other_way(case: Case, rng: random.Random) -> Case:
    """The same request, streamed or not, where either is possible; sent with any key."""
    body = json.loads(case.request.body)
    if case.kind != "score" and not {"best_of", "prompt_logprobs"} & body.keys():
        body["stream"] = rng.random() < 0.5
    return case._replace(request=case.request._replace(body=json.dumps(body).encode()))


# -- answers --------------------------------------------------------------------------------------------------------------


def events(answer: Answer) -> Iterator[str]:
    for line in answer.body.decode().split("\n"):
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def error_of(answer: Answer) -> int:
    """The status that a stream's error event stands for, 0 if it has none."""
    types = {"invalid_request_error": 400, "rate_limit_error": 429}
    for event in events(answer):
        if event.startswith('{"error"'):
            error = json.loads(event)["error"]
            return types.get(error["type"], 503 if error["code"] == "unavailable" else 500)
    return 0


def fault(case: Case, answer: Answer) -> str | None:
    """What is wrong with an answer, if something is."""
    status = answer.status
    try:
        if answer.is_stream:
            found = list(events(answer))
            if not found or found[-1] != "[DONE]":
                return "a stream without an end"
            status = error_of(answer) or status
        if status not in case.allowed:
            return f"{status} {answer.body[-300:].decode(errors='replace')}"
        if status == 200 and case.num_choices:
            choices = substance(answer)
            if len(choices) != case.num_choices:
                return f"{len(choices)} choices, not {case.num_choices}"
            if any(choice.get("finish_reason") not in ("stop", "length") for choice in choices.values()):
                return "a choice without an end"
        elif status >= 400 and not answer.is_stream:
            error = json.loads(answer.body)["error"]
            if not error["message"] or error.keys() != {"message", "type", "param", "code"}:
                return f"an error of another form: {error}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error} in {answer.body[:300]!r}"
    return None


def substance(answer: Answer) -> dict[int, Body]:
    """What the choices of an answer hold, by index: texts, tokens, logprobs, why they ended. The same if streamed."""
    if not answer.is_stream:
        whole = json.loads(answer.body)
        if "results" in whole:
            return dict(enumerate(whole["results"]))
        found = {choice["index"]: flat(choice) for choice in whole["choices"]}
        for name in ("prompt_token_ids", "prompt_logprobs"):  # a chat has one prompt for all
            if whole.get(name):
                found = {index: choice | {name: whole[name]} for index, choice in found.items()}
        return found
    choices: dict[int, Body] = {}
    for event in events(answer):
        if event == "[DONE]" or not (chunk := json.loads(event)).get("choices"):
            continue
        for piece in chunk["choices"]:
            choice = choices.setdefault(piece["index"], {})
            for name, value in flat(piece).items():
                add(choice, name, value)
        if chunk.get("prompt_token_ids"):
            choices[-1] = {"prompt_token_ids": chunk["prompt_token_ids"]}
    shared = choices.pop(-1, {})
    return {index: choice | shared for index, choice in sorted(choices.items())}


def flat(choice: Body) -> Body:
    """The fields of a choice, or of a piece of one, with their values in lists or texts that can be added."""
    found: Body = {}
    for name, value in choice.items():
        if name in ("message", "delta"):
            found["text"] = value.get("content") or ""
        elif name == "logprobs":
            found |= {f"logprobs.{part}": entries for part, entries in (value or {}).items()}
        elif name != "index":
            found[name] = value
    return {name: value for name, value in found.items() if value not in (None, [], "")}


def add(choice: Body, name: str, value: Any) -> None:
    choice[name] = choice[name] + value if name in choice else value
