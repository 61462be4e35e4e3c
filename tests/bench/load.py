"""Closed-loop load on a /v1/completions endpoint: so many streams always in flight, random token prompts, real HTTP."""

import asyncio
import json
import random
import time
from itertools import pairwise
from typing import Any, NamedTuple

import aiohttp


class Load(NamedTuple):
    """What to ask for: `requests` streams of `prompt` + `output` tokens, `concurrency` at a time."""

    concurrency: int
    requests: int
    prompt: int = 128
    output: int = 128


class Result(NamedTuple):
    """Output tokens a second, and percentiles of time to first token and of the gaps between events, in seconds."""

    tokens_per_second: float
    first_token: list[float]
    gaps: list[float]


async def run(url: str, model: str, load: Load, *, seed: int = 0) -> Result:
    """Keep `load` on the server. RuntimeError when a stream fails or ends short: a failing server has no throughput."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(1000, 40000) for _ in range(load.prompt)] for _ in range(load.requests)]
    first_token: list[float] = []
    gaps: list[float] = []

    async def worker(session: aiohttp.ClientSession) -> None:
        while prompts:
            times = await stream(session, url, model, prompts.pop(), load.output)
            first_token.append(times[1] - times[0])
            gaps.extend(b - a for a, b in pairwise(times[1:]))

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=3600)) as session:
        start = time.perf_counter()
        await asyncio.gather(*(worker(session) for _ in range(load.concurrency)))
        seconds = time.perf_counter() - start
    return Result(load.requests * load.output / seconds, sorted(first_token), sorted(gaps))


async def stream(session: aiohttp.ClientSession, url: str, model: str, prompt: list[int], output: int) -> list[float]:
    """Times at which the request went out and at which each event with text came in."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    times, tokens, done = [time.perf_counter()], 0, False
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {await response.text()}")
        async for line in response.content:
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                done = True
            elif data:
                event = json.loads(data)
                if "error" in event:
                    raise RuntimeError(f"error event: {event['error']}")
                if event["choices"]:
                    times.append(time.perf_counter())
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
    if not done or tokens != output:
        raise RuntimeError(f"a stream ended with {tokens} of {output} tokens, [DONE] {done}")
    return times


def percentile(ordered: list[float], share: float) -> float:
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]
