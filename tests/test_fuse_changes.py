"""A fused model lives on: it is copied, saved, cast, quantized, adapted, hooked, frozen and rearranged."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import fused
import pytest
import torch
from timm_vit import OPS, images, timm, vit
from torch import Tensor, nn

import vitkernels as vk

WHOLE = "2 of 2 blocks fused"


def check_as_stock(model: nn.Module, x: Tensor) -> list[vk.Call]:
    """Output and gradients of a fused model are its own when unfused; returns the calls of the fused run."""
    with vk.record() as calls:
        got = fused.output_and_gradients(model, (x,))
    twin = vk.unfuse(copy.deepcopy(model))
    fused.check_same(got, fused.output_and_gradients(twin, (x,)))
    return calls


# ------------------------------------------------------------------------------------------------- copies and files


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _saved,
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_fused_and_apart(name: str) -> None:
    model, x = vk.fuse(vit(), residual_dtype=torch.float32, backend="reference"), images()
    again = COPIES[name](model)
    assert vk.explain(again).summary == WHOLE
    assert type(again.blocks[0]) is type(model.blocks[0])
    assert type(again.blocks) is type(model.blocks)
    fused.stir(again)
    with vk.record() as calls:
        check_as_stock(again, x)
    assert {call.backend for call in calls} == {"reference"}, "the options are copied"
    assert sum(call.op == "add_layer_norm" and call.direction == "forward" for call in calls) == 1 + 3, "joined"
    check_as_stock(model, x)


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model, x = vit(), images()
    safetensors.save_model(vk.fuse(model), tmp_path / "fused.safetensors")
    stock = vit()
    safetensors.load_model(stock, tmp_path / "fused.safetensors", strict=True)
    fused.check_same(fused.output_and_gradients(model, (x,)), fused.output_and_gradients(stock, (x,)))
    other = vk.fuse(vit())
    other.load_state_dict(stock.state_dict(), strict=True, assign=True)
    fused.check_same(fused.output_and_gradients(other, (x,)), fused.output_and_gradients(stock, (x,)))


def test_replicas_of_data_parallel() -> None:
    model = vk.fuse(vit())
    replica = model.blocks[0]._replicate_for_data_parallel()
    assert isinstance(replica, type(model.blocks[0]))
    tokens = torch.randn(2, 5, 48)
    torch.testing.assert_close(replica(tokens), model.blocks[0](tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_after_fuse(dtype: torch.dtype) -> None:
    model, x = vk.fuse(vit()), images()
    exact = vk.unfuse(copy.deepcopy(model)).double()(x.double())
    own = vk.unfuse(copy.deepcopy(model)).to(dtype)(x.to(dtype))
    with vk.record() as calls:
        got = model.to(dtype)(x.to(dtype))
    assert {call.op for call in calls} == OPS
    assert got.dtype == own.dtype
    assert (got - exact).norm() <= 2 * (own - exact).norm() + 1e-10 * exact.norm()


# ------------------------------------------------------------------------------------ adapters, quantized, subclasses


@pytest.mark.parametrize("first", ["fuse", "peft"])
def test_lora(first: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, x = vit(), images()
    config = peft.LoraConfig(target_modules=["blocks.0.attn.qkv"], r=2, init_lora_weights=False)
    if first == "fuse":
        model = peft.inject_adapter_in_model(config, vk.fuse(model))
    else:
        model = vk.fuse(peft.inject_adapter_in_model(config, model))
    calls = check_as_stock(model, x)
    assert {call.op for call in calls} == OPS
    assert any("lora" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert vk.explain(model).summary == "1 of 2 blocks fused; block 0: LoRA on qkv"


def test_lora_in_all_linears_of_a_peft_model() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["qkv", "proj", "fc1", "fc2"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(vk.fuse(vit()), config)
    ran = {call.op for call in check_as_stock(model, images())}
    assert ran == {"patch_embed", "attention_qkv", "add_layer_norm"}, "patch_embed: the adapter of a Conv2d is one too"
    merged = model.merge_and_unload().requires_grad_()
    assert {call.op for call in check_as_stock(merged, images())} == OPS
    assert vk.explain(merged).summary == WHOLE


def test_dynamically_quantized_linears() -> None:
    from torch.ao.quantization import quantize_dynamic

    if torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no quantized engine")
    model, x = vit().eval(), images()
    expected = quantize_dynamic(copy.deepcopy(model), {nn.Linear})(x)
    quantized = quantize_dynamic(vk.fuse(model), {nn.Linear})
    with vk.record() as calls:
        got = quantized(x)
    assert {call.op for call in calls} == {"patch_embed", "attention_qkv", "add_layer_norm"}
    torch.testing.assert_close(got, expected, atol=0.05 * expected.abs().max().item(), rtol=0)
    reason = "qkv is torch.ao.nn.quantized.dynamic.modules.linear.Linear, not Linear"
    assert vk.explain(quantized).summary == f"0 of 2 blocks fused; block 0: {reason}; block 1: {reason}"


def test_a_weight_that_is_a_tensor_subclass() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model, x = vk.fuse(vit()), images()
    qkv = model.blocks[0].attn.qkv
    qkv.weight = nn.Parameter(TwoTensor(qkv.weight.detach(), qkv.weight.detach().clone()))
    assert vk.explain(model).summary == "1 of 2 blocks fused; block 0: a TwoTensor weight on qkv"
    expected = vk.unfuse(copy.deepcopy(model))(x)
    torch.testing.assert_close(torch.as_tensor(model(x).a), expected.a, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- hooks

HOOKED = {
    "blocks.0.attn.qkv": "a hook on qkv",
    "blocks.0.attn": "a hook on attn",
    "blocks.0.mlp.fc1": "a hook on fc1",
    "blocks.0.norm2": "a hook on the norm of mlp",
    "blocks.0.mlp": "a hook on mlp",
}


@pytest.mark.parametrize("name", HOOKED)
def test_a_hook_sees_and_changes_what_it_would(name: str) -> None:
    model, x = vit(), images()
    seen: list[Tensor] = []

    def double(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(output.detach())
        return 2 * output

    handle = model.get_submodule(name).register_forward_hook(double)
    expected = fused.output_and_gradients(model, (x,))
    fused.check_same(fused.output_and_gradients(vk.fuse(model), (x,)), expected)
    torch.testing.assert_close(seen[1], seen[0], atol=1e-5, rtol=1e-5)
    assert vk.explain(model).summary == f"1 of 2 blocks fused; block 0: {HOOKED[name]}"
    handle.remove()
    assert vk.explain(model).summary == WHOLE


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_a_hook_that_changes_the_tokens_between_blocks(in_place: bool, grad: bool) -> None:
    model, x = vit(), images()

    def change(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.mul_(0.5) if in_place else output * 0.5

    model.blocks[0].register_forward_hook(change)
    with torch.set_grad_enabled(grad):
        expected = model(x)
        torch.testing.assert_close(vk.fuse(model)(x), expected, atol=1e-5, rtol=1e-5)


def test_a_hook_that_writes_past_autograd_is_not_missed_in_inference_mode() -> None:
    model, x = vit().eval(), images()
    model.blocks[0].register_forward_hook(lambda module, inputs, output: output.mul_(0.5))
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(vk.fuse(model)(x), expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------ what is read is kept


def test_a_rate_of_drop_path_that_changes_between_calls() -> None:
    """Schedules set it on what stands in a DropPath's place too, where nothing reads it."""
    model, x = vit(drop_path_rate=0.5, depth=3), images()
    twin = vk.fuse(copy.deepcopy(model))
    assert isinstance(model.blocks[0].drop_path1, nn.Identity)

    def outputs() -> list[Tensor]:
        found = []
        for each in (model, twin):
            torch.manual_seed(3)
            found.append(each(x))
        return found

    for rate in (None, None, 0.9, 0.0, 0.7, 0.7):
        for each in (model, twin):
            for block in each.blocks if rate is not None else ():
                block.drop_path1.drop_prob = rate
        torch.testing.assert_close(*reversed(outputs()), atol=1e-5, rtol=1e-5)
    for each in (model, twin):
        each.blocks[2].drop_path2.eval()
    torch.testing.assert_close(*reversed(outputs()), atol=1e-5, rtol=1e-5)
    assert vk.explain(twin).summary == "3 of 3 blocks fused"


