"""`python -m tests.attacks.poisoned_server WHEN serve ...`: `banded serve` of which steps raise: see PoisonedRunner."""

import sys
from typing import Any
from unittest.mock import patch

from service.cli import main
from service.engine import loading
from service.engine.engine import Engine
from tests.service.engine.poison import PoisonedRunner


def poisoned(when: str, arguments: list[str]) -> int:
    def engine(runner: Any, *others: Any, **options: Any) -> Engine:
        return Engine(PoisonedRunner(runner, when), *others, **options)

    with patch.object(loading, "Engine", engine):
        return main(arguments)


if __name__ == "__main__":
    sys.exit(poisoned(sys.argv[1], sys.argv[2:]))
