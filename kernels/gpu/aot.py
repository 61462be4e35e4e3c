"""Compiles every kernel as it is launched, for GPUs that this machine need not have, and checks the compiled code.

    python -m kernels.gpu.aot

Prints a line per configuration. Fails if one spills, misses the tensor cores, moves wide tensors in narrow pieces, has fewer
tiles in flight than its pipeline has stages for, or fits an SM fewer times than BLOCKS_AT_LEAST. Says nothing about time.
"""

import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
from itertools import product
from multiprocessing import get_context
from typing import Any, NamedTuple, cast, get_args
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.band import PAGE_SIZE
from kernels.block_layout import block_layout
from kernels.gpu import attention, triton_ops
from kernels.gpu.tiles import Capability, padded_head_dim
from kernels.names import Activation
from kernels.patterns import Pattern
from kernels.plan import DecodePlan, PrefillPlan
from kernels.sampling_state import COLUMNS, TABLES, SamplingState

# Heads of the GPT-3 model that has this head size: Brown et al. 2020, table 2.1.
NUM_HEADS = {64: 12, 80: 32, 96: 16, 128: 96}
WIDTHS = (768, 2048, 2560, 12288)
VOCAB_SIZE = 50257
PATTERNS: dict[str, Pattern] = {
    p.kind: p for p in (Pattern(), Pattern("banded", 256), Pattern("strided", 128), Pattern("fixed", 128, 32))
}
NUM_POSITIONS = 2048
cached_layout = cache(block_layout)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CAPABILITIES: tuple[Capability, ...] = get_args(Capability)
WORKERS = 2

KERNELS = {
    "prefill": "_prefill_attention",
    "block_sparse": "_prefill_attention",
    "decode": "_decode_attention",
    "merge_splits": "_merge_splits",
    "kv_write": "_kv_write",
    "add_layernorm": "_add_layernorm",
    "bias_activation": "_bias_activation",
    "sample": "_sample",
}
PIPELINED = ("prefill", "block_sparse", "decode")

# Limits of an SM: CUDA C++ Programming Guide, "Compute Capabilities".
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024}
RESERVED_BYTES = 1024  # of shared memory, for each block
REGISTERS, WARPS, BLOCKS = 65536, 64, 32


class Configuration(NamedTuple):
    """A kernel as some model launches it."""

    kernel: str
    capability: Capability
    dtype: str
    size: int  # of the head, the row or the vocabulary
    variant: str = ""  # pattern or activation

    def __str__(self) -> str:
        return f"{self.kernel} sm_{self.capability} {self.dtype} {self.size} {self.variant}".rstrip()


class Report(NamedTuple):
    """What the compiler made of a configuration."""

    configuration: Configuration
    num_warps: int
    num_stages: int
    registers: int  # of a thread
    local_bytes: int  # of a thread: stack and local memory
    spills: int  # instructions that access local memory
    shared_bytes: int
    math: str  # HGMMA, HMMA, FMA
    narrow: tuple[str, ...]  # accesses to wide tensors that move fewer than 16 bytes per thread
    tiles_in_flight: int
    buffers: int  # tiles of K, and as many of V, that shared memory holds
    blocks: int  # that fit an SM


# How many blocks fit an SM in a kernel's worst configuration. By padded head size (0 for kernels without heads), then by
# compute capability and bytes of an element. Literal, so that a change that costs blocks shows.
BLOCKS_AT_LEAST = {
    ("prefill", 64): {(80, 2): 1, (80, 4): 2, (90, 2): 3, (90, 4): 2},
    ("prefill", 128): {(80, 2): 1, (80, 4): 1, (90, 2): 2, (90, 4): 1},
    ("block_sparse", 64): {(80, 2): 2, (80, 4): 2, (90, 2): 3, (90, 4): 2},
    ("block_sparse", 128): {(80, 2): 1, (80, 4): 1, (90, 2): 2, (90, 4): 1},
    ("decode", 64): {(80, 2): 4, (80, 4): 4, (90, 2): 6, (90, 4): 5},
    ("decode", 128): {(80, 2): 2, (80, 4): 2, (90, 2): 3, (90, 4): 2},
    ("merge_splits", 64): {(80, 2): 16, (80, 4): 16, (90, 2): 16, (90, 4): 16},
    ("merge_splits", 128): {(80, 2): 16, (80, 4): 16, (90, 2): 16, (90, 4): 16},
    ("kv_write", 0): {(80, 2): 3, (80, 4): 2, (90, 2): 3, (90, 4): 2},
    ("add_layernorm", 0): {(80, 2): 2, (80, 4): 1, (90, 2): 1, (90, 4): 1},
    ("bias_activation", 0): {(80, 2): 16, (80, 4): 16, (90, 2): 16, (90, 4): 16},
    ("sample", 0): {(80, 4): 1, (90, 4): 1},
}


