"""mlp on CUDA: the activation in the first product's epilogue, its derivative and b1's gradient in the second one's.

    forward    pre = x w1^T + b1, activated = f(pre)         one kernel, stores both (pre where a gradient will come)
               y = activated w2^T + b2                       the vendor's GEMM
    backward   dpre = (dy w2) f'(pre), activated = f(pre)    one kernel, and dpre's sum over each row of tiles, for db1
               dx = dpre w1, dw1 = dpre^T x, dw2 = dy^T activated    the vendor's GEMMs
               db2, db1                                      column sums, of dy and of the tiles' rows

Only pre outlives the forward pass. Why its kernel stores the activation too, at ViT-B's M=50k, D=768, F=3072 on an H100
(3.0 TB/s, 798 TFLOP/s, four warp instructions a cycle on each of 132 multiprocessors):

- Storing it costs 310 MB, 103 us of memory time, in a product of 238 GFLOP, 298 us at peak: 341 operations a byte with
  both stores against a ridge of 266, so a kernel that overlaps its stores hides them. cuBLAS and an elementwise pass
  move 620 MB more, 206 us that nothing hides.
- The other way, to store pre alone and activate while the second product loads its operand, does the activation once
  for each column of output tiles: 155M numbers x 20 instructions x 768 / 128 is 630 us of issue slots, and they stand
  in the loop that feeds the tensor cores.

Backward the same holds: dw2 needs f(pre) as an operand, dpre's kernel has pre in registers, and one more store there is
half of what a pass of its own would move.

float32 is multiplied by the vendor's GEMM, in the precision that torch's settings ask for; the same kernels then read
the product instead of computing it, and use tl.erf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from vitkernels.kernels import capability, configs
from vitkernels.kernels.common import column_sum, column_sum_variant, processors
from vitkernels.kernels.configs import Capability, ProductTile, Table
from vitkernels.kernels.fences import fenced
from vitkernels.kernels.launch import cdiv, launch
from vitkernels.kernels.mlp_kernels import mlp_backward, mlp_forward
from vitkernels.kernels.variants import Variant
from vitkernels.ops._amp import nothing
from vitkernels.ops.mlp import ACTIVATIONS

Tiles = Table[ProductTile]
# of the pointers behind the operands: (bias, pre, activated) and (pre, activated, partial, dpre)
FORWARD_RESULTS, BACKWARD_RESULTS = (1, 2), (1, 3)


def why_not(direction: str, call: Any) -> str | None:
    """Nothing is declined."""
    return None


def _suits_tma(matrix: Tensor) -> bool:
    """What the copy engine can address: whole rows that do not overlap, everything on 16 bytes."""
    stride_r, stride_c = matrix.stride()
    size = matrix.element_size()
    rows_apart = stride_r >= matrix.shape[1] > 0 and stride_r * size % 16 == 0
    return matrix.numel() > 0 and stride_c == 1 and rows_apart and matrix.data_ptr() % 16 == 0


def pick_tile(table: Tiles, small: Tiles, rows: int, columns: int, like: Tensor) -> ProductTile:
    """The tile for a result [rows, columns]; of `small` where the table's are fewer than multiprocessors."""
    on = capability(like.device)
    if like.dtype == torch.float32:
        return configs.ELEMENTWISE.pick(on)
    tile = table.pick(on)
    tiles = cdiv(rows, tile.rows) * cdiv(columns, tile.columns)
    return tile if tiles >= processors(like.device) else small.pick(on)


