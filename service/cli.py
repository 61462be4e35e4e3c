"""`banded serve | complete | bench | doctor | train | finetune | evaluate | plan`: the composition root.

A command imports what it needs when it runs.
"""

import argparse
import asyncio
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from service.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

DEFAULT_RANK = 8
DEFAULT_SHOTS = (0, 1, 4, 16)


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
    serve.add_argument("--data-dir", help="keep files and fine-tuning jobs there; without it there are none")
    serve.add_argument(
        "--adapter",
        action="append",
        dest="adapters",
        metavar="NAME=DIR",
        help="serve the model with the adapter that `banded finetune` wrote to DIR, as NAME",
    )
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

    train = commands.add_parser("train", help="train a model on text files, from random parameters or from a checkpoint's")
    train.add_argument("corpus", nargs="+", type=Path, help="text; a line <|endoftext|> separates documents")
    train.add_argument("--out", type=Path, required=True, help="directory of the run: state, loss curve and model")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out, with the same plan")
    train.add_argument("--size", default="demo", help="demo (default), or gpt3-125m to gpt3-175b with the paper's plan")
    train.add_argument("--init", type=Path, help="begin with the weights of this checkpoint, of whatever size")
    train.add_argument("--valid", type=Path, help="held-out text: loss in the curve, perplexity at the end")
    train.add_argument("--tokens", type=positive_number, help="tokens to train on; the phases of the plan stretch")
    train.add_argument(
        "--window", type=positive, help="tokens of the longest windows (default 2048, or the model's positions if fewer)"
    )
    train.add_argument(
        "--batch-tokens", type=positive, help="tokens in a batch, which then doesn't grow; whole windows, so perhaps fewer"
    )
    train.add_argument(
        "--micro-tokens",
        type=positive,
        help="tokens computed at a time, at least a window (default 4096, GPT-3's sizes 2048); a GPU wants more",
    )
    train.add_argument("--learning-rate", type=positive_number, help="highest rate")
    train.add_argument(
        "--batch-softmax",
        action="store_true",
        help="predict among the tokens computed at a time, not the whole vocabulary: faster, and enough for random words",
    )
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default %(default)s)")
    train.add_argument("--save-every", type=positive_number, default=300, metavar="SECONDS", help="(default %(default)g)")
    train.set_defaults(command=run_train)
    finetune = commands.add_parser("finetune", help="teach a model completions of prompts: an adapter, or all its weights")
    finetune.add_argument("examples", type=Path, help='JSONL, lines {"prompt": ..., "completion": ...}')
    finetune.add_argument("--model", default="demo", help="'demo' (default) or a checkpoint directory")
    finetune.add_argument("--out", type=Path, required=True, help="directory of the run: state, loss curve and result")
    finetune.add_argument("--resume", action="store_true", help="go on with the run in --out")
    finetune.add_argument("--valid", type=Path, metavar="JSONL", help="held-out examples, whose loss is shown")
    finetune.add_argument("--full", action="store_true", help="change all weights instead of adding a low-rank adapter")
    finetune.add_argument("--rank", type=positive, help=f"of the adapter (default {DEFAULT_RANK})")
    finetune.add_argument("--targets", nargs="+", help="linears with an adapter: c_attn, c_proj, c_fc (default: all)")
    finetune.add_argument("--epochs", type=positive, default=4, help="(default %(default)d)")
    finetune.add_argument("--batch", type=positive, default=8, help="examples in a batch (default %(default)d)")
    finetune.add_argument("--learning-rate", type=positive_number, help="highest rate (default 1e-3; 1e-4 with --full)")
    finetune.add_argument("--report", type=Path, help="write counts and advice to this JSON file before training begins")
    finetune.add_argument("--seed", type=int, default=0)
    finetune.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default %(default)s)")
    finetune.set_defaults(command=run_finetune)

    evaluate = commands.add_parser("evaluate", help="perplexity on a text, accuracy on few-shot tasks")
    add_model_options(evaluate)
    evaluate.add_argument("--url", help="evaluate the server there, and of its models --model (default: the first)")
    evaluate.add_argument("--text", type=Path, help="file whose perplexity and bits per byte are measured")
    evaluate.add_argument("--few-shot", type=Path, metavar="JSONL", help='lines {"input": ..., "output": ..., "task": ...}')
    evaluate.add_argument("--examples", type=Path, metavar="JSONL", help="where examples come from (default: --few-shot)")
    evaluate.add_argument("--shots", type=int, nargs="+", help="examples in a prompt (default: 0, 1, 4 and 16)")
    evaluate.add_argument("--json", type=Path, help="write the results to this file too")
    evaluate.set_defaults(command=run_evaluate)

    plan = commands.add_parser("plan", help="what a model needs of GPUs, how fast they could be, what training costs")
    plan.add_argument("--model", default="gpt3-175b", help="gpt3-125m to gpt3-175b, demo, or a checkpoint directory")
    plan.add_argument("--gpu", default="h100-80gb", help="(default %(default)s)")
    plan.add_argument("--count", type=positive, default=8, help="GPUs that share the model (default %(default)d)")
    plan.add_argument(
        "--prompt", type=positive, default=1024, help="tokens of the prompt that is timed (default %(default)d)"
    )
    plan.add_argument("--train-tokens", type=positive_number, default=300e9, help="(default %(default)g)")
    plan.add_argument("--train-tflops", type=positive_number, default=28.0, help="reached by one GPU (default %(default)g)")
    plan.add_argument(
        "--train-price", type=positive_number, default=1.50, help="dollars per GPU and hour (default %(default).2f)"
    )
    plan.set_defaults(command=run_plan)
    return root


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
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
    from service.api.server import Server, serve

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
    from service.engine.loading import load_served, model_directory, served_name
    from service.engine.metrics import Metrics
    from service.engine.process import freeze_loaded_objects
    from service.jobs.runner import Jobs
    from service.jobs.store import Store

    name = served_name(settings.model)
    metrics = Metrics(name)
    with ExitStack() as opened:
        store = opened.enter_context(closing(Store(settings.data_dir))) if settings.data_dir else None
        models = load_served(settings, metrics, store.results(name) if store else ())
        jobs = Jobs(store, models, model_directory(settings.model)) if store else None
        app = create_app(models, metrics, settings, jobs)
        opened.pop_all()  # the jobs close the store when the application ends
    freeze_loaded_objects()
    return app


