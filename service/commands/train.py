"""`banded train` and `banded finetune`: weights and adapters from text files."""

import argparse
import io
import logging
import math
import os
from pathlib import Path

from service.commands.options import Commands, positive, positive_number

DEFAULT_RANK = 8


def add_train(commands: Commands) -> None:
    command = commands.add_parser("train", help="train a model on text files, from random parameters or from a checkpoint's")
    command.set_defaults(command=run_train)
    command.add_argument("corpus", nargs="+", type=Path, help="text; a line <|endoftext|> separates documents")
    command.add_argument("--out", type=Path, required=True, help="directory of the run: state, loss curve and model")
    command.add_argument("--resume", action="store_true", help="go on with the run in --out, with the same plan")
    command.add_argument("--size", default="demo", help="demo (default), or gpt3-125m to gpt3-175b with the paper's plan")
    command.add_argument("--init", type=Path, help="begin with the weights of this checkpoint, of whatever size")
    command.add_argument("--valid", type=Path, help="held-out text: loss in the curve, perplexity at the end")
    command.add_argument("--tokens", type=positive_number, help="tokens to train on; the phases of the plan stretch")
    command.add_argument(
        "--window", type=positive, help="tokens of the longest windows (default 2048, or the model's positions if fewer)"
    )
    command.add_argument(
        "--batch-tokens", type=positive, help="tokens in a batch, which then doesn't grow; whole windows, so perhaps fewer"
    )
    command.add_argument(
        "--micro-tokens",
        type=positive,
        help="tokens computed at a time, at least a window (default 4096, GPT-3's sizes 2048); a GPU wants more",
    )
    command.add_argument("--learning-rate", type=positive_number, help="highest rate")
    command.add_argument(
        "--batch-softmax",
        action="store_true",
        help="predict among the tokens computed at a time, not the whole vocabulary: faster, and enough for random words",
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default %(default)s)")
    command.add_argument("--save-every", type=positive_number, default=300, metavar="SECONDS", help="(default %(default)g)")


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
    if "WORLD_SIZE" in os.environ:  # torchrun started this process, one for every rank
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


def add_finetune(commands: Commands) -> None:
    command = commands.add_parser("finetune", help="teach a model completions of prompts: an adapter, or all its weights")
    command.set_defaults(command=run_finetune)
    command.add_argument("examples", type=Path, help='JSONL, lines {"prompt": ..., "completion": ...}')
    command.add_argument("--model", default="demo", help="'demo' (default) or a checkpoint directory")
    command.add_argument("--out", type=Path, required=True, help="directory of the run: state, loss curve and result")
    command.add_argument("--resume", action="store_true", help="go on with the run in --out")
    command.add_argument("--valid", type=Path, metavar="JSONL", help="held-out examples, whose loss is shown")
    command.add_argument("--full", action="store_true", help="change all weights instead of adding a low-rank adapter")
    command.add_argument("--rank", type=positive, help=f"of the adapter (default {DEFAULT_RANK})")
    command.add_argument("--targets", nargs="+", help="linears with an adapter: c_attn, c_proj, c_fc (default: all)")
    command.add_argument("--epochs", type=positive, default=4, help="(default %(default)d)")
    command.add_argument("--batch", type=positive, default=8, help="examples in a batch (default %(default)d)")
    command.add_argument("--learning-rate", type=positive_number, help="highest rate (default 1e-3; 1e-4 with --full)")
    command.add_argument("--report", type=Path, help="write counts and advice to this JSON file before training begins")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default %(default)s)")


def run_finetune(args: argparse.Namespace) -> int:
    import torch

    from model.checkpoint.vocabulary import load_tokenizer
    from model.checkpoint.weights import load_model, weights_digest
    from model.lora import TARGETS, AdapterConfig
    from model.training.examples import advice, encode, read_examples
    from model.training.finetune import completion_loss, finetune, finetuning_plan
    from model.training.records import DataReport, FileReport
    from service.engine.loading import choose_device, model_directory
    from service.engine.process import keep_freed_memory

    keep_freed_memory()
    if args.full and (args.rank or args.targets):
        raise ValueError("--full changes all weights: --rank and --targets are of an adapter")
    rank, targets = args.rank or DEFAULT_RANK, tuple(args.targets or TARGETS)
    adapter = None if args.full else AdapterConfig(rank, 2.0 * rank, targets)
    files = [args.examples, args.valid] if args.valid else [args.examples]
    examples = [list(read_examples(io.BytesIO(path.read_bytes()), path.name)) for path in files]
    advices = list(map(advice, examples))
    for path, lines in zip(files, advices, strict=True):
        for line in lines:
            logging.warning("%s: %s", path.name, line)
    directory = model_directory(args.model)
    model = load_model(directory, torch.float32).to(choose_device(args.device))
    tokenizer = load_tokenizer(directory)
    encoded = [list(encode(some, tokenizer, model.config.n_positions)) for some in examples]
    plan = finetuning_plan(
        encoded[0],
        epochs=args.epochs,
        batch=args.batch,
        learning_rate=(1e-4 if args.full else 1e-3) if args.learning_rate is None else args.learning_rate,
        seed=args.seed,
    )
    if args.report:
        found = [
            FileReport(len(some), sum(len(example.inputs) for example in some), lines)
            for some, lines in zip(encoded, advices, strict=True)
        ]
        DataReport(found, plan.num_updates).write(args.report)
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
        save_every=60.0 if adapter is None else 5.0,  # an adapter is quickly written
        origin=directory,
    )
    if loss is not None:
        print(f"held-out loss after: {loss:.4f}")
    return 0
