"""OpenAI's SDK for Python, today's and that of the time when it became version 1."""

import openai
from checks import LINE_SEPARATORS, MODEL, PROMPT, TOO_LONG, URL, check, refused, tell

tell(version=openai.__version__)
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="sk-none", max_retries=0)
CHAT = [{"role": "system", "content": "You tell tales."}, {"role": "user", "content": "Tell one."}]
# Older versions don't know the argument.
WITH_USAGE = {"extra_body": {"stream_options": {"include_usage": True}}}


@check("the list of models")
def _():
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


@check("a completion with its usage")
def _():
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0)
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 20


@check("a completion as a stream")
def _():
    fields = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    chunks = list(client.completions.create(**fields, stream=True, **WITH_USAGE))
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == client.completions.create(**fields).choices[0].text
    assert chunks[-1].usage.completion_tokens == 20


@check("a chat")
def _():
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=20)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@check("a chat as a stream")
def _():
    fields = {"model": MODEL, "messages": CHAT, "max_tokens": 20, "temperature": 0}
    chunks = list(client.chat.completions.create(**fields, stream=True, **WITH_USAGE))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == client.chat.completions.create(**fields).choices[0].message.content


@check("a chat with tools that it may call")
def _():
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=8, tools=[tool])
    assert not answer.choices[0].message.tool_calls


@check("separators of lines in a stream")
def _():
    fields = {"model": MODEL, "prompt": LINE_SEPARATORS, "echo": True, "max_tokens": 1, "stream": True}
    chunks = client.completions.create(**fields)
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text.startswith(LINE_SEPARATORS), ascii(text)


@check("logprobs of a prompt")
def _():
    fields = {"model": MODEL, "prompt": PROMPT, "echo": True, "logprobs": 2, "max_tokens": 0}
    found = client.completions.create(**fields).choices[0].logprobs
    assert "".join(found.tokens) == PROMPT
    assert found.token_logprobs[0] is None
    assert all(value < 0 for value in found.token_logprobs[1:])


@check("a prompt that is too long is a BadRequestError with its code")
def _():
    with refused(openai.BadRequestError, "context_length_exceeded", "maximum context length is 2048 tokens"):
        client.completions.create(model=MODEL, prompt=TOO_LONG)


@check("asynchronous requests at once")
async def _():
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="sk-none", max_retries=0) as asynchronous:
        requests = [asynchronous.completions.create(model=MODEL, prompt=PROMPT, max_tokens=n) for n in range(1, 9)]
        answers = await asyncio.gather(*requests)
    assert all(1 <= answer.usage.completion_tokens <= n for n, answer in enumerate(answers, 1))
