"""The ahead-of-time check: what it reads from assembly, and that it fails where it should."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kernels.gpu import aot
from kernels.gpu.aot import Configuration, Report

ROOT = Path(__file__).parents[3]

GOOD = Report(
    Configuration("prefill", 90, "fp16", 128, "dense"),
    num_warps=4,
    num_stages=3,
    registers=216,
    local_bytes=0,
    spills=0,
    shared_bytes=114688,
    math="HGMMA",
    narrow=(),
    tiles_in_flight=2,
    buffers=3,
    blocks=2,
)

SASS = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function _prefill_attention:
  REG:159 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:440 TEXTURE:0 SURFACE:0 SAMPLER:0

	code for sm_80
		Function : _prefill_attention
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;            /* 0x00000a00ff017624 */
                                                                                      /* 0x000fe400078e00ff */
        /*0090*/                   LDG.E R4, [R2.64+0x4] ;                            /* 0x0000040c02047981 */
        /*00a0*/              @!P0 LDG.E.128 R8, [R2.64] ;                            /* 0x0000040c02047981 */
        /*00b0*/              @UP1 LDGSTS.E.BYPASS.128 [R4], [R6.64], P0 ;            /* 0x0000040c02047981 */
        /*00c0*/                   LDS.128 R8, [R2] ;                                 /* 0x0000040c02047981 */
        /*00d0*/                   STL [R1+0x8], R2 ;                                 /* 0x0000040c02047981 */
        /*00e0*/                   LDL.LU R2, [R1+0x8] ;                              /* 0x0000040c02047981 */
        /*12f0*/                   HMMA.16816.F32 R4, R4, R8, R12 ;                   /* 0x0000040c02047981 */
"""

TTGIR = """
#loc = loc("/src/prefill.py":15:0)
    %q = tt.load %a, %mask, %zero : tensor<64x128x!tt.ptr<f16>, #blocked> loc(#loc5)
    %page = tt.load %table : !tt.ptr<i32> loc(#loc4)
    %peak = tt.load %p : tensor<16x!tt.ptr<f32>, #blocked> loc(#loc4)
    %k_1 = ttg.local_alloc : () -> !ttg.memdesc<2x64x128xf16, #shared, #smem, mutable> loc(#loc7)
    %v_1 = ttg.local_alloc : () -> !ttg.memdesc<2x64x128xf16, #shared, #smem, mutable> loc(#loc7)
    %k_2 = ttg.async_copy_global_to_local %b, %c : tensor<64x128x!tt.ptr<f16>, #b> -> <64x128xf16, #shared> loc(#loc7)
    %r = scf.for %i = %c0 to %n step %c1 iter_args(%x = %y) -> (tensor<64x128xf32, #mma>) : i32 {
      %w = ttg.async_wait %t, %u {num = 2 : i32} loc(#loc7)
    } loc(#loc4)
    %z = ttg.async_wait {num = 0 : i32} loc(#loc4)
    tt.store %o, %out, %mask : tensor<64x128x!tt.ptr<f16>, #blocked> loc(#loc4)
#loc3 = loc("/src/softmax.py":48:16)
#loc4 = loc("/src/prefill.py":90:12)
#loc5 = loc("q"(#loc2))
#loc2 = loc("/src/prefill.py":44:20)
#loc6 = loc("k"(#loc3))
#loc7 = loc(callsite(#loc6 at #loc4))
"""

PTX = """
	.loc	1 40 46                         // prefill.py:40:46
	ld.global.b32 { %r70 }, [ %rd22 + 0 ];
	.loc	1 44 20                         // prefill.py:44:20
	@%p49 ld.global.v4.b32 { %r78, %r79, %r80, %r81 }, [ %rd26 + 0 ];
	.loc	3 48 16                         // softmax.py:48:16 @[ prefill.py:90:12 ]
	cp.async.cg.shared.global [ %r100 + 0 ], [ %rd31 + 0 ], 0x10, %r102;
	cp.async.ca.shared.global [ %r100 + 0 ], [ %rd31 + 0 ], 0x8, %r102;
	.loc	1 90 12                         // prefill.py:90:12
	@%p49 st.global.v4.b32 [ %rd100 + 0 ], { %r621, %r622, %r623, %r624 };
	st.global.L1::evict_last.v2.b16 [ %rd100 + 0 ], { %rs1, %rs2 };
"""


