"""`banded complete`: a completion on the terminal, without a server."""

import argparse
import asyncio
import logging

from service.commands.options import Commands, add_model_options, settings_from
from service.settings import Settings


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
    # Nothing listens, so no host is refused; and a server may be using the data directory.
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

    # The options have the bounds of the API.
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
