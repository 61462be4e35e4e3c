"""LlamaIndex's model for servers that speak OpenAI's API."""

from importlib.metadata import version

from checks import MODEL, PROMPT, URL, check, tell
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

tell(version=version("llama-index-llms-openai-like"))
TO = {"model": MODEL, "api_base": f"{URL}/v1", "api_key": "sk-none", "max_retries": 0, "max_tokens": 20, "temperature": 0}
CHAT = [ChatMessage(role="user", content="Tell a tale.")]


@check("a completion, whole and as a stream")
def _():
    llm = OpenAILike(context_window=2048, is_chat_model=False, **TO)
    text = llm.complete(PROMPT).text
    assert text
    assert list(llm.stream_complete(PROMPT))[-1].text == text


@check("a chat, whole and as a stream")
def _():
    llm = OpenAILike(context_window=2048, is_chat_model=True, **TO)
    text = llm.chat(CHAT).message.content
    assert text
    assert list(llm.stream_chat(CHAT))[-1].message.content == text


@check("a chat at its own settings")
def _():
    llm = OpenAILike(model=MODEL, api_base=TO["api_base"], api_key="sk-none", is_chat_model=True, max_retries=0, timeout=300)
    assert llm.chat(CHAT).message.role == "assistant"
