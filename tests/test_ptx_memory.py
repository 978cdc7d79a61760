"""Loads, stores, moves and atomics of the machine, in every state space; and what it finds wrong with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx.findings import ALIGNMENT, PROGRAMS, RACE, Fault
from ptx.operands import Unsupported
from ptx.snippet import compute, execute, kernel, kinds

TID = "mov.u32 %r0, %tid.x; ld.param.u64 %rd0, [p0]; mad.wide.u32 %rd1, %r0, 4, %rd0;"


def test_widths_of_global_memory() -> None:
    """A narrow value in a wide register is extended by its own type; a store cuts it."""
    body = """
    ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1];
    ld.global.s8 %r1, [%rd0]; ld.global.u8 %r2, [%rd0]; ld.global.s16 %r3, [%rd0];
    ld.global.nc.L1::no_allocate.u16 %r4, [%rd0];
    ld.global.b32 %r5, [%rd0]; ld.global.u64 %rd2, [%rd0]; ld.global.s32 %rd3, [%rd0];
    st.global.u32 [%rd1], %r1; st.global.u32 [%rd1+4], %r2; st.global.u32 [%rd1+8], %r3; st.global.u32 [%rd1+12], %r4;
    st.global.u32 [%rd1+16], %r5; st.global.u64 [%rd1+24], %rd2; st.global.u64 [%rd1+32], %rd3;
    st.global.u8 [%rd1+40], %r5; st.global.u16 [%rd1+42], %r5;
    """
    given = np.array([0x81F2E3D4C5B6A798], "u8")
    out = np.zeros(48, "u1")
    assert not execute(body, [given, out], threads=1).findings.found
    words = out.view("u4")
    assert [hex(each) for each in words[:5]] == ["0xffffff98", "0x98", "0xffffa798", "0xa798", "0xc5b6a798"]
    assert out[24:32].view("u8")[0] == 0x81F2E3D4C5B6A798
    assert out[32:40].view("u8")[0] == 0xFFFFFFFFC5B6A798
    assert out[40:44].tolist() == [0x98, 0, 0x98, 0xA7]


def test_vectors() -> None:
    body = f"""{TID} mad.wide.u32 %rd1, %r0, 16, %rd0; ld.param.u64 %rd2, [p1]; mad.wide.u32 %rd2, %r0, 16, %rd2;
    ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd1]; st.global.v2.b32 [%rd2], {{%r4, %r3}};
    st.global.v2.b32 [%rd2+8], {{%r2, %r1}};"""
    given, out = np.arange(128, dtype="i4"), np.zeros(128, "i4")
    execute(body, [given, out])
    assert (out.reshape(32, 4) == given.reshape(32, 4)[:, ::-1]).all()


@pytest.mark.parametrize(("width", "count"), [(w, c) for w in (8, 16, 32, 64) for c in (1, 2, 4) if w * c <= 128])
def test_vectors_of_shared_memory(width: int, count: int) -> None:
    """Written element by element and read as a vector, and the other way; the order of elements is turned each time."""
    size, vector = width // 8, f".v{count}" if count > 1 else ""
    first = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}[width]
    names = [f"{first}{20 + n}" for n in range(count)]
    there, back = ("{" + ", ".join(each) + "}" if count > 1 else each[0] for each in (names, names[::-1]))
    loads = "".join(f"ld.global.b{width} {name}, [%rd1+{n * size}];" for n, name in enumerate(names))
    singles = "".join(f"ld.shared.b{width} {name}, [%r2+{n * size}];" for n, name in enumerate(names))
    stores = "".join(f"st.global.b{width} [%rd2+{n * size}], {name};" for n, name in enumerate(names))
    body = f"""
    .shared .align 16 .b8 room[1024];
    {TID} mad.wide.u32 %rd1, %r0, {count * size}, %rd0; ld.param.u64 %rd2, [p1];
    mad.wide.u32 %rd2, %r0, {count * size}, %rd2; mov.u32 %r1, room; mad.lo.u32 %r2, %r0, {count * size}, %r1;
    {loads} st.shared{vector}.b{width} [%r2], {there}; ld.shared{vector}.b{width} {back}, [%r2];
    st.shared{vector}.b{width} [%r2], {there}; {singles} {stores}"""
    given = np.arange(1, 32 * count + 1).astype(f"u{size}").reshape(32, count)
    out = np.zeros_like(given)
    assert kinds(execute(body, [given, out])) == []
    assert (out == given[:, ::-1]).all()


def test_guards_and_predicated_loads() -> None:
    """Threads that a guard switches off keep their registers, and touch no memory."""
    body = f"""{TID} setp.lt.u32 %p1, %r0, 5; mov.b32 %r1, 7; @%p1 ld.global.b32 %r1, [%rd1];
    ld.param.u64 %rd2, [p1]; mad.wide.u32 %rd2, %r0, 4, %rd2; st.global.b32 [%rd2], %r1;
    @!%p1 st.global.b32 [%rd2], %r0;"""
    out = np.zeros(32, "i4")
    launch = execute(body, [np.arange(100, 105, dtype="i4"), out])
    assert out.tolist() == [100, 101, 102, 103, 104, *range(5, 32)]
    assert len(launch.partial) == 2


def test_shared_local_and_generic_memory() -> None:
    """The same bytes through shared and generic addresses; local memory belongs to one thread."""
    body = f"""
    .shared .align 16 .b8 room[256];
    .local .align 8 .b8 mine[16];
    {TID} mov.u32 %r1, room; mad.lo.u32 %r2, %r0, 4, %r1; mul.lo.u32 %r3, %r0, 3; st.shared.u32 [%r2], %r3;
    cvt.u64.u32 %rd3, %r2; cvta.shared.u64 %rd3, %rd3; ld.u32 %r4, [%rd3];
    mov.u64 %rd4, mine; st.local.u32 [%rd4+8], %r4; cvta.local.u64 %rd5, %rd4; add.s64 %rd5, %rd5, 8;
    ld.u32 %r5, [%rd5];
    cvta.to.shared.u64 %rd6, %rd3; cvt.u32.u64 %r6, %rd6; ld.shared.u32 %r7, [%r6];
    add.u32 %r8, %r5, %r7; cvta.to.global.u64 %rd7, %rd1; st.global.u32 [%rd7], %r8;"""
    out = np.zeros(32, "i4")
    launch = execute(body, [out])
    assert out.tolist() == [6 * each for each in range(32)]
    assert not launch.findings.found


def test_constants_and_variables_of_a_module() -> None:
    outside = """.const .align 4 .u32 table[4] = {10, 20, 30, 0x28};
    .global .align 4 .f32 scale = 0f40000000;"""
    body = f"""{TID} and.b32 %r1, %r0, 3; mov.u64 %rd2, table; mad.wide.u32 %rd2, %r1, 4, %rd2;
    ld.const.u32 %r2, [%rd2];
    ld.global.f32 %r3, [scale]; cvt.rn.f32.u32 %r4, %r2; mul.f32 %r5, %r4, %r3; st.global.f32 [%rd1], %r5;"""
    out = np.zeros(32, "f4")
    execute(body, [out], outside=outside)
    assert out.tolist() == [20.0, 40.0, 60.0, 80.0] * 8


def test_parameters() -> None:
    text = kernel(
        """ld.param.u64 %rd0, [p0]; ld.param.u32 %r1, [p1]; ld.param.f32 %r2, [p2]; ld.param.v2.b32 {%r3, %r4}, [p3];
        ld.param.u8 %r5, [p3+3]; st.global.u32 [%rd0], %r1; st.global.f32 [%rd0+4], %r2;
        st.global.v2.b32 [%rd0+8], {%r3, %r4};
        st.global.u32 [%rd0+16], %r5;"""
    ).replace("k()", "k(.param .u64 p0, .param .u32 p1, .param .f32 p2, .param .align 8 .b8 p3[8])")
    out = np.zeros(5, "i4")
    execute("", [out, -3, 0.5, bytes([1, 0, 0, 9, 2, 0, 0, 0])], text=text, threads=1)
    assert out.tolist() == [-3, 0x3F000000, 0x09000001, 2, 9]
    with pytest.raises(ValueError, match="arguments: got 1; needs 4"):
        execute("", [out], text=text)


def test_moves() -> None:
    """Packing and unpacking take the first part as the lowest."""
    assert compute("mov.b32", "u32", ["u32"], [0xABCD1234]) == [0xABCD1234]
    body = f"""{TID} mov.b32 %r1, 0x11223344; mov.b32 {{%rs1, %rs2}}, %r1; mov.b32 %r2, {{%rs2, %rs1}};
    mov.b64 %rd2, {{%r1, %r2}}; mov.b64 {{%r3, %r4}}, %rd2; mov.f32 %r5, 0f3F800000; mov.pred %p1, -1;
    selp.b32 %r6, %r5, 0, %p1;
    xor.b32 %r7, %r3, %r4; st.global.b32 [%rd0], %r2; st.global.b32 [%rd0+4], %r7; st.global.b32 [%rd0+8], %r6;"""
    out = np.zeros(3, "u4")
    execute(body, [out], threads=1)
    assert [hex(each) for each in out] == ["0x33441122", "0x22662266", "0x3f800000"]


def test_special_registers() -> None:
    body = """ld.param.u64 %rd0, [p0]; mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %laneid; mov.u32 %r5, %warpid; mov.u32 %r6, %nctaid.x; mov.u32 %r7, %lanemask_lt;
    mov.u32 %r10, %ctaid.y;
    mad.lo.u32 %r8, %r1, %r3, %r0; mad.lo.u32 %r11, %r10, %r6, %r2; mad.lo.u32 %r9, %r11, 48, %r8;
    mad.wide.u32 %rd1, %r9, 32, %rd0;
    st.global.v4.b32 [%rd1], {%r0, %r1, %r2, %r3}; st.global.v4.b32 [%rd1+16], {%r4, %r5, %r6, %r7};"""
    from ptx.launch import run

    out = np.zeros((2, 3, 48, 8), "u4")
    run(kernel(body, ["p0"], 48), "k", (3, 2), (24, 2), 0, [out])
    for y, x, thread in np.ndindex(2, 3, 48):
        lane = thread % 32
        want = [thread % 24, thread // 24, x, 24, lane, thread // 32, 3, 2**lane - 1]
        assert out[y, x, thread].tolist() == want


# ---------------------------------------------------------------------------------------------------------- atomics

ATOMICS = {
    "add.u32": (5, [1, 2, 3], 11), "add.s32": (5, [-1, 2, -30], -24), "min.s32": (5, [7, -3, 0], -3),
    "max.u32": (5, [7, 3, 0], 7), "and.b32": (0xFF, [0x3F, 0xF6], 0x36),
    "or.b32": (1, [2, 8], 11), "xor.b32": (7, [1, 2], 4),
    "exch.b32": (9, [4, 6], 6), "inc.u32": (2, [3, 3, 3], 1), "dec.u32": (9, [5, 5, 5], 3),
}  # fmt: skip


@pytest.mark.parametrize("name", ATOMICS)
def test_atomics(name: str) -> None:
    """Thread after thread: the last value is the definition's, applied in turn, and each thread gets the one before."""
    start, values, end = ATOMICS[name]
    memory, given, out = np.array([start], "i4"), np.array(values, "i4"), np.zeros(len(values), "i4")
    body = f"""{TID} ld.param.u64 %rd2, [p1]; mad.wide.u32 %rd2, %r0, 4, %rd2; ld.global.b32 %r1, [%rd2];
    ld.param.u64 %rd3, [p2]; mad.wide.u32 %rd3, %r0, 4, %rd3; atom.global.{name} %r2, [%rd0], %r1;
    st.global.b32 [%rd3], %r2;"""
    launch = execute(body, [memory, given, out], threads=len(values))
    assert memory[0] == end
    assert out[0] == start
    assert not launch.findings.found


