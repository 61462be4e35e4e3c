"""Tools that some tests run, and that a machine may lack."""

import os
import shutil

import pytest


def demand(tool: str) -> None:
    """Skip the test if `tool` is not installed. CI sets BANDED_DEMAND=1: there the test fails instead."""
    if shutil.which(tool) is None:
        reason = f"{tool} is not installed (make native-tools, make prometheus)"
        if os.environ.get("BANDED_DEMAND") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
