"""Launchers of attention over many sequences in one: schema and meaning in `vitkernels.ops.attention_varlen`.

The kernels are `attention_long`'s, launched once for all sequences. A packed projection's thirds are read, and its
gradient's written, where they lie.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkernels.kernels.attention import Sequences, long_backward, long_forward, why_not_width, zero_results
from vitkernels.kernels.attention_variants import variants_varlen as variants
from vitkernels.kernels.launch import cdiv
from vitkernels.ops._amp import nothing
from vitkernels.ops.attention_varlen import parts

__all__ = ["backward", "forward", "variants", "why_not"]


def why_not(direction: str, call: Any) -> str | None:
    return why_not_width(call.q.shape[-1])


_LENGTH = 64  # the longest sequence counts as a multiple of it: kernels are compiled for multiples of 16 and the rest


def _sequences(q: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Sequences:
    tokens, *_, heads, _ = q.shape
    queries, keys = (cdiv(length, _LENGTH) * _LENGTH for length in (max_q, max_k))
    return Sequences(cu_q.shape[0] - 1, heads, queries, keys, tokens, cu_q.contiguous(), cu_k.contiguous())


def forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    of = _sequences(q, cu_q, cu_k, max_q, max_k)
    out = q.new_empty(of.rows, of.heads, q.shape[-1])
    stats = q.new_empty(of.heads, 2, of.rows, dtype=torch.float32)
    q, k, v = parts(q, k, v)
    if 0 in (q.numel(), k.numel(), max_q, max_k):
        zero_results(out, stats)
    else:
        long_forward(of, q, k, v, out, stats, None, is_causal, scale)
    return out, stats


def backward(
    dout: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, out: Tensor, stats: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, is_causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    of = _sequences(q, cu_q, cu_k, max_q, max_k)
    dq = q.new_empty(q.shape)
    dk, dv = (nothing(q) if each is None else each.new_empty(each.shape) for each in (k, v))
    grads = parts(dq, *((dk, dv) if k is not None else (None, None)))
    tensors = parts(q, k, v)
    if 0 in (tensors[0].numel(), tensors[1].numel(), max_q, max_k):
        for grad in grads:
            grad.zero_()
    else:
        long_backward(of, dout, tensors, out, stats.contiguous(), grads, None, is_causal, scale, False)
    return dq, dk, dv
