"""RMSNorm classes of other libraries: a known one computes what `ops.add_rms_norm` does, any other runs as it is."""

from __future__ import annotations

import importlib

import peers
import pytest
import torch
from torch import Tensor, nn

import vitkernels as vk
from vitkernels.residual import known, parts

peers.import_timm()
pytest.importorskip("transformers")
from vitkernels.fuse.rules import timm, transformers_parts  # noqa: E402, F401  # their classes join the table


def make(name: str) -> nn.Module:
    module, _, kind = name.rpartition(".")
    norm: nn.Module = getattr(importlib.import_module(module), kind)(24, eps=1e-3)
    nn.init.normal_(norm.weight, 1.0, 0.2)  # type: ignore[arg-type]
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(known.RMS_NORMS))
def test_every_known_class(name: str, dtype: torch.dtype) -> None:
    norm = make(name).to(dtype)
    x = torch.randn(2, 5, 24).to(dtype).requires_grad_()
    expected = norm(x)
    with vk.record() as calls:
        got = parts.layer_norm(norm, x)
    assert [call.op for call in calls] == ["add_rms_norm"]
    assert got.dtype == expected.dtype
    weights = torch.randn_like(expected)
    wanted = (x, norm.weight)
    pairs = zip(
        (got, *torch.autograd.grad(got, wanted, weights)),
        (expected, *torch.autograd.grad(expected, wanted, weights)),
        strict=True,
    )
    for one, other in pairs:  # in bfloat16 the classes round two or three times more
        torch.testing.assert_close(one, other, **({"atol": 0.06, "rtol": 0.02} if dtype == torch.bfloat16 else {}))


def test_a_float32_weight_widens_as_in_transformers() -> None:
    norm, x = make("transformers.models.aimv2.modeling_aimv2.Aimv2RMSNorm"), torch.randn(2, 24).bfloat16()
    assert parts.layer_norm(norm, x).dtype == norm(x).dtype == torch.float32


def test_without_eps_of_its_own_it_runs_as_it_is() -> None:
    norm = nn.RMSNorm(24)
    assert parts.why_not_layer_norm("norm1", norm) == "norm1 has no eps, but that of the tokens' dtype"
    with vk.record() as calls:
        parts.layer_norm(norm, torch.randn(2, 24))
    assert not calls


def test_a_class_of_that_name_is_not_one() -> None:
    class RMSNorm(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    norm, x = RMSNorm(24, eps=1e-5), torch.randn(2, 24)
    assert parts.why_not_layer_norm("norm1", norm) is not None
    assert torch.equal(parts.layer_norm(norm, x), norm(x))
