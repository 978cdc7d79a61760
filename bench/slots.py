"""What `bench.tune` tunes: rows of `configs.py`, the tiles that could stand there, the call that each one serves."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitkernels.kernels import configs
from vitkernels.kernels.configs import (
    AttentionLong,
    AttentionShort,
    AttentionTile,
    Capability,
    PatchEmbedTile,
    ProductTile,
    RotaryTile,
    RowTile,
)

Patch = tuple[str, Any]  # name in `configs`, and what stands there instead
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
        patch: how a tile is put there.
    """

    page: str
    row: str
    op: str
    direction: str
    arguments: Callable[[int | None], tuple[Any, ...]]
    tiles: tuple[Any, ...]
    patch: Callable[[Any], Patch]


def slots(capability: Capability) -> list[Slot]:
    """Every slot, most worth a measurement first."""
    return [*_attention(capability), *_add_layer_norm(), *_mlp(capability), *_patch_embed(capability), *_rotary()]


def _grid(now: Any, **values: Sequence[Any]) -> tuple[Any, ...]:
    """What stands there, then the tiles that differ from it in the named fields; all spills are forbidden to those."""
    grid = (dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values()))
    fresh = {"spills": 0} if hasattr(now, "spills") else {}
    return tuple(dict.fromkeys([now, *(dataclasses.replace(now, **fresh, **fields) for fields in grid)]))


def _row(table: str, value: Callable[[Any], Any]) -> Callable[[Any], Patch]:
    """The patch that puts a tile, or what is made of it, in a table's place."""
    return lambda tile: (table, value(tile))


def _draw(seed: int | None) -> Callable[..., Tensor]:
    if seed is None:
        return lambda *shape, gain=1.0, dtype=torch.bfloat16: torch.empty(shape, device="meta", dtype=dtype)
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int, gain: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(shape, generator=generator, device="cuda") * gain).to(dtype)

    return draw


# ---------------------------------------------------------------------------------------------------------- attention


def _attention(capability: Capability) -> Iterator[Slot]:
    chip = configs.chip(capability)
    for tokens, width, heads in ((197, 64, 12), (257, 80, 16)):
        for direction, table in (("forward", "SHORT_FORWARD"), ("backward", "SHORT_BACKWARD")):
            now = configs.attention_short(direction, tokens, False, width, False, capability)
            if now is None:
                continue
            more: dict[str, Sequence[Any]] = {"stages": (1, 2)}
            if direction == "forward":
                more = {"maxnreg": (None, 168, 128)}
            yield _attention_slot(
                f"short {direction}_kernel", tokens, width, heads, direction,
                _grid(now, queries=(16, 32, 64, 128), warps=(4, 8), **more),
                _row(table, lambda tile: {chip: (AttentionShort(288, 128, tile),)}),
            )  # fmt: skip
    for tokens in (577, 1370):
        row = configs.attention_long(64, False, capability)
        for field, queries in (("forward", (64, 128)), ("dkdv", (16, 32, 64)), ("dq", (64, 128))):
            yield _attention_slot(
                f"long {field}_kernel", tokens, 64, 16, "forward" if field == "forward" else "backward",
                _grid(getattr(row, field), queries=queries, keys=(32, 64, 128), warps=(4, 8), stages=(1, 2, 3)),
                _row("LONG", functools.partial(_long, chip, row, field)),
            )  # fmt: skip


def _long(chip: int, row: AttentionLong, field: str, tile: AttentionTile) -> dict[int, dict[int, AttentionLong]]:
    """The long kernels' table with another tile in one field of its row."""
    return {chip: {128: dataclasses.replace(row, **{field: tile})}}


def _attention_slot(
    kernel: str, tokens: int, width: int, heads: int, direction: str, tiles: tuple[AttentionTile, ...],
    patch: Callable[[AttentionTile], Patch],
) -> Slot:  # fmt: skip
    def arguments(seed: int | None) -> tuple[Any, ...]:
        from vitkernels.kernels import attention

        draw, batch = _draw(seed), BATCH if tokens <= 288 else 32
        qkv = draw(batch, tokens, 3 * heads * width)
        if direction == "forward":
            return qkv, heads, None, False, width**-0.5
        out, stats = attention.forward_qkv(qkv, heads, None, False, width**-0.5)
        return draw(*out.shape), qkv, out, stats, heads, None, False, width**-0.5, False

    row = f"attention {kernel} N={tokens} K={width} bf16"
    return Slot("attention", row, "attention_qkv", direction, arguments, tiles, patch)


# ----------------------------------------------------------------------------------------------------- add_layer_norm


def _add_layer_norm() -> Iterator[Slot]:
    for width in (384, 768):
        for name, direction, table in (
            ("forward", "forward", "LAYER_NORM_FORWARD"),
            ("backward", "backward", "LAYER_NORM_BACKWARD"),
            ("backward with scale", "backward", "LAYER_NORM_BACKWARD_SCALED"),
        ):
            now = configs.pick_row_tile(getattr(configs, table), width)
            more: Mapping[str, Sequence[Any]] = {"rows": (1, 2, 4, 8)}
            if direction == "backward":
                more = {"rows": (1, 2, 4), "stages": (1, 2), "programs": (2, 3, 4, 6, 8)}
            yield Slot(
                "add_layer_norm", f"add_layer_norm {name}, bf16 residual, {ROWS}x{width}", "add_layer_norm", direction,
                _norm_arguments(width, direction, scaled="scale" in name),
                _grid(now, warps=(1, 2, 4, 8) if direction == "forward" else (2, 4, 8), **more),
                _row(table, lambda tile: (tile,)),
            )  # fmt: skip


