"""add_layer_norm and add_rms_norm on CUDA: one row at a time in registers, one pass over memory each way.

Both kernels are bound by memory: forward reads x and branch and writes total and normed (8 bytes an element in
bfloat16), backward reads total, dtotal and dnormed and writes dx (8 more, 12 with LayerScale's two). So rows are read
in 16-byte loads, each number is touched once, and the row's statistics never leave the registers.

Forward: a program walks a few rows, each in one warp up to a width of 1024, so that sums need shuffles and no barrier.
Backward: as many programs as the chip holds stay for the whole call, each with its own sums of the parameters'
gradients in registers; it writes them once, as one float32 row a vector, and a second kernel sums those rows. No
atomics: the same bits each run. Where weight or scale has a row for each sample, some programs walk one sample's rows.

Tensors are [B, N, D] with any strides; an argument that is not there is None, which Triton compiles away.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from vitkernels.kernels import capability, configs
from vitkernels.kernels.add_layer_norm_kernels import (
    add_layer_norm_backward,
    add_layer_norm_forward,
    add_layer_norm_sum,
)
from vitkernels.kernels.common import processors
from vitkernels.kernels.configs import Capability, Row, RowTile
from vitkernels.kernels.launch import cdiv, launch, next_power_of_2
from vitkernels.kernels.variants import Variant
from vitkernels.ops._amp import DTYPES, nothing

_SUM_ROWS, _SUM_COLUMNS = 64, 32


def why_not(direction: str, call: Any) -> str | None:
    width = (call.x if direction == "forward" else call.total).shape[-1]
    widest = configs.LAYER_NORM_FORWARD.widest("width")
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


def _by_sample(weight: Tensor | None, scale: Tensor | None) -> dict[str, bool]:
    """The kernels' constants that say which vectors have a row for each sample."""
    named = {"WEIGHT_BY_SAMPLE": weight, "SCALE_BY_SAMPLE": scale}
    return {name: vector is not None and vector.dim() == 2 for name, vector in named.items()}


def forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    row_scale: Tensor | None,
    out_dtype: int,
    rms: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = nothing(x) if branch is None else x.new_empty(x.shape)
    normed = x.new_empty(x.shape, dtype=DTYPES[out_dtype])
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    mean = nothing(rstd) if rms else torch.empty_like(rstd)
    rows, width = rstd.numel(), x.shape[-1]
    if rows:
        tile = configs.LAYER_NORM_FORWARD.pick(capability(x.device), width=width)
        rows_of_x, strides = _as_rows(x)
        rows_of_branch, branch_strides = _as_rows(branch)
        launch(
            add_layer_norm_forward,
            (cdiv(rows, tile.rows),),
            rows_of_x,
            rows_of_branch,
            *_contiguous(weight, bias, branch_bias, scale, row_scale),
            None if branch is None else total,
            normed,
            None if rms else mean,
            rstd,
            rows,
            _tokens(normed),
            *strides,
            *branch_strides,
            eps,
            D=width,
            BLOCK_D=next_power_of_2(width),
            ROWS=tile.rows,
            **_by_sample(weight, scale),
            num_warps=tile.warps,
        )
    return total, normed, mean, rstd


