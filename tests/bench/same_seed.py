"""Does a seed give the same text alone, in a full batch and after a prefix hit? Compares whole texts over HTTP.

    python -m tests.bench.same_seed --model demo --dtype bfloat16

Every request is sent four times: alone to a fresh server, alone again (now its prompt is cached), in a full batch to a fresh
server, and in a full batch again. Prints how many texts differ from those of the first run. Exits with 1 if any does.
"""

import argparse
import asyncio
import random
import sys
from typing import Any

import httpx

from service.engine.loading import model_directory, served_name
from service.tools.bench import banded, running

CONCURRENCY = 48  # more than the server has batch rows: some requests must wait


def requests(count: int, model: str) -> list[dict[str, Any]]:
    """Prompts of 5 to 900 random tokens. A third of them begin with one of four texts of 300 to 700 tokens."""
    rng = random.Random(1)
    shared = [[rng.randrange(50000) for _ in range(length)] for length in (300, 450, 600, 700)]
    made = []
    for i in range(count):
        own = [rng.randrange(50000) for _ in range(rng.randrange(5, 200))]
        prompt = [*rng.choice(shared), *own] if i % 3 == 0 else own * rng.choice((1, 1, 4))
        fields: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": 40, "seed": i, "ignore_eos": True}
        fields |= rng.choice(
            [
                {"temperature": 0},
                {"temperature": 1},
                {"temperature": 0.8, "top_p": 0.95},
                {"temperature": 1.2, "top_k": 50, "presence_penalty": 0.5, "repetition_penalty": 1.1},
                {"temperature": 0.9, "n": 3},
                {"temperature": 0.7, "logprobs": 2},
            ]
        )
        made.append(fields)
    return made


async def texts(url: str, bodies: list[dict[str, Any]], concurrency: int) -> tuple[list[list[str]], int]:
    """The texts of each request, and how many prompt tokens came from the prefix cache."""
    gate = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def send(body: dict[str, Any]) -> Any:
            async with gate:
                answer = await client.post("/v1/completions", json=body)
            answer.raise_for_status()
            return answer.json()

        answers = await asyncio.gather(*map(send, bodies))
    cached = sum(answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers)
    return [[choice["text"] for choice in answer["choices"]] for answer in answers], cached


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="'demo' or a checkpoint directory")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, default=200)
    args = parser.parse_args()
    bodies = requests(args.requests, served_name(args.model))
    runs = {}
    for name, concurrency in (("alone", 1), ("in a full batch", CONCURRENCY)):
        with running(banded(model_directory(args.model), "--dtype", args.dtype)) as server:
            runs[name] = asyncio.run(texts(server.url, bodies, concurrency))
            runs[f"{name}, again"] = asyncio.run(texts(server.url, bodies, concurrency))
    expected, _ = runs["alone"]
    num_choices = sum(map(len, expected))
    print(f"{args.model}, {args.dtype}: {len(bodies)} requests, {num_choices} choices of 40 tokens")
    print(f"{'run':<24}{'cached prompt tokens':>21}{'choices that differ':>21}")
    differ = 0
    for name, (found, cached) in runs.items():
        different = sum(
            a != b for ours, theirs in zip(expected, found, strict=True) for a, b in zip(ours, theirs, strict=True)
        )
        differ += different
        print(f"{name:<24}{cached:>21}{different:>21}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
