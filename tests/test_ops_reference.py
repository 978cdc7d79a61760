"""The reference in float64 is what every backend is held to; here it is held to stock torch and its own autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import FLOORS, check, in_float64, run
from case import Case, T
from cases import PLAIN, attention
from cases_attention import HUGE_SCORES, HUGE_SCORES_QKV
from cases_rotary import ROTARY_LEARNED
from conftest import BACKENDS, skip_without
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def _patch_embed(image, weight, bias=None, mean=None, std=None, prefix=None, pos_embed=None, keep=None):
    pixels = image.double() / 255 if image.dtype == torch.uint8 else image
    if mean is not None:
        pixels = pixels - torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1)
    if std is not None:
        pixels = pixels / torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
    tokens = F.conv2d(pixels, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    prefixes = 0 if prefix is None else len(prefix)
    table = torch.zeros(prefixes + tokens.shape[1], weight.shape[0], dtype=torch.float64)
    if pos_embed is not None:
        table = F.pad(pos_embed, (0, 0, len(table) - len(pos_embed), 0))
    tokens = tokens + table[prefixes:]
    if keep is not None:
        tokens = torch.stack([sample[index] for sample, index in zip(tokens, keep, strict=True)])
    if prefix is None:
        return tokens
    return torch.cat([(prefix + table[:prefixes]).expand(len(tokens), -1, -1), tokens], dim=1)


def _attention(q, k, v, attn_mask=None, is_causal=False, scale=None):
    if attn_mask is not None and attn_mask.dim() == 4 and len(attn_mask) > 1:  # in turn
        attn_mask = attn_mask[torch.arange(len(q)) % len(attn_mask)]
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def _attention_qkv(qkv, num_heads, attn_mask=None, is_causal=False, scale=None):
    batch, tokens, packed = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, num_heads, packed // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    return _attention(q, k, v, attn_mask, is_causal, scale).transpose(1, 2).reshape(batch, tokens, packed // 3)


def _attention_rel_pos(q=None, k=None, v=None, rel_h=None, rel_w=None, qkv=None, scale=None):
    packed = qkv is not None
    if packed:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
    bias = (rel_h.unsqueeze(-1) + rel_w.unsqueeze(-2)).reshape(*q.shape[:3], k.shape[2])
    out = _attention(q, k, v, bias, scale=scale) if k.shape[2] else q * 0
    return out.transpose(1, 2) if packed else out


def _attention_varlen(
    q=None, k=None, v=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0, max_seqlen_k=0, qkv=None,
    cu_seqlens=None, max_seqlen=0, is_causal=False, scale=None,
):  # fmt: skip
    if qkv is not None:
        (q, k, v), cu_seqlens_q, cu_seqlens_k = qkv.unbind(1), cu_seqlens, cu_seqlens
    parts = [
        each.split(ends.diff().tolist())
        for each, ends in zip((q, k, v), (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k), strict=True)
    ]
    apart = [
        _attention(*(each.transpose(0, 1)[None] for each in one), None, is_causal, scale)
        for one in zip(*parts, strict=True)
    ]
    return torch.cat([q[:0], *(out[0].transpose(0, 1) for out in apart)])


def _add_layer_norm(
    x, branch, weight, bias=None, eps=1e-6, branch_bias=None, scale=None, row_scale=None, out_dtype=None
):
    return _after_norm(_sum(x, branch, branch_bias, scale, row_scale), F.layer_norm, weight, bias, eps)


def _add_rms_norm(x, branch, weight, eps=1e-6, bias=None, branch_bias=None, scale=None, row_scale=None, out_dtype=None):
    return _after_norm(_sum(x, branch, branch_bias, scale, row_scale), F.rms_norm, weight, bias, eps)


def _sum(x, branch, branch_bias, scale, row_scale):
    if branch is None:
        return x
    if branch_bias is not None:
        branch = branch + branch_bias
    if scale is not None:
        branch = branch * _of_samples(scale, x)
    if row_scale is not None:
        branch = branch * row_scale.view(-1, *[1] * (x.dim() - 1))
    return x + branch


def _of_samples(vector, x):
    return vector if vector.dim() == 1 else vector.view(len(vector), *[1] * (x.dim() - 2), x.shape[-1])


def _after_norm(x, norm, weight, bias, eps):
    normed = norm(x, x.shape[-1:], eps=eps)
    if weight is not None:
        normed = normed * _of_samples(weight, x)
    return x, normed if bias is None else normed + _of_samples(bias, x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "relu": F.relu,
    "silu": F.silu,
}


def _mlp(x, w1, b1, w2, b2, activation="gelu"):
    return F.linear(_ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)


def _glu_mlp(x, w_down, b_down, w_gate_up=None, b_gate_up=None, activation="silu", **apart):
    if apart:
        gate, up = (F.linear(x, apart[f"w_{name}"], apart[f"b_{name}"]) for name in ("gate", "up"))
    else:
        gate, up = F.linear(x, w_gate_up, b_gate_up).chunk(2, dim=-1)
    return F.linear(_ACTIVATIONS[activation](gate) * up, w_down, b_down)


def _rotary(x, sin, cos, prefix=0, half=False):
    patches = x[:, :, prefix:]
    turned = torch.zeros_like(patches)
    width = x.shape[-1]
    for first in range(width // 2):
        i, j = (first, first + width // 2) if half else (2 * first, 2 * first + 1)
        turned[..., i], turned[..., j] = -patches[..., j], patches[..., i]
    return torch.cat([x[:, :, :prefix], patches * cos + turned * sin], dim=2)


def _rotary_qkv(
    qkv, sin=None, cos=None, prefix=0, half=False, norm=None, q_weight=None, q_bias=None, k_weight=None, k_bias=None,
    eps=1e-6,
):  # fmt: skip
    parts = list(qkv.unbind(-3))
    for index, (weight, bias) in enumerate(((q_weight, q_bias), (k_weight, k_bias))[: len(parts)]):
        x = parts[index]
        if norm == "layer_norm":
            x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        elif norm is not None:
            x = F.rms_norm(x, x.shape[-1:], weight, eps)
        if sin is not None:
            heads = x if x.dim() == 4 else x[None]
            x = _rotary(heads.transpose(1, 2), sin, cos, prefix, half).transpose(1, 2).reshape(x.shape)
        parts[index] = x
    return torch.stack(parts, -3)


STOCK: dict[str, Callable[..., Any]] = {
    "linear": F.linear,
    "patch_embed": _patch_embed,
    "attention": _attention,
    "attention_qkv": _attention_qkv,
    "attention_rel_pos": _attention_rel_pos,
    "attention_varlen": _attention_varlen,
    "add_layer_norm": _add_layer_norm,
    "add_rms_norm": _add_rms_norm,
    "mlp": _mlp,
    "glu_mlp": _glu_mlp,
    "rotary": _rotary,
    "rotary_qkv": _rotary_qkv,
}


def _stock(case: Case, tensors: Mapping[str, Tensor | None], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Results of stock torch and the gradients of its own autograd, by name."""
    outputs = STOCK[case.op](**tensors, **options)
    found = dict(zip(case.results, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))
    gradients = case.build_gradients(found)
    leaves = {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad}
    grads = torch.autograd.grad(
        [found[name] for name in gradients], list(leaves.values()), list(gradients.values()), allow_unused=True
    )
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return {name: tensor.detach() for name, tensor in found.items()}


