"""Are the kernels right on these weights, on this device? Runs one prompt by the active ops and by the reference.

Kernels depend on shapes, dtype and hardware that no test has seen. The doctor runs where the weights are.

Shapes: T tokens of the prompt, C the width, W pages of a sequence.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import reference
from kernels.band import PAGE_SIZE, SPLIT_PAGES, first_key
from kernels.block_layout import BlockLayout, block_layout
from kernels.names import PatternKind
from kernels.ops import Ops
from kernels.plan import PrefillPlan, StepPlan
from model.config import GPTConfig
from model.gpt import GPT, Attend, KVPool, PagedAttention, PagedGPT

DECODES = 8  # tokens of the prompt that go through one by one
ROWS = 64  # positions whose logits are compared

# How far the largest difference may be, as a share of the logits' standard deviation: at least three times what right
# kernels reach on a CPU. model/training/NOTES.md has the measurements, and what faults amount to.
LIMITS = {torch.float32: 0.001, torch.float16: 0.1, torch.bfloat16: 0.5}


class KernelErrors(NamedTuple):
    """max |Δ logit| between active ops and the reference; infinite if the difference is not finite."""

    # By what the active ops computed: each kind of attention alone, with the writing of its keys; "pointwise", which is
    # norms, activations and products; and "all". Sampling is not measured.
    errors: dict[str, float]
    deviation: float  # standard deviation of the reference's logits over the vocabulary, mean over positions
    dtype: torch.dtype
    num_tokens: int
    num_rows: int  # positions compared

    @property
    def limit(self) -> float:
        """The largest share of the deviation that passes."""
        return LIMITS[self.dtype]

    def share(self, kind: str) -> float:
        """The error as a share of the deviation."""
        error = self.errors[kind]
        if not error:
            return 0.0
        return error / self.deviation if self.deviation else math.inf

    def faults(self) -> list[str]:
        """A sentence for each error above the limit."""
        return [
            f"kernels of kind {kind}: max |Δ logit| {error:.3g} is {percent(self.share(kind))} of the logits' standard "
            f"deviation {self.deviation:.3g}, the limit for {str(self.dtype)[6:]} is {percent(self.limit)}"
            for kind, error in self.errors.items()
            if self.share(kind) > self.limit
        ]


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"


@torch.inference_mode()
def kernel_errors(model: GPT, ops: Ops) -> KernelErrors:
    """Run random tokens through `model` by `ops`, which must suit the device of its weights, and by the reference.

    Raises ValueError if the reference's own logits are not finite, because then there is nothing to compare with.
    """
    config, dtype = model.config, model.wte.weight.dtype
    kinds = list(dict.fromkeys(config.kind(layer) for layer in range(config.n_layer)))
    steps = steps_of(config.n_positions, max(config.pattern(kind).size for kind in kinds))
    tokens = torch.randint(config.vocab_size, (steps[-1].stop,), generator=torch.Generator().manual_seed(0))

    def logits(attention: dict[PatternKind, Ops], pointwise: Ops) -> Tensor:
        return model.logits(hidden_states(model, tokens, steps, attention, pointwise)[-ROWS:], pointwise)

    none: dict[PatternKind, Ops] = dict.fromkeys(kinds, reference)
    baseline = logits(none, reference)
    deviation = float(baseline.std(-1, correction=0).mean())
    if not math.isfinite(deviation):
        raise ValueError(f"the reference's logits are not finite: the weights are not, or too large for {str(dtype)[6:]}")
    runs: dict[str, tuple[dict[PatternKind, Ops], Ops]] = {kind: (none | {kind: ops}, reference) for kind in kinds}
    runs |= {"pointwise": (none, ops), "all": (dict.fromkeys(kinds, ops), ops)}
    errors = {kind: float(logits(*active).sub_(baseline).abs_().max()) for kind, active in runs.items()}
    # NaN is never greater than a limit, so it would pass.
    errors = {kind: error if math.isfinite(error) else math.inf for kind, error in errors.items()}
    return KernelErrors(errors, deviation, dtype, len(tokens), len(baseline))


def steps_of(n_positions: int, size: int) -> list[range]:
    """The positions of each step: two chunks, then one at a time. `size` is the longest pattern's, in keys.

    If the context is long enough, the second chunk and the decoding begin where a band of `size` keys has just left a page.
    There a single key too many is a key of a page that was given back.
    """
    length = size + 2 * PAGE_SIZE - 1 + DECODES
    # If the pattern is too short for decoding to merge two splits, add whole pages, as many as fit.
    wanted, room = SPLIT_PAGES - size // PAGE_SIZE, (n_positions - length) // PAGE_SIZE
    length = min(n_positions, length + max(0, min(wanted, room)) * PAGE_SIZE)
    prompt = max(length - DECODES, 1)
    cut = size + PAGE_SIZE - 1
    if cut >= prompt:
        cut = prompt * 2 // 3
    decodes = [range(position, position + 1) for position in range(prompt, length)]
    return [step for step in (range(cut), range(cut, prompt), *decodes) if step]


def hidden_states(
    model: GPT, tokens: Tensor, steps: list[range], attention: dict[PatternKind, Ops], pointwise: Ops
) -> Tensor:
    """Hidden states (T, C) of tokens (T,), by the ops of each kind of attention and by `pointwise` for all else.

    Pages are in shuffled order. Keys that nobody may read are NaN: those not written yet, and pages that left the band.
    """
    config, weight = model.config, model.wte.weight
    device = weight.device
    num_pages = -(-len(tokens) // PAGE_SIZE)
    shape = (num_pages + 1, config.n_head, PAGE_SIZE, config.head_dim)
    pools = [
        KVPool(*(torch.full(shape, math.nan, dtype=weight.dtype, device=device) for _ in "kv"))
        for _ in range(config.n_layer)
    ]
    generator = torch.Generator().manual_seed(0)
    # The last entry is padding, and its page is never written.
    tables = {kind: torch.randperm(num_pages + 1, generator=generator).to(device, torch.int32)[None] for kind in attention}
    layouts = {
        kind: block_layout(pattern, len(tokens), device) if (pattern := config.pattern(kind)).is_sparse else None
        for kind in attention
    }
    # One set of ops runs as in a server: by the native forward where there is one.
    paged = PagedGPT(model, pointwise, pools) if all(ops is pointwise for ops in attention.values()) else None
    tokens = tokens.to(device)
    hidden = []
    for step in steps:
        for layer, pool in enumerate(pools):
            kind = config.kind(layer)
            dead = tables[kind][0, : first_key(step.start, config.pattern(kind).band) // PAGE_SIZE].long()
            for pages in pool:
                pages[dead] = math.nan
        plans = {kind: step_plan(config, kind, step, tables[kind], layouts[kind]) for kind in attention}
        positions = torch.arange(step.start, step.stop, device=device)
        if paged:
            hidden.append(paged(tokens[positions], positions, plans))
        else:
            attends = {kind: PagedAttention(config, ops, pools, plans) for kind, ops in attention.items()}
            hidden.append(model(tokens[positions], positions, by_kind(config, attends), pointwise))
    return torch.cat(hidden)


def step_plan(config: GPTConfig, kind: PatternKind, step: range, table: Tensor, layout: BlockLayout | None) -> StepPlan:
    """The plan of one chunk, or of one decode row, of the only sequence; table (1, W + 1)."""
    positions = torch.arange(step.start, step.stop, device=table.device)
    pattern, num_decodes = config.pattern(kind), int(len(step) == 1)
    prefill = None if num_decodes else PrefillPlan(table, [step.start], [len(step)], pattern, layout)
    return StepPlan(table, torch.zeros_like(positions), positions, num_decodes, prefill, pattern, layout)


def by_kind(config: GPTConfig, attends: dict[PatternKind, PagedAttention]) -> Attend:
    """Each layer attends as its kind does."""
    return lambda layer, q, k, v: attends[config.kind(layer)](layer, q, k, v)