def configurations() -> list[Configuration]:
    """All that ship, in the order of the table."""
    found = []
    for capability, dtype in product(CAPABILITIES, DTYPES):
        for size, pattern in product(NUM_HEADS, PATTERNS.values()):
            prefill = "block_sparse" if pattern.is_sparse else "prefill"
            found += [Configuration(k, capability, dtype, size, pattern.kind) for k in (prefill, "decode", "merge_splits")]
        found += [Configuration("kv_write", capability, dtype, size) for size in NUM_HEADS]
        found += [Configuration("add_layernorm", capability, dtype, size) for size in WIDTHS]
        found += [Configuration("bias_activation", capability, dtype, 4 * WIDTHS[0], name) for name in get_args(Activation)]
        if dtype == "fp32":
            found.append(Configuration("sample", capability, dtype, VOCAB_SIZE))
    return sorted(found, key=lambda c: list(KERNELS).index(c.kernel))


def launch(configuration: Configuration) -> None:
    """Call the launcher with tensors laid out like the model's: their shapes and strides decide what Triton compiles."""
    kernel, _, dtype_name, size, variant = configuration
    dtype = DTYPES[dtype_name]
    if kernel == "add_layernorm":
        x, weight = torch.empty(2, size, dtype=dtype), torch.empty(size, dtype=dtype)
        triton_ops.add_layernorm(x, x, weight, weight, 1e-5)
    elif kernel == "bias_activation":
        x, bias = torch.empty(2, size, dtype=dtype), torch.empty(size, dtype=dtype)
        triton_ops.bias_activation(x, bias, cast(Activation, variant))
    elif kernel == "sample":
        launch_sample(size)
    else:
        launch_with_pages(kernel, dtype, size, variant)


def launch_with_pages(kernel: str, dtype: torch.dtype, head_dim: int, kind: str) -> None:
    """q, k and v are slices of a fused projection. The page table has an entry for each 64 positions, and one more."""
    num_heads = NUM_HEADS[head_dim]
    q, k, v = torch.empty(2, 3, num_heads, head_dim, dtype=dtype).unbind(1)
    pages = torch.empty(1, num_heads, PAGE_SIZE, head_dim, dtype=dtype)
    if kernel == "kv_write":
        triton_ops.kv_write(k, v, pages, pages, torch.zeros(2, dtype=torch.int64))
        return
    pattern = PATTERNS[kind]
    layout = cached_layout(pattern, NUM_POSITIONS, q.device) if pattern.is_sparse else None
    table = torch.zeros(2, NUM_POSITIONS // PAGE_SIZE + 1, dtype=torch.int32)
    if kernel in ("prefill", "block_sparse"):
        triton_ops.prefill_attention(q, pages, pages, PrefillPlan(table, [0, 0], [1, 1], pattern, layout), 1.0)
    else:
        lengths = torch.ones(2, dtype=torch.int64)
        triton_ops.decode_attention(q, pages, pages, DecodePlan(table, lengths, pattern, layout), 1.0)


def launch_sample(vocab_size: int) -> None:
    """Rows begin at multiples of 16 elements, as the sampler's buffers do."""
    stride = triton.cdiv(vocab_size, 16) * 16
    columns = {name: torch.empty(2, dtype=dtype) for name, dtype in COLUMNS.items()}
    tables = {name: torch.empty(2, stride, dtype=dtype)[:, :vocab_size] for name, dtype in TABLES.items()}
    rows = torch.zeros(2, dtype=torch.int64)
    triton_ops.sample(torch.empty(2, stride)[:, :vocab_size], SamplingState(**columns, **tables), rows, rows)


class Driver:
    """Replaces Triton's CUDA driver up to the point where a launch would compile."""

    def __init__(self, capability: Capability) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, _device: int) -> int:
        return 0


