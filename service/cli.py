"""`banded serve | complete | bench | doctor | train`: the composition root. A command imports what it needs when it runs."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from service.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit status. Errors that the user can mend are one line on stderr and status 2."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        check_package()
        status: int = args.command(args)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        print(f"banded: {field + ': ' if field else ''}{first['msg'].removeprefix('Value error, ')}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"banded: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="banded", description="Serve GPT-3-style decoders over the Completions API.")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve a model over HTTP")
    add_model_options(serve)
    serve.add_argument("--host")
    serve.add_argument("--port", type=int)
    serve.add_argument("--allow-unauthenticated", action="store_true", default=None)
    serve.add_argument(
        "--doctor", action="store_true", default=None, help="check the kernels first, as `banded doctor` does"
    )
    serve.add_argument(
        "--lenient", action="store_true", default=None, help="warn of unknown fields instead of refusing the request"
    )
    serve.add_argument("--metrics-alias", help="vllm: export vLLM's metric names too")
    serve.set_defaults(command=run_serve)

    complete = commands.add_parser("complete", help="complete a prompt on the terminal, without a server")
    complete.add_argument("prompt")
    add_model_options(complete)
    complete.add_argument("--max-tokens", type=int, default=60)
    complete.add_argument("--temperature", type=float, default=0.8)
    complete.add_argument("--top-p", type=float, default=0.95)
    complete.add_argument("--seed", type=int)
    complete.set_defaults(command=run_complete)

    bench = commands.add_parser("bench", help="measure a server under load, over HTTP: tokens/s and latencies")
    add_model_options(bench)
    bench.add_argument("--url", help="measure the server there, and of its models --model (default: the first)")
    bench.add_argument(
        "--streams", type=positive, nargs="+", default=[1, 8, 32], help="requests in flight, a line of the table for each"
    )
    bench.add_argument("--prompt", type=positive, default=128, help="tokens of a prompt (default %(default)d)")
    bench.add_argument("--output", type=positive, default=128, help="tokens of a completion (default %(default)d)")
    bench.add_argument("--requests", type=positive, help="requests of a line (default: two a stream, and 3 at least)")
    bench.add_argument("--csv", type=Path, help="write the table to this file too")
    bench.set_defaults(command=run_bench)

    doctor = commands.add_parser("doctor", help="compare the kernels with the reference on a model's weights")
    add_model_options(doctor)
    doctor.set_defaults(command=run_doctor)

    train = commands.add_parser("train", help="train a demo-sized model on text files")
    train.add_argument("corpus", nargs="+", type=Path, help="text; a line <|endoftext|> separates documents")
    train.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    train.add_argument("--valid", type=Path, help="held-out text whose perplexity is printed at the end")
    train.add_argument("--init", type=Path, help="go on from this checkpoint instead of from random parameters")
    train.add_argument("--tokens", type=float, default=6.5e6, help="tokens to train on (default %(default)g)")
    train.add_argument("--batch-tokens", type=int, default=2048, help="tokens in a batch (default %(default)d)")
    train.add_argument("--learning-rate", type=float, default=1.5e-3, help="highest rate (default %(default)g)")
    train.add_argument("--seed", type=int, default=0)
    train.set_defaults(command=run_train)
    return root


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", help="'demo' (default) or a checkpoint directory")
    command.add_argument("--dtype", help="auto, float32, bfloat16, float16 or int8")
    command.add_argument("--device", help="auto, cpu or cuda")


def settings_from(args: argparse.Namespace, **fixed: Any) -> Settings:
    """Settings from the environment, overridden by the options that were given and by `fixed`.

    ValueError for a BANDED_ variable that is no setting: a misspelt limit must not be ignored.
    """
    prefix = str(Settings.model_config["env_prefix"])
    unknown = [
        name for name in os.environ if name.startswith(prefix) and name[len(prefix) :].lower() not in Settings.model_fields
    ]
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no such setting; there are {', '.join(Settings.model_fields)}")
    given = {name: value for name, value in vars(args).items() if name in Settings.model_fields and value is not None}
    return Settings(**given | fixed)


def check_package() -> None:
    """Banded's folders are its import names; a foreign package of the same name would be imported instead."""
    import kernels
    import model

    root = Path(__file__).resolve().parent.parent
    for package in (kernels, model):
        found = Path(str(package.__file__)).resolve().parent
        if found.parent != root:
            raise ValueError(f"the package '{package.__name__}' in {found} is not Banded's; use an environment of its own")


def run_serve(args: argparse.Namespace) -> int:
    # The first process of a container has no default handler: without this one SIGTERM is ignored until the server runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    settings = settings_from(args)
    from service.server import Server, serve

    server = Server(lambda: load_app(settings), host=settings.host, port=settings.port, drain_timeout=settings.drain_timeout)
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:  # uvloop, where it is installed
        status = runner.run(serve(server))
    if server.is_loading or (server.engine and server.engine.hangs):
        # Leaving the interpreter while one of its threads is inside a kernel would abort the process.
        logging.shutdown()
        os._exit(status)
    return status


def load_app(settings: Settings) -> "FastAPI":
    """The application over the model that the settings name: what takes its time when a server starts."""
    from service.api.app import create_app
    from service.loading import load_served, served_name
    from service.metrics import Metrics
    from service.process import freeze_loaded_objects

    metrics = Metrics(served_name(settings.model))
    app = create_app(
        load_served(settings, metrics),
        metrics,
        api_keys=settings.api_keys,
        open_metrics=settings.open_metrics,
        limit_requests=settings.limit_requests,
        limit_tokens=settings.limit_tokens,
        max_body_bytes=settings.max_body_bytes,
        cors_origins=settings.cors_origins,
        lenient=settings.lenient,
        metrics_alias=settings.metrics_alias,
    )
    freeze_loaded_objects()
    return app


