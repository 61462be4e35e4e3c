"""What loading a model does not import, because it takes seconds of every server's start."""

import subprocess
import sys
from pathlib import Path

from tests.model.checkpoint.checkpoints import tiny

SCRIPT = """
import sys
from pathlib import Path
import torch
from model.checkpoint.weights import load_model
load_model(Path(sys.argv[1]), torch.float32)
print(sorted({"torch._dynamo", "transformers", "sympy"} & sys.modules.keys()))
"""


def test_loading_a_model_imports_no_compiler(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tiny("banded", tmp_path))]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert found.stdout == "[]\n"
