"""Calls of transformers' layers in which attention is not what it usually is: its scale, its mask, where images end."""

from __future__ import annotations

import fused
import pytest
import torch
from hf_models import dinov3
from hf_towers import HEADS, TOKENS, TOWERS, call_of
from test_fuse_towers import stock_layers
from torch import Tensor, nn

import vitkernels as vk
from vitkernels import dispatch


@pytest.mark.parametrize(
    ("name", "attribute", "function"),
    [("sam", "scale", "sdpa"), ("sam", "scale", "eager"), ("hiera", "scale", "eager"), ("gemma4", "scaling", "sdpa")],
)
def test_a_scale_of_its_own(name: str, attribute: str, function: str) -> None:
    """SAM's sdpa attention does not tell torch of it."""
    layer = stock_layers(name, attn_implementation=function)[0].eval()
    attn = layer.get_submodule("self_attn" if name == "gemma4" else "attn")
    setattr(attn, attribute, 0.01)
    inputs, keywords = call_of(layer)
    fused.check_parity(layer, inputs, keywords, ops=TOWERS[name][0])


@pytest.mark.parametrize("name", ["gemma4", "sam2", "segformer"])
def test_attention_that_is_made_causal_is_its_own(name: str) -> None:
    layer = stock_layers(name)[0].eval()
    inputs, keywords = call_of(layer)
    attn = next(each for each in layer.modules() if hasattr(each, "is_causal"))
    with vk.use(*dispatch.order("cpu")):
        vk.fuse(layer)(*inputs, **keywords)
        attn.is_causal = True
        got = layer(*inputs, **keywords)
    assert "its is_causal is set" in str(vk.explain(layer))
    torch.testing.assert_close(got, vk.unfuse(layer)(*inputs, **keywords), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["flava", "git", "kosmos2_5", "vilt"])
def test_eager_attention_adds_a_mask_that_is_bool(name: str) -> None:
    layer = stock_layers(name, attn_implementation="eager")[0].eval()
    (tokens,), keywords = call_of(layer)
    keywords["attention_mask"] = torch.rand(1, 1, TOKENS, TOKENS) > 0.4
    own = layer(tokens, **keywords)
    vk.fuse(layer)
    with vk.record() as calls:
        got = layer(tokens, **keywords)
        assert not {each.op for each in calls} & {"attention", "attention_qkv"}
        layer(tokens, **{**keywords, "attention_mask": keywords["attention_mask"].float()})
    assert "attention_qkv" in {each.op for each in calls}
    torch.testing.assert_close(got, own, atol=1e-4, rtol=1e-4)


# what tables of positions broadcast to: each head's, each image's, or nothing that the layer takes
SERVED = {
    "dinov3": [(), (1,), (HEADS,), (1, 1), (4, 1), (4, HEADS)],
    "pixtral": [(), (1,), (HEADS,)],
    "mlcd": [()],
    "step3p7": [(), (1,), (4,)],
    "qwen2_vl": [()],
}


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("first", [(), (1,), (HEADS,), (4,), (1, 1), (4, 1), (4, HEADS)], ids=str)
def test_axes_of_positions_mean_what_they_mean_to_the_layer(name: str, first: tuple[int, ...]) -> None:
    layer = dinov3().model.layer[0] if name == "dinov3" else stock_layers(name)[-1]
    (tokens,), keywords = call_of(layer.eval())
    count, width = keywords["position_embeddings"][0].shape
    angles = torch.rand(*first, count, width // 2).repeat_interleave(2, dim=-1)
    keywords["position_embeddings"] = angles.cos(), angles.sin()
    try:
        own = layer(tokens, **keywords)
    except (RuntimeError, ValueError):
        own = None
    vk.fuse(layer)
    for _ in range(3):
        with vk.use(*dispatch.order("cpu")), vk.record() as calls:
            if own is None:
                with pytest.raises((RuntimeError, ValueError)):
                    layer(tokens, **keywords)
            else:
                torch.testing.assert_close(layer(tokens, **keywords), own, atol=1e-4, rtol=1e-4)
        assert ("rotary_qkv" in {each.op for each in calls}) is (first in SERVED[name])


WRONG_ENDS = (
    ([0, 5, 16], 11, r"argument 'cu_seqlens' ends with 16; needs 17"),
    ([1, 5, 17], 12, r"argument 'cu_seqlens' begins with 1; needs 0"),
    ([0, 9, 4, 17], 13, r"argument 'cu_seqlens' falls from 9 to 4"),
    ([0, 5, 17], 3, r"argument 'max_seqlen' is 3; needs 12 or more"),
)


@pytest.mark.parametrize(("ends", "longest", "words"), WRONG_ENDS)
def test_ends_of_images_are_looked_at_at_each_call(ends: list[int], longest: int, words: str) -> None:
    layer = stock_layers("qwen2_vl")[0]
    (tokens,), keywords = call_of(layer)
    vk.fuse(layer)
    right = torch.tensor([0, 4, 8, 17], dtype=torch.int32)[-len(ends) :]  # of as many images, so of the same kind
    right[0] = 0
    with vk.record() as calls:
        for _ in range(3):  # from the third on, launches come from a tape
            layer(tokens, **{**keywords, "cu_seqlens": right, "max_seqlen": longest + 9})
    assert "attention_varlen" in {call.op for call in calls}
    for _ in range(3):
        wrong = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32), "max_seqlen": longest}
        with pytest.raises(ValueError, match=words):
            layer(tokens, **{**keywords, **wrong})


class Wrapped(nn.Module):
    """A projection in a module of somebody's own, which has no weight."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["qwen2_vl", "glm_ocr", "glm_image", "video_llama_3", "pixtral", "llama4", "janus"])
def test_a_wrapped_projection_is_called(name: str) -> None:
    """In a block that turns, norms or packs: the rest of it runs fused."""
    for layer in stock_layers(name):
        for module in list(layer.modules()):
            for child in ("proj", "o_proj", "out_proj", "projection_layer"):
                if isinstance(module._modules.get(child), nn.Linear):
                    setattr(module, child, Wrapped(getattr(module, child)))
        inputs, keywords = call_of(layer)
        expected = fused.output_and_gradients(layer, inputs, keywords)
        ours = vk.fuse(layer)
        with vk.record() as calls:
            fused.check_same(fused.output_and_gradients(ours, inputs, keywords), expected)
        assert {call.op for call in calls} & {"attention_qkv", "attention_varlen"}
