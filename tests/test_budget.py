"""The table of lines per package, and what makes it fail."""

from collections import Counter
from pathlib import Path

from tests.budget import BUDGET, ROOT, lines_of, report


def test_lines_are_counted_by_package(tmp_path: Path) -> None:
    for name, text in {
        "service/cli.py": "a\nb\n",
        "service/api/app.py": "a\n",
        "service/api/routes/files.py": "a\nb\nc\n",
        "kernels/cpu/csrc/simd.h": "a\n",
        "kernels/cpu/csrc/abi.cpp": "a\n",
        "model/training/words.toml": "a\n",
        "model/data/demo/README.md": "a\n" * 99,
        "tests/test_x.py": "a\n" * 99,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert lines_of(tmp_path) == {"service": 2, "service/api": 4, "kernels/cpu": 2, "model/training": 1}


def test_a_package_or_the_total_over_its_budget_is_named_and_so_is_a_package_without_one() -> None:
    found = Counter({"service": 1200, "model": 20, "odd": 1})
    table, wrong = report(found, {"service": 1100, "model": 20, "gone": 5}, 1220)
    assert [line.split() for line in table] == [
        ["lines", "now", "budget"],
        ["gone", "0", "5"],
        ["model", "20", "20"],
        ["odd", "1", "0"],
        ["service", "1,200", "1,100"],
        ["total", "1,221", "1,220"],
    ]
    assert wrong == [
        "odd has 1 lines, 1 over its budget",
        "service has 1,200 lines, 100 over its budget",
        "total has 1,221 lines, 1 over its budget",
    ]


def test_every_package_has_a_budget() -> None:
    assert lines_of(ROOT).keys() <= BUDGET.keys()