def _norm_arguments(width: int, direction: str, scaled: bool) -> Callable[[int | None], tuple[Any, ...]]:
    def arguments(seed: int | None) -> tuple[Any, ...]:
        from vitkernels.kernels import add_layer_norm

        draw = _draw(seed)
        x, branch = (draw(BATCH, ROWS // BATCH, width) for _ in range(2))
        weight, bias, branch_bias, scale = (draw(width, dtype=torch.float32) for _ in range(4))
        extras = (branch_bias, scale) if scaled else (None, None)
        forward = (x, branch, weight, bias, 1e-6, *extras, None, torch.bfloat16)
        if direction == "forward":
            return forward
        total, _, mean, rstd = add_layer_norm.forward(*forward)
        needs = [True, True, True, True, scaled, scaled, False]
        kept = (total, branch if scaled else None, weight, mean, rstd, *extras, None)
        return draw(*x.shape), draw(*x.shape), *kept, torch.bfloat16, needs

    return arguments


# ---------------------------------------------------------------------------------------------------------------- mlp


def _mlp(capability: Capability) -> Iterator[Slot]:
    chip = configs.chip(capability)
    for direction, table in (("forward", "MLP_FORWARD"), ("backward", "MLP_BACKWARD")):
        now = configs.pick_product_tile(getattr(configs, table), capability)
        found = [
            tile
            for rows, columns in ((128, 128), (128, 256), (256, 128), (64, 256))
            for tile in _grid(
                now,
                rows=(rows,),
                columns=(columns,),
                stages=(3, 4),
                pieces=(2, 4),
                programs=(1, 2),
                maxnreg=(None, 128),
            )
            if tile.maxnreg is None or tile.programs == 2
        ]
        yield Slot(
            "mlp", f"mlp {direction}, {ROWS}x3072x768 gelu", "mlp", direction, _mlp_arguments(direction),
            tuple(dict.fromkeys([now, *found])), _row(table, lambda tile: {chip: tile}),
        )  # fmt: skip


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
    for kernel, direction in (("embed", "forward"), ("weight_gradient", "backward")):
        now = configs.patch_embed(kernel, 768, True, False, False, capability)
        tiles = _grid(now, rows=(64, 128, 256), columns=(128, 256), warps=(4, 8), stages=(2, 3, 4))
        yield Slot(
            "patch_embed", f"patch_embed {kernel} P=16 D=768 bf16 image, bf16", "patch_embed", direction,
            _patch_arguments(direction), tiles, _row("patch_embed", functools.partial(_instead, kernel)),
        )  # fmt: skip


def _instead(kernel: str, tile: PatchEmbedTile) -> Callable[..., PatchEmbedTile]:
    """`configs.patch_embed` with another answer for one kernel."""
    pick = configs.patch_embed
    return lambda name, *key: tile if name == kernel else pick(name, *key)


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


def _rotary() -> Iterator[Slot]:
    """Forward alone: backward is the same kernel and as many bytes."""
    for kind in ("pairs", "halves"):
        for width in (64, 128):
            now = configs.pick_rotary_tile(width)
            yield Slot(
                "rotary", f"rotary forward, {kind}, bf16, {BATCH}x{ROWS // BATCH}x12x{width}", "rotary", "forward",
                _rotary_arguments(width, kind == "halves"),
                _grid(now, tokens=(8, 16, 32, 64), heads=(1, 2, 4, 12), warps=(2, 4, 8)),
                _row("ROTARY", _instead_of_its_width),
            )  # fmt: skip


def _instead_of_its_width(tile: RotaryTile) -> tuple[RotaryTile, ...]:
    return tuple(tile if each.width == tile.width else each for each in configs.ROTARY)


def _rotary_arguments(width: int, half: bool) -> Callable[[int | None], tuple[Any, ...]]:
    """q in a packed projection, behind a class token."""

    def arguments(seed: int | None) -> tuple[Any, ...]:
        draw, tokens = _draw(seed), ROWS // BATCH
        q = draw(BATCH, tokens, 3, 12, width)[:, :, 0].transpose(1, 2)
        angles = draw(1, 1, tokens - 1, width, gain=3.0, dtype=torch.float32)
        return q, angles.sin(), angles.cos(), 1, half

    return arguments


def source(tile: AttentionTile | RowTile | ProductTile | PatchEmbedTile | RotaryTile) -> str:
    """The tile as it is written in `configs.py`, defaults left out."""
    fields = (
        f"{field.name}={value!r}"
        for field in dataclasses.fields(tile)
        if (value := getattr(tile, field.name)) != field.default
    )
    return f"{type(tile).__name__}({', '.join(fields)})"
