"""Bad input to the modules: one sentence that names the argument, what came and what is needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import SIZES

from vitkernels.nn import (
    Attention,
    Block,
    DropPath,
    GluMlp,
    LayerScale,
    Mlp,
    NaiveVisionTransformer,
    PatchEmbed,
    VisionTransformer,
    random_masking,
    resize_pos_embed,
    unshuffle,
)


def vit(**options: Any) -> VisionTransformer:
    return VisionTransformer(**{**SIZES, **options})


def naive(**options: Any) -> NaiveVisionTransformer:
    return NaiveVisionTransformer(**{**SIZES, **options})


def loaded(table: torch.Tensor) -> None:
    model = vit()
    model.load_state_dict({**model.state_dict(), "pos_embed": table})


IMAGE = torch.zeros(1, 3, 32, 32)
KEEP = torch.tensor([[0, 3]])
TOKENS = torch.zeros(1, 2, 8)
CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    # constructors
    (lambda: vit(embed_dim=50), ValueError, "'embed_dim' is 50; needs a multiple of num_heads, 3"),
    (lambda: vit(embed_dim=0), ValueError, "'embed_dim' is 0; needs an int of 1 or more"),
    (lambda: vit(num_heads=0), ValueError, "'num_heads' is 0; needs an int of 1 or more"),
    (lambda: vit(depth=0), ValueError, "'depth' is 0; needs an int of 1 or more"),
    (lambda: vit(depth=2.0), ValueError, "'depth' is 2.0; needs an int"),
    (lambda: vit(depth=True), ValueError, "'depth' is True; needs an int"),
    (lambda: vit(img_size=30), ValueError, "'img_size' is 30; needs a multiple of patch_size, 8"),
    (lambda: vit(img_size=(32, 30)), ValueError, "'img_size' is 30; needs a multiple of patch_size, 8"),
    (lambda: vit(img_size=None), ValueError, r"'img_size' is None; needs an int of 1 or more, or \(height, width\)"),
    (lambda: vit(patch_size=(8, 8, 8)), ValueError, r"'patch_size' is \(8, 8, 8\); needs an int"),
    (lambda: vit(patch_size=0), ValueError, "'patch_size' is 0; needs an int of 1 or more"),
    (lambda: vit(in_chans=0), ValueError, "'in_chans' is 0; needs an int of 1 or more"),
    (lambda: vit(num_classes=-1), ValueError, "'num_classes' is -1; needs an int of 0 or more"),
    (lambda: vit(reg_tokens=-1), ValueError, "'reg_tokens' is -1; needs an int of 0 or more"),
    (lambda: vit(global_pool="map"), ValueError, "'global_pool' is 'map'; needs one of 'token', 'avg', ''"),
    (lambda: vit(activation="tanh"), ValueError, "'activation' is 'tanh'; needs one of 'gelu', "),
    (lambda: vit(class_token=False), ValueError, "'class_token' is False with global_pool='token'; needs"),
    (lambda: vit(drop_path_rate=1.0), ValueError, "'drop_path_rate' is 1.0; needs a number from 0 to below 1"),
    (lambda: vit(drop_path_rate=-0.1), ValueError, "'drop_path_rate' is -0.1; needs a number from 0 to below 1"),
    (lambda: vit(drop_path_rate=math.nan), ValueError, "'drop_path_rate' is nan; needs a number from 0 to below 1"),
    (lambda: vit(mlp_ratio=0.0), ValueError, "'mlp_ratio' is 0.0; needs at least 1 / dim = 1 / 48"),
    (lambda: vit(mean=(0.5,)), ValueError, "'mean' has 1 numbers; needs 3, one a channel"),
    (lambda: vit(std=(1.0, 0.0, 1.0)), ValueError, r"'std' is \(1.0, 0.0, 1.0\); needs numbers other than 0"),
    (lambda: Attention(50, 3), ValueError, "'dim' is 50; needs a multiple of num_heads, 3"),
    (lambda: Block(48, 3, drop_path=1.5), ValueError, "'drop_path' is 1.5; needs a number from 0 to below 1"),
    (lambda: Mlp(0), ValueError, "'in_features' is 0; needs an int of 1 or more"),
    (lambda: Mlp(48, activation="glu"), ValueError, "'activation' is 'glu'; needs one of 'gelu', "),
    (lambda: GluMlp(48, 65), ValueError, "'hidden_features' is 65; needs an even number"),
    (lambda: GluMlp(48, activation="glu"), ValueError, "'activation' is 'glu'; needs one of 'gelu', "),
    (lambda: Block(48, 3, norm="batch"), ValueError, "'norm' is 'batch'; needs one of 'layer', 'rms'"),
    (lambda: vit(norm=None), ValueError, "'norm' is None; needs one of 'layer', 'rms'"),
    (lambda: vit(pos_embed="sincos"), ValueError, "'pos_embed' is 'sincos'; needs one of 'learn', 'none'"),
    (lambda: vit(use_rot_pos_emb=True, num_heads=8), ValueError, "'embed_dim' is 48; needs a multiple of 4 .* 32"),
    (
        lambda: vit(use_rot_pos_emb=True, rope_temperature=0),
        ValueError,
        "'rope_temperature' is 0; needs more than 0",
    ),
    (lambda: vit(patch_drop_rate=1.0), ValueError, "'patch_drop_rate' is 1.0; needs a number from 0 to below 1"),
    (lambda: random_masking(0, 4), ValueError, "'batch' is 0; needs an int of 1 or more"),
    (lambda: random_masking(2, 4, 1.0), ValueError, "'ratio' is 1.0; needs a number from 0 to below 1"),
    (lambda: DropPath(-1), ValueError, "'drop_prob' is -1; needs a number from 0 to below 1"),
    (lambda: LayerScale(0), ValueError, "'dim' is 0; needs an int of 1 or more"),
    (lambda: PatchEmbed(30, 8), ValueError, "'img_size' is 30; needs a multiple of patch_size, 8"),
    (lambda: naive(img_size=30), ValueError, "'img_size' is 30; needs a multiple of patch_size, 8"),
    (lambda: naive(embed_dim=50), ValueError, "'embed_dim' is 50; needs a multiple of num_heads, 3"),
    (lambda: naive(embedding="rnn"), ValueError, "'embedding' is 'rnn'; needs one of 'dnn', 'cnn'"),
    (lambda: naive(global_pool="map"), ValueError, "'global_pool' is 'map'; needs one of 'token', 'avg'"),
    (lambda: naive(class_token=False), ValueError, "'class_token' is False with global_pool='token'; needs"),
    # images
    (lambda: vit()(IMAGE.numpy()), TypeError, "'image' got ndarray; needs a torch.Tensor"),
    (lambda: vit()(IMAGE[0]), ValueError, r"'image' has shape \[3, 32, 32\]; needs 4 dimensions, \[B, C, H, W\]"),
    (lambda: vit()(IMAGE[:, :1]), ValueError, r"'weight' has shape \[48, 3, 8, 8\]; needs \[48, 1, 8, 8\]"),
    (lambda: vit()(IMAGE[:, :, :4]), ValueError, "'image' has a height of 4; needs a multiple of the patch size 8"),
    (lambda: vit()(IMAGE[..., :20]), ValueError, "'image' has a width of 20; needs a multiple of the patch size 8"),
    (lambda: vit()(IMAGE[..., :0]), ValueError, "'image' has a width of 0; needs a multiple of the patch size 8"),
    (lambda: vit()(IMAGE.int()), TypeError, "'image' has dtype torch.int32; needs uint8 or floating point"),
    (lambda: naive()(IMAGE[..., :24]), ValueError, r"'image' has shape \[1, 3, 32, 24\]; needs \[B, 3, 32, 32\]"),
    # lists of batches, and patches to keep
    (lambda: vit()([]), ValueError, "'image' is an empty list; needs a batch or more"),
    (lambda: vit()([IMAGE, IMAGE[0]]), ValueError, r"'image' has shape \[3, 32, 32\]; needs 4 dimensions"),
    (lambda: vit()([IMAGE], KEEP), ValueError, "'keep' is given with a list of images; needs one batch"),
    (lambda: vit()(IMAGE, KEEP.tolist()), TypeError, "'keep' got list; needs a torch.Tensor"),
    (lambda: vit()(IMAGE, KEEP.int()), TypeError, "'keep' has dtype torch.int32; needs int64"),
    (lambda: vit()(IMAGE, KEEP[0]), ValueError, r"'keep' has shape \[2\]; needs \[1, M\]"),
    (lambda: vit()(IMAGE, KEEP.expand(2, -1)), ValueError, r"'keep' has shape \[2, 2\]; needs \[1, M\]"),
    (lambda: vit()(IMAGE, KEEP + 15), ValueError, "'keep' holds indices from 15 to 18; needs 0 to 15, the patches"),
    (lambda: vit()(IMAGE, KEEP - 1), ValueError, "'keep' holds indices from -1 to 2; needs 0 to 15, the patches"),
    (lambda: vit()(IMAGE, KEEP * 0 + 5), ValueError, "'keep' holds 5 twice for image 0; needs each patch once"),
    (lambda: unshuffle(TOKENS[0], TOKENS[0, 0], KEEP), ValueError, r"'tokens' has shape \[2, 8\]; needs \[B, R \+ M"),
    (lambda: unshuffle(TOKENS, TOKENS[0], KEEP), ValueError, "'mask_token' has 16 numbers; needs 8"),
    (lambda: unshuffle(TOKENS, TOKENS[0, 0], KEEP[:, :1]), ValueError, r"'restore' has shape \[1, 1\]; needs \[1, N\]"),
    (lambda: unshuffle(TOKENS, TOKENS[0, 0], KEEP, 3), ValueError, "'prefixes' is 3; needs 2 or less"),
    (lambda: unshuffle(TOKENS, 0.0, KEEP), TypeError, "'mask_token' got float; needs a torch.Tensor"),
    # tables of positions
    (lambda: loaded(torch.full((1, 17, 48), math.nan)), ValueError, "'pos_embed' holds NaN; needs numbers"),
    (lambda: loaded(torch.zeros(1, 18, 48)), RuntimeError, "size mismatch for pos_embed"),
    (lambda: loaded(torch.zeros(1, 10, 40)), RuntimeError, "size mismatch for pos_embed"),
    (
        lambda: resize_pos_embed(torch.zeros(1, 10, 8), (3, 4), (5, 5), 1),
        ValueError,
        r"'table' has shape \[1, 10, 8\]; needs \[1, 13, D\]",
    ),
]


@pytest.mark.parametrize(("call", "error", "sentence"), CASES, ids=[sentence[:50] for _, _, sentence in CASES])
def test_one_sentence(call: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()


def test_a_refused_table_leaves_the_model_as_it_was() -> None:
    model = vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpoint = {name: torch.randn_like(tensor) for name, tensor in before.items()}
    checkpoint["pos_embed"][0, 3, 5] = math.nan
    with pytest.raises(ValueError, match=r"'pos_embed' holds NaN"):
        model.load_state_dict(checkpoint)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_sentence_has_the_whole_name_of_a_table_inside_a_larger_model() -> None:
    model = torch.nn.ModuleDict({"encoder": vit()})
    with pytest.raises(ValueError, match=r"'encoder.pos_embed' holds NaN"):
        model.load_state_dict({"encoder.pos_embed": torch.full((1, 17, 48), math.nan)}, strict=False)
