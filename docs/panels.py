"""What the drawings show, an op at a time: the Triton kernels, whose tiles `vitkernels/kernels/configs` picks.

`attention` is drawn with attention_qkv's packed projection, and `add_layer_norm` stands for add_rms_norm too.
"""

from __future__ import annotations

from drawings import Panel, Tensor

ROW = (0.0, 0.4, 1.0, 0.14)
THIN = (110, 12)


def row(name: str, shape: str = "[B, N, D]") -> Tensor:
    """One row of a tensor of rows."""
    return Tensor(name, shape, tile=ROW)


def vector(name: str, shape: str = "[D]") -> Tensor:
    return Tensor(name, shape, THIN)


def tile(name: str, shape: str, at: tuple[float, float, float, float], size: tuple[int, int] = (96, 60)) -> Tensor:
    return Tensor(name, shape, size, at)


PATCH_EMBED = (
    Panel(
        "Forward: a tile of tokens by a tile of channels",
        (
            tile("image", "[B, C, H, W], uint8 or float", (0.25, 0.25, 0.5, 0.25), (96, 96)),
            tile("weight", "[D, C, P, P]", (0.0, 0.3, 1.0, 0.3), (96, 40)),
            vector("bias, pos_embed, prefix", "[D], [R + N, D], [R, D]"),
        ),
        (
            "read pixels where the image has them",
            "uint8: / 255, then (x - mean) / std",
            "sum += patches x weight^T",
            "+ bias + position",
            "rows of prefix tokens: copied",
        ),
        (tile("tokens", "[B, R + N, D]", (0.25, 0.3, 0.3, 0.3)),),
        held=tile("patches, unfolded", "[B N, C P P]", (0.0, 0.3, 0.25, 0.3), (150, 44)),
    ),
    Panel(
        "Backward, weight: a part of the batch each, then the sum of the parts",
        (
            tile("dtokens", "[B, R + N, D]", (0.25, 0.0, 0.3, 1.0)),
            tile("image", "[B, C, H, W]", (0.0, 0.25, 1.0, 0.25), (96, 76)),
        ),
        ("the same gather of pixels", "sum += dtokens^T x patches", "no atomics: a slice for each part"),
        (tile("dweight", "[parts, D, C P P], float32", (0.25, 0.0, 0.3, 0.5)),),
    ),
)

