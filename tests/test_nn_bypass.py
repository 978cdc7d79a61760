"""A module that does more than its class (a hook, a wrapper, a parametrization) is called, never read around.

Held by doing the same to timm's model, which calls every module.
"""

from __future__ import annotations

from typing import Any

import accuracy
import peers
import pytest
import torch
from torch import Tensor, nn

import vitkernels as vk

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the image asks for no gradient

MODULES = [
    "patch_embed",
    "patch_embed.proj",
    "blocks",
    "blocks.0",
    "blocks.1",
    "blocks.0.norm1",
    "blocks.1.norm1",
    "blocks.1.attn",
    "blocks.1.attn.qkv",
    "blocks.1.attn.q_norm",
    "blocks.1.attn.proj",
    "blocks.0.ls1",
    "blocks.0.drop_path1",
    "blocks.0.norm2",
    "blocks.0.mlp",
    "blocks.0.mlp.fc1",
    "blocks.0.mlp.fc2",
    "blocks.0.ls2",
    "norm",
    "fc_norm",
    "head",
]


class Wrapped(nn.Module):
    """As LoRA does it: the layer, and something beside it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        return self.layer(x, *args, **options) * self.gain


class Longer(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


def wrap(model: nn.Module, name: str) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, Wrapped(model.get_submodule(name)))


def replace_forward(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    forward = module.forward
    module.forward = lambda *args, **options: forward(*args, **options) * 1.5  # type: ignore[method-assign]


def subclass(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    kind = type(module)
    forward = kind.forward
    module.__class__ = type(
        kind.__name__, (kind,), {"forward": lambda *args, **options: forward(*args, **options) * 1.5}
    )


def parametrize_weight(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    if isinstance(getattr(module, "weight", None), nn.Parameter):
        nn.utils.parametrize.register_parametrization(module, "weight", Longer())


CHANGES = {
    "hook": lambda model, name: model.get_submodule(name).register_forward_hook(lambda _, __, output: 1.5 * output),
    "pre-hook": lambda model, name: model.get_submodule(name).register_forward_pre_hook(lambda _, x: (1.5 * x[0],)),
    "backward hook": lambda model, name: model.get_submodule(name).register_full_backward_hook(
        lambda _, grads, __: tuple(grad if grad is None else 1.5 * grad for grad in grads)
    ),
    "wrapper": wrap,
    "forward": replace_forward,
    "subclass": subclass,
    "parametrization": parametrize_weight,
}


def test_a_hook_on_all_modules_sees_all_modules() -> None:
    model, _ = peers.build(qk_norm=True, init_values=0.5)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(peers.image(model))
    finally:
        handle.remove()
    assert {name for name, module in model.named_modules() if module not in seen} == set()


def test_a_weight_in_pieces_is_not_read(process_group: None) -> None:
    """A sharded weight belongs to a layer that is called, so that it can do what it must."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    mlp = vk.nn.Mlp(48, 96)
    tokens = torch.randn(2, 5, 48)
    expected = mlp(tokens)
    for layer in (mlp.fc1, mlp.fc2):
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh)))
    with vk.record() as calls:
        got = mlp(distribute_tensor(tokens, mesh)).full_tensor()
    torch.testing.assert_close(got, expected)
    assert not calls


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_bypassed(name: str, change: str) -> None:
    ours, theirs = peers.build(qk_norm=True, init_values=0.5, global_pool="avg" if name == "fc_norm" else "token")
    images = peers.image(ours)
    for model in (ours, theirs):
        CHANGES[change](model, name)
    with vk.use("reference"), vk.record() as calls:
        got = peers.output_and_gradients(ours, images)
    accuracy.check(
        got, peers.output_and_gradients(theirs, images), peers.truth(theirs, images), accuracy.FLOORS[torch.float32]
    )
    assert "attention_qkv" in {call.op for call in calls}, "what was not changed stays fused"
