"""The import rule: kernels <- model <- service, and no torch where plain numbers are enough."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "model", "service")


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield str(node.module)


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_imports_upward(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    above = set(LAYERS[LAYERS.index(layer) + 1 :]) | {"tests"}
    upward = [f"{file.relative_to(ROOT)}: {name}" for file in files for name in imports(file) if name.split(".")[0] in above]
    assert upward == []


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = sys.stdlib_module_names | {"torch", "triton", "kernels"}
    files = sorted((ROOT / "kernels").rglob("*.py"))
    foreign = [f"{file.name}: {name}" for file in files for name in imports(file) if name.split(".")[0] not in allowed]
    assert foreign == []


NUMBERS_ONLY = [
    "service.engine.scheduler",
    "service.engine.pages",
    "service.engine.text",
    "service.engine.prompts",
    "service.api.limits",
    "model.checkpoint.prompt_format",
    "service.engine.choice",
    "service.engine.models",
    "service.api.schema.completions",
    "service.engine.engine",
    "service.api.app",
    "service.settings",
    "service.tools.bench",
    "service.api.server",
    "service.cli",
    "model.checkpoint.tokenizer",
    "model.checkpoint.vocabulary",
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
