"""`banded serve`: the composition root of the server."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections import Counter
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

from service.commands.options import Commands, add_model_options, settings_from
from service.engine.options import NOBODY
from service.settings import Settings, read_key

if TYPE_CHECKING:
    from fastapi import FastAPI


log = logging.getLogger("banded")


def add_serve(commands: Commands) -> None:
    command = commands.add_parser("serve", help="serve a model over HTTP")
    command.set_defaults(command=run_serve)
    add_model_options(command)
    command.add_argument("--name", action="append", dest="names", help="the name it is served under; once more: an alias")
    command.add_argument("--host")
    command.add_argument("--port", type=int)
    flag: dict[str, Any] = {"action": "store_const", "const": True}  # None unless it is given: see settings_from
    command.add_argument("--allow-unauthenticated", **flag)
    command.add_argument("--doctor", **flag, help="check the kernels first, as `banded doctor` does")
    command.add_argument("--lenient", **flag, help="warn of fields without an effect instead of refusing the request")
    command.add_argument("--metrics-alias", help="vllm: export vLLM's metric names too")
    command.add_argument("--data-dir", help="keep files and fine-tuning jobs there; without it there are none")
    command.add_argument(
        "--adapter",
        action="append",
        dest="adapters",
        metavar="NAME=DIR",
        help="serve the model with the adapter that `banded finetune` or PEFT wrote to DIR, as NAME",
    )


def run_serve(args: argparse.Namespace) -> int:
    # The first process of a container has no default handlers, so it would ignore SIGTERM until the server runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    settings = settings_from(args)
    from service.api.server import Server, serve
    from service.engine.process import share_freed_memory
    from service.engine.workers import drop_waiting

    share_freed_memory()
    server = Server(lambda: load_app(settings), settings)
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:  # uvloop, if it is installed
        status = runner.run(serve(server))
    drop_waiting()
    if server.is_loading or (server.engine and server.engine.hangs):
        # Leaving the interpreter while one of its threads is inside a kernel would abort the process.
        logging.shutdown()
        os._exit(status)
    return status


def log_names(settings: Settings) -> None:
    """So that a key of before keys had names, which has a colon, is not taken for one of a name unnoticed."""
    keys = Counter(owner for owner, _ in map(read_key, settings.api_keys))
    if keys.keys() - {NOBODY}:
        log.info("keys: %s", ", ".join(f"{count} of {owner or 'nobody'}" for owner, count in keys.items()))


def load_app(settings: Settings) -> "FastAPI":
    """The application over the model that the settings name. This is the slow part of starting a server."""
    from service.api.app import create_app
    from service.engine.loading import load_served, model_directory, served_name
    from service.engine.metrics import Metrics
    from service.engine.process import freeze_loaded_objects
    from service.jobs.runner import Jobs
    from service.jobs.store import Store

    name = served_name(settings.model, settings.names)
    metrics = Metrics(name)
    log_names(settings)
    with ExitStack() as opened:
        store = opened.enter_context(closing(Store(settings.data_dir))) if settings.data_dir else None
        for owner, count in store.unseen(settings.owners).items() if store else ():
            log.warning("%d files and jobs of %s are kept, but no key sees them", count, owner or "nobody")
        models = load_served(settings.engine, metrics, store.results(name, settings.owners) if store else ())
        jobs = Jobs(store, models, model_directory(settings.model), settings.owners) if store else None
        app = create_app(models, metrics, settings, jobs)
        opened.pop_all()  # from here on the jobs close the store, when the application ends
    app.openapi()  # kept from here on: it takes half a second, in which nothing else would be answered
    freeze_loaded_objects()
    return app
