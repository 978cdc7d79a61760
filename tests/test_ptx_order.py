"""PTX's asynchronous model on the machine: what has to be ordered, by what, and what is found where it is not.

Each test is a small program that is right, run once as it is and once with one thing taken away.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from ptx.copies import TensorMap
from ptx.findings import ALIGNMENT, FLIGHT, HANG, PROXY, RACE, REGISTERS, UNDEFINED, Fault
from ptx.snippet import execute, kernel, kinds

TID = """mov.u32 %r0, %tid.x; ld.param.u64 %rd0, [p0]; mad.wide.u32 %rd1, %r0, 4, %rd0; mov.u32 %r1, room;
    mad.lo.u32 %r2, %r0, 4, %r1;"""
ROOM = ".shared .align 1024 .b8 room[8192];"


def check(body: str, threads: int = 128, arguments: tuple[object, ...] = (), **removed: str) -> None:
    """The body finds nothing with its marked statements, and without one of them the kind that is named.

    Args:
        body: `NAME[statement]` marks a statement.
        removed: for a name, the kind that is found without it.
    """

    def text(without: str = "") -> str:
        return re.sub(r"([A-Z]+)\[([^;]*;)\]", lambda mark: "" if mark[1] == without else mark[2], body)

    given = arguments or (np.zeros(threads, "i4"),)
    assert kinds(execute(ROOM + text(), given, threads=threads)) == []
    for name, kind in removed.items():
        try:
            found = kinds(execute(ROOM + text(name), given, threads=threads))
        except Fault as fault:
            found = [kind] if kind in str(fault) else [str(fault)]
        assert kind in found, f"without {name}: {found}"


def test_write_then_read() -> None:
    check(f"{TID} st.shared.b32 [%r2], %r0; A[bar.sync 0;] xor.b32 %r3, %r2, 256; ld.shared.b32 %r4, [%r3];", A=RACE)


def test_the_other_name_of_a_barrier() -> None:
    check(f"{TID} st.shared.b32 [%r2], %r0; A[barrier.cta.sync.aligned 0;] ld.shared.b32 %r4, [room];", A=RACE)


def test_read_then_write() -> None:
    check(
        f"""{TID} st.shared.b32 [%r2], %r0; bar.sync 0; xor.b32 %r3, %r2, 256; ld.shared.b32 %r4, [%r3];
        A[bar.sync 0;]
        st.shared.b32 [%r2], %r4;""",
        A=RACE,
    )


def test_two_writes() -> None:
    """Different values at once, or one after the other; the same value is no race."""
    assert kinds(execute(f"{ROOM} {TID} st.shared.b32 [room], %r0;", [np.zeros(64, "i4")], threads=64)) == [RACE]
    assert kinds(execute(f"{ROOM} {TID} st.shared.b32 [room], 5;", [np.zeros(64, "i4")], threads=64)) == []
    check(
        f"""{TID} shr.u32 %r5, %r0, 5; setp.eq.u32 %p1, %r5, 0; setp.eq.u32 %p2, %r5, 1; @%p1 st.shared.b32 [%r2], 1;
        A[bar.sync 0;] @%p2 st.shared.b32 [%r2+-128], 2;""",
        A=RACE,
    )


def test_within_a_warp_nothing_is_looked_for() -> None:
    body = f"{ROOM} {TID} st.shared.b32 [%r2], %r0; xor.b32 %r3, %r2, 4; ld.shared.b32 %r4, [%r3];"
    assert kinds(execute(body, [np.zeros(64, "i4")], threads=64)) == []


def test_tiles_of_a_warp_take_part() -> None:
    check(
        f"""{TID} mad.lo.u32 %r3, %r0, 16, %r1; xor.b32 %r4, %r3, 512;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {{%r0}}; A[bar.sync 0;]
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r5}}, [%r4]; B[bar.sync 0;] st.shared.b32 [%r3], 3;""",
        A=RACE,
        B=RACE,
    )


# --------------------------------------------------------------------------------------------------------- cp.async

COPY = f"{TID} mad.lo.u32 %r3, %r0, 16, %r1; mad.wide.u32 %rd2, %r0, 16, %rd0; xor.b32 %r4, %r3, 512;"


def test_a_copy_lands_at_its_wait() -> None:
    """The thread that issued it sees it after its wait, others after a barrier that follows."""
    given = (np.arange(512, dtype="i4"),)
    check(
        f"""{COPY} cp.async.cg.shared.global [%r3], [%rd2], 16; cp.async.commit_group; A[cp.async.wait_group 0;]
        ld.shared.b32 %r5, [%r3];""",
        arguments=given,
        A=FLIGHT,
    )
    check(
        f"""{COPY} cp.async.cg.shared.global [%r3], [%rd2], 16; cp.async.commit_group;
        A[cp.async.wait_all;] B[bar.sync 0;]
        ld.shared.b32 %r5, [%r4];""",
        arguments=given,
        A=FLIGHT,
        B=RACE,
    )


def test_idle_threads_read_nothing_that_a_copy_writes() -> None:
    body = f"""{ROOM} {COPY} setp.eq.u32 %p1, %r0, 32; setp.eq.u32 %p2, %r0, 0; @%p1 ld.shared.b32 %r5, [%r3];
    @%p2 cp.async.cg.shared.global [%r3], [%rd2], 16; cp.async.wait_all;"""
    assert kinds(execute(body, [np.arange(512, dtype="i4")], threads=128)) == []
    same_place = body.replace("ld.shared.b32 %r5, [%r3]", "ld.shared.b32 %r5, [%r1]")
    assert kinds(execute(same_place, [np.arange(512, dtype="i4")], threads=128)) == [RACE]


def test_the_newest_groups_stay_in_flight() -> None:
    body = f"""{ROOM} {COPY} cp.async.cg.shared.global [%r3], [%rd2], 16; cp.async.commit_group;
    cp.async.ca.shared.global [%r3+4096], [%rd2], 4; cp.async.commit_group; cp.async.wait_group 1;
    ld.shared.b32 %r5, [%r3];"""
    given = np.arange(512, dtype="i4")
    assert kinds(execute(body, [given], threads=128)) == []
    assert kinds(execute(body + "ld.shared.b32 %r6, [%r3+4096];", [given], threads=128)) == [FLIGHT]


def test_what_a_copy_writes() -> None:
    """Bytes past the given number are zeros, and are not read."""
    body = f"""{ROOM} {COPY} ld.param.u64 %rd3, [p1]; mad.wide.u32 %rd4, %r0, 16, %rd3;
    st.shared.v4.b32 [%r3], {{-1, -1, -1, -1}};
    shl.b32 %r6, %r0, 2; min.u32 %r6, %r6, 16; cp.async.cg.shared.global [%r3], [%rd2], 16, %r6;
    cp.async.commit_group;
    cp.async.wait_group 0; ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r3];
    st.global.v4.b32 [%rd4], {{%r10, %r11, %r12, %r13}};"""
    given, out = np.arange(1, 129, dtype="i4"), np.zeros((32, 4), "i4")
    assert kinds(execute(body, [given, out], threads=32)) == []
    want = given.reshape(32, 4).copy()
    for thread in range(4):
        want[thread, thread:] = 0
    assert (out == want).all()


def test_a_copy_does_not_overtake() -> None:
    """Nobody may still read, write or copy where a copy goes."""
    copy = "cp.async.cg.shared.global [%r3], [%rd2], 16; cp.async.commit_group;"
    given = (np.arange(512, dtype="i4"),)
    check(f"{COPY} ld.shared.b32 %r5, [%r4]; A[bar.sync 0;] {copy}", arguments=given, A=RACE)
    check(f"{COPY} st.shared.b32 [%r4], 1; A[bar.sync 0;] {copy}", arguments=given, A=RACE)
    check(f"{COPY} {copy} A[cp.async.wait_group 0;] {copy}", arguments=given, A=FLIGHT)
    check(f"{COPY} {copy} A[cp.async.wait_group 0;] st.shared.b32 [%r3], 1;", arguments=given, A=FLIGHT)


# ------------------------------------------------------------------------------------------------------------ wgmma

PRODUCT = f"""{TID} mad.lo.u32 %r3, %r0, 16, %r1; shr.u32 %r4, %r1, 4; cvt.u64.u32 %rd2, %r4;
    or.b64 %rd2, %rd2, 0x1000080000;
    mov.pred %p1, 0;"""
MULTIPLY = """wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r10, %r11, %r12, %r13}, %rd2, %rd2, %p1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;"""
FROM_REGISTERS = """wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r10, %r11, %r12, %r13},
    {%r20, %r21, %r22, %r23}, %rd2, %p1, 1, 1, 0; wgmma.commit_group.sync.aligned;"""
FILL = "st.shared.v4.b32 [%r3], {0, 0, 0, 0};"


def test_a_product_reads_what_is_ordered_and_fenced() -> None:
    """A proxy fence by the writer before the barrier; or by all after it."""
    check(
        f"""{PRODUCT} {FILL} A[fence.proxy.async.shared::cta;] B[bar.sync 0;] wgmma.fence.sync.aligned; {MULTIPLY}
        wgmma.wait_group.sync.aligned 0;""",
        A=PROXY,
        B=RACE,
    )
    check(
        f"""{PRODUCT} {FILL} B[bar.sync 0;] A[fence.proxy.async.shared::cta;] wgmma.fence.sync.aligned; {MULTIPLY}
        wgmma.wait_group.sync.aligned 0;""",
        A=PROXY,
        B=RACE,
    )


def test_a_fence_after_the_barrier_serves_its_own_warp_alone() -> None:
    """One warp fences what it knows of; the others' products do not see it before they meet."""
    body = f"""{ROOM} {PRODUCT} {FILL} bar.sync 0; setp.ge.u32 %p2, %r0, 32; @%p2 bra SKIP;
    fence.proxy.async.shared::cta; SKIP: MEET
    wgmma.fence.sync.aligned; {MULTIPLY} wgmma.wait_group.sync.aligned 0;"""
    out = [np.zeros(128, "i4")]
    assert kinds(execute(body.replace("MEET", "bar.sync 0;"), out, threads=128)) == []


