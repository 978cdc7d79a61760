"""Function transforms, autocast, checkpointing, saved-tensor hooks: each works as on stock ops, or says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.utils.checkpoint as checkpoint
from case import Case, Loss
from cases import SMALL, add_layer_norm
from torch import Tensor, nn

import vitkernels as vk
from vitkernels import dispatch
from vitkernels.op import Op

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap's own fallback


# --------------------------------------------------------------------------------------------- function transforms


def test_func_grad(loss: Loss, backend: str) -> None:
    with vk.use(backend), vk.record() as calls:
        grads = torch.func.grad(loss, argnums=tuple(range(len(loss.values))))(*loss.values)
    assert {(call.direction, call.backend) for call in calls} == {("forward", backend), ("backward", backend)}
    torch.testing.assert_close(list(grads), loss.gradients())


def test_vjp_and_jacrev(loss: Loss) -> None:
    value, pullback = torch.func.vjp(loss, *loss.values)
    torch.testing.assert_close(list(pullback(torch.ones(()))), loss.gradients())
    torch.testing.assert_close(torch.func.jacrev(loss)(*loss.values), loss.gradients()[0])
    torch.testing.assert_close(value, loss(*loss.values))


def test_vmap_over_each_argument(loss: Loss) -> None:
    """Values, and gradients of each sample, against a loop."""
    for position, value in enumerate(loss.values):

        def of_one(tensor: Tensor, position: int = position) -> Tensor:
            return loss(*loss.values[:position], tensor, *loss.values[position + 1 :])

        batch = torch.stack([value, value * 2, value + 0.1])
        torch.testing.assert_close(torch.vmap(of_one)(batch), torch.stack([of_one(each) for each in batch]))
        gradient = torch.func.grad(of_one)
        torch.testing.assert_close(torch.vmap(gradient)(batch), torch.stack([gradient(each) for each in batch]))


def test_vmap_along_another_axis() -> None:
    x, weight = torch.randn(5, 3, 16), torch.randn(8, 16)
    got = torch.vmap(lambda each: vk.ops.linear(each, weight), in_dims=1, out_dims=1)(x)
    torch.testing.assert_close(got, vk.ops.linear(x, weight))


def test_gradients_of_each_sample() -> None:
    """The weights' gradient of every sample by itself, as differential privacy wants it."""
    x, w1, w2 = torch.randn(4, 5, 16), torch.randn(24, 16), torch.randn(16, 24)

    def of_sample(weights: tuple[Tensor, Tensor], sample: Tensor) -> Tensor:
        _, normed = vk.ops.add_layer_norm(sample, None, torch.ones(16))
        return vk.ops.mlp(normed, weights[0], None, weights[1], None).square().sum()

    per_sample = torch.vmap(torch.func.grad(of_sample), (None, 0))((w1, w2), x)
    loop = [torch.func.grad(of_sample)((w1, w2), sample) for sample in x]
    torch.testing.assert_close(per_sample[0], torch.stack([grads[0] for grads in loop]))
    torch.testing.assert_close(per_sample[1], torch.stack([grads[1] for grads in loop]))


FORWARD_MODE = "does not support forward-mode differentiation"
DOUBLE = "does not support double backward"


def _dual(loss: Loss) -> Any:
    with forward_ad.dual_level():
        first = forward_ad.make_dual(loss.values[0], torch.ones_like(loss.values[0]))
        return loss(first, *loss.values[1:])


def _double(loss: Loss) -> Any:
    leaves = loss.leaves()
    grads = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)


