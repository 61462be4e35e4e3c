"""OpenAI's SDK for Python as it was until 2023."""

import openai
from checks import LINE_SEPARATORS, MODEL, PROMPT, TOO_LONG, URL, check, refused, tell

tell(version=openai.version.VERSION)
openai.api_base = f"{URL}/v1"
openai.api_key = "sk-none"
CHAT = [{"role": "user", "content": "Tell a tale."}]


@check("the list of models")
def _():
    assert [model["id"] for model in openai.Model.list()["data"]] == [MODEL]


@check("the list of engines")
def _():
    assert [engine["id"] for engine in openai.Engine.list()["data"]] == [MODEL]


@check("a completion with its usage")
def _():
    answer = openai.Completion.create(model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0)
    assert answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 20


@check("a completion of an engine")
def _():
    answer = openai.Completion.create(engine=MODEL, prompt=PROMPT, max_tokens=5)
    assert answer["model"] == MODEL


@check("a completion as a stream")
def _():
    fields = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    text = "".join(chunk["choices"][0]["text"] for chunk in openai.Completion.create(**fields, stream=True))
    assert text == openai.Completion.create(**fields)["choices"][0]["text"]


@check("a chat, whole and as a stream")
def _():
    fields = {"model": MODEL, "messages": CHAT, "max_tokens": 20, "temperature": 0}
    chunks = openai.ChatCompletion.create(**fields, stream=True)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == openai.ChatCompletion.create(**fields)["choices"][0]["message"]["content"]


@check("separators of lines in a stream")
def _():
    chunks = openai.Completion.create(model=MODEL, prompt=LINE_SEPARATORS, echo=True, max_tokens=1, stream=True)
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text.startswith(LINE_SEPARATORS), ascii(text)


@check("a prompt that is too long is an InvalidRequestError")
def _():
    with refused(openai.error.InvalidRequestError, "maximum context length is 2048 tokens"):
        openai.Completion.create(model=MODEL, prompt=TOO_LONG)
