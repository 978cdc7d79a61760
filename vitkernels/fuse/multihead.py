"""torch.nn.MultiheadAttention, alone or inside a block: read by its weights, computed on `ops.attention`.

Its masks say what is left out, the ops' masks what takes part. A query whose keys are all left out gets zeros here, as
from torch's fused attention; torch's older paths (`need_weights`, inference) answer NaN.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.swap import Fused, branch_of, why_not_mask
from vitkernels.ops._check import refused
from vitkernels.ops._steps import Added, Norm
from vitkernels.residual import parts
from vitkernels.residual.genuine import why_not_weights
from vitkernels.residual.stream import Branch, Part, Step
from vitkernels.residual.sublayers import attention_step, join_heads, why_not_linears


class Masks(NamedTuple):
    """The masks of a call, as nn.MultiheadAttention takes them.

    Attributes:
        attn_mask: [Nq, Nk] or [B * H, Nq, Nk]: bool (True is left out) or floating point, added to the scores.
        key_padding_mask: [B, Nk], the same.
        is_causal: says that attn_mask is the causal one, which then need not be read.
    """

    attn_mask: Tensor | None = None
    key_padding_mask: Tensor | None = None
    is_causal: bool = False


class Names(NamedTuple):
    """What a module calls itself and the arguments that reach an attention."""

    owner: str = "MultiheadAttention"
    query: str = "query"
    key: str = "key"
    value: str = "value"
    attn_mask: str = "attn_mask"
    key_padding_mask: str = "key_padding_mask"
    is_causal: str = "is_causal"


NO_MASKS, NAMES = Masks(), Names()


def why_not_call(
    attn: Any, query: Tensor, key: Any, masks: Masks = NO_MASKS, value: Any = None, names: Names = NAMES
) -> str | None:
    """Why a call with these tensors belongs to torch's own code, or None when it does not.

    Args:
        attn: the attention; one that is not fused judges its calls itself.
        query, key: [B, N, D], or [N, B, D] without batch_first.
        masks: of the call.
        value: as key, where it is another.
        names: for the sentences of errors.

    Raises:
        TypeError: key or value is no tensor.
        ValueError: shapes that do not fit the attention or each other, or is_causal without a mask.
    """
    value = key if value is None else value
    for name, each in ((names.key, key), (names.value, value)):
        if not isinstance(each, Tensor):
            raise refused(
                TypeError, f"{names.owner}: argument '{name}' got {type(each).__name__}; needs a torch.Tensor"
            )
    if not query.dim() == key.dim() == value.dim() == 3:
        return "called without a batch"
    if key.is_nested or value.is_nested:
        return "called with a nested tensor"
    if not isinstance(attn, FusedMultiheadAttention):
        return None
    _check_tokens(attn, query, key, value, names)
    _check_masks(attn, query, key, masks, names)
    return why_not_mask(masks.attn_mask, query) or why_not_mask(masks.key_padding_mask, query)


class FusedMultiheadAttention(Fused):
    """torch.nn.MultiheadAttention on `ops.attention_qkv`, or on `ops.attention` where keys and queries differ.

    While attention's weights are dropped, torch's own attention stands between the fused projections.
    """

    axes = None
    reads = ("out_proj",)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        masks = Masks(attn_mask, key_padding_mask, is_causal)

        def why_not() -> str | None:
            reason = why_not_call(self, query, key, masks, value)  # first: a bad call is bad whoever computes
            return reason or ("called with need_weights=True" if need_weights else self.why_not_now())

        if self.declines(query, why_not):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        with self.backend():
            return self.output(query, key, value, masks, False)[0], None

    def why_not_now(self) -> str | None:
        attn: Any = self
        return why_not_weights(self) or why_not_linears(out_proj=attn.out_proj)

    def output(
        self, query: Tensor, key: Tensor, value: Tensor, masks: Masks, bias_apart: bool
    ) -> tuple[Tensor, Tensor | None]:
        """[B, N, D], or [N, B, D] without batch_first, as the query; as `parts.last_linear`."""
        attn: Any = self
        mask = _taking_part(attn, masks)
        is_causal = masks.key_padding_mask is None and masks.is_causal
        weight, dropout = attn.in_proj_weight, _dropout(attn)
        if query is key and key is value and weight is not None and not dropout and not _own_keys(attn):
            packed = _batch_first(attn, ops.linear(query, weight, attn.in_proj_bias))
            tokens = ops.attention_qkv(packed, attn.num_heads, attn_mask=mask, is_causal=is_causal)
        else:
            q, k, v = (
                _batch_first(attn, each).unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2)
                for each in _projections(attn, query, key, value)
            )
            if dropout:
                out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
            else:
                out = ops.attention(q, k, v, attn_mask=mask, is_causal=is_causal)
            tokens = join_heads(out)
        if attn.batch_first and not bias_apart and _in_parts(attn, query):
            # torch's own result lies in memory as [N, B, D], and a dropout after it draws in that order
            return parts.linear(attn.out_proj, tokens.transpose(0, 1)).transpose(0, 1), None
        return parts.last_linear(attn.out_proj, _batch_first(attn, tokens), bias_apart)

    def branch(self, masks: Masks = NO_MASKS, memory: Tensor | None = None, **options: Any) -> Branch:
        attn: Any = self

        def run(x: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            keys = x if memory is None else memory
            return self.output(x, keys, keys, masks, bias_apart)

        if _dropout(self) > 0:
            return Branch(run, "linear, linear", self, "a dropout of attention's weights")
        step = None
        # [N, B, D] goes by `run`: the tokens' axes are exchanged behind the projection
        if memory is None and attn.batch_first and attn.in_proj_weight is not None and not _own_keys(attn):
            is_causal = masks.key_padding_mask is None and masks.is_causal
            options = {"attn_mask": _taking_part(attn, masks), "is_causal": is_causal}
            packed = (attn.in_proj_weight, attn.in_proj_bias)
            whole = attention_step(lambda: packed, attn.out_proj, attn.num_heads, **options)
            step = _in_torch_order(attn, whole)
        return Branch(run, "linear, attention, linear", self, step=step)

    def parts(self) -> list[Part]:
        branch, why_not = self.branch(), self.why_not_now()
        return [Part("", "" if why_not else branch.ops, why_not or branch.why_not)]


def attention_branch(name: str, attn: nn.Module, masks: Masks = NO_MASKS, memory: Tensor | None = None) -> Branch:
    """The branch of a block: attn(x, x, x), or with memory attn(x, memory, memory); no attention weights are returned.

    Args:
        name: what the block calls the attention.
        attn: an nn.MultiheadAttention, called where it is not fused or may not be read.
        masks: of the call, for which `not_call` has no reason.
        memory: the encoder's tokens, for cross-attention.
    """

    def call(x: Tensor) -> Tensor:
        keys = x if memory is None else memory
        return attn(x, keys, keys, need_weights=False, **masks._asdict())[0]

    return branch_of(name, attn, call, masks=masks, memory=memory)


# ----------------------------------------------------------------------------------------------------------- pieces


def _in_parts(attn: Any, query: Tensor) -> bool:
    """Whether torch itself would run the module part by part: in eval and without gradients one kernel is all of it."""
    if (
        attn.training
        or attn.num_heads % 2
        or torch.is_autocast_enabled()
        or not torch.backends.mha.get_fastpath_enabled()
    ):
        return True
    return torch.is_grad_enabled() and (query.requires_grad or any(each.requires_grad for each in attn.parameters()))


def _in_torch_order(attn: Any, whole: Step) -> Step:
    """The branch laid out in memory as torch's own is, part by part as [N, B, D]: a dropout after it draws so."""

    def step(x: Tensor, added: Added | None, norm: Norm, bias_apart: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        total, out, bias = whole(x, added, norm, bias_apart)
        return (
            total,
            out if bias_apart or not _in_parts(attn, x) else out.transpose(0, 1).contiguous().transpose(0, 1),
            bias,
        )

    return step


def _dropout(attn: Any) -> float:
    return attn.dropout if attn.training else 0.0


def _own_keys(attn: Any) -> int:
    """How many keys the module adds to those of the call: a learned one, one of zeros."""
    return int(attn.bias_k is not None) + int(attn.add_zero_attn)


def _batch_first(attn: Any, tokens: Tensor) -> Tensor:
    """Between the module's order of axes and [B, N, D], either way; a view."""
    return tokens if attn.batch_first else tokens.transpose(0, 1)


def _check_tokens(attn: Any, query: Tensor, key: Tensor, value: Tensor, names: Names) -> None:
    given = ((names.query, query, "embed_dim"), (names.key, key, "kdim"), (names.value, value, "vdim"))
    for name, tensor, argument in given:
        width = getattr(attn, argument)
        if tensor.shape[-1] != width:
            raise refused(
                ValueError,
                f"{names.owner}: argument '{name}' has a last axis of {tensor.shape[-1]}; needs {argument}, {width}",
            )
    if key is not query:
        axis = 0 if attn.batch_first else 1
        if key.shape[axis] != query.shape[axis]:
            raise refused(
                ValueError,
                f"{names.owner}: argument '{names.key}' has a batch of {key.shape[axis]}; "
                f"needs {names.query}'s, {query.shape[axis]}",
            )
    if value is not key and value.shape[:2] != key.shape[:2]:
        raise refused(
            ValueError,
            f"{names.owner}: argument '{names.value}' has shape {list(value.shape)}; "
            f"needs {names.key}'s first two axes, {list(key.shape[:2])}",
        )


def _check_masks(attn: Any, query: Tensor, key: Tensor, masks: Masks, names: Names) -> None:
    attn_mask, padding, is_causal = masks
    if is_causal and attn_mask is None:
        raise refused(
            ValueError,
            f"{names.owner}: argument '{names.is_causal}' is True without {names.attn_mask}; needs the causal mask too",
        )
    batch, queries = query.shape[:2] if attn.batch_first else query.shape[1::-1]
    keys = key.shape[1 if attn.batch_first else 0]
    _check_mask(names.owner, names.attn_mask, attn_mask, [queries, keys], [batch * attn.num_heads, queries, keys])
    _check_mask(names.owner, names.key_padding_mask, padding, [batch, keys])


def _check_mask(owner: str, name: str, mask: Tensor | None, *shapes: list[int]) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise refused(TypeError, f"{owner}: argument '{name}' got {type(mask).__name__}; needs a torch.Tensor")
    if list(mask.shape) not in shapes:
        needed = " or ".join(map(str, shapes))
        raise refused(ValueError, f"{owner}: argument '{name}' has shape {list(mask.shape)}; needs {needed}")


def _taking_part(attn: Any, masks: Masks) -> Tensor | None:
    """The masks as one for the ops, broadcastable to [B, H, Nq, Nk]: bool (True takes part) or added to the scores."""
    mask, padding, is_causal = masks
    if is_causal and padding is None:
        return None
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (-1, attn.num_heads))
    if padding is not None:
        padding = padding[:, None, None]
    given = [each for each in (mask, padding) if each is not None]
    if not given:
        return None
    if own := _own_keys(attn):
        given = [F.pad(each, (0, own)) for each in given]  # nothing leaves them out
    if all(each.dtype == torch.bool for each in given):
        return ~(given[0] if len(given) == 1 else given[0] | given[1])
    dtype = next(each.dtype for each in given if each.dtype != torch.bool)
    first, *rest = [each if each.dtype != torch.bool else _added(each, dtype) for each in given]
    return first + rest[0] if rest else first


