"""Fused ops in torch's own words, for graphs of standard operators: ONNX has nodes for LayerNorm, softmax and GELU.

What an op keeps for backward is left out: nothing of such a graph reads it. A call that torch has no word for is made
of what its reference is made of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vitkernels import dispatch
from vitkernels.ops._amp import DTYPES

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def decompositions() -> dict[Any, Callable[..., Any]]:
    """For `ExportedProgram.run_decompositions`: of each fused op what it is made of.

    `torch.export.export(model, ...).run_decompositions(decompositions())` is a graph of torch's operators, of any
    model that is fused, which `torch.onnx.export` takes.
    """
    made = {op.forward_op: op.implementations["reference"].forward for op in dispatch.OPS.values()}
    for name, words in _IN_WORDS.items():
        op = dispatch.OPS[name].forward_op
        made[op] = _told(words, made[op])
    return made


def _told(words: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """The op in torch's words, where it has some."""

    def decomposition(*arguments: Any) -> Any:
        found = words(*arguments)
        return reference(*arguments) if found is None else found

    return decomposition


def _layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    row_scale: Tensor | None,
    out_dtype: int,
) -> Any:
    if any(each is not None and each.dim() > 1 for each in (weight, bias, scale)) or row_scale is not None:
        return None  # one for each sample, or DropPath's
    if not _of_one_dtype(x, branch, weight, bias, branch_bias, scale):
        return None
    total = x
    if branch is not None:
        added = branch if branch_bias is None else branch + branch_bias
        total = x + (added if scale is None else added * scale)
    normed = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    nothing = x.new_zeros(0)
    return (nothing if branch is None else total), normed.to(DTYPES[out_dtype]), nothing, nothing


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Any:
    if mask is not None or is_causal or k.shape[1] != q.shape[1]:
        return None  # of a row that sees nothing a softmax makes no number, and the op 0
    return F.scaled_dot_product_attention(q, k, v, scale=scale), q.new_zeros(0)


def _attention_qkv(qkv: Tensor, num_heads: int, mask: Tensor | None, is_causal: bool, scale: float) -> Any:
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    found = _attention(q, k, v, mask, is_causal, scale)
    return None if found is None else (found[0].transpose(1, 2).flatten(2), found[1])


def _mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, save: bool) -> Any:
    if activation not in _ACTIVATIONS or not _of_one_dtype(x, w1, b1, w2, b2):
        return None
    return F.linear(_ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2), x.new_zeros(0)


def _of_one_dtype(*tensors: Tensor | None) -> bool:
    """Ops round weights as they read them; torch's words want them rounded."""
    return len({tensor.dtype for tensor in tensors if tensor is not None}) == 1


_IN_WORDS: dict[str, Callable[..., Any]] = {
    "add_layer_norm": _layer_norm,
    "attention": _attention,
    "attention_qkv": _attention_qkv,
    "mlp": _mlp,
}
