"""What a run writes is what its readers get."""

from pathlib import Path

import pytest

from model.training.records import DataReport, FileReport, LossRow, read_curve, write_curve

ROWS = [LossRow(1, 8, 10.1, 1e-3, 0.1 + 0.2), LossRow(2, 16, 1 / 3, 2e-3, 1e-30, 4.5), LossRow(3, 24, 0.0, 1.0, 2.0, 0.0)]


def test_a_curve_is_read_to_the_last_bit(tmp_path: Path) -> None:
    write_curve(tmp_path / "loss.csv", ROWS, "example")
    assert read_curve(tmp_path / "loss.csv") == ROWS
    assert read_curve(tmp_path / "loss.csv", after=2) == ROWS[2:]
    assert read_curve(tmp_path / "loss.csv", after=3) == []


@pytest.mark.parametrize("unit", ["token", "example"])
def test_a_curve_says_what_it_counts(unit: str, tmp_path: Path) -> None:
    write_curve(tmp_path / "loss.csv", ROWS, unit)
    header = (tmp_path / "loss.csv").read_text().splitlines()[0]
    assert header == f"update,{unit}s,loss,learning_rate,gradient_norm,held_out_loss"


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = DataReport([FileReport(3, 20, ["a line"]), FileReport(1, 5, [])], updates=7)
    report.write(tmp_path / "report.json")
    assert DataReport.read(tmp_path / "report.json") == report
