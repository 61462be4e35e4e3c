"""A runner that raises where it computes what some prompts ask for."""

from collections.abc import Callable
from typing import NamedTuple

from model.step import Sampled, StepInput
from service.engine.loop import Pending, StepRunner

POISON = 13


class Spoilt(NamedTuple):
    """A step of which the result can't be read, though it has run."""

    pending: Pending

    def result(self) -> Sampled:
        self.pending.result()
        raise RuntimeError("poisoned result")


class PoisonedRunner:
    """Raises where a step computes position prompt[1] of a prompt that begins with POISON, or a later one."""

    def __init__(self, runner: StepRunner, when: str):
        """`when`: "before" the step runs, "after" all of it was launched, or as its "result" is read."""
        self.runner, self.when = runner, when
        self.prompts: dict[int, list[int]] = {}
        self.num_raised = 0

    def launch(self, step: StepInput, begins: Callable[[], object] = lambda: None) -> Pending:
        self.prompts |= {start.row: start.prompt for start in step.starts}
        computed = zip(step.token_rows, step.token_positions, strict=True)
        if not any(self.prompts[row][0] == POISON and position >= self.prompts[row][1] for row, position in computed):
            return self.runner.launch(step, begins)
        self.num_raised += 1
        if self.when == "before":
            raise RuntimeError("poisoned step")
        pending = self.runner.launch(step, begins)
        if self.when == "after":
            raise RuntimeError("poisoned launch")
        return Spoilt(pending)
