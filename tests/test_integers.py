"""What is an integer: everything with `__index__`, numpy's and a tensor of one; no bool and no float."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
import torch
from torch import nn
from train_setup import make_images, silent, tiny

import vitkernels as vk
from vitkernels.train import TrainConfig, load_model, train


class Index:
    """An integer of somebody's own."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


KINDS: dict[str, Callable[[int], Any]] = {
    "int64": np.int64,
    "uint8": np.uint8,
    "an array of one": np.array,
    "a tensor of one": torch.tensor,
    "a class": Index,
}
NOT: dict[str, Callable[[int], Any]] = {
    "float": float,
    "float64": np.float64,
    "bool": bool,
    "numpy's bool": np.bool_,
    "a tensor of a float": lambda value: torch.tensor(float(value)),
    "a tensor of a bool": lambda value: torch.tensor(bool(value)),
    "a tensor of two": lambda value: torch.tensor([value, value]),
    "a tensor without values": lambda value: torch.tensor(value, device="meta"),
    "text": str,
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Callable[[int], Any]:
    return KINDS[request.param]


@pytest.fixture(params=NOT)
def wrong(request: pytest.FixtureRequest) -> Callable[[int], Any]:
    return NOT[request.param]


def _numbers(module: nn.Module) -> list[Any]:
    """Every number that a module and its children keep."""
    values = [value for each in module.modules() for name, value in vars(each).items() if not name.startswith("_")]
    flat = [each for value in values for each in (value if isinstance(value, tuple | list) else (value,))]
    return [each for each in flat if hasattr(each, "__index__") and not isinstance(each, bool)]


SIZES = ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads")
MODULES: dict[str, tuple[type[nn.Module], dict[str, int], tuple[int, ...]]] = {
    "VisionTransformer": (
        vk.nn.VisionTransformer,
        {**{name: peers.SIZES.get(name, 3) for name in SIZES}, "reg_tokens": 2},
        (2, 3, 32, 32),
    ),
    "NaiveVisionTransformer": (
        vk.nn.NaiveVisionTransformer,
        {name: peers.SIZES.get(name, 3) for name in SIZES},
        (2, 3, 32, 32),
    ),
    "PatchEmbed": (
        vk.nn.PatchEmbed,
        {"img_size": 32, "patch_size": 8, "in_chans": 3, "embed_dim": 48},
        (2, 3, 32, 32),
    ),
    "Attention": (vk.nn.Attention, {"dim": 48, "num_heads": 3}, (2, 5, 48)),
    "Mlp": (vk.nn.Mlp, {"in_features": 48, "hidden_features": 96, "out_features": 24}, (2, 5, 48)),
    "LayerScale": (vk.nn.LayerScale, {"dim": 48}, (2, 5, 48)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_keep_ints(name: str, kind: Callable[[int], Any]) -> None:
    build, sizes, shape = MODULES[name]
    model, like = build(**{key: kind(value) for key, value in sizes.items()}), build(**sizes)
    model.load_state_dict(like.state_dict())
    assert repr(model) == repr(like)
    assert {type(each) for each in _numbers(model)} <= {int}
    x = torch.randn(shape)
    with vk.record() as calls:
        y = model(x)
    assert torch.equal(y, like(x))
    assert bool(calls) == (name not in ("LayerScale", "NaiveVisionTransformer"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)


@pytest.mark.parametrize("name", MODULES)
def test_modules_refuse_others(name: str, wrong: Callable[[int], Any]) -> None:
    build, sizes, _ = MODULES[name]
    for key in sizes:
        with pytest.raises(ValueError, match=rf"^\w+: argument '{key}' is .*; needs an int of [01] or more"):
            build(**{**sizes, key: wrong(1)})


def test_a_block_of_numpys_integers() -> None:
    block = vk.nn.Block(np.int64(48), np.int64(3), init_values=0.1)
    x = torch.randn(2, 5, 48)
    with vk.record() as calls:
        y = block(x)
    assert {call.op for call in calls} == {"add_layer_norm", "attention_qkv", "linear", "mlp"}
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), y)


def test_ops(backend: str, kind: Callable[[int], Any]) -> None:
    qkv, x, angles = torch.randn(2, 5, 72), torch.randn(2, 3, 5, 8), torch.randn(3, 8)
    with vk.use(backend), vk.record() as calls:
        assert torch.equal(vk.ops.attention_qkv(qkv, kind(3)), vk.ops.attention_qkv(qkv, 3))
        assert torch.equal(
            vk.ops.rotary(x, angles.sin(), angles.cos(), prefix=kind(2)),
            vk.ops.rotary(x, angles.sin(), angles.cos(), prefix=2),
        )
    assert [(call.op, call.backend) for call in calls] == [
        (op, backend) for op in ("attention_qkv", "rotary") for _ in range(2)
    ]


def test_ops_refuse_others(wrong: Callable[[int], Any]) -> None:
    qkv, x, angles = torch.randn(2, 5, 72), torch.randn(2, 3, 5, 8), torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"^attention_qkv: argument 'num_heads' is .*; needs an int of 1 or more"):
        vk.ops.attention_qkv(qkv, wrong(1))
    with pytest.raises(ValueError, match=r"^rotary: argument 'prefix' is .*; needs an int from 0 to x's 5 tokens"):
        vk.ops.rotary(x, angles.sin(), angles.cos(), prefix=wrong(1))


def test_a_tensor_is_asked_for_its_value_at_every_call() -> None:
    """Checks remember calls by their tensors' shapes."""
    qkv, heads = torch.randn(2, 5, 72), torch.tensor(3)
    expected = [vk.ops.attention_qkv(qkv, number) for number in (3, 4)]
    assert torch.equal(vk.ops.attention_qkv(qkv, heads), expected[0])
    assert torch.equal(vk.ops.attention_qkv(qkv, heads + 1), expected[1])
    with pytest.raises(ValueError, match="needs a multiple of 3"):
        vk.ops.attention_qkv(qkv, heads + 2)


@pytest.mark.parametrize("value", [np.int64(3), torch.tensor(3)], ids=["int64", "a tensor of one"])
def test_an_op_that_is_compiled(value: Any) -> None:
    """Its value is not in the graph: the graph breaks, and the op runs."""
    qkv = torch.randn(2, 5, 72)
    compiled = torch.compile(lambda qkv, heads: vk.ops.attention_qkv(qkv * 2, heads), backend="aot_eager")
    torch.testing.assert_close(compiled(qkv, value), vk.ops.attention_qkv(qkv * 2, 3))


def test_grids_of_positions(kind: Callable[[int], Any]) -> None:
    table = torch.randn(1, 14, 8)
    expected = vk.nn.resize_pos_embed(table, (3, 4), (5, 7), 2)
    found = vk.nn.resize_pos_embed(table, (kind(3), kind(4)), (kind(5), kind(7)), kind(2))
    assert torch.equal(found, expected)
    assert vk.nn.resize_pos_embed(table, (kind(3), kind(4)), (3, 4), 2) is table


def test_settings_of_a_run(kind: Callable[[int], Any]) -> None:
    config = TrainConfig(
        data="images", batch_size=kind(4), epochs=kind(12), warmup_epochs=kind(1), model_args={"depth": kind(2)}
    )
    plain = TrainConfig(data="images", batch_size=4, epochs=12, warmup_epochs=1, model_args={"depth": 2})
    assert json.dumps(dataclasses.asdict(config)) == json.dumps(dataclasses.asdict(plain))


@pytest.mark.parametrize("wrong", [2.0, np.float64(2), True, np.True_, torch.tensor(2.0), torch.tensor(True), "2"])
def test_settings_refuse_others(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^train: argument 'batch_size' got .*; needs int"):
        TrainConfig(data="images", batch_size=wrong)


def test_a_run_with_numpys_integers(tmp_path: Path) -> None:
    folder, two = make_images(tmp_path / "images", each=3), np.int64(2)
    arguments = {"patch_size": np.int64(8), "embed_dim": np.int64(16), "depth": two, "num_heads": two}
    train(tiny(folder, tmp_path / "run", epochs=two, batch_size=two, model_args=arguments), silent())
    model, _ = load_model(tmp_path / "run")
    assert model.model.blocks[0].attn.num_heads == 2


def test_a_fused_module_of_numpys_integers() -> None:
    timm = peers.import_timm()
    model = timm.models.VisionTransformer(**{**peers.SIZES, "num_heads": np.int64(3)})
    peers.stir(model)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    vk.fuse(model, strict=True)
    with vk.record() as calls:
        torch.testing.assert_close(model(x), expected)
    assert "attention_qkv" in {call.op for call in calls}
