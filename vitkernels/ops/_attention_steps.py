"""The steps whose product is self-attention between its two projections, with all that may stand between them.

    qkv    = linear(normed)
    placed = rotary_qkv(qkv)           norms of q and k, rotary positions; not in every model
    heads  = attention_qkv(placed)     or attention_varlen, of images laid end to end
    result = linear(heads)

Each is a launch of the op by that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkernels import ops
from vitkernels.ops import _check
from vitkernels.ops._plan import Launch
from vitkernels.ops._step import Step
from vitkernels.ops._windows import Windows
from vitkernels.ops.attention import check_packed, op_qkv, packed_options
from vitkernels.ops.attention_varlen import _check_qkv as check_varlen
from vitkernels.ops.attention_varlen import _check_values as check_ends
from vitkernels.ops.attention_varlen import op as op_varlen
from vitkernels.ops.linear import check as check_linear
from vitkernels.ops.linear import op as op_linear
from vitkernels.ops.rotary import with_four_axes
from vitkernels.ops.rotary_qkv import _check_args as check_rotary
from vitkernels.ops.rotary_qkv import _fixed as check_fixed
from vitkernels.ops.rotary_qkv import op as op_rotary


class HeadNorms(NamedTuple):
    """Norms of each head of q and of k, and how positions pair its elements: `ops.rotary_qkv`'s arguments."""

    half: bool = False
    norm: str | None = None
    q_weight: Tensor | None = None
    q_bias: Tensor | None = None
    k_weight: Tensor | None = None
    k_bias: Tensor | None = None
    eps: float = 1e-6


class Positions(NamedTuple):
    """Rotary positions of a call: `ops.rotary_qkv`'s arguments; a prefix of None is all tokens but the last ones, as
    many as there are positions."""

    sin: Tensor | None = None
    cos: Tensor | None = None
    prefix: int | None = 0

    def of(self, tokens: int) -> tuple[Tensor | None, Tensor | None, int]:
        """With the prefix of so many tokens."""
        sin, cos, prefix = self
        if prefix is None:
            prefix = 0 if sin is None else tokens - sin.shape[-2]
        return sin, cos, prefix


class Images(NamedTuple):
    """Images laid end to end, each of which attends to itself: `ops.attention_varlen`'s arguments."""

    cu_seqlens: Tensor
    max_seqlen: int


class Called(NamedTuple):
    """What a call brings to the scores: a mask, the rotary positions of q and k, where images end."""

    attn_mask: Tensor | None = None
    is_causal: bool = False
    positions: Positions = Positions()
    images: Images | None = None


NOTHING_BROUGHT = Called()


