"""The attacks of before_the_key at a hundredth of their size, on a server in this process: what each is answered."""

import json
import time

import pytest

from service.api import gate
from tests.attacks.before_the_key import ATTACKS, KEY, Target, leave
from tests.service.api.listening import listening
from tests.service.helpers import run

# How what the client says of its end begins.
OUTCOMES = {
    "header_without_end": "431 after",
    "many_short_headers": "431 after",
    "line_without_end": "414 after",
    "upgrade_without_end": "431 after",
    "blank_lines": "414 after",
    "tunnel": "400 after",
    # Without a key the answer does not wait for the body.
    "chunk_extension_without_end": "401 after",
    "trailer_without_end": "401 after",
    "tiny_chunks": "401 after",
    "silent": "50 408",
    "slow_heads": "10 408",
    "slow_bodies": "10 401",
    "slow_chunks": "10 401",
    "idle": "50 of 50 still open",
    "many_connections_with_headers": "10 of 10 ended by the server",
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_an_attack_ends_as_it_should(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.3)

    async def test() -> None:
        async with listening(api_keys=(KEY,)) as running:
            outcome = await ATTACKS[name](Target("127.0.0.1", running.port), 0.01)
            assert outcome.startswith(OUTCOMES[name]), outcome
            assert not running.fake.runner.steps
            assert (await running.client.get("/health/live")).status_code == 200

    run(test)


def test_what_is_pipelined_is_read_no_further_than_its_answers_are() -> None:
    async def test() -> None:
        async with listening(api_keys=(KEY,)) as running:
            target = Target("127.0.0.1", running.port)
            before = running.server.server_state.total_requests
            assert (await ATTACKS["pipelined"](target, 0.1)).startswith("not read after")
            assert running.server.server_state.total_requests - before < 5000
            assert (await running.client.get("/health/live")).status_code == 200

    run(test)


def test_clients_that_pipeline_two_answers_and_leave_free_their_sequences() -> None:
    async def test() -> None:
        async with listening(api_keys=(KEY,)) as running:

            async def is_busy() -> bool:
                return not running.fake.scheduler.idle

            body = json.dumps({"model": "fake", "prompt": "a", "max_tokens": 250}).encode()
            running.fake.runner.fault = lambda step: time.sleep(0.02)
            assert await leave(Target("127.0.0.1", running.port), 4, body, is_busy) < 2
            assert running.fake.metric("requests_total", outcome="abort") == 4

    run(test)
