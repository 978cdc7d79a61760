"""The reference in float64 is what every backend is held to; here it is held to stock torch and its own autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import FLOORS, check, in_float64, run
from case import Case
from cases import PLAIN
from cases_rotary import ROTARY_LEARNED
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
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=scale)


def _attention_qkv(qkv, num_heads, attn_mask=None, is_causal=False, scale=None):
    batch, tokens, packed = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, num_heads, packed // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    return _attention(q, k, v, attn_mask, is_causal, scale).transpose(1, 2).reshape(batch, tokens, packed // 3)


def _add_layer_norm(
    x, branch, weight, bias=None, eps=1e-6, branch_bias=None, scale=None, row_scale=None, out_dtype=None
):
    if branch is not None:
        if branch_bias is not None:
            branch = branch + branch_bias
        if scale is not None:
            branch = branch * scale
        if row_scale is not None:
            branch = branch * row_scale.view(-1, *[1] * (x.dim() - 1))
        x = x + branch
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "relu": F.relu,
    "silu": F.silu,
}


def _mlp(x, w1, b1, w2, b2, activation="gelu"):
    return F.linear(_ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)


def _rotary(x, sin, cos, prefix=0, half=False):
    patches = x[:, :, prefix:]
    turned = torch.zeros_like(patches)
    width = x.shape[-1]
    for first in range(width // 2):
        i, j = (first, first + width // 2) if half else (2 * first, 2 * first + 1)
        turned[..., i], turned[..., j] = -patches[..., j], patches[..., i]
    return torch.cat([x[:, :, :prefix], patches * cos + turned * sin], dim=2)


STOCK: dict[str, Callable[..., Any]] = {
    "linear": F.linear,
    "patch_embed": _patch_embed,
    "attention": _attention,
    "attention_qkv": _attention_qkv,
    "add_layer_norm": _add_layer_norm,
    "mlp": _mlp,
    "rotary": _rotary,
}


@pytest.mark.parametrize("case", [case for case in (*PLAIN, *ROTARY_LEARNED) if torch.float64 in case.dtypes], ids=str)
def test_reference_is_stock_torch(case: Case) -> None:
    tensors = in_float64(case.build(torch.float64))
    options = {name: torch.float64 if name == "out_dtype" else value for name, value in case.options.items()}
    got = run(case, tensors, forward="reference", overrides=options)
    outputs = STOCK[case.op](**tensors, **options)
    truth = dict(zip(case.results, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))
    gradients = case.build_gradients(truth)
    leaves = {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad}
    grads = torch.autograd.grad(
        [truth[name] for name in gradients], list(leaves.values()), list(gradients.values()), allow_unused=True
    )
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        truth[f"gradient of {name}"] = torch.zeros_like(leaf) if grad is None else grad
    truth = {name: tensor.detach() for name, tensor in truth.items()}
    check(got, truth, truth, FLOORS[torch.float64])
