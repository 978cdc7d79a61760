"""The border between blocks is crossed in the package's own loops alone: a block by itself depends on nothing else."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import fused
import pytest
import torch
from ecosystems import ECOSYSTEMS, D
from timm_vit import images, timm, vit
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

import vitkernels as vk

everywhere = pytest.mark.parametrize("name", ECOSYSTEMS)
KINDS = ["timm", "vitkernels"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def norms(calls: list[vk.Call]) -> int:
    """Forward launches of add_layer_norm."""
    return sum((call.op, call.direction) == ("add_layer_norm", "forward") for call in calls)


def built(kind: str, depth: int = 4) -> nn.Module:
    """A model whose blocks are run as one stream, by a fused Sequential or by the package's own model."""
    if kind == "timm":
        return vk.fuse(vit(depth=depth))
    model = vk.nn.VisionTransformer(32, 8, num_classes=5, embed_dim=D, depth=depth, num_heads=3)
    fused.stir(model)
    return model


def one_by_one(model: nn.Module, x: Tensor) -> Tensor:
    """The model with its blocks called one after the other."""
    other = vk.unfuse(copy.deepcopy(model))
    for block in other.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda *_: None)
    return other(x)  # type: ignore[no-any-return]


def borders(model: nn.Module) -> str | None:
    (row,) = [row for row in vk.explain(model).rows if row.part == "borders"]
    return row.why_not


# ------------------------------------------------------------------------------------------------- a block by itself


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(name) for name in vk.explain(model).blocks]


@everywhere
def test_a_saved_block_is_as_large_as_the_stock_one(name: str) -> None:
    model = vk.fuse(ECOSYSTEMS[name].model())
    for block in blocks_of(model):
        with_fused = len(pickle.dumps(block)), len(pickle.dumps(copy.deepcopy(block))), _file(block)
        vk.unfuse(block)
        without = len(pickle.dumps(block)), len(pickle.dumps(copy.deepcopy(block))), _file(block)
        for one, other in zip(with_fused, without, strict=True):
            assert one <= other + 4096, "its options and class names, no neighbour"


