"""vk.fuse on the layers of transformers' vision towers: each text's, held to its own numbers."""

from __future__ import annotations

import inspect
from typing import Any

import fused
import pytest
import torch
from hf_towers import APART, LENGTHS, OWN, TOWERS, D, call_of, layers, ops_of, tower
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import vitkernels as vk
from vitkernels import dispatch
from vitkernels.fuse.swap import Fused

WHOLE = "1 of 1 blocks fused"
AROUND = "0 of 1 blocks fused; 1 of 1 blocks: residual and feed-forward fused, attention its own"
CHOSEN = ("dpt", "gemma4", "llama4", "pixtral", "qwen2_5_vl", "qwen3_vl", "sam", "sam3", "x_clip")


def stock_layers(name: str, **options: Any) -> list[nn.Module]:
    """One layer of each class in a tower that is fused, as its own class has it."""
    model = vk.fuse(tower(name, **options))
    found = list(layers(model).values())
    vk.unfuse(model)
    assert found
    return found


@pytest.mark.parametrize("name", TOWERS)
def test_output_and_every_gradient(name: str) -> None:
    for layer in stock_layers(name):
        ops = ops_of(name, layer)
        inputs, keywords = call_of(layer)
        explanation = fused.check_parity(layer, inputs, keywords, ops=ops)
        assert explanation.summary == (AROUND if ops == OWN else WHOLE)
        assert not explanation.fallbacks


@pytest.mark.parametrize("name", TOWERS)
def test_bf16_autocast_errs_no_more_than_twice_as_much(name: str) -> None:
    layer = stock_layers(name)[0]
    inputs, keywords = call_of(layer)
    # the gradient of a bias on k is 0: what comes out is rounding alone, beside other gradients of about 1
    fused.check_parity(layer, inputs, keywords, ops=TOWERS[name][0], autocast=True, absolute=4e-3)


@pytest.mark.parametrize("name", ["glm_ocr", "glpn", "janus", "minimax_m3_vl", "mlcd", "segformer", "swin", "x_clip"])
def test_a_hook_on_a_part_sees_what_stock_gives_it(name: str) -> None:
    """Tokens laid out as the layer's own code has them: the sequence first, images in a row, without messages."""
    layer = stock_layers(name)[0].eval()
    inputs, keywords = call_of(layer)

    def seen(part: str) -> list[Any]:
        found: list[Any] = []
        hook = layer.get_submodule(part).register_forward_hook(
            lambda module, *given: found.append([each for each in tree_leaves(given) if isinstance(each, Tensor)])
        )
        with torch.no_grad(), vk.use(*dispatch.order("cpu")):
            layer(*inputs, **keywords)
        hook.remove()
        return found

    names = [part for part, module in layer.named_modules() if part and not isinstance(module, nn.ModuleList)]
    own = {part: seen(part) for part in names}
    vk.fuse(layer)
    with vk.record() as calls:
        got = {part: seen(part) for part in names}
    assert {call.op for call in calls} <= ops_of(name, layer)
    assert calls
    for part in names:
        assert [[each.shape for each in call] for call in got[part]] == [
            [each.shape for each in call] for call in own[part]
        ], part
        for call, before in zip(got[part], own[part], strict=True):
            torch.testing.assert_close(call, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in TOWERS if "swin" in name])
def test_shifted_windows(name: str) -> None:
    model = tower(name)
    layer = next(each for each in model.modules() if getattr(each, "shift_size", 0))
    inputs, keywords = call_of(layer)
    assert fused.check_parity(layer, inputs, keywords, ops=TOWERS[name][0]).summary == WHOLE