def run_complete(args: argparse.Namespace) -> int:
    # Nothing listens, so the address doesn't matter.
    settings = settings_from(args, host="127.0.0.1")
    logging.getLogger().setLevel(logging.WARNING)
    return asyncio.run(complete_on_terminal(args, settings))


async def complete_on_terminal(args: argparse.Namespace, settings: Settings) -> int:
    from contextlib import aclosing

    from service.engine import EngineError
    from service.loading import load_served
    from service.metrics import Metrics
    from service.prompts import text_prompt
    from service.schema import CompletionRequest
    from service.served import choice_requests

    # The bounds of the options are those of the API.
    given = {name: value for name, value in vars(args).items() if name in CompletionRequest.model_fields}
    body = CompletionRequest.model_validate(given | {"model": settings.model})
    served = load_served(settings, Metrics("terminal"))
    prompt = text_prompt(args.prompt, served.tokenizer, allow_special=False)
    num_prompt = len(prompt.tokens)
    room = served.config.n_positions - num_prompt
    if body.max_tokens > room:
        raise ValueError(f"--max-tokens {body.max_tokens}: the prompt's {num_prompt} tokens leave room for {max(room, 0)}")
    requests = choice_requests(body, [prompt], served.tokenizer, max_tokens=body.max_tokens, num_candidates=1)
    served.engine.start()
    print(args.prompt, end="", flush=True)
    try:
        async with aclosing(served.engine.generate(requests)) as outputs:
            async for output in outputs:
                print(output.text, end="", flush=True)
    except EngineError as error:
        raise ValueError(str(error)) from error
    finally:
        await served.engine.stop()
    print()
    return 0


def run_bench(args: argparse.Namespace) -> int:
    from service.bench import Load, banded, base_url, bench, running, served_model

    # Without a handler the server that is measured would outlive this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if args.requests and args.requests < max(args.streams):
        raise ValueError(f"--requests {args.requests} can't keep {max(args.streams)} streams in flight")
    if args.url and (args.dtype or args.device):
        raise ValueError("--dtype and --device say how a server is started; the one at --url runs already")
    loads = [Load(streams, args.requests or max(3, 2 * streams), args.prompt, args.output) for streams in args.streams]
    with ExitStack() as stack:
        rows = stack.enter_context(args.csv.open("w", newline="")) if args.csv else None
        if args.url:
            url = base_url(args.url)
            model = args.model or served_model(url)
        else:
            settings = settings_from(args, host="127.0.0.1")
            server = banded(settings.model, "--dtype", settings.dtype, "--device", settings.device)
            url = stack.enter_context(running(server)).url
            model = served_model(url)
        bench(url, model, loads, sys.stdout, rows)
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    """0 where all kernels are within the limit, 1 where one is not."""
    settings = settings_from(args, host="127.0.0.1")
    logging.getLogger().setLevel(logging.WARNING)
    from model.doctor import kernel_errors, percent
    from service.loading import load_checkpoint

    checkpoint = load_checkpoint(settings)
    measured = kernel_errors(checkpoint.model, checkpoint.ops)
    print(f"{checkpoint.name}, {checkpoint.dtype}: {checkpoint.kernels}, against the reference")
    print(f"logits of the last {measured.num_rows} of {measured.num_tokens} random tokens, ", end="")
    print(f"standard deviation {measured.deviation:.3g}")
    print(f"\n{'kernels':<10}{'max |Δ logit|':>14}{'of the deviation':>18}")
    for kind, error in measured.errors.items():
        print(f"{kind:<10}{error:>14.3g}{percent(measured.share(kind)):>18}")
    print(f"{'limit':<10}{measured.limit * measured.deviation:>14.3g}{percent(measured.limit):>18}")
    faults = measured.faults()
    for fault in faults:
        print(f"banded: {fault}", file=sys.stderr)
    return 1 if faults else 0


def run_train(args: argparse.Namespace) -> int:
    import torch

    from model.config import DEMO
    from model.gpt import GPT
    from model.tokenizer import r50k_base
    from model.training.data import read_tokens
    from model.training.trainer import TrainingPlan, perplexity, train
    from model.weights import load_model, save_model

    tokenizer = r50k_base()
    tokens = read_tokens(args.corpus, tokenizer)
    held_out = read_tokens([args.valid], tokenizer) if args.valid else None
    plan = TrainingPlan(
        num_tokens=int(args.tokens), batch_tokens=args.batch_tokens, learning_rate=args.learning_rate, seed=args.seed
    )
    if args.init:
        model = load_model(args.init, torch.float32)
    else:
        model = GPT(DEMO)
        model.init_weights(plan.seed)
    logging.info("%d tokens of text; training on %d of them in %d steps", len(tokens), plan.num_tokens, plan.num_steps)
    train(model, tokens, plan, save=lambda model: save_model(args.out, model, torch.bfloat16), save_every=200)
    if held_out is not None:
        saved = load_model(args.out, torch.float32)  # what was written, rounded to 16 bits
        print(f"held-out perplexity {perplexity(saved, held_out):.2f} over {len(held_out)} tokens")
    return 0
