"""vk.verify leaves model, inputs, random numbers, modes and wrappers as it found them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm_vit import images, vit
from torch import Tensor, nn

import vitkernels as vk
from vitkernels.fuse.swap import Fused, State


class Restless(nn.Module):
    """Changes itself whenever it is called: everything that a module can keep."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.vit = vit(drop_path_rate=0.5, proj_drop_rate=0.5)
        self.register_buffer("seen", torch.zeros(2))
        self.loose = torch.zeros(2)
        self.calls, self.cache, self.history = 0, {}, []

    def forward(self, image: Tensor, fails: str = "") -> Tensor:
        self.calls += 1
        self.cache[self.calls] = self.new = image
        self.history.append(self.calls)
        self.seen += 1
        self.loose += 1
        self.seen = self.seen * 2
        self.register_buffer("late", torch.zeros(1))
        self.head_is_frozen = self.vit.head.requires_grad_(False)
        image += 1
        if fails == "stock" or (fails == "fused" and isinstance(self.vit.blocks[0], Fused)):
            raise KeyError(fails)
        self.train(False).train(True)
        return self.vit(self.norm(image))


def _contents(value: Any) -> Any:
    """What a container holds, by identity; what a fused module counted."""
    if isinstance(value, State):
        return dict(value.fallbacks)
    if isinstance(value, dict):
        return [(key, id(each)) for key, each in value.items()]
    return [id(each) for each in value] if isinstance(value, list) else None


def _state(model: nn.Module) -> dict[str, Any]:
    """All that can be told apart, by value and by identity."""
    return {
        "classes": [type(each) for each in model.modules()],
        "attributes": [
            {name: (id(value), _contents(value)) for name, value in vars(each).items()} for each in model.modules()
        ],
        "training": [each.training for each in model.modules()],
        "identities": [id(each) for each in (*model.parameters(), *model.buffers(), model.loose)],
        "values": [each.tolist() for each in (*model.parameters(), *model.buffers(), model.loose)],
        "flags": [each.requires_grad for each in model.parameters()],
        "gradients": [
            (id(each.grad), None if each.grad is None else each.grad.tolist()) for each in model.parameters()
        ],
        "hooks": [list(each._forward_hooks) + list(each._forward_pre_hooks) for each in model.modules()],
        "random": torch.get_rng_state().tolist(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "backends": vk.dispatch._order,
    }


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("ends", ["well", "stock", "fused", "loss", "backward"])
def test_everything_is_left_as_it_was(ends: str, autocast: bool, fused: bool) -> None:
    model = Restless().train()
    model.vit.blocks[0].eval()
    model.vit.pos_embed.requires_grad_(False)
    model.vit.head.weight.grad = torch.ones_like(model.vit.head.weight)
    hook = model.vit.blocks[1].register_forward_hook(lambda module, inputs, output: None)
    if fused:
        vk.fuse(model)
        model.vit.blocks[0].attn._vitkernels.fallbacks["a reason"] = 3
    x = images(2)
    given = x.clone()

    def loss(output: Tensor) -> Tensor:
        if ends == "loss":
            raise KeyError(ends)
        if ends == "backward":
            output.register_hook(lambda gradient: 1 / 0)
        return output.sum()

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = _state(model)
        if ends in ("well", "fused"):
            found = vk.verify(model, x, fails=ends, loss=loss)
            assert found.ok == (ends == "well"), found
            assert (found.failure is None) == (ends == "well")
        else:
            with pytest.raises(ValueError, match=r"^verify: "):
                vk.verify(model, x, fails=ends, loss=loss)
        after = _state(model)
    assert [name for name in before if before[name] != after[name]] == []
    assert torch.equal(x, given)
    hook.remove()


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off(around: Callable[[], Any]) -> None:
    model = vit()
    with around():
        found = vk.verify(model, images(2))
        assert not torch.is_grad_enabled()
    assert found.ok, found
    assert len(found.rows) > 1


# ----------------------------------------------------------------------------------------------------------- wrappers


def test_a_model_in_ddp_goes_on_training(process_group: None) -> None:
    model = nn.parallel.DistributedDataParallel(vit())
    x = images(2)
    model(x).sum().backward()
    found = vk.verify(model, x)
    assert found.ok, found
    assert "verified: what is inside DistributedDataParallel, on this process and not compiled" in found.notes
    gradient = model.module.cls_token.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(model.module.cls_token.grad, gradient)


def test_a_compiled_model_is_verified_uncompiled() -> None:
    def refuse(graph: Any, inputs: Any) -> Any:
        raise AssertionError("verify compiled something")

    model = vit()
    found = vk.verify(torch.compile(model, backend=refuse), images(2))
    assert found.ok, found
    assert "verified: what is inside OptimizedModule, on this process and not compiled" in found.notes
    assert "gradient of cls_token" in {row.name for row in found.rows}
    model.compile(backend=refuse)
    assert vk.verify(model, images(2)).ok
