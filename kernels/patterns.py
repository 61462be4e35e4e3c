"""Which keys a query sees, for every attention pattern: the predicate that each kernel is held to. Integers only.

`sees` takes positions as plain numbers or as tensors that broadcast.
"""

from typing import Any, NamedTuple

from kernels.names import PatternKind


class Pattern(NamedTuple):
    """An attention pattern. All are causal and let a query see itself.

    - dense: every earlier key.
    - banded: the last `size` keys, the query's own included.
    - strided: the last `size` keys, and every `size`-th key ahead of them.
    - fixed: the keys of the query's own block of `size`, and the last `summary` keys of every earlier block.

    The last two join both heads of the Sparse Transformer in one: Child et al. 2019, "Generating Long Sequences with Sparse
    Transformers", section 4.3.
    """

    kind: PatternKind = "dense"
    size: int = 0
    summary: int = 0

    @property
    def band(self) -> int | None:
        """The most keys that a query sees, if they are consecutive; None if it may see any earlier key."""
        return self.size if self.kind == "banded" else None

    @property
    def is_sparse(self) -> bool:
        """Whether the keys are scattered, so that the pattern needs a block layout."""
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