def launch_product(
    kernel: Any,
    tile: ProductTile,
    a: Tensor,
    b: Tensor | None,
    pointers: Sequence[Tensor | None],
    sizes: tuple[int, int, int],
    activation: str,
    b_rows: str,
    results: Sequence[int] = (),
) -> None:
    """Run a kernel over the tiles of [M, N].

    Args:
        sizes: (M, N, K).
        b_rows: what b's rows are, "n" or "k".
        results: which pointers may be stored to by the copy engine.
    """
    rows, columns = cdiv(sizes[0], tile.rows), cdiv(sizes[1], tile.columns)
    if rows * columns == 0:
        return
    strides_b = (0, 0) if b is None else b.stride()
    tma = tile.tma and b is not None and _suits_tma(a) and _suits_tma(b)
    if not tma:
        tile = fenced(tile, configs.chip(capability(a.device)))
    block_b = [tile.columns, tile.inner] if b_rows == "n" else [tile.inner, tile.columns]
    given = [each for index in results if (each := pointers[index]) is not None]
    tma_out = tma and tile.tma_out and all(map(_suits_tma, given))
    if tma_out:
        block = [tile.rows, tile.columns // tile.pieces]
        pointers = [
            TensorDescriptor.from_tensor(each, block) if index in results and each is not None else each
            for index, each in enumerate(pointers)
        ]
    launch(
        kernel,
        (min(rows * columns, tile.programs * processors(a.device)),),
        TensorDescriptor.from_tensor(a, [tile.rows, tile.inner]) if tma else a,
        TensorDescriptor.from_tensor(b, block_b) if tma else b,
        *pointers,
        *sizes,
        *a.stride(),
        *(strides_b if b_rows == "n" else strides_b[::-1]),
        ACTIVATION=activation,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.inner,
        PIECES=tile.pieces,
        GROUP=configs.GROUP,
        TMA=tma,
        **({"TMA_OUT": tma_out} if results else {}),
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.maxnreg,
    )


def _activated(pre: Tensor, activation: str) -> Tensor:
    """f(pre) by the forward kernel, which takes pre for a product that is there."""
    activated = torch.empty_like(pre)
    pointers = (None, None, activated)
    tile = configs.ELEMENTWISE.pick(capability(pre.device))
    launch_product(mlp_forward, tile, pre, None, pointers, (*pre.shape, 0), activation, "n", FORWARD_RESULTS)
    return activated


def forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    lead = x.shape[:-1]
    sizes = (lead.numel(), w1.shape[0], w1.shape[1])
    rows = x.reshape(sizes[0], sizes[2])  # a view, unless the leading axes do not merge into one stride
    if x.dtype == torch.float32:
        pre = F.linear(rows, w1, b1)
        activated = _activated(pre, activation)
    else:
        pre = x.new_empty(sizes[:2]) if save else nothing(x)
        activated = x.new_empty(sizes[:2])
        bias = None if b1 is None else b1.contiguous()  # one row: packing a strided one costs nothing
        tile = pick_tile(configs.MLP["forward"], configs.MLP_SMALL, *sizes[:2], x)
        pointers = (bias, pre if save else None, activated)
        launch_product(mlp_forward, tile, rows, w1, pointers, sizes, activation, "n", FORWARD_RESULTS)
    y = F.linear(activated.view(*lead, sizes[1]), w2, b2)
    return y, pre.reshape(*lead, sizes[1]) if save else nothing(x)


def backward(
    dy: Tensor, x: Tensor, pre: Tensor, w1: Tensor, w2: Tensor, activation: str, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outer, hidden = w2.shape
    count = x.shape[:-1].numel()
    g, rows, pre = dy.reshape(count, outer), x.reshape(count, w1.shape[1]), pre.reshape(count, hidden).contiguous()
    activated = partial = None
    if any(needs[:3]):
        tile = pick_tile(configs.MLP["backward"], configs.MLP_SMALL, count, hidden, x)
        vendor = x.dtype == torch.float32
        dpre = g @ w2 if vendor else x.new_empty(count, hidden)
        activated = torch.empty_like(pre) if needs[3] else None
        partial = x.new_empty(cdiv(count, tile.rows), hidden, dtype=torch.float32) if needs[2] else None
        a, b = (dpre, None) if vendor else (g, w2)  # the vendor's product turns into dpre where it lies
        pointers, sizes = (pre, activated, partial, dpre), (count, hidden, outer)
        launch_product(mlp_backward, tile, a, b, pointers, sizes, activation, "k", BACKWARD_RESULTS)
    elif needs[3]:
        activated = _activated(pre, activation)
    return (
        (dpre @ w1).reshape(x.shape) if needs[0] else nothing(x),
        dpre.t() @ rows if needs[1] else nothing(x),
        nothing(x) if partial is None else column_sum(partial, w1.dtype),
        nothing(x) if activated is None else g.t() @ activated,
        column_sum(g, w2.dtype) if needs[4] else nothing(x),
    )


# -------------------------------------------------------------------------------------------------------- the audit


def product_variant(
    kernel: Any,
    name: str,
    tile: ProductTile,
    sizes: tuple[int, int, int],
    activation: str,
    b_rows: str,
    passes: int,
    absent: Sequence[str] = (),
    products: int = 1,
    results: Sequence[str] = (),
) -> Variant:
    """A kernel at a row of its table; strides are those of whole tensors.

    Args:
        sizes: (M, N, K) of the call.
        passes: over [M, N] that the epilogue makes.
        absent: pointers that are not there; without p_b, a is the product, and all is float32.
        products: of a with N columns of b.
        results: pointers that may be stored to by the copy engine.
    """
    (m, n, k), vendor = sizes, "p_b" in absent
    dtype, size = ("fp32", 4) if vendor else ("bf16", 2)
    types = {arg: f"*{dtype}" for arg in kernel.arg_names if arg.startswith("p_")}
    if "p_partial" in types:
        types["p_partial"] = "*fp32"
    if tile.tma:
        block_b = [tile.columns, tile.inner] if b_rows == "n" else [tile.inner, tile.columns]
        types |= {"p_a": f"tensordesc<bf16{[tile.rows, tile.inner]}>", "p_b": f"tensordesc<bf16{block_b}>"}
    if tile.tma and tile.tma_out:
        types |= dict.fromkeys(results, f"tensordesc<bf16{[tile.rows, tile.columns // tile.pieces]}>")
    types |= {arg: "i32" for arg in kernel.arg_names if arg in ("M", "N", "K") or arg.startswith("stride")}
    constants: dict[str, Any] = dict.fromkeys(absent)
    constants |= {"stride_a_k": 1, "stride_b_k" if b_rows == "n" else "stride_b_n": 1}
    constants |= {"ACTIVATION": activation, "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.inner}
    constants |= {"PIECES": tile.pieces, "GROUP": configs.GROUP, "TMA": tile.tma}
    constants |= {"TMA_OUT": tile.tma and tile.tma_out} if results else {}
    operands = products * m * n if vendor else m * k + products * n * k
    padded = cdiv(m, tile.rows) * tile.rows * cdiv(n, tile.columns) * tile.columns
    return Variant(
        name=f"{name}, {m}x{n}x{k} {activation}",
        kernel=kernel,
        signature={arg: each for arg, each in types.items() if arg not in constants},
        constants=constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.maxnreg,
        divisible=tuple(arg for arg in ("N", "K", "stride_a_m", "stride_b_n", "stride_b_k") if arg not in constants),
        spills=tile.spills,
        matrix=not vendor,
        moved=float(size * (operands + m * n * passes)),
        flops=0.0 if vendor else 2.0 * padded * k * products,
        useful=0.0 if vendor else 2.0 * m * n * k * products,
    )


def variants(capability: Capability) -> list[Variant]:
    """Each row of the tables at ViT-B's size, B=256, with every activation; the small one for one image."""
    found, chip = [], configs.chip(capability)
    sizes = (50432, 3072, 768)
    for kernel, direction, b_rows, passes, outs in (
        (mlp_forward, "forward", "n", 2, FORWARD_RESULTS),
        (mlp_backward, "backward", "k", 3, BACKWARD_RESULTS),
    ):
        results = [kernel.arg_names[2 + index] for index in outs]
        name, tile = f"mlp {direction}", configs.MLP[direction].pick(capability)
        more: dict[str, Any] = {"b_rows": b_rows, "passes": passes, "results": results}
        found += [product_variant(kernel, name, tile, sizes, each, **more) for each in ACTIVATIONS]
        if tile.tma:
            pointers = fenced(dataclasses.replace(tile, tma=False), chip)
            found.append(product_variant(kernel, f"{name} by pointers", pointers, sizes, "gelu", **more))
        small = fenced(configs.MLP_SMALL.pick(capability), chip)
        found.append(product_variant(kernel, f"{name} small", small, (197, 3072, 768), "gelu", **more))
        more |= {"absent": ["p_b", "p_bias", "p_pre"], "passes": 1} if kernel is mlp_forward else {"absent": ["p_b"]}
        tile = configs.ELEMENTWISE.pick(capability)
        found.append(product_variant(kernel, f"{name} float32", tile, sizes, "gelu", **more))
    partial = cdiv(50432, 128)
    return [*found, column_sum_variant("mlp", partial, 3072, "fp32")]