def _file(module: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(module, file)
    return len(file.getvalue())


@everywhere
def test_a_block_depends_on_its_own_parameters_alone(name: str) -> None:
    model = vk.fuse(ECOSYSTEMS[name].model().eval())
    block, other = blocks_of(model)
    run = nn.Sequential(*block) if type(block) is nn.ModuleList else block  # vit-pytorch's, which the model runs
    x = torch.randn(2, 7, D)
    expected = run(x)
    other.to("meta")
    with vk.record() as calls:
        assert torch.equal(run(x), expected)
    assert {"linear", "mlp", "add_layer_norm"} <= {call.op for call in calls}
    expected.square().sum().backward()
    assert all(parameter.grad is None for parameter in other.parameters())


@everywhere
def test_the_second_half_is_elsewhere(name: str) -> None:
    ecosystem = ECOSYSTEMS[name]
    model, inputs = ecosystem.model(), ecosystem.inputs()
    vk.fuse(model)
    first, second = blocks_of(model)
    second.to("meta")
    reached: list[Tensor] = []
    if type(first) is nn.ModuleList:
        first[1].register_forward_hook(lambda module, args, out: reached.append(out))
    else:
        first.register_forward_hook(lambda module, args, out: reached.append(out))
    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        model(*inputs)
    assert reached, "the first block ran"


@each_kind
def test_blocks_on_two_devices(kind: str) -> None:
    """As a pipeline's stages have them: tokens are moved between the halves."""
    model = built(kind)
    x = torch.randn(2, 7, D)
    expected = one_by_one_tokens(model, x, 2)
    model.blocks[2:].to("meta")
    with vk.record() as calls:
        half = model.blocks[:2](x)
    torch.testing.assert_close(half, expected, atol=1e-5, rtol=1e-5)
    assert norms(calls) == (1 + 3 if kind == "timm" else 2 * 2)
    if kind == "timm":
        assert borders(model) == "; ".join(
            f"block {index} is called by itself: its weights are in meta" for index in (2, 3)
        )
    assert model.blocks[2:](half.to("meta")).shape == half.shape


def one_by_one_tokens(model: nn.Module, x: Tensor, count: int) -> Tensor:
    for block in vk.unfuse(copy.deepcopy(model)).blocks[:count]:  # type: ignore[index,union-attr]
        x = block(x)
    return x


def _shortened(model: Any) -> None:
    model.blocks = model.blocks[:2]


def _without_the_last_norm(model: Any) -> None:
    model.norm = nn.Identity()


def _without_a_norm(model: Any) -> None:
    model.blocks[1].norm1 = nn.Identity()


def _reversed(model: Any) -> None:
    model.blocks = nn.Sequential(*reversed(model.blocks))


@pytest.mark.parametrize("change", [_shortened, _without_the_last_norm, _without_a_norm, _reversed])
@each_kind
def test_parts_are_cut_off_before_weights_are_there(kind: str, change: Callable[[Any], None]) -> None:
    with torch.device("meta"):
        model = built(kind)
    change(model)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = images()
    with vk.record() as calls:
        got = fused.output_and_gradients(model, (x,))
    if kind == "timm":
        fused.check_same(got, fused.output_and_gradients(vk.unfuse(copy.deepcopy(model)), (x,)))
    else:
        torch.testing.assert_close(got["output 0"], one_by_one(model, x), atol=1e-5, rtol=1e-5)
    assert norms(calls) >= 2


def test_whole_blocks_are_dispatched_by_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, x = vit(depth=3).eval(), images()
    with torch.no_grad():
        expected = model(x)
        vk.fuse(model)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=["Block"])
        with vk.record() as calls:
            got = model(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert {call.op for call in calls} >= {"attention_qkv"}


# ------------------------------------------------------------------------------------------------- what has no gradient


@everywhere
def test_what_a_loss_does_not_reach_has_no_gradient(name: str) -> None:
    """A loss on an early block's tokens leaves all later parameters alone, for optimizers that would decay them."""
    ecosystem = ECOSYSTEMS[name]
    model, inputs = ecosystem.model(), ecosystem.inputs()
    found = []
    for _ in range(2):
        first = blocks_of(model)[0]
        tokens: list[Tensor] = []
        last = first[1] if type(first) is nn.ModuleList else first
        handle = last.register_forward_hook(lambda module, args, out, tokens=tokens: tokens.append(out))  # type: ignore[misc]
        model(*inputs)
        handle.remove()
        grads = torch.autograd.grad(tokens[0].square().sum(), list(model.parameters()), allow_unused=True)
        found.append([grad is not None for grad in grads])
        vk.fuse(model)
    assert found[1] == found[0]
    assert not all(found[0])


@pytest.mark.parametrize("options", [{"indices": [0]}, {"indices": [0], "stop_early": True}], ids=["", "stop early"])
def test_intermediate_tokens_leave_later_blocks_alone(options: dict[str, Any]) -> None:
    model = vit(depth=3)
    x = images()
    found = []
    for _ in range(2):
        (tokens,) = model.forward_intermediates(x, norm=False, intermediates_only=True, **options)
        tokens.square().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad()
        vk.fuse(model)
    for name, expected in found[0].items():
        assert (found[1][name] is None) == (expected is None), name
    fused.check_same(*({name: each for name, each in run.items() if each is not None} for run in reversed(found)))


# ----------------------------------------------------------------------------------------------------- what is swapped


@pytest.mark.parametrize(
    ("options", "swapped"),
    [
        ({"skip": "norm"}, {"blocks", "blocks.0", "blocks.0.attn", "blocks.0.mlp"}),
        ({"only": "blocks.*"}, {"blocks.0", "blocks.0.attn", "blocks.0.mlp"}),
        ({"only": "blocks"}, {"blocks", "blocks.0", "blocks.0.attn", "blocks.0.mlp"}),
        ({"skip": "blocks.0"}, {"blocks", "blocks.1", "blocks.1.attn", "blocks.1.mlp"}),
    ],
)
def test_patterns_swap_what_they_say(options: dict[str, str], swapped: set[str]) -> None:
    model, x = vit(depth=2), images()
    classes = {name: type(module) for name, module in model.named_modules()}
    expected = fused.output_and_gradients(model, (x,))
    vk.fuse(model, **options)
    changed = {name for name, module in model.named_modules() if type(module) is not classes[name]}
    assert swapped <= changed
    assert "norm" not in changed
    assert ("blocks" in changed) == ("blocks" in swapped)
    with vk.record() as calls:
        fused.check_same(fused.output_and_gradients(model, (x,)), expected)
    joined = "blocks" in swapped and "blocks.0" in swapped
    assert norms(calls) == (1 + 3 if joined else 2 * len({"blocks.0", "blocks.1"} & changed))


# ------------------------------------------------------------------------------------------ blocks called by themselves


def _hook(block: nn.Module) -> None:
    block.register_forward_hook(lambda *_: None)


def _pre_hook(block: nn.Module) -> None:
    block.register_forward_pre_hook(lambda *_: None)


def _backward_hook(block: nn.Module) -> None:
    block.register_full_backward_hook(lambda *_: None)


def _own_forward(block: nn.Module) -> None:
    forward = block.forward
    block.forward = lambda *args, **keywords: forward(*args, **keywords)  # type: ignore[method-assign]


def _compiled(block: nn.Module) -> None:
    block.compile(backend="aot_eager")


ALONE: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "hook": (_hook, "it has a hook"),
    "pre-hook": (_pre_hook, "it has a hook"),
    "backward hook": (_backward_hook, "it has a hook"),
    "own forward": (_own_forward, "it has another forward"),
    "compiled": (_compiled, "it is compiled by itself"),
}