def source_and_options(configuration: Configuration) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile if the launcher ran on such a GPU: types, divisibility, constants and options.

    They come from Triton's own launch. With other attributes it would compile a kernel that never runs: without the
    divisibility of pointers and strides, one without 16-byte copies and without a pipeline.
    """
    launched = []

    def compile_nothing(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        launched.append((fn.jit_function, compile))
        return True

    triton.runtime.driver.set_active(Driver(configuration.capability))
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.knobs.runtime, "jit_cache_hook", compile_nothing))
        stack.enter_context(mock.patch.object(attention, "capability_of", return_value=configuration.capability))
        launch(configuration)
    [(function, found)] = [x for x in launched if x[0].__name__ == KERNELS[configuration.kernel]]
    source = ASTSource(function, found["signature"], found["constants"], found["configs"][0])
    return source, {name: found[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}


def compile_(configuration: Configuration) -> Report:
    """Compile and inspect. Raises RuntimeError with the configuration's name."""
    try:
        return inspect(configuration, *source_and_options(configuration))
    except Exception as error:  # Triton's exceptions don't survive the way back from a worker
        raise RuntimeError(f"{configuration}: {type(error).__name__}: {error}") from error


def inspect(configuration: Configuration, source: ASTSource, options: dict[str, Any]) -> Report:
    """Compile `source` for the configuration's GPU, and read its assembly."""
    compiled = triton.compile(source, target=GPUTarget("cuda", configuration.capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, local_bytes = resource_usage(dump)
    ops = opcodes(dump)
    tiles, buffers = tiles_in_flight(compiled.asm["ttgir"])
    shared = compiled.metadata.shared
    return Report(
        configuration,
        options["num_warps"],
        options["num_stages"],
        registers,
        local_bytes,
        ops["STL"] + ops["LDL"],
        shared,
        "+".join(name for name in ("HGMMA", "HMMA") if ops[name]) or "FMA",
        narrow_accesses(compiled.asm["ttgir"], compiled.asm["ptx"]),
        tiles,
        buffers,
        blocks_of_sm(configuration.capability, registers, shared, options["num_warps"]),
    )


def resource_usage(dump: str) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack and local memory, from cuobjdump."""
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump)
    assert match, f"no resource usage in {dump[:200]!r}"
    registers, stack, local = map(int, match.groups())
    return registers, stack + local


def opcodes(dump: str) -> Counter[str]:
    """How often a SASS listing has each opcode, whatever its suffixes."""
    return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z]\w*)", dump, re.MULTILINE))


def tiles_in_flight(ttgir: str) -> tuple[int, int]:
    """Tiles (K and V) in flight while another is multiplied, and how many tiles of K shared memory has room for.

    The wait in the loop leaves n groups of copies pending, one each for K and V. Then the loop starts the next tile.
    """
    _, _, loop = ttgir.partition("scf.for")
    waits = [int(n) for n in re.findall(r"ttg\.async_wait %.*\{num = (\d+)", loop)]
    buffers = [int(n) for n in re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", ttgir)]
    return (min(waits) // 2 + 1 if waits else 0), min(buffers, default=0)


def narrow_accesses(ttgir: str, ptx: str) -> tuple[str, ...]:
    """Places that access a tensor of 512 elements or more in pieces below 16 bytes (4 for elements of one byte)."""
    found = []
    narrowest = access_bytes(ptx)
    for place, bits in sorted(wide_tensors(ttgir).items()):
        # A place without an access is one that this file failed to find: report it too.
        num_bytes = narrowest.get(place, 0)
        if num_bytes < (4 if bits <= 8 else 16):
            found.append(f"{place} of {num_bytes} bytes")
    return tuple(found)


def wide_tensors(ttgir: str) -> dict[str, int]:
    """Places that load, store or copy a tensor of 512 elements or more, and the bits of its elements.

    A place is "file:line:column". In an inlined function " @ " and the place of the call follow.
    """
    definitions = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.MULTILINE))

    def place(text: str) -> str:
        if file := re.match(r'"([^"]*)":(\d+):(\d+)', text):
            return f"{file[1].rpartition('/')[2]}:{file[2]}:{file[3]}"
        return " @ ".join(place(definitions[name]) for name in re.findall(r"#loc\d*", text))

    op = r"(?:tt\.load|tt\.store|ttg\.async_copy_global_to_local)"
    accesses = re.findall(rf"{op} .*: tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)>.*loc\((#loc\d*)\)$", ttgir, re.MULTILINE)
    return {place(at): int(bits) for shape, bits, at in accesses if math.prod(map(int, shape.split("x"))) >= 512}


def access_bytes(ptx: str) -> dict[str, int]:
    """Bytes of the narrowest access to global memory at each place."""
    found: dict[str, int] = {}
    place = ""
    for line in ptx.splitlines():
        if ".loc\t" in line:
            place = " @ ".join(re.findall(r"[\w.]+:\d+:\d+", line))
        elif access := re.search(r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+) ", line):
            found[place] = min(found.get(place, 16), int(access[1] or 1) * int(access[2]) // 8)
        elif copy := re.search(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], 0x([0-9a-f]+)", line):
            found[place] = min(found.get(place, 16), int(copy[1], 16))
    return found


def blocks_of_sm(capability: Capability, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Blocks that fit an SM, which allocates registers by 256 in each of its quarters, and shared memory by 128 bytes."""
    warps = 4 * (REGISTERS // 4 // (triton.cdiv(registers * 32, 256) * 256))
    shared = triton.cdiv(shared_bytes, 128) * 128 + RESERVED_BYTES
    return min(warps // num_warps, SHARED_BYTES[capability] // shared, WARPS // num_warps, BLOCKS)


def tensor_cores(configuration: Configuration) -> str | None:
    """The tensor cores that a kernel must use. HGMMA takes 64 queries, so decode has HMMA; fp32 products have neither."""
    if configuration.dtype == "fp32" or configuration.kernel not in PIPELINED:
        return None
    return "HGMMA" if configuration.capability == 90 and configuration.kernel != "decode" else "HMMA"


def problems(report: Report) -> list[str]:
    """What is wrong with a configuration, a line each."""
    c = report.configuration
    found = []
    if report.local_bytes or report.spills:
        found.append(f"spills: {report.local_bytes} bytes a thread, {report.spills} instructions")
    if (cores := tensor_cores(c)) and report.math != cores:
        found.append(f"multiplies with {report.math}, not {cores}")
    found += [f"narrow access at {place}" for place in report.narrow]
    tiles = report.num_stages - 1
    if c.kernel in PIPELINED and (report.tiles_in_flight != tiles or report.buffers < tiles):
        found.append(f"{report.tiles_in_flight} tiles in flight, in {report.buffers} buffers, not {tiles}")
    head_dim = padded_head_dim(c.size) if c.variant in PATTERNS else 0
    blocks = BLOCKS_AT_LEAST[c.kernel, head_dim][c.capability, DTYPES[c.dtype].itemsize]
    if report.blocks < blocks:
        found.append(f"{report.blocks} blocks fit an SM, not {blocks}")
    return [f"{c}: {problem}" for problem in found]


def row(report: Report) -> str:
    """A line of the table. Narrow accesses are counted."""
    values = report._replace(narrow=len(report.narrow))._asdict()  # type: ignore[arg-type]
    return f"{values.pop('configuration')!s:<40}" + "".join(f"  {value:>{len(name)}}" for name, value in values.items())


def main() -> None:
    """Print the table. Exit with 1 and the list of problems if there are any."""
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set, and nothing compiles in Triton's interpreter: unset it")
    found = []
    print(f"{'configuration':<40}" + "".join(f"  {name}" for name in Report._fields[1:]))
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        for report in pool.map(compile_, configurations()):
            print(row(report), flush=True)
            found += problems(report)
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
