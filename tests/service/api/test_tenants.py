"""Names of keys: what belongs to one name is nowhere to be seen by another."""

import asyncio
import json
import re
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from unittest.mock import patch

import httpx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from service.api.app import create_app
from service.engine.models import ModelEntry, Models
from service.engine.scheduler import AdapterRef
from service.jobs.runner import Jobs
from service.jobs.store import Hyperparameters, Job, NewEvent, Store
from tests.conformance import contract
from tests.service.api.helpers import served
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run, settings_of

# Of each owner the keys, of which Alice has two.
SECRETS = {"alice": ("sk-a", "sk-a2"), "bob": ("sk-b",), "": ("sk-c", "sk-d")}
KEYS = tuple(f"{owner}:{secret}" if owner else secret for owner, secrets in SECRETS.items() for secret in secrets)
OWNERS = tuple(SECRETS)
LINES = [json.dumps({"prompt": f"{word} =>", "completion": f" {word}s"}) for word in ("cat", "dog", "bird")]
# Three pages long, but for the last; the first two begin alike.
PROMPTS = ([*range(1, 193)], [*range(1, 130), *range(500, 563)], [*range(7, 200)], [*range(1, 9)])


class OneAdapter:
    """Loads adapters that all have the same weights."""

    def __init__(self, base: ModelEntry) -> None:
        self.base, self.number = base, 0

    async def load(self, name: str, _directory: Path) -> ModelEntry:
        self.number += 1
        return self.base._replace(name=name, parent=self.base.name, adapter=AdapterRef(self.number, b"weights"))

    async def unload(self, _served: ModelEntry) -> None:
        pass


class QuickJobs(Jobs):
    """Jobs that run when the test says so, and end at once."""

    def start(self) -> None:
        pass

    async def work(self, owner: str) -> str:
        """Run the oldest job of `owner`, and tell its status."""
        jobs = [job for job in self.store.unfinished_jobs() if job.owner == owner]
        if not jobs:
            return "none"
        await self._advance(jobs[-1])
        done = self.store.job(owner, jobs[-1].id)
        return done.status if done else "gone"

    async def _train(self, job: Job) -> int:
        self.store.update_job(job.id, status="running", trained_tokens=7, events=[NewEvent("info", "message", "begun")])
        self.store.add_metrics(job.id, [("Step 1", {"step": 1, "train_loss": 2.0})])
        return 0


class Server(NamedTuple):
    client: httpx.AsyncClient
    jobs: QuickJobs
    fake: FakeEngine


@asynccontextmanager
async def serving(*, max_slots: int = 4, **options: Any) -> AsyncIterator[Server]:
    fake = FakeEngine(max_slots=max_slots, kv_sequences=100)  # nothing cached is ever in the way
    base = served(fake).base
    everybodys = base._replace(name="given", parent="fake", adapter=AdapterRef(99, b"given"))
    models, config = Models([base, everybodys], OneAdapter(base)), settings_of(max_adapters=3, **options)
    with tempfile.TemporaryDirectory() as directory:
        jobs = QuickJobs(Store(Path(directory)), models, Path("nowhere"), config.owners)
        app = create_app(models, fake.metrics, config, jobs)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
        ):
            yield Server(client, jobs, fake)
            assert fake.scheduler.check_integrity() == []


@dataclass
class Owner:
    """An owner's things on the server that all share, and on one of its own: ids, each with the other server's."""

    name: str
    alone: Server
    files: list[tuple[str, str]] = field(default_factory=list)
    jobs: list[tuple[str, str]] = field(default_factory=list)

    def normal(self, text: str, server: int) -> str:
        """An answer without times, and with the same ids wherever it comes from."""
        for kind, ids in (("file", self.files), ("job", self.jobs)):
            for number, pair in enumerate(ids):
                code = pair[server].partition("-")[2]
                text = text.replace(code, f"<{kind} {number}>").replace(code[-8:], f"<{kind} {number}, short>")
        text = re.sub(r'"(created|created_at|finished_at)":\d+', r'"\1":0', text)
        return re.sub(r'"(cmpl|chatcmpl)-\w+"', '"completion"', text)


