"""What add_layer_norm returns is not kept for backward passes: it is made again, and nothing else changes."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import skip_without
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import vitkernels as vk
from vitkernels.ops import _recompute

B, N, D, F = 2, 5, 24, 40
FACTORS = ("branch_bias", "scale", "row_scale")


class Layer:
    """x + branch, its norm, and a product behind it: `linear`, `mlp`, or both on the same norm."""

    def __init__(self, product: str = "linear", dtype: torch.dtype = torch.float32, bias: bool = True) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

        generator = torch.Generator().manual_seed(1)
        self.product = product
        self.x, self.branch = draw(B, N, D), draw(B, N, D)
        self.weight, self.bias = draw(D), draw(D) if bias else None
        self.w, self.b, self.w1, self.w2 = draw(F, D), draw(F), draw(F, D), draw(D, F)
        self.factors = {"branch_bias": draw(D), "scale": draw(D), "row_scale": draw(B)}

    @property
    def tensors(self) -> list[Tensor]:
        """All that can have a gradient."""
        own = [each for each in vars(self).values() if isinstance(each, Tensor)]
        return [each for each in (*own, *self.factors.values()) if each.requires_grad]

    def norm(self, *factors: str, **options: Any) -> tuple[Tensor, Tensor]:
        given = {name: self.factors[name] for name in factors}
        return vk.ops.add_layer_norm(self.x, self.branch, self.weight, self.bias, **given, **options)

    def after(self, normed: Tensor) -> Tensor:
        y = torch.zeros(())
        if self.product != "mlp":
            y = y + vk.ops.linear(normed, self.w, self.b).float().square().mean()
        if self.product != "linear":
            y = y + vk.ops.mlp(normed, self.w1, None, self.w2, None).float().square().mean()
        return y

    def loss(self, *factors: str, **options: Any) -> Tensor:
        total, normed = self.norm(*factors, **options)
        return self.after(normed) + total.float().mean()

    def gradients(self, loss: Tensor, **options: Any) -> list[Tensor | None]:
        return list(torch.autograd.grad(loss, self.tensors, allow_unused=True, **options))


@pytest.fixture
def keep(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after which nothing is made again."""
    return lambda: monkeypatch.setattr(_recompute, "write", lambda *args: None)


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recompute, "_SMALL", 0)


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    """What is freed here is freed because nothing holds it."""
    gc.disable()
    yield
    gc.enable()


def forwards(calls: list[vk.dispatch.Call]) -> int:
    return sum((call.op, call.direction) == ("add_layer_norm", "forward") for call in calls)


