"""`banded complete`: a completion on the terminal, without a server."""

import argparse
import logging
from contextlib import closing
from itertools import chain

from service.commands.options import Commands, add_model_options, settings_from


def add_complete(commands: Commands) -> None:
    command = commands.add_parser("complete", help="complete a prompt on the terminal, without a server")
    command.set_defaults(command=run_complete)
    command.add_argument("prompt")
    add_model_options(command)
    command.add_argument("--max-tokens", type=int, default=60)
    command.add_argument("--temperature", type=float, default=0.8)
    command.add_argument("--top-p", type=float, default=0.95)
    command.add_argument("--seed", type=int)


def run_complete(args: argparse.Namespace) -> int:
    from service import LLM, EngineError, SamplingParams
    from service.llm import SETTINGS

    settings = settings_from(args, host="127.0.0.1", data_dir=None)  # refuses what the environment has wrong
    logging.getLogger().setLevel(logging.WARNING)
    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    given = {name: getattr(settings, name) for name in SETTINGS}
    with LLM(settings.model, adapters=settings.adapters, **given) as llm, closing(llm.stream(args.prompt, params)) as pieces:
        try:
            first = next(pieces, "")  # a request that is refused is refused here, ahead of any output
            for piece in chain((args.prompt, first), pieces):
                print(piece, end="", flush=True)
        except EngineError as error:
            raise ValueError(str(error)) from error
    print()
    return 0
