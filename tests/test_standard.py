"""Fused ops in torch's words: the same numbers, and where there are no words the reference's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vitkernels import dispatch
from vitkernels.ops._amp import CODES
from vitkernels.train.standard import decompositions

BF16 = torch.bfloat16


def _draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _norm(**changes: Any) -> list[Any]:
    """Arguments of add_layer_norm in the order of its schema."""
    given: dict[str, Any] = {"x": _draw(2, 5, 8), "branch": _draw(2, 5, 8), "weight": _draw(8), "bias": _draw(8)}
    given |= {
        "eps": 1e-6,
        "branch_bias": _draw(8),
        "scale": _draw(8),
        "row_scale": None,
        "out_dtype": CODES[torch.float32],
    }
    return list((given | changes).values())


def _mlp(activation: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    return [
        _draw(2, 5, 8),
        _draw(16, 8, dtype=dtype),
        _draw(16),
        _draw(8, 16, dtype=dtype),
        _draw(8),
        activation,
        False,
    ]


CASES = {
    "add_layer_norm": ("add_layer_norm", _norm(), True),
    "add_layer_norm, no branch": ("add_layer_norm", _norm(branch=None, branch_bias=None, scale=None), True),
    "add_layer_norm, plain": ("add_layer_norm", _norm(weight=None, bias=None, scale=None, branch_bias=None), True),
    "add_layer_norm, of each sample": ("add_layer_norm", _norm(scale=_draw(2, 8)), False),
    "add_layer_norm, DropPath": ("add_layer_norm", _norm(row_scale=torch.tensor([0.0, 2.0])), False),
    "add_layer_norm, rounded": ("add_layer_norm", _norm(out_dtype=CODES[BF16]), True),
    "add_layer_norm, two dtypes": ("add_layer_norm", _norm(branch=_draw(2, 5, 8, dtype=BF16)), False),
    "attention": ("attention", [_draw(2, 4, 5, 8), _draw(2, 4, 7, 8), _draw(2, 4, 7, 8), None, False, 0.3], True),
    "attention, few heads": (
        "attention",
        [_draw(2, 4, 5, 8), _draw(2, 2, 7, 8), _draw(2, 2, 7, 8), None, False, 0.3],
        False,
    ),
    "attention_qkv": ("attention_qkv", [_draw(2, 5, 24), 2, None, False, 0.3], True),
    "attention_qkv, causal": ("attention_qkv", [_draw(2, 5, 24), 2, None, True, 0.3], False),
    "attention_qkv, masked": ("attention_qkv", [_draw(2, 5, 24), 2, _draw(1, 1, 5, 5), False, 0.3], False),
    **{f"mlp, {name}": ("mlp", _mlp(name), True) for name in ("gelu", "gelu_tanh", "silu", "relu")},
    "mlp, quick_gelu": ("mlp", _mlp("quick_gelu"), False),
    "mlp, two dtypes": ("mlp", _mlp("gelu", BF16), False),
}


@pytest.mark.parametrize("case", CASES)
def test_words_say_what_the_reference_says(case: str) -> None:
    name, arguments, has_words = CASES[case]
    op = dispatch.OPS[name]
    found = decompositions()[op.forward_op](*arguments)
    expected = op.implementations["reference"].forward(*arguments)
    outputs = 2 if name == "add_layer_norm" else 1
    for ours, theirs in zip(found[:outputs], expected[:outputs], strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)
    kept = [each for each in found[outputs:] if each.numel()]
    assert (not kept) == (has_words or name == "mlp"), "words leave out what backward would read"


def test_every_op_has_a_decomposition() -> None:
    table = decompositions()
    assert all(op.forward_op in table for op in dispatch.OPS.values())