def test_resource_usage_adds_stack_and_local_memory() -> None:
    assert aot.resource_usage(SASS) == (159, 24)


def test_opcodes_are_counted_with_or_without_predicate() -> None:
    ops = aot.opcodes(SASS)
    assert ops == {"IMAD": 1, "LDG": 2, "LDGSTS": 1, "LDS": 1, "STL": 1, "LDL": 1, "HMMA": 1}


def test_tiles_in_flight_are_those_of_the_wait_in_the_loop() -> None:
    assert aot.tiles_in_flight(TTGIR) == (2, 2)
    assert aot.tiles_in_flight(TTGIR.replace("num = 2", "num = 0")) == (1, 2)
    assert aot.tiles_in_flight("    %q = tt.load %a : tensor<64x!tt.ptr<f16>, #blocked> loc(#loc5)") == (0, 0)


def test_wide_tensors_have_the_place_of_their_access() -> None:
    assert aot.wide_tensors(TTGIR) == {
        "prefill.py:44:20": 16,
        "softmax.py:48:16 @ prefill.py:90:12": 16,
        "prefill.py:90:12": 16,
    }


def test_accesses_are_as_wide_as_the_narrowest_at_their_place() -> None:
    assert aot.access_bytes(PTX) == {
        "prefill.py:40:46": 4,
        "prefill.py:44:20": 16,
        "softmax.py:48:16 @ prefill.py:90:12": 8,
        "prefill.py:90:12": 4,
    }


def test_narrow_and_missing_accesses_are_named() -> None:
    narrow = ("prefill.py:90:12 of 4 bytes", "softmax.py:48:16 @ prefill.py:90:12 of 8 bytes")
    assert aot.narrow_accesses(TTGIR, PTX) == narrow
    assert aot.narrow_accesses(TTGIR, PTX.replace("44:20", "43:20")) == ("prefill.py:44:20 of 0 bytes", *narrow)


@pytest.mark.parametrize(
    ("capability", "registers", "shared_bytes", "num_warps", "blocks"),
    [
        (80, 32, 0, 4, 16),  # limited by the warps of an SM
        (80, 16, 0, 1, 32),  # limited by the blocks of an SM
        (80, 255, 0, 4, 2),  # the registers of a quarter hold 2 warps
        (80, 168, 0, 4, 3),  # the registers of a quarter hold 3 warps
        (80, 129, 0, 8, 1),
        (80, 32, 81 * 1024, 4, 2),
        (80, 32, 81 * 1024 + 1, 4, 1),  # a block reserves 1 KB
        (90, 32, 81 * 1024 + 1, 4, 2),
        (90, 32, 227 * 1024, 4, 1),
        (90, 32, 227 * 1024 + 1, 4, 0),
    ],
)
def test_blocks_of_sm(capability: Any, registers: int, shared_bytes: int, num_warps: int, blocks: int) -> None:
    assert aot.blocks_of_sm(capability, registers, shared_bytes, num_warps) == blocks


def test_a_good_report_has_no_problems() -> None:
    assert aot.problems(GOOD) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"local_bytes": 8}, "spills: 8 bytes a thread, 0 instructions"),
        ({"spills": 2}, "spills: 0 bytes a thread, 2 instructions"),
        ({"math": "HMMA"}, "multiplies with HMMA, not HGMMA"),
        ({"math": "HGMMA+HMMA"}, "multiplies with HGMMA+HMMA, not HGMMA"),
        ({"narrow": ("a.py:1:2 of 8 bytes",)}, "narrow access at a.py:1:2 of 8 bytes"),
        ({"tiles_in_flight": 1}, "1 tiles in flight, in 3 buffers, not 2"),
        ({"buffers": 1}, "2 tiles in flight, in 1 buffers, not 2"),
        ({"blocks": 1}, "1 blocks fit an SM, not 2"),
    ],
)
def test_each_problem_is_named(changes: dict[str, Any], problem: str) -> None:
    assert aot.problems(GOOD._replace(**changes)) == [f"prefill sm_90 fp16 128 dense: {problem}"]


