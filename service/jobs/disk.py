"""A full disk: what it raises, and the room that is kept for the changes that make room."""

import errno
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from model.checkpoint.files import write_atomically

# Bytes that must be free besides a file's content: for its record, the database's growth, and what SQLite keeps next to it.
SPARE = 256 << 10
FULL = (errno.ENOSPC, errno.EDQUOT)
# SQLite's primary codes for a write that failed. Only the first always means a full disk.
UNWRITTEN = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)


class DiskFullError(OSError):
    """A disk has too little room. The message has the free and the needed bytes."""

    def __init__(self, directory: Path, needed: int, purpose: str):
        free = free_bytes(directory)
        state = "is full" if free < needed else "takes no more, as by a quota or without free inodes"
        super().__init__(f"the disk for {purpose} {state}: {free} bytes are free, {needed} are needed")


def free_bytes(directory: Path) -> int:
    return shutil.disk_usage(directory).free


@contextmanager
def room_for(purpose: str, directory: Path, needed: int) -> Iterator[None]:
    """Raises DiskFullError if a write in this block finds the disk of `directory` full."""
    try:
        yield
    except DiskFullError:
        raise
    except (OSError, sqlite3.Error) as error:
        if not is_full(error, directory):
            raise
        raise DiskFullError(directory, needed, purpose) from error


def is_full(error: OSError | sqlite3.Error, directory: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary one; errors of the module itself have none
    return code == sqlite3.SQLITE_FULL or (code in UNWRITTEN and free_bytes(directory) < SPARE)


class Ballast:
    """A file without a meaning. On a full disk it is given up for changes that make room, which need a little themselves."""

    def __init__(self, path: Path):
        self._path = path

    def fill(self) -> None:
        """Take the room again, ahead of what else could use it, but leave some for what SQLite keeps."""
        with suppress(OSError):
            if not self._path.exists() and free_bytes(self._path.parent) > SPARE + SPARE // 4:
                with write_atomically(self._path) as temporary:
                    temporary.write_bytes(os.urandom(SPARE))  # neither a hole nor compressible

    def give_up(self) -> None:
        self._path.unlink(missing_ok=True)
