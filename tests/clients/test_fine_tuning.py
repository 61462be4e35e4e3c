"""The official openai SDK fine-tunes a real server: files, a job in a process of its own, its model without a restart."""

import json
import time
from pathlib import Path

import openai
import pytest

from tests.clients.sdk import sdk
from tests.conformance import contract
from tests.model.checkpoint.checkpoints import tiny
from tests.serving import PATIENCE, banded_serve

WORDS = ["apple", "bird", "cloud", "door", "egg", "fox", "gate", "hill"]
LINES = [{"prompt": f"{word} =>", "completion": " done"} for word in WORDS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("banded", tmp_path_factory.mktemp("model"), vocab_size=50257, n_layer=2)


@contract("fine_tuning", "a job", "files, events, checkpoints; its model is served without a restart and after one")
def test_a_model_is_taught_and_served(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)), encoding="utf-8")
    options = ("--data-dir", str(tmp_path / "data"))
    with banded_serve(checkpoint, tmp_path / "log", *options) as server, sdk(server.url) as client:
        before = answer(client, checkpoint.name)
        training, validation = (client.files.create(file=path, purpose="fine-tune") for _ in range(2))
        job = client.fine_tuning.jobs.create(
            model=checkpoint.name,
            training_file=training.id,
            validation_file=validation.id,
            suffix="taught",
            seed=1,
            hyperparameters={"n_epochs": 30, "batch_size": 4, "learning_rate_multiplier": 20},
        )
        deadline = time.monotonic() + PATIENCE
        while (job := client.fine_tuning.jobs.retrieve(job.id)).finished_at is None:
            assert time.monotonic() < deadline
            assert answer(client, checkpoint.name) == before, "serving goes on, and the model that is shared stays"
            time.sleep(0.2)
        assert (job.status, job.error) == ("succeeded", None)
        name = job.fine_tuned_model
        assert name == f"ft:{checkpoint.name}:taught:{job.id[-8:]}"
        events = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
        assert len(events) > 60, "all pages"
        assert sum(message.startswith("Step ") for message in events) == 60
        [saved] = client.fine_tuning.jobs.checkpoints.list(job.id)
        assert saved.fine_tuned_model_checkpoint == name
        assert saved.metrics.valid_loss is not None
        assert saved.metrics.valid_loss < 3
        assert answer(client, name) == " done"
        assert answer(client, checkpoint.name) == before
        assert [model.id for model in client.models.list()] == [checkpoint.name, name]
    with banded_serve(checkpoint, tmp_path / "log", *options) as server, sdk(server.url) as client:
        assert answer(client, name) == " done"
        assert client.models.delete(name).deleted
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            answer(client, name)


def answer(client: openai.OpenAI, model: str) -> str:
    return client.completions.create(model=model, prompt="gate =>", max_tokens=1, temperature=0).choices[0].text
