"""What trainers of ViTs ask for beyond the plain model, each option against timm's or plain torch's twin of it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import peers
import pytest
import torch
import torch.nn.functional as F
from accuracy import FLOORS, check
from peers import SIZES
from refused import check_refused
from torch import Tensor, nn

import vitkernels as vk
from vitkernels.nn import Block, DropPath, VisionTransformer
from vitkernels.nn import block as block_page

timm = peers.import_timm()
OPS = {"patch_embed", "add_layer_norm", "linear", "attention_qkv", "mlp"}
ROTARY = OPS | {"rotary_qkv"}
PACKED = OPS - {"attention_qkv"} | {"attention_varlen"}
AUTOCAST = pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])


@pytest.fixture(autouse=True)
def _backends() -> Iterator[None]:
    with vk.use("ext", "reference"):
        yield


def build(**options: Any) -> VisionTransformer:
    model = VisionTransformer(**{**SIZES, **options})
    peers.stir(model)
    return model


def images(height: int = 32, width: int = 32, count: int = 3) -> Tensor:
    return torch.randn(count, 3, height, width)


def weighed(model: nn.Module, run: Callable[[nn.Module], Tensor], seed: int = 0) -> dict[str, Tensor]:
    """What `run` makes of the model, and every parameter's gradient of a loss with different weights on all of it."""
    torch.manual_seed(seed)
    output = run(model)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(output).view_as(output)
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad((output * weights).sum(), list(model.parameters()), allow_unused=True)
    found = {name: each for name, each in zip(names, gradients, strict=True) if each is not None}
    return {"output": output.detach(), **found}


def compare(
    model: nn.Module,
    twin: nn.Module,
    run: Callable[[nn.Module], Tensor],
    run_twin: Callable[[nn.Module], Tensor],
    ops: set[str],
    autocast: bool = False,
    absolute: float | None = None,
) -> None:
    """Hold a model to the one tolerance rule, and see that these ops ran both ways, and no others.

    `absolute` is allowed beside it, where gradients of 0 are made of rounding alone.
    """
    expected = weighed(copy.deepcopy(twin).double(), run_twin)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        own = weighed(twin, run_twin)
        with vk.record() as calls:
            got = weighed(model, run)
    for direction in ("forward", "backward"):
        assert {call.op for call in calls if call.direction == direction} == ops
    floor = FLOORS[torch.bfloat16 if autocast else torch.float32]
    check(got, own, expected, floor if absolute is None else dataclasses.replace(floor, absolute=absolute))


def like(model: nn.Module, tensor: Tensor) -> Tensor:
    """The tensor in the dtype of a model's weights."""
    return tensor.to(next(model.parameters()).dtype)


# ------------------------------------------------------------------------------------------------- patches left out


@AUTOCAST
def test_patch_dropout_as_timm(autocast: bool) -> None:
    ours, theirs = peers.build(patch_drop_rate=0.6, reg_tokens=1)
    pixels = images()
    torch.manual_seed(0)
    keep = torch.randn(3, 16).argsort(-1)[:, :6]  # float64 would draw others
    ours.patch_drop_rate, theirs.patch_drop = 0.0, nn.Identity()

    def run_twin(twin: Any) -> Tensor:
        tokens = twin._pos_embed(twin.patch_embed(like(twin, pixels)))
        patches = tokens[:, 2:].gather(1, keep.unsqueeze(-1).expand(-1, -1, 48))
        return twin.forward_head(twin.norm(twin.blocks(torch.cat([tokens[:, :2], patches], 1))))

    compare(ours, theirs, lambda model: model(like(model, pixels), keep), run_twin, OPS, autocast)


