"""What people do with a model, done with a fused one: compile, export, checkpoint, trace, script, take features."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import fused
import peers
import pytest
import torch
from timm_vit import OPS, images, timm, vit
from torch import Tensor, nn

import vitkernels as vk

MODELS: dict[str, Callable[[], nn.Module]] = {"timm": vit, "transformers": peers.transformers_vit}


def check_run(model: nn.Module, expected: dict[str, Tensor], inputs: tuple[Any, ...], ops: set[str] = OPS) -> None:
    """Output and every gradient of a fused model in a framework are the stock model's, and the kernels ran."""
    with vk.record() as calls:
        got = fused.output_and_gradients(model, inputs)
    for direction in ("forward", "backward"):
        assert {call.op for call in calls if call.direction == direction} == ops
    fused.check_same(got, expected)


# ---------------------------------------------------------------------------------------------- compile and export


@pytest.mark.parametrize(
    ("name", "compiler"), [("timm", "inductor"), ("timm", "aot_eager"), ("transformers", "aot_eager")]
)
def test_compile_in_one_graph(name: str, compiler: str) -> None:
    model, x = MODELS[name](), images()
    expected = fused.output_and_gradients(model, (x,))
    compiled = torch.compile(vk.fuse(model), fullgraph=True, backend=compiler)
    with vk.record() as calls:
        got = fused.output_and_gradients(compiled, (x,))
    fused.check_same({key.removeprefix("_orig_mod."): tensor for key, tensor in got.items()}, expected)
    assert {call.op for call in calls} == OPS
    sums = [call for call in calls if (call.op, call.direction) == ("add_layer_norm", "forward")]
    # timm's blocks are in a Sequential, whose border is crossed; transformers' own loop runs its layers one by one
    assert len(sums) == {"timm": 1 + 3, "transformers": 2 * 2}[name]


def test_a_compiled_model_may_be_fused() -> None:
    model, x = vit(), images()
    expected = fused.output_and_gradients(model, (x,))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x)
    vk.fuse(compiled)
    with vk.record() as calls:
        got = fused.output_and_gradients(compiled, (x,))
    fused.check_same({key.removeprefix("_orig_mod."): tensor for key, tensor in got.items()}, expected)
    assert {call.op for call in calls} == OPS, "compiled anew"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_export(name: str, strict: bool) -> None:
    model, x = MODELS[name]().eval(), images()
    expected = fused.output_and_gradients(model, (x,))["output 0"]
    batch = torch.export.Dim("batch", min=2, max=64)
    keyword = "x" if name == "timm" else "pixel_values"
    program = torch.export.export(vk.fuse(model), (), {keyword: x}, strict=strict, dynamic_shapes={keyword: {0: batch}})
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {f"vitkernels.{op}.default" for op in OPS} <= names
    got = program.module()(**{keyword: x})
    torch.testing.assert_close(got if name == "timm" else got["logits"], expected, atol=1e-5, rtol=1e-5)
    assert program.module()(**{keyword: images(5)}) is not None


# --------------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
def test_timm_gradient_checkpointing(reentrant: bool) -> None:
    model, x = vit(init_values=0.5, drop_path_rate=0.3), images().requires_grad_()
    torch.manual_seed(5)
    expected = _gradients(model, x)
    vk.fuse(model).set_grad_checkpointing()
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(reentrant)
    try:
        torch.manual_seed(5)
        with vk.record() as calls:
            got = _gradients(model, x)
    finally:
        timm.layers.set_reentrant_ckpt(before)
    fused.check_same(got, expected)
    forward = [call.op for call in calls if call.direction == "forward"]
    assert forward.count("mlp") == 2 * 2, "each block ran twice, fused"


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_each_block(reentrant: bool) -> None:
    model, x = vit(), images().requires_grad_()
    expected = _gradients(model, x)
    vk.fuse(model)
    model.blocks = nn.Sequential(*(_Checkpointed(block, reentrant) for block in model.blocks))
    got = _gradients(model, x)
    fused.check_same({name.replace("block.", ""): tensor for name, tensor in got.items()}, expected)


