"""What PyTorch's ops do slowly on CPUs, as compiled loops, and where their machine code is kept.

Decode attention: op by op, every page would be copied before it is read. The rounding of activations to int8: op by op, six
passes over them. PyTorch's compiler (AOTInductor) makes C++ of both, which takes a C++ compiler and half a minute
each, once for each shape of heads, dtype and machine; the result stays in a cache and loads in milliseconds. Without it
kernels.cpu serves.
"""

import argparse
import hashlib
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import cpu, int8
from kernels.band import PAGE_SIZE
from kernels.int8 import Int8Weight, quantize_rows
from kernels.names import Activation
from kernels.ops import Weight
from kernels.plan import DecodePlan

log = logging.getLogger("banded.kernels")

# Seconds that the compiler may take.
BUILD_TIMEOUT = 600.0
# Threads that a step runs with. Asked when this is imported: while a server loads, torch has one (service/process.py).
NUM_THREADS = torch.get_num_threads()

# The functions that are compiled: by the name of their package.
DECODE, QUANTIZE = "decode", "quantize"


class Shape(NamedTuple):
    """What the code is compiled for: H heads of size D, and the dtype of activations, keys and values."""

    num_heads: int
    head_dim: int
    dtype: torch.dtype


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    slot_mapping: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_ids: Tensor,
    owners: Tensor,
    visible: Tensor,
    rows: Tensor,
) -> Tensor:
    """kernels.ops.Ops.decode_step over the pages of a PageList, `scale` a number.

    Sums of products instead of matrix products, which the compiler would hand to a library together with copies of the
    pages. Every size is at least 2: the compiler takes a 1 for a constant.
    """
    pages, offsets = slot_mapping // PAGE_SIZE, slot_mapping % PAGE_SIZE
    k_pages[pages, :, offsets] = k
    v_pages[pages, :, offsets] = v
    # Written to memory, or the compiler would scale a query again for each key.
    queries = torch.empty(q.shape, dtype=torch.float32)
    queries[torch.arange(q.shape[0])] = q.float() * scale
    num_pages = page_ids.shape[0]  # len() would be a constant to the compiler
    seen = visible[:, None]  # (R, 1, 64)
    scores = (k_pages[page_ids].float() * queries[owners][:, :, None]).sum(-1)  # (R, H, 64)
    scores = torch.where(seen, scores, -torch.inf)
    peak = scores.amax(-1)
    # A page of which a sparse pattern shows this query nothing has no peak, and -inf - -inf is NaN.
    weights = (scores - peak.clamp_min(torch.finfo(torch.float32).min)[..., None]).exp()
    total = weights.sum(-1)
    # Keys not written yet may hold anything, NaN included, and 0 * NaN is NaN.
    out = (weights[..., None] * torch.where(seen[..., None], v_pages[page_ids].float(), 0.0)).sum(2)  # (R, H, D)
    index = rows.clamp_max(num_pages - 1)  # (B, W)
    peaks = torch.where((rows < num_pages)[..., None], peak[index], -torch.inf)  # (B, W, H)
    factor = (peaks - peaks.amax(1, keepdim=True)).exp()
    merged = (factor[..., None] * out[index]).sum(1)  # (B, H, D)
    return (merged / (factor * total[index]).sum(1)[..., None]).to(k_pages.dtype)


class CompiledOps:
    """kernels.cpu with some of its functions compiled."""

    pack = staticmethod(cpu.pack)
    kv_write = staticmethod(cpu.kv_write)
    decode_attention = staticmethod(cpu.decode_attention)
    prefill_attention = staticmethod(cpu.prefill_attention)
    block_sparse_attention = staticmethod(cpu.block_sparse_attention)
    add_layernorm = staticmethod(cpu.add_layernorm)
    bias_activation = staticmethod(cpu.bias_activation)
    sample = staticmethod(cpu.sample)

    def __init__(self, shape: Shape, packages: Mapping[str, Path]):
        """`packages` holds DECODE, and QUANTIZE where weights are int8."""
        self._strides = (3 * shape.num_heads * shape.head_dim, shape.head_dim, 1)
        # aoti_load_package does the same and imports the whole compiler for it, which takes seconds.
        self._compiled = {
            name: torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)
            for name, package in packages.items()
        }

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
        if isinstance(weight, Int8Weight):
            return cpu.linear_int8(x, weight, bias, activation, self._quantize_rows)
        return cpu.linear(x, weight, bias, activation)

    def _quantize_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        integers, scales = self._compiled[QUANTIZE].run([torch.cat((x, x)) if len(x) == 1 else x.contiguous()])
        return integers[: len(x)], scales[: len(x)]

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
        count = len(q)
        if count == 1:  # a lone row is written twice: see PageList
            q, k, v, slot_mapping = (torch.cat((x, x)) for x in (q, k, v, slot_mapping))
        q, k, v = (x if x.stride() == self._strides else self._as_slice(x) for x in (q, k, v))
        pages = plan.page_list
        inputs = [q, k, v, torch.tensor(scale), slot_mapping, k_pages, v_pages]
        return self._compiled[DECODE].run([*inputs, pages.page_ids, pages.owners, pages.visible, pages.rows])[0][:count]

    def _as_slice(self, x: Tensor) -> Tensor:
        """x (B, H, D) with the strides of a slice of the fused projection, which the code was compiled for."""
        return x.new_empty(len(x), 3, *x.shape[1:])[:, 0].copy_(x)