def backward(
    dtotal: Tensor | None,
    dnormed: Tensor | None,
    total: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    row_scale: Tensor | None,
    branch_dtype: torch.dtype | None,
    needs: list[bool],
    rms: bool = False,
) -> tuple[Tensor, ...]:
    width, rows, device = total.shape[-1], rstd.numel(), total.device
    of_weight, of_scale = ((width,) if vector is None else vector.shape for vector in (weight, scale))
    own = torch.float32 if weight is None else weight.dtype
    dtypes = (total.dtype, branch_dtype, own, own, *(torch.float32,) * 3)
    shapes = (total.shape, total.shape, of_weight, of_weight, (width,), of_scale, rstd.shape)
    grads = [
        torch.empty(shape, dtype=dtype, device=device) if need else None
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    ]
    scaled = needs[5] or needs[6]
    table = configs.LAYER_NORM_BACKWARD_SCALED if scaled else configs.LAYER_NORM_BACKWARD
    tile = table.pick(capability(device), width=width)
    by_sample = _by_sample(weight, scale)
    samples = total.shape[0] if rows and any(by_sample.values()) else 1
    programs = min(cdiv(rows // samples, tile.rows), cdiv(tile.programs * processors(device), samples))  # of a sample
    partials = [
        torch.empty(samples * programs, width, dtype=torch.float32, device=device) if need else None
        for need in needs[2:6]
    ]
    if rows:
        tensors, strides = zip(*map(_as_rows, (dtotal, dnormed, total, branch)), strict=True)
        launch(
            add_layer_norm_backward,
            (samples * programs,),
            *tensors,
            *_contiguous(weight, None if rms else mean, rstd, branch_bias, scale, row_scale),
            *grads[:2],
            *partials,
            grads[6],
            rows,
            _tokens(total),
            programs,
            *(stride for each in strides for stride in each),
            D=width,
            BLOCK_D=next_power_of_2(width),
            ROWS=tile.rows,
            STAGES=tile.stages,
            **by_sample,
            num_warps=tile.warps,
            maxnreg=tile.maxnreg,
        )
    if not rows:
        for grad in grads[2:6]:
            if grad is not None:
                grad.zero_()  # a sum of nothing
    elif any(needs[2:6]):
        launch(
            add_layer_norm_sum,
            (samples * cdiv(width, _SUM_COLUMNS), 4),
            *partials,
            *grads[2:6],
            samples,
            programs,
            D=width,
            BLOCK_R=_SUM_ROWS,
            BLOCK_C=_SUM_COLUMNS,
            **by_sample,
        )
    if grads[6] is not None:
        grads[6] = grads[6].reshape(total.shape[0], _tokens(total)).sum(1)
    return tuple(nothing(total) if grad is None else grad for grad in grads)


why_not_rms, forward_rms, backward_rms = why_not, *(functools.partial(each, rms=True) for each in (forward, backward))


# -------------------------------------------------------------------------------------------------------- the audit

_ROWS = 50432  # of ViT-B/16 at 224, B=256
_WIDTHS = {256: 192, 512: 384, 1024: 768, 2048: 1536, 4096: 3072, 8192: 6144, 16384: 16384}  # a model's in each block


def _variant(
    kernel: Any, name: str, row: Row[RowTile], types: dict[str, str], bytes_each: int, by_sample: bool
) -> Variant:
    """A kernel at a row of its table; pointers that have no type are not there, strides are those of whole tensors."""
    tile, block = row.tile, row.limits["width"]
    width = _WIDTHS[block]
    integers = [arg for arg in kernel.arg_names if arg in ("rows", "tokens", "programs") or arg.startswith("stride")]
    constants: dict[str, Any] = {arg: 1 for arg in integers if arg.endswith("_d")}
    constants |= {arg: None for arg in kernel.arg_names if arg.startswith("p_") and arg not in types}
    constants |= {"D": width, "BLOCK_D": block, "ROWS": tile.rows}
    constants |= {"WEIGHT_BY_SAMPLE": by_sample, "SCALE_BY_SAMPLE": by_sample and "p_scale" in types}
    if "STAGES" in kernel.arg_names:
        constants["STAGES"] = tile.stages
    scalars = dict.fromkeys(integers, "i32") | {"eps": "fp32"}
    return Variant(
        name=f"{name}, {_ROWS}x{width}",
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
    """Every row of the tables, with a bfloat16 branch on a bfloat16 and on a float32 residual stream; on a bfloat16 one
    also without the mean, and with weights and scales that each sample has of its own."""
    found = []
    for op, residual, size, by_sample in (
        ("add_layer_norm", "bf16", 2, False),
        ("add_layer_norm", "fp32", 4, False),
        ("add_rms_norm", "bf16", 2, False),
        ("add_layer_norm", "bf16", 2, True),
    ):
        vectors = dict.fromkeys(
            ("p_weight", "p_bias", "p_branch_bias", "p_scale", "p_row_scale", "p_mean", "p_rstd"), "*fp32"
        )
        stream = dict.fromkeys(("p_x", "p_total", "p_dtotal", "p_dx"), f"*{residual}")
        branch = dict.fromkeys(("p_branch", "p_normed", "p_dnormed", "p_dbranch"), "*bf16")
        grads = dict.fromkeys(("p_dweight", "p_dbias", "p_dbranch_bias", "p_dscale", "p_drow_scale"), "*fp32")
        given = vectors | stream | branch | grads
        if op == "add_rms_norm":
            given = {arg: each for arg, each in given.items() if arg not in ("p_mean", "p_bias", "p_dbias")}
        scaled = ("p_branch", "p_branch_bias", "p_scale", "p_dscale", "p_drow_scale")
        plain = {arg: each for arg, each in given.items() if arg not in scaled}
        for kernel, name, table, pointers, bytes_each in (
            (add_layer_norm_forward, "forward", configs.LAYER_NORM_FORWARD, given, 2 * size + 4),
            (add_layer_norm_backward, "backward", configs.LAYER_NORM_BACKWARD, plain, 3 * size + 4),
            (add_layer_norm_backward, "backward with scale", configs.LAYER_NORM_BACKWARD_SCALED, given, 3 * size + 6),
        ):
            title = f"{op} {name}, {residual} residual{', by sample' if by_sample else ''}"
            found += [_variant(kernel, title, row, pointers, bytes_each, by_sample) for row in table.of(capability)]
    programs = 3 * 132
    for samples, vectors_of in ((1, "all"), (256, "each sample")):
        shares = programs if samples == 1 else samples * cdiv(programs, samples)
        found.append(
            Variant(
                name=f"add_layer_norm sum of {shares} partial sums, for {vectors_of}",
                kernel=add_layer_norm_sum,
                signature=dict.fromkeys(add_layer_norm_sum.arg_names[:8], "*fp32")
                | {"samples": "i32", "programs": "i32"},
                constants={"D": 768, "BLOCK_R": _SUM_ROWS, "BLOCK_C": _SUM_COLUMNS}
                | dict.fromkeys(("WEIGHT_BY_SAMPLE", "SCALE_BY_SAMPLE"), samples > 1),
                moved=4.0 * 4 * shares * 768,
            )
        )
    return found
