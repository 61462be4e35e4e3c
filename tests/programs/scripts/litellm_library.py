"""LiteLLM as a library, to a server that speaks OpenAI's API."""

from importlib.metadata import version

import litellm
from checks import MODEL, PROMPT, TOO_LONG, URL, check, refused, tell

tell(version=version("litellm"))
litellm.telemetry = False
TO = {"api_base": f"{URL}/v1", "api_key": "sk-none", "num_retries": 0}
COMPLETES, CHATS = f"text-completion-openai/{MODEL}", f"openai/{MODEL}"
CHAT = [{"role": "user", "content": "Tell a tale."}]


@check("a completion, whole and as a stream")
def _():
    fields = {"model": COMPLETES, "prompt": PROMPT, "max_tokens": 20, "temperature": 0} | TO
    answer = litellm.text_completion(**fields)
    assert answer.usage.completion_tokens == 20
    text = "".join(chunk.choices[0].text or "" for chunk in litellm.text_completion(**fields, stream=True))
    assert text == answer.choices[0].text


@check("a chat, whole and as a stream with usage")
def _():
    fields = {"model": CHATS, "messages": CHAT, "max_tokens": 20, "temperature": 0} | TO
    answer = litellm.completion(**fields)
    assert answer.usage.completion_tokens <= 20
    chunks = list(litellm.completion(**fields, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens


@check("the hosted_vllm provider, as its users choose it for such servers")
def _():
    answer = litellm.completion(model=f"hosted_vllm/{MODEL}", messages=CHAT, max_tokens=8, **TO)
    assert answer.choices[0].message.role == "assistant"


@check("a chat with tools that it may call")
def _():
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
    answer = litellm.completion(model=CHATS, messages=CHAT, max_tokens=8, tools=[tool], **TO)
    assert not answer.choices[0].message.tool_calls


@check("a prompt that is too long is a ContextWindowExceededError")
def _():
    with refused(litellm.ContextWindowExceededError, "2048"):
        litellm.text_completion(model=COMPLETES, prompt=TOO_LONG, **TO)
    with refused(litellm.ContextWindowExceededError, "2048"):
        litellm.completion(model=CHATS, messages=[{"role": "user", "content": TOO_LONG}], **TO)


@check("a router falls back to a model with a longer context")
def _():
    short = {"model_name": "short", "litellm_params": {"model": CHATS} | TO}
    long = {"model_name": "long", "litellm_params": {"model": CHATS, "mock_response": "from the long one"} | TO}
    router = litellm.Router([short, long], context_window_fallbacks=[{"short": ["long"]}], num_retries=0)
    answer = router.completion("short", [{"role": "user", "content": TOO_LONG}])
    assert answer.choices[0].message.content == "from the long one"
