"""torch.compile, export, compiled autograd: one graph, the eager numbers, the backend still chosen at run time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.utils.checkpoint as checkpoint
from case import Case, Loss, T
from cases import (
    LAYER,
    SMALL,
    add_layer_norm,
    add_rms_norm,
    attention,
    attention_qkv,
    attention_rel_pos,
    attention_varlen_qkv,
    glu_mlp,
    linear,
    mlp,
    patch_embed,
    rotary,
    rotary_qkv,
)
from step_layers import keep_smaller_norms
from torch import Tensor, nn

import vitkernels as vk
from vitkernels import dispatch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Inductor compiles in this process: the workers already share the cores."""
    with torch._inductor.config.patch(compile_threads=1):
        yield


def _compiled(function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def _check_compiled(loss: Loss, function: Callable[..., Tensor]) -> None:
    want = loss.gradients()
    torch.testing.assert_close(function(*loss.leaves()), loss(*loss.values))
    with vk.record() as calls:
        got = loss.gradients(function)
    assert [(call.op, call.direction) for call in calls] == [(loss.case.op, "forward"), (loss.case.op, "backward")]
    torch.testing.assert_close(got, want)


def test_static_shapes(loss: Loss) -> None:
    _check_compiled(loss, _compiled(loss, dynamic=False))


@pytest.mark.parametrize(
    "loss", [case for case in SMALL if case.pairs or "attn_mask" in case.tensors], ids=str, indirect=True
)
def test_inductor(loss: Loss) -> None:
    """What `Model`, which has every op, gives none: masks, and pairs of weights."""
    _check_compiled(loss, _compiled(loss, backend="inductor"))


def _sizes(op: str, batch: int, tokens: int) -> Case:
    mask = T((batch, 3, tokens, tokens))
    grid = (2, tokens - 5)
    cases = {
        "linear": lambda: linear("sizes", (batch, tokens), 16, 24),
        "patch_embed": lambda: patch_embed(
            "sizes", 4, grid, batch=batch, prefix=1, pos_embed=1 + grid[0] * grid[1], keep=tokens - 2
        ),
        "attention": lambda: attention("sizes", batch, 3, tokens, mask=mask),
        "attention_qkv": lambda: attention_qkv("sizes", batch, 3, tokens, mask=mask),
        "add_layer_norm": lambda: add_layer_norm("sizes", (batch, tokens, 16)),
        "add_rms_norm": lambda: add_rms_norm("sizes", (batch, tokens, 16), by_sample=("weight", "scale")),
        "mlp": lambda: mlp("sizes", (batch, tokens)),
        "glu_mlp": lambda: glu_mlp("sizes", (batch, tokens)),
        "attention_rel_pos": lambda: attention_rel_pos("sizes", batch, 2, (3, tokens)),
        "attention_varlen": lambda: attention_varlen_qkv("sizes", (tokens,) * batch),
        "rotary": lambda: rotary("sizes", (batch, 3, tokens, 16), prefix=1, half=True),
        "rotary_qkv": lambda: rotary_qkv("sizes", (batch, tokens, 3, 2, 16), prefix=1, **LAYER),
    }
    return cases[op]()


@pytest.mark.parametrize("op", dispatch.OPS)
def test_dynamic_shapes(op: str) -> None:
    """One graph serves every batch and number of tokens."""

    def function(options: Mapping[str, Any], tensors: dict[str, Tensor]) -> Tensor:
        outputs = getattr(vk.ops, op)(**options, **tensors)
        return sum(output.sin().sum() for output in (outputs if isinstance(outputs, tuple) else [outputs]))

    compiled = _compiled(function, dynamic=True)
    for batch, tokens in ((5, 8), (3, 11), (4, 9)):
        loss = Loss(_sizes(op, batch, tokens))
        leaves, again = loss.leaves(), loss.leaves()
        compiled(loss.case.options, loss.fixed | dict(zip(loss.names, leaves, strict=True))).backward()
        function(loss.case.options, loss.fixed | dict(zip(loss.names, again, strict=True))).backward()
        torch.testing.assert_close([leaf.grad for leaf in leaves], [leaf.grad for leaf in again])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("op", ["attention", "attention_qkv"])
@pytest.mark.parametrize("each", ["image", "head", "model"])
def test_masks_of_dynamic_tokens(each: str, op: str) -> None:
    """A mask for each image, for each head, or one whose size a model fixes, where the number of tokens is traced."""

    def function(tokens: Tensor, mask: Tensor) -> Tensor:
        if op == "attention_qkv":
            return vk.ops.attention_qkv(tokens.flatten(2), 3, attn_mask=mask)
        return vk.ops.attention(*tokens.unflatten(-1, (3, 4)).permute(2, 0, 3, 1, 4), attn_mask=mask)

    compiled = _compiled(function, dynamic=True)
    for batch, count in ((5, 8), (3, 8)) if each == "model" else ((5, 8), (3, 11), (4, 9)):
        mask = torch.randn((batch, 1, 1, count) if each == "image" else (1, 3, count, count), requires_grad=True)
        if each == "model":
            torch._dynamo.mark_static(mask)
        tokens = torch.randn(batch, count, 3, 12, requires_grad=True)
        with vk.record() as calls:
            got = torch.autograd.grad(compiled(tokens, mask).square().sum(), (tokens, mask))
        assert [(call.op, call.direction) for call in calls] == [(op, "forward"), (op, "backward")]
        torch.testing.assert_close(got, torch.autograd.grad(function(tokens, mask).square().sum(), (tokens, mask)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_use_needs_no_recompiling(loss: Loss) -> None:
    compiled = _compiled(loss)
    compiled(*loss.leaves()).backward()
    available = [name for name, status in vk.backends().items() if status == "available"]
    assert available
    with torch._dynamo.config.patch(error_on_recompile=True):
        for backend in available:
            with vk.use(backend), vk.record() as calls:
                loss.gradients(compiled)
            assert [(call.direction, call.backend) for call in calls] == [("forward", backend), ("backward", backend)]
        with vk.use("triton"), pytest.raises(vk.BackendError, match="triton: "):
            compiled(*loss.leaves())


def test_use_and_record_inside_compiled_code() -> None:
    """They would take effect too late, so a whole graph refuses them, and otherwise the frame runs uncompiled."""
    x, weight = torch.randn(2, 4), torch.randn(3, 4)

    def using() -> Tensor:
        with vk.use("reference"):
            return vk.ops.linear(x, weight)

    def recording() -> int:
        with vk.record() as calls:
            vk.ops.linear(x, weight)
        return len(calls)

    for function, name in ((using, "use"), (recording, "record")):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=f"{name}: called inside a function"):
            _compiled(function)()
    with vk.record() as calls:
        torch.compile(using, backend="aot_eager")()
    assert [call.backend for call in calls] == ["reference"]
    assert torch.compile(recording, backend="aot_eager")() == 1


# ------------------------------------------------------------------------------------------------------- transforms


def test_autocast(loss: Loss) -> None:
    def function(*values: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss.outputs(values)

    eager, compiled = function(*loss.values), _compiled(function)(*loss.values)
    assert {name: out.dtype for name, out in compiled.items()} == {name: out.dtype for name, out in eager.items()}
    torch.testing.assert_close(compiled, eager)


def test_selective_checkpoint(loss: Loss) -> None:
    contexts = loss.saving_the_op()

    def function(*values: Tensor) -> Tensor:
        return checkpoint.checkpoint(loss, *values, use_reentrant=False, context_fn=contexts)

    _check_compiled(loss, _compiled(function))


def test_checkpoint(loss: Loss) -> None:
    def function(*values: Tensor) -> Tensor:
        return checkpoint.checkpoint(loss, *values, use_reentrant=False)

    with vk.record() as calls:
        got = loss.gradients(_compiled(function))
    assert [call.direction for call in calls].count("backward") == 1
    torch.testing.assert_close(got, loss.gradients())


def test_vmap(loss: Loss) -> None:
    first, *rest = loss.values
    batch = torch.stack([first, first * 2])
    got = _compiled(torch.vmap(lambda value: loss(value, *rest)))(batch)
    torch.testing.assert_close(got, torch.stack([loss(each, *rest) for each in batch]))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_forward_mode_is_refused(loss: Loss, fullgraph: bool) -> None:
    """Not a tangent of zeros."""

    def tangent(*values: Tensor) -> Any:
        return torch.func.jvp(loss, values, values)

    with pytest.raises(RuntimeError, match=f"{loss.case.op} does not support forward-mode differentiation"):
        torch.compile(tangent, fullgraph=fullgraph, backend="aot_eager")(*loss.values)


def test_func_grad_is_refused(loss: Loss) -> None:
    """Not a gradient of zeros."""
    with pytest.raises(RuntimeError, match="functorch transforms"):
        _compiled(torch.func.grad(loss))(*loss.values)


def test_double_backward_is_refused() -> None:
    x, weight = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    out = _compiled(vk.ops.linear)(x, weight)
    with pytest.raises(RuntimeError, match=r"double backward|donated"):
        torch.autograd.grad(torch.autograd.grad(out.square().sum(), x, create_graph=True)[0].square().sum(), weight)


# ------------------------------------------------------------------------------------------------------------ export


class Model(nn.Module):
    """Every op once."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 24, 4, 4)
        self.pos_embed = nn.Parameter(torch.randn(1 + 6, 24))
        self.prefix = nn.Parameter(torch.randn(1, 24))
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv, self.fc1, self.fc2 = nn.Linear(24, 72), nn.Linear(24, 48), nn.Linear(48, 24)
        self.norm3, self.gates, self.fc3 = nn.RMSNorm(24, eps=1e-5), nn.Linear(24, 64), nn.Linear(32, 24)

    def forward(self, image: Tensor) -> Tensor:
        x = vk.ops.patch_embed(
            image, self.proj.weight, self.proj.bias, prefix=self.prefix, pos_embed=self.pos_embed, mean=[0.5] * 3
        )
        _, normed = vk.ops.add_layer_norm(x, None, self.norm1.weight, self.norm1.bias)
        qkv = vk.ops.linear(normed, self.qkv.weight, self.qkv.bias)
        branch = vk.ops.attention_qkv(qkv, 2)
        total, normed = vk.ops.add_layer_norm(x, branch, self.norm2.weight, self.norm2.bias)
        total = total + vk.ops.mlp(normed, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        heads = total.unflatten(-1, (2, 12)).transpose(1, 2)
        angles = torch.arange(6.0 * 12).view(6, 12)
        turned = vk.ops.rotary(heads, angles.sin(), angles.cos(), prefix=1)
        total = total + vk.ops.attention(turned, turned, heads, is_causal=True).transpose(1, 2).flatten(2)
        total, normed = vk.ops.add_rms_norm(total, total, self.norm3.weight, 1e-5)
        total = total + vk.ops.glu_mlp(normed, self.gates.weight, self.gates.bias, self.fc3.weight, self.fc3.bias)
        tall, wide = turned[..., :7], turned[..., 7:8]  # an image of one column
        total = total + vk.ops.attention_rel_pos(turned, turned, heads, tall, wide).transpose(1, 2).flatten(2)
        turned = vk.ops.rotary_qkv(qkv.unflatten(-1, (3, 2, 12)), angles.sin(), angles.cos(), prefix=1)
        ends = torch.arange(image.shape[0] + 1, dtype=torch.int32) * 7
        return total + vk.ops.attention_varlen(turned.flatten(0, 1), ends, 7).view_as(total)


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, no_grad: bool) -> None:
    model, image = Model(), torch.randn(4, 3, 8, 12)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.set_grad_enabled(not no_grad):
        program = torch.export.export(model, (image,), dynamic_shapes=({0: batch},), strict=strict)
    program = program.run_decompositions()
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {f"vitkernels.{op}.default" for op in dispatch.OPS} <= names
    torch.testing.assert_close(program.module()(image[:3]), model(image[:3]))


def test_whole_model_trains_compiled() -> None:
    """Every op in one graph, with inductor: forward, every parameter's gradient, another batch size."""
    model, image = Model(), torch.randn(4, 3, 8, 12)
    compiled = _compiled(model, backend="inductor", dynamic=True)
    for batch in (image, image[:3]):
        wanted = torch.autograd.grad(model(batch).square().mean(), list(model.parameters()))
        with vk.record() as calls:
            got = torch.autograd.grad(compiled(batch).square().mean(), list(model.parameters()))
        assert {call.op for call in calls if call.direction == "backward"} == set(dispatch.OPS)
        torch.testing.assert_close(got, wanted)


def _by_compiled_autograd(model: nn.Module, inputs: Tensor) -> list[vk.Call]:
    """Gradients are the eager ones; returns the calls of the compiled backward pass."""
    model(inputs).square().mean().backward()
    wanted = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    value = model(inputs).square().mean()
    with vk.record() as calls, torch._dynamo.compiled_autograd._enable(_compiled):
        value.backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], wanted)
    return calls


def test_compiled_autograd() -> None:
    calls = _by_compiled_autograd(Model(), torch.randn(2, 3, 8, 12))
    assert {(call.op, call.direction) for call in calls} == {(op, "backward") for op in dispatch.OPS}


@pytest.mark.parametrize("smallest", [0, 2**16], ids=["made again", "kept"])
def test_compiled_autograd_of_steps(smallest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_smaller_norms(monkeypatch, smallest)
    calls = _by_compiled_autograd(vk.nn.Block(24, 3), torch.randn(2, 5, 24))
    forward = [call.op for call in calls if call.direction == "forward"]
    assert forward == ([] if smallest else ["add_layer_norm", "add_layer_norm"]), (
        "a norm that was not kept is made again"
    )
    ran = {call.op for call in calls if call.direction == "backward"}
    assert ran == {"linear", "attention_qkv", "add_layer_norm", "mlp"}
