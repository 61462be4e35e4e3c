"""`python -m tests.attacks.model_directories`: model directories that lie, one after another, and how loading each one ends.

A lie ends cleanly if the command says why in one line and exits with 2, or serves the model all the same, within SECONDS and
with no more than MEMORY above what an honest directory takes. Prints a table, and exits with 1 if a lie has no such end.
`--only WORD`: those whose names contain the word.
"""

import argparse
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from tests.attacks.table import last_line, run

SECONDS, MEMORY = 10.0, 300 << 20
HUGE = 50 << 30
LIMIT = 6 << 30  # of an attempt, so that none takes the machine with it

Lie = Callable[[Path], None]


class Ending(NamedTuple):
    status: int | None  # None: it had to be killed
    seconds: float
    memory: int  # most bytes that it, or a process of it, had at once
    lines: list[str]  # what it said, without the log

    def fault(self, honest: "Ending") -> str:
        """What is wrong with it; empty for a clean end."""
        if self.status is None:
            return f"killed after {self.seconds:.0f} s"
        if self.status not in (0, 2) or (self.status == 2 and (len(self.lines) != 1 or len(self.lines[0]) > 1000)):
            return f"status {self.status}, {len(self.lines)} lines: {' '.join(self.lines[-1:]):.100}"
        if self.seconds > SECONDS:
            return f"{self.seconds:.1f} s"
        more = self.memory - honest.memory
        return f"{more / 1e6:.0f} MB more" if more > MEMORY else ""


# Each lie changes a copy of an honest directory.


def fields(name: str, directory: Path, **changed: Any) -> None:
    path = directory / name
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | changed))


def text(name: str, content: str | bytes, directory: Path) -> None:
    (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)


def special_file(name: str, kind: str, directory: Path) -> None:
    path = directory / name
    if path.exists():
        path.unlink()
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(os.path.relpath(path))
        case "loop":
            path.symlink_to(path.name)
        case "folder":
            path.mkdir()
        case "50 GB":
            with path.open("wb") as file:
                file.truncate(HUGE)


def header(directory: Path, length: int | None = None, size: int | None = None, **tensors: Any) -> None:
    """Weights with a header of these tensors, which tells of `length` bytes, in a sparse file of `size`."""
    data = json.dumps(tensors).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write((len(data) if length is None else length).to_bytes(8, "little") + data)
        file.truncate(size or 8 + len(data))


