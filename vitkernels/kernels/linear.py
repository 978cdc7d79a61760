"""linear on CUDA: the vendor's GEMM each way, and the bias gradient as a column sum.

There is nothing to fuse: cuBLAS adds the bias in its own epilogue. The bias gradient reads dy once more, as any library
does; where the projection's output goes into `add_layer_norm`, give the bias there as `branch_bias` and it is summed
in a pass that runs anyway.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vitkernels.kernels.common import column_sum, column_sum_variant
from vitkernels.kernels.configs import Capability
from vitkernels.kernels.variants import Variant
from vitkernels.ops._amp import nothing


def why_not(direction: str, call: Any) -> str | None:
    """Nothing is declined."""
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def backward(dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    count = x.shape[:-1].numel()
    g, rows = dy.reshape(count, weight.shape[0]), x.reshape(count, weight.shape[1])
    return (
        (g @ weight).reshape(x.shape) if needs[0] else nothing(x),
        g.t() @ rows if needs[1] else nothing(x),
        column_sum(g, weight.dtype) if needs[2] else nothing(x),
    )


def variants(capability: Capability) -> list[Variant]:
    """The bias gradient of ViT-B's qkv projection, B=256: the first sum over dy, then the one over its partial sums."""
    return [column_sum_variant("linear", 50432, 2304, "bf16"), column_sum_variant("linear", 99, 2304, "fp32")]
