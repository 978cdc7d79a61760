"""Lanes of a warp: shuffles, votes, and threads that part ways and meet again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from ptx.findings import HANG, UNDEFINED, Fault
from ptx.snippet import execute, kernel, kinds

TID = "mov.u32 %r0, %tid.x; ld.param.u64 %rd0, [p0]; mad.wide.u32 %rd1, %r0, 4, %rd0;"


def outputs(body: str, threads: int = 32, count: int = 1, dtype: str = "i4") -> Any:
    """What each thread puts into %r10, %r11, ..."""
    stores = "".join(f"st.global.b32 [%rd1+{4 * threads * n}], %r{10 + n};" for n in range(count))
    out = np.zeros(threads * count, dtype)
    launch = execute(f"{TID}\n{body}\n{stores}", [out], threads=threads)
    assert kinds(launch) == []
    return out.reshape(count, threads) if count > 1 else out


def shuffled(mode: str, b: int, c: int, values: Sequence[int]) -> list[tuple[int, bool]]:
    """The manual's pseudocode of shfl.sync."""
    out = []
    for lane in range(32):
        segmask, bval, cval = c >> 8 & 0x1F, b & 0x1F, c & 0x1F
        max_lane = (lane & segmask) | (cval & ~segmask)
        min_lane = lane & segmask
        if mode == "up":
            j = lane - bval
            p = j >= max_lane
        elif mode == "down":
            j = lane + bval
            p = j <= max_lane
        elif mode == "bfly":
            j = lane ^ bval
            p = j <= max_lane
        else:
            j = min_lane | (bval & ~segmask)
            p = j <= max_lane
        out.append((values[j if p else lane], p))
    return out


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str) -> None:
    for width in (32, 16, 8):
        for b in (0, 1, 3, 8, 17, 31):
            c = (32 - width) << 8 | (0 if mode == "up" else 31)
            body = f"""mul.lo.u32 %r1, %r0, 7; shfl.sync.{mode}.b32 %r10|%p1, %r1, {b}, {c}, -1;
            selp.b32 %r11, 1, 0, %p1;"""
            got, inside = outputs(body, count=2)
            want = shuffled(mode, b, c, [7 * each for each in range(32)])
            assert list(zip(got.tolist(), map(bool, inside), strict=True)) == want, (width, b)


def test_a_shuffle_by_a_register() -> None:
    """Each lane names its own source."""
    got = outputs("xor.b32 %r1, %r0, 5; add.u32 %r2, %r0, 100; shfl.sync.idx.b32 %r10, %r2, %r1, 31, -1;", 64)
    assert got.tolist() == [100 + (each & 32) + ((each ^ 5) & 31) for each in range(64)]


def test_votes() -> None:
    body = """setp.lt.u32 %p1, %r0, 40; vote.sync.ballot.b32 %r10, %p1, -1; vote.sync.all.pred %p2, %p1, -1;
    vote.sync.any.pred %p5, !%p1, -1;
    vote.sync.any.pred %p3, %p1, -1; vote.sync.uni.pred %p4, %p1, -1; selp.b32 %r11, 1, 0, %p2;
    selp.b32 %r12, 1, 0, %p3;
    selp.b32 %r13, 1, 0, %p4; activemask.b32 %r14;"""
    got = outputs(body, 96, 5, "u4")
    assert got[:, 0].tolist() == [0xFFFFFFFF, 1, 1, 1, 0xFFFFFFFF]
    assert got[:, 32].tolist() == [0xFF, 0, 1, 0, 0xFFFFFFFF]
    assert got[:, 64].tolist() == [0, 0, 0, 1, 0xFFFFFFFF]


def test_election_and_reduction() -> None:
    body = """elect.sync %r10|%p1, -1; selp.b32 %r11, 1, 0, %p1; redux.sync.add.u32 %r12, %r0, -1;
    redux.sync.max.s32 %r13, %r0, -1;
    redux.sync.xor.b32 %r14, %r0, -1;"""
    got = outputs(body, 64, 5)
    assert got[0].tolist() == [0] * 64
    assert np.nonzero(got[1])[0].tolist() == [0, 32]
    assert set(got[2, 32:]) == {sum(range(32, 64))}
    assert set(got[3, :32]) == {31}
    assert set(got[4, :32]) == {0}


