"""The Transformer's feed-forward as a module on `ops.mlp`, and the gated one on `ops.glu_mlp`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels.nn import _check
from vitkernels.residual import known
from vitkernels.residual.stream import Branch
from vitkernels.residual.sublayers import gated_branch, mlp_branch


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}
known.FUNCTIONS.update({function: name for name, function in ACTIVATIONS.items()})


class Mlp(nn.Module):
    """fc2(activation(fc1(x))), with the activation inside the products.

    Args:
        in_features: D, the width of the tokens.
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
        return self.branch().run(x, False)[0]

    def branch(self) -> Branch:
        """The module as the branch of a residual step."""
        return mlp_branch(self.fc1, ACTIVATIONS[self.activation], self.fc2)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class GluMlp(nn.Module):
    """fc2(activation(gate) * up), gate and up the halves of fc1(x): SwiGLU and GEGLU, as timm's GluMlp has them.

    Args:
        in_features: D, the width of the tokens.
        hidden_features: 2 * F, of gate and up together; in_features by default.
        out_features: O; in_features by default.
        activation: of the gate, as in `Mlp`.
        bias: whether both projections have one.

    Raises:
        ValueError: a size below 1, an odd hidden_features, or an unknown activation.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: str = "silu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden_features = in_features if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        in_features, hidden_features, out_features = _check.positive(
            "GluMlp", in_features=in_features, hidden_features=hidden_features, out_features=out_features
        )
        _check.one_of("GluMlp", "activation", activation, ACTIVATIONS)
        if hidden_features % 2:
            raise ValueError(f"GluMlp: argument 'hidden_features' is {hidden_features}; needs an even number, 2 * F")
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.fc2 = nn.Linear(hidden_features // 2, out_features, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., O]."""
        return self.branch().run(x, False)[0]

    def branch(self) -> Branch:
        """The module as the branch of a residual step."""
        act = ACTIVATIONS[self.activation]

        def gate(both: Tensor) -> Tensor:
            first, second = both.chunk(2, dim=-1)
            return act(first) * second

        return gated_branch({"fc1": self.fc1}, gate, {"fc2": self.fc2}, act=act)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