class Ask(NamedTuple):
    """A request. {0}, {1} ... in the path and the body are ids, which the two servers may have given differently."""

    method: str
    path: str
    body: Any = None
    ids: tuple[tuple[str, str], ...] = ()
    upload: str | None = None

    def of(self, server: int) -> dict[str, Any]:
        path, body = self.path, json.dumps(self.body)
        for place, pair in enumerate(self.ids):
            path, body = path.replace(f"{{{place}}}", pair[server]), body.replace(f"{{{place}}}", pair[server])
        found: dict[str, Any] = {"method": self.method, "url": path}
        if self.upload is not None:
            return found | {"files": {"file": ("a.jsonl", self.upload)}, "data": {"purpose": "fine-tune"}}
        return found if self.body is None else found | {"json": json.loads(body)}


async def computed(server: Server, options: dict[str, Any], headers: dict[str, str]) -> tuple[httpx.Response, int]:
    """The answer, and how many prompt tokens the engine computed for it, which is what its time depends on."""
    before = len(server.fake.runner.steps)
    answer = await server.client.request(**options, headers=headers)
    return answer, sum(len(chunk.tokens) for step in server.fake.runner.steps[before:] for chunk in step.chunks)


class World:
    """A server that all owners share, and next to it a server for each alone, which is what the first must look like."""

    def __init__(self, shared: Server, alone: dict[str, Server]):
        self.shared = shared
        self.owners = {name: Owner(name, server) for name, server in alone.items()}

    async def ask(self, owner: Owner, secret: str, ask: Ask) -> None:
        key = {"authorization": f"Bearer {secret}"}
        here, num_here = await computed(self.shared, ask.of(0), key)
        there, num_there = await computed(owner.alone, ask.of(1), {})
        if ask.method == "POST" and here.status_code == there.status_code == 200:
            for path, ids in (("/v1/files", owner.files), ("/v1/fine_tuning/jobs", owner.jobs)):
                if ask.path == path:
                    ids.append((here.json()["id"], there.json()["id"]))
        assert here.status_code == there.status_code, (ask, here.text, there.text)
        assert owner.normal(here.text, 0) == owner.normal(there.text, 1), ask
        assert num_here == num_there, ask
        assert all(
            owner.normal(value, 0) == owner.normal(there.headers[name], 1)
            for name, value in here.headers.items()
            if name not in ("x-request-id", "openai-processing-ms", "etag", "last-modified")
        )


UPLOAD = Ask("POST", "/v1/files", upload=LINES[0])
CREATE = Ask("POST", "/v1/fine_tuning/jobs", {"model": "fake", "training_file": "{0}", "seed": 1, "suffix": "s"})
NONE = ("file-0", "file-0")


def a_thing(world: World, mine: Owner, random: Random, kind: str) -> tuple[str, str]:
    """The id of a file or job, or the name of an adapter, perhaps of another owner, whose own server has no such thing."""
    whose = world.owners[random.choice((mine.name, mine.name, mine.name, *OWNERS))]
    ids = whose.files if kind == "file" else whose.jobs
    if not ids:
        return NONE
    here, there = random.choice(ids[-3:])
    if kind == "model":
        here, there = f"ft:fake:s:{here[-8:]}", f"ft:fake:s:{there[-8:]}"
    return (here, there) if whose is mine else (here, here)


def asks_about(thing: Callable[[str], tuple[str, str]], model: str | None, random: Random) -> list[Ask]:
    """Requests to all routes. `thing` gives ids of each kind; {0} as the `model` stands for one."""

    def listing(path: str, kind: str) -> Ask:
        after = random.choice(("", "&after={0}"))
        return Ask("GET", f"{path}?limit={number}{after}", None, (thing(kind),))

    number, tokens = random.randint(1, 9), random.choice(PROMPTS)
    ids, messages = (thing("model"),), [{"role": "user", "content": "Hi " * 80}]
    generation = {"prompt": tokens, "max_tokens": 3, "n": 1 + number % 2, "seed": 1, "stream": number == 1}
    job_id, job, events = thing("job"), "/v1/fine_tuning/jobs/{0}", f"/v1/fine_tuning/jobs/{{0}}/events?limit={number}"
    return [
        UPLOAD,
        UPLOAD._replace(upload="\n".join(LINES[: 1 + number % 3])),
        listing("/v1/files", "file"),
        *(Ask(method, "/v1/files/{0}", None, (thing("file"),)) for method in ("GET", "DELETE")),
        Ask("GET", "/v1/files/{0}/content", None, (thing("file"),)),
        *[CREATE._replace(ids=(thing("file"),))] * 3,
        CREATE._replace(body=CREATE.body | {"model": "{1}"}, ids=(thing("file"), thing("model"))),
        CREATE._replace(body=CREATE.body | {"validation_file": "{1}"}, ids=(thing("file"), thing("file"))),
        listing("/v1/fine_tuning/jobs", "job"),
        Ask("POST", f"{job}/cancel", {}, (thing("job"),)),
        *(Ask("GET", path, None, (thing("job"),)) for path in (job, f"{job}/checkpoints", events)),
        Ask("GET", f"{events}&after=ftevent-{{1}}-{number}", None, (job_id, (job_id[0][6:], job_id[1][6:]))),
        *(Ask("GET", path) for path in ("/v1/models", "/v1/engines", "/tokenizer_info")),
        *(Ask(method, "/v1/models/{0}", None, (thing("model"),)) for method in ("GET", "DELETE")),
        *[Ask("POST", "/v1/completions", {"model": model} | generation, ids)] * 6,
        Ask("POST", "/v1/engines/{0}/completions", generation, (thing("model"),)),
        *[Ask("POST", "/v1/chat/completions", {"model": model, "messages": messages}, ids)] * 4,
        Ask("POST", "/v1/score", {"model": model} | {"prompt": tokens, "continuations": [[1], [2]]}, ids),
        Ask("POST", "/tokenize", {"model": model} | {"prompt": "a text"}, ids),
        Ask("POST", "/detokenize", {"model": model} | {"tokens": [1, 2]}, ids),
    ]


