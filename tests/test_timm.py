"""VisionTransformer beside timm's: the same checkpoint, the same numbers, the same random draws."""

from __future__ import annotations

import dataclasses
from typing import Any

import accuracy
import peers
import pytest
import torch
from peers import SIZES
from torch import Tensor, nn

import vitkernels as vk
from vitkernels.nn import VisionTransformer, resize_pos_embed
from vitkernels.ops import _steps

timm = peers.import_timm()

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"reg_tokens": 3},
    "layer scale": {"init_values": 0.5},
    "qk_norm": {"qk_norm": True},
    "avg": {"global_pool": "avg"},
    "avg, registers": {"global_pool": "avg", "reg_tokens": 2, "init_values": 0.5},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 2},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "every token": {"global_pool": "", "num_classes": 0},
    "no qkv bias": {"qkv_bias": False},
    "rectangle": {"img_size": (16, 32), "patch_size": (8, 4), "in_chans": 1},
}
FLOOR = accuracy.FLOORS[torch.float32]


@pytest.mark.parametrize("name", OPTIONS)
def test_checkpoints_load_strictly_both_ways(name: str) -> None:
    ours, theirs = peers.build(**OPTIONS[name])
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    peers.stir(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_output_and_every_gradient(name: str, backend: str) -> None:
    ours, theirs = peers.build(**OPTIONS[name])
    images = peers.image(ours)
    exact, peer = peers.truth(theirs, images), peers.output_and_gradients(theirs, images)
    with vk.use(backend), vk.record() as calls:
        got = peers.output_and_gradients(ours, images)
    accuracy.check(got, peer, exact, FLOOR)
    norms = {"rotary_qkv"} if OPTIONS[name].get("qk_norm") else set()
    for direction in ("forward", "backward"):
        ran = {call.op for call in calls if call.direction == direction}
        assert ran == {"patch_embed", "add_layer_norm", "linear", "attention_qkv", "mlp", *norms}
    assert {call.backend for call in calls} == {backend}

    ours.double()
    with vk.use(backend):
        accuracy.check(peers.output_and_gradients(ours, images.double()), exact, exact, accuracy.FLOORS[torch.float64])


@pytest.mark.parametrize("name", ["plain", "avg, registers", "qk_norm"])
def test_bf16_autocast_errs_no_more_than_twice_as_much(name: str, backend: str) -> None:
    ours, theirs = peers.build(**OPTIONS[name])
    images = peers.image(ours)
    exact, peer = peers.truth(theirs, images), peers.output_and_gradients(theirs, images, autocast=True)
    with vk.use(backend):
        got = peers.output_and_gradients(ours, images, autocast=True)
    # the gradient of a bias on k is 0: what comes out is rounding alone, beside other gradients of about 1
    accuracy.check(got, peer, exact, dataclasses.replace(FLOOR, absolute=2e-3))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("init_values", [None, 0.5], ids=["", "layer scale"])
def test_drop_path_draws_what_timm_draws(init_values: float | None, autocast: bool, backend: str) -> None:
    ours, theirs = peers.build(init_values=init_values, drop_path_rate=0.4)
    images = peers.image(ours)
    torch.manual_seed(3)
    peer = peers.output_and_gradients(theirs, images, autocast=autocast)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    with vk.use(backend):
        got = peers.output_and_gradients(ours, images, autocast=autocast)
        assert torch.equal(torch.get_rng_state(), state)
        other = peers.output_and_gradients(ours, images, autocast=autocast)
    scale = peer["output"].abs().max()
    assert (got["output"] - peer["output"]).abs().max() < (0.02 if autocast else 1e-5) * scale
    assert (other["output"] - peer["output"]).abs().max() > 0.1 * scale
    for name, gradient in peer.items():
        difference = (got[name] - gradient).norm() / gradient.norm()
        assert difference < (0.02 if autocast else 1e-5), name


@pytest.mark.parametrize("init_values", [None, 1.0], ids=["", "layer scale"])
def test_drop_path_rounds_as_timm_rounds(init_values: float | None) -> None:
    """Without LayerScale the branch is bfloat16 under autocast, and so is the factor 1 / keep."""
    factors = []

    def spy(x: Tensor, added: _steps.Added | None, stages: list[_steps.Stage]) -> tuple[Tensor, Tensor]:
        factors.append(stages[0].factors.row_scale)
        return run(x, added, stages)

    run = _steps.run
    block = vk.nn.Block(48, 3, drop_path=0.3, init_values=init_values)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16), vk.use("reference"):
        patch.setattr(_steps, "run", spy)
        with vk.record() as calls:
            block(torch.randn(64, 2, 48))
    assert [call.op for call in calls].count("add_layer_norm") == 2
    (factor,) = factors
    dtype = torch.bfloat16 if init_values is None else torch.float32
    assert factor.dtype == dtype
    assert set(factor.tolist()) == {0.0, (torch.ones((), dtype=dtype) / (1 - 0.3)).item()}


