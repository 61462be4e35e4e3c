"""Penalties, bias, truncation and the draw: one program per row, no sort, and no row depends on another."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import names
from kernels.gpu.checks import check
from kernels.sampling_state import COLUMNS, TABLES, SamplingState

BLOCK = 4096  # tokens of a tile: 16 bytes per thread; never tuned
NUM_WARPS = 32
VECTOR = tl.constexpr(4)  # logits in 16 bytes
INFINITY = tl.constexpr(0x7F800000)  # bits of infinity in fp32
NOT_FINITE, NONE_LEFT = tl.constexpr(names.NOT_FINITE), tl.constexpr(names.NONE_LEFT)


@triton.jit
def _sample(
    logits_ptr,  # (B, V)
    tokens_ptr,  # (B,)
    batch_rows_ptr,  # (B,)
    positions_ptr,  # (B,)
    temperature_ptr,  # (S,), and so on up to choice_ptr
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    repetition_penalty_ptr,
    presence_penalty_ptr,
    frequency_penalty_ptr,
    adjusted_ptr,
    seed_ptr,
    choice_ptr,
    bias_ptr,  # (S, V)
    generated_ptr,  # (S, V)
    in_prompt_ptr,  # (S, V)
    scratch_ptr,  # (B, V rounded up to tiles)
    logits_stride,
    table_stride,
    scratch_stride,
    vocab_size,
    ALIGNED: tl.constexpr,  # rows start at 16 bytes and have readable elements up to the next 16
    BLOCK: tl.constexpr,
):
    """One row: its maximum, the distance from it within which tokens stay, and the maximum of logit + noise over these.

    NaN loses every comparison and no reduction sees it, so the first pass looks for it.
    """
    row = tl.program_id(0).to(tl.int64)
    batch_row = tl.load(batch_rows_ptr + row)
    temperature = tl.load(temperature_ptr + batch_row)
    adjusted = tl.load(adjusted_ptr + batch_row)
    source = logits_ptr + row * logits_stride
    scratch = scratch_ptr + row * scratch_stride
    lanes = tl.arange(0, BLOCK)

    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_token = tl.zeros([BLOCK], tl.int32)
    faults = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + lanes
        logits = _load(source, ids, vocab_size, float("-inf"), ALIGNED)
        faults |= tl.where(logits < float("inf"), 0, 1)
        if adjusted:
            table = batch_row * table_stride
            generated = _load(generated_ptr + table, ids, vocab_size, 0, ALIGNED)
            seen = (generated > 0) | _load(in_prompt_ptr + table, ids, vocab_size, False, ALIGNED)
            penalty = tl.load(repetition_penalty_ptr + batch_row)
            damped = tl.where(logits > 0, tl.div_rn(logits, penalty), logits * penalty)
            logits = tl.where(seen, damped, logits)
            logits -= tl.load(frequency_penalty_ptr + batch_row) * generated.to(tl.float32)
            logits -= tl.load(presence_penalty_ptr + batch_row) * (generated > 0).to(tl.float32)
            logits += _load(bias_ptr + table, ids, vocab_size, 0.0, ALIGNED)
            # Later passes read the adjusted logits: reading the tables again would cost 9 more bytes per token.
            tl.store(scratch + ids, logits)
        best_token = tl.where(logits > best, ids, best_token)
        best = tl.where(logits > best, logits, best)
    peak, token = _first_maximum(best, best_token)
    token = tl.where(peak == float("-inf"), NONE_LEFT, token)
    token = tl.where(tl.max(faults, axis=0) > 0, NOT_FINITE, token)
    if (temperature == 0) | (token < 0):
        tl.store(tokens_ptr + row, token)
        return

    if adjusted:
        tl.debug_barrier()
        source = scratch
    top_k = tl.load(top_k_ptr + batch_row)
    top_p = tl.load(top_p_ptr + batch_row)
    min_p = tl.load(min_p_ptr + batch_row)
    bound = tl.full([], INFINITY, tl.uint32)
    if (top_k > 0) | (top_p < 1) | (min_p > 0):
        # A search reads the row 16 times, so x is computed once. The draw then takes x for logits: (x - 0) / 1.
        for start in range(0, vocab_size, BLOCK):
            ids = start + lanes
            x = tl.div_rn(_load(source, ids, vocab_size, float("-inf"), ALIGNED) - peak, temperature)
            tl.store(scratch + ids, x)
        tl.debug_barrier()
        source, peak, temperature = scratch, 0.0, 1.0
        if min_p > 0:
            bound = _distance(tl.log(min_p))
        if top_k > 0:
            bound = _search(scratch, vocab_size, bound, top_k.to(tl.float32), False, BLOCK)
        if top_p < 1:
            bound = _search(scratch, vocab_size, bound, top_p, True, BLOCK)

    key = _mix(tl.load(seed_ptr + batch_row).to(tl.uint64, bitcast=True))
    key = _mix(key ^ tl.load(choice_ptr + batch_row).to(tl.uint64, bitcast=True))
    key = _mix(key ^ tl.load(positions_ptr + row).to(tl.uint64, bitcast=True))
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_token = tl.zeros([BLOCK], tl.int32) + token  # kept if nothing is better
    for start in range(0, vocab_size, BLOCK):
        ids = start + lanes
        x = tl.div_rn(_load(source, ids, vocab_size, float("-inf"), ALIGNED) - peak, temperature)
        noised = x + _gumbel(key, ids)
        better = (_distance(x) <= bound) & (noised > best)
        best_token = tl.where(better, ids, best_token)
        best = tl.where(better, noised, best)
    best, token = _first_maximum(best, best_token)
    tl.store(tokens_ptr + row, token)


@triton.jit
def _load(row_ptr, ids, vocab_size, other: tl.constexpr, ALIGNED: tl.constexpr):
    """A tile of a row, with `other` past the end of the vocabulary."""
    # Lanes loaded together need one mask, or a vocabulary of odd size would be loaded one by one.
    mask = ids // VECTOR * VECTOR < vocab_size if ALIGNED else ids < vocab_size
    values = tl.load(row_ptr + ids, mask=mask, other=other)
    return tl.where(ids < vocab_size, values, other)


@triton.jit
def _first_maximum(best, best_token):
    """The maximum over lanes, and the lowest token that has it: one reduction per pass instead of one per tile."""
    peak = tl.max(best, axis=0)
    return peak, tl.min(tl.where(best == peak, best_token, 0x7FFFFFFF), axis=0)


@triton.jit
def _distance(x):
    """For x <= 0 an integer that orders like -x: the bits of a positive float. Above INFINITY for NaN."""
    return tl.abs(x).to(tl.uint32, bitcast=True)


@triton.jit
def _search(x_ptr, vocab_size, bound, limit, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest distance up to `bound` with less than `limit` strictly nearer to the maximum; 0 if there is none.

    `limit` counts tokens, or if MASS it is a share of the weight within `bound`. Each pass finds 2 bits. The order of every
    sum is fixed.
    """
    zeros = tl.full([BLOCK], 0.0, tl.float32)
    one = tl.full([], 1, tl.uint32)
    found = one - 1
    for i in range(16):
        shift = 30 - 2 * i
        step = one << shift
        nearer_1, nearer_2, nearer_3, total = zeros, zeros, zeros, zeros
        for start in range(0, vocab_size, BLOCK):
            x = tl.load(x_ptr + start + tl.arange(0, BLOCK))
            distance = _distance(x)
            weight = tl.where(distance <= bound, tl.exp(x) if MASS else 1.0, 0.0)
            nearer_1 += tl.where(distance < found + step, weight, 0.0)
            nearer_2 += tl.where(distance < found + 2 * step, weight, 0.0)
            nearer_3 += tl.where(distance < found + 3 * step, weight, 0.0)
            total += weight
        target = limit * tl.sum(total, axis=0) if MASS else limit
        below_1 = (tl.sum(nearer_1, axis=0) < target).to(tl.uint32)
        below_2 = (tl.sum(nearer_2, axis=0) < target).to(tl.uint32)
        below_3 = (tl.sum(nearer_3, axis=0) < target).to(tl.uint32)
        found += (below_1 + below_2 + below_3) << shift
    return tl.minimum(found, bound)


