"""Inspect's evaluations, with this server as its provider for OpenAI's API."""

import os
from importlib.metadata import version

from checks import MODEL, URL, check, tell
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, system_message, use_tools
from inspect_ai.tool import tool

tell(version=version("inspect-ai"))
os.environ["INSPECT_LOG_DIR"] = "logs"
SAMPLES = [Sample(input=f"Tell tale {n}.", target="a") for n in range(4)]


def evaluated(solver, **settings):
    model = get_model(f"openai-api/banded/{MODEL}", base_url=f"{URL}/v1", api_key="sk-none")
    task = Task(dataset=SAMPLES, solver=solver, scorer=includes())
    [log] = eval(task, model=model, display="none", max_tokens=16, max_retries=0, **settings)
    assert log.status == "success", log.error.message
    return log


@check("an evaluation of four chats at once")
def _():
    log = evaluated([system_message("You tell tales."), generate()])
    assert len(log.samples) == 4
    assert sum(usage.output_tokens for usage in log.stats.model_usage.values()) > 0


@check("an evaluation with a seed, temperature and logprobs")
def _():
    log = evaluated([generate()], temperature=0.5, seed=1, logprobs=True, top_logprobs=2)
    assert all(sample.output.choices[0].logprobs.content for sample in log.samples)


@check("an evaluation with tools that the model may call")
def _():
    @tool
    def clock():
        async def execute() -> str:
            """The time."""
            return "noon"

        return execute

    evaluated([use_tools(clock()), generate()])