@asynccontextmanager
async def a_world(random: Random) -> AsyncIterator[World]:
    """In which each owner has a file, a job and an adapter."""
    async with AsyncExitStack() as stack:
        shared = await stack.enter_async_context(serving(api_keys=KEYS))
        world = World(shared, {owner: await stack.enter_async_context(serving()) for owner in OWNERS})
        for mine in random.sample([*world.owners.values()], 3):
            await world.ask(mine, SECRETS[mine.name][0], UPLOAD)
            await world.ask(mine, SECRETS[mine.name][0], CREATE._replace(ids=(mine.files[0],)))
            assert await shared.jobs.work(mine.name) == await mine.alone.jobs.work("") == "succeeded"
        yield world


@contract(
    "errors",
    "names of keys",
    "neither counts, cursors, limits, event numbers nor cached tokens tell what another name does",
)
@settings(max_examples=3, phases=[Phase.generate])  # a smaller seed is not a simpler case
@given(seed=st.integers(0, 2**32))
def test_no_answer_depends_on_what_others_do(seed: int) -> None:
    random = Random(seed)

    async def test() -> None:
        async with a_world(random) as world:
            for _ in range(160):
                mine = world.owners[random.choice(OWNERS)]
                if random.random() < 0.1:
                    assert await world.shared.jobs.work(mine.name) == await mine.alone.jobs.work("")
                else:
                    model = random.choice(("fake", "given", None, *["{0}"] * 4))
                    asks = asks_about(partial(a_thing, world, mine, random), model, random)
                    await world.ask(mine, random.choice(SECRETS[mine.name]), random.choice(asks))

    limits = patch.multiple("service.jobs.store", MAX_FILES=3, MAX_TOTAL_BYTES=130, MAX_JOBS=3)  # which are reached
    with limits, patch.object(Store, "copy"):
        run(test)


@contract("errors", "names of keys", "what belongs to another name is answered like what does not exist, on every route")
def test_what_is_anothers_does_not_exist() -> None:
    random = Random(0)

    async def test() -> None:
        async with a_world(random) as world:
            for mine, other in permutations(world.owners.values(), 2):
                file, job = other.files[0][0], other.jobs[0][0]
                ids = {
                    kind: (name, name) for kind, name in (("file", file), ("job", job), ("model", f"ft:fake:s:{job[-8:]}"))
                }
                for ask in asks_about(ids.__getitem__, "{0}", random):
                    await world.ask(mine, SECRETS[mine.name][0], ask)
            for mine in world.owners.values():
                file, job = mine.files[0][0], mine.jobs[0][0]
                for path in (f"/v1/files/{file}", f"/v1/fine_tuning/jobs/{job}", f"/v1/models/ft:fake:s:{job[-8:]}"):
                    for secret in SECRETS[mine.name]:
                        assert (await world.shared.client.get(path, headers=bearer(secret))).status_code == 200

    with patch.object(Store, "copy"):
        run(test)


