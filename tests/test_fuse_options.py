"""The options of vk.fuse, and what it says of bad input."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import fused
import pytest
import timm_vit
import torch
from timm_vit import images, timm
from torch import Tensor, nn

import vitkernels as vk
from vitkernels import dispatch

vit = functools.partial(timm_vit.vit, depth=3)
WHOLE = "3 of 3 blocks fused"


# ----------------------------------------------------------------------------------------------------------- backend


def test_backend_forward_and_backward_and_beside_it() -> None:
    if dispatch.why_not("ext") is not None:
        pytest.skip(f"ext: {dispatch.why_not('ext')}")
    first, second, x = vk.fuse(vit(), backend="reference"), vk.fuse(vit()), images()
    with vk.record() as calls:
        first(x).sum().backward()
        (first(x) + second(x)).sum().backward()
    ran = {(call.backend, call.direction) for call in calls}
    assert ran == {(name, way) for name in ("reference", "ext") for way in ("forward", "backward")}
    with vk.record() as calls, vk.use("ext"):
        first(x).sum().backward()
    assert {call.backend for call in calls} == {"reference"}, "the model's own order goes first"
    assert {row.backend for row in vk.explain(first).rows} == {"reference"}
    vk.fuse(first, backend=["ext", "reference"])
    with vk.record() as calls:
        first(x)
    assert {call.backend for call in calls} == {"ext"}


def test_compiled_code_follows_use() -> None:
    model, x = vk.fuse(vit(), backend="ext"), images()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with vk.record() as calls, vk.use("reference"):
        compiled(x)
    assert {call.backend for call in calls} == {"reference"}


# ------------------------------------------------------------------------------------------- dtype of the tokens


@pytest.mark.parametrize("init_values", [None, 0.5], ids=["plain", "LayerScale"])
def test_residual_dtype(init_values: float | None) -> None:
    model, x = vit(init_values=init_values), images()
    exact = copy.deepcopy(model).double()(x.double())
    seen: list[torch.dtype] = []
    with torch.autocast("cpu", torch.bfloat16):
        own = model(x)
        vk.fuse(model, residual_dtype=torch.bfloat16)
        for block in model.blocks:
            block.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        got = model(x)
    assert seen == [torch.bfloat16] * 3
    assert (got - exact).norm() <= 4 * (own - exact).norm(), "rounded once more at each add"
    got.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    seen.clear()
    assert model(x).dtype == torch.float32
    assert seen == [torch.float32] * 3, "without autocast products take what they are given"
    seen.clear()
    vk.fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert seen == [torch.float32] * 3, "fused again without the option"


# ------------------------------------------------------------------------------------------------------- only, skip


@pytest.mark.parametrize(
    ("options", "stock"),
    [
        ({"only": "blocks"}, {"patch_embed.proj"}),
        ({"only": "blocks.[01]"}, {"patch_embed.proj", "blocks.2"}),
        ({"only": ["blocks.1", "patch_embed"]}, {"blocks.0", "blocks.2"}),
        ({"skip": "blocks.2"}, {"blocks.2"}),
        ({"skip": ["blocks.*.attn", "patch_embed"]}, {"patch_embed.proj", *(f"blocks.{n}.attn" for n in range(3))}),
        ({"only": "blocks", "skip": "blocks.0"}, {"patch_embed.proj", "blocks.0"}),
    ],
)
def test_patterns_of_names(options: dict[str, Any], stock: set[str]) -> None:
    model, x = vit(), images()
    classes = {name: type(module) for name, module in model.named_modules()}
    expected = fused.output_and_gradients(model, (x,))
    vk.fuse(model, **options)
    for name in ("patch_embed.proj", *(f"blocks.{n}{part}" for n in range(3) for part in ("", ".attn", ".mlp"))):
        left = any(name == each or name.startswith(f"{each}.") for each in stock)
        assert (type(model.get_submodule(name)) is classes[name]) == left, name
    got = fused.output_and_gradients(model, (x,))
    fused.check_same(got, expected)


def test_a_skipped_attention_is_called_and_said() -> None:
    model = vk.fuse(vit(), skip="blocks.1.attn")
    assert vk.explain(model).summary == "2 of 3 blocks fused; block 1: attn is Attention, which is not fused"


# ----------------------------------------------------------------------------------------------------- strict, again


def test_strict() -> None:
    model = vit()
    assert vk.explain(vk.fuse(model, strict=True)).summary == WHOLE


def test_strict_changes_nothing_where_a_block_would_not_be_fused() -> None:
    model = vit()
    model.blocks[1].attn.qkv.register_forward_hook(lambda module, inputs, output: None)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match=r"blocks\.1: a hook on qkv"):
        vk.fuse(model, strict=True)
    assert [type(module) for module in model.modules()] == classes
    with pytest.raises(RuntimeError, match=r"blocks\.0: not fused; blocks\.2: not fused"):
        vk.fuse(vit(), strict=True, only="blocks.1")


def test_fusing_again_changes_nothing_but_options() -> None:
    model, x = vk.fuse(vit()), images()
    classes, expected = [type(module) for module in model.modules()], model(x)
    vk.fuse(model, backend="reference")
    assert [type(module) for module in model.modules()] == classes
    with vk.record() as calls:
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert {call.backend for call in calls} == {"reference"}
    assert sum(call.op == "add_layer_norm" for call in calls) == 1 + 5, "joined as before"
    vk.unfuse(vk.unfuse(model))
    assert not any(hasattr(module, "_vitkernels") for module in model.modules())


def _backends(model: nn.Module, x: Tensor) -> list[set[str]]:
    """That serve each block, called by itself."""
    found = []
    for block in model.blocks:  # type: ignore[union-attr]
        with vk.record() as calls:
            block(x)
        found.append({call.backend for call in calls})
    return found


@pytest.mark.parametrize("options", [{"only": "blocks.1"}, {"skip": ["blocks.0", "blocks.2"]}], ids=["only", "skip"])
def test_fusing_a_part_again_leaves_the_options_of_the_rest(options: dict[str, Any]) -> None:
    model, x = vk.fuse(vit(), backend="reference", residual_dtype=torch.bfloat16), torch.randn(2, 5, 48)
    vk.fuse(model, backend="ext", **options)
    assert _backends(model, x) == [{"reference"}, {"ext"}, {"reference"}]
    with torch.autocast("cpu", torch.bfloat16):
        assert [block(x).dtype for block in model.blocks] == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_strict_leaves_the_options_where_a_block_would_not_be_fused() -> None:
    model, x = vk.fuse(vit(), only="blocks.[01]", backend="reference"), torch.randn(2, 5, 48)
    with pytest.raises(RuntimeError, match=r"blocks\.2: not fused"):
        vk.fuse(model, only="blocks.0", backend="ext", strict=True)
    model.blocks[2].norm1.register_forward_hook(print)
    with pytest.raises(RuntimeError, match=r"blocks\.2: a hook"):
        vk.fuse(model, backend="ext", strict=True)
    assert _backends(model, x) == [{"reference"}, {"reference"}, set()]


def test_options_of_a_shallow_copy_are_its_own() -> None:
    model, x = vk.fuse(vit(), backend="reference"), torch.randn(2, 5, 48)
    twin = copy.copy(model.blocks[0].mlp)
    vk.fuse(twin, backend="ext")
    for mlp, backend in ((model.blocks[0].mlp, "reference"), (twin, "ext")):
        with vk.record() as calls:
            mlp(x)
        assert {call.backend for call in calls} == {backend}


def test_the_model_stays_what_it_is() -> None:
    model = vit()
    before = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    keys, text, modules = list(model.state_dict()), str(model), list(model.modules())
    hooks = [block.register_forward_hook(lambda *arguments: None) for block in model.blocks]
    assert vk.fuse(model) is model
    after = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    assert after == before
    assert (list(model.state_dict()), str(model)) == (keys, text)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    assert isinstance(model.blocks[0], timm.models.vision_transformer.Block)
    assert [len(block._forward_hooks) for block in model.blocks] == [1] * len(hooks)


# --------------------------------------------------------------------------------------------------------- bad input


class Longer(timm.models.vision_transformer.Block):
    """A block of a later version."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Any = None) -> Tensor:
        return super().forward(x, attn_mask, is_causal)


