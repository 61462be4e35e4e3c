"""`make bench`: output tokens/s of a random 125M GPT-2 at 1, 8 and 32 streams over HTTP, and KV pages of a long sequence.

Prints what it measures and nothing else: compare two versions only in interleaved runs on the same machine.
"""

import argparse
import asyncio
import json
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from safetensors.torch import save_file

from model.config import GPT3_SIZES, GPTConfig
from model.gpt import GPT
from model.step import Sampled, SamplingParams
from service.kv_cache import KVCache, pool_sizes
from service.scheduler import Scheduler, Sequence
from tests.bench.load import Load, percentile, run

GPT2_125M = GPTConfig(vocab_size=50257, n_positions=2048, n_embd=768, n_layer=12, n_head=12, n_inner=3072)


def write_random_gpt2(directory: Path) -> Path:
    """A GPT-2 125M with random bf16 weights, in Hugging Face's layout so that any server can load it."""
    directory.mkdir(parents=True, exist_ok=True)
    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": 2048}
    config |= {name: getattr(GPT2_125M, name) for name in names}
    (directory / "config.json").write_text(json.dumps(config))
    model = GPT(GPT2_125M)
    model.init_weights(0)
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor[: GPT2_125M.vocab_size] if name == "wte.weight" else tensor
        stored = tensor.T if re.search(r"(attn|mlp)\.c_\w+\.weight", name) else tensor
        tensors[f"transformer.{name}"] = stored.to(torch.bfloat16).contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@contextmanager
def server(model: Path, *options: str) -> Iterator[str]:
    """The URL of `banded serve` on a free port, stopped at the end. An error inside gets the end of its log as a note."""
    command = [sys.executable, "-c", "import sys; from service.cli import main; sys.exit(main())", "serve"]
    process = subprocess.Popen([*command, "--model", str(model), "--port", "0", *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    log: deque[str] = deque(maxlen=30)
    try:
        for line in process.stderr:
            log.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                # The access log must be read, or its pipe fills up and the server waits.
                threading.Thread(target=log.extend, args=(process.stderr,), daemon=True).start()
                while httpx.get(f"{found.group(1)}/health/ready").status_code != 200:
                    time.sleep(0.1)
                    if process.poll() is not None:
                        raise RuntimeError("the server ended before it was ready")
                yield found.group(1)
                return
        raise RuntimeError("the server ended before it listened")
    except Exception as error:
        error.add_note("".join(log.copy()))
        raise
    finally:
        process.terminate()
        process.wait()


def bench_http(model: Path, dtype: str, concurrencies: list[int]) -> None:
    print(f"\nrandom GPT-2 125M, {dtype}, 128 + 128 tokens, greedy, streaming over HTTP")
    print(f"{'streams':>8} {'tokens/s':>9} {'TTFT p50 ms':>12} {'p99':>7} {'gap p50 ms':>11} {'p99':>7}")
    with server(model, "--dtype", dtype) as url:
        asyncio.run(run(url, model.name, Load(1, 1)))
        for streams in concurrencies:
            result = asyncio.run(run(url, model.name, Load(streams, max(3, 2 * streams)), seed=streams))
            times = [1e3 * percentile(values, share) for values in result[1:] for share in (0.5, 0.99)]
            print(f"{streams:8} {result.tokens_per_second:9.1f} {times[0]:12.0f} {times[1]:7.0f} ", end="")
            print(f"{times[2]:11.1f} {times[3]:7.1f}", flush=True)


def bench_kv_pages() -> None:
    """Pages that one 2000-token prompt holds while it is prefilled, and at rest after it."""
    config = GPT3_SIZES["gpt3-125m"]
    sizes = pool_sizes(config, kv_bytes=1 << 40, item_bytes=2, max_slots=1, step_tokens=512)
    scheduler = Scheduler(KVCache(config, sizes, step_tokens=512), max_slots=1, step_tokens=512)
    scheduler.submit([Sequence([0] * 2000, 48, SamplingParams())])
    peak = at_rest = dict.fromkeys(sizes, 0)
    while step := scheduler.schedule(0.0):
        held = scheduler.cache.held(0)
        peak = {group: max(peak[group], pages) for group, pages in held.items()}
        if step.decodes:
            at_rest = held
        scheduler.commit(Sampled([0] * len(step.samples), [None] * len(step.samples), []), 0.01)
    print("\nKV pages of 64 held by a 2000-token prompt, band 256, chunks of 512")
    for group in sizes:
        print(f"{group:>8}: {at_rest[group]} at rest, {peak[group]} at the peak of its prefill")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="measure this checkpoint instead of a random 125M")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    bench_kv_pages()
    with tempfile.TemporaryDirectory() as temporary:
        model = args.model or write_random_gpt2(Path(temporary) / "gpt2-125m")
        bench_http(model, args.dtype, args.streams)


if __name__ == "__main__":
    main()