@pytest.mark.parametrize("place", ["drop_path1.drop_prob", "attn.proj_drop.p", "mlp.drop1.p"])
def test_a_rate_that_is_a_tensor_and_changes_where_it_lies(place: str) -> None:
    """No module changes with it: such a dropout is called as it is."""
    model, x = vit(drop_path_rate=0.5), images()
    twin = vk.fuse(copy.deepcopy(model))
    rates = [torch.tensor(0.0) for _ in range(2)]
    for each, rate in zip((model, twin), rates, strict=True):
        module, _, name = place.rpartition(".")
        setattr(each.blocks[1].get_submodule(module), name, rate)
    for value in (0.0, 0.0, 0.6, 0.6, 0.0):
        found = []
        for each, rate in zip((model, twin), rates, strict=True):
            rate.fill_(value)
            torch.manual_seed(3)
            found.append(each(x))
        torch.testing.assert_close(*reversed(found), atol=1e-5, rtol=1e-5)


def test_a_scale_that_learns_is_the_stock_attentions() -> None:
    model, x = vit(), images()
    for block in model.blocks:
        block.attn.fused_attn = False
    vk.fuse(model)
    assert "attention_qkv" in {call.op for call in check_as_stock(model, x)}
    for block in model.blocks:
        usual = block.attn.scale
        del block.attn.scale
        block.attn.scale = nn.Parameter(torch.tensor(usual))
    calls = check_as_stock(model, x)
    assert "attention_qkv" not in {call.op for call in calls}
    assert "mlp" in {call.op for call in calls}
    assert "a scale of its own" in str(vk.explain(model))


