"""The layers and tokens that the tests of torch.nn's Transformer share."""

from __future__ import annotations

import itertools
from typing import Any

import fused
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

D, H, B, N, M = 48, 4, 3, 7, 5  # M: the decoder's tokens
OPS = {"linear", "attention_qkv", "add_layer_norm", "mlp"}
CROSS = OPS | {"attention"}
LAYOUTS = list(itertools.product((False, True), (False, True)))  # norm_first, batch_first


def padding(length: int = N) -> Tensor:
    """The second sample is two tokens short."""
    mask = torch.zeros(B, length, dtype=torch.bool)
    mask[1, -2:] = True
    return mask


def causal(length: int = N) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


def layer_of(kind: type[nn.Module] = nn.TransformerEncoderLayer, **options: Any) -> nn.Module:
    return kind(D, H, **{"dim_feedforward": 96, "dropout": 0.0, "batch_first": True, **options})


def encoder(*, norm: bool = True, **options: Any) -> nn.TransformerEncoder:
    last = nn.LayerNorm(D) if norm else None
    model = nn.TransformerEncoder(layer_of(**options), 2, norm=last, enable_nested_tensor=False)  # type: ignore[arg-type]
    fused.stir(model)
    return model


def decoder(**options: Any) -> nn.TransformerDecoder:
    model = nn.TransformerDecoder(layer_of(nn.TransformerDecoderLayer, **options), 2, nn.LayerNorm(D))  # type: ignore[arg-type]
    fused.stir(model)
    return model


def tokens(batch_first: bool = True, length: int = N, width: int = D) -> Tensor:
    shape = (B, length, width) if batch_first else (length, B, width)
    return torch.randn(shape, requires_grad=True)


class Adds(TorchDispatchMode):
    """Counts the sums that torch computes inside the block; those of a residual stream run in our op."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.add.Tensor
        return func(*args, **(kwargs or {}))


class Attention(nn.Module):
    """nn.MultiheadAttention among other things, asked for no weights."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(D, H, **{"batch_first": True, **options})

    def forward(self, *inputs: Tensor, **keywords: Any) -> Tensor:
        query, key, value = inputs if len(inputs) == 3 else (inputs[0], inputs[-1], inputs[-1])
        return self.attn(query, key, value, need_weights=False, **keywords)[0]
