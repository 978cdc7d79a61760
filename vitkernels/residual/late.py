"""Blocks whose calls bring tensors: positions, masks.

What is read off a block's modules is kept for its next call (`kept`). Tensors of a call are no part of that: they take
their places in what was read, and nothing keeps them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from vitkernels.ops._amp import autocast_dtype
from vitkernels.residual.kept import Kept, Late, key_of
from vitkernels.residual.plain_step import PlainStep
from vitkernels.residual.stream import Branch, Sublayer, fitting


def read_for(
    block: nn.Module,
    kept: Kept,
    read: Callable[..., list[Sublayer]],
    x: Tensor,
    options: Mapping[str, Any],
    again: bool | None = None,
    plain: bool = True,
) -> list[Sublayer]:
    """The residual steps of a call of a block: read(**options), or what was read for a call before.

    Args:
        block: the modules that are read.
        kept: the block's.
        read: it looks at modules, and of tensors at dtype, axes and `requires_grad`.
        x: the call's tokens.
        options: the call's.
        again: as in `pre_norm`.
        plain: whether `pre_norm` runs the steps.
    """
    key = key_of(options)
    if key is None or (type(key) is Late and not plain):
        return read(**options)
    if type(key) is not Late:
        return kept.get(block, key, lambda: read(**options))
    key = key, x.dtype, autocast_dtype(x)
    without = kept.get(block, key, lambda: _without_call(read(**options)))
    found = None if without is None else _of_call(without, x, options, again)
    return read(**options) if found is None else found


def _not_read(x: Tensor, bias_apart: bool) -> NoReturn:
    raise AssertionError("the branch of another call")


def _without_call(sublayers: Sequence[Sublayer]) -> list[Sublayer] | None:
    """Residual steps that hold nothing of the call that they were read for; None where modules would have to be called.

    A branch's `run` may hold it, and so may a scale that is a function.
    """
    found = []
    for each in sublayers:
        step = each.branch.step
        if not isinstance(step, PlainStep) or step.holds_call or not isinstance(each.scale, nn.Module | Tensor | None):
            return None
        found.append(dataclasses.replace(each, branch=Branch(_not_read, "", step=step.of(None)), _read=None))
    return found


def _of_call(
    sublayers: Sequence[Sublayer], x: Tensor, options: Mapping[str, Any], again: bool | None
) -> list[Sublayer] | None:
    """The residual steps of a call with these options; None where its tokens have modules called.

    Args:
        sublayers: of `_without_call`.
        x: the call's tokens.
        options: the call's.
        again: as in `pre_norm`.
    """
    found = []
    for each in sublayers:
        read, step = each.read(x.shape[-1], again), each.branch.step
        if read.norm is None or not read.adds or fitting(read.norm, x) is None:
            return None
        assert isinstance(step, PlainStep)
        if step.call is not None:
            branch = Branch(_not_read, "", step=step.of(options))
            each = Sublayer(each.name, each.norm, branch, each.scale, each.drop_path, each.ends, each._read)
        found.append(each)
    return found
