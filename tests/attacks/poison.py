"""`python -m tests.attacks.poison`: what 50 requests whose steps raise do to 450 others; exits with 1 if it is anything.

It sends 450 requests to a server first, for their texts: streamed and whole, of several choices, of several prompts, with
logprobs, penalties and drafts. Then it sends them again from many clients at once to a server of which the steps raise that
compute 50 more.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.attacks.table import Table, run
from tests.model.checkpoint.checkpoints import tiny
from tests.service.engine.poison import POISON
from tests.serving import Served, banded_serve

NUM_REQUESTS, NUM_POISONED, NUM_CLIENTS = 500, 50, 50
ERROR = "the engine failed while it ran this request"
LENGTH, VOCABULARY = 256, 50257  # tokens of a context, and in all

# What the requests of each kind ask for, besides their prompts.
KINDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "streamed": {"stream": True},
    "3 choices": {"n": 3},
    "2 choices, streamed": {"n": 2, "stream": True},
    "4 prompts": {},
    "2 prompts of 2, streamed": {"n": 2, "stream": True},
    "logprobs": {"logprobs": 2, "echo": True},
    "penalties": {"frequency_penalty": 1.9, "allowed_token_ids": list(range(300, 306))},
    "a long greedy text": {"temperature": 0, "max_tokens": 40},
}
NUM_PROMPTS = {"4 prompts": 4, "2 prompts of 2, streamed": 2}


class Request(NamedTuple):
    kind: str
    body: dict[str, Any]


class Answer(NamedTuple):
    """The texts of all choices and their logprobs, or the error. `status` of a stream is 200 whatever follows."""

    status: int
    error: str | None
    choices: list[Any]


def request(kind: str, chance: random.Random, *, poisoned: bool) -> Request:
    """Prompts begin in one of three ways, to be found in the prefix cache. One of a poisoned request's is poisoned."""
    prompts = []
    for _ in range(NUM_PROMPTS.get(kind, 1)):
        prompt = [100 + chance.randrange(3), *range(1, chance.choice((3, 20, 64, 130)))]
        prompts.append(prompt + [chance.randrange(200, VOCABULARY) for _ in range(chance.randrange(1, 9))])
    if poisoned:
        prompt = chance.choice(prompts)
        prompt[:2] = [POISON, chance.choice([0, len(prompt) - 1, len(prompt) + 3])]
    fields = {"max_tokens": 8, "seed": chance.randrange(99), "ignore_eos": True} | KINDS[kind]
    return Request(kind, fields | {"prompt": prompts})


def requests() -> tuple[list[Request], list[Request]]:
    """The good ones and the poisoned ones, of each kind about as many."""
    chance, kinds = random.Random(0), [*KINDS]
    good = [request(kinds[i % len(kinds)], chance, poisoned=False) for i in range(NUM_REQUESTS - NUM_POISONED)]
    return good, [request(kinds[i % len(kinds)], chance, poisoned=True) for i in range(NUM_POISONED)]


async def answer(client: httpx.AsyncClient, request: Request) -> Answer:
    response = await client.post("/v1/completions", json=request.body)
    if "text/event-stream" not in response.headers.get("content-type", ""):
        body = response.json()
        error = body.get("error", {}).get("message")
        choices = sorted(body.get("choices", ()), key=lambda choice: choice["index"])
        return Answer(response.status_code, error, [(each["text"], each["logprobs"]) for each in choices])
    texts: Counter[int] = Counter()
    parts: dict[int, str] = {}
    error = None
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            error = error or event.get("error", {}).get("message")
            for choice in event.get("choices", ()):
                parts[choice["index"]] = parts.get(choice["index"], "") + choice["text"]
                texts[choice["index"]] += choice["finish_reason"] is not None
    whole = [parts[index] for index in sorted(parts) if texts[index] == 1]
    return Answer(response.status_code, error, whole)