def large_weights(directory: Path) -> None:
    """Config and weights that agree with each other, on 60 GB."""
    config = json.loads((directory / "config.json").read_text())
    config |= {"vocab_size": 2**20, "n_embd": 8192, "n_inner": 8192, "n_layer": 1}
    (directory / "config.json").write_text(json.dumps(config))
    width, positions = 8192, config["n_positions"]
    shapes = {
        **{"wte.weight": [2**20, width], "wpe.weight": [positions, width], "h.0.attn.c_attn.weight": [3 * width, width]},
        **{f"h.0.{name}.weight": [width, width] for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
        **{f"h.0.{name}.bias": [width] for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2")},
        **{f"{name}.weight": [width] for name in ("h.0.ln_1", "h.0.ln_2", "ln_f")},
        **{"h.0.attn.c_attn.bias": [3 * width], "ln_f.bias": [width]},
    }
    tensors: dict[str, Any] = {}
    place = 0
    for name, shape in shapes.items():
        end = place + 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        tensors[name] = {"dtype": "F32", "shape": shape, "data_offsets": [place, end]}
        place = end
    data = json.dumps(tensors).encode()
    header(directory, size=8 + len(data) + place, **tensors)


def doubling(directory: Path, *, merges_file: bool) -> None:
    """A vocabulary of which each merge makes a piece twice as long as the one before it."""
    from model.checkpoint.vocabulary import BYTE_OF

    pieces = [("a" * 2**n, "a" * 2**n) for n in range(20 if merges_file else 19)]
    vocab = {piece: i for i, piece in enumerate([*BYTE_OF, *("".join(pair) for pair in pieces)])}
    if merges_file:
        text("vocab.json", json.dumps(vocab), directory)
        text("merges.txt", "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in pieces), directory)
    else:
        pipeline(directory, {"type": "BPE", "vocab": vocab, "merges": pieces})


def long_pieces(directory: Path) -> None:
    """Many merges, each of a thousand characters and one more."""
    from model.checkpoint.vocabulary import BYTE_OF

    pieces = [("a" * n, "a") for n in range(1, 4000)]
    pipeline(directory, {"vocab": {p: i for i, p in enumerate([*BYTE_OF, *map("".join, pieces)])}, "merges": pieces})


def pipeline(directory: Path, model: Any = None, **more: Any) -> None:
    from model.checkpoint.vocabulary import BYTE_OF

    plain = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(BYTE_OF)}, "merges": []}
    whole = {"model": plain if model is None else model, "pre_tokenizer": {"type": "ByteLevel"}, **more}
    text("tokenizer.json", json.dumps(whole), directory)


def nested(count: int, kind: str) -> Any:
    found: Any = None
    for _ in range(count):
        found = {"type": "Sequence", kind: [found] if found else []}
    return found


def lies() -> Iterator[tuple[str, str, Lie]]:
    """(name, architecture, lie)"""
    name: Any
    value: Any
    sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "band")
    values: Any = (None, -1, 0, 1.5, "4", True, [], 10**5, 10**9, 2**63, 10**400)
    for name in sizes:
        for value in values:
            yield f"config: {name} is {value!r:.20}", "banded", partial(fields, "config.json", **{name: value})
    for name in ("max_position_embeddings", "hidden_size", "num_layers", "num_heads", "intermediate_size", "window_size"):
        for value in (10**5, 2**63):
            yield f"config: {name} is {value}", "gpt_neo", partial(fields, "config.json", **{name: value})
    yield "config: all sizes are 10^9", "banded", partial(fields, "config.json", **cast(Any, dict.fromkeys(sizes, 10**9)))
    for types in (
        [[["global"], 10**8]],
        [[["global"] * 10**4, 10**4]],
        [[["global"], 10**9], [["global"], 4 - 10**9]],
        [[["global"], 2.0], [["local"], 2.0]],
        [[["global", "local"], "2"]],
        [["global", 4]],
        {"global": 4},
        5,
    ):
        yield f"config: attention_types {types!r:.40}", "gpt_neo", partial(fields, "config.json", attention_types=types)
    yield "config: 10^5 kinds of attention", "banded", partial(fields, "config.json", attention=["dense"] * 10**5)
    for name, value in (("norm_eps", 10**400), ("softmax_scale", 10**400), ("activation", [1] * 10**5), ("model_type", {})):
        yield f"config: {name} {value!r:.20}", "banded", partial(fields, "config.json", **{name: value})
    yield "config: 10^6 brackets", "banded", partial(text, "config.json", '{"a":' + "[" * 10**6)
    yield "config: 10^5 digits", "banded", partial(text, "config.json", '{"n_layer": ' + "9" * 10**5 + "}")
    yield "config: 4 M empty lists", "banded", partial(text, "config.json", '{"a": [' + "[]," * 10**6 + "[]]}")
    names = ("config.json", "vocab.json", "tokenizer.json", "tokenizer_config.json", "banded.json", "model.safetensors")
    for name in (*names, "generation_config.json", "chat_template.jinja", "model.safetensors.index.json", "merges.txt"):
        for kind in ("pipe", "device", "socket", "loop", "folder", "50 GB"):
            if name == "model.safetensors.index.json":

                def lie(directory: Path, kind: str = kind) -> None:
                    (directory / "model.safetensors").unlink()
                    special_file("model.safetensors.index.json", kind, directory)

                yield f"{name}: {kind}", "banded", lie
            else:
                yield f"{name}: {kind}", "banded", partial(special_file, name, kind)
    yield "weights: header of 2^63 bytes", "banded", partial(header, length=2**63)
    yield "weights: header of 90 MB in a sparse file", "banded", partial(header, length=90 << 20, size=HUGE)
    huge: Any = {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, HUGE]}
    yield "weights: a tensor of 2^80", "banded", partial(header, size=HUGE, **{"wte.weight": huge})
    empty: Any = {f"h.{i}.a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**5)}
    yield (
        "weights: 10^5 tensors",
        "banded",
        partial(header, size=10**6, **empty),
    )
    yield "weights: 60 GB of zeros that fit the config", "banded", large_weights
    yield "tokenizer: merges.txt doubles", "gpt2", partial(doubling, merges_file=True)
    yield "tokenizer: tokenizer.json doubles", "gpt2", partial(doubling, merges_file=False)
    yield "tokenizer: long pieces", "gpt2", long_pieces
    yield "tokenizer: 10^6 lists", "gpt2", partial(text, "tokenizer.json", '{"a": [' + "[]," * 3 * 10**6 + "[]]}")
    yield "tokenizer: 10^6 brackets", "gpt2", partial(text, "tokenizer.json", '{"model":' + "[" * 10**6)
    for where in ("normalizer", "pre_tokenizer", "post_processor"):
        members = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}[where]
        for depth in (100, 240):
            yield f"tokenizer: {where} {depth} deep", "gpt2", partial(pipeline, **cast(Any, {where: nested(depth, members)}))
        yield f"tokenizer: {where} is 5", "gpt2", partial(pipeline, **cast(Any, {where: 5}))
        yield f"tokenizer: {where} of 5", "gpt2", partial(pipeline, **cast(Any, {where: {"type": "Sequence", members: 5}}))
    many: Any = [{"id": 256 + i, "content": f"<{i}>", "special": True} for i in range(10**5)]
    long: Any = [{"id": 256 + i, "content": "<" + "x" * 10**6 + f"{i}>", "special": True} for i in range(9)]
    for added in (many, long, 5, [5], [{"id": 2**63, "content": "x"}], [{"id": "1", "content": "x"}], {"a": 1}):
        yield f"tokenizer: added_tokens {added!r:.30}", "gpt2", partial(pipeline, added_tokens=added)
    model: Any
    for model in (5, {"vocab": [], "merges": []}, {"vocab": {"a": 2**63}, "merges": []}, {"vocab": {}, "merges": [5]}):
        yield f"tokenizer: model {model!r:.30}", "gpt2", partial(pipeline, model=model)
    for name in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder", "bos_token", "chat_template"):
        for value in (5, True, [5], {"a": 5}, [[[]]]):
            yield f"tokenizer_config: {name} {value!r}", "gpt2", partial(fields, "tokenizer_config.json", **{name: value})
    for value in (2**63, [2**63], list(range(10**5)), "x", [[1]], -1, 1.5):
        yield f"generation_config: eos {value!r:.20}", "gpt2", partial(fields, "generation_config.json", eos_token_id=value)
    for field, value in (("separator", "x" * 10**6), ("stop", ["x"] * 10**5), ("default_max_tokens", 10**400)):
        yield f"banded.json: {field} {value!r:.20}", "banded", partial(fields, "banded.json", **{field: value})
    for value in ("{prompt:>999999999}{suffix}", "{prompt}{suffix.x[9]}", "{{" * 10**6 + "{prompt}{suffix}"):
        yield f"banded.json: insertion {value:.20}", "banded", partial(fields, "banded.json", insertion=value)
    for template in TEMPLATES:
        yield f"template: {template:.50}", "banded", partial(fields, "banded.json", chat_template=template)