def test_compare_and_swap_red_and_floats() -> None:
    memory = np.array([3, 0], "i4")
    floats = np.zeros(1, "f4")
    body = f"""{TID} atom.global.cas.b32 %r1, [%rd0], %r0, 77; red.global.add.u32 [%rd0+4], 2;
    ld.param.u64 %rd2, [p1];
    cvt.rn.f32.u32 %r2, %r0; atom.global.add.f32 %r3, [%rd2], %r2; cvta.global.u64 %rd3, %rd0;
    red.relaxed.gpu.add.u32 [%rd3+4], 1;"""
    execute(body, [memory, floats])
    assert memory.tolist() == [77, 96]
    assert floats[0] == sum(range(32))


def test_atomic_sums_of_halves() -> None:
    """One by one and in pairs, each sum rounded; in global memory and in shared memory by a generic address."""
    memory = np.array([1.5, -2.0], "f2")
    body = f"""{TID} mov.b32 %r1, 0x3C004000; red.global.add.noftz.f16x2 [%rd0], %r1; mov.b16 %rs1, 0x3C00;
    atom.global.add.noftz.f16 %rs2, [%rd0+2], %rs1;"""
    execute(body, [memory], threads=2)
    assert memory.tolist() == [1.5 + 2 * 2.0, -2.0 + 2 * 1.0 + 2 * 1.0]
    bits = (np.array([256.0, 1.0], "f4").view("u4") >> 16).astype("u2")
    one = 0x3F80
    execute(f"{TID} mov.b32 %r1, {one << 16 | one:#x}; red.global.add.noftz.bf16x2 [%rd0], %r1;", [bits], threads=1)
    assert (bits.astype("u4") << 16).view("f4").tolist() == [256.0, 2.0]  # 257 lies between two bfloat16