@pytest.mark.parametrize("name", ["swin", "donut.donut_swin", "maskformer.maskformer_swin"])
def test_whole_windows_are_made_within_a_step(name: str) -> None:
    """And those of an image that is padded by the layer's own code."""
    layer = vk.fuse(next(each for each in tower(name).modules() if getattr(each, "shift_size", 0)))
    size, width = layer.window_size, layer.layernorm_before.weight.shape[0]
    for sides, within in (((2 * size, size * 3), True), ((2 * size, size * 3 - 1), False)):
        tokens = torch.randn(2, sides[0] * sides[1], width, requires_grad=True)
        fused.check_parity(vk.unfuse(layer), (tokens, sides), ops=TOWERS[name][0])
        nodes = fused.nodes(vk.fuse(layer)(tokens, sides)[0])
        assert "residual_stepsBackward" in nodes
        assert ("attention_qkvBackward" not in nodes) is within


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize(("name", "sides"), [("hiera", (16,)), ("sam2", (6, 7))])
def test_layers_that_leave_fewer_tokens(name: str, sides: tuple[int, ...], autocast: bool) -> None:
    model = tower(name, **({"window_size_per_stage": [4, 2]} if name == "sam2" else {}))
    layer = next(each for each in model.modules() if {"proj", "mlp"} <= {*each._modules})
    tokens = torch.randn(2, *sides, D, requires_grad=True)
    explanation = fused.check_parity(
        layer, (tokens,), ops=APART | {"linear"}, autocast=autocast, absolute=4e-3 if autocast else None
    )
    assert explanation.summary == WHOLE
    assert not explanation.fallbacks


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", ["got_ocr2", "sam", "vitdet"])
def test_relative_positions_of_a_whole_image_of_other_sides(name: str, autocast: bool) -> None:
    """Of another size than the tables are for, which are interpolated."""
    layer: Any = next(each for each in tower(name).modules() if getattr(each, "window_size", 1) == 0)
    (tokens,), keywords = call_of(layer)
    size = [5 if side == 4 else side for side in tokens.shape]
    tokens = torch.randn(*size[:-1], 7 if tokens.shape[-1] == 4 else size[-1], requires_grad=True)
    explanation = fused.check_parity(
        layer, (tokens,), keywords, ops=TOWERS[name][0], autocast=autocast, absolute=4e-3 if autocast else None
    )
    assert explanation.summary == WHOLE
    assert not explanation.fallbacks


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "glm_image", "minimax_m3_vl"])
def test_images_of_many_sizes(name: str, lengths: tuple[int, ...]) -> None:
    layer = stock_layers(name)[0]
    inputs, keywords = call_of(layer, lengths)
    fused.check_parity(layer, inputs, keywords, ops=TOWERS[name][0])


@pytest.mark.parametrize("name", CHOSEN)
def test_keywords_that_transformers_trainer_sends_through(name: str) -> None:
    """It sets `use_cache` in the config, which reaches each layer from there, and counts the items of a batch."""
    for layer in stock_layers(name):
        inputs, keywords = call_of(layer)
        if any(each.kind is each.VAR_KEYWORD for each in inspect.signature(layer.forward).parameters.values()):
            keywords |= {"use_cache": False, "num_items_in_batch": torch.tensor(4)}
        explanation = fused.check_parity(layer, inputs, keywords, ops=TOWERS[name][0])
        assert not explanation.fallbacks


def test_projections_with_limits() -> None:
    """As in the smaller checkpoints of Gemma 4."""
    model = tower("gemma4", use_clipped_linears=True)
    for name, limit in model.named_buffers():
        if name.endswith(("_min", "_max")):
            limit.fill_(-1.5 if name.endswith("min") else 1.5)
    layer: Any = next(each for each in model.modules() if hasattr(each, "self_attn"))
    inputs, keywords = call_of(layer)
    explanation = fused.check_parity(layer, inputs, keywords, ops=TOWERS["gemma4"][0] - {"glu_mlp"})
    assert explanation.summary == WHOLE
    layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: None)
    explanation = fused.check_parity(layer, inputs, keywords, ops=TOWERS["gemma4"][0] - {"glu_mlp"})
    assert explanation.unfused == {"": "a hook on q_proj"}


