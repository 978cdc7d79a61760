"""What steps of a residual stream keep for backward passes, and what they make again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import skip_without
from step_layers import FACTORS, KINDS, D, Layer, check_equal, keep_smaller_norms, launches, norms
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import vitkernels as vk
from vitkernels import dispatch, tape
from vitkernels.ops import _step

kinds = pytest.mark.parametrize("kind", KINDS)
STEPS = tuple(_step.STEPS.values())


@pytest.fixture
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_smaller_norms(monkeypatch, 0)


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    """What is freed here is freed because nothing holds it."""
    gc.disable()
    yield
    gc.enable()


# ------------------------------------------------------------------------------------------------------- made again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["", "no bias"])
@kinds
def test_a_norm_made_again_has_the_same_bits(
    backend: str, kind: str, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(kind, dtype, bias=bias, factors=FACTORS)
    with vk.use(backend):
        expected = layer.gradients(layer.together())
        keep_smaller_norms(monkeypatch, 0)
        with vk.record() as calls:
            results = layer.together()
        assert norms(calls) == 1
        with vk.record() as calls:
            got = layer.gradients(results)
    heads = ["rotary_qkv"] if kind in ("head norms", "packed") else []  # whose norms are made again as well
    assert launches(calls)[0] == ["add_layer_norm", *heads]
    check_equal(got, expected)


@pytest.mark.usefixtures("nothing_is_small")
@pytest.mark.parametrize("branch", [True, False], ids=["", "nothing added"])
@kinds
def test_a_norm_made_again_under_autocast(backend: str, kind: str, branch: bool, monkeypatch: Any) -> None:
    layer = Layer(kind, branch=branch)

    def gradients() -> dict[str, Tensor | None]:
        with torch.autocast("cpu", torch.bfloat16):
            results = layer.together()
        return layer.gradients(results)  # outside, as training loops have it

    with vk.use(backend):
        with vk.record() as calls:
            got = gradients()
        keep_smaller_norms(monkeypatch, 2**16)
        check_equal(got, gradients())
    assert norms(calls) == 2


@kinds
def test_a_small_norm_is_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(kind)
    elements = layer.tensors["x"].numel()
    for smallest, again in ((elements, 1), (elements + 1, 0)):
        keep_smaller_norms(monkeypatch, smallest)
        with vk.record() as calls:
            layer.gradients(layer.together())
        assert norms(calls) == 1 + again


@pytest.mark.usefixtures("nothing_is_small")
@kinds
def test_nothing_reads_a_norm_of_frozen_weights(kind: str) -> None:
    layer = Layer(kind)
    layer.freeze(*({"w1", "w_up"} & layer.tensors.keys()))
    with vk.record() as calls:
        layer.gradients(layer.together())
    assert norms(calls) == 1


@pytest.mark.usefixtures("nothing_is_small")
def test_a_scope_of_backends_holds_in_backward(backend: str) -> None:
    skip_without("ext")
    layer = Layer("attention")
    with vk.dispatch.scope((backend,)):
        results = layer.together()
    with vk.record() as calls:
        layer.gradients(results)
    assert {call.backend for call in calls} == {backend}
    assert norms(calls) == 1


# ----------------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def normed(monkeypatch: pytest.MonkeyPatch) -> list[StorageWeakRef]:
    """The memory of every norm's result that a step hands to its product."""
    seen: list[StorageWeakRef] = []

    def watched(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(launch: Any, normed: Tensor, *args: Any) -> Any:
            seen.append(StorageWeakRef(normed.untyped_storage()))
            return forward(launch, normed, *args)

        return run

    for step in STEPS:
        monkeypatch.setattr(step, "forward", watched(step.forward))
    monkeypatch.setattr(tape, "FROM_CALL", 1000)  # a tape holds what it sees until it ends
    dispatch.backends_changed()
    return seen


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("smallest", [0, 2**16], ids=["made again", "kept"])
@kinds
def test_the_norm_is_freed_and_all_else_after_the_graph(
    kind: str, smallest: int, autocast: bool, normed: list[StorageWeakRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_smaller_norms(monkeypatch, smallest)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, product = Layer(kind).together()
    (held,) = normed
    assert held.expired() == (smallest == 0)
    sums = StorageWeakRef(total.untyped_storage())
    del total
    assert not sums.expired(), "the sum is kept for the norm's backward pass"
    del product
    assert sums.expired(), "the sum outlives its graph"
    assert held.expired()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@kinds
def test_nothing_is_kept_without_gradients(kind: str, mode: Callable[[], Any], normed: list[StorageWeakRef]) -> None:
    with mode():
        results = Layer(kind).together()
    assert [each.expired() for each in normed] == [True]
    assert not any(each.requires_grad for each in results)


def kept_by(run: Callable[[], Any]) -> list[Tensor]:
    """Every tensor that a run keeps for its backward pass."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return kept


@kinds
def test_autocast_keeps_no_copy_of_a_weight(kind: str) -> None:
    layer = Layer(kind)
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_by(layer.together)
    weights = [tensor for name, tensor in layer.tensors.items() if name in ("w1", "w_up", "w2")]
    shapes = {weight.shape for weight in weights}
    same = [each.data_ptr() for each in kept if each.shape in shapes]
    assert sorted(same) == sorted(weight.data_ptr() for weight in weights)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_weights_are_kept_where_a_library_may_want_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more rows than the extension rounds weights for; gradients come in the weights' dtype, with the same bits."""
    skip_without("ext")
    layer, found = Layer(kind), []
    for rounded, most in ((0, 1024), (200, 1024), (0, 1)):
        monkeypatch.setattr(_step, "ROUNDED", rounded)
        monkeypatch.setattr(_step, "FEW_ROWS_OF_COPIES", most)
        dispatch.backends_changed()  # what calls have settled, they settle anew
        with torch.autocast("cpu", torch.bfloat16), vk.use("ext"):
            _, result = layer.together()
        copied = (rounded, most) == (0, 1024)
        assert {each.dtype for each in _copies(result)} == ({torch.bfloat16} if copied else set())
        with vk.record() as calls:
            found.append(layer.gradients((result, result), use="product"))
        assert {call.backend for call in calls} == {"ext"}
    for other in found[1:]:
        check_equal(other, found[0])


def _copies(result: Tensor) -> list[Tensor]:
    """Of weights, that a step keeps beside the weights themselves."""
    saved = result.grad_fn.saved_tensors
    return [*saved[len(saved) - result.grad_fn.copies :]]


@pytest.mark.parametrize("again", [False, True], ids=["", "graph retained"])
@kinds
def test_copies_of_weights_go_with_the_backward_pass(kind: str, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not with the graph, which a loss holds until every block has been gone through."""
    skip_without("ext")
    layer = Layer(kind)
    monkeypatch.setattr(_step, "ROUNDED", 0)
    monkeypatch.setattr(tape, "FROM_CALL", 1000)  # a tape holds what it sees until it ends
    dispatch.backends_changed()
    with torch.autocast("cpu", torch.bfloat16), vk.use("ext"), vk.record() as calls:
        _, result = layer.together()
    assert {call.backend for call in calls} == {"ext"}
    copies = [StorageWeakRef(each.untyped_storage()) for each in _copies(result)]
    assert copies
    assert not any(copy.expired() for copy in copies)
    if again:
        (first,) = torch.autograd.grad(result.sum(), layer.tensors["w1"], retain_graph=True)
        assert not any(copy.expired() for copy in copies)
        (second,) = torch.autograd.grad(result.sum(), layer.tensors["w1"])
        assert torch.equal(first, second)
    else:
        result.sum().backward()
    assert result.grad_fn is not None, "the graph is here still"
    assert all(copy.expired() for copy in copies)


def _kept_units(model: nn.Module, image: Tensor, unit: int) -> float:
    """What a step keeps for its backward pass, weights aside, in units of so many bytes."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept = kept_by(lambda: model(image))
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept}
    return sum(size for address, size in storages.items() if address not in weights) / unit


@pytest.mark.parametrize("own", [True, False], ids=["vitkernels", "timm"])
def test_a_block_keeps_ten_tensors_of_its_tokens(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sums, qkv (3), the attention's result (1) and the pre-activation (4); statistics beside them are small."""
    sizes = {"img_size": 32, "patch_size": 8, "num_classes": 10, "embed_dim": 96, "num_heads": 3}
    if own:
        models = [vk.nn.VisionTransformer(**sizes, depth=depth) for depth in (2, 3)]
    else:
        from timm_vit import timm

        models = [vk.fuse(timm.models.VisionTransformer(**sizes, depth=depth)) for depth in (2, 3)]
        assert vk.explain(models[1]).summary == "3 of 3 blocks fused"
    image, unit = torch.randn(2, 3, 32, 32), 2 * 17 * 96 * 4
    for smallest, units in ((0, 10), (2**16, 12)):
        keep_smaller_norms(monkeypatch, smallest)
        two, three = (_kept_units(model, image, unit) for model in models)
        assert units <= three - two < units + 0.2


@pytest.mark.parametrize("own", [True, False], ids=["vitkernels", "timm"])
def test_a_block_keeps_no_copy_of_a_weight_under_autocast(own: bool) -> None:
    if own:
        model: nn.Module = vk.nn.Block(D, 3, qkv_bias=True)
    else:
        from timm_vit import timm

        model = vk.fuse(timm.models.vision_transformer.Block(D, 3, qkv_bias=True))
    x = torch.randn(2, 5, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), vk.record() as calls:
        kept = kept_by(lambda: model(x))
    assert {call.op for call in calls} == {"add_layer_norm", "linear", "attention_qkv", "mlp"}
    weights = {each.data_ptr() for each in model.parameters()}
    shapes = {each.shape for each in model.parameters() if each.dim() == 2}
    assert {each.shape for each in kept} >= shapes
    assert all(each.data_ptr() in weights for each in kept if each.shape in shapes)


# ----------------------------------------------------------------------------------------------- written into


@pytest.mark.parametrize("smallest", [0, 2**16], ids=["made again", "kept"])
@pytest.mark.parametrize("name", ["total", "x", "weight", "scale", "w1"])
@kinds
def test_what_was_written_into_is_named(kind: str, name: str, smallest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_smaller_norms(monkeypatch, smallest)
    layer = Layer(kind, branch=name != "x", factors=FACTORS)
    total, product = layer.together()
    with torch.no_grad():
        {"total": total, **layer.tensors}[name].mul_(2)
    with pytest.raises(RuntimeError, match=r"^add_layer_norm: its sum, its norm's weight or bias.* clone it first"):
        layer.gradients((total, product), "product")


@kinds
def test_what_is_not_kept_may_be_written_into(kind: str) -> None:
    layer = Layer(kind)
    expected = layer.gradients(layer.together())
    results = layer.together()
    with torch.no_grad():
        layer.tensors["branch"].zero_()
    check_equal(layer.gradients(results), expected)


@pytest.mark.parametrize(("option", "again"), [(True, 2), (False, 0), (None, 2)])
def test_fuse_says_whether_norms_are_made_again(option: bool | None, again: int) -> None:
    """None is what suits the device: on a CPU they are."""
    from timm_vit import timm

    block = vk.fuse(timm.models.vision_transformer.Block(64, 2), recompute_norms=option)
    with vk.record() as calls:
        block(torch.randn(8, 130, 64)).sum().backward()
    assert norms(calls) == 2 + again
