"""`banded doctor` and `banded plan`: are the kernels right, and what does a model need."""

import argparse
import logging
import sys
from pathlib import Path

from service.commands.options import Commands, add_model_options, positive, positive_number, settings_from


def add_doctor(commands: Commands) -> None:
    command = commands.add_parser("doctor", help="compare the kernels with the reference on a model's weights")
    command.set_defaults(command=run_doctor)
    add_model_options(command)


def run_doctor(args: argparse.Namespace) -> int:
    """0 if all kernels are within the limit, else 1."""
    settings = settings_from(args, host="127.0.0.1")
    logging.getLogger().setLevel(logging.WARNING)
    from model.doctor import kernel_errors, percent
    from service.engine.loading import load_checkpoint

    checkpoint = load_checkpoint(settings.engine)
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


def add_plan(commands: Commands) -> None:
    command = commands.add_parser("plan", help="what a model needs of GPUs, how fast they could be, what training costs")
    command.set_defaults(command=run_plan)
    command.add_argument("--model", default="gpt3-175b", help="gpt3-125m to gpt3-175b, demo, or a checkpoint directory")
    command.add_argument("--gpu", default="h100-80gb", help="(default %(default)s)")
    command.add_argument("--count", type=positive, default=8, help="GPUs that share the model (default %(default)d)")
    command.add_argument(
        "--prompt", type=positive, default=1024, help="tokens of the prompt that is timed (default %(default)d)"
    )
    command.add_argument("--train-tokens", type=positive_number, default=300e9, help="(default %(default)g)")
    command.add_argument(
        "--train-tflops", type=positive_number, default=28.0, help="reached by one GPU (default %(default)g)"
    )
    command.add_argument(
        "--train-price", type=positive_number, default=1.50, help="dollars per GPU and hour (default %(default).2f)"
    )


def run_plan(args: argparse.Namespace) -> int:
    from model.checkpoint.architectures import read_architecture
    from model.config import SIZES
    from service.tools.roofline import GPUS, Capacity, Training, report

    if args.gpu not in GPUS:
        raise ValueError(f"--gpu {args.gpu}: known are {', '.join(GPUS)}")
    config = SIZES[args.model] if args.model in SIZES else read_architecture(Path(args.model))[1]
    if args.prompt > config.n_positions:
        raise ValueError(f"--prompt {args.prompt}: the model's context is {config.n_positions} tokens")
    capacity = Capacity(config, GPUS[args.gpu], args.count)
    training = Training(tokens=args.train_tokens, flops=args.train_tflops * 1e12, dollars_per_hour=args.train_price)
    print(report(args.model, capacity, args.gpu, args.prompt, training))
    return 0