ATTENTION = (
    Panel(
        "Forward, few keys: a program is one head of one image",
        (Tensor("qkv", "[B, N, 3, H, K]", (170, 60), (0.0, 0.0, 0.11, 1.0), times=3),),
        (
            "k and v of the head: loaded once, kept",
            "for each tile of queries:",
            "  scores = q k^T: all keys at once",
            "  one maximum, one sum",
            "  out = weights x v / sum",
        ),
        (
            tile("out", "[B, N, D]", (0.0, 0.0, 0.34, 1.0)),
            Tensor("stats", "[B, H, 2, N], float32", (96, 14), (0.0, 0.0, 0.34, 1.0)),
        ),
        held=tile("scores", "[B, H, N, N]", (0.0, 0.25, 1.0, 0.25), (64, 64)),
    ),
    Panel(
        "Backward, few keys: a program is one head, and one walk over the queries gives all gradients",
        (
            Tensor("qkv", "[B, N, 3, H, K]", (170, 44), (0.0, 0.0, 0.11, 1.0), times=3),
            tile("dout", "[B, N, D]", (0.0, 0.0, 0.34, 1.0), (96, 44)),
            Tensor("stats", "[B, H, 2, N], float32", (96, 14), (0.0, 0.0, 0.34, 1.0)),
        ),
        (
            "dk, dv of all keys: held",
            "for each tile of queries:",
            "  weights again, from the statistics",
            "  delta: a sum over weights at hand",
            "  dv += weights^T x dout",
            "  dk += dscores^T x q; dq = dscores x k",
        ),
        (Tensor("dqkv", "[B, N, 3, H, K]", (130, 60), (0.0, 0.0, 0.11, 1.0), times=3),),
        held=tile("weights, dscores", "[B, H, N, N]", (0.0, 0.25, 1.0, 0.25), (64, 64)),
    ),
    Panel(
        "Forward, many keys: a program is one tile of queries, and walks over tiles of keys",
        (
            tile("q", "[B, H, Nq, K]", (0.0, 0.25, 1.0, 0.25)),
            tile("k, v", "[B, H, Nk, K]", (0.0, 0.5, 1.0, 0.25)),
        ),
        (
            "for each tile of keys:",
            "  scores = q k^T",
            "  running maximum and sum",
            "  out = out x rescale + weights x v",
            "out / sum",
        ),
        (
            tile("out", "[B, Nq, H, K]", (0.0, 0.25, 1.0, 0.25)),
            Tensor("stats", "[B, H, 2, Nq], float32", (96, 14), (0.25, 0.0, 0.25, 1.0)),
        ),
        held=tile("scores", "[B, H, Nq, Nk]", (0.5, 0.25, 0.25, 0.25), (64, 64)),
    ),
    Panel(
        "Backward, many keys: dq by queries, dk and dv by keys; no two programs add into one place",
        (
            tile("q, dout", "[B, H, Nq, K]", (0.0, 0.0, 1.0, 1.0)),
            tile("k, v", "[B, H, Nk, K]", (0.0, 0.5, 1.0, 0.25)),
            Tensor("stats, delta", "[B, H, Nq], float32", (96, 14)),
        ),
        (
            "delta = row sums of dout x out, before",
            "for each tile of queries:",
            "  weights again, from the statistics",
            "  dv += weights^T x dout",
            "  dk += dscores^T x q",
            "dq: the same by rows, its own kernel",
        ),
        (tile("dk, dv", "[B, H, Nk, K]", (0.0, 0.5, 1.0, 0.25)),),
        held=tile("weights, dscores", "[B, H, Nq, Nk]", (0.5, 0.0, 0.25, 0.25), (64, 64)),
    ),
)

ATTENTION_REL_POS = (
    Panel(
        "Backward: a program is one tile of queries of a head; a tile of keys is a row of their image",
        (
            tile("q, dout", "[Nq, K]", (0.0, 0.3, 1.0, 0.2), (44, 90)),
            Tensor("k, v", "[Kh * Kw, K]", (44, 90), (0.0, 0.3, 1.0, 0.12)),
            Tensor("rel_h, rel_w", "[Nq, Kh], [Nq, Kw]", (60, 90), (0.0, 0.3, 1.0, 0.2)),
        ),
        (
            "rel_w of my queries: loaded once, kept",
            "for each row y of the image:",
            "  scores = q k^T + rel_h[:, y] + rel_w",
            "  drel_h[:, y] = their gradients' sum",
            "  drel_w += their gradients",
        ),
        (
            tile("dq", "[Nq, K]", (0.0, 0.3, 1.0, 0.2), (44, 90)),
            tile("drel_h, drel_w", "[Nq, Kh], [Nq, Kw]", (0.0, 0.3, 1.0, 0.2), (60, 90)),
        ),
        held=tile("scores", "[Nq, Kh * Kw]", (0.2, 0.3, 0.12, 0.2), (64, 64)),
    ),
)

ATTENTION_VARLEN = (
    Panel(
        "Forward: a program is one tile of queries of one sequence",
        (
            Tensor("qkv", "[T, 3, H, K]", (170, 90), (0.0, 0.4, 0.11, 0.15), times=3),
            Tensor("cu_seqlens", "[S + 1], int32", (110, 14), (0.4, 0.0, 0.4, 1.0)),
        ),
        (
            "where does my sequence begin, and end?",
            "no such tile in it: done",
            "for each tile of its keys:",
            "  as attention over many keys",
        ),
        (tile("out", "[T, H, K]", (0.0, 0.4, 0.34, 0.15), (96, 90)),),
        held=tile("scores of all sequences", "blocks on the diagonal", (0.35, 0.45, 0.1, 0.1), (64, 64)),
    ),
)

