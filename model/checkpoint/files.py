"""Read the files of a checkpoint or a run, and replace them atomically."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
# Endings of weights in formats that only `banded convert` opens.
FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".gguf")

# A JSON object as it was parsed.
Json = dict[str, Any]


class CheckpointError(ValueError):
    """A file or directory that can't be used: which one, which field, and what is wrong with it."""


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} can't be read: {getattr(error, 'strerror', error)}") from error


def read_json(path: Path) -> Json:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # ValueError: neither UTF-8 nor JSON
        raise CheckpointError(f"{path} can't be read as JSON: {getattr(error, 'strerror', error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def json_lines(data: bytes, name: str) -> Iterator[tuple[int, str]]:
    """The lines of JSONL that are not blank, numbered from 1. A byte-order mark is no part of them.

    Raises ValueError naming `name` if `data` is not UTF-8.
    """
    # Unlike str.splitlines, it does not end a line at U+2028. The text of a whole file may take four times its bytes.
    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig")
    try:
        for number, line in enumerate(text, 1):
            if line.strip():
                yield number, line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error}") from error


def decoded(data: bytes, name: str) -> str:
    """The text of a file, without a byte-order mark. Raises ValueError naming `name` if it is not UTF-8."""
    try:
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error}") from error


def optional_json(path: Path) -> Json | None:
    return read_json(path) if path.exists() else None


@contextmanager
def write_atomically(path: Path, *, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """Gives a temporary path to write to. The file there replaces `path` when the block ends without an error.

    With `durable` its content is on the disk first. `shared` is for a file that several processes may write at once.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if shared else f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # left by a process that was killed
    temporary.touch()
    mode = temporary.stat().st_mode
    yield temporary
    temporary.chmod(mode)  # safetensors lets only the owner read its files, and another user may serve them
    if durable:
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    os.replace(temporary, path)


def conversion(path: Path) -> str:
    """The end of an error message about `path`, a file or a directory: the command that converts what it holds, if any."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [file.name for file in files if file.suffix in FOREIGN]
    return f"; to make a model of {few(found)}: banded convert {path} NEW_DIRECTORY" if found else ""


def few(names: Sequence[object]) -> str:
    """The first five names, and how many more there are."""
    rest = len(names) - 5
    return ", ".join(map(str, names[:5])) + (f" and {rest} more" if rest > 0 else "")