def test_weights_that_are_loaded_between_calls_reach_a_bias_of_positions() -> None:
    """The bias is made of parameters at each call, while what else is read off a block is kept."""
    build = functools.partial(timm.create_model, "vit_relpos_small_patch16_224", img_size=32, depth=2)
    model, other, x = build().eval(), build(), images()
    twin = vk.fuse(copy.deepcopy(model))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        before = model(x)
        for _ in range(3):
            torch.testing.assert_close(twin(x), before, atol=1e-5, rtol=1e-5)
        for each in (model, twin):
            each.load_state_dict(other.state_dict())
        after = model(x)
        assert not torch.allclose(after, before, atol=1e-2)
        torch.testing.assert_close(twin(x), after, atol=1e-4, rtol=1e-4)
    assert vk.explain(twin).summary == "2 of 2 blocks fused"


# ------------------------------------------------------------------------------------------- frozen, and rearranged


def test_first_blocks_frozen_under_no_grad() -> None:
    class Tuned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit(depth=3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                tokens = self.vit.blocks[0](self.vit.norm_pre(self.vit.patch_embed(x)))
            return self.vit.norm(self.vit.blocks[2](self.vit.blocks[1](tokens)))

    model, x = Tuned(), images()
    expected = fused.output_and_gradients(model, (x,))
    assert expected["vit.blocks.1.norm1.weight"].norm() > 0
    fused.check_same(fused.output_and_gradients(vk.fuse(model), (x,)), expected)


def test_frozen_parameters_get_no_gradient() -> None:
    model, x = vit(), images()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("blocks.1", "norm", "head")) and "bias" not in name)
    expected = fused.output_and_gradients(model, (x,))
    fused.check_same(fused.output_and_gradients(vk.fuse(model), (x,)), expected)


def _skip(model: nn.Module) -> None:
    model.blocks[1] = nn.Identity()


def _replace(model: nn.Module) -> None:
    model.blocks[1] = vit().blocks[0]


def _reverse(model: nn.Module) -> None:
    model.blocks = nn.Sequential(*reversed(model.blocks))


def _repeat(model: nn.Module) -> None:
    model.blocks = nn.Sequential(model.blocks[0], model.blocks[0], model.blocks[1], model.blocks[2])


def _new_norm(model: nn.Module) -> None:
    model.blocks[1].norm1 = nn.LayerNorm(48)


def _no_last_norm(model: nn.Module) -> None:
    model.norm = nn.Identity()


def _new_head(model: nn.Module) -> None:
    model.reset_classifier(7)


@pytest.mark.parametrize("change", [_skip, _replace, _reverse, _repeat, _new_norm, _no_last_norm, _new_head])
@pytest.mark.parametrize("again", [False, True], ids=["fused before", "fused again"])
def test_blocks_that_change_places(change: Callable[[nn.Module], None], again: bool) -> None:
    model, x = vk.fuse(vit(depth=3)), images()
    change(model)
    if again:
        vk.fuse(model)
    assert check_as_stock(model, x)


def test_a_block_alone() -> None:
    model = vk.fuse(vit(depth=3))
    tokens = torch.randn(2, 5, 48, requires_grad=True)
    got = torch.autograd.grad(model.blocks[1](tokens).square().sum(), tokens)[0]
    vk.unfuse(model)
    torch.testing.assert_close(got, torch.autograd.grad(model.blocks[1](tokens).square().sum(), tokens)[0])