def run_complete(args: argparse.Namespace) -> int:
    # Nothing listens, so the address doesn't matter; a server may have the directory.
    settings = settings_from(args, host="127.0.0.1", data_dir=None)
    logging.getLogger().setLevel(logging.WARNING)
    return asyncio.run(complete_on_terminal(args, settings))


async def complete_on_terminal(args: argparse.Namespace, settings: Settings) -> int:
    from contextlib import aclosing

    from service.api.schema.completions import CompletionRequest
    from service.engine.engine import EngineError
    from service.engine.loading import load_served
    from service.engine.metrics import Metrics
    from service.engine.models import choice_requests
    from service.engine.prompts import text_prompt

    # The bounds of the options are those of the API.
    given = {name: value for name, value in vars(args).items() if name in CompletionRequest.model_fields}
    body = CompletionRequest.model_validate(given | {"model": settings.model})
    served = load_served(settings, Metrics("terminal")).base
    prompt = text_prompt(args.prompt, served.tokenizer, allow_special=False)
    num_prompt = len(prompt.tokens)
    room = served.config.n_positions - num_prompt
    if body.max_tokens > room:
        raise ValueError(f"--max-tokens {body.max_tokens}: the prompt's {num_prompt} tokens leave room for {max(room, 0)}")
    requests = choice_requests(body, [prompt], served, max_tokens=body.max_tokens, num_candidates=1)
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


