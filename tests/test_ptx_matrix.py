"""Matrices in registers and shared memory: which lane holds what, by the tables of the PTX manual."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ptx.snippet import execute, kinds
from ptx.warpgroup import element_addresses

TID = """mov.u32 %r0, %tid.x; ld.param.u64 %rd0, [p0];"""


def bf16(values: Any) -> Any:
    """Exact small numbers as bfloat16's bits."""
    return (np.asarray(values, "f4").view("u4") >> 16).astype("u2")


HALVES = {"bf16": bf16, "f16": lambda values: np.asarray(values, "f2").view("u2")}


def small(generator: np.random.Generator, *shape: int) -> Any:
    return generator.integers(-4, 5, shape).astype("f4")


def words(pairs: Any) -> Any:
    """[..., 2] of 16 bits to 32."""
    return np.ascontiguousarray(pairs).view("u4")[..., 0]


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, turn: bool) -> None:
    """Lane 4 r + c gets columns 2c, 2c + 1 of row r of each tile; transposed, rows 2c, 2c + 1 of column r."""
    registers = ", ".join(f"%r{10 + n}" for n in range(count))
    stores = "".join(f"st.global.b32 [%rd1+{4 * n}], %r{10 + n};" for n in range(count))
    body = f"""
    .shared .align 16 .b8 room[512];
    {TID} ld.param.u64 %rd2, [p1]; mad.wide.u32 %rd2, %r0, 16, %rd2; ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd2];
    mov.u32 %r5, room; mad.lo.u32 %r5, %r0, 16, %r5; st.shared.v4.b32 [%r5], {{%r1, %r2, %r3, %r4}}; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" if turn else ""}.shared.b16 {{{registers}}}, [%r5];
    mad.wide.u32 %rd1, %r0, 16, %rd0; {stores}"""
    tiles = np.arange(256, dtype="u2").reshape(4, 8, 8)
    out = np.zeros((32, 4), "u4")
    assert kinds(execute(body, [out, tiles])) == []
    for lane in range(32):
        r, c = divmod(lane, 4)
        for n in range(count):
            a, b = (
                (tiles[n, 2 * c, r], tiles[n, 2 * c + 1, r]) if turn else (tiles[n, r, 2 * c], tiles[n, r, 2 * c + 1])
            )
            assert out[lane, n] == int(a) | int(b) << 16


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_is_ldmatrix_backward(count: int, turn: bool) -> None:
    form = f"x{count}.trans" if turn else f"x{count}"
    given, got = (", ".join(f"%r{first + n}" for n in range(count)) for first in (1, 11))
    body = f"""
    .shared .align 16 .b8 room[512];
    {TID} mad.wide.u32 %rd1, %r0, 16, %rd0; mad.lo.u32 %r1, %r0, 4, 1; add.u32 %r2, %r1, 1; add.u32 %r3, %r1, 2;
    add.u32 %r4, %r1, 3; mov.b32 %r12, 0; mov.b32 %r13, 0; mov.b32 %r14, 0;
    mov.u32 %r5, room; mad.lo.u32 %r5, %r0, 16, %r5;
    stmatrix.sync.aligned.m8n8.{form}.shared.b16 [%r5], {{{given}}};
    bar.sync 0; ldmatrix.sync.aligned.m8n8.{form}.shared.b16 {{{got}}}, [%r5];
    st.global.v4.b32 [%rd1], {{%r11, %r12, %r13, %r14}};"""
    out = np.zeros((32, 4), "i4")
    assert kinds(execute(body, [out])) == []
    want = np.arange(1, 129).reshape(32, 4)
    assert (out[:, :count] == want[:, :count]).all()
    assert not out[:, count:].any()


