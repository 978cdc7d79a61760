"""vk.nn with RMSNorm and a gated feed-forward, against timm's models of the same weights."""

from __future__ import annotations

from typing import Any

import peers
import pytest
import torch
from accuracy import FLOORS, check
from torch import nn

import vitkernels as vk

timm = peers.import_timm()
RMS = ({"norm": "rms"}, {"norm_layer": timm.layers.RmsNorm}, {"add_rms_norm", "mlp"})
GATED = (
    {"gated_mlp": True, "activation": "silu"},
    {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU},
    {"add_layer_norm", "glu_mlp"},
)
BOTH = ({**RMS[0], **GATED[0]}, {**RMS[1], **GATED[1]}, {"add_rms_norm", "glu_mlp"})


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("more", [{}, {"global_pool": "avg", "init_values": 0.5, "qk_norm": True}], ids=["", "more"])
@pytest.mark.parametrize(("ours", "theirs", "ops"), [RMS, GATED, BOTH], ids=["rms", "gated", "both"])
def test_as_timm(
    ours: dict[str, Any], theirs: dict[str, Any], ops: set[str], more: dict[str, Any], autocast: bool
) -> None:
    stock = timm.models.VisionTransformer(**{**peers.SIZES, **theirs, **more})
    peers.stir(stock)
    model = vk.nn.VisionTransformer(**{**peers.SIZES, **ours, **more})
    model.load_state_dict(stock.state_dict(), strict=True)
    images = torch.randn(3, 3, 32, 32)
    own = peers.output_and_gradients(stock, images, autocast=autocast)
    with vk.record() as calls:
        got = peers.output_and_gradients(model, images, autocast=autocast)
    heads = {"attention_qkv", "linear"} | ({"rotary_qkv"} if more else set())
    assert {call.op for call in calls} == {"patch_embed", *heads, *ops}
    exact = peers.truth(stock, images)
    check(got, own, exact, FLOORS[torch.float32])
