"""LiteLLM's proxy, which falls back to another model where a prompt is too long."""

import json
from importlib.metadata import version
from pathlib import Path

from checks import MODEL, TOO_LONG, URL, check, free_port, running, tell
from proxies import check_proxy, post

tell(version=version("litellm"))
port = free_port()
TO = {"api_base": f"{URL}/v1", "api_key": "sk-none"}
COMPLETES, CHATS = f"text-completion-openai/{MODEL}", f"openai/{MODEL}"
config = Path.cwd() / "config.yaml"
models = [
    {"model_name": "tales", "litellm_params": {"model": COMPLETES} | TO},
    {"model_name": "short", "litellm_params": {"model": CHATS} | TO},
    {"model_name": "long", "litellm_params": {"model": CHATS, "mock_response": "from the long one"} | TO},
]
settings = {"num_retries": 0, "telemetry": False, "context_window_fallbacks": [{"short": ["long"]}]}
config.write_text(json.dumps({"model_list": models, "litellm_settings": settings, "router_settings": {"num_retries": 0}}))
with running(
    ["litellm", "--config", str(config), "--host", "127.0.0.1", "--port", str(port)], port, LITELLM_MASTER_KEY="sk-none"
):
    check_proxy(f"http://127.0.0.1:{port}", "tales", chat="short")

    @check("a chat that is too long falls back to another model")
    def _():
        body = {"model": "short", "messages": [{"role": "user", "content": TOO_LONG}]}
        connection, response = post(f"http://127.0.0.1:{port}", body, "/v1/chat/completions")
        text = response.read().decode()
        connection.close()
        assert response.status == 200, text
        assert json.loads(text)["choices"][0]["message"]["content"] == "from the long one", text
