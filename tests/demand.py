"""What a test needs of the machine: a program that is installed, or a feature of the CPU.

`make tools` installs the programs. Where one is missing, the tests that run it are skipped and say so; CI sets
DEMAND_TOOLS=1, which makes a missing program a failure. A CPU's features cannot be installed: without them, tests are
skipped everywhere. The end of a run counts the skipped tests by reason (tests/conftest.py).
"""

import os
import shutil

import pytest
import torch

# Marks a test, or one of its parameters, that serves or multiplies int8 weights.
needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU has no VNNI")


def demand(*tools: str, why: str = "") -> str:
    """The path of a program; of several names, of the first that is installed.

    Skips the test where there is none, or fails it under DEMAND_TOOLS=1. `why` says what the test runs it for. Call it
    from a test, a fixture or the top level of a test file.
    """
    for tool in tools:
        if found := shutil.which(tool):
            return found
    reason = f"{' or '.join(tools)} is not installed" + (f": {why}" if why else "") + "; `make tools` installs it"
    if os.environ.get("DEMAND_TOOLS") == "1":
        pytest.fail(f"DEMAND_TOOLS=1, but {reason}", pytrace=False)
    pytest.skip(reason, allow_module_level=True)