def test_new_weights_are_drawn_from_timms_distributions() -> None:
    options = {"reg_tokens": 2, "init_values": 0.1, "qk_norm": True}
    theirs = timm.models.VisionTransformer(**SIZES, **options).state_dict()
    for name, weight in VisionTransformer(**SIZES, **options).state_dict().items():
        spread = theirs[name].std()
        if theirs[name].min() == theirs[name].max():
            assert torch.equal(weight, theirs[name]), name
        else:
            error = 4 / weight.numel() ** 0.5  # of a standard deviation from so many numbers, with room
            assert (weight.std() / spread - 1).abs() < error, name
            assert weight.mean().abs() < error * spread, name


@pytest.mark.parametrize("name", ["plain", "no_embed_class", "rectangle"])
@pytest.mark.parametrize("grid", [(6, 3), (2, 4), (4, 4)])
def test_images_of_other_sizes(name: str, grid: tuple[int, int], backend: str) -> None:
    ours, theirs = peers.build(**OPTIONS[name], dynamic_img_size=True)
    height, width = (count * side for count, side in zip(grid, ours.patch_size, strict=True))
    images = torch.randn(2, ours.patch_embed.proj.in_channels, height, width)
    exact, peer = peers.truth(theirs, images), peers.output_and_gradients(theirs, images)
    with vk.use(backend):
        accuracy.check(peers.output_and_gradients(ours, images), peer, exact, FLOOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_position_tables_are_resized_as_timm_resizes(dtype: torch.dtype) -> None:
    table = torch.randn(1, 2 + 12, 8, dtype=dtype)
    theirs = timm.layers.resample_abs_pos_embed(table, new_size=[5, 7], old_size=[3, 4], num_prefix_tokens=2)
    torch.testing.assert_close(resize_pos_embed(table, (3, 4), (5, 7), prefixes=2), theirs)


@pytest.mark.parametrize("options", [{}, {"no_embed_class": True}, {"reg_tokens": 2, "img_size": (16, 48)}])
def test_a_checkpoint_of_another_grid_loads_as_in_timm(options: dict[str, Any]) -> None:
    _, small = peers.build(**{**options, "img_size": 24})
    checkpoint = small.state_dict()
    before = checkpoint["pos_embed"].clone()
    theirs = timm.models.VisionTransformer(**{**SIZES, **options})
    theirs.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(checkpoint, theirs))
    ours = VisionTransformer(**{**SIZES, **options})
    ours.load_state_dict(checkpoint)
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, msg=name)
    assert torch.equal(checkpoint["pos_embed"], before), "the caller's dictionary was changed"


@pytest.mark.parametrize("masked", ["", "bool", "float", "causal"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_modules_by_themselves(masked: str, qk_norm: bool, backend: str) -> None:
    tokens = torch.randn(2, 7, 48)
    mask = {"bool": torch.rand(7, 7) > 0.3, "float": torch.randn(2, 1, 7, 7)}.get(masked)
    options = {"attn_mask": mask, "is_causal": masked == "causal"}
    norm = timm.layers.LayerNorm
    pairs = [
        (
            vk.nn.Attention(48, 3, qkv_bias=True, qk_norm=qk_norm),
            timm.layers.Attention(48, 3, qkv_bias=True, qk_norm=qk_norm, norm_layer=norm),
        ),
        (
            vk.nn.Block(48, 3, mlp_ratio=2.0, qk_norm=qk_norm, init_values=0.3),
            timm.models.vision_transformer.Block(48, 3, mlp_ratio=2.0, qk_norm=qk_norm, init_values=0.3),
        ),
    ]
    for ours, theirs in pairs:
        peers.stir(theirs)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        with vk.use(backend):
            torch.testing.assert_close(ours(tokens, **options), theirs(tokens, **options), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "layer"),
    [
        ("gelu", nn.GELU),
        ("gelu_tanh", lambda: nn.GELU(approximate="tanh")),
        ("quick_gelu", timm.layers.get_act_layer("quick_gelu")),
        ("relu", nn.ReLU),
        ("silu", nn.SiLU),
    ],
)
def test_mlp_by_itself(activation: str, layer: Any, backend: str) -> None:
    ours = vk.nn.Mlp(48, 96, 24, activation=activation)
    theirs = timm.layers.Mlp(48, 96, 24, act_layer=layer)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    tokens = torch.randn(2, 5, 48)
    with vk.use(backend):
        torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-4, atol=1e-5)
        ours.fc1.register_forward_hook(lambda *_: None)  # a hook: the modules are called one by one
        torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-4, atol=1e-5)


def test_patch_embed_by_itself(backend: str) -> None:
    ours = vk.nn.PatchEmbed(img_size=None, patch_size=8, embed_dim=48)
    theirs = timm.layers.PatchEmbed(img_size=None, patch_size=8, embed_dim=48)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, 24, 16)
    with vk.use(backend):
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