ROTARY = (
    Panel(
        "Both ways: a program is a few tokens, and walks over some of their heads",
        (
            Tensor("q, or k", "[B, H, N, K], any strides", (110, 60), (0.2, 0.3, 0.5, 0.25)),
            Tensor("sin, cos", "[N, K]", (60, 44), (0.0, 0.3, 1.0, 0.25)),
        ),
        (
            "sines and cosines: loaded once, kept",
            "for each of the heads:",
            "  out[i] = x[i] cos[i] - x[j] sin[i]",
            "  out[j] = x[j] cos[j] + x[i] sin[j]",
            "backward: sines exchanged, negated",
        ),
        (Tensor("out", "[B, N, H, K]", (110, 60), (0.2, 0.3, 0.5, 0.25)),),
    ),
)

ROTARY_QKV = (
    Panel(
        "Both ways: a program is a few tokens, and walks over some of their heads of q, k and v",
        (
            Tensor("qkv", "[B, N, 3, H, K]", (170, 60), (0.0, 0.3, 0.2, 0.25), times=3),
            Tensor("sin, cos", "[N, K]", (60, 34), (0.0, 0.3, 1.0, 0.25)),
            vector("q_weight, k_weight", "[K]"),
        ),
        (
            "for each head of q and k:",
            "  its norm, of what is held anyway",
            "  the turn; rounded once",
            "v: copied",
            "backward: the norm again from its",
            "input; weights' gradients as sums of",
            "a program, one row each, then summed",
        ),
        (Tensor("out", "[B, N, 3, H, K]", (130, 60), (0.0, 0.3, 0.2, 0.25), times=3),),
    ),
)

ADD_LAYER_NORM = (
    Panel(
        "Forward: a program walks a few rows, each in registers",
        (row("x"), row("branch"), vector("weight, bias"), vector("branch_bias, scale", "[D]; row_scale [B]")),
        (
            "total = x + row_scale scale",
            "        (branch + branch_bias)",
            "mean, variance: in registers",
            "normed = (total - mean) rstd",
            "         weight + bias",
        ),
        (row("total"), row("normed"), Tensor("mean, rstd", "[B, N], float32", (96, 10), (0.3, 0.0, 0.1, 1.0))),
    ),
    Panel(
        "Backward: programs stay for the whole call, each with its own sums",
        (row("total"), row("dtotal"), row("dnormed"), Tensor("mean, rstd", "[B, N]", (96, 10), (0.3, 0.0, 0.1, 1.0))),
        (
            "for each of its rows:",
            "  dx = dtotal + gradient of the norm",
            "  sums += this row's part of dweight,",
            "          dbias, dscale, dbranch_bias",
            "at the end: the sums, one row each",
        ),
        (row("dx (and dbranch)"), Tensor("sums", "[programs, D], float32", (96, 30), (0.0, 0.3, 1.0, 0.3))),
    ),
)

MLP = (
    Panel(
        "Forward, first product: a tile of tokens by a tile of hidden units",
        (tile("x", "[M, D]", (0.0, 0.25, 1.0, 0.25), (70, 70)), tile("w1", "[F, D]", (0.0, 0.5, 1.0, 0.2), (70, 90))),
        (
            "sum += x w1^T, over tiles of D",
            "epilogue, in registers:",
            "  pre = sum + b1",
            "  activated = f(pre)",
            "then y = activated w2^T + b2:",
            "the vendor's product",
        ),
        (
            tile("pre", "[M, F], kept for backward", (0.5, 0.25, 0.2, 0.25), (120, 50)),
            tile("activated", "[M, F], not kept", (0.5, 0.25, 0.2, 0.25), (120, 50)),
        ),
    ),
    Panel(
        "Backward, gradient of the first product",
        (
            tile("dy", "[M, D]", (0.0, 0.25, 1.0, 0.25), (70, 50)),
            tile("w2", "[D, F]", (0.5, 0.0, 0.2, 1.0), (110, 44)),
            tile("pre", "[M, F]", (0.5, 0.25, 0.2, 0.25), (110, 50)),
        ),
        (
            "sum += dy w2, over tiles of D",
            "epilogue, in registers:",
            "  dpre = sum f'(pre)",
            "  activated = f(pre), again",
            "  db1: dpre summed over the tile",
            "then dx, dw1, dw2: the vendor's",
        ),
        (
            tile("dpre", "[M, F]", (0.5, 0.25, 0.2, 0.25), (110, 44)),
            tile("activated", "[M, F]", (0.5, 0.25, 0.2, 0.25), (110, 44)),
            Tensor("db1", "[rows of tiles, F], float32", (110, 18), (0.5, 0.0, 0.2, 1.0)),
        ),
    ),
)

