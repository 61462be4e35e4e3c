"""`python -m tests.bench.perplexity TEXT [--model DIR] [--dtype bfloat16]`: perplexity of a model on a text file."""

import argparse
from pathlib import Path

import torch

from kernels import cpu
from model.training.data import read_tokens
from model.training.trainer import perplexity
from model.vocabulary import load_tokenizer
from model.weights import load_model
from service.loading import DTYPES, model_directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", choices=[*DTYPES, "int8"], default="float32")
    args = parser.parse_args()
    directory = model_directory(args.model)
    tokens = read_tokens([args.text], load_tokenizer(directory))
    model = load_model(directory, torch.bfloat16 if args.dtype == "int8" else DTYPES[args.dtype])
    if args.dtype == "int8":
        model.pack(cpu, quantize=True)
    print(f"perplexity {perplexity(model, tokens):.2f} over {len(tokens)} tokens, {args.dtype}")


if __name__ == "__main__":
    main()
