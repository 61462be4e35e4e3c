"""The programs of attacks tell a case that keeps its figure from one that misses it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.attacks import full_disk, poison
from tests.attacks.__main__ import report
from tests.attacks.damage import DAMAGES, GONE, NO_CONTENT, Damage, Stored
from tests.attacks.stored_data import Ledger, Outcome, content, lost_bytes, seen
from tests.attacks.table import Table
from tests.attacks.tenants import Ask, answered, difference
from tests.service.engine.poison import POISON

STORED = Stored(
    {"A": ("file-a", b"a"), "B": ("file-b", b"b")}, {"1": ("ftjob-1", "succeeded")}, 3, "ft:m:s:1", " done", Path("older")
)
ALL = dict.fromkeys(STORED.names, "served")
WAY_OUT = "banded: /d/banded.sqlite is damaged (x). Put a backup in its place, or move it away (mv /d/b /d/b.damaged): the"


def damage(**fields: Any) -> Damage:
    return Damage("d", lambda directory, stored: None, **fields)


def client(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(answer), base_url="http://test")


def test_a_table_counts_and_fails_where_a_case_misses(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("title", "0")
    table.case("good", "0")
    table.skip("left out", "no disk")
    assert table.end() == 0
    table.case("bad", "1", ["1 lost"], "0")
    assert table.end() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[4] == "2 cases, 0 missed, 1 skipped"
    assert lines[5].split() == ["bad", "1", "(must:", "0)", "MISSED:", "1", "lost"]
    assert lines[6] == "3 cases, 1 missed, 1 skipped"


@pytest.mark.parametrize(
    ("outcome", "done", "faults"),
    [
        (Outcome(None, None, 0, 0, ALL), damage(), []),
        (Outcome(None, None, 36, 0, ALL), damage(), ["36 bytes lost"]),
        (Outcome(None, None, 0, 2, ALL), damage(), ["2 tracebacks"]),
        (Outcome(None, None, 0, 0, ALL | {"file B": "500"}), damage(), ["file B: 500"]),
        (Outcome(None, None, 0, 0, ALL | {"file B": NO_CONTENT}), damage(hides={"file B": NO_CONTENT}), []),
        (Outcome(None, None, 0, 0, ALL | {"file B": GONE}), damage(hides={"file B": NO_CONTENT}), [f"file B: {GONE}"]),
        (Outcome(None, None, 0, 0, ALL), damage(hides={"file B": NO_CONTENT}), ["file B: served"]),
        (Outcome(None, None, 0, 0, ALL | {"/metrics": "500"}), damage(), ["/metrics: 500"]),
        (Outcome(None, None, 0, 0, ALL), damage(refused=True), ["not refused"]),
        (Outcome([WAY_OUT], None, 0, 0, ALL), damage(refused=True), []),
        (Outcome([WAY_OUT], None, 0, 0, ALL), damage(refused=None), []),
        (Outcome([WAY_OUT], 2, 0, 0, {}), damage(refused=True), ["status 2"]),  # after what it said was done
        (Outcome(["newer"], 2, 0, 0, {}), damage(refused=True, is_newer=True), []),
        (Outcome(["newer"], 1, 0, 0, {}), damage(refused=True), ["status 1"]),
        (Outcome(["a", "b"], 2, 0, 0, {}), damage(refused=True), ["2 lines: a b"]),
        (Outcome(["why"], 2, 0, 0, {}), damage(), ["refused: why"]),
    ],
)
def test_what_a_start_lost_or_hid_is_told(outcome: Outcome, done: Damage, faults: list[str]) -> None:
    assert outcome.faults(done, STORED) == faults


def test_content_may_move_but_not_go(tmp_path: Path) -> None:
    for name in ("files/file-1.jsonl", "jobs/ftjob-1/adapter.safetensors", "jobs/ftjob-1/log", "banded.sqlite"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    before = content(tmp_path)
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "jobs" / "ftjob-1").rename(tmp_path / "lost+found" / "ftjob-1")
    (tmp_path / "banded.sqlite").unlink()
    assert lost_bytes(before, tmp_path) == 0
    (tmp_path / "lost+found" / "ftjob-1" / "adapter.safetensors").write_text("")
    (tmp_path / "files" / "file-1.jsonl").unlink()
    assert lost_bytes(before, tmp_path) == len("jobs/ftjob-1/adapter.safetensors") + len("files/file-1.jsonl")


def test_the_damages_are_many_and_have_names_of_their_own() -> None:
    assert len({each.name for each in DAMAGES}) == len(DAMAGES) >= 90


def stored_server(request: httpx.Request) -> httpx.Response:
    """Has all that is STORED."""
    path = request.url.path
    for name, (file_id, data) in STORED.files.items():
        if path == f"/v1/files/{file_id}/content":
            return httpx.Response(200, content=data)
        if path == f"/v1/files/{file_id}":
            return httpx.Response(200, json={"filename": f"{name}.jsonl"})
    if path == "/v1/completions":
        return httpx.Response(200, json={"choices": [{"text": STORED.text}]})
    return httpx.Response(200, json={"status": "succeeded", "data": [1, 2, 3] if path.endswith("/events") else []})


def test_what_is_not_served_is_seen() -> None:
    assert seen(client(stored_server), STORED) == ALL

    def broken(request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == "/v1/files/file-a/content":
            return httpx.Response(200, content=b"x")
        if path == "/v1/files/file-b/content":
            return httpx.Response(404, json={"error": {"code": "file_content_missing"}})
        if path == "/v1/completions":
            return httpx.Response(200, json={"choices": [{"text": "another"}]})
        if path.endswith("/events"):
            return httpx.Response(200, json={"data": []})
        return httpx.Response(500) if path == "/metrics" else stored_server(request)

    changed = {"file A": "another content", "file B": NO_CONTENT, "events": "0 events", "adapter": "another text"}
    assert seen(client(broken), STORED) == ALL | changed | {"/metrics": "500"}


def test_a_ledger_tells_what_a_killed_server_forgot() -> None:
    ledger = Ledger()
    ledger.files, ledger.jobs = {"file-a": b"a", "file-b": b"b"}, {"ftjob-1": None}
    assert ledger.check(client(stored_server)) == []
    ledger.files, ledger.deleted, ledger.jobs = {"file-a": b"other"}, {"file-b"}, {"ftjob-1": "cancelled"}
    assert ledger.check(client(stored_server)) == ["file-a: 200", "file-b is back", "ftjob-1: succeeded"]

    def empty(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"data": []}) if request.url.path == "/v1/files" else httpx.Response(404, json={})

    ledger = Ledger()
    ledger.files, ledger.unsure = {"file-a": b"a"}, {"file-b": b"b"}
    assert ledger.check(client(empty)) == ["file-a: 404"]
    assert ledger.deleted == {"file-b"}, "it was about to be"


@pytest.mark.parametrize(
    ("status", "message", "fault"),
    [
        (507, "the disk for the data directory is full: 10 bytes are free, 20 are needed", None),
        (
            507,
            "the disk for the data directory is full: 11 bytes are free, 20 are needed",
            "says 11 free and 20 needed, not",
        ),
        (507, "no room", "no room"),
        (500, "internal error", "500, not 507"),
        (200, "", "200, not 507"),
    ],
)
def test_a_full_disk_is_told_with_its_numbers(status: int, message: str, fault: str | None) -> None:
    found = full_disk.refusal_faults(httpx.Response(status, json={"error": {"message": message}}), 10, 20)
    assert len(found) == (fault is not None)
    assert all(each.startswith(str(fault)) for each in found)


def test_without_a_disk_to_fill_it_says_skipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert full_disk.main([]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        f"{'a full disk':<58}skipped: cannot mount a tmpfs",
        "1 cases, 0 missed, 1 skipped",
    ]


RIGHT = poison.Answer(200, None, ["a text"])


@pytest.mark.parametrize(
    ("found", "expected", "fault"),
    [
        (RIGHT, RIGHT, ""),
        (poison.Answer(200, None, ["a test"]), RIGHT, "another text"),
        (poison.Answer(500, poison.ERROR, []), RIGHT, f"500 {poison.ERROR}"),
        (poison.Answer(500, poison.ERROR, []), None, ""),
        (poison.Answer(200, poison.ERROR, ["a"]), None, ""),  # of a stream
        (RIGHT, None, "200 without an error"),
        (poison.Answer(503, "the engine has failed", []), None, "503 the engine has failed"),
    ],
)
def test_a_wrong_text_and_a_missing_error_are_told(found: poison.Answer, expected: poison.Answer | None, fault: str) -> None:
    assert poison.fault_of(found, expected) == fault


def test_what_poison_left_over_is_told() -> None:
    names = ("requests_running", "requests_waiting", "kv_pages_held", "page_accounting_faults_total")
    lines = [f'banded_{name}{{model="tiny"}} 0.0' for name in names]
    assert poison.left_over("\n".join(lines)) == []
    lines[2] = 'banded_kv_pages_held{model="tiny"} 2.0'
    assert poison.left_over("\n".join(lines)) == [lines[2]]
    assert poison.left_over("\n".join(lines[:2])) == ["no kv_pages_held", "no page_accounting_faults_total"]


def test_poisoned_requests_are_as_many_as_said() -> None:
    good, poisoned = poison.requests()
    assert (len(good), len(poisoned)) == (450, 50)
    assert all(any(prompt[0] == POISON for prompt in each.body["prompt"]) for each in poisoned)
    assert not any(prompt[0] == POISON for each in good for prompt in each.body["prompt"])


@pytest.mark.parametrize("leak", ["status", "message", "header", None])
def test_another_answer_for_what_is_anothers_is_told(leak: str | None) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        name = request.url.path.rpartition("/")[2]
        is_there = name == "file-theirs"
        message = "it is another's" if is_there and leak == "message" else f"there is no file '{name}'"
        headers = {"etag": "x"} if is_there and leak == "header" else {}
        return httpx.Response(403 if is_there and leak == "status" else 404, json={"error": message}, headers=headers)

    outcome, faults = difference(client(answer), Ask("GET", "/v1/files/{}"), "file-theirs", "file-noones")
    assert outcome == ("403" if leak == "status" else "404")
    assert bool(faults) == (leak is not None)


@pytest.mark.parametrize(
    ("status", "kept", "faults"),
    [(200, False, []), (200, True, ["taken"]), (400, True, []), (500, True, ["a fault of the server"])],
)
def test_a_string_is_refused_where_it_is_kept(status: int, kept: bool, faults: list[str]) -> None:
    assert answered(httpx.Response(status), kept=kept) == (f"{status}", faults)


def test_a_program_that_misses_does_not_stop_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    codes = {
        "good": "print('a row'); print('3 cases, 0 missed, 1 skipped')",
        "bad": "print('2 cases, 1 missed, 0 skipped'); raise SystemExit(1)",
        "broken": "raise SystemExit(3)",
        "last": "print('1 cases, 0 missed, 0 skipped')",
    }

    def command(name: str) -> tuple[str, ...]:
        return sys.executable, "-c", codes[name]

    assert report(codes, command) == 1
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert lines[1:4] == [["==", "good"], ["a", "row"], ["3", "cases,", "0", "missed,", "1", "skipped"]]
    assert [line[:4] for line in lines[-4:]] == [
        ["good", "3", "0", "1"],
        ["bad", "2", "1", "0"],
        ["broken", "ended", "with", "3"],
        ["last", "1", "0", "0"],
    ]
    assert report(["good", "last"], command) == 0
