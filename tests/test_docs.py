"""README.md and docs/ run as they are written.

Every block of commands or of Python is run here, on the embedded model, or follows a comment `<!-- not run: REASON -->`.
A block of JSON says what the answer to the command ahead of it holds; a block of text after Python says what it prints.
"""

import argparse
import json
import logging
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from service import LLM
from service.cli import main, parser
from service.settings import Settings
from tests.serving import banded_serve

ROOT = Path(__file__).parents[1]
RUNNABLE = ["README.md", "docs/api.md", "docs/python.md", "docs/training.md", "docs/operating.md"]
DOCUMENTS = [
    *RUNNABLE,
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "ARCHITECTURE.md",
    "deploy/README.md",
    "model/data/demo/README.md",
]
BLOCK = re.compile(r"(?:^<!-- (not run: .+?|answers \d+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ADDRESS = "localhost:8000"
KV_BYTES = str(64 << 20)


class Block(NamedTuple):
    place: str
    language: str
    code: str
    note: str  # what the comment ahead of it says

    @property
    def is_run(self) -> bool:
        return not self.note.startswith("not run")

    @property
    def status(self) -> int:
        """Of the answers."""
        return int(self.note.removeprefix("answers ") or 200)


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(f"{page}:{text.count(chr(10), 0, match.start(3)) + 1}", match[2], match[3], match[1] or "")
        for match in BLOCK.finditer(text)
    ]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command. `cat > FILE <<'END'` has the text of the file as its last word."""
    lines = iter(block.code.splitlines())
    for line in lines:
        if line.startswith("#") or not line:
            continue
        if here := re.fullmatch(r"cat > (\S+) <<'(\w+)'", line):
            text = list(iter(lines.__next__, here[2]))
            yield ["cat", here[1], "".join(f"{each}\n" for each in text)]
            continue
        while True:
            try:
                words = shlex.split(line)
                break
            except ValueError:  # a backslash or an open quotation: the command goes on in the next line
                line = line.removesuffix("\\") + "\n" + next(lines)
        yield words


def banded_commands() -> list[tuple[str, list[str]]]:
    """Where each `banded` command stands in the pages, and its arguments."""
    found = []
    for page in RUNNABLE:
        for block in blocks(page):
            for words in commands(block) if block.language == "sh" else ():
                if (place := next((i for i, word in enumerate(words) if word.endswith("bin/banded")), None)) is not None:
                    found.append((block.place, words[place + 1 :]))
    return found


def curl(words: list[str], url: str) -> httpx.Response:
    """What the server at `url` answers to a curl command."""
    options = argparse.ArgumentParser("curl")
    options.add_argument("address")
    options.add_argument("-d")
    options.add_argument("-X")
    options.add_argument("-H", action="append", default=[])
    options.add_argument("-F", action="append", default=[])
    args = options.parse_args(words)
    headers = dict(line.split(": ", 1) for line in args.H)
    fields = dict(field.split("=", 1) for field in args.F)
    files = {name: Path(value[1:]).open("rb") for name, value in fields.items() if value.startswith("@")}  # noqa: SIM115
    data = {name: value for name, value in fields.items() if name not in files}
    method = args.X or ("POST" if args.d or args.F else "GET")
    try:
        return httpx.request(
            method,
            args.address.replace(ADDRESS, url),
            headers=headers,
            content=args.d,
            data=data or None,
            files=files or None,
            timeout=60,
        )
    finally:
        for file in files.values():
            file.close()


def holds(answer: Any, shown: Any) -> bool:
    """Whether `answer` has everything that a page shows of it. Numbers are shown rounded."""
    if isinstance(shown, dict):
        return isinstance(answer, dict) and all(name in answer and holds(answer[name], shown[name]) for name in shown)
    if isinstance(shown, list):
        return len(answer) == len(shown) and all(map(holds, answer, shown))
    return bool(answer == (pytest.approx(shown, abs=0.05) if isinstance(shown, float) else shown))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("docs")
    options = ("--data-dir", str(folder / "data"))
    with banded_serve(Path("demo"), folder / "log", *options, BANDED_KV_BYTES=KV_BYTES, OMP_WAIT_POLICY="PASSIVE") as served:
        yield served.url


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LLM]]:
    """The models that a page opens, closed at the end."""
    opened: list[LLM] = []
    load = LLM.__init__

    def loading(llm: LLM, *args: Any, **settings: Any) -> None:
        load(llm, *args, **settings)
        opened.append(llm)

    monkeypatch.setattr(LLM, "__init__", loading)
    yield opened
    for llm in opened:
        llm.close()


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("page", RUNNABLE)
def test_a_page_runs_as_it_is_written(
    page: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)  # a command may set it
    monkeypatch.setenv("BANDED_KV_BYTES", KV_BYTES)
    names: dict[str, Any] = {"__name__": "__main__"}
    answer, printed = None, ""
    for block in blocks(page):
        if not block.is_run:
            continue
        if block.language == "python":
            capsys.readouterr()
            code = block.code.replace(f"http://{ADDRESS}", server)
            exec(compile(code, block.place, "exec"), names)
            printed = capsys.readouterr().out
        elif block.language == "sh":
            for name, *rest in commands(block):
                if name == "cat":
                    Path(rest[0]).write_text(rest[1], encoding="utf-8")
                elif name == "curl":
                    found = curl(rest, server)
                    assert found.status_code == block.status, f"{block.place}: {found.text}"
                    answer = found.json() if "json" in found.headers["content-type"] else None
                elif name == ".venv/bin/banded":
                    assert main([word.replace(f"http://{ADDRESS}", server) for word in rest]) == 0, block.place
                else:
                    pytest.fail(f"{block.place}: nothing here runs `{name}`; say <!-- not run: REASON -->")
        elif block.language == "json":
            assert holds(answer, json.loads(block.code)), f"{block.place}: {answer}"
        elif block.language == "output":
            assert printed == block.code, block.place


def test_every_block_is_run_or_says_why_not() -> None:
    for page in RUNNABLE:
        text = (ROOT / page).read_text(encoding="utf-8")
        found = blocks(page)
        assert text.count("```") == 2 * len(found), f"{page}: a fence without its other half"
        assert len(re.findall("<!-- (?:not run|answers)", text)) == sum(bool(block.note) for block in found), page
        for block in found:
            assert block.language in ("sh", "python", "json", "output", "text"), f"{block.place}: a block of what?"
        assert not re.search(r"^ {4}", BLOCK.sub("", text), re.MULTILINE), f"{page}: a block without a fence"


@pytest.mark.parametrize(("place", "words"), banded_commands())
def test_every_banded_command_has_options_that_exist(place: str, words: list[str]) -> None:
    parser().parse_args(words)


@pytest.mark.parametrize("page", DOCUMENTS)
def test_links_files_and_make_targets_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or (folder / target).exists(), f"{page} links to {target}"
    for path in re.findall(r"(?<![\w/.])((?:service|model|kernels|tests|docs|deploy)/[\w/.-]*\w)", text):
        assert (ROOT / path).exists() or (ROOT / f"{path}.py").exists(), f"{page} names {path}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE))
    assert named <= targets, f"{page} names {named - targets}"


def test_every_promise_names_a_test() -> None:
    promises = (ROOT / "SECURITY.md").read_text(encoding="utf-8").split("## What is promised")[1].split("\n## ")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        found = re.search(r"\| `([\w/]+\.py)::(\w+)` \|$", row)
        assert found, row
        assert f"\ndef {found[2]}(" in (ROOT / found[1]).read_text(encoding="utf-8"), row


def test_every_setting_and_only_settings_are_described() -> None:
    described = set(re.findall(r"BANDED_([A-Z_]+)", (ROOT / "docs/operating.md").read_text(encoding="utf-8")))
    assert described == {name.upper() for name in Settings.model_fields}
    for page in RUNNABLE:
        named = set(re.findall(r"BANDED_([A-Z_]+)", (ROOT / page).read_text(encoding="utf-8")))
        assert named <= described, page


def test_every_route_is_described_and_every_metric_named_exists(server: str) -> None:
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in RUNNABLE)
    described = re.sub(r"\{\w+\}", "{}", pages)
    for path in httpx.get(f"{server}/openapi.json").json()["paths"]:
        assert re.sub(r"\{\w+\}", "{}", path).removesuffix("/{}") in described, path
    metrics = httpx.get(f"{server}/metrics").text
    for name in re.findall(r"\bbanded_[a-z_]+[a-z]\b", pages):
        assert name in metrics, name