def lane_a(matrix: Any, lane: int) -> Any:
    """A of m16n8k16: a0 a1 (g, 2t), a2 a3 (g + 8, 2t), a4 a5 (g, 2t + 8), a6 a7 (g + 8, 2t + 8)."""
    g, t = divmod(lane, 4)
    return [matrix[g + 8 * (n % 2), 2 * t + 8 * (n // 2) : 2 * t + 8 * (n // 2) + 2] for n in range(4)]


def lane_b(matrix: Any, lane: int) -> Any:
    """B, 16 x 8: b0 b1 (2t, g), b2 b3 (2t + 8, g)."""
    g, t = divmod(lane, 4)
    return [matrix[2 * t + 8 * n : 2 * t + 8 * n + 2, g] for n in range(2)]


def lane_c(matrix: Any, lane: int) -> Any:
    """C, 16 x 8: c0 c1 (g, 2t), c2 c3 (g + 8, 2t)."""
    g, t = divmod(lane, 4)
    return [matrix[g + 8 * (n // 2), 2 * t + n % 2] for n in range(4)]


LOAD_MMA = f"""{TID} mad.wide.u32 %rd1, %r0, 40, %rd0;
    ld.global.v2.b32 {{%r1, %r2}}, [%rd1]; ld.global.v2.b32 {{%r3, %r4}}, [%rd1+8];
    ld.global.v2.b32 {{%r5, %r6}}, [%rd1+16];
    ld.global.v2.b32 {{%r7, %r8}}, [%rd1+24]; ld.global.v2.b32 {{%r9, %r10}}, [%rd1+32]; ld.param.u64 %rd2, [p1];
    mad.wide.u32 %rd2, %r0, 16, %rd2;"""
STORE_MMA = "st.global.v4.b32 [%rd2], {%r11, %r12, %r13, %r14};"


@pytest.mark.parametrize("kind", HALVES)
def test_mma(kind: str) -> None:
    generator = np.random.default_rng(0)
    a, b, c = small(generator, 16, 16), small(generator, 16, 8), small(generator, 16, 8)
    half = HALVES[kind]
    given = np.array(
        [[words(half(each)) for each in (*lane_a(a, lane), *lane_b(b, lane))] +
         [np.float32(each).view("u4") for each in lane_c(c, lane)] for lane in range(32)], "u4",
    )  # fmt: skip
    body = f"""{LOAD_MMA} mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r11, %r12, %r13, %r14}},
    {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%r7, %r8, %r9, %r10}}; {STORE_MMA}"""
    out = np.zeros((32, 4), "f4")
    execute(body, [given, out])
    want = a @ b + c
    assert out.tolist() == [list(map(float, lane_c(want, lane))) for lane in range(32)]


def test_mma_of_tf32() -> None:
    """m16n8k8: a0 (g, t), a1 (g + 8, t), a2 (g, t + 4), a3 (g + 8, t + 4); b0 (t, g), b1 (t + 4, g);
    13 bits unseen."""
    generator = np.random.default_rng(1)
    a, b, c = small(generator, 16, 8), small(generator, 8, 8), small(generator, 16, 8)
    noisy = (a.view("u4") | np.uint32(0x1FFF)).view("f4")  # what TF32 does not look at
    rows = []
    for lane in range(32):
        g, t = divmod(lane, 4)
        rows.append(
            [noisy[g, t], noisy[g + 8, t], noisy[g, t + 4], noisy[g + 8, t + 4], b[t, g], b[t + 4, g], *lane_c(c, lane)]
        )
    body = f"""{LOAD_MMA} mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{%r11, %r12, %r13, %r14}},
    {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%r7, %r8, %r9, %r10}}; {STORE_MMA}"""
    out = np.zeros((32, 4), "f4")
    execute(body, [np.array(rows, "f4"), out])
    want = np.where(a == 0, 0, a) @ b + c
    assert out.tolist() == [list(map(float, lane_c(want, lane))) for lane in range(32)]


# ------------------------------------------------------------------------------------------------------------ wgmma


def layout(rows: int, mn_major: bool, swizzle: int) -> tuple[int, Any]:
    """A descriptor's bits without the address, and each element's byte, [rows, 16]: the canonical layouts of PTX."""
    pitch = 16 << swizzle  # bytes of a row of the pattern
    r, k = np.indices((rows, 16))
    if not mn_major:
        if swizzle:
            lead, stride = 16, 8 * pitch
            byte = r * pitch + 2 * k
        else:  # core matrices of 8 rows by 16 bytes: neighbours along K, then along M
            lead, stride = 128, 256
            byte = r // 8 * stride + k // 8 * lead + r % 8 * 16 + k % 8 * 2
    elif swizzle:  # pitch bytes along M, then K
        lead, stride = 16 * pitch, 8 * pitch
        byte = r * 2 % pitch + r * 2 // pitch * lead + k % 8 * pitch + k // 8 * stride
    else:
        stride, lead = 128, 16 * rows
        byte = r // 8 * stride + k // 8 * lead + k % 8 * 16 + r % 8 * 2
    byte = byte ^ (byte >> 7 & (1 << swizzle) - 1) << 4
    return lead >> 4 << 16 | stride >> 4 << 32 | {0: 0, 1: 3, 2: 2, 3: 1}[swizzle] << 62, byte


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("mn_major", [False, True])
def test_descriptors(mn_major: bool, swizzle: int) -> None:
    """Where elements lie: worked out from the descriptor, and from the layout's own description."""
    rows = 64
    bits, want = layout(rows, mn_major, swizzle)
    signed = bits - 2**64 if bits >> 63 else bits
    got = element_addresses(np.array([[signed | 1024 >> 4]], "i8"), rows, mn_major)[0, 0]
    assert (got - 1024 == want).all()


@pytest.mark.parametrize("columns", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_wgmma(registers: bool, turned: bool, kind: str, columns: int) -> None:
    """D = A B + D of 64 x 16 times 16 x columns, A from registers or shared memory, B along K or along N."""
    generator = np.random.default_rng(2)
    a, b, c = small(generator, 64, 16), small(generator, columns, 16), small(generator, 64, columns)
    a_bits, a_byte = layout(64, False, 0)
    b_bits, b_byte = layout(columns, turned, 0)
    room = np.zeros(2048 * (1 + -(-columns * 32 // 2048)), "u1")
    room[:2048].view("u2")[a_byte // 2] = HALVES[kind](a)
    room[2048:].view("u2")[b_byte // 2] = HALVES[kind](b)
    lanes = np.zeros((128, 4), "u4")
    sums, want = np.zeros((128, columns // 2), "f4"), np.zeros((128, columns // 2), "f4")
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        part = slice(16 * warp, 16 * warp + 16)
        lanes[thread] = [words(HALVES[kind](each)) for each in lane_a(a[part], lane)]
        for whole, own in ((c, sums), (a @ b.T + c, want)):
            own[thread] = [x for n in range(0, columns, 8) for x in lane_c(whole[part, n : n + 8], lane)]
    operand = "{%r21, %r22, %r23, %r24}" if registers else "%rd10"
    flags = f"1, 1, {int(turned)}" if registers else f"1, 1, 0, {int(turned)}"
    names = [f"%r{50 + n}" for n in range(columns // 2)]
    quads = [(16 * n, ", ".join(names[4 * n : 4 * n + 4])) for n in range(columns // 8)]
    loads = "".join(f"ld.global.v4.b32 {{{quad}}}, [%rd3+{at}];" for at, quad in quads)
    stores = "".join(f"st.global.v4.b32 [%rd3+{at}], {{{quad}}};" for at, quad in quads)
    fill = "".join(
        f"ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%rd1+{at}]; st.shared.v4.b32 [%r2+{at}], {{%r3, %r4, %r5, %r6}};"
        for at in range(0, len(room), 2048)
    )
    body = f"""
    .shared .align 1024 .b8 room[{len(room)}];
    {TID} ld.param.u64 %rd1, [p1]; mad.wide.u32 %rd1, %r0, 16, %rd1; mov.u32 %r1, room; mad.lo.u32 %r2, %r0, 16, %r1;
    {fill} fence.proxy.async.shared::cta; bar.sync 0;
    ld.param.u64 %rd2, [p2]; mad.wide.u32 %rd2, %r0, 16, %rd2; ld.global.v4.b32 {{%r21, %r22, %r23, %r24}}, [%rd2];
    mad.wide.u32 %rd3, %r0, {2 * columns}, %rd0; {loads}
    shr.u32 %r40, %r1, 4; cvt.u64.u32 %rd10, %r40; add.u32 %r41, %r1, 2048; shr.u32 %r41, %r41, 4;
    cvt.u64.u32 %rd11, %r41;
    or.b64 %rd10, %rd10, {a_bits}; or.b64 %rd11, %rd11, {b_bits}; setp.ne.u32 %p1, %r1, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{", ".join(names)}}},
    {operand}, %rd11, %p1, {flags};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; {stores}"""
    assert kinds(execute(body, [sums, room, lanes], threads=128)) == []
    assert (sums == want).all()
