"""What a fine-tuning job costs requests that are served at the same time: tokens/s without and with a job, in turns.

python -m tests.bench.beside_job --model demo
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from service.engine.loading import model_directory, served_name
from service.tools.bench import Workload, banded, measure, running

# The job learns to repeat a number. Many short examples and epochs keep it from ending before it is cancelled.
EXAMPLES = "".join(json.dumps({"prompt": f"{i} =>", "completion": f" {i}\n"}) + "\n" for i in range(2000))
EPOCHS = 50


@contextmanager
def a_job(client: httpx.Client, model: str) -> Iterator[None]:
    """Have a job train until the end of the block."""
    file = client.post("/v1/files", files={"file": ("data.jsonl", EXAMPLES)}, data={"purpose": "fine-tune"}).json()
    body = {"model": model, "training_file": file["id"], "hyperparameters": {"n_epochs": EPOCHS}}
    job = f"/v1/fine_tuning/jobs/{client.post('/v1/fine_tuning/jobs', json=body).raise_for_status().json()['id']}"
    while not any("training loss" in event["message"] for event in client.get(f"{job}/events").json()["data"]):
        time.sleep(0.5)
    yield
    assert client.get(job).json()["status"] == "running", "the job ended before the load did"
    client.post(f"{job}/cancel").raise_for_status()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="'demo' or a checkpoint directory")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model = served_name(args.model)
    rates: dict[tuple[int, bool], list[float]] = {}
    with (
        tempfile.TemporaryDirectory() as data,
        running(banded(model_directory(args.model), "--dtype", args.dtype, "--data-dir", data)) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):

        def load(*, beside: bool) -> None:
            for streams in args.streams:
                asked = Workload(streams, max(6, 2 * streams))
                result = measure(server.url, model, asked, seed=f"{beside} {len(rates.get((streams, beside), []))}")
                rates.setdefault((streams, beside), []).append(result.tokens_per_second)

        measure(server.url, model, Workload(1, 2))
        for _ in range(args.repeats):
            load(beside=False)
            with a_job(client, model):
                load(beside=True)
    for streams in args.streams:
        alone, beside = (statistics.median(rates[streams, with_job]) for with_job in (False, True))
        print(f"{streams} streams: {alone:.0f} tokens/s alone, {beside:.0f} beside a job, {beside / alone:.2f} of it")


if __name__ == "__main__":
    main()