def test_tensor_cores_by_kernel_and_gpu() -> None:
    wanted = {c[:3]: aot.tensor_cores(c) for c in aot.configurations()}
    assert wanted["prefill", 80, "bf16"] == wanted["decode", 80, "fp16"] == wanted["decode", 90, "bf16"] == "HMMA"
    assert wanted["prefill", 90, "bf16"] == wanted["block_sparse", 90, "fp16"] == "HGMMA"
    assert wanted["prefill", 90, "fp32"] is wanted["kv_write", 80, "fp16"] is None


def test_every_kernel_pattern_and_gpu_is_in_the_table() -> None:
    configurations = aot.configurations()
    assert len(set(configurations)) == len(configurations) == 2 * (3 * (16 * 3 + 4 + 4 + 3) + 1)
    assert {c.kernel for c in configurations} == set(aot.KERNELS)


def test_refuses_to_run_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="unset it"):
        aot.main()


# The tests run in Triton's interpreter and cannot compile. So this script needs a process of its own.
SCRIPT = """
import json
from triton.compiler import ASTSource
from kernels.gpu import aot
from kernels.gpu import tiles as tuning
from kernels.gpu.aot import Configuration

prefill = Configuration("prefill", 80, "fp16", 128, "dense")
shipped = [aot.compile_(c) for c in (prefill, Configuration("decode", 90, "bf16", 80, "banded"))]
source, options = aot.source_and_options(prefill)
bare = aot.inspect(prefill, ASTSource(source.fn, source.signature, source.constants, attrs={}), options)
tuning.TILES["prefill", 80, 128, 2] = tuning.TileShape(128, 4, 3)
spilling = aot.compile_(prefill)
for name, reports in (("shipped", shipped), ("bare", [bare]), ("spilling", [spilling])):
    print(json.dumps([name, [report._asdict() for report in reports], sum(map(aot.problems, reports), [])]))
aot.configurations = lambda: [Configuration("merge_splits", 80, "fp16", 64, "dense")]
aot.BLOCKS_AT_LEAST["merge_splits", 64][80, 2] = 17
aot.main()
"""


class Compiled(NamedTuple):
    reports: dict[str, list[dict[str, Any]]]
    problems: dict[str, list[str]]
    main: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    main = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True)
    results = [json.loads(line) for line in main.stdout.splitlines() if line.startswith("[")]
    assert len(results) == 3, main.stderr
    return Compiled({name: reports for name, reports, _ in results}, {name: found for name, _, found in results}, main)


def test_shipped_configurations_pass(compiled: Compiled) -> None:
    assert compiled.problems["shipped"] == []
    assert [report["math"] for report in compiled.reports["shipped"]] == ["HMMA", "HMMA"]


def test_a_tile_that_is_too_large_spills(compiled: Compiled) -> None:
    assert compiled.problems["spilling"][0].startswith("prefill sm_80 fp16 128 dense: spills: ")


def test_without_the_attributes_of_a_launch_another_kernel_is_inspected(compiled: Compiled) -> None:
    """It has no 16-byte accesses, and therefore no pipeline. test_shipped_configurations_pass shows that ours has both."""
    [bare] = compiled.reports["bare"]
    assert len(bare["narrow"]) == 4  # q, k, v and the output
    assert bare["tiles_in_flight"] == 0


def test_main_prints_the_table_and_exits_with_the_problems(compiled: Compiled) -> None:
    assert compiled.main.returncode == 1
    header, row = compiled.main.stdout.splitlines()[-2:]
    assert header.split() == list(Report._fields)
    assert row.startswith("merge_splits sm_80 fp16 64 dense  ")
    assert compiled.main.stderr == "merge_splits sm_80 fp16 64 dense: 16 blocks fit an SM, not 17\n"
