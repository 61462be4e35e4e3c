"""The record of a file or a job: JSON next to what it is about. A lost row of the database is rebuilt from it."""

import json
import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from model.checkpoint.files import read_json, write_atomically
from service.jobs.database import VERSION, newer
from service.jobs.disk import FULL

Item = TypeVar("Item", bound=NamedTuple)

IDS = re.compile(r"(file|ftjob)-\w+")


def write_record(path: Path, item: NamedTuple) -> None:
    """Raises OSError, and leaves the record as it was then.

    On a full disk a record is overwritten in place, within the blocks that it has. If the process dies meanwhile, the
    record is damaged, and the next start writes it again from its row.
    """
    nested = {name: value._asdict() for name, value in item._asdict().items() if hasattr(value, "_asdict")}
    text = json.dumps({"version": VERSION} | item._asdict() | nested)
    try:
        with write_atomically(path, durable=True) as temporary:
            temporary.write_text(text)
    except OSError as error:
        if error.errno not in FULL or not path.exists() or len(text) > 512 * path.stat().st_blocks:
            raise
        with path.open("r+") as file:
            file.write(text)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())


def read_record(path: Path, kind: type[Item]) -> Item:
    """The item that a record describes. Raises DataError if a newer Banded wrote it, else ValueError if it is none."""
    if not path.is_file():
        raise ValueError("it is not a file")
    fields = read_json(path)
    version = fields.pop("version", None)
    if type(version) is not int:
        raise ValueError("it has no version")
    if version > VERSION:
        raise newer(path, version)
    item = checked(fields, kind)
    if item._asdict()["id"] != path.stem:
        raise ValueError(f"it is that of {item._asdict()['id']}")
    return item


def checked(fields: dict[str, Any], kind: type[Item]) -> Item:
    """An item of a row's or a record's fields. Those that the item has a default for may be missing. Raises ValueError."""
    types = get_type_hints(kind)
    if unknown := sorted(fields.keys() - types.keys()):
        raise ValueError(f"it has an unknown field, {unknown[0]}")
    if missing := sorted(types.keys() - fields.keys() - kind._field_defaults.keys()):
        raise ValueError(f"it has no {missing[0]}")
    values = {name: value_of(name, value, types[name]) for name, value in fields.items()}
    item: Item = kind(**values)  # type: ignore[call-overload]
    if "id" in fields and not IDS.fullmatch(fields["id"]):
        raise ValueError(f"{fields['id']!r} is no id")
    return item


def value_of(name: str, value: Any, kind: Any) -> Any:
    """A field's value, as JSON or SQLite has given it. Raises ValueError if it is not of the tuple's `kind`."""
    choices = get_args(kind)
    if choices and get_origin(kind) is not Literal:  # a union
        kind = next((choice for choice in choices if choice is type(value)), choices[0])
    if isinstance(value, dict) and hasattr(kind, "_fields"):
        return checked(value, kind)
    if isinstance(value, str):
        value.encode()  # a lone surrogate is a ValueError
    if type(value) is kind or (get_origin(kind) is Literal and value in choices) or (type(value), kind) == (int, float):
        return value
    raise ValueError(f"{name} is {value!r:.80}")
