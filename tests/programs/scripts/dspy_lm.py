"""DSPy's language models, and a program over one."""

from importlib.metadata import version

import dspy
from checks import MODEL, PROMPT, URL, check, tell
from dspy.utils.exceptions import AdapterParseError

tell(version=version("dspy"))
TO = {"api_base": f"{URL}/v1", "api_key": "sk-none", "num_retries": 0, "cache": False, "max_tokens": 20, "temperature": 0}


@check("a completion")
def _():
    [text] = dspy.LM(f"openai/{MODEL}", model_type="text", **TO)(PROMPT)
    assert text


@check("a chat")
def _():
    [text] = dspy.LM(f"openai/{MODEL}", **TO)(messages=[{"role": "user", "content": "Tell a tale."}])
    assert isinstance(text, str)


@check("a program, whose requests are answered")
def _():
    lm = dspy.LM(f"openai/{MODEL}", **TO)
    try:
        with dspy.context(lm=lm):
            dspy.Predict("question -> answer")(question="Who is the king?")
    except AdapterParseError:
        pass  # the embedded model doesn't lay its answer out as it is told to
    assert lm.history
    assert lm.history[0]["usage"]["completion_tokens"] > 0
