"""What a server has left when it has nothing to do, and whether that is too much."""

import asyncio
import json
import os
import re
import resource
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tests.soak.wire import Connection, Request, post

SETTLE_SECONDS = 45.0  # in which a server has to become idle
# Bytes by which the resident memory at the end of the last round may be above the highest that any earlier round ended with.
# Of pages that are partly free some stay, so it goes up and down by a few MB. A round of three that take 600 seconds has
# 7500 visits and more: 0.8 kB kept of each would be a miss.
MEMORY = 6 << 20
# The same of what malloc has given out, Python's objects included, which is exact: 0.5 kB of each visit.
ALLOCATED = 4 << 20
# Threads that wait for work in pools, which grow to these sizes as they are needed and never shrink.
POOLS = {"large-request": 4, "uvloop": (os.cpu_count() or 1) + 4}
# anyio's threads end when another has work and they have had none for ten seconds. Reading a static file is such work.
STATIC = "/static-offline-docs/swagger-ui.css"
# A step lets go of what a thread that was put aside might still read of the step before: up to MAX_KEPT bytes of tensors.
SHORT = {"prompt": "a", "max_tokens": 1}
# What a log may not have.
BAD_LINES = re.compile(
    r"Traceback|Exception ignored|never retrieved|never awaited|was destroyed|ResourceWarning|RuntimeWarning"
    r"|page accounting|unexpected error|step loop failed|a step raised|\bERROR\b|\bCRITICAL\b"
)


class Sample(NamedTuple):
    """Of an idle server."""

    held: int  # KV pages
    running: int
    waiting: int
    page_faults: int
    non_finite: int
    responses_500: int
    descriptors: int
    threads: int  # beyond those of POOLS
    tasks: int
    memory: int  # bytes, resident when what is free has been returned to the system
    allocated: int  # bytes that malloc has given out
    tensors: int  # bytes of tensors, the model's included
    objects: int
    detail: dict[str, Any]  # what of these there is, by name

    @property
    def is_idle(self) -> bool:
        return not (self.held or self.running or self.waiting)


# What must be zero, and what must be no more than before the first round.
ZERO = ("held", "running", "waiting", "page_faults", "non_finite", "responses_500")
AS_BEFORE = ("descriptors", "threads", "tasks")


def most_bytes(rounds: list[Sample]) -> dict[str, int]:
    """Bytes that there may be at the end of the last round, by name; none if that is the first one too."""
    earlier = rounds[:-1]
    if not earlier:
        return {}
    rooms = {"memory": MEMORY, "allocated": ALLOCATED}
    return {name: max(getattr(sample, name) for sample in earlier) + room for name, room in rooms.items()}


def missed(samples: list[Sample]) -> list[str]:
    """What is left that should not be, empty if all is well. The first sample is from before the first round."""
    if len(samples) < 2:
        return ["no round has ended"]
    (before, *rounds), found = samples, list[str]()
    for number, sample in enumerate(rounds, 1):
        found += [f"round {number}: {name} is {value}" for name in ZERO if (value := getattr(sample, name))]
        for name in AS_BEFORE:
            now, then = getattr(sample, name), getattr(before, name)
            if now > then:
                found.append(f"round {number}: {name} are {now}, {then} before: {more(before, sample, name)}")
    for name, most in most_bytes(rounds).items():
        if (now := getattr(rounds[-1], name)) > most:
            types = more(rounds[0], rounds[-1], "types")
            found.append(f"{name} has grown to {now / 2**20:.1f} MB, at most {most / 2**20:.1f}: {types}")
    return found


def more(before: Sample, now: Sample, name: str) -> str:
    """What there is more of."""
    then = before.detail.get(name, ())
    return str(dict((Counter(now.detail.get(name, ())) - Counter(then)).most_common(12)))


def bad_lines(log: str) -> list[str]:
    return [line for line in log.splitlines() if BAD_LINES.search(line)]


def table(samples: list[Sample]) -> list[str]:
    """What was left before the first round and after each, beside the bounds."""
    names = [f"round {number}" if number else "before" for number in range(len(samples))] + ["at most"]
    lines = [f"{'left over':<28}" + "".join(f"{name:>10}" for name in names)]
    for name in Sample._fields[:-1]:
        is_bytes = name in ("memory", "allocated", "tensors")
        values = [getattr(sample, name) for sample in samples]
        bound: Any = 0 if name in ZERO else values[0] if name in AS_BEFORE and samples else ""
        bound = most_bytes(samples[1:]).get(name, bound)
        shown = [f"{value / 2**20:.1f}" if is_bytes and value != "" else str(value) for value in (*values, bound)]
        lines.append(
            f"{name.replace('_', ' ') + (', MB' if is_bytes else ''):<28}" + "".join(f"{text:>10}" for text in shown)
        )
    return lines


class Probe:
    """Looks at the process of a server that tests.soak.server runs."""

    def __init__(self, pid: int, port: int, told: Path, key: str):
        self._pid, self._port, self._told, self._key = pid, port, told, key

    async def settled(self, earlier: list[Sample]) -> Sample:
        """A sample of the server when it is idle and nothing is missed, or after SETTLE_SECONDS whatever it has."""
        end = time.monotonic() + SETTLE_SECONDS
        while True:
            found = await self.sample()
            if (found.is_idle and not (earlier and missed([*earlier, found]))) or time.monotonic() > end:
                return found
            await asyncio.sleep(1)

    async def sample(self) -> Sample:
        connection = await Connection.open(self._port)
        await connection.ask(Request("GET", STATIC, key=self._key))
        await connection.ask(post("/v1/completions", SHORT, self._key))
        text = (await connection.ask(Request("GET", "/metrics", key=self._key))).body.decode()
        connection.leave()
        await asyncio.sleep(0.3)
        self._told.unlink(missing_ok=True)
        os.kill(self._pid, signal.SIGUSR1)
        async with asyncio.timeout(SETTLE_SECONDS):
            while not self._told.exists():
                await asyncio.sleep(0.05)
        told = json.loads(self._told.read_text())
        process = Path(f"/proc/{self._pid}")
        descriptors = sorted(link_of(each) for each in (process / "fd").iterdir())
        return Sample(
            held=metric(text, "banded_kv_pages_held"),
            running=metric(text, "banded_requests_running"),
            waiting=metric(text, "banded_requests_waiting"),
            page_faults=metric(text, "banded_page_accounting_faults_total"),
            non_finite=metric(text, "banded_non_finite_logits_total"),
            responses_500=metric(text, "banded_http_requests_total", 'status="500"'),
            descriptors=len(descriptors),
            threads=len([*(process / "task").iterdir()]) - pooled(told["threads"]),
            tasks=len(told["tasks"]),
            memory=int((process / "statm").read_text().split()[1]) * resource.getpagesize(),
            allocated=told["allocated"],
            tensors=told["tensors"],
            objects=told["objects"],
            detail=told | {"descriptors": descriptors},
        )


def pooled(names: list[str]) -> int:
    """How many of these threads may be there whether they have work or not."""
    return sum(min(most, sum(name.startswith(pool) for name in names)) for pool, most in POOLS.items())


def link_of(descriptor: Path) -> str:
    """What a descriptor is of, without numbers."""
    try:
        return re.sub(r"\d+", "N", os.readlink(descriptor))
    except FileNotFoundError:
        return "closed"


def metric(text: str, name: str, label: str = "") -> int:
    """The sum of a metric's series."""
    lines = (line for line in text.splitlines() if re.match(rf"{name}[{{ ]", line) and label in line)
    return int(sum(float(line.split()[-1]) for line in lines))
