"""vk.fuse on torchvision's Vision Transformers: small random ones, held to their own numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import fused
import peers
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_layers import Adds

import vitkernels as vk

peers.import_timm()
torchvision = pytest.importorskip("torchvision")

OPS = {"patch_embed", "linear", "attention_qkv", "add_layer_norm", "mlp"}
SMALL: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "num_layers": 2,
    "num_heads": 3,
    "hidden_dim": 48,
    "mlp_dim": 96,
    "num_classes": 10,
}


def vit(**options: Any) -> nn.Module:
    model = torchvision.models.VisionTransformer(**{**SMALL, **options})
    fused.stir(model)
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, requires_grad=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"representation_size": 24}, {"norm_layer": partial(nn.LayerNorm, eps=0.1)}],
    ids=["plain", "pre-logits", "eps"],
)
def test_output_and_every_gradient(options: dict[str, Any], training: bool) -> None:
    model = vit(**options).train(training)
    explanation = fused.check_parity(model, (images(),), ops=OPS)
    assert explanation.summary == "2 of 2 blocks fused"


def test_autocast() -> None:
    fused.check_parity(vit(), (torch.randn(8, 3, 32, 32),), ops=OPS, autocast=True)


def test_rows() -> None:
    rows = vk.explain(vk.fuse(vit())).rows
    blocks = [f"encoder.layers.encoder_layer_{index}" for index in range(2)]
    assert [(row.module, row.part, row.ops, row.why_not) for row in rows if row.module != "heads"] == [
        ("conv_proj", "", "patch_embed", None),
        ("encoder.layers", "borders", "add_layer_norm", None),
        *(
            (block, *row, None)
            for block in blocks
            for row in (
                ("self_attention", "linear, attention, linear"),
                ("self_attention residual", "add_layer_norm"),
                ("mlp", "mlp"),
                ("mlp residual", "add_layer_norm"),
            )
        ),
    ]


def test_a_lone_block_has_no_border() -> None:
    model = vk.fuse(vit(num_layers=1))
    assert "borders" not in {row.part for row in vk.explain(model).rows}
    assert type(model.encoder.layers) is nn.Sequential


def test_blocks_hand_their_sums_over() -> None:
    """The first norm, and an op for each sum but the last, which is torch's as that of the positions is."""
    model = vk.fuse(vit())
    with vk.record() as calls, Adds() as adds:
        model(images())
    assert [call.op for call in calls].count("add_layer_norm") == 1 + 3
    assert adds.count == 2


@pytest.mark.parametrize("name", ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"])
def test_every_model_of_the_library(name: str) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    explanation = vk.explain(vk.fuse(model, strict=True))
    count = len(model.get_submodule("encoder.layers"))  # type: ignore[arg-type]
    assert explanation.summary == f"{count} of {count} blocks fused"


@pytest.mark.parametrize(("dropout", "of_weights"), [(0.3, 0.0), (0.0, 0.3), (0.3, 0.3)])
def test_same_seed_drops_the_same(dropout: float, of_weights: float) -> None:
    model, image = vit(dropout=dropout, attention_dropout=of_weights), images()
    torch.manual_seed(1)
    expected, after = model(image), torch.rand(())
    vk.fuse(model)
    with vk.record() as calls:
        torch.manual_seed(1)
        got = model(image)
    torch.testing.assert_close(got, expected)
    assert torch.equal(torch.rand(()), after)
    assert {call.op for call in calls} >= {"patch_embed", "linear", "add_layer_norm"}
    reasons = {row.why_not for row in vk.explain(model).rows if row.module != "heads"} - {None}
    assert reasons == {
        *(["a dropout after the activation"] if dropout else []),
        *(["a dropout of attention's weights"] if of_weights else []),
    }
    assert vk.explain(model.eval()).summary == "2 of 2 blocks fused"


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        ("self_attention", "a hook on self_attention"),
        ("mlp", "a hook on mlp"),
        ("mlp.0", "a hook on mlp.0"),
        ("ln_2", "a hook on the norm of mlp"),
    ],
)
def test_hook_on_an_inner_module(inner: str, words: str) -> None:
    model, image, seen = vit(), images(), []
    expected = model(image)
    vk.fuse(model)
    block = model.get_submodule("encoder.layers.encoder_layer_1")
    block.get_submodule(inner).register_forward_hook(lambda *call: seen.append(call))
    torch.testing.assert_close(model(image), expected)
    assert len(seen) == 1
    assert vk.explain(model).summary == f"1 of 2 blocks fused; block 1: {words}"


def test_subclass_with_a_forward_of_its_own() -> None:
    class Doubled(torchvision.models.vision_transformer.EncoderBlock):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = vit()
    blocks = model.get_submodule("encoder.layers")
    blocks[1] = Doubled(3, 48, 96, 0.0, 0.0)  # type: ignore[index]
    fused.stir(blocks)
    explanation = fused.check_parity(model, (images(),), ops=OPS)
    assert "1 of 2 blocks fused" in explanation.summary
    served = {row.module.rpartition(".")[2] for row in explanation.rows if row.ops}
    assert served >= {"self_attention", "mlp"}  # what is in it runs fused all the same