TEMPLATES = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'x' * 999999999 }}",
    "{{ 'x' * 9999999999999 }}",
    "{{ ('x' * 99999999) ~ ('y' * 99999999) ~ ('z' * 99999999) }}",
    "{{ [0] * 999999999 }}",
    "{{ (9 ** (9 ** 9)) > 1 }}",
    "{{ 'x' | center(999999999) }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ 'x'.ljust(999999999) }}",
    "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ lipsum(n=999999) }}",
    "{{ range(99999) | map('string') | join('x' * 9999) }}",
    "{{ (range(99999) | list) | tojson(indent=9999) }}",
    "{{ ('a' * 9999 + 'b') is search('(a+)+$') }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "-" * 99999 + "1 }}",
    "{% if a %}" * 5000 + "{% endif %}" * 5000,
    "{{ 1 }}" * 99999,
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('sleep 99') }}",
    "{{ self._TemplateReference__context }}{% include '/etc/passwd' %}",
)


def load(directory: Path) -> int:
    """What the commands do with a directory: complete a prompt, and lay out a chat, whose error is that of its request."""
    from model.checkpoint.prompt_format import Turn
    from service.cli import main
    from service.engine import loading
    from service.engine.prompts import chat_prompt

    loaded, load_checkpoint = [], loading.load_checkpoint
    loading.load_checkpoint = lambda options: loaded.append(load_checkpoint(options)) or loaded[0]  # type: ignore[func-returns-value]
    status = main(["complete", "a", "--model", str(directory), "--max-tokens", "1", "--dtype", "float32"])
    if status == 0:
        try:
            chat_prompt([Turn("user", "a")], loaded[0].prompt_format, loaded[0].tokenizer, max_chars=10**6)
        except ValueError as error:
            print(f"banded: {error}", file=sys.stderr)
            return 2
    return status


