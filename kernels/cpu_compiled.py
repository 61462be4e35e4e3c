"""The compiled CPU path: what PyTorch's ops do slowly as loops in C++ (cpu_compiled.cpp), and where their code is kept.

Op by op pages are copied before they are read, rows are walked several times, and oneDNN takes up to twice as long for the
few rows of a decode step. Compiling takes a C++ compiler and a second, once for each size of heads, dtype and machine; the
result stays in a cache. Without it kernels.cpu serves.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu
from kernels.int8 import Int8Weight, quantize_channels
from kernels.names import Activation
from kernels.ops import PackedWeight, Weight
from kernels.plan import DecodePlan, PrefillPlan

log = logging.getLogger("banded.kernels")

SOURCE = Path(__file__).with_suffix(".cpp")
# A product and a sum become one instruction; what a number is when something goes wrong stays as the standard has it.
FLAGS = (
    "-std=c++17 -O3 -march=native -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math -fwrapv -shared -fPIC -w"
)
COMPILERS = ("c++", "g++", "clang++")
# Seconds that the compiler may take.
BUILD_TIMEOUT = 300.0

ELEMENTS = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# The order of the source's Activation.
ACTIVATIONS: dict[Activation | None, int] = {None: 0, "relu": 1, "gelu": 2, "gelu_new": 3}
assert len(ACTIVATIONS) == 1 + len(get_args(Activation))
# Of the source: channels of a panel, bytes of each that an instruction multiplies, bytes that rows are a multiple of, panels
# that go together, and what weights in int8 have been given to be unsigned.
LANES, GROUP, BLOCK, PANELS, OFFSET = 16, 4, 64, 2, 128


class Shape(NamedTuple):
    """What the code is compiled for: the size of a head, and the dtype of activations, keys and values."""

    head_dim: int
    dtype: torch.dtype


def to_panels(numbers: Tensor, padding: float = 0) -> Tensor:
    """(O, C) of one or two bytes as (O' / LANES, C' / n, LANES, n), n of them in a GROUP, with `padding` up to O' and C'."""
    size = numbers.element_size()
    channels, columns = numbers.shape
    padded = F.pad(numbers, (0, -columns % (BLOCK // size), 0, -channels % (PANELS * LANES)), value=padding)
    return padded.unflatten(1, (-1, GROUP // size)).unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


def from_panels(panels: Tensor, channels: int, columns: int) -> Tensor:
    return panels.transpose(1, 2).flatten(2).flatten(0, 1)[:channels, :columns]


@dataclass(frozen=True, eq=False)
class Int8Panels(Int8Weight):
    panels: Tensor  # uint8: the integers + OFFSET
    shape: tuple[int, int]  # (O, C); `scales` are as many as the panels' channels

    def integers(self) -> Tensor:
        return (from_panels(self.panels, *self.shape).to(torch.int16) - OFFSET).to(torch.int8)


@dataclass(frozen=True, eq=False)
class Bf16Panels(PackedWeight):
    panels: Tensor  # bfloat16
    shape: tuple[int, int]  # (O, C)

    def dense(self) -> Tensor:
        return from_panels(self.panels, *self.shape)


class CompiledOps:
    """kernels.cpu with some of its functions compiled."""

    decode_attention = staticmethod(cpu.decode_attention)
    bias_activation = staticmethod(cpu.bias_activation)
    sample = staticmethod(cpu.sample)

    def __init__(self, library: ctypes.CDLL):
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._kv_write, self._decode_step = library.kv_write, library.decode_step
        self._prefill_attention, self._add_layernorm = library.prefill_attention, library.add_layernorm
        self._prefill_attention.argtypes = [pointer, size, *[pointer] * 7, size, pointer, size, ctypes.c_float, number]
        self._kv_write.argtypes = [pointer, pointer, size, *[pointer] * 3, size, size, number]
        self._add_layernorm.argtypes = [*[pointer] * 4, size, size, ctypes.c_float, pointer, pointer, number]
        self._decode_step.argtypes = [pointer] * 3 + [size] + [pointer] * 7 + [size, size, ctypes.c_float, number]
        self.has_int8 = hasattr(library, "linear_int8")  # else the machine lacks the instructions for our products
        self.has_bf16 = self.has_int8 and bool(library.bf16_is_fast())
        if self.has_int8:
            self._linear_int8 = library.linear_int8
            self._linear_bf16, self._linear_bf16_to_float = library.linear_bf16, library.linear_bf16_to_float
            product = (pointer, size, size, pointer, size, pointer, size, number, pointer, number)
            self._linear_int8.argtypes = [*product, *[pointer] * 4, size]
            self._linear_bf16.argtypes = self._linear_bf16_to_float.argtypes = product

    def pack(self, weight: Tensor, *, quantize: bool) -> Weight:
        channels, columns = weight.shape
        if self.has_int8 and quantize:
            integers, scales = quantize_channels(weight)
            panels = to_panels((integers.to(torch.int16) + OFFSET).to(torch.uint8), OFFSET)
            return Int8Panels(F.pad(scales, (0, -channels % (PANELS * LANES))), panels, (channels, columns))
        # A row of other lengths would be read beyond its end.
        if self.has_bf16 and weight.dtype == torch.bfloat16 and columns * weight.element_size() % BLOCK == 0:
            return Bf16Panels(to_panels(weight), (channels, columns))
        return cpu.pack(weight, quantize=quantize)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
        """A row has the same bits whatever stands beside it."""
        if isinstance(weight, Bf16Panels):
            return self._linear(self._linear_bf16, x, weight, bias, activation, x.dtype)
        if isinstance(weight, Int8Panels):
            rows, padded = x.numel() // x.shape[-1], weight.panels[0].numel() // LANES
            integers = torch.empty(rows, padded, dtype=torch.int8)
            row_scales, row_sums = torch.empty(rows), torch.empty(rows, dtype=torch.int32)
            scratch = weight.scales.data_ptr(), integers.data_ptr(), row_scales.data_ptr(), row_sums.data_ptr(), padded
            return self._linear(self._linear_int8, x, weight, bias, activation, x.dtype, *scratch)
        return cpu.linear(x, weight, bias, activation)

    def project(self, x: Tensor, weight: Weight) -> Tensor:
        if isinstance(weight, Bf16Panels):
            return self._linear(self._linear_bf16_to_float, x, weight, None, None, torch.float32)
        return self.linear(x, weight, None)

    @staticmethod
    def _linear(
        function: Callable[..., None],
        x: Tensor,
        weight: Bf16Panels | Int8Panels,
        bias: Tensor | None,
        activation: Activation | None,
        dtype: torch.dtype,
        *scratch: int,
    ) -> Tensor:
        x = x.contiguous()
        channels, columns = weight.shape
        out = x.new_empty(*x.shape[:-1], channels, dtype=dtype)
        function(
            x.data_ptr(), x.numel() // columns, columns, weight.panels.data_ptr(), len(weight.panels), address(bias),
            channels, ACTIVATIONS[activation], out.data_ptr(), torch.get_num_threads(), *scratch,
        )  # fmt: skip
        return out

    def kv_write(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
        k, v = side_by_side(k, v)
        self._kv_write(
            k.data_ptr(), v.data_ptr(), k.stride(0), k_pages.data_ptr(), v_pages.data_ptr(), slot_mapping.data_ptr(),
            len(k), k.shape[1], torch.get_num_threads(),
        )  # fmt: skip

    def decode_step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        slot_mapping: Tensor,
        plan: DecodePlan,
        scale: float,
    ) -> Tensor:
        """A row's arithmetic depends on its own pages only, never on its batch-mates."""
        batch, heads, dim = q.shape
        q, k, v = side_by_side(q, k, v)
        pages = plan.page_list
        out = q.new_empty(batch, heads, dim)
        self._decode_step(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), k_pages.data_ptr(), v_pages.data_ptr(),
            slot_mapping.data_ptr(), pages.page_ids.data_ptr(), pages.offsets.data_ptr(), pages.visible.data_ptr(),
            out.data_ptr(), batch, heads, scale, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def prefill_attention(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
        """A row's arithmetic depends on its own keys only, however its prompt is cut."""
        tokens, heads, dim = q.shape
        (q,) = side_by_side(q)
        tiles = plan.tile_list
        out = q.new_empty(tokens, heads, dim)
        self._prefill_attention(
            q.data_ptr(), q.stride(0), k_pages.data_ptr(), v_pages.data_ptr(), tiles.rows.data_ptr(),
            tiles.offsets.data_ptr(), tiles.page_ids.data_ptr(), tiles.masks.data_ptr(), tiles.hidden.data_ptr(),
            len(tiles.rows), out.data_ptr(), heads, scale, torch.get_num_threads(),
        )  # fmt: skip
        return out

    block_sparse_attention = prefill_attention  # a tile's pages are any

    def add_layernorm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Without a gradient."""
        columns = x.shape[-1]
        if columns % LANES:
            return cpu.add_layernorm(x, residual, weight, bias, eps)
        rows, more = x.contiguous(), None if residual is None else residual.contiguous()
        normed, total = torch.empty_like(rows), x if residual is None else torch.empty_like(rows)
        self._add_layernorm(
            rows.data_ptr(), address(more), address(weight), address(bias), x.numel() // columns, columns, eps,
            normed.data_ptr(), total.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return normed, total


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def side_by_side(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors (N, H, D) of which rows may stand apart, but all of them equally far."""
    row = tensors[0].stride()
    if row[1:] == (tensors[0].shape[2], 1) and all(x.stride() == row for x in tensors):
        return tensors
    return tuple(x.contiguous() for x in tensors)


def load(shape: Shape) -> CompiledOps | None:
    """The compiled ops, built first where the cache lacks them; None, and a line in the log, where that fails."""
    library = cache_directory() / f"cpu-{key(shape)}.so"
    if not library.exists():
        log.info("compiling the CPU kernels for this machine and size of heads: once, it takes a second")
        if problem := build(shape, library):
            log.warning("the CPU kernels are not compiled, so that steps take several times as long: %s", problem)
            return None
    try:
        return CompiledOps(ctypes.CDLL(str(library)))
    except (OSError, AttributeError) as error:  # a broken file, or a directory from which no code may be run
        log.warning("the compiled CPU kernels can't be loaded, so that steps take several times as long: %s", error)
        return None


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "banded"


def key(shape: Shape) -> str:
    """Changes with everything that the machine code depends on."""
    facts = (SOURCE.read_text(encoding="utf-8"), FLAGS, os.environ.get("CXX", ""), *map(str, shape), processor())
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def processor() -> str:
    """Which instructions the compiler may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def compiler() -> list[str]:
    """The command that the environment names, or the first that is installed. Raises FileNotFoundError."""
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise FileNotFoundError(f"no C++ compiler: none of {', '.join(COMPILERS)} is installed, and CXX names none")


def build(shape: Shape, library: Path) -> str | None:
    """Compile; what went wrong, or None."""
    defines = (f"-DELEMENT={ELEMENTS[shape.dtype]}", f"-DHEAD_DIM={shape.head_dim}")
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch) / "built.so"
            finished = subprocess.run(
                [*compiler(), *FLAGS.split(), *defines, str(SOURCE), "-o", str(built)],
                capture_output=True,
                text=True,
                timeout=BUILD_TIMEOUT,
                check=False,
            )
            if finished.returncode:
                lines = finished.stderr.strip().splitlines()
                return lines[-1] if lines else f"the compiler ended with {finished.returncode}"
            built.replace(library)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None
