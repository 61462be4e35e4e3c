"""The import rules: no import runs upward or in a circle, and no torch or web framework where it is not needed."""

import ast
import collections
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Every package and module below one of these names has its rank; the longest name counts. Equal ranks above the engine
# are neighbours that do not import each other.
RANKS = {
    "kernels": 0,
    "model": 1,
    "service.engine": 2,
    "service.settings": 3,
    "service.jobs": 4,
    "service.tools": 4,
    "service": 4,  # the Python API
    "service.api": 5,
    "service.commands": 6,
    "service.cli": 7,
    "tests": 8,
}
WEB = {"fastapi", "starlette", "pydantic", "pydantic_core", "pydantic_settings", "uvicorn", "sqlite3"}


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside functions, and every name that it takes from one."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def graph() -> dict[str, set[str]]:
    """The product's modules, and which of the product's modules each imports."""
    files = {}
    for file in sorted(file for layer in ("kernels", "model", "service") for file in (ROOT / layer).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return {
        module: {name for name in imports(file) if name in files or name.split(".")[0] == "tests"} - {module}
        for module, file in files.items()
    }


def place(module: str) -> tuple[str, int]:
    """The longest name of RANKS that `module` lies below, and its rank."""
    found = max((name for name in RANKS if f"{module}.".startswith(f"{name}.")), key=len)
    return found, RANKS[found]


def test_no_import_runs_upward() -> None:
    upward = []
    for module, imported in graph().items():
        package, rank = place(module)
        for name in imported - {"service"}:
            other, above = place(name)
            if above > rank or (above == rank > RANKS["service.engine"] and other != package):
                upward.append((module, name))
    assert len(graph()) > 80
    assert upward == []


def circles() -> list[list[str]]:
    """Modules that import each other, directly or through others: Tarjan's strongly connected components."""
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        numbers[module] = lowest[module] = len(numbers)
        stack.append(module)
        for name in graph().get(module, ()):
            if name not in numbers:
                visit(name)
            if name in stack:
                lowest[module] = min(lowest[module], lowest[name])
        if lowest[module] == numbers[module]:
            component = [stack.pop()]
            while component[-1] != module:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for module in graph():
        if module not in numbers:
            visit(module)
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles() == []


@pytest.mark.parametrize("package", ["kernels", "model", "service/engine", "service/tools", "service/jobs"])
def test_web_and_database_stay_in_api_and_jobs(package: str) -> None:
    foreign = WEB - {"sqlite3"} if package == "service/jobs" else WEB
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    assert [f"{file.name}: {name}" for file in files for name in imports(file) if name.split(".")[0] in foreign] == []


def test_no_two_classes_share_a_name() -> None:
    names = collections.Counter(
        node.name
        for layer in ("kernels", "model", "service")
        for file in (ROOT / layer).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = sys.stdlib_module_names | {"torch", "triton", "kernels"}
    files = sorted((ROOT / "kernels").rglob("*.py"))
    foreign = [f"{file.name}: {name}" for file in files for name in imports(file) if name.split(".")[0] not in allowed]
    assert foreign == []


NUMBERS_ONLY = [
    "service.engine.scheduler",
    "service.engine.retry",
    "service.engine.pages",
    "service.engine.text",
    "service.engine.prompts",
    "service.api.limits",
    "model.checkpoint.prompt_format",
    "model.checkpoint.templates",
    "service",
    "service.engine.choice",
    "service.engine.request",
    "service.engine.models",
    "service.api.schema.completions",
    "service.engine.engine",
    "service.api.app",
    "service.settings",
    "service.tools.bench",
    "service.api.server",
    "service.cli",
    "model.checkpoint.architectures",
    "model.checkpoint.files",
    "model.checkpoint.tokenizer",
    "model.checkpoint.vocabulary",
    "model.training.examples",
    "model.training.plans",
    "model.training.records",
    "model.step",
    "model.config",
    "kernels.band",
]


def test_what_needs_no_torch_does_not_import_it() -> None:
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    run = subprocess.run([sys.executable, "-c", script, *NUMBERS_ONLY], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