def attempt(directory: Path) -> Ending:
    """How `load` ends in a process of its own, forked from this one, which has imported what it needs."""
    log = directory.with_suffix(".log")
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2)
            os.setsid()
            resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
            status = load(directory)
        except BaseException:  # as the interpreter does it
            logging.exception("")
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            from model.checkpoint import templates

            templates.process.close()  # waited for, so that its memory counts
            os._exit(status)
    ended = 0
    while not ended and time.monotonic() - started < SECONDS + 2:
        time.sleep(0.01)
        ended, status, usage = os.wait4(pid, os.WNOHANG)
    seconds = time.monotonic() - started
    if not ended:
        os.killpg(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
    lines = [
        line
        for line in log.read_text(errors="replace").splitlines()
        if line and not re.match(r"\d{4}-\d\d-\d\d |a|loading", line)
    ]
    return Ending(os.waitstatus_to_exitcode(status) if ended else None, seconds, usage.ru_maxrss << 10, lines)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    import service.llm  # noqa: F401
    from tests.model.checkpoint.checkpoints import tiny

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        small: dict[str, dict[str, Any]] = {
            "banded": {"vocab_size": 50257, "n_layer": 4},
            "gpt2": {"vocab_size": 50257},
            "gpt_neo": {"vocab_size": 50257},
        }
        honest = {arch: tiny(arch, root / "honest", **changed) for arch, changed in small.items()}
        ends = {arch: attempt(directory) for arch, directory in honest.items()}
        for arch, end in ends.items():
            assert end.status == 0, end
            print(f"{'honest ' + arch:<60}{end.seconds:>6.1f} s{end.memory / 1e6:>7.0f} MB")
        found = [(name, arch, lie) for name, arch, lie in lies() if only in name]
        wrong = []
        for name, arch, lie in found:
            directory = shutil.copytree(honest[arch], root / "lie")
            lie(directory)
            end = attempt(directory)
            fault = end.fault(ends[arch])
            shown = fault or ("served" if end.status == 0 else end.lines[0].replace(f"{directory}", "DIR"))
            print(
                f"{name[:58]:<60}{end.seconds:>6.1f} s{end.memory / 1e6:>7.0f} MB  {'FAULT ' if fault else ''}{shown:.110}",
                flush=True,
            )
            wrong += [name] if fault else []
            shutil.rmtree(directory)
    print(last_line(len(found), len(wrong)))
    return bool(wrong)


if __name__ == "__main__":
    run(main)