@triton.jit
def _gumbel(key, ids):
    """gumbel of kernels/noise.py."""
    numbers = _mix(key ^ (ids + 1).to(tl.uint64)) >> 11
    u = tl.minimum((numbers.to(tl.float32) + 0.5) * 2.0**-53, 1 - 2.0**-24)
    # log1p(-u) from log alone, by Kahan's method: the rounding error of 1 - u cancels.
    rest = 1 - u
    lost = rest - 1
    log1p = tl.where(lost == 0, -u, tl.log(rest) * tl.div_rn(-u, tl.where(lost == 0, 1.0, lost)))
    return -tl.log(-log1p)


@triton.jit
def _mix(x):
    """mix of kernels/noise.py, on uint64."""
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def sample(logits: Tensor, state: SamplingState, batch_rows: Tensor, positions: Tensor) -> Tensor:
    """Token ids (B,) int64 for logits (B, V) fp32 of batch_rows (B,); positions (B,) are those of the new tokens.

    Rows of logits may lie apart. So may rows of the state's tables, equally far in all three. Loads are 16 bytes wide if
    both distances are multiples of 16 elements. Rows never influence each other. A row that no token can be sampled from
    gets NOT_FINITE or NONE_LEFT. Launches one kernel and waits for nothing, so a CUDA graph can capture it.
    """
    batch, vocab_size = logits.shape
    check("logits", logits, logits.shape, logits, torch.float32, rows_apart=True)
    for name, column in (("batch_rows", batch_rows), ("positions", positions)):
        check(name, column, (batch,), logits, torch.int64)
    num_batch_rows, stride = len(state.adjusted), state.bias.stride(0)
    for name, dtype in COLUMNS.items():
        check(name, getattr(state, name), (num_batch_rows,), logits, dtype)
    for name, dtype in TABLES.items():
        table = getattr(state, name)
        check(name, table, (num_batch_rows, vocab_size), logits, dtype, rows_apart=True)
        assert table.stride(0) == stride, f"rows of {name} lie {table.stride(0)} elements apart, those of bias {stride}"
    tokens = torch.empty_like(batch_rows)
    scratch = logits.new_empty(batch, triton.cdiv(vocab_size, BLOCK) * BLOCK)
    _sample[(batch,)](
        logits,
        tokens,
        batch_rows,
        positions,
        *state,
        scratch,
        logits.stride(0),
        stride,
        scratch.stride(0),
        vocab_size,
        ALIGNED=all(map(has_aligned_rows, (logits, state.bias, state.generated, state.in_prompt))),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,  # so that x and the noise are rounded as in PyTorch
    )
    return tokens


def has_aligned_rows(rows: Tensor) -> bool:
    """Whether rows (R, V) lie a multiple of 16 elements apart, and the last can be read up to a multiple of VECTOR."""
    num_rows, width = rows.shape
    end = rows.storage_offset() + (num_rows - 1) * rows.stride(0) + triton.cdiv(width, VECTOR.value) * VECTOR.value
    return rows.stride(0) % 16 == 0 and end * rows.element_size() <= rows.untyped_storage().nbytes()
