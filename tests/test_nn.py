"""The modules in the places where training puts them: compiled, copied, checkpointed, sharded, cast, transformed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import peers
import pytest
import torch
from peers import SIZES
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch_layers import Adds

import vitkernels as vk
from vitkernels import dispatch
from vitkernels.nn import Block, VisionTransformer
from vitkernels.ops.add_layer_norm import op as op_norm

FUSED = {"patch_embed", "add_layer_norm", "linear", "attention_qkv", "mlp"}


def build(**options: Any) -> VisionTransformer:
    model = VisionTransformer(**{**SIZES, **options})
    peers.stir(model)
    return model


@pytest.fixture(autouse=True)
def _backends() -> Iterator[None]:
    """Without the extension the reference stands in, as asked for, without a warning."""
    with vk.use("ext", "reference"):
        yield


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """Differences in units of each tensor's largest number, or of a tenth of the whole model's: the gradient of a bias
    on k is 0 but for rounding."""
    assert got.keys() == expected.keys()
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    for name, tensor in expected.items():
        unit = max(tensor.abs().max().item(), 0.1 * largest)
        assert (got[name] - tensor).abs().max() <= tolerance * unit, name


# ------------------------------------------------------------------------------------------------------------- fusion


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool, torch.dtype]]]:
    """Of every forward launch of add_layer_norm: whether there was no add before the norm, and the norm's dtype."""
    launched = []
    own = op_norm.implementations["ext"]

    def spy(*args: Any) -> Any:
        results = own.forward(*args)
        launched.append((args[1] is None, results[1].dtype))
        return results

    monkeypatch.setitem(op_norm.implementations, "ext", dispatch.Implementation(spy, own.backward, own.why_not))
    dispatch.backends_changed()
    yield launched
    monkeypatch.undo()
    dispatch.backends_changed()


def test_every_residual_add_runs_with_the_norm_after_it(norms: list[tuple[bool, torch.dtype]], images: Tensor) -> None:
    model = build(depth=3)
    with Adds() as adds:
        fused = model(images)
    assert [alone for alone, _ in norms] == [True] + 6 * [False], "only the first norm has no add before it"
    assert adds.count == 0
    norms.clear()
    model.blocks[1].register_forward_hook(lambda *_: None)
    with Adds() as adds:
        torch.testing.assert_close(model(images), fused)
    assert [alone for alone, _ in norms] == [*3 * [True, False], True], "with a hook, every block is called by itself"
    assert adds.count == 3


def test_a_block_by_itself_adds_what_no_norm_follows() -> None:
    block, x = Block(48, 3), torch.randn(2, 5, 48)
    with vk.record() as calls, Adds() as adds:
        got = block(x)
    assert [call.op for call in calls].count("add_layer_norm") == 2
    assert adds.count == 1
    mid = x + block.attn(block.norm1(x))
    torch.testing.assert_close(got, mid + block.mlp(block.norm2(mid)))


def test_features_and_head(images: Tensor) -> None:
    model = build(reg_tokens=2)
    features = model.forward_features(images)
    assert features.shape == (3, 1 + 2 + 16, 48)
    assert torch.equal(model.forward_head(features), model(images))
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 0])


def test_bytes_are_scaled_and_normalised_on_their_way_in() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    model, plain = build(mean=mean, std=std), build()
    plain.load_state_dict(model.state_dict())
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    normalised = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    expected = peers.output_and_gradients(plain, normalised)
    assert_same(peers.output_and_gradients(model, pixels), expected)
    model.patch_embed.proj.register_forward_hook(lambda *_: None)
    assert_same(peers.output_and_gradients(model, pixels), expected)


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("options", [{}, {"init_values": 0.5, "drop_path_rate": 0.4}, {"qk_norm": True}])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_checkpointing_changes_memory_alone(options: dict[str, Any], autocast: bool, images: Tensor) -> None:
    model = build(**options)
    torch.manual_seed(0)
    expected = peers.output_and_gradients(model, images, autocast=autocast)
    model.set_grad_checkpointing()
    torch.manual_seed(0)
    with vk.record() as calls:
        got = peers.output_and_gradients(model, images, autocast=autocast)
    assert_same(got, expected, 0.02 if autocast else 2e-5)
    assert sum(call.op == "mlp" and call.direction == "forward" for call in calls) == 4, "each block ran twice"


def test_autocast_keeps_the_residual_stream_in_float32(images: Tensor) -> None:
    model = build(init_values=0.5, qk_norm=True)
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        features = model.forward_features(images)
        assert model(images).dtype == torch.bfloat16
    assert {features.dtype, *seen} == {torch.float32}


def test_autocast_writes_norms_in_the_dtype_of_the_products(
    norms: list[tuple[bool, torch.dtype]], images: Tensor
) -> None:
    """So that nobody makes a second pass to round them; what is not a plain Linear gets them whole."""
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
        operands = [dtype for _, dtype in norms]
        assert operands == 4 * [torch.bfloat16] + [torch.float32], "the last one is the model's features"
        norms.clear()
        model.blocks[1].attn.qkv.register_forward_hook(lambda *_: None)
        model(images)
        operands = [dtype for _, dtype in norms]
        assert operands == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]


