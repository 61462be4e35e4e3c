"""The command line, `banded COMMAND`. The commands are in service/commands; each imports what it needs when it runs."""

import argparse
import logging
import os
import sys
from pathlib import Path

from pydantic import ValidationError

from service.commands import complete, convert, inspect, measure, serve, train
from service.jobs.disk import FULL


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status. An error that the user can fix is one line on stderr and status 2.

    A full disk has the status 75 (EX_TEMPFAIL in sysexits.h): the same command may succeed later.
    """
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        check_package()
        return args.command(args)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        print(f"banded: {field + ': ' if field else ''}{first['msg'].removeprefix('Value error, ')}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"banded: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL if isinstance(error, OSError) and error.errno in FULL else 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="banded", description="Serve GPT-3-style decoders over the Completions API.")
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    serve.add_serve(commands)
    complete.add_complete(commands)
    measure.add_bench(commands)
    inspect.add_doctor(commands)
    train.add_train(commands)
    train.add_finetune(commands)
    measure.add_evaluate(commands)
    inspect.add_plan(commands)
    convert.add_convert(commands)
    return root


def check_package() -> None:
    """Banded's folders are its import names, so a foreign package of the same name could be imported instead."""
    import kernels
    import model

    root = Path(__file__).resolve().parent.parent
    for package in (kernels, model):
        found = Path(str(package.__file__)).resolve().parent
        if found.parent != root:
            raise ValueError(f"the package '{package.__name__}' in {found} is not Banded's; use an environment of its own")