def test_a_product_reads_until_its_wait() -> None:
    check(
        f"""{PRODUCT} {FILL} fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned; {MULTIPLY}
        A[wgmma.wait_group.sync.aligned 0;] bar.sync 0; st.shared.b32 [%r3], 1;""",
        A=FLIGHT,
    )


def test_registers_belong_to_a_product_until_its_wait() -> None:
    """Accumulators are neither read nor written, operands not written; further products may add to them."""
    begin = f"{PRODUCT} {FILL} fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;"
    wait = "A[wgmma.wait_group.sync.aligned 0;]"
    check(f"{begin} {MULTIPLY} {wait} add.f32 %r5, %r10, %r10;", A=REGISTERS)
    check(f"{begin} {MULTIPLY} {wait} mov.b32 %r12, 0;", A=REGISTERS)
    check(f"{begin} {FROM_REGISTERS} {wait} mov.b32 %r21, 0;", A=REGISTERS)
    check(f"{begin} {FROM_REGISTERS} mov.b32 %r5, %r21; {MULTIPLY} {wait} mov.b32 %r5, %r10;", A=REGISTERS)


def test_registers_in_flight_across_a_loop() -> None:
    """What the next turn writes before it waits."""
    body = f"""{ROOM} {PRODUCT} {FILL} fence.proxy.async.shared::cta; bar.sync 0; mov.b32 %r6, 0;
    AGAIN: BEFORE mov.b32 %r21, %r6; wgmma.fence.sync.aligned; {FROM_REGISTERS} add.u32 %r6, %r6, 1;
    setp.lt.u32 %p2, %r6, 3;
    @%p2 bra AGAIN; wgmma.wait_group.sync.aligned 0;"""
    out = [np.zeros(128, "i4")]
    assert kinds(execute(body.replace("BEFORE", "wgmma.wait_group.sync.aligned 0;"), out, threads=128)) == []
    assert kinds(execute(body.replace("BEFORE", ""), out, threads=128)) == [REGISTERS]