class Another(timm.models.vision_transformer.Block):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return 2 * super().forward(x, attn_mask, is_causal)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Longer, "forward takes (x, attn_mask, is_causal, rope), not (x, attn_mask, is_causal)"),
        (Another, f"forward is {__name__}.Another's own"),
    ],
)
def test_a_block_with_another_contract_is_declined(block: type[nn.Module], reason: str) -> None:
    model = vit()
    model.blocks[1] = block(48, 3)
    x = images()
    expected = model(x)
    torch.testing.assert_close(vk.fuse(model)(x), expected, atol=1e-5, rtol=1e-5)
    assert vk.explain(model).summary == f"2 of 3 blocks fused; block 1: {reason}"
    assert vk.explain(model).unfused == {"blocks.1": reason}


class Extended(timm.models.vision_transformer.Block):
    """A subclass that computes the same."""

    def describe(self) -> str:
        return "a block"


def test_a_subclass_with_the_stock_forward_is_fused() -> None:
    model = vit()
    model.blocks[1] = Extended(48, 3)
    assert vk.explain(vk.fuse(model)).summary == WHOLE
    assert model.blocks[1].describe() == "a block"


class Taken(timm.models.vision_transformer.Block):
    """A subclass whose own method a fused module has a method of the same name for."""

    def parts(self) -> str:
        return "two"


