"""The state of a training run in one file: on a CPU a run that goes on from it makes the bits of one that never stopped."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model.checkpoint.files import write_atomically
from model.training.trainer import Trainer, TrainingPlan

# What AdamW keeps of every parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(path: Path, trainer: Trainer, about: dict[str, Any]) -> None:
    """Replace `path` by the state of `trainer`, on the disk before it has its name. `about`: what must be the same again.

    Parameters and moments are its tensors. Which data come next and in which order follows from the tokens seen so far and
    the seed, so there is no random state beside them.
    """
    tensors = {f"parameter/{name}": parameter.detach() for name, parameter in trainer.parameters.items()}
    for name, parameter in trainer.parameters.items():
        tensors |= {f"{moment}/{name}": trainer.optimizer.state[parameter][moment] for moment in MOMENTS}
    facts = {"seen": trainer.seen, "updates": trainer.num_updates, "plan": dataclasses.asdict(trainer.plan), "about": about}
    with write_atomically(path, durable=True) as file:
        save_file(tensors, file, metadata={"training": json.dumps(facts)})


def load_state(path: Path, trainer: Trainer, about: dict[str, Any]) -> None:
    """Bring a new trainer to where the run was. Raises ValueError naming what is not as it was then."""
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["training"])
        if difference := trainer.plan.difference(TrainingPlan(**facts["plan"])):
            raise ValueError(f"{path} is the state of another run: {difference}")
        for name, value in json.loads(json.dumps(about)).items():
            if facts["about"].get(name) != value:
                raise ValueError(f"{path} is the state of another run: {name} {value}, not {facts['about'].get(name)}")
        for name, parameter in trainer.parameters.items():
            with torch.no_grad():
                parameter.copy_(file.get_tensor(f"parameter/{name}"))
            moments = {moment: file.get_tensor(f"{moment}/{name}").to(parameter.device) for moment in MOMENTS}
            # AdamW counts its updates in a tensor for each parameter.
            step = torch.tensor(float(facts["updates"]), device=parameter.device)
            trainer.optimizer.state[parameter] = {"step": step, **moments}
    trainer.seen, trainer.num_updates = facts["seen"], facts["updates"]