# ---------------------------------------------------------------------------------------------------- mbarrier, TMA

ONE = "setp.eq.u32 %p1, %r0, 0; add.u32 %r5, %r1, 4096;"
WAIT = "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r5], 0;"


def test_a_bulk_copy_counts_its_bytes() -> None:
    check(
        f"""{TID} {ONE} @%p1 mbarrier.init.shared::cta.b64 [%r5], 1; INIT[bar.sync 0;]
        EXPECT[@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 512;]
        @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd0], 512, [%r5];
        TRY[{WAIT}] ld.shared.b32 %r6, [%r2]; st.global.b32 [%rd1], %r6; DONE[bar.sync 0;]
        @%p1 mbarrier.inval.shared::cta.b64 [%r5];""",
        arguments=(np.arange(128, dtype="i4"),),
        INIT=RACE,
        EXPECT=HANG,
        TRY=FLIGHT,
        DONE=RACE,
    )


def test_a_bulk_copy_does_not_overtake() -> None:
    """The buffer is free when its readers have met the thread that copies."""
    check(
        f"""{TID} {ONE} @%p1 mbarrier.init.shared::cta.b64 [%r5], 1; bar.sync 0; ld.shared.b32 %r6, [%r2];
        FREE[bar.sync 0;]
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 512;
        @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd0], 512, [%r5]; {WAIT}""",
        arguments=(np.arange(128, dtype="i4"),),
        FREE=RACE,
    )