class _Checkpointed(nn.Module):
    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=self.reentrant)  # type: ignore[return-value]


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By `backward`, the way into a reentrant checkpoint."""
    model.zero_grad()
    x.grad = None
    output = model(x)
    output.square().sum().backward()
    named = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"output": output.detach(), "input": x.grad, **named}


# ------------------------------------------------------------------------------------------------ tracing, scripting


def test_fx_keeps_the_stock_nodes() -> None:
    model, x = vit().eval(), images()
    stock = torch.fx.symbolic_trace(copy.deepcopy(model))
    traced = torch.fx.symbolic_trace(vk.fuse(model))
    assert [(node.op, str(node.target)) for node in traced.graph.nodes] == [
        (node.op, str(node.target)) for node in stock.graph.nodes
    ]
    torch.testing.assert_close(traced(x), stock(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_feature_extraction_by_names_of_nodes(library: str) -> None:
    model, x = vit().eval(), images()
    nodes = ["blocks.0.attn.qkv", "blocks.1"]
    if library == "timm":
        from timm.models import create_feature_extractor  # type: ignore[attr-defined]
    else:
        from torchvision.models.feature_extraction import create_feature_extractor
    options: Any = nodes if library == "torchvision" else dict(zip(nodes, nodes, strict=True))
    expected = create_feature_extractor(copy.deepcopy(model), options)(x)
    got = create_feature_extractor(vk.fuse(model), options)(x)
    for name in nodes:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-5)


def test_script_compiles_the_stock_code() -> None:
    model, x = vit().eval(), images()
    expected = model(x)
    scripted = torch.jit.script(vk.fuse(model))
    torch.testing.assert_close(scripted(x), expected, atol=1e-5, rtol=1e-5)
    with vk.record() as calls:
        model(x)
    assert {call.op for call in calls} == OPS, "the model itself stays fused"


def test_trace_records_the_stock_code() -> None:
    model, x = vit().eval(), images()
    expected = model(x)
    traced = torch.jit.trace(vk.fuse(model), (x,))
    with vk.record() as calls:
        torch.testing.assert_close(traced(x), expected, atol=1e-5, rtol=1e-5)
    assert not calls
    assert list(vk.explain(model).fallbacks["blocks.0"]) == ["traced by torch.jit"]


# --------------------------------------------------------------------------------------------------------- features


def test_intermediate_features() -> None:
    model, x = vit(), images()
    expected = model.forward_intermediates(x, norm=True)
    vk.fuse(model)
    with vk.record() as calls:
        got = model.forward_intermediates(x, norm=True)
    assert {call.op for call in calls} == OPS
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_features_only() -> None:
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=[0, 1], **peers.SIZES)
    fused.stir(model)
    explanation = fused.check_parity(model, (images(),), ops=OPS)
    assert explanation.summary == "2 of 2 blocks fused"


# ---------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name: str) -> None:
    model, x = MODELS[name](), images()
    explanation = fused.check_parity(model, (x,), ops=OPS, autocast=True, absolute=2e-3)
    assert explanation.summary == "2 of 2 blocks fused"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference(mode: Any) -> None:
    model, x = vit().eval(), images()
    expected = model(x).detach()
    vk.fuse(model)
    with mode(), vk.record() as calls:
        got = model(x)
    assert {call.op for call in calls} == OPS
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not got.requires_grad


@pytest.mark.parametrize(
    "name",
    [
        "eva02_tiny_patch14_224",
        "vit_small_patch16_dinov3",
        "vit_small_patch16_rope_224",
        "vit_relpos_small_patch16_224",
        "beit_base_patch16_224",
        "vit_small_patch16_224",
    ],
)
def test_timms_feature_extractor_traces_as_it_traces_stock(name: str) -> None:
    """Arguments, weights and masks may be proxies, and a module may be called on a buffer meanwhile."""
    from timm.models._features_fx import get_notrace_functions, get_notrace_modules
    from torchvision.models.feature_extraction import get_graph_node_names

    options = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    model = timm.create_model(name, depth=1).eval()
    expected = get_graph_node_names(model, tracer_kwargs=options)
    assert get_graph_node_names(vk.fuse(model), tracer_kwargs=options) == expected