def test_patch_dropout_draws_as_timm_draws_in_training_alone() -> None:
    ours, theirs = peers.build(patch_drop_rate=0.6)
    pixels = images()
    torch.manual_seed(1)
    got = ours(pixels)
    torch.manual_seed(1)
    torch.testing.assert_close(got, theirs(pixels), atol=1e-5, rtol=1e-4)
    assert not torch.equal(ours(pixels), got)
    torch.testing.assert_close(ours.eval()(pixels), theirs.eval()(pixels), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("hook", [False, True], ids=["", "hook"])
def test_kept_patches_are_those_of_the_whole_image(hook: bool) -> None:
    model, pixels = build(reg_tokens=1), images()
    masking = vk.nn.random_masking(3, 16, 0.7)
    assert masking.keep.shape == (3, 4)
    if hook:  # then the patches are projected first
        model.patch_embed.register_forward_hook(lambda *_: None)
    tokens = model._embed(pixels, None)[0]
    kept = torch.stack([tokens[image, 2 + masking.keep[image]] for image in range(3)])
    expected = model.norm(model.blocks(torch.cat([tokens[:, :2], kept], dim=1)))
    torch.testing.assert_close(model.forward_features(pixels, masking.keep), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prefixes", [0, 2])
def test_unshuffle_puts_patches_back(prefixes: int) -> None:
    masking = vk.nn.random_masking(3, 16, 0.7)
    assert [sorted(row) for row in masking.keep.tolist()] == [
        [place for place, hidden in enumerate(row) if not hidden] for row in masking.hidden.tolist()
    ]
    tokens = torch.randn(3, prefixes + 4, 8, requires_grad=True)
    mask_token = torch.randn(1, 1, 8, requires_grad=True)
    got = vk.nn.unshuffle(tokens, mask_token, masking.restore, prefixes)
    expected = mask_token.expand(3, prefixes + 16, -1).clone()
    expected[:, :prefixes] = tokens[:, :prefixes]
    for image in range(3):
        expected[image, prefixes + masking.keep[image]] = tokens[image, prefixes:]
    assert torch.equal(got, expected)
    arrived = torch.randn_like(got)
    pair = [torch.autograd.grad(each, (tokens, mask_token), arrived) for each in (got, expected)]
    torch.testing.assert_close(*pair)


# ------------------------------------------------------------------------------------------------- rotary positions


def eva(**options: Any) -> nn.Module:
    defaults = {"use_rot_pos_emb": True, "qkv_bias": False, "dynamic_img_size": True, "ref_feat_shape": 4}
    model = timm.models.Eva(**{**SIZES, "global_pool": "token", **defaults, **options})
    peers.stir(model)
    return model


RMS = {"norm_layer": timm.layers.RmsNorm}


@pytest.mark.parametrize(
    ("ours", "theirs", "size"),
    [
        ({}, {}, (32, 32)),
        (
            {"pos_embed": "none", "rope_temperature": 100.0},
            {"use_abs_pos_emb": False, "rope_temperature": 100.0},
            (40, 24),
        ),
        ({"qk_norm": True, "reg_tokens": 2}, {"qk_norm": True, "num_reg_tokens": 2}, (32, 16)),
        (
            {"qk_norm": True, "norm": "rms", "global_pool": "avg"},
            {"qk_norm": True, "global_pool": "avg", **RMS},
            (32, 32),
        ),
    ],
    ids=["plain", "no table, another size", "qk-norm, registers", "RMSNorm"],
)
@AUTOCAST
def test_rotary_positions_as_timm(
    ours: dict[str, Any], theirs: dict[str, Any], size: tuple[int, int], autocast: bool
) -> None:
    twin = eva(**theirs)
    model = build(use_rot_pos_emb=True, qkv_bias=False, **ours)
    model.load_state_dict(twin.state_dict(), strict=True)
    twin.load_state_dict(model.state_dict(), strict=True)
    pixels = images(*size)

    def run(model: nn.Module) -> Tensor:
        return model(like(model, pixels))

    ops = ROTARY - {"add_layer_norm"} | {"add_rms_norm"} if "norm" in ours else ROTARY
    compare(model, twin, run, run, ops, autocast)


def test_rotary_positions_of_kept_patches_as_timm() -> None:
    twin, model = eva(patch_drop_rate=0.5), build(use_rot_pos_emb=True, qkv_bias=False, patch_drop_rate=0.5)
    model.load_state_dict(twin.state_dict())
    pixels = images()
    got, expected = (weighed(each, lambda model: model(pixels), seed=3) for each in (model, twin))
    check(got, expected, {name: each.double() for name, each in expected.items()}, FLOORS[torch.bfloat16])


# --------------------------------------------------------------------------------------------------- packed batches

SIZES_OF_IMAGES = ((32, 32, 2), (40, 24, 1), (16, 48, 3))


@pytest.mark.parametrize(
    ("options", "ops"),
    [
        ({}, PACKED),
        ({"use_rot_pos_emb": True, "reg_tokens": 1, "global_pool": "avg"}, PACKED | {"rotary_qkv"}),
        ({"qk_norm": True, "gated_mlp": True, "activation": "silu"}, PACKED - {"mlp"} | {"rotary_qkv", "glu_mlp"}),
    ],
    ids=["plain", "rotary, registers, average", "qk-norm, SwiGLU"],
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@AUTOCAST
def test_packed_images_are_those_one_by_one(
    options: dict[str, Any], ops: set[str], checkpointing: bool, autocast: bool
) -> None:
    model, twin = build(**options), VisionTransformer(**{**SIZES, **options})
    twin.load_state_dict(model.state_dict())
    model.set_grad_checkpointing(checkpointing)
    batches = [images(*size) for size in SIZES_OF_IMAGES]

    def run_twin(twin: nn.Module) -> Tensor:
        return torch.cat([twin(like(twin, image[None])) for batch in batches for image in batch])

    # a bias of k moves all scores of a query alike: its gradient is 0
    absolute = 0.004 if autocast else None
    compare(
        model, twin, lambda model: model([like(model, batch) for batch in batches]), run_twin, ops, autocast, absolute
    )


def test_packed_features_and_unpooled_tokens_come_in_a_list() -> None:
    model = build(global_pool="", reg_tokens=1)
    batches = [images(*size) for size in SIZES_OF_IMAGES]
    features, tokens = model.forward_features(batches), model(batches)
    for batch, own, logits in zip(batches, features, tokens, strict=True):
        torch.testing.assert_close(own, model.forward_features(batch), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits, model(batch), atol=1e-5, rtol=1e-4)


def test_a_hook_sees_each_block_of_a_packed_batch() -> None:
    model, seen = build(use_rot_pos_emb=True, drop_path_rate=0.3).eval(), []
    batches = [images(*size) for size in SIZES_OF_IMAGES]
    expected = model(batches)
    model.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(batches), expected)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        torch.testing.assert_close(model(batches), expected)
    finally:
        handle.remove()
    assert seen == [1, 1]


def test_a_packed_call_refuses_a_mask_beside_it() -> None:
    block, x = Block(48, 3), torch.randn(5, 1, 48)
    packing = vk.nn.packing.Packing.of([2, 3], x.device)
    mask = torch.ones(5, 5, dtype=torch.bool)
    for module in (block, block.attn):
        words = ("'attn_mask' is given with 'packing'", "needs one of them")
        check_refused(lambda module=module: module(x, attn_mask=mask, packing=packing), ValueError, words)


# -------------------------------------------------------------------------------------------- samples that are dropped


def plain_branches(block: Block) -> tuple[Callable[[Tensor], Tensor], ...]:
    """What a block adds to its tokens, [B, N, D], twice, in plain torch."""

    def attention(x: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, block.norm1.eps)
        qkv = F.linear(normed, block.attn.qkv.weight, block.attn.qkv.bias)
        q, k, v = qkv.unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return block.ls1(F.linear(out, block.attn.proj.weight, block.attn.proj.bias))

    def feed_forward(x: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, block.norm2.eps)
        hidden = F.gelu(F.linear(normed, block.mlp.fc1.weight, block.mlp.fc1.bias))
        return block.ls2(F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias))

    return attention, feed_forward


def embedded(twin: VisionTransformer, batch: Tensor) -> Tensor:
    with vk.use("reference"):
        return twin._embed(like(twin, batch), None)[0]


def test_a_subset_of_the_samples_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(drop_path_rate=0.5, drop_path_subset=True, init_values=0.5)
    model.blocks[0].drop_path1, model.blocks[0].drop_path2 = DropPath(0.3), DropPath(0.3)
    pixels, computed = images(count=5), []
    own = block_page.normed_branch

    def spy(x: Tensor, *others: Any) -> Tensor:
        computed.append(len(x))
        return own(x, *others)

    monkeypatch.setattr(block_page, "normed_branch", spy)

    def run_twin(twin: Any) -> Tensor:
        x = embedded(twin, pixels)
        for block, count in zip(twin.blocks, (3, 2), strict=True):
            for branch in plain_branches(block):
                chosen = torch.randperm(5)[:count]
                x = x.index_add(0, chosen, branch(x[chosen]), alpha=5 / count)
        return twin.forward_head(twin.norm(x))

    compare(model, copy.deepcopy(model), lambda model: model(like(model, pixels)), run_twin, OPS)
    assert computed == [3, 3, 2, 2]
    model.eval()
    plain = VisionTransformer(**SIZES, init_values=0.5).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(pixels), plain(pixels))


