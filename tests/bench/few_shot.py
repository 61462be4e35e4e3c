"""Time to first token of a few-shot prompt of about 1500 tokens: cold, and with its examples in the prefix cache.

python -m tests.bench.few_shot --model demo
"""

import argparse
import json
import random
import statistics
import time
from typing import Any

import httpx

from model.checkpoint.tokenizer import r50k_base
from service.engine.loading import model_directory, served_name
from service.tools.bench import banded, running

PROMPT_TOKENS = 1500


def examples(rng: random.Random) -> list[dict[str, str]]:
    """Made-up word pairs that nobody has sent before, enough for a prompt of PROMPT_TOKENS."""
    tokenizer, made, total = r50k_base(), [], 0
    while total < PROMPT_TOKENS:
        pair = ["".join(rng.choices("aeioulmnrst", k=rng.randrange(4, 9))) for _ in range(2)]
        made.append({"input": pair[0], "output": pair[1]})
        total += len(tokenizer.encode(f"{pair[0]} => {pair[1]}\n###\n"))
    return made


def first_token(client: httpx.Client, body: dict[str, Any]) -> tuple[float, int, int]:
    """Seconds to the first event with text, the number of prompt tokens, and the number of cached ones."""
    started = time.perf_counter()
    first = None
    with client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - started
                chunk = json.loads(line.removeprefix("data: "))
                if chunk["usage"]:
                    usage = chunk["usage"]
    assert first is not None
    return first, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="'demo' or a checkpoint directory")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    rng = random.Random(0)
    cold, warm = [], []
    with (
        running(banded(model_directory(args.model), "--dtype", args.dtype)) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        for _ in range(args.repeats):
            few_shot = {"instruction": "Translate.", "examples": examples(rng)}
            body = {"model": served_name(args.model), "max_tokens": 1, "stream": True, "few_shot": few_shot}
            body |= {"stream_options": {"include_usage": True}, "temperature": 0}
            cold.append(first_token(client, body | {"prompt": "sea otter"}))
            warm.append(first_token(client, body | {"prompt": "peppermint"}))
    print(f"{args.model}, {args.dtype}: {len(few_shot['examples'])} examples, median of {args.repeats}")
    for name, found in (("cold", cold), ("examples cached", warm)):
        seconds, tokens, cached = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{name:<16}{1e3 * seconds:8.0f} ms to the first token of {tokens:.0f} prompt tokens, {cached:.0f} cached")


if __name__ == "__main__":
    main()
