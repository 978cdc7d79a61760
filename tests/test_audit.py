"""The audit catches what it is there for: each fault that `planted.py` plants, and nothing in what is sound."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vitkernels.kernels.variants import Variant

ROOT = Path(__file__).parents[1]

if importlib.util.find_spec("triton") is None:
    pytest.skip("the audit compiles with triton, which is not installed", allow_module_level=True)


def audit(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The audit in a process of its own: this one may be interpreting."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), inherited.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "bench.audit", *arguments],
        env=inherited | {"PYTHONPATH": path, "COLUMNS": "250"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def planted() -> subprocess.CompletedProcess[str]:
    """One audit of every planted kernel."""
    return audit("--page", "planted", "--capability", "90")


def test_faults_end_with_1(planted: subprocess.CompletedProcess[str]) -> None:
    assert planted.returncode == 1, planted.stderr
    from vitkernels.kernels.fences import FENCED

    unfenced = 0 if FENCED else 1  # older tritons leave a fence out of the greedy product besides
    assert f"8 rows, {5 + unfenced} faults" in planted.stdout


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("spilling copy", "spills "),
        ("product of 16 rows", "multiplies matrices without HGMMA"),
        ("greedy product", "takes 327680 bytes of shared memory; sm_90 gives 232448"),
        ("product of 100 rows", "does not compile: CompilationError: arange's range must be a power of 2"),
        ("misnamed copy", "does not compile: ValueError: signature and constants do not fit the kernel's arguments"),
    ],
)
def test_each_fault_is_named(row: str, fault: str, planted: subprocess.CompletedProcess[str]) -> None:
    assert f"{row} (sm_90) {fault}" in planted.stdout, planted.stdout


@pytest.mark.parametrize("row", ["good copy", "good product", "admitted spill"])
def test_sound_rows_are_not_blamed(row: str, planted: subprocess.CompletedProcess[str]) -> None:
    assert f"{row} (sm_90)" not in planted.stdout


def test_the_table_reads_what_was_compiled(planted: subprocess.CompletedProcess[str]) -> None:
    rows = {line.strip()[:20].strip(): line for line in planted.stdout.splitlines()}
    copy, product = rows["good copy"].split(), rows["good product"].split()
    assert copy[2:5] == ["90", copy[3], "0"]  # registers, then no spill
    assert "128" in copy, "the loads of 8 bf16 each are 128 bits wide"
    assert {"3000", "1000", "100%"} <= set(copy), "3 GB at 3 TB/s take 1000 us"
    assert {"HGMMA", "1253", "50%"} <= set(product), "1 TFLOP at 798 TFLOP/s takes 1253 us, and half of it is useful"


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({}, None),
        ({"matrix": {}}, "multiplies matrices without a matrix instruction"),
        (
            {"overwritten": ("LDS.64 R88, [R6] ;", "MOV R90, R1 ;")},
            "writes registers that a product in flight reads, 2 times; first: LDS.64 R88, [R6] ;",
        ),
        (
            {"unfenced": ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;",)},
            "multiplies what cp.async wrote without a proxy fence, 1 times; first: "
            "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;",
        ),
        (
            {"undefined": ("UIADD3 UR34, UP0, UR34, 0x40, URZ",)},
            "reads registers that nothing wrote, 1 times; first: UIADD3 UR34, UP0, UR34, 0x40, URZ",
        ),
        ({"layouts": ("%rd75",)}, "multiplies out of one address in two layouts, which ptxas 12.8 mixes up: %rd75"),
        ({"scratch": 256}, "wants 256 bytes of scratch memory, which nobody allocates"),
    ],
)
def test_faults_that_no_kernel_here_has(changed: dict[str, Any], fault: str | None) -> None:
    from bench.audit import Row
    from bench.sass import Reading

    sound = Reading(128, 64, 0, 1024, {"HMMA": 8}, 128, 0, None)
    variant = Variant("product", None, {}, {}, matrix=True)
    assert Row(variant, 80, dataclasses.replace(sound, **changed), "").faults == ([fault] if fault else [])


# a pipelined loop: of two products of a step the second may be in flight when the next step begins
LOOP = """
.L_x_0:
        /*0010*/                   LDS.128 R40, [R2+UR5] ;
        /*0020*/                   {before} ;
        /*0030*/                   WARPGROUP.ARRIVE ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR4], R24, gsb0 ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, R92, gdesc[UR8], R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, {left} ;
        /*0080*/                   {behind} ;
        /*0090*/              @!P5 BRA `(.L_x_0) ;
        /*00a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00b0*/                   MOV R92, R1 ;
"""


@pytest.mark.parametrize(
    ("left", "before", "behind", "found"),
    [
        ("0x1", "IADD3 R87, P5, R92, 0xc0, RZ", "STG.E [R88], R92", []),
        ("0x0", "LDS.64 R92, [R6]", "MOV R95, R1", []),
        ("0x1", "LDS.64 R88, [R6]", "MOV R91, R1", []),
        ("0x1", "LDS.64 R92, [R6]", "NOP", ["LDS.64 R92, [R6]"]),  # across the loop's back edge
        ("0x1", "LDG.E.128 R92, desc[UR4][R4.64]", "NOP", ["LDG.E.128 R92, desc[UR4][R4.64]"]),
        ("0x1", "LDG.E.128 R89, desc[UR4][R4.64]", "NOP", ["LDG.E.128 R89, desc[UR4][R4.64]"]),
        ("0x1", "NOP", "ISETP.GE.AND P0, PT, R92, R95, PT", []),
        ("0x1", "NOP", "IADD3 R95, P5, R16, 0xc0, RZ", ["IADD3 R95, P5, R16, 0xc0, RZ"]),
        ("0x1", "NOP", "@!P0 SHFL.IDX PT, R94, R1, R2, R3", ["SHFL.IDX PT, R94, R1, R2, R3"]),
        ("0x1", "NOP", "IMAD.WIDE.U32 R90, R1, R2, R4", []),
        ("0x3", "NOP", "IMAD.WIDE.U32 R90, R1, R2, R4", ["IMAD.WIDE.U32 R90, R1, R2, R4"]),
        ("0x1", "LDSM.16.M88.4 R90, [R6]", "NOP", ["LDSM.16.M88.4 R90, [R6]"]),
    ],
)
def test_registers_of_a_product_in_flight(left: str, before: str, behind: str, found: list[str]) -> None:
    from bench.listing import parse
    from bench.wgmma import overwritten

    assert overwritten(parse(LOOP.format(left=left, before=before, behind=behind))) == found


# copies for the next step are issued behind the products of this one
COPIES = """
        /*0010*/                   {first} ;
        /*0020*/                   LDGDEPBAR ;
.L_x_0:
        /*0030*/                   DEPBAR.LE SB0, 0x0 ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/                   {between} ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/                   {behind} ;
        /*0090*/                   LDGDEPBAR ;
        /*00a0*/              @!P5 BRA `(.L_x_0) ;