def test_atomics_in_shared_memory_do_not_race_with_each_other() -> None:
    body = f"""
    .shared .align 4 .u32 count;
    {TID} setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [count], 0; BARRIER atom.shared.add.u32 %r1, [count], 1;
    bar.sync 0;
    ld.shared.u32 %r2, [count]; st.global.u32 [%rd1], %r2;"""
    out = np.zeros(128, "i4")
    assert kinds(execute(body.replace("BARRIER", "bar.sync 0;"), [out], threads=128)) == []
    assert set(out.tolist()) == {128}
    assert kinds(execute(body.replace("BARRIER", ""), [out], threads=128)) == [RACE]


# --------------------------------------------------------------------------------------------------------- findings


def test_out_of_bounds() -> None:
    """Behind a tensor, before it, at no tensor, and in shared memory; the note names who and what."""
    with pytest.raises(
        Fault, match=r"out of bounds.*4 bytes by thread 31 of program 0 at byte 124 of p0, which has 124"
    ):
        execute(f"{TID} ld.global.b32 %r1, [%rd1]; st.global.b32 [%rd1], %r1;", [np.zeros(31, "i4")])
    with pytest.raises(Fault, match="at byte -4 of p0"):
        execute(f"{TID} ld.global.b32 %r1, [%rd1+-4];", [np.zeros(32, "i4")])
    with pytest.raises(Fault, match="which is no argument's memory"):
        execute(f"{TID} ld.global.b32 %r1, [%rd1];", [None])
    with pytest.raises(Fault, match="byte 64 of shared memory, which has 64"):
        execute(f"{TID} st.shared.b32 [%r0+1088], %r0;", [np.zeros(32, "i4")], threads=1, shared=64)


