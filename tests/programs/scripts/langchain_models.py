"""LangChain's OpenAI package: its chat and its completion model."""

from importlib.metadata import version

from checks import MODEL, PROMPT, TOO_LONG, URL, check, refused, tell
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

tell(version=version("langchain-openai"))
TO = {"model": MODEL, "base_url": f"{URL}/v1", "api_key": "sk-none", "max_retries": 0, "temperature": 0}
writer, talker = OpenAI(max_tokens=20, **TO), ChatOpenAI(max_tokens=20, **TO)


@check("a completion, whole, as a stream and in a batch")
def _():
    text = writer.invoke(PROMPT)
    assert text
    assert "".join(writer.stream(PROMPT)) == text
    assert writer.batch([PROMPT, PROMPT]) == [text, text]


@check("a completion at its own settings")
def _():
    assert OpenAI(model=MODEL, base_url=TO["base_url"], api_key="sk-none", max_retries=0).invoke(PROMPT)


@check("a chat, whole and as a stream, with its usage")
def _():
    answer = talker.invoke("Tell a tale.")
    assert answer.usage_metadata["output_tokens"] <= 20
    chunks = list(talker.stream("Tell a tale."))
    assert "".join(chunk.content for chunk in chunks) == answer.content
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) <= 20


@check("a chat with tools that it may call")
def _():
    @tool
    def clock() -> str:
        """The time."""
        return "noon"

    answer = talker.bind_tools([clock]).invoke("What time is it?")
    assert not answer.tool_calls


@check("a prompt that is too long is a ContextOverflowError")
def _():
    from langchain_core.exceptions import ContextOverflowError

    with refused(ContextOverflowError, "2048"):
        talker.invoke(TOO_LONG)