@contextmanager
def reachable(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Address and model: of the server at --url, or of one that runs meanwhile."""
    from service.tools.bench import banded, base_url, running, served_model

    if args.url and (args.dtype or args.device):
        raise ValueError("--dtype and --device say how a server is started; the one at --url runs already")
    if args.url:
        url = base_url(args.url)
        yield url, args.model or served_model(url)
        return
    # Without a handler the server would outlive this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    settings = settings_from(args, host="127.0.0.1")
    with running(banded(settings.model, "--dtype", settings.dtype, "--device", settings.device)) as server:
        yield server.url, served_model(server.url)


def run_bench(args: argparse.Namespace) -> int:
    from service.tools.bench import Workload, bench

    if args.requests and args.requests < max(args.streams):
        raise ValueError(f"--requests {args.requests} can't keep {max(args.streams)} streams in flight")
    loads = [Workload(streams, args.requests or max(3, 2 * streams), args.prompt, args.output) for streams in args.streams]
    with ExitStack() as stack:
        rows = stack.enter_context(args.csv.open("w", newline="")) if args.csv else None
        url, model = stack.enter_context(reachable(args))
        bench(url, model, loads, sys.stdout, rows)
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    """0 where all kernels are within the limit, 1 where one is not."""
    settings = settings_from(args, host="127.0.0.1")
    logging.getLogger().setLevel(logging.WARNING)
    from model.doctor import kernel_errors, percent
    from service.engine.loading import load_checkpoint

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
    import torch.distributed as dist

    from model.checkpoint.tokenizer import r50k_base
    from model.checkpoint.vocabulary import load_tokenizer
    from model.checkpoint.weights import load_model
    from model.gpt import GPT
    from model.training.data import read_tokens
    from model.training.plans import plan_for, size
    from model.training.run import STATE_FILE, train
    from service.engine.loading import choose_device
    from service.engine.process import keep_freed_memory

    keep_freed_memory()
    config, device = size(args.size), choose_device(args.device)
    if args.init:
        model, tokenizer = load_model(args.init, torch.float32), load_tokenizer(args.init)
    else:
        model, tokenizer = GPT(config), r50k_base()
        model.init_weights(args.seed)
    plan = plan_for(
        args.size,
        model.config.n_positions,
        num_tokens=None if args.tokens is None else int(args.tokens),
        window=args.window,
        batch=args.batch_tokens,
        learning_rate=args.learning_rate,
        micro_tokens=args.micro_tokens,
        batch_softmax=args.batch_softmax,
        seed=args.seed,
    )
    held_out = read_tokens([args.valid], tokenizer) if args.valid else None
    if "WORLD_SIZE" in os.environ:  # torchrun started this, once for every rank
        dist.init_process_group("gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    try:
        loss = train(
            args.out,
            model.to(device),
            plan,
            args.corpus,
            tokenizer,
            held_out=held_out,
            resume=args.resume,
            save_every=args.save_every,
            origin=args.init,
        )
    except KeyboardInterrupt:
        logging.info("stopped; --resume goes on from %s", args.out / STATE_FILE)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if held_out is not None and loss is not None:
        print(f"held-out perplexity {math.exp(loss):.2f} over {len(held_out)} tokens")
    return 0


def run_finetune(args: argparse.Namespace) -> int:
    import torch

    from model.checkpoint.vocabulary import load_tokenizer
    from model.checkpoint.weights import load_model, weights_digest, write_atomically
    from model.lora import TARGETS, AdapterConfig
    from model.training.finetune import advice, completion_loss, encode, finetune, finetuning_plan, read_examples
    from service.engine.loading import choose_device, model_directory
    from service.engine.process import keep_freed_memory

    keep_freed_memory()
    if args.full and (args.rank or args.targets):
        raise ValueError("--full changes all weights: --rank and --targets are of an adapter")
    rank, targets = args.rank or DEFAULT_RANK, tuple(args.targets or TARGETS)
    adapter = None if args.full else AdapterConfig(rank, 2.0 * rank, targets)
    files = [args.examples, args.valid] if args.valid else [args.examples]
    examples = [read_examples(path) for path in files]
    advices = list(map(advice, examples))
    for path, lines in zip(files, advices, strict=True):
        for line in lines:
            logging.warning("%s: %s", path.name, line)
    directory = model_directory(args.model)
    model = load_model(directory, torch.float32).to(choose_device(args.device))
    tokenizer = load_tokenizer(directory)
    encoded = [encode(some, tokenizer, model.config.n_positions) for some in examples]
    plan = finetuning_plan(
        encoded[0],
        epochs=args.epochs,
        batch=args.batch,
        learning_rate=(1e-4 if args.full else 1e-3) if args.learning_rate is None else args.learning_rate,
        seed=args.seed,
    )
    if args.report:
        found = [
            {"examples": len(some), "tokens": sum(len(example.inputs) for example in some), "advice": lines}
            for some, lines in zip(encoded, advices, strict=True)
        ]
        updates = math.ceil(plan.num_tokens / plan.batch)
        write_atomically(args.report, json.dumps({"files": found, "updates": updates}).encode())
    held_out = encoded[1] if args.valid else []
    if held_out and not args.resume:
        print(f"held-out loss before: {completion_loss(model, held_out):.4f}")
    loss = finetune(
        args.out,
        model,
        encoded[0],
        plan,
        base=weights_digest(directory),
        adapter=adapter,
        held_out=held_out,
        resume=args.resume,
        save_every=60.0 if adapter is None else 5.0,  # an adapter is soon written
        origin=directory,
    )
    if loss is not None:
        print(f"held-out loss after: {loss:.4f}")
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    from service.tools.evaluate import RemoteModel, few_shot_accuracy, few_shot_questions, perplexity, read_items, read_text

    if not (args.text or args.few_shot):
        raise ValueError("nothing to evaluate: give --text, --few-shot or both")
    if not args.few_shot and (args.examples or args.shots):
        raise ValueError("--examples and --shots are for --few-shot")
    shots = sorted(set(args.shots or DEFAULT_SHOTS))
    if shots[0] < 0:
        raise ValueError(f"--shots {shots[0]}: examples can't be fewer than none")
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no such directory")
    text = read_text(args.text) if args.text else None
    questions = []
    if args.few_shot:
        items = read_items(args.few_shot)
        questions = few_shot_questions(items, read_items(args.examples) if args.examples else items, shots)
    results: dict[str, Any] = {}
    with reachable(args) as (url, model):
        served = RemoteModel(url, model)
        results["model"] = model
        if text is not None:
            found = results["text"] = perplexity(served, text).report()
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


def run_plan(args: argparse.Namespace) -> int:
    from model.checkpoint.weights import read_config
    from model.config import SIZES
    from service.tools.roofline import GPUS, Capacity, Training, report

    if args.gpu not in GPUS:
        raise ValueError(f"--gpu {args.gpu}: known are {', '.join(GPUS)}")
    config = SIZES[args.model] if args.model in SIZES else read_config(Path(args.model))
    if args.prompt > config.n_positions:
        raise ValueError(f"--prompt {args.prompt}: the model's context is {config.n_positions} tokens")
    capacity = Capacity(config, GPUS[args.gpu], args.count)
    training = Training(tokens=args.train_tokens, flops=args.train_tflops * 1e12, dollars_per_hour=args.train_price)
    print(report(args.model, capacity, args.gpu, args.prompt, training))
    return 0