"""
COPY = "LDGSTS.E.BYPASS.128 [R17], desc[UR16][R4.64]"


@pytest.mark.parametrize(
    ("first", "between", "behind", "found"),
    [
        (COPY, "FENCE.VIEW.ASYNC.S", COPY, 0),
        (COPY, "NOP", "FENCE.VIEW.ASYNC.S", 1),
        ("NOP", "NOP", COPY, 1),  # across the loop's back edge
        ("NOP", "NOP", "LDG.E.128 R92, desc[UR4][R4.64]", 0),  # nothing is copied: DEPBAR waits for another thing
    ],
)
def test_copies_that_a_product_reads_are_fenced(first: str, between: str, behind: str, found: int) -> None:
    from bench.listing import parse
    from bench.wgmma import unfenced

    assert len(unfenced(parse(COPIES.format(first=first, between=between, behind=behind)))) == found


# two ways into a loop whose product takes descriptors out of uniform registers 4 to 7
PATHS = """
        /*0010*/                   ULDC.64 UR4, c[0x0][0x208] ;
        /*0020*/                   ULDC UR6, c[0x0][0x210] ;
        /*0030*/                   CS2R R24, SRZ ;
        /*0040*/              @!P0 BRA `(.L_x_0) ;
        /*0050*/                   {above} ;
        /*0060*/                   BRA `(.L_x_1) ;
.L_x_0:
        /*0070*/                   {below} ;
