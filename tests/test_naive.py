"""The naive model and the fused one compute the same, and stay together while they train."""

from __future__ import annotations

from typing import Any

import peers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitkernels as vk
from vitkernels.nn import NaiveVisionTransformer, VisionTransformer, naive

SIZES: dict[str, Any] = {**peers.SIZES, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
OPTIONS: dict[str, dict[str, Any]] = {
    "token": {},
    "avg": {"global_pool": "avg"},
    "no class token": {"global_pool": "avg", "class_token": False},
}
FUSED = {"patch_embed", "add_layer_norm", "linear", "attention_qkv", "mlp"}


def pair(embedding: str, dtype: torch.dtype, **options: Any) -> tuple[VisionTransformer, NaiveVisionTransformer]:
    vit = VisionTransformer(**{**SIZES, **options})
    peers.stir(vit)
    vit.to(dtype)
    return vit, naive.from_fused(vit, embedding)


def images_and_labels(batch: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (batch,))


def step(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(images)
    loss = naive.cross_entropy(logits, labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return logits.detach(), dict(zip((name for name, _ in model.named_parameters()), gradients, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("embedding", naive.EMBEDDINGS)
@pytest.mark.parametrize("name", OPTIONS)
def test_output_and_every_gradient(
    name: str, embedding: str, dtype: torch.dtype, tolerance: float, backend: str
) -> None:
    vit, teacher = pair(embedding, dtype, **OPTIONS[name])
    images, labels = images_and_labels()
    expected, gradients = step(teacher, images, labels)
    with vk.use(backend), vk.record() as calls:
        got, fused = step(vit, images, labels)
    for direction in ("forward", "backward"):
        assert {call.op for call in calls if call.direction == direction} == FUSED
    assert {call.backend for call in calls} == {backend}

    def assert_close(one: Tensor, other: Tensor, what: str) -> None:
        assert one.dtype == other.dtype == dtype, what
        assert (one - other).abs().max() <= tolerance * other.abs().max(), what

    assert_close(got, expected, "output")
    names = naive.parameter_names(vit)
    assert names.keys() == gradients.keys()
    assert set(names.values()) == fused.keys()
    for plain, name_in_fused in names.items():
        assert_close(fused[name_in_fused].view_as(gradients[plain]), gradients[plain], name_in_fused)


@pytest.mark.parametrize("embedding", naive.EMBEDDINGS)
def test_fifty_training_steps(embedding: str, backend: str) -> None:
    torch.manual_seed(1)
    vit = VisionTransformer(**SIZES)
    models = (vit, naive.from_fused(vit, embedding))
    images, labels = images_and_labels(32)
    losses: list[list[float]] = []
    for model in models:
        torch.manual_seed(2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        losses.append([])
        for _ in range(50):
            batch = torch.randperm(32)[:8]
            with vk.use(backend):
                loss = naive.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    fused, plain = (torch.tensor(curve) for curve in losses)
    assert plain[-10:].mean() < 0.7 * plain[:10].mean(), "they do learn"
    assert (fused - plain).abs().max() < 1e-4


def test_both_embeddings_are_one() -> None:
    image, weight, bias = torch.randn(2, 3, 16, 24), torch.randn(20, 3 * 8 * 8), torch.randn(20)
    dnn, cnn = (embed(image, weight, bias, 8) for embed in (naive.embed_dnn, naive.embed_cnn))
    assert dnn.shape == (2, 6, 20)
    torch.testing.assert_close(dnn, cnn, rtol=1e-4, atol=1e-4)


def test_pixels_are_scaled() -> None:
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(naive.scale_pixels(image).flatten(), torch.tensor([0.0, 0.2, 1.0]))
    got = naive.scale_pixels(image, mean=(0.5, 0.1, 0.5), std=(0.5, 0.1, 0.25), dtype=torch.float64)
    torch.testing.assert_close(got.flatten(), torch.tensor([-1.0, 1.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(label_smoothing: float) -> None:
    logits, labels = torch.randn(5, 10), torch.randint(0, 10, (5,))
    expected = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    torch.testing.assert_close(naive.cross_entropy(logits, labels, label_smoothing), expected)


def test_post_norm_is_another_model_that_learns() -> None:
    images, labels = images_and_labels(8)
    options = {key: value for key, value in SIZES.items() if key not in ("embed_dim", "num_heads")}
    post = NaiveVisionTransformer(**options, embed_dim=32, num_heads=2, norm_first=False)
    pre = NaiveVisionTransformer(**options, embed_dim=32, num_heads=2)
    pre.load_state_dict(post.state_dict(), strict=True)
    assert not torch.allclose(pre(images), post(images), atol=1e-2)
    optimizer = torch.optim.AdamW(post.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = naive.cross_entropy(post(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_layers_start_apart() -> None:
    first, second = NaiveVisionTransformer(**SIZES).encoder.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"reg_tokens": 2}, r"'vit' differs .*reg_token.*; needs"),
        ({"init_values": 0.1}, r"'vit' differs .*blocks.0.ls1.gamma.*; needs"),
        ({"qk_norm": True}, r"'vit' differs .*blocks.0.attn.q_norm.*; needs"),
        ({"activation": "relu"}, r"'vit' has activation='relu'; .* needs 'gelu'"),
        ({"global_pool": ""}, r"'vit' has global_pool=''; .* needs 'token'"),
        ({"drop_path_rate": 0.1}, r"'vit' has drop_path_rate=0.1\d*; .* needs 0.0"),
        ({"no_embed_class": True}, r"'vit' has no_embed_class=True; .* needs False"),
        ({"img_size": (16, 32)}, r"'vit' has grid_size=\(2, 4\); .* needs \(2, 2\)"),
        ({"patch_size": (8, 4)}, r"'vit' has patch_size=\(8, 4\); .* needs \(8, 8\)"),
        ({"num_classes": 0}, r"'vit' differs .*head.weight.*; needs"),
    ],
)
def test_what_the_naive_model_cannot_be(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        naive.from_fused(VisionTransformer(**{**SIZES, **options}))