def test_a_subset_leaves_the_expectation_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over every subset that could be drawn is what the whole batch gives."""
    block, x = Block(48, 3, drop_path=0.4, drop_path_subset=True), torch.randn(3, 5, 48)
    peers.stir(block)
    nn.init.zeros_(block.mlp.fc2.weight)  # behind the first step the second one is not linear in it
    nn.init.zeros_(block.mlp.fc2.bias)
    outputs = []
    assert len(block.drop_path1.subset(3, x.device)) == 1
    for chosen in itertools.permutations(range(3), 1):
        monkeypatch.setattr(DropPath, "subset", lambda *_, chosen=chosen: torch.tensor(chosen))
        outputs.append(block(x))
    torch.testing.assert_close(torch.stack(outputs).mean(0), block.eval()(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("subset", [False, True], ids=["zeroed", "not computed"])
def test_a_packed_batch_drops_whole_images(subset: bool) -> None:
    model = build(drop_path_rate=0.5, drop_path_subset=subset, init_values=0.5)
    batches = [images(*size) for size in SIZES_OF_IMAGES]

    def run_twin(twin: Any) -> Tensor:
        tokens = [embedded(twin, image[None]) for batch in batches for image in batch]
        for block in twin.blocks:
            for branch in plain_branches(block):
                factors = [1.0] * len(tokens)
                if block is twin.blocks[1] and subset:
                    chosen = torch.randperm(6)[:3].tolist()
                    factors = [2.0 if index in chosen else 0.0 for index in range(6)]
                elif block is twin.blocks[1]:
                    factors = (torch.empty(6).bernoulli_(0.5) / 0.5).tolist()
                tokens = [x + factor * branch(x) for x, factor in zip(tokens, factors, strict=True)]
        return twin.forward_head(torch.cat([twin.norm(x)[:, :1] for x in tokens]))

    def run(model: nn.Module) -> Tensor:
        return model([like(model, batch) for batch in batches])

    compare(model, copy.deepcopy(model), run, run_twin, PACKED)


def test_a_subset_of_a_packed_batch_keeps_its_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image drawn is every image: rows of tokens, positions and lengths follow the order of the draw."""
    model = build(drop_path_rate=0.5, drop_path_subset=True, use_rot_pos_emb=True, reg_tokens=1)
    monkeypatch.setattr(DropPath, "subset", lambda self, samples, device: torch.arange(samples - 1, -1, -1))
    batches = [images(*size) for size in SIZES_OF_IMAGES]
    torch.testing.assert_close(model(batches), model.eval()(batches), atol=1e-5, rtol=1e-4)


