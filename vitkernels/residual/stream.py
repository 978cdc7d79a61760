"""Residual streams: each sub-layer's add, LayerScale and DropPath run together with the LayerNorm that comes next.

A pre-norm block computes x + drop_path(scale(branch(norm(x)))) twice. What a sub-layer adds waits for the norm of the
next one, and both are one pass over memory, with the products behind them one autograd Function (`ops/_steps.py`). The
last sub-layer's add stands alone. A call depends on its tokens and on the modules that it was given: blocks share the
pass at their border only where they are run by one call of `pre_norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitkernels.ops import _steps
from vitkernels.ops._amp import autocast_dtype, cast_dtype
from vitkernels.ops._steps import Added, Norm
from vitkernels.residual import parts
from vitkernels.residual.plain_step import PlainStep

# (stream, what is added to it first, norm, bias_apart) -> (sum, branch, bias)
Step = Callable[[Tensor, Added | None, Norm, bool], tuple[Tensor, Tensor, Tensor | None]]
# (stream, residual steps) -> stream, as `pre_norm` with all else given
Steps = Callable[[Tensor, Sequence["Sublayer"]], Tensor]


@dataclass(frozen=True, slots=True)
class Part:
    """A row of `explain`: a part of a module, the ops that serve it, and what of it is not fused.

    Attributes:
        name: the part, as its module calls it; "" for the module itself.
        ops: the ops, "attention_qkv, linear"; "" where none runs.
        why_not: what is not fused, or None.
        module: the block within the module that the part belongs to ("layers.0"); "" for the module itself.
        own: whether the part is an attention of a kind that no op serves, run by its own code.
    """

    name: str
    ops: str
    why_not: str | None = None
    module: str = ""
    own: bool = False


@dataclass(slots=True)
class Branch:
    """How a sub-layer's branch is computed.

    Attributes:
        run: (normed tokens [B, N, D], bias_apart) -> (branch, bias): with `bias_apart` the last Linear's bias comes
            beside the branch, for an op that adds it on its way; None where it is in, or where there is none.
        ops: the ops that `run` calls, for `explain`.
        reader: the Linear that reads the normed tokens; None where a module gets them whole.
        reason: what of the branch is not fused, or how to find out: a call need not, `explain` does.
        otherwise: the ops that `run` calls while something is not; the same by default.
        step: the same with the add and the norm before it, as one autograd Function; None where there is none.
        own: whether this is an attention of a kind that no op serves: `run` is its own code.
    """

    run: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]
    ops: str
    reader: nn.Module | None = None
    reason: str | Callable[[], str | None] | None = None
    otherwise: str | None = None
    step: Step | None = None
    own: bool = False

    @property
    def why_not(self) -> str | None:
        """What of the branch is not fused now, or None."""
        return self.reason() if callable(self.reason) else self.reason

    def part(self, name: str) -> Part:
        """The row of `explain`."""
        why_not = self.why_not
        ops = self.ops if why_not is None or self.otherwise is None else self.otherwise
        return Part(name, ops, why_not, own=self.own)


class _Read(NamedTuple):
    """What a residual step's modules hold: the norm's parameters, or None where it must be called; whether the add can
    wait for the norm behind it; LayerScale's factor; a DropPath that drops something."""

    norm: Norm | None
    adds: bool
    gamma: Tensor | None
    drop_path: nn.Module | None


@dataclass(slots=True)
class Sublayer:
    """One residual step of a block, by its parts; `name` is what `explain` calls it ("attn").

    A scale that is made of parameters is a function, asked at each call: what is read off a block is kept for the next.
    """

    name: str
    norm: nn.Module
    branch: Branch
    scale: nn.Module | Tensor | Callable[[], Tensor] | None = None
    drop_path: nn.Module | None = None
    ends: bool = False  # whether it is the last one of a block that is followed by another
    _read: tuple[Any, _Read] | None = None

    def read(self, width: int, again: bool | None) -> _Read:
        """Its modules for tokens of this width; read once, as long as the object lives, if no scale is made anew."""
        if self._read is not None and self._read[0] == (width, again):
            return self._read[1]
        scale = self.factor()
        why_not = parts.why_not_scale("", scale, width) or parts.why_not_drop_path("", self.drop_path)
        gamma = parts.scale_parameter(scale) if why_not is None else None
        drop_path = self.drop_path if why_not is None and parts.drops_paths(self.drop_path) else None
        norm = _parameters_of(self.norm, width, again)
        read = _Read(norm, why_not is None, gamma, drop_path)
        if scale is self.scale:
            self._read = (width, again), read
        return read

    def is_read(self, width: int, again: bool | None) -> bool:
        """Whether the step is computed with parameters alone: none of its modules is called, and sees its tokens."""
        read = self.read(width, again)
        return read.norm is not None and read.adds and isinstance(self.branch.step, PlainStep)

    def factor(self) -> nn.Module | Tensor | None:
        """The scale, made now where it is a function."""
        scale = self.scale
        return scale if scale is None or isinstance(scale, nn.Module | Tensor) else scale()

    def parts(self) -> list[Part]:
        """The rows of `explain`: the branch, and the residual add with its norm."""
        reasons = (
            parts.why_not_layer_norm(f"the norm of {self.name}", self.norm),
            parts.why_not_scale(f"the scale of {self.name}", self.factor(), self._width()),
            parts.why_not_drop_path(f"the drop path of {self.name}", self.drop_path),
        )
        why_not = next((reason for reason in reasons if reason is not None), None)
        residual = Part(f"{self.name} residual", "" if why_not else parts.norm_op(self.norm), why_not)
        return [self.branch.part(self.name), residual]

    def _width(self) -> int:
        """D, as the norm has it; the scale's own where the norm says nothing."""
        tensors = (getattr(self.norm, "weight", None), parts.scale_parameter(self.factor()))
        return next((each.shape[-1] for each in tensors if isinstance(each, Tensor) and each.dim()), 0)


