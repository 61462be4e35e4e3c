"""The requests of mikupad's page to a server that speaks OpenAI's API: the page itself is in no registry.

It asks for 10 likely tokens with each token, sends settings of llama.cpp and text-generation-webui, and reads one token
from each event.
"""

import json

from checks import MODEL, PROMPT, URL, check, tell
from proxies import post

tell(version="requests only")
BODY = {
    "model": MODEL,
    "prompt": PROMPT,
    "temperature": 0.7,
    "penalize_nl": False,
    "ban_eos_token": False,
    "top_p": 0.95,
    "top_k": 40,
    "min_p": 0,
    "max_tokens": 30,
    "logprobs": 10,
    "stream": True,
}


@check("a completion at the page's settings: a token an event, with ten likely ones")
def _():
    connection, response = post(URL, BODY)
    text = response.read().decode()
    connection.close()
    assert response.status == 200, text
    chunks = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    tokens = [chunk["choices"][0] for chunk in chunks if chunk["choices"] and chunk["choices"][0]["text"]]
    assert len(tokens) > 3, text
    assert all(len(token["logprobs"]["top_logprobs"][0]) >= 10 for token in tokens), tokens[0]
