"""`python -m tests.budget`: lines of product code in each package, next to its budget; 1 where a package is over it.

A change that needs a larger budget raises it here, and says why in a comment next to the number. Lines are those of .py,
.cpp, .h and .toml files, as `wc -l` counts them, so comments and docstrings count. Data is no code.
"""

import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".cpp", ".h", ".toml"}

# All of the product. It had 16,030 lines before the Python API and the kernels for CPUs other than x86. Simplifying made
<<<<<<< HEAD
# room for both. The packages' budgets add up to more, so that lines can move. Fields of other servers came later: a table of
# what becomes of 200 of them, and the dozen that are honoured, took 460 lines.
TOTAL = 16_370
=======
# room for both. The packages' budgets add up to more, so that lines can move. `banded convert`
# brought 430 lines, adapters of PEFT 150.
TOTAL = 16_490
>>>>>>> 20348c5 (banded convert reads GGUF of a GPT-2 through the gguf package)

BUDGET = {
    "service": 475,  # two more settings, and prompt logprobs in Python
    "service/api": 3020,  # 160 of them are the table of other servers' fields
    "service/commands": 530,
    "service/engine": 3030,  # bad words, truncated prompts, continued messages
    "service/jobs": 510,
    "service/tools": 770,
<<<<<<< HEAD
    "model": 1360,
    "model/checkpoint": 1360,
=======
    "model": 1500,  # 1360 before it read adapters of PEFT
    "model/checkpoint": 1770,  # 1350 before it converted what other programs write
>>>>>>> 20348c5 (banded convert reads GGUF of a GPT-2 through the gguf package)
    "model/training": 1390,
    "kernels": 1030,
    "kernels/cpu": 1600,
    "kernels/gpu": 1400,
}


def lines_of(root: Path) -> Counter[str]:
    """Lines of each package of the product, by folder; what lies deeper counts to the folder on the second level."""
    found: Counter[str] = Counter()
    for top in ("service", "model", "kernels"):
        for file in (root / top).rglob("*"):
            if file.suffix in SUFFIXES:
                package = "/".join(file.relative_to(root).parts[:-1][:2])
                found[package] += file.read_bytes().count(b"\n")
    return found


def report(found: Counter[str], budget: dict[str, int], total: int) -> tuple[list[str], list[str]]:
    """The lines of the table, and what is wrong with them."""
    rows = [(package, found[package], budget.get(package, 0)) for package in sorted({*found, *budget})]
    rows.append(("total", found.total(), total))
    table = [f"{package:<20}{lines:>8,}{limit:>8,}" for package, lines, limit in rows]
    wrong = [
        f"{package} has {lines:,} lines, {lines - limit:,} over its budget"
        for package, lines, limit in rows
        if lines > limit
    ]
    return [f"{'lines':<20}{'now':>8}{'budget':>8}", *table], wrong


def main() -> int:
    table, wrong = report(lines_of(ROOT), BUDGET, TOTAL)
    print("\n".join(table))
    if wrong:
        print(*wrong, "delete lines, or raise the budget in tests/budget.py and say why there", sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
