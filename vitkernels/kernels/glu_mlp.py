"""glu_mlp on CUDA: the gate in the first product's epilogue, its derivative and the biases' gradient in the second's.

    forward    pre = x w_gate_up^T + b, gated = f(left half) * right half    one kernel, stores both
               y = gated w_down^T + b_down                                   the vendor's GEMM
    backward   d = dy w_down, dpre = (d * up * f'(gate), d * f(gate)), gated again
                                              one kernel, and dpre's sum over each row of tiles, for db_gate_up
               dx = dpre w_gate_up, dw_gate_up = dpre^T x, dw_down = dy^T gated    the vendor's GEMMs
               db_down, db_gate_up                    column sums, of dy and of the tiles' rows

Forward, a program multiplies a tile of x with the same columns of both halves of the weight: two sums of half the
columns take the registers of one, x is read once, and what the gate needs lies in one thread. pre is stored where a
gradient will come, and nothing else outlives the forward pass. Why gated is stored too, and not computed where the
second product loads it, is as in mlp.py.

Projections that lie apart are copied side by side each way: the kernels read one weight, and at ViT-B's size the copy
moves 13 MB beside a product of 317 GFLOP. Their gradients are products of their own, from halves of dpre.

float32 is multiplied by the vendor's GEMM, in the precision that torch's settings ask for; the same kernels then read
the product instead of computing it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitkernels.kernels import capability, configs
from vitkernels.kernels.common import column_sum, column_sum_variant
from vitkernels.kernels.configs import Capability
from vitkernels.kernels.fences import fenced
from vitkernels.kernels.glu_mlp_kernels import glu_mlp_backward, glu_mlp_forward
from vitkernels.kernels.launch import cdiv
from vitkernels.kernels.mlp import launch_product, pick_tile, product_variant, why_not
from vitkernels.kernels.variants import Variant
from vitkernels.ops._amp import nothing
from vitkernels.ops.glu_mlp import joined, joined_bias

__all__ = ["backward", "forward", "variants", "why_not"]


def _gated(pre: Tensor, gated: Tensor, activation: str) -> None:
    """gated = f(gate) * up by the forward kernel, which takes pre for a product that is there."""
    sizes = (*gated.shape, 0)
    tile = configs.ELEMENTWISE.pick(capability(pre.device))
    launch_product(glu_mlp_forward, tile, pre, None, (None, None, gated), sizes, activation, "n")


def forward(
    x: Tensor,
    w_gate_up: Tensor,
    b_gate_up: Tensor | None,
    w_up: Tensor | None,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    lead = x.shape[:-1]
    b_gate_up, w_gate_up = joined_bias(b_gate_up, w_up, b_up), joined(w_gate_up, w_up)
    count, (outer, inner) = lead.numel(), w_gate_up.shape
    rows = x.reshape(count, inner)  # a view, unless the leading axes do not merge into one stride
    gated = x.new_empty(count, outer // 2)
    if x.dtype == torch.float32:
        pre = F.linear(rows, w_gate_up, b_gate_up)
        _gated(pre, gated, activation)
    else:
        pre = x.new_empty(count, outer) if save else nothing(x)
        bias = None if b_gate_up is None else b_gate_up.contiguous()  # one row: packing a strided one costs nothing
        tile = pick_tile(configs.GLU_MLP["forward"], configs.GLU_MLP_SMALL, count, outer // 2, x)
        pointers, sizes = (bias, pre if save else None, gated), (count, outer // 2, inner)
        launch_product(glu_mlp_forward, tile, rows, w_gate_up, pointers, sizes, activation, "n")
    y = F.linear(gated.view(*lead, outer // 2), w_down, b_down)
    return y, pre.reshape(*lead, outer) if save else nothing(x)


def backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    w_gate_up: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    outer, hidden = w_down.shape
    count, inner = x.shape[:-1].numel(), w_gate_up.shape[1]
    g, rows, pre = dy.reshape(count, outer), x.reshape(count, inner), pre.reshape(count, 2 * hidden).contiguous()
    first = slice(2 * hidden if w_up is None else hidden)  # the columns of pre that are w_gate_up's
    gated = partial = None
    if any(needs[:5]):
        tile = pick_tile(configs.GLU_MLP["backward"], configs.GLU_MLP_SMALL, count, hidden, x)
        dpre = torch.empty_like(pre)
        summed = needs[2] or needs[4]
        partial = x.new_empty(cdiv(count, tile.rows), 2 * hidden, dtype=torch.float32) if summed else None
        if x.dtype == torch.float32:
            a, b = g @ w_down, None
            gated = a if needs[5] else None  # the vendor's product turns into it where it lies
        else:
            a, b = g, w_down
            gated = x.new_empty(count, hidden) if needs[5] else None
        pointers, sizes = (pre, gated, partial, dpre), (count, hidden, outer)
        launch_product(glu_mlp_backward, tile, a, b, pointers, sizes, activation, "k")
    elif needs[5]:
        gated = x.new_empty(count, hidden)
        _gated(pre, gated, activation)
    return (
        (dpre @ joined(w_gate_up, w_up)).reshape(x.shape) if needs[0] else nothing(x),
        dpre[:, first].t() @ rows if needs[1] else nothing(x),
        nothing(x) if partial is None or not needs[2] else column_sum(partial[:, first], w_gate_up.dtype),
        dpre[:, hidden:].t() @ rows if needs[3] else nothing(x),
        nothing(x) if partial is None or not needs[4] else column_sum(partial[:, hidden:], w_gate_up.dtype),
        nothing(x) if gated is None else g.t() @ gated,
        column_sum(g, w_down.dtype) if needs[6] else nothing(x),
    )


# -------------------------------------------------------------------------------------------------------- the audit

_GATES = ("silu", "gelu", "gelu_tanh")


def variants(capability: Capability) -> list[Variant]:
    """Each row of the tables at the size of a ViT-B with SwiGLU, B=256; the small one for one image."""
    found, chip = [], configs.chip(capability)
    sizes = (50432, 2048, 768)
    for kernel, direction, b_rows, passes, products in (
        (glu_mlp_forward, "forward", "n", 3, 2),
        (glu_mlp_backward, "backward", "k", 5, 1),
    ):
        name, tile = f"glu_mlp {direction}", configs.GLU_MLP[direction].pick(capability)
        small = configs.GLU_MLP_SMALL.pick(capability)
        more: dict[str, Any] = {"b_rows": b_rows, "passes": passes, "products": products}
        found += [product_variant(kernel, name, tile, sizes, each, **more) for each in _GATES]
        if tile.tma:
            pointers = fenced(dataclasses.replace(tile, tma=False), chip)
            found.append(product_variant(kernel, f"{name} by pointers", pointers, sizes, "silu", **more))
        found.append(product_variant(kernel, f"{name} small", fenced(small, chip), (197, 2048, 768), "silu", **more))
        absent = ["p_b", "p_bias", "p_pre"] if kernel is glu_mlp_forward else ["p_b"]
        more |= {"passes": 1 if kernel is glu_mlp_forward else passes, "absent": absent}
        tile = configs.ELEMENTWISE.pick(capability)
        found.append(product_variant(kernel, f"{name} float32", tile, sizes, "silu", **more))
    return [*found, column_sum_variant("glu_mlp", cdiv(50432, 128), 4096, "fp32")]