@pytest.mark.parametrize("case", [case for case in (*PLAIN, *ROTARY_LEARNED) if torch.float64 in case.dtypes], ids=str)
def test_reference_is_stock_torch(case: Case) -> None:
    tensors = in_float64(case.build(torch.float64))
    options = {name: torch.float64 if name == "out_dtype" else value for name, value in case.options.items()}
    got = run(case, tensors, forward="reference", overrides=options)
    truth = _stock(case, tensors, options)
    check(got, truth, truth, FLOORS[torch.float64])


@pytest.mark.parametrize("case", [*HUGE_SCORES, *HUGE_SCORES_QKV], ids=str)
def test_huge_scores_err_as_in_stock_torch(case: Case, backend: str) -> None:
    """In float32, where the reference's own error is no measure: it could lose as much as a kernel does."""
    tensors = case.build(torch.float32)
    got = run(case, tensors, forward=backend)
    truth = _stock(case, in_float64(tensors), case.options)
    check(got, _stock(case, tensors, case.options), truth, FLOORS[torch.float32])


@pytest.mark.parametrize(("forward", "backward"), list(itertools.product(BACKENDS, repeat=2)))
@pytest.mark.parametrize("shape", [(2, 1, 33, 33), (1, 2, 1, 33), (33, 33), (1, 1)], ids=str)
@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -1e9, -1e4])
def test_masked_rows_round_as_in_eager_attention(
    value: float, shape: tuple[int, ...], forward: str, backward: str
) -> None:
    """What float32 leaves of q k^T beside a large negative value is what float32 leaves of it in eager attention."""
    skip_without(forward)
    skip_without(backward)
    case = attention("masked rows", queries=33, mask=T(shape, dtype=torch.float32))
    tensors = case.build(torch.float32)
    with torch.no_grad():
        tensors["attn_mask"][..., :1, :] = value
    q, k, v, mask = tensors.values()
    out = (q @ k.transpose(-1, -2) * 0.25 + mask).softmax(-1) @ v
    gradients = {"out": torch.randn_like(out)}
    grads = torch.autograd.grad(out, list(tensors.values()), gradients["out"])
    eager = dict(zip(("out", *(f"gradient of {name}" for name in tensors)), (out.detach(), *grads), strict=True))
    got = run(case, tensors, gradients, forward=forward, backward=backward)
    for name, expected in eager.items():
        # beside -1e4, scores are multiples of 1 / 1024, and the order of a sum decides which
        allowed = (2e-3 if value == -1e4 else 2e-6) * expected.abs().max() + 1e-5
        assert (got[name] - expected).abs().max() <= allowed, name
