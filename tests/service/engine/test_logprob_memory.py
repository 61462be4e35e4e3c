"""Logprobs of whole prompts are computed slice by slice: even a full batch never holds the logits of all its tokens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from model.runner import LOGIT_ROWS

ROOT = Path(__file__).parents[3]
VOCAB_SIZE = 50257
ROWS = 2
SLICE_BYTES = LOGIT_ROWS * VOCAB_SIZE * 4

# Runs in a process of its own: memory that earlier tests used and freed would hide the peak.
SCRIPT = f"""
import re, sys, torch
from pathlib import Path
from kernels import torch_ops
from model import runner
from model.config import GPTConfig
from model.gpt import GPT
from model.step import Sampling
from service.engine.pages import PageAllocator, pool_sizes
from service.engine.scheduler import Scheduler, Sequence

torch.set_num_threads(1)
runner.LOGIT_ROWS = int(sys.argv[1])
config = GPTConfig(
    vocab_size={VOCAB_SIZE}, n_positions=2048, n_embd=32, n_layer=2, n_head=1, n_inner=32,
    attention=("dense", "banded"), band=256,
)
model = GPT(config)
model.init_weights(0)
sizes = pool_sizes(config, kv_bytes=1 << 30, item_bytes=4, max_rows={ROWS}, step_tokens=4096)
device = runner.Runner(model, torch_ops, {ROWS}, sizes)
scheduler = Scheduler(PageAllocator(config, sizes, step_tokens=4096), max_rows={ROWS}, step_tokens=4096)

def run(top_logprobs):
    prompts = [[row * 1000 + i % 997 for i in range(2047)] for row in range({ROWS})]
    logprobs_from = None if top_logprobs is None else 1
    scheduler.submit(
        Sequence(prompt, 2, Sampling(), top_logprobs=top_logprobs, prompt_logprobs_from=logprobs_from) for prompt in prompts
    )
    num_scores = 0
    while step := scheduler.schedule(0.0):
        for delta in scheduler.commit(device.launch(step).result(), 0.01):
            num_scores += len(delta.prompt_logprobs)
            assert all(len(each.top) == top_logprobs for each in delta.prompt_logprobs)
    return num_scores

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

assert run(None) == 0
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
before = memory("VmRSS")
assert run(5) == {ROWS} * 2046
print("peak", memory("VmHWM") - before)
"""


def peak_bytes(logit_rows: int) -> int:
    """The most by which the memory of the process grows."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(logit_rows)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    found = re.search(r"peak (\d+)", run.stdout)
    assert found
    return int(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_a_few_slices() -> None:
    # The logits, their exponentials for the sum, topk's buffers, and the results: see Runner._prompt_logprobs.
    assert peak_bytes(LOGIT_ROWS) < 4 * SLICE_BYTES
    # With all tokens of a step in one slice, the peak is much higher: the test can tell.
    assert peak_bytes(2048) > 8 * SLICE_BYTES
