"""`banded bench` and `banded evaluate`: how fast a server is, and how well its model predicts."""

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from service.commands.options import Commands, add_model_options, positive, settings_from


def add_bench(commands: Commands) -> None:
    command = commands.add_parser("bench", help="measure a server under load, over HTTP: tokens/s and latencies")
    command.set_defaults(command=run_bench)
    add_model_options(command)
    command.add_argument("--url", help="measure the server there, and of its models --model (default: the first)")
    command.add_argument(
        "--streams", type=positive, nargs="+", default=[1, 8, 32], help="requests in flight, a line of the table for each"
    )
    command.add_argument("--prompt", type=positive, default=128, help="tokens of a prompt (default %(default)d)")
    command.add_argument("--output", type=positive, default=128, help="tokens of a completion (default %(default)d)")
    command.add_argument("--requests", type=positive, help="requests of a line (default: two a stream, and 3 at least)")
    command.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default %(default)g)")
    command.add_argument("--top-k", type=int, default=0, help="likeliest tokens to draw from (default: all)")
    command.add_argument("--top-p", type=float, default=1.0, help="share of the probability to draw from (default: all)")
    command.add_argument(
        "--min-p", type=float, default=0.0, help="least probability, as a share of the highest (default: 0)"
    )
    command.add_argument("--csv", type=Path, help="write the table to this file too")


def run_bench(args: argparse.Namespace) -> int:
    from service.tools.bench import WHOLE, Workload, bench

    if args.requests and args.requests < max(args.streams):
        raise ValueError(f"--requests {args.requests} can't keep {max(args.streams)} streams in flight")
    sampling = {name: getattr(args, name) for name in WHOLE}
    loads = [
        Workload(streams, args.requests or max(3, 2 * streams), args.prompt, args.output, sampling)
        for streams in args.streams
    ]
    with ExitStack() as stack:
        rows = stack.enter_context(args.csv.open("w", newline="")) if args.csv else None
        url, model = stack.enter_context(reachable(args))
        bench(url, model, loads, sys.stdout, rows)
    return 0


def add_evaluate(commands: Commands) -> None:
    command = commands.add_parser("evaluate", help="perplexity on a text, accuracy on few-shot tasks")
    command.set_defaults(command=run_evaluate)
    add_model_options(command)
    command.add_argument("--url", help="evaluate the server there, and of its models --model (default: the first)")
    command.add_argument("--text", type=Path, help="file whose perplexity and bits per byte are measured")
    command.add_argument("--few-shot", type=Path, metavar="JSONL", help='lines {"input": ..., "output": ..., "task": ...}')
    command.add_argument("--examples", type=Path, metavar="JSONL", help="where examples come from (default: --few-shot)")
    command.add_argument("--shots", type=int, nargs="+", help="examples in a prompt (default: 0, 1, 4 and 16)")
    command.add_argument("--json", type=Path, help="write the results to this file too")


def run_evaluate(args: argparse.Namespace) -> int:
    from model.checkpoint.files import decoded
    from service.tools.evaluate import RemoteModel, few_shot_accuracy, few_shot_questions, perplexity, read_items

    if not (args.text or args.few_shot):
        raise ValueError("nothing to evaluate: give --text, --few-shot or both")
    if not args.few_shot and (args.examples or args.shots):
        raise ValueError("--examples and --shots are for --few-shot")
    shots = sorted(set(args.shots or (0, 1, 4, 16)))
    if shots[0] < 0:
        raise ValueError(f"--shots {shots[0]}: examples can't be fewer than none")
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no such directory")
    text = decoded(args.text.read_bytes(), str(args.text)) if args.text else None
    questions = []
    if args.few_shot:
        items = read_items(args.few_shot)
        questions = few_shot_questions(items, read_items(args.examples) if args.examples else items, shots)
    with reachable(args) as (url, model):
        served = RemoteModel(url, model)
        results: dict[str, Any] = {"model": model}
        if text is not None:
            found = results["text"] = perplexity(served, text)
            bits = f"{found['bits_per_byte']:.3f} bits per byte"
            print(f"perplexity {found['perplexity']:.2f}, {bits}, {found['tokens']} tokens", flush=True)
        if questions:
            results["few_shot"] = few_shot_accuracy(served, questions)
            print("\n".join(few_shot_table(results["few_shot"])))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def few_shot_table(accuracy: dict[str, dict[int, float]]) -> list[str]:
    """Accuracy by task and number of examples, and the mean over tasks."""
    shots = list(next(iter(accuracy.values())))
    means = {count: sum(by[count] for by in accuracy.values()) / len(accuracy) for count in shots}
    rows = [*accuracy.items(), ("mean", means)]
    heading = f"{'examples':<16}" + "".join(f"{count:>8}" for count in shots)
    return [heading, *(f"{task:<16}" + "".join(f"{by[count]:>8.1%}" for count in shots) for task, by in rows)]


@contextmanager
def reachable(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Address and model of the server at --url, or of one that is started here and stopped at the end."""
    from service.tools.bench import banded, base_url, running, served_model

    if args.url and (args.dtype or args.device):
        raise ValueError("--dtype and --device say how a server is started; the one at --url runs already")
    if args.url:
        url = base_url(args.url)
        yield url, args.model or served_model(url)
        return
    # Without a handler, SIGTERM would end this process and leave the server running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    settings = settings_from(args, host="127.0.0.1")
    with running(banded(settings.model, "--dtype", settings.dtype, "--device", settings.device)) as server:
        yield server.url, served_model(server.url)