# ------------------------------------------------------------------------------------------------------- divergence


def test_both_sides_of_a_branch() -> None:
    body = """mov.b32 %r10, 0; and.b32 %r1, %r0, 1; setp.eq.u32 %p1, %r1, 0; @%p1 bra EVEN;
    mul.lo.u32 %r10, %r0, 3; bra.uni DONE;
    EVEN: mul.lo.u32 %r10, %r0, 5; DONE: add.u32 %r10, %r10, 1;"""
    assert outputs(body).tolist() == [each * (3 if each % 2 else 5) + 1 for each in range(32)]


def test_a_loop_that_threads_leave_one_by_one() -> None:
    body = """mov.b32 %r10, 0; mov.b32 %r1, 0; AGAIN: add.u32 %r10, %r10, %r1; add.u32 %r1, %r1, 1;
    setp.le.u32 %p1, %r1, %r0; @%p1 bra AGAIN;"""
    assert outputs(body, 48).tolist() == [each * (each + 1) // 2 for each in range(48)]


def test_threads_that_end_early() -> None:
    """The rest goes on; a barrier does not wait for those that have ended."""
    body = """setp.ge.u32 %p1, %r0, 40; @%p1 exit; bar.sync 0; mov.b32 %r10, 5;
    shfl.sync.bfly.b32 %r11, %r0, 1, 31, 0xff;
    mov.b32 %r11, 0;"""
    assert outputs(body, 64, 2)[0].tolist() == [5] * 40 + [0] * 24


def test_a_shuffle_waits_for_its_lanes() -> None:
    """Lanes that come by different ways meet at the instruction that names them all."""
    body = """mov.b32 %r1, %r0; setp.lt.u32 %p1, %r0, 16; @%p1 bra LOW; add.u32 %r1, %r1, 1000; LOW: bar.warp.sync -1;
    shfl.sync.bfly.b32 %r10, %r1, 16, 31, -1;"""
    assert outputs(body).tolist() == [1000 + each + 16 for each in range(16)] + list(range(16))


def test_a_shuffle_waits_for_lanes_that_jump_back_to_it() -> None:
    body = """mov.b32 %r1, %r0; setp.ge.u32 %p1, %r0, 16; @%p1 bra FAR; MEET: shfl.sync.bfly.b32 %r10, %r1, 16, 31, -1;
    bra.uni DONE; FAR: add.u32 %r1, %r1, 1000; bra.uni MEET; DONE: mov.b32 %r2, 0;"""
    assert outputs(body).tolist() == [1000 + each + 16 for each in range(16)] + list(range(16))


def test_a_shuffle_among_some_lanes() -> None:
    """A mask of the lanes that took one way; a warp is not held up by the others."""
    body = """mov.b32 %r10, -1; setp.lt.u32 %p1, %r0, 4; @!%p1 bra DONE; shfl.sync.bfly.b32 %r10, %r0, 1, 31, 0xf;
    DONE: mov.b32 %r2, 0;"""
    assert outputs(body).tolist() == [1, 0, 3, 2] + [-1] * 28


def test_a_lane_that_does_not_take_part_is_found() -> None:
    body = f"""{TID} setp.lt.u32 %p1, %r0, 4; @!%p1 bra DONE; shfl.sync.bfly.b32 %r10, %r0, 16, 31, 0xf;
    DONE: mov.b32 %r2, 0;"""
    assert kinds(execute(body, [np.zeros(32, "i4")])) == [UNDEFINED]


def test_warps_that_wait_for_each_other() -> None:
    """Producer and consumer warps at named barriers, in different code: data goes over in shared memory."""
    body = f"""
    .shared .align 16 .b8 room[128];
    {TID} and.b32 %r1, %r0, 31; mov.u32 %r2, room; mad.lo.u32 %r2, %r1, 4, %r2; setp.ge.u32 %p1, %r0, 32;
    @%p1 bra CONSUME;
    mul.lo.u32 %r3, %r1, 11; st.shared.b32 [%r2], %r3; ARRIVE bra.uni DONE;
    CONSUME: WAIT ld.shared.b32 %r4, [%r2]; st.global.b32 [%rd1], %r4; DONE: mov.b32 %r5, 0;"""
    out = np.zeros(64, "i4")
    good = body.replace("ARRIVE", "bar.arrive 1, 64;").replace("WAIT", "bar.sync 1, 64;")
    assert kinds(execute(good, [out], threads=64)) == []
    assert out.tolist() == [0] * 32 + [11 * each for each in range(32)]
    assert kinds(execute(body.replace("ARRIVE", "").replace("WAIT", ""), [out], threads=64)) != []


def test_a_hang_is_found() -> None:
    with pytest.raises(Fault, match=r"hang.*thread 32 of program 0 at line"):
        execute(f"{TID} setp.ge.u32 %p1, %r0, 32; @%p1 bra.uni W; bra.uni D; W: bar.sync 1, 64; D: mov.b32 %r1, 0;",
                [np.zeros(64, "i4")], threads=64)  # fmt: skip
    with pytest.raises(Fault, match=HANG):
        execute(f"{TID} AGAIN: bra.uni AGAIN;", [np.zeros(32, "i4")])


def test_barriers_that_count() -> None:
    """bar.red among threads that are together, and among those that come by two ways."""
    count = """setp.lt.u32 %p1, %r0, 37; bar.red.popc.u32 %r10, 0, %p1; bar.red.and.pred %p2, 0, %p1;
    bar.red.or.pred %p3, 0, !%p1;
    selp.b32 %r11, 1, 0, %p2; selp.b32 %r12, 1, 0, %p3;"""
    assert outputs(count, 64, 3)[:, 5].tolist() == [37, 0, 1]
    apart = """setp.lt.u32 %p1, %r0, 32; setp.lt.u32 %p2, %r0, 40; @%p1 bra.uni ONE; bar.red.popc.u32 %r10, 0, %p2;
    bra.uni DONE;
    ONE: bar.red.popc.u32 %r10, 0, !%p2; DONE: mov.b32 %r1, 0;"""
    assert set(outputs(apart, 64).tolist()) == {8}


# ------------------------------------------------------------------------------------------------------------ calls

FUNCTION = """
.func (.param .b32 result) square_plus(.param .b32 a, .param .align 4 .b8 pair[8])
{
    .reg .b32 %r<9>;
    .reg .pred %p<2>;
    ld.param.u32 %r1, [a]; ld.param.u32 %r2, [pair]; ld.param.u32 %r3, [pair+4];
    setp.eq.u32 %p1, %r1, 3;
    @%p1 bra LEAVE;
    mul.lo.u32 %r4, %r1, %r1; add.u32 %r4, %r4, %r2; add.u32 %r4, %r4, %r3;
    st.param.b32 [result], %r4;
    ret;
LEAVE:
    st.param.b32 [result], 1000;
    ret;
}
"""


def test_calls() -> None:
    """Registers, labels and parameters of each call are its own; a function may return early for some threads."""
    once = """{ .param .b32 x; st.param.b32 [x], %r0; .param .align 4 .b8 y[8]; st.param.b32 [y], 1;
    st.param.b32 [y+4], %r1;
    .param .b32 z; call.uni (z), square_plus, (x, y); ld.param.b32 %r10, [z]; }"""
    text = kernel(
        f"{TID} mov.b32 %r1, 10; {once} mov.b32 %r1, %r10; {once} st.global.b32 [%rd1], %r10;", ["p0"], outside=FUNCTION
    )
    out = np.zeros(32, "i4")
    execute("", [out], text=text)

    def call(a: int, b: int) -> int:
        return 1000 if a == 3 else a * a + 1 + b

    assert out.tolist() == [call(each, call(each, 10)) for each in range(32)]


def test_scopes() -> None:
    """Registers and labels of braces are apart, as inline assembly uses them."""
    body = """mov.b32 %r10, 0; { .reg .pred p; .reg .b32 t; setp.lt.u32 p, %r0, 8; @p bra SKIP;
    mov.b32 t, 5; add.u32 %r10, %r10, t; SKIP: }
    { .reg .pred p; setp.lt.u32 p, %r0, 4; @p bra SKIP; add.u32 %r10, %r10, 100; SKIP: }"""
    assert outputs(body).tolist() == [0] * 4 + [100] * 4 + [105] * 24