def _added(left_out: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as one that is added to the scores."""
    return left_out.new_zeros(left_out.shape, dtype=dtype).masked_fill(left_out, -math.inf)


def _projections(attn: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, axes as the call has them, k and v with the module's own keys behind them."""
    weight, bias, width = attn.in_proj_weight, attn.in_proj_bias, attn.embed_dim
    if weight is not None and query is key and key is value:
        q, k, v = ops.linear(query, weight, bias).chunk(3, -1)
    elif weight is not None and key is value:
        weights = weight.split([width, 2 * width])
        biases = (None, None) if bias is None else bias.split([width, 2 * width])
        q = ops.linear(query, weights[0], biases[0])
        k, v = ops.linear(key, weights[1], biases[1]).chunk(2, -1)
    else:
        separate = (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight)
        weights = separate if weight is None else weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (ops.linear(*each) for each in zip((query, key, value), weights, biases, strict=True))
    return q, _with_own(attn, k, attn.bias_k), _with_own(attn, v, attn.bias_v)


def _with_own(attn: Any, tokens: Tensor, learned: Tensor | None) -> Tensor:
    axis = 1 if attn.batch_first else 0
    if learned is not None:  # [1, 1, D]
        shape = list(tokens.shape)
        shape[axis] = 1
        tokens = torch.cat([tokens, learned.to(tokens.dtype).expand(shape)], dim=axis)
    if attn.add_zero_attn:
        zero = tokens.new_zeros(()).expand_as(tokens.narrow(axis, 0, 1))
        tokens = torch.cat([tokens, zero], dim=axis)
    return tokens
