"""The requests of `vllm bench serve`: its package needs all of vLLM."""

import json

from checks import MODEL, PROMPT, URL, check, tell
from proxies import post

tell(version="requests only")
COMMON = {"model": MODEL, "temperature": 0.0, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
BODIES = {
    "/v1/completions": {"prompt": PROMPT, "repetition_penalty": 1.0, "max_tokens": 20, "logprobs": None},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
        "max_completion_tokens": 20,
    },
}

for path, body in BODIES.items():

    @check(f"{path}: a stream with its usage")
    def _(path=path, body=body):
        connection, response = post(URL, COMMON | body, path)
        text = response.read().decode()
        connection.close()
        assert response.status == 200, text
        chunks = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
        assert sum(bool(chunk["choices"]) for chunk in chunks) >= 20, text
        assert chunks[-1]["usage"]["completion_tokens"] == 20, text
