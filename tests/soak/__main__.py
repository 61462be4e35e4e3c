"""`python -m tests.soak --seconds 600`: three rounds at three times what a server can do, with clients that misbehave.

One server runs all the time, on a copy of the embedded model that has a chat template and an insertion format of its own.
After each round, when all clients have gone, nothing of them may be left: no page, row, descriptor, thread or task, and no
more memory. Seeded requests are answered by the quiet server first, and again among the load and after it, each time with
the same texts, tokens and logprobs. Exits with 1 where that, or a status, or a line of the log, is not as it should be.
"""

import argparse
import asyncio
import json
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from tests.serving import PATIENCE, Served, banded_serve
from tests.soak.cases import ENDLESS, RAISING, Cases, seeded
from tests.soak.clients import Clients
from tests.soak.judge import Probe, Sample, bad_lines, missed, table

DEMO = Path(__file__).parents[2] / "model" / "data" / "demo"
ROUNDS = 3
OVERLOAD = 3.0  # times what the server can do
NUM_SEEDED = 60
MODEL = "soaked"
# Two names, one of them with two keys, and a key of nobody's.
KEYS = ("sk-1", "sk-2", "sk-3", "sk-4")
# A server as it is deployed, but small, so that rows, pages and the queue are all short: four contexts of pages, eight rows.
MAX_SLOTS, MAX_QUEUE = 8, 24
ENVIRONMENT = {
    "BANDED_API_KEYS": "alice:sk-1,alice:sk-2,bob:sk-3,sk-4",
    "BANDED_MAX_SLOTS": str(MAX_SLOTS),
    "BANDED_MAX_QUEUE": str(MAX_QUEUE),
    "BANDED_QUEUE_TIMEOUT": "10",
    "BANDED_KV_BYTES": str(40 << 20),
    "OMP_WAIT_POLICY": "PASSIVE",  # clients share the cores
    # Python's own pools come by the megabyte, and one object keeps one. From malloc its objects are counted, and returned.
    "PYTHONMALLOC": "malloc",
    "PYTHONWARNINGS": "default::ResourceWarning",
}
TEMPLATE = (
    "{% for message in messages %}"
    "{% if '" + RAISING + "' in message.content %}{{ raise_exception('as asked') }}{% endif %}"
    "{% if '" + ENDLESS + "' in message.content %}{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}"
    "{% endfor %}{% endif %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def checkpoint(folder: Path) -> Path:
    """The embedded model with a template that runs in a process of its own."""
    directory = folder / MODEL
    shutil.copytree(DEMO, directory)
    (directory / "banded.json").write_text(json.dumps({"chat_template": TEMPLATE, "insertion": "{prompt}[{suffix}]"}))
    return directory


class Soak:
    """A server under soak. `samples` are of the idle server, the first one before the first round."""

    def __init__(self, served: Served, told: Path, seed: int, *, num_seeded: int, trains: bool):
        port = urlsplit(served.url).port or 0
        cases = self._cases = Cases(seed, MODEL, KEYS, most_choices=MAX_SLOTS + MAX_QUEUE)
        self.clients = Clients(port, cases, seed)
        self.samples: list[Sample] = []
        self.outcomes: list[str] = []
        self._probe = Probe(served.process.pid, port, told, KEYS[0])
        self._seeded = seeded(cases, seed, num_seeded)
        self._trains = trains
        self.rate = 0.0

    async def prepare(self, seconds: float) -> None:
        """Expect the answers of the quiet server, and measure what it can do."""
        clients = self.clients
        await clients.expect(self._seeded)
        for case in self._cases.of_each_size():
            await clients.serve(case, random.Random(0))
        await self._train("first")
        self.rate = OVERLOAD * await clients.saturate("saturated", 2 * MAX_SLOTS, seconds)
        await clients.tidy()
        self.samples.append(await self._probe.settled([]))
        clients.outcomes.clear()

    async def _train(self, name: str) -> None:
        if self._trains:
            await self.clients.train(name, MODEL)

    async def round(self, number: int, seconds: float) -> None:
        clients, name, compared = self.clients, f"round {number}", self.clients.num_compared
        end = time.monotonic() + seconds
        await asyncio.gather(
            clients.flood(name, self.rate, seconds),
            self._train(name),
            clients.compare(name, self._seeded, 2, until=end),
        )
        await clients.compare(f"after {name}", self._seeded, 4)
        await clients.tidy()
        self.samples.append(await self._probe.settled(self.samples))
        told = ", ".join(f"{kind}: {count}" for kind, count in sorted(clients.outcomes.items()))
        self.outcomes.append(f"{name}: {told}; {clients.num_compared - compared} answers compared")
        clients.outcomes.clear()


async def soak(running: Soak, seconds: float, rounds: int) -> None:
    await running.prepare(max(1.0, seconds / 30))
    print(f"offered {running.rate:.1f} visits a second", flush=True)
    for number in range(1, rounds + 1):
        await running.round(number, seconds / rounds)
        print(running.outcomes[-1], flush=True)


def run(seconds: float, seed: int, *, rounds: int = ROUNDS, num_seeded: int = NUM_SEEDED, trains: bool = True) -> list[str]:
    """Soak a server of its own. Prints what happened; returns what was missed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log, told, data = folder / "log", folder / "told", folder / "data"
        command = (sys.executable, "-m", "tests.soak.server", str(told), "serve")
        environment = ENVIRONMENT | {"PYTHONPATH": os.getcwd()}
        options = ("--data-dir", str(data), "--dtype", "auto")
        with banded_serve(checkpoint(folder), log, *options, command=command, **environment) as served:
            running = Soak(served, told, seed, num_seeded=num_seeded, trains=trains)
            try:
                asyncio.run(soak(running, seconds, rounds))
                found = [*running.clients.faults]
            except (OSError, TimeoutError) as error:
                found = [*running.clients.faults, f"the server can't be reached: {error!r}"]
            if served.process.poll() is None:
                served.process.send_signal(signal.SIGTERM)
            if status := served.process.wait(timeout=PATIENCE):
                found.append(f"the server ended with status {status}")
        found += missed(running.samples)
        found += [f"log: {line}" for line in bad_lines(log.read_text())]
        found += [f"left behind: {path}" for path in data.rglob("*.tmp*")]
    print("\n".join(table(running.samples)))
    print(f"{running.clients.num_compared} answers to {num_seeded} requests compared with those of the quiet server")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="of all rounds together")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    found = run(arguments.seconds, arguments.seed)
    print("\n".join(f"MISSED: {line}" for line in found) or "held")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
