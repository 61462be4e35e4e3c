"""Templates that loop, multiply or fold: each is one error in bounded time and memory, and the next template is rendered."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest

from model.checkpoint import templates
from model.checkpoint.prompt_format import PromptFormat, Turn, load_prompt_format
from model.checkpoint.templates import TemplateProcess
from tests.model.checkpoint.test_prompt_format import write

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def process() -> Iterator[TemplateProcess]:
    process = TemplateProcess()
    yield process
    process.close()


def pid_of(process: TemplateProcess) -> int:
    assert process._process is not None
    return process._process.pid


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP, "it takes more than 0.3 s"),
        ("{{ 9 ** (9 ** 9) > 1 }}", "it takes more than 0.3 s"),  # one instruction, which nothing in its process could end
        ("{{ ('x' * 99999999).replace('x', 'yyyy') | length }}", "it takes more than 256 MB"),
        ("{% set a = namespace(s='x') %}{% for _ in range(40) %}{% set a.s = a.s ~ a.s %}{% endfor %}", "more than 256 MB"),
        ("{% for _ in range(9999) %}{{ 'x' * 1000 }}{% endfor %}", "it makes a text of more than 5000 characters"),
        ("{{ 'x' * 5001 }}", "it makes a text of more than 5000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ x" + ".x" * 3000 + " }}", "maximum recursion depth exceeded"),
    ],
)
def test_a_template_without_measure_is_an_error_and_the_next_one_is_rendered(
    template: str, message: str, process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.3 if "0.3" in message else 60)
    monkeypatch.setattr(templates, "PATIENCE", 60)  # this machine may be busy
    started = time.monotonic()
    with pytest.raises(jinja2.TemplateError, match=message):
        process.render(template, {}, 5000)
    assert time.monotonic() - started < 60
    assert process.render("{{ a }}" * 5, {"a": "b" * 1000}, 5000) == "b" * 5000


def test_a_warm_process_is_kept_and_one_that_died_is_replaced(process: TemplateProcess) -> None:
    assert process.render("a", {}) == "a"
    first = pid_of(process)
    with pytest.raises(jinja2.TemplateError, match=r"^line 2: Unexpected end of template"):
        process.render("\n{% if a %}", None)
    with pytest.raises(jinja2.TemplateError, match=r"^'a' is undefined$"):
        process.render("{{ a.b }}", {})
    assert process.render("{{ a }}", {"a": "\ud800 \U0001f600"}) == "\ud800 \U0001f600"
    assert pid_of(process) == first
    os.kill(first, signal.SIGKILL)
    process._process.wait()  # type: ignore[union-attr]
    assert process.render("c", {}) == "c"


def test_a_process_that_stands_still_is_given_up(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    process.render("a", {})
    monkeypatch.setattr(templates, "PATIENCE", 0.2)
    os.kill(pid_of(process), signal.SIGSTOP)
    with pytest.raises(jinja2.TemplateError, match=r"^it takes more than 0\.2 s$"):
        process.render("a", {})


def test_a_process_that_dies_of_a_template_is_an_error(process: TemplateProcess) -> None:
    process.render("a", {})
    killer = threading.Timer(0.1, os.kill, (pid_of(process), signal.SIGKILL))
    killer.start()
    with pytest.raises(jinja2.TemplateError, match=r"^its process ended with status -9$"):
        process.render(LOOP, {})


def test_the_process_sees_no_keys(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANDED_API_KEYS", "secret")
    process.render("a", {})
    assert b"secret" not in Path(f"/proc/{pid_of(process)}/environ").read_bytes()


def test_our_own_template_takes_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "process", None)
    assert load_prompt_format(tmp_path).render_chat([Turn("user", "a")], bos_token="", eos_token="") == "User: a\nAssistant:"


@pytest.mark.parametrize("template", ["{{ 'x' * 99999999 ~ 'y' * 99999999 ~ 'z' * 99999999 }}", "{{ 9 ** (9 ** 9) > 1 }}"])
def test_what_the_compiler_would_compute_prevents_chats_only(template: str, tmp_path: Path) -> None:
    write(tmp_path, "banded.json", {"chat_template": template})
    found = load_prompt_format(tmp_path)
    problem: Any = found.chat_problem
    if problem is None:  # the compiler left it to the template
        with pytest.raises(jinja2.TemplateError, match="it takes more than"):
            found.render_chat([], bos_token="", eos_token="")
    else:
        assert problem.startswith("chat_template does not compile: it takes more than ")
    assert PromptFormat(chat_template="ok").render_chat([], bos_token="", eos_token="") == "ok"


def test_a_process_that_does_not_start_is_no_fault_of_the_template(
    tmp_path: Path, process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "process", process)
    write(tmp_path, "banded.json", {"chat_template": "ok"})
    with monkeypatch.context() as broken:
        broken.setattr("sys.executable", "/nowhere")
        found = load_prompt_format(tmp_path)
    assert found.chat_problem is None
    assert found.render_chat([], bos_token="", eos_token="") == "ok"