def test_what_runs_at_once_shares_nothing_between_names() -> None:
    """Prompts of a request that begin alike still wait for each other, and so do choices for their prompt."""

    async def test() -> None:
        # With so many slots nobody has to yield: prompts would be computed again.
        async with serving(max_slots=12, api_keys=KEYS) as server, serving() as alone:
            for n in (1, 2):
                body = {"model": "fake", "prompt": [*PROMPTS[:2]], "n": n, "max_tokens": 3, "seed": 1}

                async def ask(key: str, body: dict[str, Any] = body) -> httpx.Response:
                    return await server.client.post("/v1/completions", json=body, headers=bearer(key))

                there, num_alone = await computed(alone, {"method": "POST", "url": "/v1/completions", "json": body}, {})
                before = len(server.fake.runner.steps)
                answers = await asyncio.gather(*map(ask, ("sk-a", "sk-b", "sk-d")))
                steps = server.fake.runner.steps[before:]
                assert [answer.json()["usage"] for answer in answers] == [there.json()["usage"]] * 3
                assert sum(len(chunk.tokens) for step in steps for chunk in step.chunks) == 3 * num_alone
                assert server.fake.scheduler.check_integrity() == []

    run(test)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@contract("errors", "401", "a key that is sent with its name is refused, and the message says how to send it")
def test_a_key_is_sent_without_its_name() -> None:
    async def test() -> None:
        async with serving(api_keys=("alice:sk-a", "sk-c")) as server:
            for key, status in (("sk-a", 200), ("sk-c", 200), ("alice:sk-a", 401), ("alice:sk-c", 401), (":sk-c", 401)):
                assert (await server.client.get("/v1/files", headers=bearer(key))).status_code == status
            answer = await server.client.get("/v1/files", headers=bearer("alice:sk-a"))
            message = "the API key in the Authorization header has a name: send only what comes after the colon"
            assert answer.json()["error"]["message"] == message
            answer = await server.client.get("/v1/files", headers=bearer("bob:sk-a"))
            assert answer.json()["error"]["message"] == "missing or wrong API key in the Authorization header"

    run(test)


def test_each_key_has_its_own_limit() -> None:
    async def test() -> None:
        async with serving(api_keys=KEYS, limit_requests=1) as server:
            for key in ("sk-a", "sk-a2", "sk-b"):
                for status in (200, 429):
                    answer = await server.client.post("/v1/completions", json={"model": "fake"}, headers=bearer(key))
                    assert answer.status_code == status

    run(test)


def test_names_take_turns_with_their_jobs(tmp_path: Path) -> None:
    store, models = Store(tmp_path), served(FakeEngine())
    jobs = QuickJobs(store, models, Path("nowhere"), {"alice", "bob"})

    def add(owner: str) -> Job:
        return store.add_job(owner, "fake", "", 0, Hyperparameters(1, 1, 1.0, 1), "file-x", None)

    async def ended() -> list[str]:
        """Whose jobs end, in order."""
        order = []
        while job := jobs._next():
            jobs._take_turn(job)
            store.end_job(job.id, "cancelled")
            order.append(job.owner)
        return order

    async def test() -> None:
        assert [add(owner).owner for owner in ("alice", "alice", "alice", "bob", "carol", "", "bob")]
        assert await ended() == ["alice", "bob", "alice", "bob", "alice"], "nobody could see Carol's and the nameless one"
        assert sorted(job.owner for job in store.unfinished_jobs()) == ["", "carol"]
        begun = [add("bob"), add("alice")][0]
        store.update_job(begun.id, status="running")
        jobs._take_turn(begun)
        assert (jobs._next() or begun).id == begun.id, "one that has begun goes on"

    run(test)
    store.close()


def test_a_record_says_whose_a_file_is(tmp_path: Path) -> None:
    """As the operator may change it, and as an older version wrote it."""
    store = Store(tmp_path)
    given, older, other = (store.add_file(owner, "a", "fine-tune", b"x").id for owner in ("alice", "", "carol"))
    store.close()
    path = tmp_path / "files" / f"{given}.json"
    path.write_text(path.read_text().replace('"alice"', '"bob"'))
    path = tmp_path / "files" / f"{older}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 1}).replace(', "owner": ""', ""))
    assert "owner" not in path.read_text()
    store = Store(tmp_path)
    assert {owner: [file.id for file in store.files(owner)] for owner in ("alice", "bob", "carol", "")} == {
        **{"alice": [], "bob": [given]},
        **{"carol": [other], "": [older]},
    }
    assert store.unseen({"alice", "bob"}) == {"carol": 1, "": 1}
    store.close()