GLU_MLP = (
    Panel(
        "Forward, first product: a tile of tokens by the same columns of gate and up",
        (
            tile("x", "[M, D]", (0.0, 0.25, 1.0, 0.25), (70, 60)),
            tile("w_gate", "upper half of [2 F, D]", (0.0, 0.5, 1.0, 0.2), (70, 50)),
            tile("w_up", "lower half", (0.0, 0.5, 1.0, 0.2), (70, 50)),
        ),
        (
            "two sums, x read once:",
            "  gate += x w_gate^T; up += x w_up^T",
            "epilogue, in registers:",
            "  gated = f(gate + b) (up + b)",
            "then y = gated w_down^T + b_down:",
            "the vendor's product",
        ),
        (
            tile("pre", "[M, 2 F], kept for backward", (0.25, 0.25, 0.1, 0.25), (130, 50)),
            tile("gated", "[M, F], not kept", (0.5, 0.25, 0.2, 0.25), (65, 50)),
        ),
    ),
    Panel(
        "Backward, gradient of the first product",
        (
            tile("dy", "[M, D]", (0.0, 0.25, 1.0, 0.25), (70, 50)),
            tile("w_down", "[D, F]", (0.5, 0.0, 0.2, 1.0), (80, 44)),
            tile("pre", "[M, 2 F]", (0.25, 0.25, 0.1, 0.25), (130, 50)),
        ),
        (
            "d = dy w_down, over tiles of D",
            "epilogue, in registers:",
            "  dgate = d up f'(gate)",
            "  dup = d f(gate)",
            "  gated again; biases' sums",
            "then the three products: the vendor's",
        ),
        (
            tile("dpre", "[M, 2 F]", (0.25, 0.25, 0.1, 0.25), (130, 44)),
            tile("gated", "[M, F]", (0.5, 0.25, 0.2, 0.25), (65, 44)),
            Tensor("db", "[rows of tiles, 2 F], float32", (130, 18), (0.25, 0.0, 0.1, 1.0)),
        ),
    ),
)

LINEAR = (
    Panel(
        "On a CPU, the extension's own product: a block of rows by a panel of columns",
        (
            tile("x", "[M, I]", (0.0, 0.25, 0.5, 0.25), (96, 70)),
            tile("weight", "[O, I], packed in panels", (0.0, 0.4, 0.5, 0.2), (96, 70)),
        ),
        (
            "for each part of I that fits in cache:",
            "  sum += x weight^T, in registers",
            "while the block is in cache:",
            "  + bias (mlp: the activation too)",
        ),
        (tile("y", "[M, O]", (0.4, 0.25, 0.2, 0.25), (96, 70)),),
    ),
)

PANELS: dict[str, tuple[Panel, ...]] = {
    "patch_embed": PATCH_EMBED,
    "attention": ATTENTION,
    "attention_rel_pos": ATTENTION_REL_POS,
    "attention_varlen": ATTENTION_VARLEN,
    "rotary": ROTARY,
    "rotary_qkv": ROTARY_QKV,
    "add_layer_norm": ADD_LAYER_NORM,
    "mlp": MLP,
    "glu_mlp": GLU_MLP,
    "linear": LINEAR,
}
