"""`python -m tests.attacks.event_loop`: what one large request costs everybody else; exits with 1 where that is too much.

It serves the embedded model, sends one request of tests/attacks/bodies.py after the other, and measures from a process of
its own how long /health/live and a one-token completion take meanwhile, and by how much the server's resident memory grows
at most. Requests that run the model for long are left after PATIENCE seconds; `--text` leaves them out. `--only WORD` runs
the cases whose names hold the word, `--url` measures a server that runs already (its process id in `--pid`).
"""

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from tests.attacks.bodies import ATTACKS, COMPLETIONS, JSON_HEADERS, Attack, completion
from tests.attacks.table import last_line, run

# What a request may cost at most: seconds of /health/live and of another one's one-token completion. See Attack for memory.
MOST_LIVE, MOST_COMPLETION = 0.100, 0.300
PATIENCE = 15.0  # seconds that a request gets
KV_BYTES = 2**28
SETTLE = 0.3  # seconds measured before and after each request


class Cost(NamedTuple):
    status: int  # 0: left before it was answered
    seconds: float
    live: float
    completion: float
    memory: int


class Probe:
    """Measures one server from a process of its own: `worst()` is the worst answer since the last call."""

    def __init__(self, url: str):
        command = [sys.executable, "-m", "tests.attacks.event_loop", "--probe", url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def worst(self) -> tuple[float, float]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        live, one = self._process.stdout.readline().split()
        return float(live), float(one)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def run_probe(url: str) -> None:
    """Ask again and again, and print the worst times, in seconds, at each line that is read."""
    address = urlsplit(url).netloc
    one_token = json.dumps({"prompt": "Once", "max_tokens": 1, "cache_prompt": False})
    worst = {"live": 0.0, "one": 0.0}
    begun: dict[str, float] = {}

    def ask(name: str, method: str, path: str, body: str | None, pause: float) -> None:
        connection = http.client.HTTPConnection(address, timeout=120)
        while True:
            begun[name] = time.monotonic()
            connection.request(method, path, body, JSON_HEADERS)
            response = connection.getresponse()
            response.read()
            assert response.status == 200, response.status
            worst[name] = max(worst[name], time.monotonic() - begun.pop(name))
            time.sleep(pause)

    threading.Thread(target=ask, args=("live", "GET", "/health/live", None, 0.003), daemon=True).start()
    threading.Thread(target=ask, args=("one", "POST", COMPLETIONS, one_token, 0.03), daemon=True).start()
    for _ in sys.stdin:
        now = time.monotonic()
        times = [max(worst[name], now - begun.get(name, now)) for name in worst]
        worst.update(live=0.0, one=0.0)
        print(*times, flush=True)


def send(address: str, attack: Attack, body: bytes) -> tuple[int, float]:
    """The status, 0 if none came in PATIENCE seconds, and the seconds that it took."""
    begun = time.monotonic()
    connection = http.client.HTTPConnection(address, timeout=PATIENCE)
    try:
        connection.request(attack.method, attack.path, body or None, attack.headers)
        response = connection.getresponse()
        while response.read(1 << 20):
            pass
        return response.status, time.monotonic() - begun
    except (TimeoutError, ConnectionError, http.client.HTTPException):
        return 0, time.monotonic() - begun
    finally:
        connection.close()


def peak_memory(pid: int) -> int:
    """Bytes of the highest resident memory since `forget_peak`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def cost(attack: Attack, url: str, pid: int, probe: Probe) -> Cost:
    body = attack.body()
    for _ in range(4):  # until the server has done with the last one
        probe.worst()
        time.sleep(SETTLE)
        live, one = probe.worst()
        if live < MOST_LIVE and one < MOST_COMPLETION:
            break
    forget_peak(pid)
    before = peak_memory(pid)
    probe.worst()
    time.sleep(SETTLE)
    with ThreadPoolExecutor(attack.times) as senders:
        status, seconds = max(senders.map(lambda _: send(urlsplit(url).netloc, attack, body), range(attack.times)))
    time.sleep(SETTLE)
    live, one = probe.worst()
    return Cost(status, seconds, live, one, peak_memory(pid) - before)


@contextmanager
def served(directory: Path, *options: str) -> Iterator[tuple[str, int]]:
    """The address and process id of a server over the embedded model."""
    code = "from service.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--data-dir", str(directory / "data"), *options]
    log = directory / "log"
    environment = os.environ | {"BANDED_KV_BYTES": str(KV_BYTES)}
    with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr, env=environment) as process:
        try:
            while not (found := re.search(r"running on (http://\S+)", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            address = urlsplit(found[1]).netloc
            while send(address, Attack("", "/health/ready", headers={}, method="GET"), b"")[0] != 200:
                time.sleep(0.1)
            yield found[1], process.pid
        finally:
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--text", action="store_true", help="leave out what runs the model for long")
    parser.add_argument("--url")
    parser.add_argument("--pid", type=int)
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        run_probe(args.probe)
        return 0
    cases = missed = 0
    with tempfile.TemporaryDirectory() as directory:
        context = served(Path(directory))
        url, pid = (args.url, args.pid) if args.url else context.__enter__()
        probe = Probe(url)
        os.nice(10)  # an attacker takes no processor from the server and from those who ask it
        try:
            # Memory of the whole KV cache and of a full batch's sampling is taken when it is first used, and kept.
            wide = {"n": 128, "logprobs": 20, "top_p": 0.9, "presence_penalty": 1, "logit_bias": {"11": 1}}
            for warm in (
                completion("", lambda: {"prompt": [[i * 7] * 1500 for i in range(80)]}),
                completion("", lambda: {"prompt": "x", **wide}),
            ):
                send(urlsplit(url).netloc, warm, warm.body())
            time.sleep(2)
            print(
                f"{'request':<44}{'status':>7}{'took s':>8}{'live ms':>9}{'one token ms':>14}{'memory MB':>11}", flush=True
            )
            nothing = Attack("nothing", "/health/live", headers={}, method="GET")
            for attack in (nothing, *ATTACKS):
                if args.only not in attack.name or (args.text and attack.runs):
                    continue
                found = cost(attack, url, pid, probe)
                is_missed = found.live > MOST_LIVE or found.memory > attack.most_memory
                is_missed |= found.status == 500 or (not attack.runs and found.completion > MOST_COMPLETION)
                cases, missed = cases + 1, missed + is_missed
                print(
                    f"{attack.name:<44}{found.status or 'left':>7}{found.seconds:>8.2f}{found.live * 1000:>9.0f}"
                    f"{found.completion * 1000:>14.0f}{found.memory / 2**20:>11.0f}{'  missed' if is_missed else ''}",
                    flush=True,
                )
        finally:
            probe.close()
            if not args.url:
                context.__exit__(None, None, None)
    print(last_line(cases, missed))
    return bool(missed)


if __name__ == "__main__":
    run(main)
