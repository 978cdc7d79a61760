"""The cases of attention, a part of the list in `cases`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from case import DTYPES, Case, T
from draws import (
    drop_rows,
    drop_sample,
    equal_scores,
    filled,
    first_column,
    hidden_keys,
    keep_some,
    late_keys,
    ones_first,
    zero_rows,
)
from torch import Tensor

F32, F64, BF16, F16 = DTYPES
REDUCED = (BF16, F16)
WIDE = (F32, F64, BF16)  # what float16 has no numbers for


def attention(
    name: str,
    batch: int = 2,
    heads: int = 2,
    queries: int = 7,
    keys: int | None = None,
    width: int = 16,
    *,
    keys_heads: int | None = None,
    logits: float = 1.0,
    mean: float = 0.0,
    mask: T | None = None,
    **more: Any,
) -> Case:
    keys = queries if keys is None else keys
    rows = (batch, heads if keys_heads is None else keys_heads, keys, width)
    tensors = {"q": T((batch, heads, queries, width), gain=logits), "k": T(rows), "v": T(rows, mean=mean)}
    return Case("attention", name, tensors | ({"attn_mask": mask} if mask is not None else {}), **more)


def attention_rel_pos(
    name: str,
    batch: int = 2,
    heads: int = 2,
    image: tuple[int, int] = (3, 5),
    width: int = 16,
    *,
    queries: int | None = None,
    logits: float = 1.0,
    positions: dict[str, Any] | None = None,
    **more: Any,
) -> Case:
    """q, k and v apart; `positions` is what is special about rel_h and rel_w."""
    keys = image[0] * image[1]
    queries = keys if queries is None else queries
    rows = (batch, heads, keys, width)
    rel = {
        name: T((batch, heads, queries, size), **positions or {})
        for name, size in zip(("rel_h", "rel_w"), image, strict=True)
    }
    tensors = {"q": T((batch, heads, queries, width), gain=logits), "k": T(rows), "v": T(rows)}
    return Case("attention_rel_pos", name, tensors | rel, **more)


def attention_rel_pos_qkv(
    name: str,
    batch: int = 2,
    heads: int = 2,
    image: tuple[int, int] = (3, 5),
    width: int = 16,
    **more: Any,
) -> Case:
    case = attention_rel_pos(f"packed, {name}", batch, heads, image, width, **more)
    qkv = T((batch, image[0] * image[1], 3, heads, width))
    rel = {name: case.tensors[name] for name in ("rel_h", "rel_w")}
    return dataclasses.replace(case, tensors={"qkv": qkv} | rel)


def lengths(*counts: int) -> T:
    """cu_seqlens of sequences with so many tokens."""
    ends = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return T((len(ends),), dtype=torch.int32, grad=False, convert=lambda _: ends)


def attention_varlen(
    name: str,
    counts: tuple[int, ...] = (7, 1, 12),
    heads: int = 2,
    width: int = 16,
    *,
    keys: tuple[int, ...] | None = None,
    keys_heads: int | None = None,
    logits: float = 1.0,
    spare: int = 0,
    options: dict[str, Any] | None = None,
    **more: Any,
) -> Case:
    """q, k and v apart; `spare` is how much longer than the longest sequence the longest is said to be."""
    keys = counts if keys is None else keys
    rows = (sum(keys), heads if keys_heads is None else keys_heads, width)
    tensors = {
        "q": T((sum(counts), heads, width), gain=logits),
        "k": T(rows),
        "v": T(rows),
        "cu_seqlens_q": lengths(*counts),
        "cu_seqlens_k": lengths(*keys),
    }
    longest = {
        "max_seqlen_q": max(counts, default=0) + spare,
        "max_seqlen_k": max(keys, default=0) + spare,
    }
    return Case("attention_varlen", name, tensors, longest | (options or {}), **more)


def attention_varlen_qkv(
    name: str,
    counts: tuple[int, ...] = (7, 1, 12),
    heads: int = 2,
    width: int = 16,
    *,
    gain: float = 1.0,
    options: dict[str, Any] | None = None,
    **more: Any,
) -> Case:
    tensors = {"qkv": T((sum(counts), 3, heads, width), gain=gain), "cu_seqlens": lengths(*counts)}
    return Case(
        "attention_varlen", f"packed, {name}", tensors, {"max_seqlen": max(counts, default=0)} | (options or {}), **more
    )


def attention_qkv(
    name: str,
    batch: int = 2,
    heads: int = 2,
    tokens: int = 7,
    width: int = 16,
    *,
    gain: float = 1.0,
    mean: float = 0.0,
    mask: T | None = None,
    causal: bool = False,
    convert: Callable[[Tensor], Tensor] | None = None,
    **more: Any,
) -> Case:
    tensors = {"qkv": T((batch, tokens, 3 * heads * width), gain=gain, mean=mean, convert=convert)}
    options = {"num_heads": heads} | ({"is_causal": True} if causal else {}) | more.pop("options", {})
    return Case("attention_qkv", name, tensors | ({"attn_mask": mask} if mask is not None else {}), options, **more)


def equal(name: str, queries: int = 33, keys: int | None = None, gain: float = 1e4, **more: Any) -> Case:
    """Queries whose scores are huge, positive or negative, and the same for all keys."""
    case = attention(name, queries=queries, keys=keys, **more)
    columns = {"q": {"gain": gain, "convert": first_column}, "k": {"convert": ones_first}}
    changed = {tensor: dataclasses.replace(case.tensors[tensor], **columns[tensor]) for tensor in columns}
    return dataclasses.replace(case, tensors={**case.tensors, **changed})


def lowered(name: str, value: float, queries: int = 33, keys: int | None = None, **more: Any) -> Case:
    """`value` on all keys of rows of zeros in q: beside it, float64 would keep scores that float32 rounds away."""
    keys = queries if keys is None else keys
    mask = T((2, 1, queries, keys), dtype=F32, convert=filled(drop_rows, value))
    case = attention(name, queries=queries, keys=keys, mask=mask, **more)
    zeros = T((2, 2, queries, 16), convert=zero_rows)
    return dataclasses.replace(case, tensors={**case.tensors, "q": zeros})


CAUSAL: dict[str, Any] = {"is_causal": True}
LOWEST = torch.finfo(F32).min
WIDTHS = (8, 16, 32, 48, 64, 72, 80, 88, 96, 104, 128)

# Softmax of scores that are huge and equal is uniform, and the log of their number is nothing beside them.
HUGE_SCORES = [
    # finfo.min leaves nothing of a score, in float64 either
    attention("finfo.min rows", queries=33, mask=T((2, 1, 33, 33), dtype=F32, convert=filled(drop_rows, LOWEST))),
    attention(
        "finfo.min rows for all, no mask gradient",
        queries=33,
        mask=T((33, 33), dtype=F32, grad=False, convert=filled(drop_rows, LOWEST)),
    ),
    attention("-3e38 rows", queries=33, dtypes=WIDE, mask=T((2, 2, 33, 33), convert=filled(drop_rows, -3e38))),
    attention("finfo.min keys", queries=33, mask=T((2, 1, 1, 33), dtype=F32, convert=filled(drop_sample, LOWEST))),
    attention("finfo.min for all", mask=T((), dtype=F32, convert=lambda values: values.fill_(LOWEST))),
    attention(
        "many keys, finfo.min rows",
        queries=5,
        keys=577,
        mask=T((2, 1, 5, 577), dtype=F32, convert=filled(drop_rows, LOWEST)),
    ),
    lowered("-1e4 rows", -1e4),
    lowered("-1e9 rows", -1e9),
    lowered("many keys, -1e9 rows", -1e9, queries=5, keys=577),
    equal("huge equal scores"),
    equal("huge equal scores, 1e9", gain=1e9, dtypes=WIDE),
    equal("huge equal scores, one query", queries=1, keys=7),
    equal("huge equal scores, scale", options={"scale": 0.3}),
    equal("huge equal scores, negative scale", options={"scale": -0.3}),
    equal("many keys, huge equal scores", queries=5, keys=577),
    equal("huge equal scores, causal", options=CAUSAL),
    equal("huge equal scores, causal, more keys", queries=9, keys=33, options=CAUSAL),
    equal("huge equal scores, causal, scale", gain=1e9, options=CAUSAL | {"scale": 0.3}, dtypes=WIDE),
    equal("huge equal scores, bool mask", mask=T((2, 1, 33, 33), convert=drop_rows)),
    equal("huge equal scores, key padding", mask=T((2, 1, 1, 33), convert=keep_some)),
    equal("huge equal scores, key padding, scale", mask=T((2, 1, 1, 33), convert=keep_some), options={"scale": 0.3}),
    equal("huge equal scores, -inf mask", mask=T((2, 1, 33, 33), convert=filled(drop_rows))),
]
HUGE_SCORES_QKV = [
    attention_qkv("finfo.min rows", tokens=33, mask=T((2, 1, 33, 33), dtype=F32, convert=filled(drop_rows, LOWEST))),
    attention_qkv("finfo.min keys", tokens=33, mask=T((2, 1, 1, 33), dtype=F32, convert=filled(drop_sample, LOWEST))),
    attention_qkv("huge equal scores", tokens=33, convert=equal_scores(2, 1e4)),
    attention_qkv("huge equal scores, 1e9", tokens=33, convert=equal_scores(2, 1e9), dtypes=WIDE),
    attention_qkv("huge equal scores, causal", tokens=33, causal=True, convert=equal_scores(2, 1e4)),
]

ATTENTION = [
    attention("plain"),
    *(attention(f"head width {width}", queries=9, width=width) for width in (33, 72, 128)),
    attention("odd", 1, 3, 65, width=33),
    attention("one token", queries=1),
    attention("one sample, one head", 1, 1, 33),
    attention("empty batch", batch=0),
    attention("no keys", keys=0),
    attention("no queries", queries=0, keys=5),
    attention("long", 1, 1, 577, width=64, dtypes=(F32, BF16)),
    attention("long, causal", 1, 1, 577, options=CAUSAL, dtypes=(F32, BF16)),
    attention("cross, more keys", queries=5, keys=33),
    attention("many keys, large logits", queries=24, keys=1100, logits=50.0),  # in fewer rows, the worst one is luck
    attention("many keys, the first ones masked", queries=5, keys=577, mask=T((2, 1, 1, 577), convert=late_keys)),
    attention("many keys, mask gradient", queries=5, keys=577, mask=T((2, 1, 5, 577))),
    attention("cross, more queries", queries=67, keys=3),
    attention("large logits", queries=33, logits=50.0),
    attention("large mean", queries=9, mean=30.0),
    attention("scale", options={"scale": 0.7}),
    attention("negative scale", options={"scale": -0.3}),
    attention("causal", queries=33, options=CAUSAL),
    attention("causal, more keys", queries=5, keys=9, options=CAUSAL),
    attention("causal, more queries", queries=9, keys=5, options=CAUSAL),
    attention("bool mask", mask=T((2, 2, 7, 7), convert=keep_some)),
    attention("bool mask for all", queries=65, mask=T((65, 65), convert=keep_some)),
    attention("bool mask a head", mask=T((1, 2, 7, 7), convert=keep_some)),
    attention("key padding", queries=33, mask=T((2, 1, 1, 33), convert=keep_some)),
    attention("key padding, cross", queries=5, keys=33, mask=T((2, 1, 1, 33), convert=keep_some)),
    *(
        attention(
            f"key padding, {value}",
            queries=33,
            mask=T((2, 1, 1, 33), dtype=F32, grad=False, convert=hidden_keys(value)),
        )
        for value in (-math.inf, LOWEST, -1e9)
    ),
    attention(
        "key padding, -inf, expanded",
        queries=33,
        mask=T((2, 1, 33, 33), layout="expanded rows", grad=False, convert=hidden_keys(-math.inf)),
    ),
    attention("rows fully masked", queries=33, mask=T((2, 1, 33, 33), convert=drop_rows)),
    attention("bool mask, transposed", mask=T((2, 1, 7, 7), layout="transposed", convert=keep_some)),
    attention("bool mask, expanded", mask=T((2, 1, 7, 7), layout="expanded rows", convert=keep_some)),
    attention("all masked", mask=T((2, 1, 1, 7), convert=lambda values: values > torch.inf)),
    attention("additive mask", mask=T((2, 2, 7, 7), grad=False)),
    attention("float32 mask", mask=T((7, 7), grad=False, dtype=F32), dtypes=REDUCED),
    attention("-inf mask", queries=33, mask=T((33, 33), grad=False, convert=filled(keep_some))),
    attention("-inf rows", queries=33, mask=T((2, 1, 33, 33), convert=filled(drop_rows))),
    attention("relative position bias", 3, 2, 17, mask=T((1, 2, 17, 17))),
    attention("float32 mask gradient", 3, 2, 9, mask=T((2, 9, 9), dtype=F32), dtypes=REDUCED),
    attention("mask gradient, a scalar", mask=T(())),
    # every way in which a mask can be broadcast over [B, H, Nq, Nk]
    *(
        attention(f"mask gradient, {shape}", 2, 3, 5, 9, mask=T(shape))
        for shape in itertools.product((2, 1), (3, 1), (5, 1), (9, 1))
    ),
    attention("masks in turn", 4, 2, 9, mask=T((2, 2, 9, 9))),
    attention("masks in turn, cross, for all heads", 4, 2, 5, 17, mask=T((2, 1, 5, 17))),
    attention("bool masks in turn", 4, 1, 9, mask=T((2, 1, 9, 9), convert=keep_some)),
    attention("key padding in turn", 4, 1, 9, mask=T((2, 1, 1, 9), convert=keep_some)),
    attention("masks in turn, grouped keys", 4, 2, 5, keys_heads=1, mask=T((2, 2, 5, 5))),
    attention("scale 0", mask=T((2, 1, 1, 7), convert=keep_some), options={"scale": 0.0}),
    attention("grouped keys", 2, 6, 33, keys_heads=2),
    attention("one head of keys", 2, 4, 9, keys_heads=1),
    attention("grouped keys, causal", 2, 4, 65, keys_heads=2, options=CAUSAL),
    attention("grouped keys, many, key padding", 1, 4, 5, 577, keys_heads=2, mask=T((1, 1, 1, 577), convert=keep_some)),
    attention("grouped keys, mask gradient", 2, 4, 9, keys_heads=2, mask=T((2, 4, 9, 9))),
    attention("grouped keys, mask gradient for all heads", 2, 4, 9, keys_heads=2, mask=T((1, 1, 9, 9))),
    *HUGE_SCORES,
]

ATTENTION_REL_POS = [
    attention_rel_pos("plain"),
    attention_rel_pos("one token", image=(1, 1)),
    attention_rel_pos("empty batch", batch=0),
    attention_rel_pos("no rows", image=(0, 3), queries=4),
    attention_rel_pos("no columns", image=(3, 0), queries=4),
    attention_rel_pos("no queries", queries=0),
    attention_rel_pos("one row", image=(1, 17)),
    attention_rel_pos("one column", image=(17, 1)),
    attention_rel_pos("a smaller image of keys", image=(3, 4), queries=33),
    attention_rel_pos("a window", 3, 1, (14, 14), 64),
    attention_rel_pos("an image", 1, 1, (13, 60), queries=40, dtypes=(F32, BF16)),
    attention_rel_pos("rows that a block of keys cuts", 1, 1, (13, 48), queries=9, dtypes=(F32, BF16)),
    attention_rel_pos("wide rows", 1, 1, (3, 64), queries=5, dtypes=(F32, BF16)),
    attention_rel_pos("scale", options={"scale": 0.7}),
    attention_rel_pos("negative scale", options={"scale": -0.3}),
    attention_rel_pos("scale 0", options={"scale": 0.0}),
    attention_rel_pos("large logits", image=(8, 12), logits=50.0),
    attention_rel_pos("large positions", image=(4, 9), positions={"gain": 30.0}),
    attention_rel_pos("float32 positions", positions={"dtype": F32}, dtypes=REDUCED),
    attention_rel_pos("positions that learn nothing", positions={"grad": False}),
    attention_rel_pos("positions transposed", positions={"layout": "transposed"}),
    *(attention_rel_pos(f"head width {width}", image=(3, 7), width=width) for width in (33, 80, 128)),
    attention_rel_pos_qkv("plain"),
    attention_rel_pos_qkv("a window of 7", 5, 2, (7, 7), 32),
    attention_rel_pos_qkv("positions transposed", positions={"layout": "transposed"}),
    *(attention_rel_pos_qkv(f"head width {width}", 1, 1, (5, 4), width) for width in (8, 72)),
]

ATTENTION_VARLEN = [
    attention_varlen("plain"),
    attention_varlen("one sequence", (33,)),
    attention_varlen("no sequence", ()),
    attention_varlen("no tokens", (0, 0)),
    attention_varlen("empty sequences", (0, 9, 0, 0, 5, 0)),
    attention_varlen("many, mixed lengths", (1, 17, 64, 3, 130, 65, 2, 31), width=32),
    attention_varlen("long", (600, 5), 1, dtypes=(F32, BF16)),
    attention_varlen("cross", (5, 33, 9), keys=(33, 5, 9)),
    attention_varlen("cross, no keys for one", (5, 7, 3), keys=(4, 0, 6)),
    attention_varlen("cross, no queries for one", (5, 0, 3), keys=(4, 8, 6)),
    attention_varlen("cross, no keys at all", (5, 7), keys=(0, 0)),
    attention_varlen("causal", (33, 1, 70), options=CAUSAL),
    attention_varlen("causal, more keys", (5, 40), keys=(9, 70), options=CAUSAL),
    attention_varlen("causal, more queries", (9, 70), keys=(5, 40), options=CAUSAL),
    attention_varlen("grouped keys", (7, 40, 12), 6, keys_heads=2),
    attention_varlen("one head of keys", (7, 20), 4, keys_heads=1),
    attention_varlen("grouped keys, causal, cross", (7, 40), 4, keys=(9, 33), keys_heads=2, options=CAUSAL),
    attention_varlen("longer than the longest", spare=100),
    attention_varlen("scale", options={"scale": 0.7}),
    attention_varlen("negative scale", options={"scale": -0.3}),
    attention_varlen("scale 0", options={"scale": 0.0}),
    attention_varlen("large logits", (33, 20), logits=50.0),
    *(attention_varlen(f"head width {width}", (9, 4), width=width) for width in (33, 72, 80, 128)),
    attention_varlen_qkv("plain"),
    attention_varlen_qkv("no tokens", (0,)),
    attention_varlen_qkv("mixed lengths", (49, 1, 0, 197, 16), width=64),
    attention_varlen_qkv("causal", (33, 70), options=CAUSAL),
    attention_varlen_qkv("large logits", (33, 20), gain=7.0),
    *(attention_varlen_qkv(f"head width {width}", (9, 20), width=width) for width in (8, 72, 80)),
]

ATTENTION_QKV = [
    *(attention_qkv(f"head width {width}", tokens=17, width=width) for width in WIDTHS),
    attention_qkv("odd", 1, 3, 33, 7),
    attention_qkv("odd, 65 tokens", 1, 1, 65, 33),
    attention_qkv("197 tokens", 1, 2, 197, 64),
    attention_qkv("long", 1, 1, 577, 32, dtypes=(F32, BF16)),
    attention_qkv("one token", tokens=1),
    attention_qkv("no tokens", tokens=0),
    attention_qkv("one sample, one head", 1, 1, 7),
    attention_qkv("empty batch", batch=0),
    attention_qkv("large logits", tokens=33, gain=7.0),
    attention_qkv("large mean", tokens=9, mean=2.0),
    attention_qkv("causal", tokens=65, causal=True),
    attention_qkv("causal, head width 72", tokens=9, width=72, causal=True),
    attention_qkv("scale", options={"scale": 0.7}),
    attention_qkv("bool mask", mask=T((2, 2, 7, 7), convert=keep_some)),
    attention_qkv("key padding", tokens=33, mask=T((2, 1, 1, 33), convert=keep_some)),
    attention_qkv("rows fully masked", tokens=33, mask=T((2, 1, 33, 33), convert=drop_rows)),
    attention_qkv("-inf rows", tokens=33, mask=T((2, 1, 33, 33), convert=filled(drop_rows))),
    attention_qkv("relative position bias", 3, 2, 17, 16, mask=T((1, 2, 17, 17))),
    attention_qkv("relative position bias, many windows", 17, 1, 5, 8, mask=T((1, 1, 5, 5))),
    attention_qkv("masks in turn", 6, 2, 9, mask=T((3, 2, 9, 9))),
    attention_qkv("masks in turn, no gradient", 6, 1, 9, mask=T((3, 1, 9, 9), dtype=F32, grad=False)),
    attention_qkv("mask gradient, key bias", tokens=33, mask=T((2, 1, 1, 33))),
    *HUGE_SCORES_QKV,
]
