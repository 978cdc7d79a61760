"""What `bench.tune` tunes: rows of `configs`, the tiles that could stand there, the call that each one serves."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitkernels.kernels import configs
from vitkernels.kernels.configs import Capability, Row, Table
from vitkernels.ops._amp import CODES

BATCH, ROWS = 256, 50432  # ViT-B/16 at 224


@dataclass(frozen=True)
class Slot:
    """One row of a table.

    Args:
        page: module under `vitkernels.kernels`.
        row: name of the row's compilation, as `make audit` prints it.
        op, direction: what is timed, with the page's launcher.
        arguments: the launcher's arguments for a seed, on the GPU, or for None on the meta device; a backward's come
            from a forward pass.
        tiles: what could stand in the row; the first is what stands there.
        put: a context in which a tile stands there.
    """

    page: str
    row: str
    op: str
    direction: str
    arguments: Callable[[int | None], tuple[Any, ...]]
    tiles: tuple[Any, ...]
    put: Callable[[Any], contextlib.AbstractContextManager[None]]


def slots(capability: Capability) -> list[Slot]:
    """Every slot, most worth a measurement first."""
    pages = (_attention, _add_layer_norm, _mlp, _patch_embed, _rotary)
    return [slot for page in pages for slot in page(capability)]


def _slots(
    table: Table[Any], capability: Capability, call: dict[str, int | bool], *names: Any,
    arguments: Callable[[int | None], tuple[Any, ...]],
) -> Iterator[Slot]:  # fmt: skip
    """The slot of the row that serves a call; none where no row does."""
    row: Row[Any] | None = table.row(capability, **call)
    if row is not None:
        tiles = table.candidates(table.pick(capability, **call))
        yield Slot(*names, arguments, tiles, functools.partial(table.standing, row))


def _draw(seed: int | None) -> Callable[..., Tensor]:
    if seed is None:
        return lambda *shape, gain=1.0, dtype=torch.bfloat16: torch.empty(shape, device="meta", dtype=dtype)
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int, gain: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(shape, generator=generator, device="cuda") * gain).to(dtype)

    return draw


# ---------------------------------------------------------------------------------------------------------- attention


def _attention(capability: Capability) -> Iterator[Slot]:
    for tokens, width, heads in ((197, 64, 12), (257, 80, 16)):
        for direction, table in configs.SHORT.items():
            call: dict[str, int | bool] = {"keys": tokens, "width": width, "masked": False}
            yield from _attention_slots(f"short {direction}", table, capability, call, tokens, width, heads, direction)
    for tokens in (577, 1370):
        for kernel, table in (
            ("forward", configs.LONG_FORWARD),
            ("dkdv", configs.LONG_DKDV),
            ("dq", configs.LONG_DQ),
        ):
            direction = "forward" if kernel == "forward" else "backward"
            call = {"width": 64, "float32": False, "image": False}
            yield from _attention_slots(f"long {kernel}", table, capability, call, tokens, 64, 16, direction)


def _attention_slots(
    kernel: str, table: Table[Any], capability: Capability, call: dict[str, int | bool], tokens: int, width: int,
    heads: int, direction: str,
) -> Iterator[Slot]:  # fmt: skip
    def arguments(seed: int | None) -> tuple[Any, ...]:
        from vitkernels.kernels import attention

        draw, batch = _draw(seed), BATCH if tokens <= 288 else 32
        qkv = draw(batch, tokens, 3 * heads * width)
        if direction == "forward":
            return qkv, heads, None, False, width**-0.5
        out, stats = attention.forward_qkv(qkv, heads, None, False, width**-0.5)
        return draw(*out.shape), qkv, out, stats, heads, None, False, width**-0.5, False

    names = "attention", f"attention {kernel} N={tokens} K={width} bf16", "attention_qkv", direction
    return _slots(table, capability, call, *names, arguments=arguments)


# ----------------------------------------------------------------------------------------------------- add_layer_norm


def _add_layer_norm(capability: Capability) -> Iterator[Slot]:
    for width in (384, 768):
        for name, direction, table in (
            ("forward", "forward", configs.LAYER_NORM_FORWARD),
            ("backward", "backward", configs.LAYER_NORM_BACKWARD),
            ("backward with scale", "backward", configs.LAYER_NORM_BACKWARD_SCALED),
        ):
            row = f"add_layer_norm {name}, bf16 residual, {ROWS}x{width}"
            arguments = _norm_arguments(width, direction, scaled="scale" in name)
            names = "add_layer_norm", row, "add_layer_norm", direction
            yield from _slots(table, capability, {"width": width}, *names, arguments=arguments)


def _norm_arguments(width: int, direction: str, scaled: bool) -> Callable[[int | None], tuple[Any, ...]]:
    def arguments(seed: int | None) -> tuple[Any, ...]:
        from vitkernels.kernels import add_layer_norm

        draw = _draw(seed)
        x, branch = (draw(BATCH, ROWS // BATCH, width) for _ in range(2))
        weight, bias, branch_bias, scale = (draw(width, dtype=torch.float32) for _ in range(4))
        extras = (branch_bias, scale) if scaled else (None, None)
        forward = (x, branch, weight, bias, 1e-6, *extras, None, CODES[torch.bfloat16])
        if direction == "forward":
            return forward
        total, _, mean, rstd = add_layer_norm.forward(*forward)
        needs = [True, True, True, True, scaled, scaled, False]
        kept = (total, branch if scaled else None, weight, mean, rstd, *extras, None)
        return draw(*x.shape), draw(*x.shape), *kept, torch.bfloat16, needs

    return arguments


# ---------------------------------------------------------------------------------------------------------------- mlp


def _mlp(capability: Capability) -> Iterator[Slot]:
    for direction, table in configs.MLP.items():
        names = "mlp", f"mlp {direction}, {ROWS}x3072x768 gelu", "mlp", direction
        yield from _slots(table, capability, {}, *names, arguments=_mlp_arguments(direction))


def _mlp_arguments(direction: str) -> Callable[[int | None], tuple[Any, ...]]:
    def arguments(seed: int | None) -> tuple[Any, ...]:
        from vitkernels.kernels import mlp

        draw, width = _draw(seed), 768
        w1, w2 = draw(4 * width, width, gain=width**-0.5), draw(width, 4 * width, gain=(4 * width) ** -0.5)
        x, b1, b2 = draw(ROWS, width), draw(4 * width), draw(width)
        forward = (x, w1, b1, w2, b2, "gelu", True)
        if direction == "forward":
            return forward
        return draw(ROWS, width), x, mlp.forward(*forward)[1], w1, w2, "gelu", [True] * 5

    return arguments


# -------------------------------------------------------------------------------------------------------- patch_embed


def _patch_embed(capability: Capability) -> Iterator[Slot]:
    call: dict[str, int | bool] = {"float32": False, "converted": False, "wide": True}
    for kernel, direction in (("embed", "forward"), ("weight_gradient", "backward")):
        names = "patch_embed", f"patch_embed {kernel} P=16 D=768 bf16 image, bf16", "patch_embed", direction
        yield from _slots(configs.PATCH_EMBED[kernel], capability, call, *names, arguments=_patch_arguments(direction))


def _patch_arguments(direction: str) -> Callable[[int | None], tuple[Any, ...]]:
    def arguments(seed: int | None) -> tuple[Any, ...]:
        draw, width = _draw(seed), 768
        image, weight = draw(BATCH, 3, 224, 224), draw(width, 3, 16, 16, gain=768**-0.5)
        bias, prefix, pos = draw(width), draw(1, width), draw(197, width)
        if direction == "forward":
            return image, weight, bias, None, None, prefix, pos, None
        return draw(BATCH, 197, width), image, weight, None, None, prefix, pos, None, [False, True, True, True, True]

    return arguments


# ------------------------------------------------------------------------------------------------------------- rotary


def _rotary(capability: Capability) -> Iterator[Slot]:
    """Forward alone: backward is the same kernel and as many bytes."""
    for kind in ("pairs", "halves"):
        for width in (64, 128):
            row = f"rotary forward, {kind}, bf16, {BATCH}x{ROWS // BATCH}x12x{width}"
            arguments = _rotary_arguments(width, kind == "halves")
            names = "rotary", row, "rotary", "forward"
            yield from _slots(configs.ROTARY, capability, {"width": width}, *names, arguments=arguments)


def _rotary_arguments(width: int, half: bool) -> Callable[[int | None], tuple[Any, ...]]:
    """q in a packed projection, behind a class token."""

    def arguments(seed: int | None) -> tuple[Any, ...]:
        draw, tokens = _draw(seed), ROWS // BATCH
        q = draw(BATCH, tokens, 3, 12, width)[:, :, 0].transpose(1, 2)
        angles = draw(1, 1, tokens - 1, width, gain=3.0, dtype=torch.float32)
        return q, angles.sin(), angles.cos(), 1, half

    return arguments


def source(tile: Any) -> str:
    """The tile as it is written in `configs`, defaults left out."""
    fields = (
        f"{field.name}={value!r}"
        for field in dataclasses.fields(tile)
        if (value := getattr(tile, field.name)) != field.default
    )
    return f"{type(tile).__name__}({', '.join(fields)})"
