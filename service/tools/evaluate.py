"""Evaluates a model over the Completions API: perplexity of a text, accuracy on few-shot tasks."""

import io
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm.contrib.concurrent import thread_map

from model.checkpoint.files import json_lines
from model.checkpoint.prompt_format import PromptFormat
from service.engine.prompts import Example, FewShot, few_shot_parts
from service.tools.bench import authorization, message

# Requests in flight.
IN_FLIGHT = 8
TIMEOUT = 600.0
# Lays out examples as a prompt.
LAYOUT = PromptFormat()


@dataclass(frozen=True)
class RemoteModel:
    """A model of the server at `url`."""

    url: str
    model: str

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that answers `body`. Raises ValueError with the server's message if it refuses."""
        headers = {"content-type": "application/json", **authorization()}
        data = json.dumps({"model": self.model, **body}).encode()
        try:
            with urlopen(Request(self.url + path, data, headers), timeout=TIMEOUT) as answer:
                return json.load(answer)
        except HTTPError as error:
            text = error.read().decode(errors="replace")
            raise ValueError(f"POST {path}: {error.code} {message(text)}") from error
        except URLError as error:
            raise ValueError(f"POST {self.url}{path}: {error.reason}") from error


def perplexity(served: RemoteModel, text: str) -> dict[str, float]:
    """How well a model predicts every token of a text but the first, with the text's numbers of tokens and bytes.

    The model reads windows of its context's length. A window begins with the last token of the one before it.
    """
    found = served.post("/tokenize", {"prompt": text, "add_special_tokens": False})
    try:
        tokens, context = found["tokens"], found["max_model_len"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"POST {served.url}/tokenize: the answer lacks tokens or max_model_len") from error
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens; perplexity needs 2 at least")
    windows = [tokens[start : start + context] for start in range(0, len(tokens) - 1, context - 1)]

    def nats_of(window: list[int]) -> float:
        body = {"prompt": window, "max_tokens": 0, "echo": True, "logprobs": 0}
        logprobs = (served.post("/v1/completions", body)["choices"][0].get("logprobs") or {}).get("token_logprobs") or []
        if len(logprobs) != len(window):
            asked = f"echo with logprobs of {len(window)} tokens was asked for"
            raise ValueError(f"POST {served.url}/v1/completions: {asked}, {len(logprobs)} came")
        return -sum(logprobs[1:])

    nats = sum(thread_map(nats_of, windows, max_workers=IN_FLIGHT, desc="perplexity", unit="window"))
    num_bytes = len(text.encode())
    return {
        "tokens": len(tokens),
        "bytes": num_bytes,
        "perplexity": math.exp(nats / (len(tokens) - 1)),
        "bits_per_byte": nats / math.log(2) / num_bytes,
    }


class TaskItem(NamedTuple):
    task: str
    input: str
    output: str


def few_shot_text(examples: Sequence[TaskItem], query: str) -> str:
    """The prompt that our field few_shot would make. Other servers lack that field, so it is laid out here."""
    few_shot = FewShot([Example(example.input, example.output) for example in examples])
    return "".join(part.text for part in few_shot_parts(query, few_shot, LAYOUT, allow_special=False))


def read_items(path: Path) -> list[TaskItem]:
    """The items of a JSONL file: "input", "output" and perhaps "task". Raises ValueError with the line."""
    items = []
    for number, line in json_lines(io.BytesIO(path.read_bytes()), str(path)):
        try:
            item = json.loads(line)
            texts = [item.pop("task", "all"), item.pop("input"), item.pop("output")]
            if item or not all(isinstance(text, str) for text in texts):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = 'an object of the texts "input", "output" and perhaps "task"'
            raise ValueError(f"{path}, line {number}: expected {expected}, got {line[:80]!r}") from error
        items.append(TaskItem(*texts))
    if not items:
        raise ValueError(f"{path} holds no items")
    return items


class Question(NamedTuple):
    """An item after `shots` examples."""

    item: TaskItem
    shots: int
    prompt: str


def few_shot_questions(items: list[TaskItem], pool: list[TaskItem], shots: list[int], seed: int = 0) -> list[Question]:
    """Every item after each number of examples in `shots`, drawn from the other items of its task in `pool`.

    Raises ValueError with the task that has too few examples, or with the item that can't be answered.
    """
    rng = random.Random(seed)
    questions = []
    for item in items:
        if LAYOUT.separator in item.output:
            where = f"an answer ends at {LAYOUT.separator!r}"
            raise ValueError(f"task {item.task}, input {item.input[:80]!r}: {where}, which its output holds")
        others = [other for other in pool if other.task == item.task and other.input != item.input]
        if len(others) < max(shots):
            raise ValueError(f"task {item.task} has {len(others)} other examples; {max(shots)} are needed (--examples)")
        examples = rng.sample(others, max(shots))
        questions += [Question(item, count, few_shot_text(examples[:count], item.input)) for count in shots]
    return questions


def few_shot_accuracy(served: RemoteModel, questions: list[Question]) -> dict[str, dict[int, float]]:
    """The share of exact answers, by task and number of examples."""

    def is_right(question: Question) -> bool:
        # A text has at most as many tokens as bytes. Room for the space that the prompt leaves out, answer and separator.
        room = len(f" {question.item.output}{LAYOUT.separator}".encode())
        body = {"prompt": question.prompt, "max_tokens": room, "temperature": 0, "stop": [LAYOUT.separator]}
        answer: str = served.post("/v1/completions", body)["choices"][0]["text"]
        return answer.strip() == question.item.output.strip()

    right: dict[str, dict[int, list[bool]]] = {}
    answers = thread_map(is_right, questions, max_workers=IN_FLIGHT, desc="few-shot", unit="item")
    for question, hit in zip(questions, answers, strict=True):
        right.setdefault(question.item.task, {}).setdefault(question.shots, []).append(hit)
    return {task: {count: sum(hits) / len(hits) for count, hits in by.items()} for task, by in right.items()}
