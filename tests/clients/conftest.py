"""One server for all clients."""

from collections.abc import Iterator

import pytest

from tests.model.checkpoint.checkpoints import tiny
from tests.serving import Served, banded_serve


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    checkpoint = tiny("banded", tmp_path_factory.mktemp("model"), vocab_size=50257, n_positions=2048, n_layer=2)
    with banded_serve(checkpoint, tmp_path_factory.mktemp("server") / "log") as server:
        yield server
