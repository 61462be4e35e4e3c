"""Options that several commands share, and the settings made from them."""

import argparse
import logging
import math
import os
from typing import Any, TypeAlias

from service.settings import Settings, service_variables

log = logging.getLogger("banded")

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


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
    """Settings from the environment, overridden by the given options and by `fixed`.

    Variables of a Service in Kubernetes are left out, with a line in the log. Raises ValueError for any other BANDED_
    variable that is not a setting: a misspelt limit must not be ignored.
    """
    prefix = str(Settings.model_config["env_prefix"])
    if left_out := service_variables(os.environ):
        log.info("left out, since Kubernetes sets them for a Service: %s", ", ".join(left_out))
    others = os.environ.keys() - set(left_out)
    unknown = [
        name for name in others if name.startswith(prefix) and name[len(prefix) :].lower() not in Settings.model_fields
    ]
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no such setting; there are {', '.join(Settings.model_fields)}")
    given = {name: value for name, value in vars(args).items() if name in Settings.model_fields and value is not None}
    return Settings(**given | fixed)
