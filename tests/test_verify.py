"""vk.verify: it finds what is wrong, passes what is right, and leaves no trace of itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import peers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vitkernels as vk
from vitkernels.fuse import memory, rules
from vitkernels.fuse.swap import Fused, State

timm = peers.import_timm()

OPS = {"patch_embed", "linear", "attention_qkv", "add_layer_norm", "mlp"}
RULE = "no more than 2 times the stock model's own error and a floor"


def _vit(**options: Any) -> nn.Module:
    model = timm.models.VisionTransformer(**{**peers.SIZES, **options})
    peers.stir(model)
    return model


def _images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def _ops(found: vk.Verification) -> set[str]:
    return {name.partition(" ")[0] for name in found.ran}


# ------------------------------------------------------------------------------------------------- what it passes


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_a_fused_model_is_within_the_rule(autocast: bool, train: bool) -> None:
    model = _vit(init_values=1e-2, drop_path_rate=0.3).train(train)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = vk.verify(model, _images())
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
    found = vk.verify(_vit().to(dtype), _images().to(dtype))
    assert found.ok, found
    assert found.truth == "float64"


def test_a_fused_model_is_compared_with_itself_and_stays_fused() -> None:
    model = vk.fuse(_vit(), skip="blocks.1")
    classes = [type(each) for each in model.modules()]
    found = vk.verify(model, _images())
    assert found.ok, found
    assert found.summary.startswith("1 of 2 blocks fused")
    assert _ops(found) == OPS
    assert [type(each) for each in model.modules()] == classes


def test_a_residual_stream_of_another_dtype_is_said() -> None:
    found = vk.verify(vk.fuse(_vit(), residual_dtype=torch.bfloat16), _images())
    assert found.ok, "without autocast it changes nothing"
    assert "the residual stream is kept in torch.bfloat16, which the stock model's is not" in found.notes


def test_modules_of_vitkernels_are_held_to_plain_torch() -> None:
    model = vk.nn.VisionTransformer(**peers.SIZES)
    found = vk.verify(model, _images())
    assert found.ok, found
    assert _ops(found) >= OPS


def test_nothing_to_fuse() -> None:
    found = vk.verify(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(2, 4))
    assert found.ok
    assert found.ran == {}
    assert found.notes[0].startswith("nothing to fuse in this Sequential; needs attention")
    assert "no fused op ran: both runs are the stock model's" in found.notes


def test_frozen_parameters_have_no_rows() -> None:
    model = _vit()
    model.blocks[0].requires_grad_(False)
    model.patch_embed.requires_grad_(False)
    found = vk.verify(model, _images())
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
    model = _vit()
    nn.init.zeros_(model.head.weight)
    found = vk.verify(model, _images())
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
            self.vit = _vit()

        def forward(self, image: Tensor) -> Tensor:
            return checkpoint(self.vit, image, use_reentrant=reentrant)

    model = Checkpointed()
    model.vit.head.bias.grad = given = torch.ones(10)
    found = vk.verify(model, _images().requires_grad_())
    assert found.ok, found
    assert _ops(found) == OPS
    assert "gradient of input[0]" in {row.name for row in found.rows}
    assert model.vit.head.bias.grad is given
    assert torch.equal(given, torch.ones(10))
    assert model.vit.cls_token.grad is None


def test_no_gradient_is_handed_to_hooks_that_wait_for_it() -> None:
    model = _vit()
    called: list[Tensor] = []
    model.cls_token.register_post_accumulate_grad_hook(called.append)
    assert vk.verify(model, _images()).ok
    assert called == []

    class Checkpointed(nn.Sequential):
        def forward(self, image: Tensor) -> Tensor:
            return checkpoint(self[0], image, use_reentrant=True)

    with pytest.raises(ValueError, match=r"^verify: .*post-accumulate-grad hooks.*needs use_reentrant=False"):
        vk.verify(Checkpointed(model), _images().requires_grad_())
    assert called == []


def test_calls_that_fell_back_are_said() -> None:
    model = vk.fuse(_vit(attn_drop_rate=0.2))
    model(_images())
    found = vk.verify(model, _images())
    assert found.ok, found
    (note,) = found.notes
    assert note.startswith("2 calls ran a module's own code: ")
    assert "drop" in note


def test_a_given_loss_and_its_gradients() -> None:
    labels = torch.tensor([1, 7])
    found = vk.verify(_vit(), _images(), loss=lambda output: F.cross_entropy(output, labels))
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
        self.vit = _vit()

    def forward(self, *, images: dict[str, Tensor], scale: Tensor) -> dict[str, Any]:
        tokens = self.vit.forward_features(images["left"])
        logits = self.vit.forward_head(tokens) * scale
        return {"answer": Answer(logits, [tokens]), "pair": Pair(logits, logits.argmax(1)), "none": None}


def test_outputs_and_inputs_of_any_nesting() -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    images = {"left": _images().requires_grad_()}
    found = vk.verify(Nested(), images=images, scale=scale)
    assert found.ok, found
    names = [row.name for row in found.rows]
    assert names[:3] == ["output.answer.logits", "output.answer.hidden[0]", "output.pair.first"]
    assert names[-2:] == ["gradient of images['left']", "gradient of scale"]
    assert scale.grad is None
    assert images["left"].grad is None


def test_outputs_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=64, image_size=32, patch_size=8
    )
    model = transformers.ViTModel(config)
    peers.stir(model)
    found = vk.verify(model, pixel_values=_images(), output_hidden_states=True)
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
    assert found.ok, found
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


# -------------------------------------------------------------------------------------------------- what it finds


class Dense(nn.Linear):
    """A Linear of a library of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class _Scaled(torch.autograd.Function):
    """The identity, with a gradient that is 1 % too large."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 1.01


class Planted(Fused):
    """Stands for Dense; `fault` is what is wrong."""

    fault: Callable[[Any, Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        return type(self).fault(self, input)

    def parts(self) -> list[Any]:
        return []


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Any, Tensor], Tensor]], nn.Module]]:
    """A function from what a fused Dense computes to a model of three of them, the second of which fuse knows."""

    class Other(nn.Linear):
        pass

    rule = rules.Rule(Planted, frozenset({f"{Dense.__module__}.Dense"}), lambda module: None)
    known = rules.all_rules()
    monkeypatch.setattr(rules, "all_rules", lambda: (*known, rule))

    def build(fault: Callable[[Any, Tensor], Tensor]) -> nn.Module:
        monkeypatch.setattr(Planted, "fault", staticmethod(fault), raising=False)
        return nn.Sequential(Other(8, 8), Dense(8, 8), nn.GELU(), Other(8, 4))

    return build


WEIGHTS = {f"gradient of {index}.{name}" for index in (0, 1, 3) for name in ("weight", "bias")}
FAULTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], set[str]]] = {
    "a weight's gradient, by 1 %": (
        lambda own, x: F.linear(x, _Scaled.apply(own.weight), own.bias),
        {"gradient of 1.weight"},
    ),
    "an input's gradient, by 1 %": (
        lambda own, x: F.linear(_Scaled.apply(x), own.weight, own.bias),
        {"gradient of 0.weight", "gradient of 0.bias"},
    ),
    "no gradient": (lambda own, x: F.linear(x, own.weight, own.bias.detach()), {"gradient of 1.bias"}),
    "the output, by 0.1 %": (
        lambda own, x: F.linear(x, own.weight, own.bias) * 1.001,
        {"output", *WEIGHTS} - {"gradient of 3.bias"},
    ),
    "NaN": (
        lambda own, x: F.linear(x, own.weight, own.bias) * torch.nan,
        {"output", *WEIGHTS} - {"gradient of 3.bias"},
    ),
}


@pytest.mark.parametrize("wide", [True, False], ids=["against float64", "against the stock model"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_and_named(
    fault: str, wide: bool, plant: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not wide:
        monkeypatch.setattr(memory, "available", lambda: 0)
    wrong, expected = FAULTS[fault]
    model = plant(wrong)
    found = vk.verify(model, torch.randn(5, 8))
    assert found.truth == ("float64" if wide else "the stock model")
    assert not found.ok
    assert {row.name for row in found.broken} == expected
    assert {row.name for row in found.worst[: len(expected)]} == expected
    lines = str(found).splitlines()
    assert all(any(line.startswith(f"{name} ") and line.endswith("FAILED") for line in lines) for name in expected)
    assert lines[-1].startswith(f"FAILED: {len(expected)} of 7 tensors differ")
    assert not any(isinstance(each, Fused) for each in model.modules())


def test_the_same_model_without_a_fault_passes(plant: Callable[..., nn.Module]) -> None:
    found = vk.verify(plant(lambda own, x: F.linear(x, own.weight, own.bias)), torch.randn(5, 8))
    assert found.ok, found


def test_other_random_numbers_are_said(plant: Callable[..., nn.Module]) -> None:
    model = plant(lambda own, x: F.linear(x + 0 * torch.rand(1), own.weight, own.bias))
    assert "fused, the model draws other random numbers than stock" in vk.verify(model, torch.randn(5, 8)).notes


def test_another_dtype_is_said(plant: Callable[..., nn.Module]) -> None:
    model = plant(lambda own, x: F.linear(x, own.weight, own.bias).double())[:2]
    assert (
        "output is torch.float64 [5, 8] fused, and torch.float32 [5, 8] stock"
        in vk.verify(model, torch.randn(5, 8)).notes
    )


def test_what_only_the_fused_model_raises_is_an_answer(plant: Callable[..., nn.Module]) -> None:
    def fail(own: Any, x: Tensor) -> Tensor:
        raise vk.BackendError("no backend")

    model = plant(fail)
    found = vk.verify(model, torch.randn(5, 8))
    assert not found.ok
    assert found.failure == "BackendError: no backend"
    assert str(found).endswith("FAILED: the stock model runs, and the fused one raised BackendError: no backend")
    assert type(model[1]) is Dense


# ------------------------------------------------------------------------------------------------ what is the truth


class Noisy(nn.Module):
    """Draws random numbers in the dtype of what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = _vit()

    def forward(self, image: Tensor) -> Tensor:
        return self.vit(image * torch.rand(image.shape[0], 1, 1, 1, dtype=image.dtype))