def between(packed: Tensor, num_heads: int, norms: HeadNorms, called: Called, scale: float | None = None) -> Tensor:
    """What stands between the projections, through the public ops.

    Args:
        packed: [B, N, 3 * D]; of images laid end to end [..., 3 * D].
        num_heads, scale: as in `ops.attention_qkv`.
        norms, called: of q and k, and of the call.

    Returns:
        The heads' outputs side by side, [B, N, D] or [..., D].
    """
    attn_mask, is_causal, positions, images = called
    shape, width = packed.shape, packed.shape[-1] // (3 * num_heads)
    if images is not None:
        packed = packed.reshape(1, -1, shape[-1])
    if norms.norm is not None or positions.sin is not None:
        sin, cos, prefix = positions.of(packed.shape[1])
        parted = packed.unflatten(-1, (3, num_heads, width))
        packed = ops.rotary_qkv(parted, sin, cos, prefix=prefix, **norms._asdict()).flatten(-3)
    if images is None:
        return ops.attention_qkv(packed, num_heads, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    heads = ops.attention_varlen(packed.view(-1, 3, num_heads, width), *images, is_causal=is_causal, scale=scale)
    return heads.reshape(*shape[:-1], num_heads * width)


class _Given(NamedTuple):
    """The arguments of any of the steps."""

    qkv_weight: Tensor
    qkv_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None
    num_heads: int
    scale: float | None
    windows: Windows | None
    norms: HeadNorms | None
    mask: Tensor | None
    is_causal: bool
    positions: Positions
    images: Images | None

    def options(self, qkv: Tensor) -> tuple[Any, ...]:
        """What the schema of `attention_qkv` has after the projection."""
        return packed_options(qkv, self.num_heads, self.mask, self.is_causal, self.scale)

    def lengths(self, parted: Tensor) -> tuple[Any, ...]:
        """What the schema of `attention_varlen` has after q, k and v."""
        assert self.images is not None
        ends, longest = self.images
        scale = _check.scale("attention_varlen", self.scale, parted.shape[-1])
        return ends, ends, longest, longest, self.is_causal, scale

    def parted(self, packed: Tensor) -> Tensor:
        """[B, N, 3 * D] as [B, N, 3, H, K]; of images laid end to end [1, T, 3, H, K]. A view."""
        batches = packed.shape[:2] if self.images is None else (1, -1)
        return packed.view(*batches, 3, self.num_heads, packed.shape[-1] // (3 * self.num_heads))

    def turns(self) -> bool:
        """Whether `rotary_qkv` has anything to do."""
        return self.norms is not None and (self.norms.norm is not None or self.positions.sin is not None)

    def rotary(self, parted: Tensor) -> tuple[Any, ...]:
        """What the schema of `rotary_qkv` has after the projection."""
        assert self.norms is not None
        sin, cos, prefix = self.positions.of(parted.shape[1])
        half, norm, *vectors, eps = self.norms
        tables = (each if each is None else with_four_axes(each) for each in (sin, cos))
        return (*tables, prefix, half, norm or "none", *vectors, eps)


_FIRST = 7  # arguments that all of the steps have: weights, biases, num_heads, scale, windows
_NORMS = len(HeadNorms._fields)


def _given(arguments: Sequence[Any]) -> _Given:
    """Parameters and what is fixed come first, then what each call brings."""
    first: Any = arguments[:_FIRST]
    rest: Any = arguments[_FIRST:]
    norms = None
    if len(rest) > 2:
        norms, rest = HeadNorms(*rest[:_NORMS]), rest[_NORMS:]
    mask, is_causal, *more = rest
    images = Images(*more[3:]) if len(more) > 3 else None
    return _Given(*first, norms, mask, is_causal, Positions(*more[:3]), images)  # type: ignore[call-arg]


def _check_attention(x: Tensor, *arguments: Any) -> None:
    sin, cos, _ = _given(arguments[:-1]).positions
    if sin is not None and cos is not None:
        check_fixed("sin", sin), check_fixed("cos", cos)
    _check_shapes(x, *arguments)


@_check.once
def _check_shapes(x: Tensor, *arguments: Any) -> None:
    given, dtype = _given(arguments[:-1]), arguments[-1]
    weight = given.qkv_weight
    if given.images is not None:
        batches = torch.Size([1, x.shape[:-1].numel()])
    elif given.windows is None:
        _check.has_rank("attention", "x", x, "[B, N, D]")
        batches = x.shape[:2]
    else:
        given.windows.check(x)
        batches = torch.Size([x.shape[0] * given.windows.per_image, given.windows.tokens])
    check_linear(x, weight, given.qkv_bias, dtype)
    packed = x.new_empty(1).expand(*batches, weight.shape[0])  # as the projection will be
    check_packed(packed, given.num_heads, given.mask, given.is_causal)
    if given.images is not None:
        check_varlen(packed.view(-1, 3, given.num_heads, packed.shape[-1] // (3 * given.num_heads)), *given.images)
    if given.norms is not None and given.turns():
        _, norm, *vectors, _ = given.norms
        parted = packed.unflatten(-1, (3, given.num_heads, -1))
        check_rotary(parted, *given.positions.of(batches[1]), norm, *vectors)
    check_linear(packed[..., : weight.shape[0] // 3], given.proj_weight, given.proj_bias, dtype)


def _by_ops(normed: Tensor, *arguments: Any) -> Tensor:
    given = _given(arguments)
    windows = given.windows
    tokens = normed if windows is None else windows.made(normed)
    qkv = ops.linear(tokens, given.qkv_weight, given.qkv_bias)
    called = Called(given.mask, given.is_causal, given.positions, given.images)
    heads = between(qkv, given.num_heads, given.norms or HeadNorms(), called, given.scale)
    out = ops.linear(heads, given.proj_weight, given.proj_bias)
    return out if windows is None else windows.undone(out, torch.Size([*normed.shape[:-1], out.shape[-1]]))


def _forward(launch: Launch, normed: Tensor, learns: bool, *arguments: Any) -> tuple[Tensor, tuple[Any, ...]]:
    given = _given(arguments)
    windows = given.windows
    tokens = normed if windows is None else windows.made(normed)
    qkv = launch("qkv", op_linear, tokens, given.qkv_weight, given.qkv_bias)
    placed, more = qkv, []
    if given.norms is not None:
        more = [None if given.norms.norm is None else qkv]
    if given.turns():
        parted = given.parted(qkv)
        placed = launch("rotary", op_rotary, parted, *given.rotary(parted)).view(qkv.shape)
    if given.images is None:
        heads, statistics = launch("attention", op_qkv, placed, *given.options(placed))
    else:
        parted = given.parted(placed)[0]
        heads, statistics = launch("attention", op_varlen, parted, None, None, *given.lengths(parted))
        heads = heads.view(*qkv.shape[:-1], qkv.shape[-1] // 3)
    # the projection takes each token by itself: windows may be undone before it as well
    rows = heads if windows is None else windows.undone(heads, torch.Size([*normed.shape[:-1], heads.shape[-1]]))
    out = launch("proj", op_linear, rows, given.proj_weight, given.proj_bias)
    return out, (placed, heads, statistics, *more)


def _backward(launch, dy, normed, needs, arguments, kept, grad_dtype):
    given = _given(arguments)
    need: Any = _given(needs[1:])
    place: Any = _given(range(1, 1 + len(arguments)))
    windows, norms = given.windows, given.norms
    placed, heads, statistics, *more = kept
    if placed is None:  # of norms: made again as they are
        parted = given.parted(more[0])
        with torch.no_grad():
            placed = op_rotary(parted, *given.rotary(parted)).view(more[0].shape)
    if windows is not None:  # the same products, of rows in another order
        shape = normed.shape
        dy, normed = windows.made(dy), windows.made(normed)
    needs_packed = [needs[0], need.qkv_weight, need.qkv_bias]
    needs_norms = [] if norms is None else list(need.norms[2:6])
    needs_qkv = any(needs_packed)
    needs_heads = needs_qkv or any(needs_norms) or need.mask
    grads: list[Tensor | None] = [None] * len(needs)
    found: list[tuple[int, bool, Tensor]] = []  # places, whether they are asked for, gradients

    wanted = [needs_heads, need.proj_weight, need.proj_bias]
    dheads, *proj = launch("proj", op_linear, dy, heads, given.proj_weight, wanted, grad_dtype)
    found += zip((place.proj_weight, place.proj_bias), wanted[1:], proj, strict=True)
    if needs_heads:
        if given.images is None:
            asked = (*given.options(placed), need.mask)
            dqkv, dmask = launch("attention", op_qkv, dheads, placed, heads, statistics, *asked)
        else:
            parted = given.parted(placed)[0]
            dout, out = (each.view(len(parted), *parted.shape[2:]) for each in (dheads, heads))
            varlen = (parted, None, None, out, statistics, *given.lengths(parted))
            dqkv, _, dmask = launch("attention", op_varlen, dout, *varlen)
            dqkv = dqkv.view(placed.shape)
        if given.mask is not None and need.mask:  # else it is a stand-in
            grads[place.mask] = dmask.reshape(given.mask.shape)
        if given.turns() and (needs_qkv or any(needs_norms)):
            (qkv,) = more
            dplaced = given.parted(dqkv)
            sin, cos, prefix, half, norm, q_weight, _, k_weight, _, eps = given.rotary(dplaced)
            before = None if qkv is None else given.parted(qkv)
            fixed = (sin, cos, prefix, half, norm, q_weight, k_weight, eps)
            dparted, *vectors = launch("rotary", op_rotary, dplaced, before, *fixed, [needs_qkv, *needs_norms])
            found += zip(place.norms[2:6], needs_norms, vectors, strict=True)
            dqkv = dparted.view(dqkv.shape) if needs_qkv else dqkv
        if needs_qkv:  # else the mask or the norms alone learn
            dx, *packed = launch("qkv", op_linear, dqkv, normed, given.qkv_weight, needs_packed, grad_dtype)
            found += zip((place.qkv_weight, place.qkv_bias), needs_packed[1:], packed, strict=True)
            if needs[0]:
                grads[0] = dx if windows is None else windows.undone(dx, shape)
    for at, is_asked, grad in found:
        grads[at] = grad if is_asked else None
    return grads


def _check_ends(x: Tensor, *arguments: Any) -> None:
    ends, longest = arguments[-2:]
    check_ends("cu_seqlens", ends, "max_seqlen", longest, x.shape[:-1].numel())


def _step(name: str, keeps: int, **more: Any) -> Step:
    parts = (name, _check_attention, _by_ops, _forward, _backward)
    return Step(*parts, weights=(0, 2), biases=(1, 3), keeps=keeps, op=op_linear, **more)


ATTENTION = _step("attention", keeps=3)  # (weights, biases, num_heads, scale, windows, mask, is_causal)
# (weights, biases, num_heads, scale, windows, *HeadNorms, mask, is_causal, *Positions)
ROTARY_ATTENTION = _step("rotary_attention", keeps=4, spares=(0, 3))
PACKED_ATTENTION = _step("packed_attention", keeps=4, spares=(0, 3), check_values=_check_ends)  # the same, and *Images


def brought(step: Step, called: Called) -> tuple[Any, ...]:
    """What a call brings, as the last arguments of one of these steps."""
    attn_mask, is_causal, positions, images = called
    return (attn_mask, is_causal) if step is ATTENTION else (attn_mask, is_causal, *positions, *(images or ()))
