"""What a run writes for others to read: the loss curve, and the report of a fine-tune's files. No torch in here."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from model.checkpoint.files import read_json, write_atomically

CURVE_FILE, REPORT_FILE = "loss.csv", "report.json"


class LossRow(NamedTuple):
    """One update, a row of the loss curve."""

    update: int  # the first is 1
    seen: int  # tokens, or examples in fine-tuning
    loss: float  # nats a token, ahead of the update
    learning_rate: float
    gradient_norm: float  # ahead of clipping
    held_out_loss: float | None = None


def write_curve(path: Path, rows: Sequence[LossRow], unit: str) -> None:
    """`unit` is "token" or "example", what `seen` counts."""
    with write_atomically(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f"{unit}s" if name == "seen" else name for name in LossRow._fields])
        writer.writerows(rows)


def read_curve(path: Path, after: int = 0) -> list[LossRow]:
    """The updates that follow update `after`."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [
        LossRow(int(update), int(seen), float(loss), float(rate), float(norm), float(held_out) if held_out else None)
        for update, seen, loss, rate, norm, held_out in rows
        if int(update) > after
    ]


class FileReport(NamedTuple):
    """What a file of examples holds, and how it could be better."""

    examples: int
    tokens: int
    advice: list[str]


class DataReport(NamedTuple):
    """Written when a fine-tune has read its files and not begun to train."""

    files: list[FileReport]  # the examples, then the held-out ones if there are any
    updates: int

    def write(self, path: Path) -> None:
        fields = {"files": [file._asdict() for file in self.files], "updates": self.updates}
        with write_atomically(path) as file:
            file.write_text(json.dumps(fields))

    @staticmethod
    def read(path: Path) -> "DataReport":
        fields = read_json(path)
        return DataReport([FileReport(**file) for file in fields["files"]], fields["updates"])