def _grad_of_grad(loss: Loss) -> Any:
    first, *rest = loss.values
    return torch.func.grad(lambda x: torch.func.grad(loss)(x, *rest).sum())(first)


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (lambda loss: torch.func.jvp(loss, tuple(loss.values), tuple(loss.values)), FORWARD_MODE),
        (lambda loss: torch.func.jacfwd(loss)(*loss.values), FORWARD_MODE),
        (_dual, FORWARD_MODE),
        (_double, DOUBLE),
        (
            lambda loss: torch.func.grad(lambda x: torch.func.grad(loss)(x, *loss.values[1:]).sum())(loss.values[0]),
            DOUBLE,
        ),
        (lambda loss: torch.func.hessian(loss)(*loss.values), FORWARD_MODE),
    ],
    ids=["jvp", "jacfwd", "dual numbers", "double backward", "grad of grad", "hessian"],
)
def test_refused_by_name(loss: Loss, transform: Callable[[Loss], Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=f"vitkernels: {loss.case.op} {words}"):
        transform(loss)


def test_create_graph_alone_is_no_double_backward(loss: Loss) -> None:
    leaves = loss.leaves()
    grads = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    torch.testing.assert_close([grad.detach() for grad in grads], loss.gradients())


def test_raw_op_differentiates(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op without the Function around it, as a compiler calls it, gives no silent zeros."""
    want = loss.gradients()
    monkeypatch.setattr(Op, "__call__", lambda op, *args: op.forward_op(*args))
    monkeypatch.setattr(dispatch.OPS[loss.case.op], "function", None)
    torch.testing.assert_close(loss.gradients(), want)


# ------------------------------------------------------------------------------------------------------- autocast

AUTOCAST = {  # dtype of each result under bfloat16 autocast, of float32 arguments
    "linear": {"out": torch.bfloat16},
    "patch_embed": {"out": torch.float32},  # the position table's
    "attention": {"out": torch.bfloat16},
    "attention_qkv": {"out": torch.bfloat16},
    "add_layer_norm": {"total": torch.float32, "normed": torch.float32},
    "add_rms_norm": {"total": torch.float32, "normed": torch.float32},
    "mlp": {"out": torch.bfloat16},
    "glu_mlp": {"out": torch.bfloat16},
    "rotary": {"out": torch.float32},  # x's own
    "attention_rel_pos": {"out": torch.bfloat16},
    "attention_varlen": {"out": torch.bfloat16},
    "rotary_qkv": {"out": torch.float32},
}


def test_autocast(loss: Loss, backend: str) -> None:
    """Mixed float32 parameters and bfloat16 activations; gradients come back in the parameters' dtype."""
    with torch.autocast("cpu", dtype=torch.bfloat16), vk.use(backend), vk.record() as calls:
        outputs = loss.case.call(loss.case.build(torch.float32))
        gradients = loss.gradients()
    assert {name: output.dtype for name, output in outputs.items()} == AUTOCAST[loss.case.op]
    assert {call.backend for call in calls} == {backend}
    exact = loss.gradients()
    for name, got, want in zip(loss.names, gradients, exact, strict=True):
        assert got.dtype == torch.float32, name
        assert (got - want).abs().max() <= 0.05 * want.abs().max(), name


def test_autocast_patch_embed_without_tables() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert vk.ops.patch_embed(torch.randn(1, 3, 8, 8), torch.randn(16, 3, 4, 4)).dtype == torch.bfloat16


def test_autocast_leaves_float64_alone() -> None:
    x, weight = torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert vk.ops.linear(x, weight).dtype == torch.float64


# ----------------------------------------------------------------------------------- checkpoint, hooks, modules


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(loss: Loss, use_reentrant: bool) -> None:
    with vk.record() as calls:
        grads = loss.gradients(lambda *leaves: checkpoint.checkpoint(loss, *leaves, use_reentrant=use_reentrant))
    assert [call.direction for call in calls] == ["forward", "forward", "backward"]
    torch.testing.assert_close(grads, loss.gradients(), rtol=0, atol=0)


def test_selective_checkpoint(loss: Loss) -> None:
    """What a policy says to save is not computed twice."""
    contexts = loss.saving_the_op()
    with vk.record() as calls:
        grads = loss.gradients(
            lambda *leaves: checkpoint.checkpoint(loss, *leaves, use_reentrant=False, context_fn=contexts)
        )
    assert [call.direction for call in calls] == ["forward", "backward"]
    torch.testing.assert_close(grads, loss.gradients(), rtol=0, atol=0)


def test_saved_tensor_hooks(loss: Loss) -> None:
    """Every tensor kept for backward passes the hooks, as offloading and compression need."""
    with torch.autograd.graph.save_on_cpu():
        offloaded = loss.gradients()
    torch.testing.assert_close(offloaded, loss.gradients(), rtol=0, atol=0)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss(*loss.leaves())
    assert packed


def test_backward_twice(loss: Loss) -> None:
    leaves = loss.leaves()
    value = loss(*leaves)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(value, leaves), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("case", [*SMALL, add_layer_norm("bare", vectors=())], ids=str)
def test_gradients_accumulate(case: Case, backend: str) -> None:
    """Two steps add up in every leaf, and no two leaves share one gradient's memory."""
    tensors = case.build(torch.float32)
    leaves: list[Any] = [tensor for tensor in tensors.values() if tensor is not None and tensor.requires_grad]
    steps = []
    for _ in range(2):
        with vk.use(backend):
            outputs = case.call(tensors)
            torch.autograd.backward(list(outputs.values()), list(case.build_gradients(outputs).values()))
        steps.append([leaf.grad.clone() for leaf in leaves])
    assert len({leaf.grad.untyped_storage().data_ptr() for leaf in leaves}) == len(leaves)
    torch.testing.assert_close(steps[1], [2 * gradient for gradient in steps[0]])


def test_an_argument_changed_before_backward_is_noticed() -> None:
    x, weight = torch.randn(2, 4), torch.randn(3, 4, requires_grad=True)
    out = vk.ops.linear(x, weight)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        _, normed = vk.ops.add_layer_norm(x, None, self.norm.weight, self.norm.bias, self.norm.eps)
        return vk.ops.mlp(normed, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


def test_deepcopy_of_a_module_and_of_a_result() -> None:
    layer, x = Layer(), torch.randn(2, 3, 16)
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
    with torch.no_grad():
        twin.fc1.weight.zero_()
        assert not torch.equal(twin(x), layer(x))
        copy.deepcopy(layer(x))


def test_functional_call() -> None:
    layer, x = Layer(), torch.randn(2, 3, 16)
    doubled = {name: value.detach() * 2 for name, value in layer.named_parameters()}
    other = copy.deepcopy(layer)
    other.load_state_dict(doubled)
    torch.testing.assert_close(torch.func.functional_call(layer, doubled, x), other(x), rtol=0, atol=0)
