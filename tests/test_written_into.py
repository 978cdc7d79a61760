"""Results may be written into in place wherever stock's may: by callers, hooks, and modules that work in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import fused
import pytest
import torch
from ecosystems import ECOSYSTEMS, D
from timm_vit import OPS, images, vit
from torch import Tensor, nn

import vitkernels as vk


@pytest.mark.parametrize("op", ["linear", "mlp", "glu_mlp", "patch_embed", "rotary", "rotary_qkv"])
def test_a_result_of_an_op(op: str, backend: str) -> None:
    """As torch's own: attention alone keeps its result for its backward pass."""
    w = torch.randn(8, 8, requires_grad=True)
    x, image, turns = torch.randn(2, 3, 8), torch.randn(1, 2, 4, 4), torch.randn(4, 8)
    call: Callable[[], Tensor] = {
        "linear": lambda: vk.ops.linear(x, w),
        "mlp": lambda: vk.ops.mlp(x, w, None, w, None),
        "glu_mlp": lambda: vk.ops.glu_mlp(x, (w, w), None, w, None),
        "patch_embed": lambda: vk.ops.patch_embed(image, w.view(8, 2, 2, 2)),
        "rotary": lambda: vk.ops.rotary(w.view(1, 2, 4, 8), turns, turns),
        "rotary_qkv": lambda: vk.ops.rotary_qkv(w.view(4, 1, 2, 8), turns, turns),
    }[op]
    with vk.use(backend), vk.record() as seen:
        expected = torch.autograd.grad(2 * call().sum(), w)
        result = call()
        result *= 2
        got = torch.autograd.grad(result.sum(), w)
    assert {call.op for call in seen} == {op}
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "name", ["blocks.0.attn", "blocks.1.mlp", "blocks.0", "patch_embed.proj", "blocks.1.attn.proj"]
)
def test_by_a_hook(name: str) -> None:
    model, x = vit(), images()
    model.get_submodule(name).register_forward_hook(lambda module, inputs, output: output.mul_(0.5))
    expected = fused.output_and_gradients(model, (x,))
    with vk.record() as calls:
        fused.check_same(fused.output_and_gradients(vk.fuse(model), (x,)), expected)
    assert {call.op for call in calls} == OPS


@pytest.mark.parametrize("part", ["attention", "linear"])
@pytest.mark.parametrize("name", ECOSYSTEMS)
def test_by_the_caller_of_a_part(name: str, part: str) -> None:
    ecosystem = ECOSYSTEMS[name]
    where = ecosystem.parts[part].rpartition(".")[0] if part == "linear" else ecosystem.parts[part]
    module = ecosystem.model().eval().get_submodule(where)
    if type(module) is nn.Sequential:
        pytest.skip("its feed-forward is an nn.Sequential, which its block reads")
    tokens = torch.randn(2, 5, D)

    def run(module: nn.Module) -> Any:
        arguments = (tokens,) * (3 if isinstance(module, nn.MultiheadAttention) else 1)
        more = {"need_weights": False} if isinstance(module, nn.MultiheadAttention) else {}
        out = module(*arguments, **more)
        out = out[0] if isinstance(out, tuple) else out
        out *= 2
        wanted = [each for each in module.parameters() if each.requires_grad]
        return torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)

    expected = run(module)
    torch.testing.assert_close(run(vk.fuse(copy.deepcopy(module))), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_by_dropouts_and_scales_in_place(rate: float) -> None:
    model, x = vit(init_values=0.5, proj_drop_rate=rate), images()
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = True  # type: ignore[assignment]
    torch.manual_seed(1)
    expected = fused.output_and_gradients(model, (x,))
    vk.fuse(model)
    torch.manual_seed(1)
    with vk.record() as calls:
        fused.check_same(fused.output_and_gradients(model, (x,)), expected)
    assert {"attention_qkv", "add_layer_norm"} <= {call.op for call in calls}


@pytest.mark.parametrize("norm_first", [True, False])
def test_by_dropouts_of_torchs_layer(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(D, 3, 2 * D, 0.3, nn.GELU(), batch_first=True, norm_first=norm_first)
    fused.stir(layer)
    for module in layer.modules():
        if isinstance(module, nn.Dropout):
            module.inplace = True
    tokens = torch.randn(2, 5, D)
    torch.manual_seed(1)
    expected = fused.output_and_gradients(layer, (tokens,))
    vk.fuse(layer)
    torch.manual_seed(1)
    fused.check_same(fused.output_and_gradients(layer, (tokens,)), expected)
