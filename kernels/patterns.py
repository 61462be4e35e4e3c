"""Which keys a query sees, for every attention pattern: the predicate that each kernel is held to. Integers only.

`sees` takes positions as plain numbers or as tensors that broadcast.
"""

from typing import Any, NamedTuple

from kernels.names import PatternKind


class Pattern(NamedTuple):
    """An attention pattern. All are causal and let a query see itself.

    - dense: every key before.
    - banded: the last `size` keys, itself included.
    - strided: the last `size` keys, and every `size`-th key before (Sparse Transformer, both of its heads in one).
    - fixed: the keys of its own block of `size`, and the last `summary` keys of every earlier block (likewise).

    Source of the last two: Child et al. 2019, "Generating Long Sequences with Sparse Transformers", section 4.3.
    """

    kind: PatternKind = "dense"
    size: int = 0
    summary: int = 0

    @property
    def band(self) -> int | None:
        """Keys that a query sees at most, where they are consecutive; None where any earlier key may be seen."""
        return self.size if self.kind == "banded" else None

    @property
    def is_sparse(self) -> bool:
        """Whether the keys are scattered, so that a block layout says where they are."""
        return self.kind in ("strided", "fixed")

    def sees(self, q: Any, k: Any) -> Any:
        """Whether the query at position `q` sees the key at position `k`."""
        if self.kind == "dense":
            return q >= k
        if self.kind == "banded":
            return (q >= k) & (q - k < self.size)
        if self.kind == "strided":
            return (q >= k) & ((q - k < self.size) | ((q - k) % self.size == 0))
        return (q >= k) & ((q // self.size == k // self.size) | (k % self.size >= self.size - self.summary))