def pre_norm(
    x: Tensor,
    sublayers: Sequence[Sublayer],
    dtype: torch.dtype | None = None,
    last_norm: nn.Module | None = None,
    again: bool | None = None,
) -> Tensor:
    """x = x + drop_path(scale(branch(norm(x)))) for each sub-layer, [B, N, D] to the same.

    Args:
        x: the residual stream.
        sublayers: the steps, in order; of one block or of several.
        dtype: of the residual stream under autocast; None leaves it as the modules one by one would have it.
        last_norm: the norm of the sum, where the one who calls owns it too; its result is returned.
        again: whether norms are made again in backward, as `Norm` has it.
    """
    dtype = _stream_dtype(x, dtype)
    if dtype is not None:
        x = x.to(dtype)
    width = x.shape[-1]
    last = None if last_norm is None else fitting(_parameters_of(last_norm, width), x)
    read = [each.read(width, again) for each in sublayers]
    norms = [fitting(each.norm, x) for each in read]
    following = [*norms[1:], last]
    added: Added | None = None
    place = 0
    while place < len(sublayers):
        end = _end_of_stretch(x, place, sublayers, read, norms, widen=dtype is None)
        sublayer, norm, own = sublayers[end - 1], norms[end - 1], read[end - 1]
        branch, joins = sublayer.branch, following[end - 1] is not None and own.adds
        if end - place > 1:
            inner = zip(sublayers[place : end - 1], read[place:], norms[place:], strict=False)
            stages = [_stage(x, *each) for each in inner]
            assert isinstance(branch.step, PlainStep)
            assert norm is not None
            stages.append(_steps.Stage(branch.step.step, norm, branch.step.arguments(joins)))
            x, out = _steps.run(x, added, stages)
            bias = branch.step.bias() if joins else None
        elif norm is None:
            out, bias = branch.run(sublayer.norm(x), joins)
        elif branch.step is not None:
            x, out, bias = branch.step(x, added, norm, joins)
        else:
            x, normed = _steps.add_norm(x, added, norm, parts.operand_dtype(branch.reader, x))
            out, bias = branch.run(normed, joins)
        if joins:
            x, added = _waiting(x, own, out, bias, widen=dtype is None)
        else:
            x, added = added_now(x, sublayer, out, widen=dtype is None), None
        place = end
    if last_norm is None:
        return x
    return last_norm(x) if last is None else _steps.add_norm(x, added, last, parts.operand_dtype(None, x))[1]


def _end_of_stretch(
    x: Tensor,
    place: int,
    sublayers: Sequence[Sublayer],
    read: Sequence[_Read],
    norms: Sequence[Norm | None],
    widen: bool,
) -> int:
    """Behind the last sub-layer that is one autograd Function with the one at `place`: neighbours of one block, with
    nothing but the add between their products."""
    end = place + 1
    while end < len(sublayers) and not sublayers[end - 1].ends and norms[end] is not None:
        own, following = sublayers[end - 1].branch.step, sublayers[end].branch.step
        if not (isinstance(own, PlainStep) and isinstance(following, PlainStep)) or norms[end - 1] is None:
            break
        if not read[end - 1].adds or (
            widen and torch.promote_types(x.dtype, _branch_dtype(x, read[end - 1].gamma)) != x.dtype
        ):
            break
        end += 1
    return end


def _branch_dtype(x: Tensor, gamma: Tensor | None) -> torch.dtype:
    """Of a product's result once LayerScale has multiplied it: DropPath draws in it, the sum is in it."""
    autocast = autocast_dtype(x)
    dtype = x.dtype if autocast is None else cast_dtype(x, autocast)
    return dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)


def _stage(x: Tensor, sublayer: Sublayer, read: _Read, norm: Norm | None) -> _steps.Stage:
    """A sub-layer that has another behind it in its stretch."""
    step = sublayer.branch.step
    assert isinstance(step, PlainStep)
    assert norm is not None
    arguments, row_scale = step.arguments(True), None  # first: what makes a mask may draw before the DropPath does
    if read.drop_path is not None:
        row_scale = parts.drop_path_factor(read.drop_path, x, _branch_dtype(x, read.gamma))
    return _steps.Stage(step.step, norm, arguments, _steps.Factors(step.bias(), read.gamma, row_scale))


