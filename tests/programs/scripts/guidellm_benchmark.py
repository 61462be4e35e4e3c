"""GuideLLM's benchmark, of completions and of chats."""

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

from checks import DIRECTORY, MODEL, URL, check, tell

tell(version=version("guidellm"))

for path in ("/v1/completions", "/v1/chat/completions"):

    @check(f"ten requests to {path}, two at once")
    def _(path=path):
        output = Path("report.json")
        command = ["guidellm", "run", "--backend", f"kind=openai_http,target={URL},model={MODEL},request_format={path}"]
        command += ["--tokenizer", f"kind=huggingface_auto,model={DIRECTORY}", "--profile", "kind=concurrent,streams=2"]
        command += ["--data", "kind=synthetic_text,prompt_tokens=20,output_tokens=16"]
        command += [
            "--constraint",
            "kind=max_requests,count=10",
            "--output",
            f"kind=json,path={output}",
            "--disable-console",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
        [found] = json.loads(output.read_text())["benchmarks"]
        totals = found["metrics"]["request_totals"]
        assert (totals["successful"], totals["errored"]) == (10, 0), totals