class Typed(nn.Module):
    """Runs in float32 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = _vit()

    def forward(self, image: Tensor) -> Tensor:
        return self.vit(image.float())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Noisy, "it draws random numbers that are others in float64"),
        (Typed, "the float64 run raised RuntimeError: "),
    ],
)
def test_without_float64_the_stock_model_is_the_truth(kind: type[nn.Module], reason: str) -> None:
    found = vk.verify(kind(), _images())
    assert found.ok, found
    assert found.truth == "the stock model"
    assert all(row.own is None for row in found.rows)
    assert any(note.startswith(f"compared with the stock model alone: {reason}") for note in found.notes)
    assert str(found).endswith("differ from the stock model by no more than rounding")


def test_memory_is_asked_for_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 2**20)
    found = vk.verify(_vit(), _images())
    assert found.ok
    assert any("a float64 run needs about 0.0 GiB, and 0.0 GiB are free" in note for note in found.notes)


def test_numbers_kept_for_backward_are_counted_once() -> None:
    x = torch.randn(1000, requires_grad=True)
    with memory.counting_saved() as saved:
        y = x.exp()  # keeps y
        y.sin()  # keeps y again
    assert sum(saved.values()) == 1000


# --------------------------------------------------------------------------------------------- what it leaves alone


class Restless(nn.Module):
    """Changes itself whenever it is called: everything that a module can keep."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.vit = _vit(drop_path_rate=0.5, proj_drop_rate=0.5)
        self.register_buffer("seen", torch.zeros(2))
        self.loose = torch.zeros(2)
        self.calls, self.cache, self.history = 0, {}, []

    def forward(self, image: Tensor, fails: str = "") -> Tensor:
        self.calls += 1
        self.cache[self.calls] = self.new = image
        self.history.append(self.calls)
        self.seen += 1
        self.loose += 1
        self.seen = self.seen * 2
        self.register_buffer("late", torch.zeros(1))
        self.head_is_frozen = self.vit.head.requires_grad_(False)
        image += 1
        if fails == "stock" or (fails == "fused" and isinstance(self.vit.blocks[0], Fused)):
            raise KeyError(fails)
        self.train(False).train(True)
        return self.vit(self.norm(image))