def normed_branch(x: Tensor, norm: nn.Module, branch: Branch) -> Tensor:
    """branch(norm(x)) alone."""
    readable = fitting(_parameters_of(norm, x.shape[-1]), x)
    if readable is not None and branch.step is not None:
        return branch.step(x, None, readable, False)[1]
    return branch.run(parts.layer_norm(norm, x, parts.operand_dtype(branch.reader, x)), False)[0]


def post_norm(x: Tensor, sublayers: Sequence[Sublayer], dtype: torch.dtype | None = None) -> Tensor:
    """x = norm(x + drop_path(scale(branch(x)))) for each sub-layer, [B, N, D] to the same; dtype as in `pre_norm`."""
    dtype = _stream_dtype(x, dtype)
    if dtype is not None:
        x = x.to(dtype)
    for sublayer in sublayers:
        read = sublayer.read(x.shape[-1], None)
        norm = fitting(read.norm, x)
        if norm is None or not read.adds:
            out, _ = sublayer.branch.run(x, False)
            x = parts.layer_norm(sublayer.norm, added_now(x, sublayer, out, widen=dtype is None))
            continue
        out, bias = sublayer.branch.run(x, True)
        x, added = _waiting(x, read, out, bias, widen=dtype is None)
        x = _steps.add_norm(x, added, norm, dtype or parts.operand_dtype(None, x))[1]
    return x


def added_norms(x: Tensor, sublayers: Sequence[Sublayer], dtype: torch.dtype | None = None) -> Tensor:
    """x = x + drop_path(scale(norm(branch(x)))) for each sub-layer, [B, ..., D] to the same; dtype as in `pre_norm`."""
    dtype = _stream_dtype(x, dtype)
    if dtype is not None:
        x = x.to(dtype)
    for sublayer in sublayers:
        out, _ = sublayer.branch.run(x, False)
        out = parts.layer_norm(sublayer.norm, out, parts.operand_dtype(None, out))
        x = added_now(x, sublayer, out, widen=dtype is None)
    return x


def rows_behind(x: Tensor, sublayers: Sequence[Sublayer], steps: Steps, again: bool | None) -> Tensor:
    """The steps of a block whose first one has an image, [B, H, W, D], and whose others have its tokens row by row.

    It is the same to what is computed with parameters alone; a module that is called gets what the block would give it.

    Args:
        x: the image.
        sublayers: the steps, in order.
        steps: what runs them.
        again: as in `pre_norm`.
    """
    width = x.shape[-1]
    if all(each.is_read(width, again) for each in sublayers[1:]):
        return steps(x, sublayers)
    x = steps(x, sublayers[:1])
    return steps(x.flatten(1, 2), sublayers[1:]).unflatten(1, x.shape[1:3])


def _stream_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype to keep the stream in; None as it is: without autocast, products take what they are given."""
    return None if autocast_dtype(x) is None or x.dtype == torch.float64 else dtype


def _parameters_of(norm: nn.Module, width: int, again: bool | None = None) -> Norm | None:
    """A norm's parameters, where an op can stand for it on tokens of this width."""
    if parts.why_not_layer_norm("", norm) is not None or norm.weight.shape[0] != width:  # type: ignore[index]
        return None
    return parts.read_norm(norm, again)


def fitting(norm: Norm | None, x: Tensor) -> Norm | None:
    """The norm, where torch takes tokens of x's dtype beside its parameters; else torch's own checks are to be seen."""
    if norm is None:
        return None
    weight, bias = norm.weight, norm.bias
    assert weight is not None, "a norm without one is not read"
    if weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype):
        return norm
    mixed = bias is not None and bias.dtype != weight.dtype
    return None if mixed or parts.why_not_norm_dtypes(weight, x, norm.rms) is not None else norm


def _waiting(x: Tensor, read: _Read, out: Tensor, bias: Tensor | None, widen: bool) -> tuple[Tensor, Added]:
    """The stream, in the dtype of the sum to come, and what is to be added to it."""
    # the dtype that the scaled branch has where the modules run one by one: DropPath draws in it, the sum is in it
    gamma = read.gamma
    dtype = out.dtype if gamma is None else torch.promote_types(out.dtype, gamma.dtype)
    if widen and x.dtype != dtype:
        x = x.to(torch.promote_types(x.dtype, dtype))
    return x, Added(out, bias, gamma, parts.drop_path_factor(read.drop_path, out, dtype))


def added_now(x: Tensor, sublayer: Sublayer, out: Tensor, widen: bool) -> Tensor:
    """The sum by the modules themselves."""
    scale, drop_path = sublayer.factor(), sublayer.drop_path
    if isinstance(scale, Tensor):
        out = out * scale
    elif not parts.is_identity(scale):
        out = scale(out)  # type: ignore[misc]
    if not parts.is_identity(drop_path):
        out = drop_path(out)  # type: ignore[misc]
    return x + (out if widen else out.to(x.dtype))