.L_x_1:
        /*0080*/                   HGMMA.64x8x16.F32.BF16 R28, {product}, RZ, !UPT, gsb0 ;
        /*0090*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00a0*/                   {after} ;
        /*00b0*/              @!P5 BRA `(.L_x_1) ;
        /*00c0*/                   EXIT ;
"""
SHARED = "gdesc[UR4]"
LOST = f"HGMMA.64x8x16.F32.BF16 R28, {SHARED}, RZ, !UPT, gsb0"


@pytest.mark.parametrize(
    ("above", "below", "product", "after", "found"),
    [
        ("UMOV UR7, URZ", "NOP", SHARED, "NOP", []),  # on one path of two
        ("NOP", "@P1 UMOV UR7, URZ", SHARED, "NOP", []),  # what a predicate may skip
        ("NOP", "NOP", SHARED, "UMOV UR7, URZ", []),  # in an earlier turn of the loop
        ("NOP", "NOP", SHARED, "NOP", [LOST]),
        ("UIADD3 UR7, UP0, UR7, 0x40, URZ", "NOP", SHARED, "NOP", ["UIADD3 UR7, UP0, UR7, 0x40, URZ"]),
        ("NOP", "UIMAD.WIDE UR6, UR4, UR5, URZ", SHARED, "NOP", []),
        # with A in registers only the second two are read
        ("CS2R R26, SRZ", "NOP", "R24, gdesc[UR2].tnspB", "NOP", []),
        ("NOP", "NOP", "R24, gdesc[UR2].tnspB", "NOP", [LOST.replace(SHARED, "R24, gdesc[UR2].tnspB")]),
        ("UMOV UR7, URZ", "NOP", SHARED, "STG.E.128 desc[UR4][R24.64], R28", []),
        ("UMOV UR7, URZ", "NOP", SHARED, "STG.E.128 desc[UR4][R26.64], R28", ["STG.E.128 desc[UR4][R26.64], R28"]),
        ("UMOV UR7, URZ", "NOP", SHARED, "STG.E.128 desc[UR4][R24.64], R29", ["STG.E.128 desc[UR4][R24.64], R29"]),
        ("UMOV UR7, URZ", "NOP", SHARED, "PRMT R40, RZ, 0x7610, R40", []),  # keeps bits of what it writes
        ("UMOV UR7, URZ", "LDSM.16.M88.4 R40, [R24+UR4]", SHARED, "IADD3 R1, R43, R40, RZ", []),
        ("UMOV UR7, URZ", "LDSM.16.M88.2 R40, [R24+UR4]", SHARED, "MOV R1, R43", ["MOV R1, R43"]),
    ],
)
def test_registers_that_nothing_wrote(above: str, below: str, product: str, after: str, found: list[str]) -> None:
    from bench.listing import parse
    from bench.registers import undefined

    text = PATHS.format(above=above, below=below, product=product, after=after)
    assert undefined(parse(text)) == found


@pytest.mark.parametrize(
    ("second", "found"),
    [
        ("or.b64 %rd4, %rd1, -9223371899415822336;", ["%rd1"]),  # a swizzle of 64 bytes beside one of 128
        ("add.s64 %rd4, %rd1, -9223371899415822272;", ["%rd1"]),
        ("or.b64 %rd4, %rd2, -9223371899415822336;", []),  # another address
        ("add.s64 %rd4, %rd1, 4611686293372403714;", []),  # the same swizzle, further on
        ("add.s64 %rd4, %rd1, 4096;", []),
    ],
)
def test_two_layouts_at_one_address(second: str, found: list[str]) -> None:
    from bench.wgmma import layouts

    assert layouts(f"or.b64 %rd3, %rd1, 4611686293372403712;\n{second}\n") == found


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_norms_divide_with_correct_rounding(kernel: str) -> None:
    from bench.sass import compiled
    from vitkernels.kernels import add_layer_norm, interpreting

    if interpreting():
        pytest.skip("TRITON_INTERPRET is set: interpreted kernels do not compile")
    variant = next(each for each in add_layer_norm.variants((9, 0)) if f" {kernel}" in each.name)
    ptx = compiled(variant, 90).asm["ptx"]
    assert "div.rn.f32" in ptx
    assert "div.full.f32" not in ptx
    assert "div.approx" not in ptx


def test_sound_kernels_end_with_0_on_every_chip() -> None:
    done = audit("--page", "planted", "--only", "good")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 rows, all as they should be" in done.stdout
    assert all(kind in done.stdout for kind in ("HGMMA", "HMMA", "UTCHMMA"))


TEXTS = """.version 9.0
.target sm_{architecture}
.visible .entry first(
)
.maxntid 32, 4, 1
{{
	{product} {{%f1}};
}}
.visible .entry second(
)
.maxntid 64
{{
}}
"""


def test_what_is_read_of_cuda_cpp_is_its_own_architecture_s() -> None:
    from bench.cuda import architecture_of, bodies_of

    old, new = (TEXTS.format(architecture=each, product=what) for each, what in ((75, "nop"), (80, "mma.sync")))
    assert [architecture_of(each) for each in (old, new)] == [75, 80]
    assert {name: threads for name, (threads, _) in bodies_of(new).items()} == {"first": 128, "second": 64}
    assert ["mma.sync" in bodies_of(each)["first"][1] for each in (old, new)] == [False, True]
    with pytest.raises(ValueError, match="second: has no __launch_bounds__"):
        bodies_of(new.replace(".maxntid 64", ""))


def test_shared_memory_of_cuda_cpp_is_what_launches_give() -> None:
    """Two tiles of queries and two stages of keys and values at the least, and 99 KiB at the most: 64 on 7.5."""
    from bench import cuda

    if cuda.why_not() is not None:
        pytest.skip(str(cuda.why_not()))
    ampere, turing = cuda.given_by_launches(True), cuda.given_by_launches(False)
    tensor = [name for name in ampere if "TensorCores" in name]
    assert len(tensor) == 2 * 2 * 3 * 6, "masks and images, two dtypes, three kernels, six widths"
    assert 16 << 10 < min(ampere.values()) <= max(ampere.values()) <= 99 << 10
    assert len(turing) == 2 * 3
    assert max(turing.values()) <= 64 << 10


def test_short_compiles_each_kernel_once() -> None:
    done = audit("--page", "planted", "--short")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rows, all as they should be" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        ((), {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set; needs to be unset"),
        (("--only", "no such kernel"), {}, "nothing to compile in planted with 'no such kernel' in its name"),
        (("--capability", "70"), {}, "invalid choice: 70"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], environment: dict[str, str], sentence: str) -> None:
    done = audit("--page", "planted", *arguments, **environment)
    assert done.returncode == 2
    assert sentence in done.stderr
