"""add_layer_norm on CUDA: one row at a time in registers, one pass over memory each way.

Both kernels are bound by memory: forward reads x and branch and writes total and normed (8 bytes an element in
bfloat16), backward reads total, dtotal and dnormed and writes dx (8 more, 12 with LayerScale's two). So rows are read
in 16-byte loads, each number is touched once, and the row's statistics never leave the registers.

Forward: a program walks a few rows, each in one warp up to a width of 1024, so that sums need shuffles and no barrier.
Backward: as many programs as the chip holds stay for the whole call, each with its own sums of the parameters'
gradients in registers; it writes them once, as one float32 row a vector, and a second kernel sums those rows. No
atomics: the same bits each run.

Tensors are [B, N, D] with any strides; an argument that is not there is None, which Triton compiles away.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vitkernels.kernels import configs
from vitkernels.kernels.add_layer_norm_kernels import backward_kernel, forward_kernel, sum_kernel
from vitkernels.kernels.common import processors
from vitkernels.kernels.configs import Capability, RowTile
from vitkernels.kernels.launch import cdiv, launch, next_power_of_2
from vitkernels.kernels.variants import Variant
from vitkernels.ops._amp import nothing

_SUM_ROWS, _SUM_COLUMNS = 64, 32


def why_not(direction: str, args: tuple[Any, ...]) -> str | None:
    width = (args[0] if direction == "forward" else args[2]).shape[-1]
    widest = configs.LAYER_NORM_FORWARD[-1].width
    if width > widest:
        return f"the kernels hold a row in registers, at most {widest} wide, and the last axis has {width}"
    return None


def _as_rows(tensor: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    """The tensor as [B, N, D] with its strides; more axes than that merge, by a copy where strides cannot say it."""
    if tensor is None:
        return None, (0, 0, 1)
    if tensor.dim() > 3:
        tensor = tensor.flatten(1, -2)
    stride_b, stride_n, stride_d = (0, 0, 0, *tensor.stride())[-3:]
    if tensor.dim() == 2:  # [B, D]: each sample is one row
        stride_b, stride_n = stride_n, 0
    return tensor, (stride_b, stride_n, stride_d)


def _contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    """Vectors of one row: packing a strided one costs nothing beside the rows."""
    return [None if vector is None else vector.contiguous() for vector in vectors]


def _tokens(x: Tensor) -> int:
    """Rows a sample."""
    return math.prod(x.shape[1:-1])


def forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    row_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = nothing(x) if branch is None else x.new_empty(x.shape)
    normed = x.new_empty(x.shape, dtype=out_dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    rows, width = mean.numel(), x.shape[-1]
    if rows:
        tile = configs.pick_row_tile(configs.LAYER_NORM_FORWARD, width)
        rows_of_x, strides = _as_rows(x)
        rows_of_branch, branch_strides = _as_rows(branch)
        launch(
            forward_kernel,
            (cdiv(rows, tile.rows),),
            rows_of_x,
            rows_of_branch,
            *_contiguous(weight, bias, branch_bias, scale, row_scale),
            None if branch is None else total,
            normed,
            mean,
            rstd,
            rows,
            _tokens(normed),
            *strides,
            *branch_strides,
            eps,
            D=width,
            BLOCK_D=next_power_of_2(width),
            ROWS=tile.rows,
            num_warps=tile.warps,
        )
    return total, normed, mean, rstd


def backward(
    dtotal: Tensor | None,
    dnormed: Tensor | None,
    total: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    row_scale: Tensor | None,
    branch_dtype: torch.dtype | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    width, rows, device = total.shape[-1], mean.numel(), total.device
    dtypes = (total.dtype, branch_dtype, weight.dtype, weight.dtype, *(torch.float32,) * 3)
    shapes = (total.shape, total.shape, *((width,),) * 4, mean.shape)
    grads = [
        torch.empty(shape, dtype=dtype, device=device) if need else None
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    ]
    scaled = needs[5] or needs[6]
    table = configs.LAYER_NORM_BACKWARD_SCALED if scaled else configs.LAYER_NORM_BACKWARD
    tile = configs.pick_row_tile(table, width)
    programs = min(cdiv(rows, tile.rows), tile.programs * processors(device))
    partials = [
        torch.empty(programs, width, dtype=torch.float32, device=device) if need else None for need in needs[2:6]
    ]
    if rows:
        tensors, strides = zip(*map(_as_rows, (dtotal, dnormed, total, branch)), strict=True)
        launch(
            backward_kernel,
            (programs,),
            *tensors,
            *_contiguous(weight, mean, rstd, branch_bias, scale, row_scale),
            *grads[:2],
            *partials,
            grads[6],
            rows,
            _tokens(total),
            *(stride for each in strides for stride in each),
            D=width,
            BLOCK_D=next_power_of_2(width),
            ROWS=tile.rows,
            STAGES=tile.stages,
            num_warps=tile.warps,
            maxnreg=tile.maxnreg,
        )
    if any(needs[2:6]):
        launch(
            sum_kernel,
            (cdiv(width, _SUM_COLUMNS), 4),
            *partials,
            *grads[2:6],
            programs,
            D=width,
            BLOCK_R=_SUM_ROWS,
            BLOCK_C=_SUM_COLUMNS,
        )
    if grads[6] is not None:
        grads[6] = grads[6].reshape(total.shape[0], _tokens(total)).sum(1)
    return tuple(nothing(total) if grad is None else grad for grad in grads)


# -------------------------------------------------------------------------------------------------------- the audit

_ROWS = 50432  # of ViT-B/16 at 224, B=256
_WIDTHS = {256: 192, 512: 384, 1024: 768, 2048: 1536, 4096: 3072, 8192: 6144, 16384: 16384}  # a model's in each block


def _variant(kernel: Any, name: str, tile: RowTile, types: dict[str, str], bytes_each: int) -> Variant:
    """A kernel at a row of its table; pointers that have no type are not there, strides are those of whole tensors."""
    width = _WIDTHS[tile.width]
    integers = [arg for arg in kernel.arg_names if arg in ("rows", "tokens") or arg.startswith("stride")]
    constants = {arg: 1 for arg in integers if arg.endswith("_d")}
    constants |= {arg: None for arg in kernel.arg_names if arg.startswith("p_") and arg not in types}
    constants |= {"D": width, "BLOCK_D": tile.width, "ROWS": tile.rows}
    if "STAGES" in kernel.arg_names:
        constants["STAGES"] = tile.stages
    scalars = dict.fromkeys(integers, "i32") | {"eps": "fp32"}
    return Variant(
        name=f"add_layer_norm {name}, {_ROWS}x{width}",
        kernel=kernel,
        signature={
            arg: each for arg, each in (types | scalars).items() if arg in kernel.arg_names if arg not in constants
        },
        constants=constants,
        num_warps=tile.warps,
        maxnreg=tile.maxnreg,
        divisible=tuple(arg for arg in integers if arg not in constants and arg.startswith("stride")),
        spills=tile.spills,
        moved=float(bytes_each * _ROWS * width),
    )


def variants(capability: Capability) -> list[Variant]:
    """Every row of the tables, with a bfloat16 branch on a bfloat16 and on a float32 residual stream."""
    found = []
    for residual, size in (("bf16", 2), ("fp32", 4)):
        vectors = dict.fromkeys(
            ("p_weight", "p_bias", "p_branch_bias", "p_scale", "p_row_scale", "p_mean", "p_rstd"), "*fp32"
        )
        stream = dict.fromkeys(("p_x", "p_total", "p_dtotal", "p_dx"), f"*{residual}")
        branch = dict.fromkeys(("p_branch", "p_normed", "p_dnormed", "p_dbranch"), "*bf16")
        grads = dict.fromkeys(("p_dweight", "p_dbias", "p_dbranch_bias", "p_dscale", "p_drow_scale"), "*fp32")
        given = vectors | stream | branch | grads
        scaled = ("p_branch", "p_branch_bias", "p_scale", "p_dscale", "p_drow_scale")
        plain = {arg: each for arg, each in given.items() if arg not in scaled}
        for kernel, name, table, pointers, bytes_each in (
            (forward_kernel, "forward", configs.LAYER_NORM_FORWARD, given, 2 * size + 4),
            (backward_kernel, "backward", configs.LAYER_NORM_BACKWARD, plain, 3 * size + 4),
            (backward_kernel, "backward with scale", configs.LAYER_NORM_BACKWARD_SCALED, given, 3 * size + 6),
        ):
            found += [_variant(kernel, f"{name}, {residual} residual", row, pointers, bytes_each) for row in table]
    programs = 3 * 132
    found.append(
        Variant(
            name=f"add_layer_norm sum of {programs} partial sums",
            kernel=sum_kernel,
            signature=dict.fromkeys(sum_kernel.arg_names[:8], "*fp32") | {"programs": "i32"},
            constants={"D": 768, "BLOCK_R": _SUM_ROWS, "BLOCK_C": _SUM_COLUMNS},
            moved=4.0 * 4 * programs * 768,
        )
    )
    return found
