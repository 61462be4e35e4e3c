"""`python -m tests.bench.parity`: how far the logits are from transformers' on random weights, fp32, per architecture."""

import random
import tempfile
from pathlib import Path

import torch

from tests.model.checkpoint.checkpoints import ARCHITECTURES, tiny
from tests.model.logits import our_logits, transformers_logits
from tests.model.paged_run import PagedRun, random_steps


def main() -> None:
    print("max |difference of a logit|, prompts of 250 tokens, bands of 16 and 70 keys")
    print(f"{'':28} {'whole window':>13} {'paged, chunked and decoded':>27} {'std of logits':>14}")
    for name, (arch, fields) in ARCHITECTURES.items():
        with tempfile.TemporaryDirectory() as temporary:
            directory = tiny(arch, Path(temporary), **fields)
            tokens = torch.randint(331, (6, 250), generator=torch.Generator().manual_seed(3))
            expected = transformers_logits(directory, tokens)
            window = (our_logits(directory, tokens) - expected).abs().max()
            run = PagedRun(directory, list(tokens))
            random_steps(run, random.Random(0))
            paged = (torch.stack(run.logits) - expected).abs().max()
        print(f"{name:28} {window:13.1e} {paged:27.1e} {expected.std():14.2f}", flush=True)


if __name__ == "__main__":
    main()
