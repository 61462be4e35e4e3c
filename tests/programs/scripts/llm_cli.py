"""Simon Willison's `llm`, with this server's model entered in its file of extra OpenAI models."""

import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path

from checks import MODEL, PROMPT, TOO_LONG, URL, check, tell

tell(version=version("llm"))
folder = Path.cwd() / "llm"
folder.mkdir()
os.environ["LLM_USER_PATH"] = str(folder)
about = {"model_name": MODEL, "api_base": f"{URL}/v1", "api_key_name": "banded"}
models = [{"model_id": "chat"} | about, {"model_id": "tales", "completion": True} | about]
folder.joinpath("extra-openai-models.yaml").write_text(json.dumps(models))


def llm(*arguments, status=0):
    done = subprocess.run(["llm", *arguments, "--key", "sk-none"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


@check("a chat, whole and as a stream")
def _():
    arguments = ("-m", "chat", "Tell a tale.", "-o", "temperature", "0", "-o", "max_tokens", "20")
    assert llm(*arguments, "--no-stream") == llm(*arguments) != "\n"


@check("the log of a chat has its usage")
def _():
    logged = json.loads(subprocess.check_output(["llm", "logs", "-n", "1", "--json"]))[0]
    assert logged["output_tokens"] > 0
    assert logged["input_tokens"] > 0


@check("a completion, whole and as a stream")
def _():
    arguments = ("-m", "tales", PROMPT, "-o", "temperature", "0", "-o", "max_tokens", "20")
    assert llm(*arguments, "--no-stream") == llm(*arguments) != "\n"


@check("a chat at its own settings")
def _():
    assert llm("-m", "chat", "-s", "You tell tales.", "Tell one.").strip()


@check("a prompt that is too long is said to be so")
def _():
    assert "2048" in llm("-m", "tales", TOO_LONG, status=1)