def test_a_subset_takes_its_own_rows_of_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = Block(48, 3, drop_path=0.4, drop_path_subset=True), torch.randn(3, 5, 48)
    mask = torch.rand(3, 1, 5, 5) > 0.3
    monkeypatch.setattr(DropPath, "subset", lambda *_: torch.tensor([2, 0, 1]))
    torch.testing.assert_close(block(x, attn_mask=mask), block.eval()(x, attn_mask=mask), atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize(("packed", "subset"), [(False, True), (True, False)], ids=["batch, subset", "packed"])
def test_compile_has_no_graph_break(packed: bool, subset: bool) -> None:
    model = build(depth=1, use_rot_pos_emb=True, qk_norm=True, patch_drop_rate=0.3, drop_path_subset=subset)
    model.blocks[0].drop_path1, model.blocks[0].drop_path2 = DropPath(0.3), DropPath(0.3)
    pixels: Any = [images(*size) for size in SIZES_OF_IMAGES] if packed else images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = weighed(model, lambda model: model(pixels))
    with vk.record() as calls:
        got = weighed(compiled, lambda model: model(pixels))
    assert {call.op for call in calls} == (PACKED if packed else OPS) | {"rotary_qkv"}
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name.removeprefix("_orig_mod.")], atol=1e-4, rtol=1e-3)