def test_autocast_leaves_float64_alone(images: Tensor) -> None:
    model = build().double()
    expected = peers.output_and_gradients(model, images.double())
    assert_same(peers.output_and_gradients(model, images.double(), autocast=True), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_cast_as_a_whole(dtype: torch.dtype, images: Tensor) -> None:
    model = build(init_values=0.5, qk_norm=True)
    expected = model(images)
    got = peers.output_and_gradients(model.to(dtype), images)
    assert {tensor.dtype for tensor in got.values()} == {dtype}
    assert (got["output"] - expected).abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-4) * expected.abs().max()


def test_drop_path_is_for_training(images: Tensor) -> None:
    model = build(drop_path_rate=0.5)
    whole = build()
    whole.load_state_dict(model.state_dict())
    assert not torch.equal(model(images), model(images))
    state = torch.get_rng_state()
    assert torch.equal(model.eval()(images), whole(images))
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn in evaluation"
    assert not torch.equal(model.train()(images), model(images))


def test_the_same_seed_trains_the_same_model_bitwise(images: Tensor) -> None:
    def train() -> dict[str, Tensor]:
        torch.manual_seed(7)
        model = VisionTransformer(**SIZES, drop_path_rate=0.3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            loss = model(images).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.state_dict()

    first, second = train(), train()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_frozen_parameters_get_no_gradient(images: Tensor) -> None:
    model = build()
    expected = peers.output_and_gradients(model, images)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model.blocks[1].mlp.fc1.weight.requires_grad_(True)
    model(images).mul(torch.linspace(-1, 1, 30).view(3, 10)).sum().backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert_same(got, {name: expected[name] for name in ("blocks.1.mlp.fc1.weight", "head.weight", "head.bias")})


# ------------------------------------------------------------------------------------------------- compiled, exported

COMPILED: dict[str, dict[str, Any]] = {
    "plain": {"depth": 1},
    "all": {"reg_tokens": 2, "init_values": 0.5, "qk_norm": True, "global_pool": "avg", "drop_path_rate": 0.4},
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", COMPILED)
def test_compile_has_no_graph_break(name: str, checkpointing: bool, images: Tensor) -> None:
    model = build(**COMPILED[name])
    model.set_grad_checkpointing(checkpointing)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for autocast in (False, True):
        torch.manual_seed(0)
        expected = peers.output_and_gradients(model, images, autocast=autocast)
        torch.manual_seed(0)
        with vk.record() as calls:
            got = peers.output_and_gradients(compiled, images, autocast=autocast)
        names = {name.removeprefix("_orig_mod."): tensor for name, tensor in got.items()}
        assert_same(names, expected, 0.02 if autocast else 2e-5)
        norms = {"rotary_qkv"} if "qk_norm" in COMPILED[name] else set()
        assert {call.op for call in calls} == FUSED | norms


def test_compile_with_inductor(images: Tensor) -> None:
    model = build(depth=1)
    expected = peers.output_and_gradients(model, images)
    model.compile(fullgraph=True)
    with vk.record() as calls:
        got = peers.output_and_gradients(model, images)
    assert_same(got, expected)
    assert {call.op for call in calls} == FUSED


def test_compile_takes_other_image_sizes() -> None:
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for side in (32, 48, 64):  # from the second on, with sizes that are symbols
        image = torch.randn(2, 3, side, 32)
        expected = peers.output_and_gradients(model, image)
        got = peers.output_and_gradients(compiled, image)
        assert_same({name.removeprefix("_orig_mod."): tensor for name, tensor in got.items()}, expected)


def test_export_keeps_the_fused_ops(images: Tensor) -> None:
    model = build().eval()
    program = torch.export.export(model, (images,))
    ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {f"vitkernels.{name}.default" for name in FUSED} <= ops
    torch.testing.assert_close(program.module()(images), model(images))


# ----------------------------------------------------------------------------------------- copied, transformed, sharded


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole_and_apart(copied: Any, images: Tensor) -> None:
    model = build(init_values=0.5, qk_norm=True, mean=(0.5,) * 3, std=(0.2,) * 3)
    expected = peers.output_and_gradients(model, images)
    twin = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(peers.output_and_gradients(twin, images), expected, 0.0)
    larger = build(img_size=64, init_values=0.5, qk_norm=True).state_dict()
    twin.load_state_dict(larger)  # the copy resizes positions for itself
    assert twin.pos_embed.shape == (1, 17, 48)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_sample_gradients(images: Tensor) -> None:
    model = build()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, parameters, (image.unsqueeze(0),)).square().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    for index, image in enumerate(images):
        gradients = torch.autograd.grad(model(image.unsqueeze(0)).square().sum(), list(model.parameters()))
        assert_same(
            {name: tensor[index] for name, tensor in got.items()},
            {name: tensor for (name, _), tensor in zip(model.named_parameters(), gradients, strict=True)},
        )


def test_fully_sharded(images: Tensor, process_group: None) -> None:
    """Each block is sharded for itself: its weights are there only while it is called as a whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = build()
    expected = peers.output_and_gradients(model, images)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    output = model(images)
    output.mul(torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    got = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    assert_same({"output": output.detach(), **got}, expected)
