"""The state of a training run in one file. On a CPU a run that resumes from it has the bits of one that never stopped."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model.checkpoint.files import write_atomically
from model.training.trainer import Trainer

# What AdamW keeps of every parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(path: Path, trainer: Trainer, about: dict[str, Any]) -> None:
    """Replace `path` with the state of `trainer`. `about` must be the same when the run resumes.

    The tensors are parameters and moments. There is no random state: `seen` and the seed tell which data come next.
    """
    tensors = {f"parameter/{name}": parameter.detach() for name, parameter in trainer.parameters.items()}
    for name, parameter in trainer.parameters.items():
        tensors |= {f"{moment}/{name}": trainer.optimizer.state[parameter][moment] for moment in MOMENTS}
    facts = {"seen": trainer.seen, "updates": trainer.num_updates, "plan": dataclasses.asdict(trainer.plan), "about": about}
    with write_atomically(path, durable=True) as file:
        save_file(tensors, file, metadata={"training": json.dumps(facts)})


def load_state(path: Path, trainer: Trainer, about: dict[str, Any]) -> None:
    """Bring a new trainer to where the run was. Raises ValueError naming what has changed since."""
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["training"])
        then, now = facts["plan"] | facts["about"], json.loads(json.dumps(dataclasses.asdict(trainer.plan) | about))
        for name, value in now.items():
            if then.get(name) != value:
                raise ValueError(f"{path} is the state of another run: {name} {value}, not {then.get(name)}")
        for name, parameter in trainer.parameters.items():
            with torch.no_grad():
                parameter.copy_(file.get_tensor(f"parameter/{name}"))
            moments = {moment: file.get_tensor(f"{moment}/{name}").to(parameter.device) for moment in MOMENTS}
            # AdamW counts its updates in a tensor for each parameter.
            step = torch.tensor(float(facts["updates"]), device=parameter.device)
            trainer.optimizer.state[parameter] = {"step": step, **moments}
    trainer.seen, trainer.num_updates = facts["seen"], facts["updates"]
