"""What `make audit` compiles of the patch_embed kernels: patches of 16 and 14 at 224 px, ViT-S, B and L."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from vitkernels.kernels import configs
from vitkernels.kernels.launch import cdiv, next_power_of_2
from vitkernels.kernels.patch_embed_kernels import embed, image_gradient, sum_tokens, weight_gradient
from vitkernels.kernels.variants import Variant


def padded_shape(width: int, channels: int, rows: int, columns: int) -> dict[str, int]:
    """A weight's sizes as constants of the kernels: PITCH is a patch's row, SIZE a patch, both padded."""
    pitch = next_power_of_2(columns)
    size = configs.PATCH_EMBED_DEPTH * cdiv(channels * rows * pitch, configs.PATCH_EMBED_DEPTH)
    return {"WIDTH": width, "CHANNELS": channels, "ROWS": rows, "COLUMNS": columns, "PITCH": pitch, "SIZE": size}


def variants(capability: configs.Capability) -> list[Variant]:
    """B=256; bf16 and uint8; at ViT-B float32, keep, channels_last, and a float32 table of positions (autocast)."""
    rows = []
    for patch in (16, 14):
        for width in (384, 768, 1024):
            rows += _products(capability, patch, width, "bf16", "bf16")
            rows += _products(capability, patch, width, "u8", "bf16")
        for dtype in ("bf16", "fp32"):
            rows += _products(capability, patch, 768, "fp32", dtype)
        rows += _products(capability, patch, 768, "bf16", "bf16", "keep")
        rows += _products(capability, patch, 768, "fp32", "bf16", "float32 table")
        rows += _products(capability, patch, 768, "u8", "bf16", "channels_last")
    tile = configs.PATCH_EMBED_SUM.pick(capability)
    sums = [_sum_variant(tile, width, "bf16") for width in (384, 768, 1024)]
    return [*rows, *sums, _sum_variant(tile, 768, "bf16", "keep")]


_SIZES = {"u8": 1, "bf16": 2, "fp32": 4}


def _products(
    capability: configs.Capability, patch: int, width: int, image: str, dtype: str, special: str = ""
) -> list[Variant]:
    batch, channels, side = 256, 3, 224
    down = side // patch
    rows, tokens = batch * down**2, batch * (down**2 + 1)
    shape = padded_shape(width, channels, patch, patch)

    # what each argument is, by name; a kernel takes those that it has
    divisible = ["stride_b", "stride_c", "stride_y", "stride_gb", "stride_gt"]
    integers = (*divisible, "stride_x", "count", "tokens", "prefixes", "across", "last", "first", "steps", "height")
    types: dict[str, Any] = dict.fromkeys(integers, "i32")
    types |= {f"p_{each}": f"*{dtype}" for each in ("weight", "bias", "prefix", "pos", "out", "dout")}
    if special == "float32 table":
        types |= dict.fromkeys(("p_prefix", "p_pos", "p_out"), "*fp32")
    types |= {"p_image": f"*{image}", "p_dimage": f"*{image}", "p_parts": "*fp32", "p_keep": "*i64"}
    types |= {"factors": ("fp32",) * channels, "offsets": ("fp32",) * channels}
    constants: dict[str, Any] = shape | {"stride_gd": 1, "NORMALIZE": image == "u8"}
    constants |= {"DTYPE": {"bf16": tl.bfloat16, "fp32": tl.float32}[dtype]}
    if special != "keep":
        constants["p_keep"] = None
    if special == "channels_last":
        constants["stride_c"] = 1
    else:
        constants["stride_x"] = 1

    def product(kernel: Any, m: int, n: int, k: int) -> Variant:
        regular = patch % 16 == 0 and not special
        call = {"float32": dtype == "fp32", "converted": image != dtype, "wide": regular and width % 256 == 0}
        tile = configs.PATCH_EMBED[kernel.__name__].pick(capability, **call)
        given = constants | {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth}
        flops = 2.0
        for extent, block in ((m, tile.rows), (n, tile.columns), (k, tile.depth)):
            flops *= cdiv(extent, block) * block
        weights = width * channels * patch**2
        return Variant(
            f"patch_embed {kernel.__name__} P={patch} D={width} {image} image, {dtype} {special}".rstrip(),
            kernel,
            {name: types[name] for name in kernel.arg_names if name not in given},
            {name: given[name] for name in kernel.arg_names if name in given},
            num_warps=tile.warps,
            num_stages=tile.stages,
            divisible=tuple(name for name in kernel.arg_names if name in divisible and name not in given),
            matrix=dtype != "fp32",
            spills=tile.spills,
            moved=batch * channels * side**2 * _SIZES[image] + (tokens * width + weights) * _SIZES[dtype],
            flops=flops,
            useful=2.0 * rows * weights,
        )

    found = [product(embed, tokens, width, shape["SIZE"]), product(weight_gradient, width, shape["SIZE"], tokens)]
    if image != "u8" and not special:
        found.append(product(image_gradient, rows, shape["SIZE"], width))
    return found


def _sum_variant(tile: configs.PatchEmbedTile, width: int, dtype: str, special: str = "") -> Variant:
    listed = {"p_order": "*i64", "p_starts": "*i64"}
    integers = ("batch", "tokens", "prefixes", "stride_gb", "stride_gt")
    return Variant(
        f"patch_embed sum_tokens D={width} {dtype} {special}".rstrip(),
        sum_tokens,
        {"p_dout": f"*{dtype}", "p_sums": "*fp32"} | dict.fromkeys(integers, "i32") | (listed if special else {}),
        {"stride_gd": 1, "WIDTH": width, "BLOCK_M": tile.rows, "BLOCK_N": tile.columns}
        | ({} if special else dict.fromkeys(listed)),
        num_warps=tile.warps,
        num_stages=tile.stages,
        divisible=("stride_gb", "stride_gt"),
        moved=256 * 197 * width * _SIZES[dtype],
    )