def test_a_subclass_whose_method_would_be_hidden_is_declined() -> None:
    model = vit()
    model.blocks[1] = Taken(48, 3)
    reason = "its parts would be hidden by what a fused module calls so"
    assert vk.explain(vk.fuse(model)).summary == f"2 of 3 blocks fused; block 1: {reason}"
    assert model.blocks[1].parts() == "two"


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "words"),
    [
        ((nn.Sequential(nn.Linear(4, 4), nn.ReLU()),), {}, ValueError, "nothing to fuse in this Sequential"),
        (("vit",), {}, TypeError, "argument 'model' is a str; needs a torch.nn.Module"),
        ((None,), {}, TypeError, "argument 'model' is a NoneType; needs a torch.nn.Module"),
        ((vit(),), {"residual_dtype": torch.int8}, TypeError, "argument 'residual_dtype' is torch.int8"),
        ((vit(),), {"residual_dtype": "bfloat16"}, TypeError, "argument 'residual_dtype' is 'bfloat16'"),
        (
            (vit(),),
            {"only": "layers.*"},
            ValueError,
            "argument 'only' has the pattern 'layers.*', which fits no module",
        ),
        ((vit(),), {"skip": ["blocks", "decoder"]}, ValueError, "argument 'skip' has the pattern 'decoder'"),
        (
            (vit(),),
            {"skip": ["blocks", "patch_embed", "norm"]},
            ValueError,
            "nothing to fuse in this VisionTransformer",
        ),
        ((vit(),), {"backend": "cudnn"}, ValueError, "fuse: unknown backend 'cudnn'"),
        ((vit(),), {"backend": []}, ValueError, "fuse: got no backend"),
    ],
)
def test_bad_input_changes_nothing(
    arguments: tuple[Any, ...], keywords: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        vk.fuse(*arguments, **keywords)
    if isinstance(arguments[0], nn.Module):
        assert not any(hasattr(module, "_vitkernels") for module in arguments[0].modules())


@pytest.mark.parametrize("function", [vk.unfuse, vk.explain])
def test_no_module(function: Any) -> None:
    with pytest.raises(TypeError, match="argument 'model' is a list"):
        function([])


def test_inside_a_compiled_function() -> None:
    model = vit()

    def build_and_run(x: Tensor) -> Tensor:
        return vk.fuse(model)(x)

    with pytest.raises(Exception, match="fuse: called inside a function that is being compiled"):
        torch.compile(build_and_run, backend="eager", fullgraph=True)(images())
    assert not any(hasattr(module, "_vitkernels") for module in model.modules())
