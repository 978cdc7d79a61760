"""patch_embed: image to tokens in one op: patchify, normalise, project, add positions, prepend prefix tokens.

    tokens = [prefix + pos[:R],  unfold((image / 255 - mean) / std) @ weight^T + bias + pos[R:]]

This is the front of the Vision Transformer (Dosovitskiy et al. 2020), which tutorials write as unfold + matmul (DNN) or
as a strided convolution (CNN). The unfolded patches and a float copy of a uint8 image are never in memory whole. With
`keep` only some patches are read, as in masked autoencoders (He et al. 2021).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitkernels.op import Op
from vitkernels.ops import _check
from vitkernels.ops._amp import accumulate_dtype, autocast_dtype, cast, given, nothing, wide

NAME = "patch_embed"


def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    prefix: Tensor | None = None,
    pos_embed: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Project the patches of an image and lay them out as a Transformer's input.

    Args:
        image: [B, C, H, W], floating point or uint8 (then scaled to [0, 1] first), any strides.
        weight: [D, C, P, P] as Conv2d stores it; H and W are multiples of P. The product runs in its dtype (under
            autocast, autocast's). In float32 it rounds to TF32 on a GPU where `torch.backends.cuda.matmul` allows it;
            cuDNN's setting for convolutions, which allows it by default, is not followed, so that the first product
            is as exact as the model's others.
        bias: [D] or None.
        mean, std: C numbers each, in [0, 1] pixel units: (pixel - mean) / std.
        prefix: [R, D], tokens put before the patches (class token, registers).
        pos_embed: [R + N, D], or [N, D] for the patches alone, where N = (H / P) * (W / P).
        keep: [B, M] int64, the patches of each image to read, by row-major index; the others are left out.

    Returns:
        [B, R + N, D] (with keep, [B, R + M, D]), in the widest of weight's, prefix's and pos_embed's dtypes.

    Raises:
        TypeError: dtypes other than those above.
        ValueError: shapes that do not fit, tensors on different devices, a std of 0, NaN in pos_embed, an index in keep
            out of range or twice for an image (values are looked at on the CPU alone: on a GPU it would stall the
            stream).
    """
    optional = {"bias": bias, "prefix": prefix, "pos_embed": pos_embed, "keep": keep}
    _check.is_tensor(NAME, image=image, weight=weight, optional=optional)
    _check.is_floating(NAME, weight=weight, bias=bias, prefix=prefix, pos_embed=pos_embed)
    if image.dtype != torch.uint8 and image.dtype not in _check.FLOATING:
        raise TypeError(f"{NAME}: argument 'image' has dtype {image.dtype}; needs uint8 or floating point")
    _check.has_rank(NAME, "image", image, "[B, C, H, W]")
    _check.has_rank(NAME, "weight", weight, "[D, C, P, P]")
    width, channels, *patch = weight.shape
    _check.has_shape(NAME, "weight", weight, (width, image.shape[1], *patch), "image's channels")
    _check.has_shape(NAME, "bias", bias, (width,), "weight's first axis")
    if 0 in patch:
        raise ValueError(f"{NAME}: argument 'weight' has shape {list(weight.shape)}; needs a patch of 1 or more")
    for size, side, axis in zip(image.shape[2:], patch, ("height", "width"), strict=True):
        if size < side:
            raise ValueError(f"{NAME}: argument 'image' has a {axis} of {size}; needs at least one patch of {side}")
        if size % side != 0:
            raise ValueError(
                f"{NAME}: argument 'image' has a {axis} of {size}; needs a multiple of the patch size {side}"
            )
    patches = (image.shape[2] // patch[0]) * (image.shape[3] // patch[1])
    prefixes = 0
    if prefix is not None:
        _check.has_rank(NAME, "prefix", prefix, "[R, D]")
        _check.has_shape(NAME, "prefix", prefix, (prefix.shape[0], width), "weight's first axis")
        prefixes = prefix.shape[0]
    if pos_embed is not None:
        _check.has_rank(NAME, "pos_embed", pos_embed, "[R + N, D]")
        rows = patches if pos_embed.shape[0] == patches else prefixes + patches
        _check.has_shape(NAME, "pos_embed", pos_embed, (rows, width), "prefix tokens and patches")
    if keep is not None:
        _check_keep(keep, image.shape[0])
    mean, std = _check_pixels("mean", mean, channels), _check_pixels("std", std, channels)
    if std is not None and 0.0 in std:
        raise ValueError(f"{NAME}: argument 'std' is {std}; needs numbers other than 0")
    _check_values(pos_embed, keep, patches)
    dtype = autocast_dtype(weight)
    _check.same_dtype(NAME, dtype, weight=weight, bias=bias)
    if dtype is not None:
        weight, bias = cast(dtype, weight, bias)
    return op(image, weight, bias, mean, std, prefix, pos_embed, keep)


def _check_keep(keep: Tensor, batch: int) -> None:
    if keep.dtype != torch.int64:
        raise TypeError(f"{NAME}: argument 'keep' has dtype {keep.dtype}; needs int64")
    _check.has_rank(NAME, "keep", keep, "[B, M]")
    _check.has_shape(NAME, "keep", keep, (batch, keep.shape[1]), "image's batch")
    if keep.shape[1] == 0:
        raise ValueError(f"{NAME}: argument 'keep' has shape {list(keep.shape)}; needs a patch of each image or more")


def _check_pixels(name: str, values: Sequence[float] | None, channels: int) -> list[float] | None:
    if values is None:
        return None
    numbers = [float(value) for value in values]
    if len(numbers) != channels:
        raise ValueError(f"{NAME}: argument '{name}' has {len(numbers)} numbers; needs {channels}, one a channel")
    return numbers


def _check_values(pos_embed: Tensor | None, keep: Tensor | None, patches: int) -> None:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    # plain tensors alone: a fake or a sharded one has no values to look at
    if type(pos_embed) in (Tensor, torch.nn.Parameter) and pos_embed is not None and pos_embed.device.type == "cpu":
        rows = pos_embed.isnan().any(-1).nonzero().flatten().tolist()
        if rows:
            raise ValueError(
                f"{NAME}: argument 'pos_embed' holds NaN in {len(rows)} rows, the first {rows[0]}; needs numbers"
            )
    if type(keep) is Tensor and keep.device.type == "cpu" and keep.numel():
        low, high = (bound.item() for bound in keep.aminmax())
        if low < 0 or high >= patches:
            raise ValueError(
                f"{NAME}: argument 'keep' holds indices from {low} to {high}; needs 0 to {patches - 1}, the patches"
            )
        ordered = keep.sort(1).values
        doubled = (ordered[:, 1:] == ordered[:, :-1]).nonzero()
        if len(doubled):
            image, at = doubled[0].tolist()
            raise ValueError(
                f"{NAME}: argument 'keep' holds index {ordered[image, at]} twice for image {image}; needs each once"
            )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    image, weight, _, ctx.mean, ctx.std, prefix, pos_embed, keep = inputs
    ctx.save_for_backward(image, weight, prefix, pos_embed, keep)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 8
    image, weight, prefix, pos_embed, keep = ctx.saved_tensors
    image_, weight_, bias_, _, _, prefix_, pos_embed_, *_ = ctx.needs_input_grad
    needs = [image_, weight_, bias_, prefix_, pos_embed_]
    grads = op.backward(dout, image, weight, ctx.mean, ctx.std, prefix, pos_embed, keep, needs)
    dimage, dweight, dbias, dprefix, dpos = (given(need, grad) for need, grad in zip(needs, grads, strict=True))
    return dimage, dweight, dbias, None, None, dprefix, dpos, None


def _out_dtype(weight: Tensor, prefix: Tensor | None, pos_embed: Tensor | None) -> torch.dtype:
    dtypes = [tensor.dtype for tensor in (weight, prefix, pos_embed) if tensor is not None]
    return functools.reduce(torch.promote_types, dtypes)


def _fake(image, weight, bias, mean, std, prefix, pos_embed, keep):
    patches = (image.shape[2] // weight.shape[2]) * (image.shape[3] // weight.shape[3])
    tokens = (patches if keep is None else keep.shape[1]) + (0 if prefix is None else prefix.shape[0])
    return image.new_empty(image.shape[0], tokens, weight.shape[0], dtype=_out_dtype(weight, prefix, pos_embed))


def _fake_backward(dout, image, weight, mean, std, prefix, pos_embed, keep, needs):
    return (
        image.new_empty(image.shape) if needs[0] else nothing(weight),
        weight.new_empty(weight.shape) if needs[1] else nothing(weight),
        weight.new_empty(weight.shape[:1]) if needs[2] else nothing(weight),
        prefix.new_empty(prefix.shape) if needs[3] else nothing(weight),
        pos_embed.new_empty(pos_embed.shape) if needs[4] else nothing(weight),
    )


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def _unfold(image: Tensor, weight: Tensor, mean, std) -> Tensor:
    """[B, C, H, W] -> [B, N, C * P * P], scaled and normalised, in the dtype that weight computes in."""
    pixels = image.to(accumulate_dtype(weight.dtype))
    if image.dtype == torch.uint8:
        pixels = pixels / 255
    if mean is not None:
        pixels = pixels - _per_channel(mean, pixels)
    if std is not None:
        pixels = pixels / _per_channel(std, pixels)
    rows, columns = weight.shape[2:]
    grid = pixels.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))  # [B, C, H/P, P, W/P, P]
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _take(tokens: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return tokens
    return tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _reference(image, weight, bias, mean, std, prefix, pos_embed, keep):
    tokens = _take(_unfold(image, weight, mean, std), keep) @ wide(weight).flatten(1).t()
    if bias is not None:
        tokens = tokens + wide(bias)
    tokens = wide(tokens.to(weight.dtype))  # as nn.Conv2d hands it on; positions of a wider dtype widen it again
    batch, prefixes = image.shape[0], 0 if prefix is None else prefix.shape[0]
    if prefix is not None:
        tokens = torch.cat([wide(prefix).expand(batch, -1, -1), tokens], dim=1)
    if pos_embed is not None:
        table = wide(pos_embed)
        patches = (image.shape[2] // weight.shape[2]) * (image.shape[3] // weight.shape[3])
        if table.shape[0] == patches:
            table = torch.cat([table.new_zeros(prefixes, table.shape[1]), table])
        table = table.expand(batch, -1, -1)
        tokens = tokens + torch.cat([table[:, :prefixes], _take(table[:, prefixes:], keep)], dim=1)
    return tokens.to(_out_dtype(weight, prefix, pos_embed)).contiguous()


def _reference_backward(dout, image, weight, mean, std, prefix, pos_embed, keep, needs):
    prefixes = 0 if prefix is None else prefix.shape[0]
    width, channels, rows, columns = weight.shape
    g = wide(dout)
    dtokens = g[:, prefixes:]
    dimage = dweight = dbias = dprefix = dpos = nothing(weight)
    if needs[0]:
        down, across = image.shape[2] // rows, image.shape[3] // columns
        # a patch is cast to weight's dtype before the product, so its gradient comes back in that dtype
        dpatches = wide((dtokens @ wide(weight).flatten(1).to(g.dtype)).to(weight.dtype))
        if keep is not None:
            dpatches = dpatches.new_zeros(image.shape[0], down * across, dpatches.shape[2]).scatter_add_(
                1, keep.unsqueeze(-1).expand(-1, -1, dpatches.shape[2]), dpatches
            )
        grid = dpatches.unflatten(2, (channels, rows, columns)).unflatten(1, (down, across))
        dimage = grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        if std is not None:
            dimage = dimage / _per_channel(std, dimage)
        dimage = dimage.to(image.dtype).contiguous()
    if needs[1]:
        patches = _take(_unfold(image, weight, mean, std), keep).flatten(0, 1)
        dweight = (dtokens.flatten(0, 1).t() @ patches.to(g.dtype)).reshape(weight.shape).to(weight.dtype)
    if needs[2]:
        dbias = dtokens.sum((0, 1)).to(weight.dtype)
    if needs[3]:
        dprefix = g[:, :prefixes].sum(0).to(prefix.dtype)
    if needs[4]:
        patches = (image.shape[2] // rows) * (image.shape[3] // columns)
        if keep is None:
            table = g.sum(0)
        else:
            index = keep.reshape(-1, 1).expand(-1, width)
            table = g.new_zeros(patches, width).scatter_add_(0, index, dtokens.flatten(0, 1))
            table = torch.cat([g[:, :prefixes].sum(0), table])
        dpos = table[table.shape[0] - pos_embed.shape[0] :].to(pos_embed.dtype).clone()
    return dimage, dweight, dbias, dprefix, dpos


op = Op(
    NAME,
    "(Tensor image, Tensor weight, Tensor? bias, float[]? mean, float[]? std, Tensor? prefix, Tensor? pos_embed, "
    "Tensor? keep) -> Tensor",
    "(Tensor dout, Tensor image, Tensor weight, float[]? mean, float[]? std, Tensor? prefix, Tensor? pos_embed, "
    "Tensor? keep, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradients=_gradients,
)
op.register("reference", _reference, _reference_backward)
