"""The clients of a soak: those with good manners, those without, one that trains, and one that compares."""

import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from tests.soak.cases import SERVED, Case, Cases, fault, form, other_way, substance
from tests.soak.wire import Answer, BrokenAnswerError, Connection, Request, post

PATIENCE = 240.0  # seconds after which a client takes its request to be lost
MISBEHAVING = 0.15  # share of the visits
TOO_MANY_FAULTS = 40  # that are kept
# Clients that are there at once. One more does not come, and is counted.
MOST_CLIENTS = 500
TRAINED = frozenset({"succeeded", "failed", "cancelled"})


class Clients:
    """Visits a server. What goes wrong is in `faults`, what was answered in `outcomes`."""

    def __init__(self, port: int, cases: Cases, seed: int):
        self._port, self._cases, self._seed = port, cases, seed
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.num_compared = 0
        self._expected: dict[int, Any] = {}
        self._idle: list[Connection] = []  # connections that wait for their next request
        self._files: list[tuple[str, str]] = []  # keys and ids of what was uploaded

    def _fault(self, text: str) -> None:
        if len(self.faults) < TOO_MANY_FAULTS:
            self.faults.append(text)
            print(f"FAULT {text[:2000]}", file=sys.stderr, flush=True)
        self.outcomes["FAULTS"] += 1

    def _rng(self, *names: object) -> random.Random:
        return random.Random(" ".join(map(str, (self._seed, *names))))

    # -- good manners -------------------------------------------------------------------------------------------------

    async def ask(self, request: Request, rng: random.Random) -> Answer:
        """The answer, on a connection that is kept or a new one."""
        if self._idle and rng.random() < 0.7:
            connection = self._idle.pop()
            with contextlib.suppress(BrokenAnswerError, OSError):  # the server may have given it up
                return await self._ask(connection, request, rng)
        return await self._ask(await Connection.open(self._port), request, rng)

    async def _ask(self, connection: Connection, request: Request, rng: random.Random) -> Answer:
        is_done = False
        try:
            found = await connection.ask(request)
            is_done = True
            return found
        finally:
            if is_done and rng.random() < 0.8:
                self._idle.append(connection)
            else:
                connection.leave()

    async def serve(self, case: Case, rng: random.Random) -> Answer | None:
        """The answer to a case, if it is one that the contract allows."""
        try:
            async with asyncio.timeout(PATIENCE):
                found = await self.ask(case.request, rng)
        except (BrokenAnswerError, OSError, TimeoutError) as error:
            self._fault(f"{self._told(case)}: {error!r}")
            return None
        self.outcomes[f"{case.kind.split()[0]} {found.status}"] += 1
        if wrong := fault(case, found):
            self._fault(f"{self._told(case)}: {wrong}")
            return None
        return found

    def _told(self, case: Case) -> str:
        body = case.request.body[:600].decode(errors="replace")
        return f"{case.kind}: {case.request.method} {case.request.path} {body}"

    async def visit(self, round_name: str, number: int, *, behaves: bool = False) -> None:
        """What the client of that number does."""
        rng = self._rng(round_name, number)
        misbehaves = rng.random() < MISBEHAVING
        if misbehaves and not behaves:
            await self._misbehave(rng)
            return
        if self._files and rng.random() < 0.05:
            await self._use_file(rng)
            return
        case = self._cases.any(rng)
        found = await self.serve(case, rng)
        if found and case.kind == "upload" and found.status == 200:
            self._files.append((case.request.key, json.loads(found.body)["id"]))

    async def _use_file(self, rng: random.Random) -> None:
        """Read, look at or delete what was uploaded; others may have deleted it meanwhile."""
        key, file = rng.choice(self._files)
        allowed = frozenset({200, 404, 409})
        match rng.randrange(4):
            case 0:
                await self.serve(Case("file", Request("GET", f"/v1/files/{file}", key=key), allowed), rng)
            case 1:
                await self.serve(Case("file", Request("GET", f"/v1/files/{file}/content", key=key), allowed), rng)
            case _:
                await self.delete_file(key, file, rng)

    async def delete_file(self, key: str, file: str, rng: random.Random) -> None:
        found = await self.serve(
            Case("file", Request("DELETE", f"/v1/files/{file}", key=key), frozenset({200, 404, 409})), rng
        )
        if found and found.status != 409:
            with contextlib.suppress(ValueError):
                self._files.remove((key, file))

    async def tidy(self) -> None:
        """Delete all files, and close all connections."""
        for key, file in [*self._files]:
            await self.delete_file(key, file, random.Random(0))
        while self._idle:
            self._idle.pop().leave()

    # -- load ---------------------------------------------------------------------------------------------------------

    async def saturate(self, name: str, clients: int, seconds: float) -> float:
        """Clients that come again as soon as they are answered. How many of them were answered in a second."""
        end, number = time.monotonic() + seconds, 0

        async def again() -> None:
            nonlocal number
            while time.monotonic() < end:
                number += 1
                await self.visit(name, number, behaves=True)

        began = time.monotonic()
        await asyncio.gather(*(again() for _ in range(clients)))
        return number / (time.monotonic() - began)

    async def flood(self, name: str, rate: float, seconds: float) -> None:
        """Clients that come `rate` times a second, whatever becomes of those before them."""
        rng, here, number = self._rng(name, "arrivals"), set[asyncio.Task[None]](), 0
        end = at = time.monotonic()
        end += seconds
        while (at := at + rng.expovariate(rate)) < end:
            await asyncio.sleep(at - time.monotonic())
            number += 1
            if len(here) >= MOST_CLIENTS:
                self.outcomes["did not come"] += 1
                continue
            task = asyncio.create_task(self.visit(name, number))
            here.add(task)
            task.add_done_callback(here.discard)
            task.add_done_callback(self._end)
        self.outcomes["visits"] += number
        if here:
            await asyncio.wait([*here])

    def _end(self, visit: asyncio.Task[None]) -> None:
        if error := visit.exception():
            self._fault(f"a client failed: {error!r}")

    # -- the same texts -----------------------------------------------------------------------------------------------

    async def expect(self, cases: list[Case]) -> None:
        """Remember the answers to `cases` of a server that has nothing else to do."""
        for place, case in enumerate(cases):
            found = await self.serve(case._replace(allowed=frozenset({200})), random.Random(place))
            if found:
                self._expected[place] = substance(found)

    async def compare(self, name: str, cases: list[Case], clients: int, until: float = 0.0) -> None:
        """Ask again, all of `cases` or as many times as there is time, and compare what comes with what was expected."""

        async def some(first: int) -> None:
            turn = 0
            while turn == 0 or time.monotonic() < until:
                for place in range(first, len(cases), clients):
                    if place in self._expected and (time.monotonic() < until or not until):
                        await self._compare(place, cases[place], self._rng(name, "compare", turn, place))
                turn += 1

        await asyncio.gather(*(some(first) for first in range(clients)))

    async def _compare(self, place: int, case: Case, rng: random.Random) -> None:
        case = other_way(case, rng)
        case = case._replace(kind="again", request=case.request._replace(key=self._cases.key(rng)))
        while found := await self.serve(case, rng):
            if found.status == 200 and not (found.is_stream and b'data: {"error"' in found.body):
                break
            await asyncio.sleep(1)
        if found:
            self.num_compared += 1
            if (now := substance(found)) != self._expected[place]:
                self._fault(f"OTHER ANSWER: {self._told(case)}\n  expected {self._expected[place]}\n  got {now}")

    # -- training -----------------------------------------------------------------------------------------------------

    async def train(self, name: str, model: str) -> None:
        """A small job from its file to the last request for its adapter, and one that is cancelled."""
        rng = self._rng(name, "train")
        key = self._cases.key(rng)
        file = await self.serve(self._cases.upload(rng, key, self._cases.file(rng, 16)), rng)
        if not file:
            return
        body = {"model": model, "training_file": json.loads(file.body)["id"], "hyperparameters": {"n_epochs": 1}}
        good = frozenset({200})
        made = [await self.serve(Case("job", post("/v1/fine_tuning/jobs", body, key), good), rng) for _ in range(2)]
        first, second = (json.loads(each.body)["id"] if each else "" for each in made)
        cancel = Request("POST", f"/v1/fine_tuning/jobs/{second}/cancel", key=key)
        await self.serve(Case("job", cancel, good), rng)
        job: dict[str, Any] = {}
        end = time.monotonic() + PATIENCE
        while job.get("status") not in TRAINED and time.monotonic() < end:
            await asyncio.sleep(1)
            for path in ("", "/events", "/checkpoints"):
                found = await self.serve(
                    Case("job", Request("GET", f"/v1/fine_tuning/jobs/{first}{path}", key=key), good), rng
                )
                job = json.loads(found.body) if found and not path else job
        self.outcomes[f"trained: {job.get('status')}"] += 1
        if job.get("status") != "succeeded":
            self._fault(f"the job ended as {job}")
        elif adapter := job["fine_tuned_model"]:
            remove = Request("DELETE", f"/v1/models/{adapter}", key=key)
            asked = [asyncio.create_task(self._ask_adapter(rng, adapter, key)) for _ in range(12)]
            await asyncio.sleep(2)
            await self.serve(Case("adapter", remove, good), rng)
            await asyncio.gather(*asked)
        await self.delete_file(key, body["training_file"], rng)

    async def _ask_adapter(self, rng: random.Random, adapter: str, key: str) -> None:
        case = self._cases.completion(rng, key=key)
        request = post("/v1/completions", json.loads(case.request.body) | {"model": adapter}, key)
        allowed = case.allowed | {404}  # it may be deleted meanwhile
        await self.serve(
            case._replace(kind="adapter", request=request._replace(path="/v1/completions"), allowed=allowed), rng
        )

    # -- bad manners --------------------------------------------------------------------------------------------------

    async def _misbehave(self, rng: random.Random) -> None:
        kinds: dict[Callable[[Connection, random.Random], Awaitable[None]], float] = {
            self._leave_stream: 6,
            self._leave_waiting: 5,
            self._leave_body: 3,
            self._cut_upload: 2,
            self._half_close: 3,
            self._read_slowly: 3,
            self._pipeline: 4,
            self._say_nothing: 2,
            self._drip: 2,
            self._talk_nonsense: 3,
            self._send_too_much: 2,
        }
        way = rng.choices(list(kinds), list(kinds.values()))[0]
        self.outcomes[way.__name__.strip("_").replace("_", " ")] += 1
        connection = None
        try:
            async with asyncio.timeout(PATIENCE):
                connection = await Connection.open(self._port, receive_bytes=4096 if way == self._read_slowly else 0)
                await way(connection, rng)
        except TimeoutError:
            self._fault(f"{way.__name__.strip('_')}: the server neither answers nor closes")
        except (OSError, BrokenAnswerError):
            pass  # the server has had enough of this client
        finally:
            if connection:
                connection.leave(resets=rng.random() < 0.5)

    def _long(self, rng: random.Random, *, streams: bool) -> Request:
        """A request that takes a while."""
        case = rng.choice([self._cases.completion, self._cases.completion, self._cases.chat, self._cases.score])(rng)
        body = json.loads(case.request.body)
        if case.kind != "score":
            body["stream"] = streams
            for name in ("best_of", "prompt_logprobs") if streams else ("stream_options",):
                body.pop(name, None)
        if case.kind == "completion" and "few_shot" not in body:
            body |= {"ignore_eos": True}
        return case.request._replace(body=json.dumps(body).encode())

    def _last(self, rng: random.Random) -> Request:
        """A stream that takes a while, after which the server is to close the connection."""
        return self._long(rng, streams=True)._replace(headers=(("Connection", "close"),))

    async def _checked(self, connection: Connection, request: Request, allowed: frozenset[int]) -> None:
        """Read an answer, if one comes."""
        found = await connection.answer()
        if wrong := fault(Case("misbehaving", request, allowed), found):
            self._fault(f"misbehaving: {request.method} {request.path} {request.body[:300]!r}: {wrong}")

    async def _leave_stream(self, connection: Connection, rng: random.Random) -> None:
        request = self._last(rng)
        await connection.send(request.head + request.body)
        for _ in range(rng.randint(0, 40)):
            if not await connection.reader.read(rng.choice([100, 1000])):
                break

    async def _leave_waiting(self, connection: Connection, rng: random.Random) -> None:
        request = self._long(rng, streams=False)
        await connection.send(request.head + request.body)
        await asyncio.sleep(rng.choice([0, 0.01, 0.1, 1, 5]) * rng.random())

    async def _leave_body(self, connection: Connection, rng: random.Random) -> None:
        request = self._long(rng, streams=True)
        data = request.head + request.body
        await connection.send(data[: rng.randrange(len(data))])
        await asyncio.sleep(rng.random())

    async def _cut_upload(self, connection: Connection, rng: random.Random) -> None:
        request = form(self._cases.file(rng) * rng.choice([1, 1, 50]), self._cases.key(rng))
        data = request.head + request.body
        await connection.send(data[: rng.choice([len(data), rng.randrange(len(data))])])
        await asyncio.sleep(rng.choice([0, 0.01, 0.3]))

    async def _half_close(self, connection: Connection, rng: random.Random) -> None:
        request = self._long(rng, streams=rng.random() < 0.5)
        await connection.send((request.head + request.body) * rng.randint(1, 3))
        await asyncio.sleep(rng.choice([0, 0.1, 1]))
        connection.writer.write_eof()
        while await connection.reader.read(1 << 16):
            pass

    async def _read_slowly(self, connection: Connection, rng: random.Random) -> None:
        request = self._last(rng)
        await connection.send(request.head + request.body)
        end = time.monotonic() + rng.uniform(1, 20)
        while time.monotonic() < end and await connection.reader.read(rng.randint(1, 200)):
            await asyncio.sleep(0.02)
        if rng.random() < 0.5:
            while await connection.reader.read(1 << 16):
                if time.monotonic() > end + 30:
                    break

    async def _pipeline(self, connection: Connection, rng: random.Random) -> None:
        requests = [
            rng.choice([self._long(rng, streams=rng.random() < 0.5), self._cases.look(rng).request]) for _ in range(5)
        ]
        await connection.send(b"".join(request.head + request.body for request in requests))
        for request in requests[: rng.randint(0, 5)]:
            await self._checked(connection, request, SERVED | {400, 404, 405})

    async def _say_nothing(self, connection: Connection, rng: random.Random) -> None:
        await connection.send(rng.choice([b"", b"", b"\r\n", b"POST", b"GET / HTTP/1.1\r\nHost: a"]))
        await asyncio.sleep(rng.uniform(0, 10))

    async def _drip(self, connection: Connection, rng: random.Random) -> None:
        request = self._long(rng, streams=True)
        data = request.head + request.body
        for start in range(0, min(len(data), 400), 4):
            await connection.send(data[start : start + 4])
            await asyncio.sleep(0.005)
        await connection.send(data[400:])
        await self._checked(connection, request, SERVED | {400})

    async def _talk_nonsense(self, connection: Connection, rng: random.Random) -> None:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        data = rng.choice(
            [
                rng.randbytes(200),
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(100),
                head + b"Content-Length: -1\r\n\r\n",
                head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
                head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
                head + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
                head + b"x: " + b"a" * 20_000 + b"\r\n\r\n",
                head + b"a: b\r\n" * 200 + b"\r\n",
                b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
                b"GET /health HTTP/9.9\r\n\r\n",
                b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
                b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
            ]
        )
        await connection.send(data)
        request = Request("POST", "/nonsense")
        await self._checked(connection, request, frozenset({200, 400, 401, 408, 414, 431}))

    async def _send_too_much(self, connection: Connection, rng: random.Random) -> None:
        path, size = rng.choice([("/v1/chat/completions", 1 << 20), ("/v1/completions", 4 << 20), ("/v1/files", 16 << 20)])
        request = Request("POST", path, key=self._cases.key(rng), headers=(("Transfer-Encoding", "chunked"),))
        head = request.head.replace(b"Content-Length: 0\r\n", b"")
        await connection.send(head)
        block = b"%x\r\n" % (1 << 16) + b"a" * (1 << 16) + b"\r\n"
        for _ in range(size // (1 << 16) + rng.choice([-1, 2])):
            await connection.send(block)
        await connection.send(b"0\r\n\r\n")
        await self._checked(connection, request, frozenset({400, 413}))
