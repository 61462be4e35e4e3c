"""What a process that holds one core costs requests: tokens/s and gaps between tokens, with and without it, in turns.

python -m tests.bench.neighbour --streams 8 32
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

from service.engine.loading import model_directory, served_name
from service.tools.bench import Result, Workload, banded, measure, percentile, running
from tests.bench.checkpoints import ALTERNATING_125M, all_dense, write_gpt2


@contextmanager
def busy_process() -> Iterator[None]:
    """In a session of its own, as another program or container is: the kernel shares cores out among sessions too."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def decode_gaps(result: Result) -> list[float]:
    """Milliseconds between tokens while all streams decode. Sampled text has one token in an event, but for a few."""
    begun = max(stream.events[0] for stream in result.streams)
    pairs = (pair for stream in result.streams for pair in pairwise(stream.events))
    return [1e3 * (later - earlier) for earlier, later in pairs if earlier >= begun]


def in_words(results: list[Result]) -> str:
    rate = statistics.median(result.tokens_per_second for result in results)
    gaps = sorted(gap for result in results for gap in decode_gaps(result))
    median, p99 = (percentile(gaps, share) for share in (0.5, 0.99))
    times = gaps[-1] / median
    return f"{rate:.0f} tokens/s, gaps p50 {median:.0f} ms, p99 {p99:.0f}, max {gaps[-1]:.0f}: {times:.1f} times p50"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="'demo' or a checkpoint directory; without it a random GPT-2 125M")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, nargs="+", default=[8])
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()
    with ExitStack() as opened:
        model = args.model or opened.enter_context(tempfile.TemporaryDirectory()) + "/gpt2"
        if not args.model:
            write_gpt2(Path(model), all_dense(ALTERNATING_125M))
        server = opened.enter_context(running(banded(model_directory(model), "--dtype", args.dtype)))
        measure(server.url, served_name(model), Workload(1, 2))
        for streams in args.streams:
            found: dict[bool, list[Result]] = {False: [], True: []}
            for turn in range(2 * args.repeats):
                beside = turn % 4 in (1, 2)  # A B B A
                load = Workload(streams, streams, output=args.output, temperature=1.0)
                with ExitStack() as neighbour:
                    if beside:
                        neighbour.enter_context(busy_process())
                    found[beside].append(measure(server.url, served_name(model), load, seed=f"{streams} {turn}"))
            alone, taken = (statistics.median(each.tokens_per_second for each in found[some]) for some in (False, True))
            print(f"{streams} streams alone: {in_words(found[False])}")
            print(f"{streams} streams beside a busy process: {in_words(found[True])}")
            print(f"{streams} streams: {taken / alone:.2f} of tokens/s beside a busy process", flush=True)


if __name__ == "__main__":
    main()
