"""Decode attention for CPUs as one compiled loop over live pages, and where its machine code is kept.

PyTorch's compiler (AOTInductor) turns `attend_pages` into C++ that reads each key and value once, where they lie: op by op
every page would be copied first. That takes a C++ compiler and half a minute, once for each shape of heads, dtype and
machine; the result stays in a cache and loads in milliseconds. Without it kernels.cpu serves.
"""

import argparse
import hashlib
import logging
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import cpu
from kernels.band import PAGE_SIZE
from kernels.plan import DecodePlan

log = logging.getLogger("banded.kernels")

# Seconds that the compiler may take.
BUILD_TIMEOUT = 600.0


class Heads(NamedTuple):
    """What the code is compiled for: H heads of size D, and the dtype of keys and values."""

    num_heads: int
    dim: int
    dtype: torch.dtype


def attend_pages(
    queries: Tensor, k_pages: Tensor, v_pages: Tensor, page_ids: Tensor, owners: Tensor, visible: Tensor, rows: Tensor
) -> Tensor:
    """Attention of queries (B, H, D) fp32, already scaled, over the pages of a PageList: (B, H, D).

    Sums of products instead of matrix products, which the compiler would hand to a library together with copies of the
    pages. Every size is at least 2: the compiler takes a 1 for a constant.
    """
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
    """kernels.cpu with decode attention compiled."""

    pack = staticmethod(cpu.pack)
    linear = staticmethod(cpu.linear)
    kv_write = staticmethod(cpu.kv_write)
    prefill_attention = staticmethod(cpu.prefill_attention)
    block_sparse_attention = staticmethod(cpu.block_sparse_attention)
    add_layernorm = staticmethod(cpu.add_layernorm)
    bias_activation = staticmethod(cpu.bias_activation)
    sample = staticmethod(cpu.sample)

    def __init__(self, package: Path):
        # aoti_load_package does the same and imports the whole compiler for it, which takes seconds.
        self._attend_pages = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)

    def decode_attention(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, scale: float) -> Tensor:
        """A row's arithmetic depends on its own pages only, never on its batch-mates."""
        queries = q.float() * scale
        pages = plan.page_list
        if len(q) == 1:
            queries = queries.expand(2, -1, -1)  # see PageList
        arguments = [queries.contiguous(), k_pages, v_pages, pages.page_ids, pages.owners, pages.visible, pages.rows]
        return self._attend_pages.run(arguments)[0][: len(q)]


def load(heads: Heads) -> CompiledOps | None:
    """The compiled ops, built first where the cache lacks them; None, and a line in the log, where that fails."""
    package = cache_directory() / f"decode-{key(heads)}.pt2"
    if not package.exists():
        log.info("compiling decode attention, once for this machine and shape of heads: about half a minute")
        if problem := build(heads, package):
            log.warning("decode attention is not compiled and takes several times as long: %s", problem)
            return None
    return CompiledOps(package)


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "banded"


def key(heads: Heads) -> str:
    """Changes with everything that the machine code depends on."""
    facts = (
        torch.__version__,
        Path(__file__).read_text(encoding="utf-8"),
        *map(str, heads),
        processor(),
        str(torch.get_num_threads()),  # the compiler decides by it what to run in parallel
    )
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def processor() -> str:
    """Which instructions the compiler may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def build(heads: Heads, package: Path) -> str | None:
    """Compile in a process of its own, which takes the compiler's memory with it; what went wrong, or None."""
    shape = (str(heads.num_heads), str(heads.dim), str(heads.dtype)[6:], str(torch.get_num_threads()))
    try:
        package.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=package.parent) as scratch:
            built = Path(scratch) / "built.pt2"
            finished = subprocess.run(
                [sys.executable, "-m", "kernels.cpu_compiled", *shape, str(built)],
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


def compile_package(heads: Heads, package: Path) -> None:
    """Write the machine code of `attend_pages`, for any number of sequences and pages."""
    from torch._inductor import aoti_compile_and_package, config
    from torch.export import Dim, export

    class AttendPages(torch.nn.Module):
        forward = staticmethod(attend_pages)

    # A step of the size that should be parallel: the compiler looks at it when it divides the work among threads.
    batch, width = 32, 16
    pages = torch.zeros(batch * width + 1, heads.num_heads, PAGE_SIZE, heads.dim, dtype=heads.dtype)
    page_ids = torch.arange(batch * width)
    queries = torch.zeros(batch, heads.num_heads, heads.dim)
    visible = torch.ones(batch * width, PAGE_SIZE, dtype=torch.bool)
    example = (queries, pages, pages.clone(), page_ids, page_ids // width, visible, page_ids.view(batch, width))
    most = 1 << 40
    b, r, w, p = (Dim(name, min=2, max=most) for name in ("b", "r", "w", "p"))
    sizes = ({0: b}, {0: p}, {0: p}, {0: r}, {0: r}, {0: r}, {0: b, 1: w})
    config.cpp.enable_floating_point_contract_flag = "fast"  # a product and a sum in one instruction
    config.assert_indirect_indexing = False  # the scheduler's page ids are in range
    with torch.no_grad():
        program = export(AttendPages(), example, dynamic_shapes=sizes)
        aoti_compile_and_package(program, package_path=str(package))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile decode attention into a package")
    parser.add_argument("num_heads", type=int)
    parser.add_argument("dim", type=int)
    parser.add_argument("dtype")
    parser.add_argument("threads", type=int)
    parser.add_argument("package", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compile_package(Heads(args.num_heads, args.dim, getattr(torch, args.dtype)), args.package)


if __name__ == "__main__":
    main()
