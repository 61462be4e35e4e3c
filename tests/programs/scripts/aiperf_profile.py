"""aiperf's profile, of completions and of chats, as streams."""

import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path

from checks import DIRECTORY, MODEL, URL, check, tell

tell(version=version("aiperf"))
del os.environ["HF_HUB_OFFLINE"]  # with it, aiperf takes a folder for the name of a repository
COMMON = "--streaming --concurrency 2 --request-count 10 --isl 20 --osl 16 --ui none --no-gpu-telemetry"

for kind in ("completions", "chat"):

    @check(f"ten requests to {kind}, two at once")
    def _(kind=kind):
        command = ["aiperf", "profile", "--model", MODEL, "--url", URL, "--endpoint-type", kind, *COMMON.split()]
        command += ["--tokenizer", DIRECTORY, "--artifact-dir", kind]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
        [exported] = Path(kind).rglob("profile_export_aiperf.json")
        found = json.loads(exported.read_text())
        assert found["request_count"]["avg"] == 10, found["request_count"]
        assert not found.get("error_summary"), found["error_summary"]
