"""What PyTorch's ops do slowly on CPUs, as loops in C++ (cpu_compiled.cpp), and where their machine code is kept.

Decode attention: op by op, every page would be copied before it is read. Products in int8: oneDNN takes up to twice as long
for the few rows of a decode step, and the rounding of activations is six passes over them. Compiling takes a C++ compiler
and a second, once for each size of heads, dtype and machine; the result stays in a cache. Without it kernels.cpu serves.
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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu
from kernels.int8 import Int8Weight, quantize_channels
from kernels.names import Activation
from kernels.ops import Weight
from kernels.plan import DecodePlan

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
# Channels of a panel, products that an instruction adds up, and what weights have been given to be unsigned.
LANES, GROUP, OFFSET = 16, 4, 128


class Shape(NamedTuple):
    """What the code is compiled for: the size of a head, and the dtype of activations, keys and values."""

    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class PanelWeight(Int8Weight):
    """A weight (O, C) in panels of LANES channels, an even number of them, so that a product reads it from front to back."""

    panels: Tensor  # (O' / LANES, C' / GROUP, LANES, GROUP) uint8: the integers + OFFSET, padded with zeros
    shape: tuple[int, int]  # (O, C); `scales` is as long as O'

    def integers(self) -> Tensor:
        channels, columns = self.shape
        return (
            (self.panels.to(torch.int16) - OFFSET)
            .to(torch.int8)
            .transpose(1, 2)
            .flatten(2)
            .flatten(0, 1)[:channels, :columns]
        )


class CompiledOps:
    """kernels.cpu with some of its functions compiled."""

    kv_write = staticmethod(cpu.kv_write)
    decode_attention = staticmethod(cpu.decode_attention)
    prefill_attention = staticmethod(cpu.prefill_attention)
    block_sparse_attention = staticmethod(cpu.block_sparse_attention)
    add_layernorm = staticmethod(cpu.add_layernorm)
    bias_activation = staticmethod(cpu.bias_activation)
    sample = staticmethod(cpu.sample)

    def __init__(self, library: ctypes.CDLL):
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._decode_step = library.decode_step
        self._decode_step.argtypes = [pointer] * 3 + [size] + [pointer] * 7 + [size, size, ctypes.c_float, number]
        self._decode_step.restype = None
        self._linear_int8 = library.linear_int8 if hasattr(library, "linear_int8") else None
        if self._linear_int8:  # else the machine lacks its instructions
            self._linear_int8.argtypes = [pointer, size, size, *[pointer] * 3, size, number, *[pointer] * 4, number]
            self._linear_int8.restype = None

    def pack(self, weight: Tensor, *, quantize: bool) -> Weight:
        if not quantize or not self._linear_int8:
            return cpu.pack(weight, quantize=quantize)
        integers, scales = quantize_channels(weight)
        channels, columns = weight.shape
        padded = F.pad(integers.to(torch.int16) + OFFSET, (0, -columns % LANES, 0, -channels % (2 * LANES)), value=OFFSET)
        panels = padded.to(torch.uint8).unflatten(1, (-1, GROUP)).unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()
        return PanelWeight(F.pad(scales, (0, -channels % (2 * LANES))), panels, (channels, columns))

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
        if not isinstance(weight, PanelWeight):
            return cpu.linear(x, weight, bias, activation)
        assert self._linear_int8, "or nobody would have packed the weight like that"
        channels, columns = weight.shape
        x = x.contiguous()
        rows = x.numel() // columns
        padded = len(weight.panels[0]) * GROUP
        integers = torch.empty(rows, padded, dtype=torch.int8)
        row_scales, row_sums = torch.empty(rows), torch.empty(rows, dtype=torch.int32)
        out = x.new_empty(*x.shape[:-1], channels)
        self._linear_int8(
            x.data_ptr(), rows, columns, weight.panels.data_ptr(), weight.scales.data_ptr(),
            None if bias is None else bias.data_ptr(), channels, ACTIVATIONS[activation],
            integers.data_ptr(), row_scales.data_ptr(), row_sums.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

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
        if not q.stride() == k.stride() == v.stride() or q.stride()[1:] != (dim, 1):
            q, k, v = (x.contiguous() for x in (q, k, v))
        pages = plan.page_list
        out = q.new_empty(batch, heads, dim)
        self._decode_step(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), k_pages.data_ptr(), v_pages.data_ptr(),
            slot_mapping.data_ptr(), pages.page_ids.data_ptr(), pages.offsets.data_ptr(), pages.visible.data_ptr(),
            out.data_ptr(), batch, heads, scale, torch.get_num_threads(),
        )  # fmt: skip
        return out


def load(shape: Shape) -> CompiledOps | None:
    """The compiled ops, built first where the cache lacks them; None, and a line in the log, where that fails."""
    library = cache_directory() / f"cpu-{key(shape)}.so"
    if not library.exists():
        log.info("compiling decode attention for this machine and size of heads: once, it takes a second")
        if problem := build(shape, library):
            log.warning("decode attention is not compiled, so that steps take up to twice as long: %s", problem)
            return None
    try:
        return CompiledOps(ctypes.CDLL(str(library)))
    except (OSError, AttributeError) as error:  # a broken file, or a directory from which no code may be run
        log.warning("what was compiled can't be loaded, so that steps take up to twice as long: %s", error)
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
