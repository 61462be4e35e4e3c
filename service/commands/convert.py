"""`banded convert`: weights that other programs wrote, as a directory that can be served."""

import argparse
from pathlib import Path

from service.commands.options import Commands


def add_convert(commands: Commands) -> None:
    command = commands.add_parser("convert", help="make a model directory of weights in another format")
    command.set_defaults(command=run_convert)
    command.add_argument(
        "source", type=Path, help="pytorch_model.bin, nanoGPT's ckpt.pt, llm.c's .bin, .gguf, or their directory"
    )
    command.add_argument("out", type=Path, help="the new directory: safetensors, config.json and the tokenizer's files")


def run_convert(args: argparse.Namespace) -> int:
    from model.checkpoint.convert import convert

    convert(args.source, args.out)
    print(f"{args.out} can be served: banded serve --model {args.out}")
    return 0