@pytest.mark.parametrize("change", ALONE)
@each_kind
def test_a_block_that_is_called_by_itself(kind: str, change: str) -> None:
    model, x = built(kind), images()
    expected = fused.output_and_gradients(model, (x,))
    act, reason = ALONE[change]
    act(model.blocks[1])
    with vk.record() as calls:
        fused.check_same(fused.output_and_gradients(model, (x,)), expected)
    if kind == "timm":
        assert borders(model) == f"block 1 is called by itself: {reason}"
        assert norms(calls) == 2 + 2 + (1 + 3), "the first one alone, then the one that is called, then two joined"
    else:
        assert norms(calls) == 4 * 2 + 1, "all are called, and the last norm stands alone"


@each_kind
def test_blocks_in_checkpoint_wrappers(kind: str) -> None:
    model, x = built(kind), images()
    expected = fused.output_and_gradients(model, (x,))
    for index in (1, 2):
        model.blocks[index] = checkpoint_wrapper(model.blocks[index], checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    with vk.record() as calls:
        got = fused.output_and_gradients(model, (x,))
    fused.check_same({name.replace("_checkpoint_wrapped_module.", ""): each for name, each in got.items()}, expected)
    assert norms(calls) == (4 + 2) * 2 + (kind == "vitkernels"), "the wrapped ones ran twice"
    if kind == "timm":
        assert borders(model) == "; ".join(f"block {index} is called by itself: it is not fused" for index in (1, 2))


@pytest.mark.parametrize(
    "options", [{"backend": "reference"}, {"residual_dtype": torch.bfloat16}], ids=["backend", "dtype"]
)
def test_a_block_with_other_options(options: dict[str, Any]) -> None:
    model, x = built("timm"), images()
    vk.fuse(model.blocks[1], **options)
    with vk.record() as calls, torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    assert norms(calls) == 2 + 2 + (1 + 3)
    if "backend" in options:
        forward = [call.backend for call in calls if call.op == "mlp"]
        assert forward[1] == "reference"
        assert set(forward[:1] + forward[2:]) != {"reference"} or vk.dispatch.why_not("ext")
    else:
        seen: list[torch.dtype] = []
        for block in model.blocks:
            block.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x), got, atol=0.05, rtol=0.05)
        assert seen[:2] == [torch.float32, torch.bfloat16]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(got, vk.unfuse(model)(x), atol=0.05 * got.abs().max().item(), rtol=0.05)


def test_slices_are_joined_too() -> None:
    model, x = built("timm"), torch.randn(2, 7, D)
    for part, count in ((slice(0, 2), 2), (slice(1, None), 3), (slice(0, 1), 1), (slice(None, None, 2), 2)):
        with vk.record() as calls:
            got = model.blocks[part](x)
        assert norms(calls) == 2 * count
        expected = x
        for block in list(vk.unfuse(copy.deepcopy(model)).blocks)[part]:  # type: ignore[arg-type]
            expected = block(expected)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_sequential_of_mixed_modules() -> None:
    blocks = list(vit(depth=3).blocks)
    stock = nn.Sequential(nn.Linear(D, D), blocks[0], blocks[1], Doubled(), blocks[2], nn.LayerNorm(D), nn.ReLU())
    fused.stir(stock)
    explanation = fused.check_parity(
        stock, (torch.randn(2, 7, D),), ops={"linear", "attention_qkv", "add_layer_norm", "mlp"}
    )
    (row,) = [row for row in explanation.rows if row.part == "borders"]
    assert row.why_not == "; ".join(f"block {index} is called by itself: it is not fused" for index in (0, 3, 5, 6))
    with vk.record() as calls, torch.no_grad():
        vk.fuse(stock)(torch.randn(2, 7, D))
    assert norms(calls) == (1 + 3) + 2


def test_a_sequential_that_is_given_no_tensor() -> None:
    class Pair(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return pair[0] + pair[1]

    blocks = list(vit(depth=2).blocks)
    stock = nn.Sequential(Pair(), *blocks)
    pair = (torch.randn(2, 7, D), torch.randn(2, 7, D))
    expected = stock(pair)
    torch.testing.assert_close(vk.fuse(stock)(pair), expected, atol=1e-5, rtol=1e-5)


def test_forwards_replaced_on_the_block_after_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loop runs in a row is what the block's class says now."""
    kind = timm.models.vision_transformer.Block
    model, x, own = built("timm"), images(), kind.forward
    stock = vk.unfuse(copy.deepcopy(model))
    monkeypatch.setattr(kind, "forward", lambda self, x, attn_mask=None, is_causal=False: 0.5 * own(self, x))
    with vk.record() as calls:
        torch.testing.assert_close(model(x), stock(x), atol=1e-5, rtol=1e-5)
    assert norms(calls) == 0
