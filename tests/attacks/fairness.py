"""`python -m tests.attacks.fairness`: what one key's requests cost another key; exits with 1 where that is too much.

It serves the embedded model with 32 keys. One of them sends a large request; meanwhile another asks for one token, again and
again. `flood` compares the latencies of 31 keys with and without a key that floods. `--only WORD` runs the cases whose names
hold the word, `--options "--max-slots 4"` are for the server.
"""

import argparse
import asyncio
import os
import random
import shlex
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.attacks.table import last_line, run
from tests.serving import banded_serve

KEYS = [f"key-{i}" for i in range(32)]
MOST_WAIT = 1.5  # seconds for one token beside a large request
MOST_SLOWDOWN = 2.0  # of the others' 99th percentile beside a key that floods
SECONDS = 5.0  # that each case is measured
FLOOD_SECONDS = 8.0
HEAD_START = 1.0  # seconds that the large request has run before others come

Body = dict[str, Any]


class Attack(NamedTuple):
    name: str
    path: str
    body: Callable[[], Body]
    num_requests: int = 1  # at once


def prompt(length: int) -> list[int]:
    return [random.randrange(50_000) for _ in range(length)]


LONG: Body = {"max_tokens": 1500, "ignore_eos": True}
ATTACKS = [
    Attack("1024 choices of 1500 tokens", "completions", lambda: LONG | {"prompt": ["Once"] * 8, "n": 128}),
    Attack("32 requests of 32 choices", "completions", lambda: LONG | {"prompt": "Once", "n": 32, "seed": 1}, 32),
    Attack("contexts that are full", "completions", lambda: LONG | {"prompt": prompt(548), "n": 128}, 4),
    Attack("1000 different prompts", "completions", lambda: LONG | {"prompt": [prompt(100) for _ in range(1000)]}),
    Attack(
        "prompts of 2047 with logprobs",
        "completions",
        lambda: {"prompt": [prompt(2047) for _ in range(8)], "max_tokens": 1, "echo": True, "logprobs": 5},
        4,
    ),
    Attack("best_of 20 x 8", "completions", lambda: {"prompt": ["Once"] * 8, "best_of": 20, "max_tokens": 64}, 4),
    Attack(
        "1024 continuations", "score", lambda: {"prompt": prompt(500), "continuations": [prompt(20) for _ in range(1024)]}
    ),
    Attack(
        "chat of 32 choices",
        "chat/completions",
        lambda: {
            "messages": [{"role": "user", "content": "Hi"}],
            "n": 32,
            "logprobs": True,
            "top_logprobs": 20,
            "max_tokens": 100,
        },
        8,
    ),
]


# Large text work, and some that another key waits for. Both run in worker threads.
TEXT = Attack("tokenize, 4 MB of special tokens", "/tokenize", lambda: {"prompt": "<|endoftext|>" * 300_000}, 16)
SOME_TEXT = Attack("25 kB of words", "/tokenize", lambda: {"prompt": "Once " * 5000})


def percentile(seconds: list[float], share: float) -> float:
    return sorted(seconds)[min(int(share * len(seconds)), len(seconds) - 1)]


class Server:
    def __init__(self, client: httpx.AsyncClient):
        self._client = client

    async def post(self, key: str, path: str, body: Body) -> tuple[int, float]:
        """The status, and the seconds until the answer."""
        began = time.monotonic()
        answer = await self._client.post(
            path if path.startswith("/") else f"/v1/{path}", json=body, headers={"authorization": f"Bearer {key}"}
        )
        return answer.status_code, time.monotonic() - began

    @asynccontextmanager
    async def under(self, attack: Attack | None) -> AsyncIterator[None]:
        """While the first key sends `attack`, again when it is answered."""

        async def again() -> None:
            while attack:
                await self.post(KEYS[0], attack.path, attack.body())

        tasks = [asyncio.create_task(again()) for _ in range(attack.num_requests if attack else 0)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.5)

    async def ask(
        self, key: str, seconds: float, pause: float, max_tokens: int, found: list[float], asked: Attack | None = None
    ) -> None:
        """One short completion after the other, or what is `asked`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            path, body = (
                (asked.path, asked.body()) if asked else ("completions", {"prompt": prompt(5), "max_tokens": max_tokens})
            )
            status, took = await self.post(key, path, body)
            found.append(took if status == 200 else float("inf"))
            await asyncio.sleep(random.uniform(0, 2 * pause))


async def beside(server: Server, attack: Attack, asked: Attack | None = None) -> float:
    """The longest that another key waits for a token, or for what is `asked`."""
    found: list[float] = []
    async with server.under(attack):
        await asyncio.sleep(HEAD_START)
        await server.ask(KEYS[1], SECONDS, 0.1, 1, found, asked)
    return max(found)


async def flood(server: Server, attack: Attack, pause: float) -> tuple[float, float]:
    """The 99th percentile of the other 31 keys' requests of 16 tokens, alone and beside `attack`."""
    measured = []
    for case in (None, attack):
        found: list[float] = []
        async with server.under(case):
            await asyncio.sleep(HEAD_START)
            await asyncio.gather(*(server.ask(key, FLOOD_SECONDS, pause, 16, found) for key in KEYS[1:]))
        measured.append(percentile(found, 0.99))
    return measured[0], measured[1]


async def measure(url: str, only: str) -> int:
    """Print what each case costs. Returns how many miss their bound."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        server, kept = Server(client), list[bool]()
        for attack in ATTACKS:
            if only in attack.name:
                wait = await beside(server, attack)
                kept.append(wait <= MOST_WAIT)
                print(f"{attack.name:34}{wait:8.2f} s until another key's token, at most {MOST_WAIT}{verdict(kept[-1])}")
        if only in TEXT.name:
            wait = await beside(server, TEXT, SOME_TEXT)
            kept.append(wait <= MOST_WAIT)
            print(
                f"{TEXT.name:34}{wait:8.2f} s until another key's {SOME_TEXT.name}, at most {MOST_WAIT}{verdict(kept[-1])}"
            )
        for attack in (ATTACKS[0], ATTACKS[4]):
            for pause in (0.0, 1.0):
                name = f"flood, pause {pause:g}: {attack.name}"
                if only in name:
                    alone, beside_it = await flood(server, attack, pause)
                    kept.append(beside_it <= MOST_SLOWDOWN * alone)
                    ratio = f"{beside_it / alone:.2f} times, at most {MOST_SLOWDOWN}{verdict(kept[-1])}"
                    print(f"{name:48}p99 {alone:6.2f} s alone, {beside_it:6.2f} s beside it, {ratio}")
    print(last_line(len(kept), kept.count(False)))
    return kept.count(False)


def verdict(kept: bool) -> str:
    return "" if kept else "  MISSED"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--options", default="", help="of banded serve")
    parser.add_argument("--model", default="demo")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        keys = {"BANDED_API_KEYS": ",".join(KEYS), "PYTHONPATH": os.getcwd()}
        with banded_serve(Path(arguments.model), log, "--dtype", "auto", *shlex.split(arguments.options), **keys) as served:
            return int(asyncio.run(measure(served.url, arguments.only)) > 0)


if __name__ == "__main__":
    run(main)