def load(shape: Shape, *, quantize: bool = False) -> CompiledOps | None:
    """The compiled ops, built first where the cache lacks them; None, and a line in the log, where that fails."""
    packages = {name: cache_directory() / f"{name}-{key(shape)}.pt2" for name in (DECODE, *([QUANTIZE] if quantize else []))}
    for name, package in packages.items():
        if not package.exists():
            log.info("compiling %s for this machine and shape of heads: once, it takes half a minute", name)
            if problem := build(name, shape, package):
                log.warning("%s is not compiled, so that steps take up to twice as long: %s", name, problem)
                return None
    try:
        return CompiledOps(shape, packages)
    except RuntimeError as error:  # a broken file, or a temporary directory from which no code may be run
        reason = str(error).splitlines()[0]
        log.warning("what was compiled can't be loaded, so that steps take up to twice as long: %s", reason)
        return None


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "banded"


def key(shape: Shape) -> str:
    """Changes with everything that the machine code depends on."""
    facts = (
        torch.__version__,
        *(Path(source).read_text(encoding="utf-8") for source in (__file__, int8.__file__)),
        *map(str, shape),
        processor(),
        str(NUM_THREADS),  # the compiler decides by it what to run in parallel
    )
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def processor() -> str:
    """Which instructions the compiler may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def build(name: str, shape: Shape, package: Path) -> str | None:
    """Compile in a process of its own, which takes the compiler's memory with it; what went wrong, or None."""
    arguments = (name, str(shape.num_heads), str(shape.head_dim), str(shape.dtype)[6:], str(NUM_THREADS))
    try:
        package.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=package.parent) as scratch:
            built = Path(scratch) / "built.pt2"
            finished = subprocess.run(
                [sys.executable, "-m", "kernels.cpu_compiled", *arguments, str(built)],
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": scratch, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                capture_output=True,
                text=True,
                timeout=BUILD_TIMEOUT,
                check=False,
            )
            if finished.returncode:
                lines = finished.stderr.strip().splitlines()
                return lines[-1] if lines else f"the compiler's process ended with {finished.returncode}"
            built.replace(package)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None


class Compilable(NamedTuple):
    """A function of tensors, an example of them, and which of their sizes may change, by name, each at least 2."""

    function: Callable[..., Any]
    example: tuple[Tensor, ...]
    sizes: tuple[dict[int, str], ...]


def compilable(name: str, shape: Shape) -> Compilable:
    """The examples are of the size that should be parallel: the compiler divides the work among threads by them."""
    batch, width = 32, 16
    if name == QUANTIZE:
        return Compilable(quantize_rows, (torch.zeros(batch, 1024, dtype=shape.dtype),), ({0: "n", 1: "c"},))
    pages = torch.zeros(batch * width + 1, shape.num_heads, PAGE_SIZE, shape.head_dim, dtype=shape.dtype)
    q, k, v = torch.zeros(batch, 3, shape.num_heads, shape.head_dim, dtype=shape.dtype).unbind(1)
    page_ids = torch.arange(batch * width)
    visible = torch.ones(batch * width, PAGE_SIZE, dtype=torch.bool)
    example = (q, k, v, torch.tensor(1.0), torch.arange(batch), pages, pages.clone())
    page_list = (page_ids, page_ids // width, visible, page_ids.view(batch, width))
    sizes = [{0: "b"}, {0: "b"}, {0: "b"}, {}, {0: "b"}, {0: "p"}, {0: "p"}, {0: "r"}, {0: "r"}, {0: "r"}, {0: "b", 1: "w"}]
    return Compilable(decode_step, example + page_list, tuple(sizes))


def compile_package(what: Compilable, package: Path) -> None:
    """Write the machine code of a function."""
    from torch._inductor import aoti_compile_and_package, config
    from torch.export import Dim, export

    class Module(torch.nn.Module):
        forward = staticmethod(what.function)

    names = {name for sizes in what.sizes for name in sizes.values()}
    dims = {name: Dim(name, min=2, max=1 << 40) for name in names}
    dynamic = [{axis: dims[name] for axis, name in sizes.items()} for sizes in what.sizes]
    config.cpp.enable_floating_point_contract_flag = "fast"  # a product and a sum in one instruction
    config.assert_indirect_indexing = False  # the scheduler's page ids are in range
    with torch.no_grad():
        program = export(Module(), what.example, dynamic_shapes=tuple(dynamic))
        aoti_compile_and_package(program, package_path=str(package))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile a function of this file into a package")
    parser.add_argument("name", choices=(DECODE, QUANTIZE))
    parser.add_argument("num_heads", type=int)
    parser.add_argument("head_dim", type=int)
    parser.add_argument("dtype")
    parser.add_argument("threads", type=int)
    parser.add_argument("package", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = Shape(args.num_heads, args.head_dim, getattr(torch, args.dtype))
    compile_package(compilable(args.name, shape), args.package)


if __name__ == "__main__":
    main()
