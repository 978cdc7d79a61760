"""vk.verify: what it passes, and what it says of it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NamedTuple

import peers
import pytest
import torch
import torch.nn.functional as F
from timm_vit import OPS, images, vit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vitkernels as vk
from vitkernels.fuse.swap import Fused

RULE = "no more than 2 times the stock model's own error and a floor"


def _ops(found: vk.Verification) -> set[str]:
    return {name.partition(" ")[0] for name in found.ran}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_a_fused_model_is_within_the_rule(autocast: bool, train: bool) -> None:
    model = vit(init_values=1e-2, drop_path_rate=0.3).train(train)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = vk.verify(model, images(2))
    assert found.ok, found
    assert found.truth == "float64"
    assert found.summary == "2 of 2 blocks fused"
    assert _ops(found) == OPS
    assert not found.notes
    assert len(found.rows) == 1 + len(list(model.parameters()))
    own = [row.own.rms for row in found.rows if row.own is not None]
    assert len(own) == len(found.rows)
    assert sum(error > 0 for error in own) > 0.9 * len(own), "the stock model's own errors are known"
    assert RULE in str(found)
    assert not any(isinstance(each, Fused) for each in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_dtype(dtype: torch.dtype) -> None:
    found = vk.verify(vit().to(dtype), images(2).to(dtype))
    assert found.ok, found
    assert found.truth == "float64"


def test_a_fused_model_is_compared_with_itself_and_stays_fused() -> None:
    model = vk.fuse(vit(), skip="blocks.1")
    classes = [type(each) for each in model.modules()]
    found = vk.verify(model, images(2))
    assert found.ok, found
    assert found.summary.startswith("1 of 2 blocks fused")
    assert _ops(found) == OPS
    assert [type(each) for each in model.modules()] == classes


def test_a_residual_stream_of_another_dtype_is_said() -> None:
    found = vk.verify(vk.fuse(vit(), residual_dtype=torch.bfloat16), images(2))
    assert found.ok, "without autocast it changes nothing"
    assert "the residual stream is kept in torch.bfloat16, which the stock model's is not" in found.notes


def test_modules_of_vitkernels_are_held_to_plain_torch() -> None:
    model = vk.nn.VisionTransformer(**peers.SIZES)
    found = vk.verify(model, images(2))
    assert found.ok, found
    assert _ops(found) >= OPS


def _check_nothing_verified(found: vk.Verification) -> None:
    assert not found.ok
    assert not found.broken
    assert found.ran == {}
    assert found.to_dict()["ok"] is False
    lines = str(found).splitlines()
    assert lines[0] == found.summary, "no table of errors that nobody made"
    assert lines[-1] == "FAILED: nothing was verified: no fused op ran, and both runs are the stock model's"


def test_nothing_to_fuse_is_nothing_verified() -> None:
    found = vk.verify(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(2, 4))
    _check_nothing_verified(found)
    assert found.notes[0].startswith("nothing to fuse in this Sequential; needs attention")


def test_a_fused_model_whose_every_call_falls_back_is_nothing_verified() -> None:
    model, x = vk.fuse(nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)), torch.randn(2, 3, 8)
    found = vk.verify(model, x, x, x)
    _check_nothing_verified(found)
    assert "ran a module's own code: " in found.notes[0]


def test_frozen_parameters_have_no_rows() -> None:
    model = vit()
    model.blocks[0].requires_grad_(False)
    model.patch_embed.requires_grad_(False)
    found = vk.verify(model, images(2))
    assert found.ok, found
    names = {f"gradient of {name}" for name, each in model.named_parameters() if each.requires_grad}
    assert {row.name for row in found.rows} == {"output", *names}
    assert not any(each.requires_grad for each in model.blocks[0].parameters())


def test_sparse_gradients() -> None:
    model = nn.Sequential(nn.Embedding(7, 8, sparse=True), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True))
    found = vk.verify(model, torch.tensor([[1, 2, 2, 6]]))
    assert found.ok, found
    assert "gradient of 0.weight" in {row.name for row in found.rows}
    assert found.ran


def test_what_overflows_in_the_stock_model_is_said() -> None:
    model = nn.Linear(4, 1).half()
    nn.init.constant_(model.weight, 6e4)
    found = vk.verify(model, torch.ones(2, 4).half())
    assert "stock, 1 outputs and gradients are not finite, as output" in found.notes


def test_gradients_that_say_nothing_are_counted() -> None:
    model = vit()
    nn.init.zeros_(model.head.weight)
    found = vk.verify(model, images(2))
    assert found.ok
    parameters = len(list(model.parameters()))
    assert any(
        note.startswith(f"the gradient is 0 everywhere, whatever runs, of {parameters - 2}") for note in found.notes
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit()

        def forward(self, image: Tensor) -> Tensor:
            return checkpoint(self.vit, image, use_reentrant=reentrant)

    model = Checkpointed()
    model.vit.head.bias.grad = given = torch.ones(10)
    found = vk.verify(model, images(2).requires_grad_())
    assert found.ok, found
    assert _ops(found) == OPS
    assert "gradient of input[0]" in {row.name for row in found.rows}
    assert model.vit.head.bias.grad is given
    assert torch.equal(given, torch.ones(10))
    assert model.vit.cls_token.grad is None


def test_no_gradient_is_handed_to_hooks_that_wait_for_it() -> None:
    model = vit()
    called: list[Tensor] = []
    model.cls_token.register_post_accumulate_grad_hook(called.append)
    assert vk.verify(model, images(2)).ok
    assert called == []

    class Checkpointed(nn.Sequential):
        def forward(self, image: Tensor) -> Tensor:
            return checkpoint(self[0], image, use_reentrant=True)

    with pytest.raises(ValueError, match=r"^verify: .*post-accumulate-grad hooks.*needs use_reentrant=False"):
        vk.verify(Checkpointed(model), images(2).requires_grad_())
    assert called == []


def test_calls_that_fell_back_are_said() -> None:
    model = vk.fuse(vit(attn_drop_rate=0.2))
    model(images(2))
    found = vk.verify(model, images(2))
    assert found.ok, found
    (note,) = found.notes
    assert note.startswith("2 calls ran a module's own code: ")
    assert "drop" in note


def test_a_given_loss_and_its_gradients() -> None:
    labels = torch.tensor([1, 7])
    found = vk.verify(vit(), images(2), loss=lambda output: F.cross_entropy(output, labels))
    assert found.ok, found
    assert [row.name for row in found.rows][:2] == ["output", "loss"]


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclasses.dataclass
class Answer:
    logits: Tensor
    hidden: list[Tensor]
    count: int = 3


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = vit()

    def forward(self, *, images: dict[str, Tensor], scale: Tensor) -> dict[str, Any]:
        tokens = self.vit.forward_features(images["left"])
        logits = self.vit.forward_head(tokens) * scale
        return {"answer": Answer(logits, [tokens]), "pair": Pair(logits, logits.argmax(1)), "none": None}


def test_outputs_and_inputs_of_any_nesting() -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    given = {"left": images(2).requires_grad_()}
    found = vk.verify(Nested(), images=given, scale=scale)
    assert found.ok, found
    names = [row.name for row in found.rows]
    assert names[:3] == ["output.answer.logits", "output.answer.hidden[0]", "output.pair.first"]
    assert names[-2:] == ["gradient of images['left']", "gradient of scale"]
    assert scale.grad is None
    assert given["left"].grad is None


def test_outputs_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=64, image_size=32, patch_size=8
    )
    model = transformers.ViTModel(config)
    peers.stir(model)
    found = vk.verify(model, pixel_values=images(2), output_hidden_states=True)
    assert found.ok, found
    assert {"output.last_hidden_state", "output.hidden_states[1]"} <= {row.name for row in found.rows}


def test_an_output_that_is_a_buffer_keeps_its_value() -> None:
    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.count += 1
            return super().forward(x), self.count

    model = Counting(4, 4)
    model.register_buffer("count", torch.zeros(1))
    found = vk.verify(model, torch.randn(2, 4))
    assert not found.broken, found
    assert [row.size.worst for row in found.rows if row.name == "output[1]"] == [1.0]
    assert model.count == 0


def test_one_tensor_given_twice_stays_one() -> None:
    class Same(nn.Linear):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            assert x is y
            return super().forward(x)

    x = torch.randn(2, 4, requires_grad=True)
    found = vk.verify(Same(4, 4), x, x)
    assert [row.name for row in found.rows][-1] == "gradient of input[0]"


def test_the_answer_for_programs() -> None:
    found = vk.verify(vit(), images(2))
    read = json.loads(json.dumps(found.to_dict()))
    assert read["ok"] is True
    assert read["truth"] == "float64"
    assert len(read["rows"]) == len(found.rows)
    assert set(read["rows"][0]) == {"name", "size", "error", "own", "allowed", "compared", "ok"}
    assert read["rows"][0]["own"].keys() == {"worst", "rms"}
    assert len(found.worst) == 10
    assert str(found).splitlines()[0].split()[0] == "tensor"
