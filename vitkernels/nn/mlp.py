"""The Transformer's feed-forward as a module on `ops.mlp`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.nn import _check
from vitkernels.nn._stock import is_stock


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class Mlp(nn.Module):
    """fc2(activation(fc1(x))), with the activation inside the products.

    Args:
        in_features: D.
        hidden_features: F; in_features by default.
        out_features: O; in_features by default.
        activation: "gelu" (exact), "gelu_tanh", "quick_gelu", "relu" or "silu".
        bias: whether both projections have one.

    Raises:
        ValueError: a size below 1 or an unknown activation.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: str = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden_features = in_features if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        in_features, hidden_features, out_features = _check.positive(
            "Mlp", in_features=in_features, hidden_features=hidden_features, out_features=out_features
        )
        _check.one_of("Mlp", "activation", activation, ACTIVATIONS)
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., O]."""
        if is_stock(self.fc1, nn.Linear) and is_stock(self.fc2, nn.Linear):
            fc1, fc2 = self.fc1, self.fc2
            return ops.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=self.activation)
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))

    def branch(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """forward(x) in two parts, fc2's product and its bias, for an op that adds the bias on its way."""
        if is_stock(self.fc1, nn.Linear) and is_stock(self.fc2, nn.Linear):
            fc1, fc2 = self.fc1, self.fc2
            return ops.mlp(x, fc1.weight, fc1.bias, fc2.weight, None, activation=self.activation), fc2.bias
        return self(x), None

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