@pytest.mark.parametrize("name", TOWERS)
def test_a_call_that_is_left_to_the_stock_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in stock_layers(name):
        inputs, keywords = call_of(layer)
        own = layer(*inputs, **keywords)
        vk.fuse(layer)
        with monkeypatch.context() as patch, vk.use("reference"), vk.record() as calls:
            patch.setattr(Fused, "why_not_own", lambda self: "a test")
            torch.testing.assert_close(layer(*inputs, **keywords), own, rtol=0, atol=0)
        assert not calls
        assert vk.explain(layer).fallbacks[""] == {"a test": 1}


def numbers(layer: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any], checkpointed: bool) -> list[Tensor]:
    """Output and gradients, the layer run as it is or in a checkpoint."""
    call = (lambda *x, **given: checkpoint(layer, *x, use_reentrant=False, **given)) if checkpointed else layer
    out = call(*inputs, **keywords)
    out = out[0] if isinstance(out, tuple) else out
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
    return [out, *torch.autograd.grad(loss, [*inputs, *layer.parameters()], allow_unused=True)]


@pytest.mark.parametrize("name", CHOSEN)
def test_gradient_checkpointing(name: str) -> None:
    layer = stock_layers(name)[0]
    inputs, keywords = call_of(layer)
    own = numbers(layer, inputs, keywords, False)
    vk.fuse(layer)
    with vk.record() as calls:
        got = numbers(layer, inputs, keywords, True)
    product = "glu_mlp" if "glu_mlp" in TOWERS[name][0] else "mlp"
    assert [call.op for call in calls if call.direction == "forward"].count(product) == 2  # again for the backward pass
    for one, other in zip(got, own, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_drop_path_draws_as_ever() -> None:
    for name in ("pixio", "vjepa2", "x_clip", "videomt"):
        layer = stock_layers(name, drop_path_rate=0.5)[-1]
        inputs, keywords = call_of(layer)
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            runs.append((fused.output_and_gradients(layer, inputs, keywords), torch.get_rng_state()))
            vk.fuse(layer)
        (own, state), (got, after) = runs
        assert torch.equal(state, after)
        for key, tensor in own.items():
            assert (got[key] - tensor).norm() <= 1e-4 * tensor.norm() + 1e-4, (name, key)


# ---------------------------------------------------------------------------------------------- calls that fall back


@pytest.mark.parametrize(
    ("name", "place", "reason"),
    [
        ("dpt", "output", "a hook on output"),
        ("dpt", "attention.attention", "a hook on attention"),
        ("qwen3_vl", "attn", "a hook on attn"),
        ("sam3", "attention", "a hook on attention"),
        ("x_clip", "message_attn", "a hook on message_attn"),
    ],
)
def test_a_users_hook_still_sees_its_module(name: str, place: str, reason: str) -> None:
    layer = stock_layers(name)[0]
    inputs, keywords = call_of(layer)
    seen: list[Any] = []
    layer.get_submodule(place).register_forward_hook(lambda module, args, output: seen.append(output))
    own = layer(*inputs, **keywords)
    vk.fuse(layer)
    got = layer(*inputs, **keywords)
    torch.testing.assert_close(got, own)
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0])
    assert vk.explain(layer).unfused == {"": reason}


@pytest.mark.parametrize("name", ["flava", "vilt", "vitdet", "pvt", "llama4"])
def test_weights_that_are_asked_for_are_the_stock_layers(name: str) -> None:
    layer = stock_layers(name)[0]
    inputs, keywords = call_of(layer)
    own = layer(*inputs, **keywords, output_attentions=True)
    vk.fuse(layer)
    got = layer(*inputs, **keywords, output_attentions=True)
    torch.testing.assert_close(got, own)
    assert vk.explain(layer).fallbacks[""] == {"called with output_attentions": 1}