def test_feed_forward_of_three_linears_stays() -> None:
    model = nn.Sequential(torchvision.ops.MLP(48, [96, 48]), torchvision.ops.MLP(48, [96, 96, 48]))
    fused.stir(model)
    explanation = fused.check_parity(model, (torch.randn(2, 5, 48),), ops={"mlp"})
    assert [(row.module, row.why_not) for row in explanation.rows if row.module] == [
        ("0", None),
        ("1", "it is not Linear, activation, Dropout, Linear, Dropout"),
    ]


# ------------------------------------------------------------------------------------------------------- frameworks


def test_compile() -> None:
    model, image = vit(), images()
    expected = fused.output_and_gradients(model, (image,))
    compiled = torch.compile(vk.fuse(model), fullgraph=True, backend="aot_eager")
    with vk.record() as calls:
        got = fused.output_and_gradients(compiled, (image,))
    assert {call.op for call in calls} == OPS
    for (name, tensor), exact in zip(got.items(), expected.values(), strict=True):
        torch.testing.assert_close(tensor, exact, msg=name)


def test_export() -> None:
    model, image = vit().eval(), images().detach()
    with torch.no_grad():
        expected = model(image)
        program = torch.export.export(vk.fuse(model), (image,))
        torch.testing.assert_close(program.module()(image), expected)
    assert "vitkernels.attention_qkv.default" in str(program.graph)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(again: Callable[[nn.Module], nn.Module]) -> None:
    model, image = vk.fuse(vit()), images()
    twin = again(model)
    assert torch.equal(twin(image), model(image))
    assert vk.explain(twin).summary == "2 of 2 blocks fused"
    block = torchvision.models.vision_transformer.EncoderBlock
    assert type(vk.unfuse(twin).get_submodule("encoder.layers.encoder_layer_0")) is block


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    encoder = vk.fuse(vit()).get_submodule("encoder")
    x = torch.randn(2, 17, 48, requires_grad=True)
    expected = torch.autograd.grad(encoder.ln(encoder.layers(x)).square().sum(), x)[0]  # type: ignore[operator]
    out = x
    for block in encoder.layers:  # type: ignore[union-attr]
        out = checkpoint(block, out, use_reentrant=reentrant)
    encoder.ln(out).square().sum().backward()  # type: ignore[operator]
    torch.testing.assert_close(x.grad, expected)


WINDOWS = {
    "SwinTransformerBlock": {"linear", "attention_qkv", "add_layer_norm", "mlp"},
    "SwinTransformerBlockV2": {"linear", "attention", "add_layer_norm", "mlp"},
}


def swin(cls: str, shift: list[int], **options: Any) -> nn.Module:
    block = getattr(torchvision.models.swin_transformer, cls)(48, 3, [4, 3], shift, 2.0, **options)
    fused.stir(block)
    return block


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("shift", [[0, 0], [2, 1], [0, 1]], ids=str)
@pytest.mark.parametrize("columns", [6, 7, 3], ids=["whole", "padded", "one beside another"])
@pytest.mark.parametrize("cls", WINDOWS)
def test_windows(cls: str, columns: int, shift: list[int], autocast: bool) -> None:
    tokens = torch.randn(2, 8, columns, 48, requires_grad=True)
    explanation = fused.check_parity(swin(cls, shift), (tokens,), ops=WINDOWS[cls], autocast=autocast, absolute=4e-3)
    assert explanation.summary == "1 of 1 blocks fused"
    assert not explanation.fallbacks


def test_whole_windows_are_made_within_a_step() -> None:
    block = vk.fuse(swin("SwinTransformerBlock", [2, 1]))
    for columns, within in ((6, True), (7, False)):
        out = block(torch.randn(2, 8, columns, 48))
        names = fused.nodes(out)
        assert "residual_stepsBackward" in names
        assert ("attention_qkvBackward" not in names) is within


@pytest.mark.parametrize(("cls", "mode"), [(name, "row") for name in WINDOWS] + [("SwinTransformerBlock", "batch")])
def test_stochastic_depth_draws_as_ever(cls: str, mode: str) -> None:
    block, tokens, found = swin(cls, [2, 1], stochastic_depth_prob=0.5), torch.randn(8, 8, 6, 48), []
    block.stochastic_depth.mode = mode
    for _ in range(2):
        torch.manual_seed(3)
        found.append((fused.output_and_gradients(block, (tokens,)), torch.get_rng_state()))
        vk.fuse(block)
    (own, state), (got, after) = found
    assert torch.equal(state, after)
    fused.check_same(got, own)


def test_a_hook_on_a_projection_of_windows_runs_torchvisions_function() -> None:
    block = swin("SwinTransformerBlock", [2, 1])
    block.attn.proj.register_forward_hook(lambda module, args, output: None)
    assert vk.explain(vk.fuse(block)).summary == "0 of 1 blocks fused; block 0: a hook on proj"
    block(torch.randn(2, 8, 6, 48))
    assert list(vk.explain(block).fallbacks) == ["attn"]
