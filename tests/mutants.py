"""`make mutants`: changes one operator, number or statement at a time, and counts the changes that a test notices.

Each target has the tests that are about it. They run on a copy of the working tree, which must pass them first; then a
sample of the possible mutants, the same one for a seed, is tried one by one. Prints each survivor with its line, and the
share that was killed. A survivor is a question: is the behaviour untested, or is the mutant as right as the original?

    make mutants                                            # the sample
    python -m tests.mutants --only pages.py --share 1       # all mutants of a file
"""

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SEED = 20200528
ENGINE = "tests/service/engine/test_"

# The tests that are about a file, quick ones first.
TARGETS = {
    "service/engine/scheduler.py": [f"{ENGINE}scheduler_edges.py", f"{ENGINE}scheduler.py"],
    "service/engine/pages.py": [f"{ENGINE}pages.py", f"{ENGINE}scheduler_edges.py", f"{ENGINE}scheduler.py"],
    "service/engine/text.py": [f"{ENGINE}text.py"],
    "service/engine/choice.py": [
        f"{ENGINE}choice.py",
        f"{ENGINE}engine.py",
        "tests/service/api/test_logprobs.py",
        "tests/service/api/test_score.py",
    ],
    "service/api/limits.py": ["tests/service/api/test_limits.py", "tests/service/api/test_limits_rounding.py"],
    "kernels/torch_sampling.py": ["tests/kernels/test_penalties.py", "tests/kernels/test_sampling.py"],
}
# Which of them: of the implementations of sampling, the one that is mutated.
SELECTED = {"kernels/torch_sampling.py": "cpu"}

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.Add,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


class Mutant(NamedTuple):
    path: str
    line: int
    before: str
    after: str
    text: str  # of the whole file

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.before} -> {self.after}"


def mutants_of(path: str, source: str) -> list[Mutant]:
    """All mutants of a file, in order of their lines."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    data = source.encode()
    found = []
    for node in mutable(ast.parse(source)):
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        for changed in changes(node):
            after = ast.unparse(changed)
            code = after if isinstance(node, ast.stmt) else f"({after})"
            text = (data[:start] + code.encode() + data[end:]).decode()
            found.append(Mutant(path, node.lineno, short(ast.unparse(node)), short(after), text))
    return sorted(found, key=lambda mutant: mutant.line)


def mutable(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Statements and expressions that a test could notice: no annotations, decorators, messages, assertions or log lines."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Assert | ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
            continue
        if isinstance(child, ast.Expr) and (isinstance(child.value, ast.Constant) or "log." in ast.unparse(child)[:4]):
            continue
        if isinstance(child, ast.expr | ast.stmt):
            yield child
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            children: list[ast.AST] = [*child.body, *child.args.defaults, *filter(None, child.args.kw_defaults)]
            yield from mutable(ast.Module(children, []))  # type: ignore[arg-type]
        elif isinstance(child, ast.ClassDef):
            yield from mutable(ast.Module(child.body, []))
        elif isinstance(child, ast.AnnAssign):
            if child.value:
                yield from mutable(ast.Expression(child.value))
        else:
            yield from mutable(child)


def changes(node: ast.expr | ast.stmt) -> Iterator[ast.AST]:
    """What could stand in a node's place."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARISONS:
            yield with_field(node, ops=[COMPARISONS[type(op)]()])
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            yield with_field(node, op=OPERATORS[type(op)]())
        case ast.BoolOp(op=op):
            yield with_field(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not()):
            yield node.operand
        case ast.UnaryOp(op=ast.USub()):
            yield node.operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            yield with_field(node, func=ast.Name(NAMES[name]))
        case ast.IfExp():
            yield with_field(node, body=node.orelse, orelse=node.body)
        case ast.If() | ast.While():
            pass  # their tests are mutated as expressions
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Delete():
            yield ast.Pass()
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()


def with_field(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 90 else f"{line[:87]}..."


class Copy:
    """A copy of the working tree in which one mutant at a time is put and tested."""

    def __init__(self, directory: Path):
        self.directory = directory
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, directory / name)

    def passes(self, path: str, text: str, timeout: float) -> bool:
        """Whether the tests of a file pass with this text in it; tests that do not end have noticed."""
        file = self.directory / path
        original = file.read_text()
        file.write_text(text)
        command = [sys.executable, "-m", "pytest", "-x", "--hypothesis-profile", "mutants", "-p", "no:cacheprovider"]
        if path in SELECTED:
            command += ["-k", SELECTED[path]]
        environment = os.environ | {"PYTHONPATH": str(self.directory), "OMP_NUM_THREADS": "1"}
        try:
            process = subprocess.run(
                [*command, *TARGETS[path]],
                cwd=self.directory,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        finally:
            file.write_text(original)
        return process.returncode == 0


def main(argv: list[str] | None = None) -> int:
    """1 where the unchanged files do not pass their tests. Survivors are no failure."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="files whose path ends with this")
    options.add_argument(
        "--share", type=float, default=0.15, help="of all mutants, how many are tried; default: %(default)s"
    )
    options.add_argument("--seed", type=int, default=SEED)
    options.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    args = options.parse_args(argv)
    tried = killed = 0
    with tempfile.TemporaryDirectory() as scratch:
        copies: Queue[Copy] = Queue()
        for i in range(args.workers):
            copies.put(Copy(Path(scratch) / str(i)))
        for path in TARGETS:
            if not path.endswith(args.only):
                continue
            started = time.monotonic()
            if not copies.queue[0].passes(path, (ROOT / path).read_text(), 600):
                print(f"{path}: the tests fail without any mutant", file=sys.stderr)
                return 1
            limit = 30 + 5 * (time.monotonic() - started)

            def survives(mutant: Mutant, limit: float = limit) -> bool:
                place = copies.get()
                try:
                    return place.passes(mutant.path, mutant.text, limit)
                finally:
                    copies.put(place)

            everything = mutants_of(path, (ROOT / path).read_text())
            number = max(1, round(args.share * len(everything)))
            chosen = sorted(random.Random(args.seed).sample(everything, number), key=lambda mutant: mutant.line)
            survivors = 0
            with ThreadPoolExecutor(args.workers) as pool:
                for mutant, alive in zip(chosen, pool.map(survives, chosen), strict=True):
                    survivors += alive
                    if alive:
                        print(f"survived {mutant}", flush=True)
            print(f"{path}: {number - survivors} of {number} killed, of {len(everything)} possible", flush=True)
            tried, killed = tried + number, killed + number - survivors
    print(f"score: {killed} of {tried} killed, {killed / tried:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