async def answers(url: str, wanted: Sequence[Request]) -> list[Answer]:
    """Of all requests, NUM_CLIENTS at once."""
    limits, turn = httpx.Limits(max_connections=NUM_CLIENTS), asyncio.Semaphore(NUM_CLIENTS)

    async def one(client: httpx.AsyncClient, each: Request) -> Answer:
        async with turn:
            return await answer(client, each)

    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        return await asyncio.gather(*(one(client, each) for each in wanted))


def fault_of(found: Answer, expected: Answer | None) -> str:
    """What is wrong with an answer; `expected` is None for a poisoned request."""
    if expected is None:
        is_error = found.error == ERROR and found.status in (200, 500)
        return "" if is_error else f"{found.status} {found.error or 'without an error'}"
    if found.error:
        return f"{found.status} {found.error}"
    return "" if found == expected else "another text"


def left_over(metrics: str) -> list[str]:
    """What a server that is idle holds or has found wrong, by its metrics."""
    names = ("requests_running", "requests_waiting", "kv_pages_held", "page_accounting_faults_total")
    lines = [line for line in metrics.splitlines() if line.startswith(tuple(f"banded_{name}{{" for name in names))]
    found = [line for line in lines if float(line.rsplit(" ", 1)[1])]
    missing = [name for name in names if not any(line.startswith(f"banded_{name}{{") for line in lines)]
    return found + [f"no {name}" for name in missing]


def attack(
    table: Table, when: str, served: Served, good: list[Request], poisoned: list[Request], right: list[Answer]
) -> None:
    expected: list[tuple[Request, Answer | None]] = [*zip(good, right, strict=True), *((each, None) for each in poisoned)]
    random.Random(when).shuffle(expected)
    found = asyncio.run(answers(served.url, [each for each, _ in expected]))
    faults = [
        (each.kind, isinstance(right, Answer), fault_of(got, right))
        for (each, right), got in zip(expected, found, strict=True)
    ]
    for is_good, what in ((True, "right"), (False, "errors")):
        for kind in KINDS:
            mine = [fault for each, good, fault in faults if (each, good) == (kind, is_good)]
            wrong = [*Counter(filter(None, mine))]
            table.case(f"{when}, {kind}", f"{mine.count('')} of {len(mine)} {what}", wrong)
    ready = httpx.get(f"{served.url}/health/ready").status_code
    is_same = served.process.poll() is None and ready == 200
    table.case(f"{when}, the process", f"ready: {ready}", [] if is_same else ["it ended or is not ready"], "the same, ready")
    left = left_over(httpx.get(f"{served.url}/metrics").text)
    table.case(f"{when}, pages and slots", f"{len(left)} series", left, "nothing held, waiting or wrong")
    again = asyncio.run(answers(served.url, good[:20]))
    num_same = sum(one == other for one, other in zip(again, right[:20], strict=True))
    table.case(f"{when}, afterwards", f"{num_same} of 20 right", [] if num_same == 20 else ["another text"])


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    good, poisoned = requests()
    title = f"{len(poisoned)} of {len(good) + len(poisoned)} requests raise in their step"
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        checkpoint = tiny("banded", root, vocab_size=VOCABULARY, n_layer=2, n_positions=LENGTH, band=40)
        with banded_serve(checkpoint, root / "log", OMP_WAIT_POLICY="PASSIVE") as served:
            right = asyncio.run(answers(served.url, good))
        assert all(each.status == 200 and each.error is None and each.choices for each in right)
        table = Table(title, "every poisoned one an error, every other its right text")
        for when in ("before", "result"):
            command = (sys.executable, "-m", "tests.attacks.poisoned_server", when, "serve")
            with banded_serve(checkpoint, root / "log", command=command, OMP_WAIT_POLICY="PASSIVE") as served:
                attack(table, when, served, good, poisoned, right)
    return table.end()


if __name__ == "__main__":
    run(main)
