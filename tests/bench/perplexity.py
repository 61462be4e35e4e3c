"""`python -m tests.bench.perplexity TEXT [--model DIR] [--dtype bfloat16]`: perplexity of a model on a text file."""

import argparse
from pathlib import Path

from model.training.data import read_tokens
from model.training.trainer import perplexity
from model.vocabulary import load_tokenizer
from model.weights import load_model
from service.loading import DTYPES, model_directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    args = parser.parse_args()
    directory = model_directory(args.model)
    tokens = read_tokens([args.text], load_tokenizer(directory))
    model = load_model(directory, DTYPES[args.dtype])
    print(f"perplexity {perplexity(model, tokens):.2f} over {len(tokens)} tokens, {args.dtype}")


if __name__ == "__main__":
    main()