def same(got: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    return all(
        (one is None and other is None) or torch.equal(one, other)  # type: ignore[arg-type]
        for one, other in zip(got, expected, strict=True)
    )


# ---------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("factors", [(), FACTORS], ids=["plain", "factors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("product", ["linear", "mlp", "both"])
def test_gradients_have_the_same_bits(
    backend: str, product: str, dtype: torch.dtype, factors: tuple[str, ...], keep: Callable[[], None]
) -> None:
    layer = Layer(product, dtype, bias=not factors)
    with vk.use(backend):
        with vk.record() as calls:
            got = layer.gradients(layer.loss(*factors))
        keep()
        with vk.record() as kept:
            expected = layer.gradients(layer.loss(*factors))
    assert forwards(calls) == 1 + (2 if product == "both" else 1)
    assert forwards(kept) == 1
    assert same(got, expected)


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("product", ["linear", "mlp"])
def test_autocast_casts_what_is_made_again(
    backend: str, product: str, out_dtype: torch.dtype | None, keep: Callable[[], None]
) -> None:
    layer = Layer(product)

    def gradients() -> list[Tensor | None]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer.loss(out_dtype=out_dtype)
        return layer.gradients(loss)

    with vk.use(backend):
        with vk.record() as calls:
            got = gradients()
        keep()
        expected = gradients()
    assert forwards(calls) == 2
    assert same(got, expected)


def test_a_plain_norm_of_strided_rows(backend: str, keep: Callable[[], None]) -> None:
    layer = Layer("both")

    def gradients() -> list[Tensor | None]:
        _, normed = vk.ops.add_layer_norm(layer.x[:, ::2], None, layer.weight, layer.bias)
        return layer.gradients(layer.after(normed))

    with vk.use(backend):
        with vk.record() as calls:
            got = gradients()
        keep()
        assert same(got, gradients())
    assert forwards(calls) == 3


def test_a_small_result_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer()
    for smallest, again in ((B * N * D, 1), (B * N * D + 1, 0)):
        monkeypatch.setattr(_recompute, "_SMALL", smallest)
        with vk.record() as calls:
            layer.gradients(layer.loss())
        assert forwards(calls) == 1 + again


def test_the_opaque_op_makes_it_again_too(keep: Callable[[], None]) -> None:
    """A profiler sends calls through torch's dispatcher."""
    layer = Layer("both")
    with vk.record() as calls, torch.profiler.profile():
        got = layer.gradients(layer.loss())
    keep()
    assert forwards(calls) == 3
    assert same(got, layer.gradients(layer.loss()))


def test_twice_through_a_graph_that_is_kept() -> None:
    layer = Layer("both")
    loss = layer.loss()
    with vk.record() as calls:
        once = layer.gradients(loss, retain_graph=True)
        again = layer.gradients(loss)
    assert forwards(calls) == 4
    assert same(once, again)


def test_a_scope_of_backends_holds_for_what_is_made_again() -> None:
    skip_without("ext")
    layer = Layer("both")
    with vk.dispatch.scope(("reference",)):
        loss = layer.loss()
    with vk.record() as calls:
        layer.gradients(loss)
    assert {call.backend for call in calls} == {"reference"}


# ------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("product", ["linear", "mlp", "both"])
def test_the_norm_is_freed_and_everything_after_the_graph(product: str, autocast: bool) -> None:
    layer = Layer(product)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, normed = layer.norm()
        held = StorageWeakRef(normed.untyped_storage())
        loss = layer.after(normed)
    assert not held.expired()
    del normed
    assert held.expired(), "the product keeps its input"
    kept = StorageWeakRef(total.untyped_storage())
    del total
    assert not kept.expired()
    del loss
    assert kept.expired(), "the sum outlives its graph"


def _kept_units(model: torch.nn.Module, image: Tensor, unit: int) -> float:
    """What a step keeps for its backward pass, weights aside, in units of so many bytes."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(image)
    return sum(each.nbytes() for address, each in storages.items() if address not in weights) / unit


@pytest.mark.parametrize("own", [True, False], ids=["vitkernels", "timm"])
def test_a_block_keeps_ten_tensors_of_its_tokens(own: bool, keep: Callable[[], None]) -> None:
    """Two sums, qkv (3), the attention's result (1) and the pre-activation (4); statistics beside them are small."""
    sizes = {"img_size": 32, "patch_size": 8, "num_classes": 10, "embed_dim": 96, "num_heads": 3}
    if not own:
        from timm_vit import timm

        models = [vk.fuse(timm.models.VisionTransformer(**sizes, depth=depth)) for depth in (2, 3)]
    else:
        models = [vk.nn.VisionTransformer(**sizes, depth=depth) for depth in (2, 3)]
    image, unit = torch.randn(2, 3, 32, 32), 2 * 17 * 96 * 4
    two, three = (_kept_units(model, image, unit) for model in models)
    assert 10 <= three - two < 10.1
    keep()
    two, three = (_kept_units(model, image, unit) for model in models)
    assert 12 <= three - two < 12.1


# ----------------------------------------------------------------------------------------------- written into


def test_a_sum_that_is_written_into_is_named() -> None:
    layer = Layer()
    total, normed = layer.norm()
    loss = layer.after(normed)
    with torch.no_grad():
        total.mul_(2)
    with pytest.raises(RuntimeError, match=r"what a fused block returns.* clone it first"):
        torch.autograd.grad(loss, [layer.w])  # the product itself notices


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_an_optimizer_that_moves_the_norm_before_the_backward_pass(name: str) -> None:
    layer = Layer("mlp")
    loss = layer.loss()
    with torch.no_grad():
        getattr(layer, name).add_(1)
    with pytest.raises(RuntimeError, match="its norm's weight or bias"):
        torch.autograd.grad(loss, [layer.w1])


@pytest.mark.parametrize("which", ["normed", "total", "weight", "bias"])
def test_what_changed_before_the_product_is_not_made_again(which: str) -> None:
    """The gradient of the product's weight is that of the numbers which it multiplied."""
    layer = Layer()
    layer.weight.requires_grad_(False)
    total, normed = layer.norm()
    multiplied = normed.detach().clone()
    with torch.no_grad():
        {"normed": normed, "total": total, "weight": layer.weight, "bias": layer.bias}[which].mul_(2)
        if which == "normed":
            multiplied *= 2
    with vk.record() as calls:
        (got,) = torch.autograd.grad(layer.after(normed), [layer.w])
    (expected,) = torch.autograd.grad(layer.after(multiplied), [layer.w])
    assert forwards(calls) == 0
    assert torch.equal(got, expected)


def test_a_norm_may_be_written_into_after_the_product() -> None:
    layer = Layer()
    _, normed = layer.norm()
    loss = layer.after(normed)
    with torch.no_grad():
        normed.zero_()
    assert same(layer.gradients(loss), layer.gradients(layer.after(layer.norm()[1])))


# -------------------------------------------------------------------------------------- where nothing is made again


def test_frozen_weights_need_no_input() -> None:
    layer = Layer("both")
    layer.w.requires_grad_(False)
    layer.w1.requires_grad_(False)
    with vk.record() as calls:
        layer.gradients(layer.loss())
    assert forwards(calls) == 1


def test_a_frozen_trunk_keeps_its_result_alone() -> None:
    """No graph keeps the sum: the norm's result is what is least."""
    layer = Layer()
    frozen = [each.requires_grad_(False) for each in (layer.x, layer.branch, layer.weight, layer.bias)]
    total, normed = layer.norm()
    held = StorageWeakRef(total.untyped_storage())
    loss = layer.after(normed)
    del total, normed
    assert held.expired()
    with vk.record() as calls:
        layer.gradients(loss)
    assert len(frozen) == 4
    assert forwards(calls) == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_writes_no_recipe(mode: Callable[[], Any]) -> None:
    with mode():
        _, normed = Layer().norm()
    assert not vars(normed)


def test_functional_gradients() -> None:
    layer = Layer("both")
    _, outside = layer.norm()

    def loss(weight: Tensor, w: Tensor) -> Tensor:
        _, inside = vk.ops.add_layer_norm(layer.x, layer.branch, weight, layer.bias)
        return (vk.ops.linear(inside, w) + vk.ops.linear(outside, w)).square().mean()

    weight, w = layer.weight.detach().clone(), layer.w.detach().clone()
    with vk.record() as calls:
        got = torch.func.grad(loss, argnums=(0, 1))(weight, w)
    assert forwards(calls) == 1
    expected = torch.autograd.grad(loss(weight.requires_grad_(), w.requires_grad_()), [weight, w])
    torch.testing.assert_close(got, expected)


def test_tensor_subclasses_keep_their_input() -> None:
    class Named(Tensor):
        pass

    layer = Layer()
    _, normed = vk.ops.add_layer_norm(layer.x.as_subclass(Named), None, layer.weight, layer.bias)
    with vk.record() as calls:
        layer.after(normed).backward()
    assert forwards(calls) == 0


# ----------------------------------------------------------------------------------------------- other people's code


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("region", ["all", "behind the norm", "nested"])
def test_checkpoints(region: str, reentrant: bool) -> None:
    layer = Layer("both")
    expected = layer.gradients(layer.after(layer.norm()[1]))

    def again(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return checkpoint(function, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    def whole(x: Tensor) -> Tensor:
        _, normed = vk.ops.add_layer_norm(x, layer.branch, layer.weight, layer.bias)
        return again(layer.after, normed) if region == "nested" else layer.after(normed)

    loss = again(layer.after, layer.norm()[1]) if region == "behind the norm" else again(whole, layer.x)
    tensors = layer.tensors
    loss.backward()
    got = [each.grad for each in tensors]
    for each in tensors:
        each.grad = None
    assert same(got, expected)


def test_saved_tensors_that_wait_elsewhere(keep: Callable[[], None]) -> None:
    layer = Layer("both")
    with torch.autograd.graph.save_on_cpu(), vk.record() as calls:
        loss = layer.loss()
        got = layer.gradients(loss)
    assert forwards(calls) == 3
    keep()
    assert same(got, layer.gradients(layer.loss()))


def test_a_norm_that_leaves_its_hooks_is_kept() -> None:
    """Who packs what is saved, and who compares it, sees the tensors that the product was given."""
    layer = Layer()
    packed: list[Tensor] = []
    _, normed = layer.norm()
    with torch.autograd.graph.saved_tensors_hooks(lambda each: packed.append(each) or each, lambda each: each):
        layer.after(normed)
    assert any(each is normed for each in packed)


def test_a_file_of_tokens_holds_tokens_alone() -> None:
    _, normed = Layer().norm()
    file = io.BytesIO()
    torch.save(normed, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert torch.equal(again, normed)
    assert torch.equal(vk.ops.linear(again, torch.eye(D)), vk.ops.linear(normed.detach(), torch.eye(D)))
