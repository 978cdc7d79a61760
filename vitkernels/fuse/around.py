"""Blocks whose attention is of a kind that no op serves: it runs its own code, and the rest of the block is fused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vitkernels.fuse.swap import Fused, branch_of
from vitkernels.residual import parts
from vitkernels.residual.genuine import stock_type
from vitkernels.residual.stream import Branch


def attention_of(name: str, attn: nn.Module, call: Callable[[Tensor], Tensor] | None = None, **options: Any) -> Branch:
    """`branch_of` an attention; `explain` counts a block apart whose attention no rule serves."""
    from vitkernels.fuse import rules  # whose files import this one

    branch = branch_of(name, attn, call, **options)
    served = isinstance(attn, Fused) or rules.match(attn) is not None
    return branch if served else dataclasses.replace(branch, own=True)


def attention_within(name: str, attn: nn.Module, call: Callable[[Tensor], Tensor], kind: str) -> Branch:
    """The attention of a block that calls it on tokens laid out anew (windows), where it runs fused by itself.

    Args:
        name: what the block calls it.
        attn: the attention.
        call: from the normed tokens to what is added to the stream.
        kind: as in `own_attention`, where no rule knows the attention.
    """
    from vitkernels.fuse import rules

    if not isinstance(attn, Fused):
        match = rules.match(attn)  # one by its structure was tried before, and computes something else
        known = match is not None and match.certain
        return branch_of(name, attn, call) if known else own_attention(name, attn, call, kind)

    def why_not() -> str | None:
        return next((part.why_not for part in attn.parts() if part.why_not is not None), None)

    # what is laid out anew is rounded as the attention's first product would round it
    reader = attn.reader() if parts.why_not_part(name, attn) is None else None
    linear = reader if isinstance(reader, nn.Linear) else None
    return Branch(lambda x, bias_apart: (call(x), None), attn.parts()[0].ops, linear, why_not)


def own_attention(name: str, attn: nn.Module, call: Callable[[Tensor], Tensor], kind: str) -> Branch:
    """The attention of a block that runs its own code, with what the block does around it (windows, pooling).

    Args:
        name: what the block calls it.
        attn: the attention.
        call: from the normed tokens to what is added to the stream.
        kind: what it is that no op serves ("windows with a relative bias"), for `explain`.
    """
    why_not = f"{name} is {stock_type(attn).__name__}, its own: {kind}"
    return Branch(lambda x, bias_apart: (call(x), None), "", None, why_not, own=True)