def _contents(value: Any) -> Any:
    """What a container holds, by identity; what a fused module counted."""
    if isinstance(value, State):
        return dict(value.fallbacks)
    if isinstance(value, dict):
        return [(key, id(each)) for key, each in value.items()]
    return [id(each) for each in value] if isinstance(value, list) else None


def _state(model: nn.Module) -> dict[str, Any]:
    """All that can be told apart, by value and by identity."""
    return {
        "classes": [type(each) for each in model.modules()],
        "attributes": [
            {name: (id(value), _contents(value)) for name, value in vars(each).items()} for each in model.modules()
        ],
        "training": [each.training for each in model.modules()],
        "identities": [id(each) for each in (*model.parameters(), *model.buffers(), model.loose)],
        "values": [each.tolist() for each in (*model.parameters(), *model.buffers(), model.loose)],
        "flags": [each.requires_grad for each in model.parameters()],
        "gradients": [
            (id(each.grad), None if each.grad is None else each.grad.tolist()) for each in model.parameters()
        ],
        "hooks": [list(each._forward_hooks) + list(each._forward_pre_hooks) for each in model.modules()],
        "random": torch.get_rng_state().tolist(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "backends": vk.dispatch._order,
    }


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("ends", ["well", "stock", "fused", "loss", "backward"])
def test_everything_is_left_as_it_was(ends: str, autocast: bool, fused: bool) -> None:
    model = Restless().train()
    model.vit.blocks[0].eval()
    model.vit.pos_embed.requires_grad_(False)
    model.vit.head.weight.grad = torch.ones_like(model.vit.head.weight)
    hook = model.vit.blocks[1].register_forward_hook(lambda module, inputs, output: None)
    if fused:
        vk.fuse(model)
        model.vit.blocks[0].attn._vitkernels.fallbacks["a reason"] = 3
    images = _images()
    given = images.clone()

    def loss(output: Tensor) -> Tensor:
        if ends == "loss":
            raise KeyError(ends)
        if ends == "backward":
            output.register_hook(lambda gradient: 1 / 0)
        return output.sum()

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = _state(model)
        if ends in ("well", "fused"):
            found = vk.verify(model, images, fails=ends, loss=loss)
            assert found.ok == (ends == "well"), found
            assert (found.failure is None) == (ends == "well")
        else:
            with pytest.raises(ValueError, match=r"^verify: "):
                vk.verify(model, images, fails=ends, loss=loss)
        after = _state(model)
    assert [name for name in before if before[name] != after[name]] == []
    assert torch.equal(images, given)
    hook.remove()


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off(around: Callable[[], Any]) -> None:
    model = _vit()
    with around():
        found = vk.verify(model, _images())
        assert not torch.is_grad_enabled()
    assert found.ok, found
    assert len(found.rows) > 1


# ---------------------------------------------------------------------------------------------------------- wrappers


@pytest.fixture
def alone(tmp_path: Any) -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_model_in_ddp_goes_on_training(alone: None) -> None:
    model = nn.parallel.DistributedDataParallel(_vit())
    images = _images()
    model(images).sum().backward()
    found = vk.verify(model, images)
    assert found.ok, found
    assert "verified: what is inside DistributedDataParallel, on this process and not compiled" in found.notes
    gradient = model.module.cls_token.grad.clone()
    model.zero_grad()
    model(images).sum().backward()
    torch.testing.assert_close(model.module.cls_token.grad, gradient)


def test_a_compiled_model_is_verified_uncompiled() -> None:
    def refuse(graph: Any, inputs: Any) -> Any:
        raise AssertionError("verify compiled something")

    model = _vit()
    found = vk.verify(torch.compile(model, backend=refuse), _images())
    assert found.ok, found
    assert "verified: what is inside OptimizedModule, on this process and not compiled" in found.notes
    assert "gradient of cls_token" in {row.name for row in found.rows}
    model.compile(backend=refuse)
    assert vk.verify(model, _images()).ok


# --------------------------------------------------------------------------------------------------------- bad input


class FullyShardedDataParallel(nn.Module):
    pass


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no Module": (lambda: vk.verify("vit"), TypeError, "argument 'model' is a str; needs a torch.nn.Module"),
    "a loss that is none": (
        lambda: vk.verify(_vit(), _images(), loss=3),
        TypeError,
        "argument 'loss' is a int; needs a function of the model's outputs",
    ),
    "inputs that do not fit": (
        lambda: vk.verify(_vit(), torch.randn(2, 3, 16, 16)),
        ValueError,
        r"the model does not run on these inputs: AssertionError: Input height \(16\) doesn't match model \(32\)",
    ),
    "no inputs": (
        lambda: vk.verify(_vit()),
        ValueError,
        "the model does not run on these inputs: TypeError: .*missing 1 required positional argument",
    ),
    "nothing to train": (
        lambda: vk.verify(_vit().requires_grad_(False), _images()),
        ValueError,
        r"no floating-point tensor among the outputs \(output\) depends on a parameter or an input",
    ),
    "no floating-point output": (
        lambda: vk.verify(nn.Flatten(), torch.ones(2, 2, dtype=torch.long)),
        ValueError,
        r"among the outputs \(none\) depends",
    ),
    "a loss of many numbers": (
        lambda: vk.verify(_vit(), _images(), loss=lambda output: output),
        TypeError,
        r"argument 'loss' returned a tensor of shape \[2, 10\]; needs a tensor of one element",
    ),
    "a loss of no tensor": (
        lambda: vk.verify(_vit(), _images(), loss=lambda output: 1.0),
        TypeError,
        "argument 'loss' returned a float; needs a tensor of one element",
    ),
    "a loss without gradients": (
        lambda: vk.verify(_vit(), _images(), loss=lambda output: output.detach().sum()),
        ValueError,
        "what argument 'loss' returned depends on nothing that requires a gradient",
    ),
    "a loss that wants other outputs": (
        lambda: vk.verify(_vit(), _images(), loss=lambda output: output.logits),
        ValueError,
        "argument 'loss' does not take what the model returned: AttributeError",
    ),
    "no weights": (
        lambda: vk.verify(_vit().to("meta"), _images()),
        ValueError,
        "'cls_token' is on the meta device; needs a model with weights",
    ),
    "weights without a shape": (
        lambda: vk.verify(nn.LazyLinear(3), torch.randn(2, 4)),
        ValueError,
        "'weight' has no shape yet; needs a model that has run once",
    ),
    "shards": (
        lambda: vk.verify(nn.Sequential(FullyShardedDataParallel())),
        ValueError,
        "is sharded .FullyShardedDataParallel.; needs the model before it is sharded",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence(what: str) -> None:
    call, error, sentence = BAD[what]
    with pytest.raises(error, match=f"^verify: .*{sentence}"):
        call()


def test_a_sharded_parameter_is_named(alone: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _vit()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"^verify: 'cls_token' is sharded \(a DTensor\)"):
        vk.verify(model, _images())


def test_inside_compiled_code() -> None:
    model = nn.Linear(2, 2)

    @torch.compile(backend="eager", fullgraph=True)
    def call(x: Tensor) -> Any:
        return vk.verify(model, x)

    with pytest.raises(RuntimeError, match="called inside a function that is being compiled"):
        call(torch.randn(2, 2))


def test_the_answer_for_programs() -> None:
    found = vk.verify(_vit(), _images())
    read = json.loads(json.dumps(found.to_dict()))
    assert read["ok"] is True
    assert read["truth"] == "float64"
    assert len(read["rows"]) == len(found.rows)
    assert set(read["rows"][0]) == {"name", "size", "error", "own", "allowed", "ok"}
    assert read["rows"][0]["own"].keys() == {"worst", "rms"}
    assert len(found.worst) == 10
    assert str(found).splitlines()[0].split()[0] == "tensor"
