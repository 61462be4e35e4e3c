"""The dimensions of a GPT-3-style decoder, frozen, and the literal table of GPT-3's sizes."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from kernels.names import Activation, PatternKind
from kernels.patterns import Pattern

# Layers of one group keep the same keys, in pools of the same pages. Sparse patterns reach back to the first key, so they
# are dense here.
KVGroup = Literal["dense", "banded"]

# The most that dimensions may be, well above those of any model of this kind: larger ones are no model's.
LARGEST = {
    "vocab_size": 2**20,
    "n_positions": 2**17,
    "n_embd": 2**16,
    "n_layer": 2**10,
    "n_head": 2**10,
    "n_inner": 2**18,
    "embedding_width": 2**16,
    "band": 2**20,
    "stride": 2**20,
    "summary": 2**20,
    "position_offset": 2**10,
}

# The token embedding's rows are padded to a multiple of this, so that the output projection is a round matrix. Only gpt.py
# sees the padding.
VOCAB_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """All that the decoder in gpt.py needs to know, whatever checkpoint the weights came from.

    `attention` is repeated over the layers: ("dense", "banded") alternates as GPT-3 does. In a banded layer position i sees
    the keys j with 0 <= i - j < band: `band` keys, its own among them. "strided" and "fixed" are the patterns of the Sparse
    Transformer, with its l and c as `stride` and `summary`: see kernels.patterns.Pattern.

    Raises ValueError naming the field when the dimensions contradict each other.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    attention: tuple[PatternKind, ...] = ("dense",)
    band: int | None = None
    stride: int | None = None
    summary: int | None = None
    activation: Activation = "gelu_new"
    # None means head_dim ** -0.5; GPT-Neo does not scale at all (1.0).
    softmax_scale: float | None = None
    # GPT-2's scale_attn_by_inverse_layer_idx: layer i divides its scores by i + 1 as well.
    scale_by_inverse_layer: bool = False
    qkv_bias: bool = True
    bias: bool = True
    norm_affine: bool = True
    norm_eps: float = 1e-5
    # False is the original Transformer's order, normalising after the residual sum (OPT-350m); it has no final norm.
    pre_norm: bool = True
    final_norm: bool = True
    # Rows of the position table ahead of position 0 (OPT has 2).
    position_offset: int = 0
    # Width of the token embedding where it is projected to n_embd and back (OPT-350m); None means n_embd.
    embedding_width: int | None = None
    tied_head: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "embedding_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, most in LARGEST.items():
            if (getattr(self, name) or 0) > most:
                raise ValueError(f"{name} must be at most {most}, got {getattr(self, name)!s:.20}")
        if self.softmax_scale is not None and not 0 < self.softmax_scale < math.inf:
            raise ValueError(f"softmax_scale must be positive, got {self.softmax_scale}")
        if self.position_offset < 0:
            raise ValueError(f"position_offset must not be negative, got {self.position_offset}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if len(self.attention) > LARGEST["n_layer"]:
            raise ValueError(f"attention must name at most {LARGEST['n_layer']} layers, got {len(self.attention)}")
        kinds = get_args(PatternKind)
        if not self.attention or set(self.attention) - set(kinds):
            raise ValueError(f"attention must name one of {', '.join(kinds)} for each layer, got {self.attention!r:.80}")
        needs = {"banded": ["band"], "strided": ["stride"], "fixed": ["stride", "summary"], "dense": []}
        for kind in self.attention:
            for name in needs[kind]:
                value = getattr(self, name)
                if value is None or value < 1:
                    raise ValueError(f"{name} must be at least 1 when a layer is {kind}, got {value}")
        if "fixed" in self.attention and (self.summary or 0) > (self.stride or 0):
            raise ValueError(f"summary {self.summary} is more than the stride {self.stride} that it is a part of")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def token_width(self) -> int:
        """Width of one row of the token embedding."""
        return self.embedding_width or self.n_embd

    def kind(self, layer: int) -> PatternKind:
        """How layer `layer` attends."""
        return self.attention[layer % len(self.attention)]

    def pattern(self, kind: PatternKind) -> Pattern:
        """Which keys a query sees in the layers of a kind."""
        sizes = {"dense": 0, "banded": self.band, "strided": self.stride, "fixed": self.stride}
        return Pattern(kind, sizes[kind] or 0, (self.summary or 0) if kind == "fixed" else 0)

    def group(self, layer: int) -> KVGroup:
        """Whose pages the keys of this layer live in."""
        return "banded" if self.kind(layer) == "banded" else "dense"

    def scale_of(self, layer: int) -> float:
        """Factor on the attention scores of this layer."""
        scale = self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
        return scale / (layer + 1) if self.scale_by_inverse_layer else scale


def gpt3(n_layer: int, n_embd: int, n_head: int) -> GPTConfig:
    """A GPT-3 of the given size: r50k tokens, 2048 positions, dense and banded layers in turn.

    GPT-3's paper does not disclose its band; 256 is GPT-Neo's, the open model of this shape.
    """
    return GPTConfig(
        vocab_size=50257,
        n_positions=2048,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        n_inner=4 * n_embd,
        attention=("dense", "banded"),
        band=256,
    )


# Brown et al. 2020, table 2.1. Two of its rows do not multiply out: 1.3B is printed as 24 heads of 128 at width 2048
# (here 16 heads of 128), and 13B as width 5140 with 40 heads of 128 (here 5120).
GPT3_SIZES = {
    "gpt3-125m": gpt3(n_layer=12, n_embd=768, n_head=12),
    "gpt3-350m": gpt3(n_layer=24, n_embd=1024, n_head=16),
    "gpt3-760m": gpt3(n_layer=24, n_embd=1536, n_head=16),
    "gpt3-1.3b": gpt3(n_layer=24, n_embd=2048, n_head=16),
    "gpt3-2.7b": gpt3(n_layer=32, n_embd=2560, n_head=32),
    "gpt3-6.7b": gpt3(n_layer=32, n_embd=4096, n_head=32),
    "gpt3-13b": gpt3(n_layer=40, n_embd=5120, n_head=40),
    "gpt3-175b": gpt3(n_layer=96, n_embd=12288, n_head=96),
}

# The size of the embedded model, and the default of `banded train`: in 16 bits small enough for the repository.
DEMO = gpt3(n_layer=4, n_embd=256, n_head=2)
SIZES = {"demo": DEMO} | GPT3_SIZES
