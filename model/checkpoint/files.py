"""Read the files of a checkpoint or a run, and replace them atomically."""

import io
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

CONFIG_FILE = "config.json"
# Endings of weights in formats that only `banded convert` opens.
FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".gguf")

# Bytes that files of a checkpoint may have, several times what published ones have: of JSON, and of a vocabulary.
JSON_BYTES, VOCABULARY_BYTES = 4 << 20, 20 << 20
# Values in a file of JSON. Each takes up to a hundred bytes, whatever it takes in the file.
MAX_VALUES = 2_000_000

# A JSON object as it was parsed.
Json = dict[str, Any]


class CheckpointError(ValueError):
    """A file or directory that can't be used: which one, which field, and what is wrong with it."""


def check_file(path: Path, max_bytes: int | None = None) -> None:
    """CheckpointError unless `path` is a regular file of at most `max_bytes`: a pipe or a device may have no end."""
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} can't be read: it is no regular file")
    if max_bytes is not None and found.st_size > max_bytes:
        raise CheckpointError(f"{path} can't be read: it has {found.st_size} bytes, at most {max_bytes} are expected")


def read_file(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file of at most `max_bytes`."""
    check_file(path, max_bytes)
    try:
        with path.open("rb") as file:
            return file.read(max_bytes)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error


def read_text(path: Path, max_bytes: int = JSON_BYTES) -> str:
    try:
        return read_file(path, max_bytes).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error


def read_json(path: Path, max_bytes: int = JSON_BYTES) -> Json:
    data = read_file(path, max_bytes)
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise CheckpointError(f"{path} can't be read as JSON: it holds more than {MAX_VALUES} values")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: neither UTF-8 nor JSON
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def json_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """The lines of JSONL that are not blank, numbered from 1. A byte-order mark is no part of them.

    Raises ValueError naming `name` if `file` is not UTF-8.
    """
    # Unlike str.splitlines, it does not end a line at U+2028. The text of a whole file may take four times its bytes.
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
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


def optional_json(path: Path, max_bytes: int = JSON_BYTES) -> Json | None:
    return read_json(path, max_bytes) if is_there(path) else None


def is_there(path: Path) -> bool:
    """Whether there is a file, or a link that leads nowhere: that one must not pass for a file that is missing."""
    return os.path.lexists(path)


@contextmanager
def write_atomically(path: Path, *, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """Gives a temporary path to write to. The file there replaces `path` when the block ends without an error.

    After an error the temporary file is gone. With `durable` the new file is on the disk when the block has ended, and its
    content ahead of its name. `shared` is for a file that several processes may write at once.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if shared else f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # left by a process that was killed
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors lets only the owner read its files, and another user may serve them
        if durable:
            flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # what was written may be what fills the disk
        raise
    if durable:
        flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def conversion(path: Path) -> str:
    """The end of an error message about `path`, a file or a directory: the command that converts what it holds, if any."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [file.name for file in files if file.suffix in FOREIGN]
    return f"; to make a model of {few(found)}: banded convert {path} NEW_DIRECTORY" if found else ""


def few(names: Sequence[object]) -> str:
    """The first five names, and how many more there are."""
    rest = len(names) - 5
    return ", ".join(map(str, names[:5])) + (f" and {rest} more" if rest > 0 else "")