def test_producer_and_consumers() -> None:
    """A warp that copies and three that use: full and empty mbarriers order them, with no barrier of the block."""
    body = f"""{TID} {ONE} add.u32 %r7, %r1, 4104; @%p1 mbarrier.init.shared::cta.b64 [%r5], 1;
    @%p1 mbarrier.init.shared::cta.b64 [%r7], 96; bar.sync 0; mov.b32 %r8, 0; setp.ge.u32 %p3, %r0, 32;
    @%p3 bra CONSUME;
    PRODUCE: and.b32 %r9, %r8, 1; xor.b32 %r10, %r9, 1;
    EMPTY[mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r7], %r10;]
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 512;
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd0], 512, [%r5];
    add.u32 %r8, %r8, 1; setp.lt.u32 %p4, %r8, 4; @%p4 bra PRODUCE; bra.uni LEAVE;
    CONSUME: and.b32 %r9, %r8, 1;
    FULL[mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r5], %r9;] ld.shared.b32 %r6, [%r2];
    mbarrier.arrive.shared::cta.b64 _, [%r7]; add.u32 %r8, %r8, 1; setp.lt.u32 %p4, %r8, 4; @%p4 bra CONSUME;
    LEAVE: mov.b32 %r6, 0;"""
    check(body, arguments=(np.arange(128, dtype="i4"),), FULL=FLIGHT, EMPTY=HANG)


def tensor_kernel(statements: str) -> str:
    return kernel(f"{ROOM} {TID} {statements}", ["p0"]).replace(
        ".param .u64 p0", ".param .u64 p0, .param .align 64 .b8 map[128]"
    )


LOAD = f"""{ONE} mov.b64 %rd2, map; cvta.param.u64 %rd3, %rd2; @%p1 mbarrier.init.shared::cta.b64 [%r5], 1;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], BYTES; mov.b32 %r6, X; mov.b32 %r7, Y;
    @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd3, {{%r6, %r7}}], [%r5];
    {WAIT}"""


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
def test_boxes_of_a_tensor(swizzle: int) -> None:
    """Rows of the box follow each other in shared memory, 16-byte units exchanged; outside of the tensor it is 0."""
    columns = 8 << swizzle
    matrix = np.arange(1, 20 * 100 + 1, dtype="u2").reshape(20, 100)
    rows, x, y = 16, 90, 12
    out = np.zeros(rows * columns // 2, "u4")
    words = len(out)
    copy = "".join(
        f"ld.shared.b32 %r8, [%r2+{128 * n}]; st.global.b32 [%rd1+{128 * n}], %r8;" for n in range(words // 32)
    )
    text = tensor_kernel(f"{LOAD} {copy}".replace("BYTES", str(4 * words)).replace("X", str(x)).replace("Y", str(y)))
    launch = execute("", [out, TensorMap(matrix, (rows, columns), swizzle)], text=text)
    assert kinds(launch) == []
    got = out.view("u2")
    for r in range(rows):
        for c in range(columns):
            byte = (r * columns + c) * 2
            byte ^= (byte >> 7 & (1 << swizzle) - 1) << 4
            inside = y + r < 20 and x + c < 100
            assert got[byte // 2] == (matrix[y + r, x + c] if inside else 0)


def test_bytes_that_do_not_come_are_a_hang() -> None:
    text = tensor_kernel(LOAD.replace("BYTES", "1024").replace("X", "0").replace("Y", "0"))
    with pytest.raises(Fault, match="0 arrivals and 512 bytes are missing"):
        execute("", [np.zeros(4, "i4"), TensorMap(np.zeros((16, 16), "u2"), (16, 16), 1)], text=text)


def test_bulk_stores() -> None:
    """They read until their group has been waited for, and need a proxy fence."""
    check(
        f"""{TID} {ONE} st.shared.b32 [%r2], %r0; FENCE[fence.proxy.async.shared::cta;] MEET[bar.sync 0;]
        @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r1], 512; @%p1 cp.async.bulk.commit_group;
        ENDED[@%p1 cp.async.bulk.wait_group.read 0;] bar.sync 0; st.shared.b32 [%r2], 7;""",
        FENCE=PROXY,
        MEET=RACE,
        ENDED=FLIGHT,
    )


def test_misuse() -> None:
    out = [np.zeros(128, "i4")]
    with pytest.raises(Fault, match=UNDEFINED):
        execute(f"{ROOM} {TID} {ONE} {WAIT}", out)
    with pytest.raises(Fault, match=UNDEFINED):
        execute(
            f"""{ROOM} {TID} {ONE} @%p1 mbarrier.init.shared::cta.b64 [%r5], 2;
            @%p1 mbarrier.arrive.shared::cta.b64 _, [%r5], 3;""",
            out,
        )
    with pytest.raises(Fault, match=ALIGNMENT):
        execute(f"{ROOM} {TID} cp.async.cg.shared.global [%r1], [%rd0+4], 16;", out)