def test_the_region_is_what_the_tensor_reaches() -> None:
    """Not all of its storage."""
    whole = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(Fault, match="which has 64"):
        execute(f"{TID} ld.global.b32 %r1, [%rd1];", [whole[8:24]])


def test_misaligned() -> None:
    with pytest.raises(Fault, match=ALIGNMENT):
        execute(f"{TID} ld.global.v2.b32 {{%r1, %r2}}, [%rd1];", [np.zeros(64, "i4")])
    with pytest.raises(Fault, match=ALIGNMENT):
        execute(f"{TID} st.shared.b32 [%r0+1026], %r0;", [np.zeros(32, "i4")], threads=1, shared=64)


def test_what_another_program_wrote() -> None:
    """Each program its own part is well; all the same element is not."""
    own = f"""{TID} mov.u32 %r1, %ctaid.x; mad.lo.u32 %r2, %r1, 32, %r0; mad.wide.u32 %rd2, %r2, 4, %rd0;
    st.global.b32 [%rd2], %r2;"""
    assert kinds(execute(own, [np.zeros(64, "i4")], grid=2)) == []
    assert kinds(execute(f"{TID} st.global.b32 [%rd1], %r0;", [np.zeros(32, "i4")], grid=2)) == [PROGRAMS]
    reads = f"{own} ld.global.b32 %r3, [%rd0];"
    assert kinds(execute(reads, [np.zeros(64, "i4")], grid=2)) == [PROGRAMS]


@pytest.mark.parametrize(
    "statement", ["ld.global.b32.wrong %r1, [%rd1];", "ld.shared.v3.b32 {%r1, %r2, %r3}, [%r0];", "frob.b32 %r1, %r0;",
                  "st.const.b32 [%rd1], %r0;", "add.sat.f32 %r1, %r1, %r1;", "mov.b32 %r1, %nothing;"]
)  # fmt: skip
def test_unknown_forms_raise_with_their_line(statement: str) -> None:
    text = kernel(f"\n    {TID}\n    {statement}\n", ["p0"])
    line = next(number for number, each in enumerate(text.splitlines(), 1) if statement in each)
    with pytest.raises(Unsupported, match=rf"line {line}: "):
        execute("", [np.zeros(32, "i4")], text=text)