@pytest.mark.parametrize(("name", "missing"), [("qwen2_vl", "cu_seqlens"), ("sapiens2", "position_embeddings")])
def test_a_call_that_lacks_something_raises_the_stock_layers_error(name: str, missing: str) -> None:
    layer = stock_layers(name)[0]
    inputs, keywords = call_of(layer)
    vk.fuse(layer)
    with pytest.raises((TypeError, AttributeError)):
        layer(*inputs, **{**keywords, missing: None})
    assert vk.explain(layer).fallbacks[""] == {f"called without {missing}": 1}


# --------------------------------------------------------------------------------------------------- whole towers


def _patches(sides: list[tuple[int, int, int]], width: int) -> tuple[Tensor, Tensor]:
    grid = torch.tensor(sides)
    return torch.randn(int(grid.prod(1).sum()), width), grid


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_batch_of_images_of_different_sizes(name: str) -> None:
    model = tower(name, spatial_merge_size=2, **({"window_size": 32} if name == "qwen2_5_vl" else {}))
    pixels, grid = _patches([(1, 4, 6), (1, 4, 4), (2, 2, 4)], 3 * 2 * 8 * 8)
    inputs = (pixels.requires_grad_(),)
    # the convolution over patches is a product
    explanation = fused.check_parity(model, inputs, {"grid_thw": grid}, ops=TOWERS[name][0] | {"linear"})
    assert explanation.summary == "2 of 2 blocks fused"


def test_twenty_steps_of_training_are_the_stock_models() -> None:
    pixels, grid = _patches([(1, 4, 6), (1, 4, 4)], 3 * 2 * 8 * 8)
    losses = []
    for prepare in (lambda model: model, vk.fuse):
        model = prepare(tower("qwen2_5_vl", spatial_merge_size=2, window_size=32))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(20):
            loss = model(pixels, grid_thw=grid).pooler_output.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("name", ["blip", "dpt", "florence2", "gemma4", "mlcd", "sam", "sam2"])
def test_compiled_whole(name: str) -> None:
    layer = vk.fuse(stock_layers(name)[0])
    inputs, keywords = call_of(layer)
    own = fused.output_and_gradients(layer, inputs, keywords)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with vk.record() as calls:
        got = fused.output_and_gradients(compiled, inputs, keywords)
    assert {call.op for call in calls} == TOWERS[name][0]
    for key, tensor in own.items():
        torch.testing.assert_close(got[key if key in got else f"_orig_mod.{key}"], tensor)


# ---------------------------------------------------------------------------------------------- patches of videos


@pytest.mark.parametrize(
    ("size", "ops"),
    [((6, 3, 2, 8, 8), {"linear"}), ((2, 3, 4, 24, 16), {"patch_embed"}), ((2, 3, 2, 16, 8), {"patch_embed"})],
    ids=["patches", "videos", "frames"],
)
def test_a_convolution_over_patches_of_videos(size: tuple[int, ...], ops: set[str]) -> None:
    model = nn.Sequential(nn.Conv3d(3, 16, (2, 8, 8), (2, 8, 8)))
    video = torch.randn(size, requires_grad=True)
    own = model(video)
    vk.fuse(model)
    assert model(video).shape == own.shape
    vk.unfuse(model)
    fused.check_parity(model, (video,), ops=ops)


@pytest.mark.parametrize(
    ("options", "size"),
    [({"padding": 1}, (1, 3, 2, 8, 8)), ({}, (1, 3, 3, 8, 8)), ({"groups": 3}, (1, 3, 2, 8, 8))],
    ids=["padded", "no multiple", "grouped"],
)
def test_other_convolutions_stay_what_they_are(options: dict[str, Any], size: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Conv3d(3, 48, (2, 8, 8), (2, 8, 8), **options), nn.Linear(1, 1))
    own = model[0](torch.ones(size))
    if not options:
        vk.fuse(model)
    with vk.record() as calls:
        torch.testing.assert_close(model[0](torch.ones(size)), own)
    assert not calls
