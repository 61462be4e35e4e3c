"""One tile of attention, the step that the three attention kernels repeat: a page of keys against a block of queries."""

import triton
import triton.language as tl


@triton.jit
def sees(q, k, PATTERN: tl.constexpr, SIZE: tl.constexpr, SUMMARY: tl.constexpr):
    """kernels.patterns.Pattern.sees, on the device."""
    seen = q >= k
    if PATTERN == "banded":
        seen &= q - k < SIZE
    elif PATTERN == "strided":
        seen &= (q - k < SIZE) | ((q - k) % SIZE == 0)
    elif PATTERN == "fixed":
        seen &= (q // SIZE == k // SIZE) | (k % SIZE >= SIZE - SUMMARY)
    return seen


@triton.jit
def attend_page(
    acc,  # (M, BLOCK_D) fp32: output so far, not divided by `total`
    peak,  # (M,) fp32: highest score so far, in units of log 2
    total,  # (M,) fp32: sum of 2 ** (score - peak)
    q,  # (M, BLOCK_D)
    positions,  # (M,) of the queries
    k_ptr,  # (PAGE, D): keys of one head of the page
    v_ptr,  # (PAGE, D)
    first_key,  # position of the page's first key
    num_keys,  # keys written so far: what lies beyond may be anything, NaN included
    scale_log2,  # above 0: the maximum is taken before scaling
    partial,  # whether some query does not see some key: a branch that all threads take alike
    PATTERN: tl.constexpr,
    SIZE: tl.constexpr,
    SUMMARY: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Take a page into acc, peak and total.

    A page of which a row sees nothing leaves the row's bits as they are, so that it does not matter which other rows share
    its tile, nor where a chunk began.
    """
    n, d = tl.arange(0, PAGE), tl.arange(0, BLOCK_D)
    keys = first_key + n
    offsets = n[:, None] * D + d[None, :]
    in_head = d[None, :] < D
    k = tl.load(k_ptr + offsets, mask=in_head, other=0.0)
    # 0 * NaN is NaN: no weight keeps what was never written from spoiling the sum.
    v = tl.load(v_ptr + offsets, mask=in_head & (keys < num_keys)[:, None], other=0.0)
    scores = tl.dot(q, k.T, input_precision="ieee")
    if partial:
        scores = tl.where(sees(positions[:, None], keys[None, :], PATTERN, SIZE, SUMMARY), scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    # A row that has seen no key yet has no peak, and -inf - -inf is NaN.
    reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores * scale_log2 - reference[:, None])
    rescale = tl.exp2(peak - reference)
    total = total * rescale + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit
def normalised(acc, total):
    """The output: acc divided by the sum of weights. Rows that stand for no query may have seen nothing: they become 0."""
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]
