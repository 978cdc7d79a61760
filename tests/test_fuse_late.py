"""Blocks whose calls bring tensors (positions, masks): what is read off them is kept, and no call's tensors are."""

from __future__ import annotations

import copy
import gc
import importlib.util
import sys
import weakref
from collections.abc import Callable
from typing import Any

import fused
import peers
import pytest
import torch
from torch import Tensor, nn

import vitkernels as vk
from vitkernels.fuse.swap import PreNormBlock
from vitkernels.residual import late

if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)
peers.import_timm()

from timm.models.beit import Block as BeitBlock  # noqa: E402  # after torchvision's stand-in
from timm.models.eva import EvaBlock  # noqa: E402
from timm.models.vision_transformer import Block  # noqa: E402

D, H, N = 48, 3, 7
WHOLE = {"add_layer_norm", "linear", "attention_qkv", "mlp"}
TURNED = WHOLE | {"rotary_qkv"}


def twins(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A stock block and the same one fused."""
    fused.stir(block)
    return block, vk.fuse(copy.deepcopy(block))


def eva() -> tuple[nn.Module, nn.Module]:
    return twins(EvaBlock(D, H, qkv_bias=True, init_values=0.5))


def rope(tokens: int = N, seed: int = 0) -> Tensor:
    """Of all tokens but the first, [N - 1, 2 * K]."""
    angles = torch.randn(tokens - 1, D // H, generator=torch.Generator().manual_seed(seed))
    return torch.cat([angles.sin(), angles.cos()], -1)


def check(
    stock: nn.Module, ours: nn.Module, ops: set[str], tokens: int = N, autocast: bool = False, **options: Any
) -> None:
    """Both give the same, and the kernels of these ops ran."""
    x = torch.randn(2, tokens, D).requires_grad_()
    expected = fused.output_and_gradients(stock, (x,), options, autocast=autocast)
    got = fused.served(ours, (x,), options, ops=ops, autocast=autocast)
    if not autocast:
        return fused.check_same(got, expected)
    for name, tensor in expected.items():
        assert (got[name] - tensor).norm() <= 3e-2 * tensor.norm() + 1e-2, name
    return None


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options of every time that a block's modules were read."""
    found: list[Any] = []

    def watched(block: nn.Module, kept: Any, read: Callable[..., Any], *rest: Any) -> Any:
        def noted(**options: Any) -> Any:
            found.append(options)
            return read(**options)

        return late.read_for(block, kept, noted, *rest)

    monkeypatch.setattr(sys.modules["vitkernels.fuse.swap"], "read_for", watched)
    return found


def test_positions_are_those_of_the_call(reads: list[Any]) -> None:
    """Read once, for all values and sizes; each call turns by its own."""
    stock, ours = eva()
    for seed, tokens in enumerate((N, N, N, N, N + 4, N)):
        check(stock, ours, TURNED, tokens, rope=rope(tokens, seed))
    assert len(reads) == 1


def test_masks_are_those_of_the_call(reads: list[Any]) -> None:
    stock, ours = twins(Block(D, H, qkv_bias=True, qk_norm=True))
    for seed in range(5):
        mask = torch.randn(N, N, generator=torch.Generator().manual_seed(seed))
        check(stock, ours, TURNED, attn_mask=mask)
    assert len(reads) == 1
    check(stock, ours, TURNED, attn_mask=torch.rand(2, 1, N, N) > 0.3)  # of another kind
    check(stock, ours, TURNED)
    check(stock, ours, TURNED, is_causal=True)
    assert len(reads) == 4


def test_a_mask_that_learns() -> None:
    stock, ours = twins(Block(D, H))
    for seed in range(4):
        mask, x = torch.randn(N, N, generator=torch.Generator().manual_seed(seed)), torch.randn(2, N, D)
        masks = [mask.clone().requires_grad_() for _ in range(2)]
        for each, module in zip(masks, (stock, ours), strict=True):
            module(x, attn_mask=each).square().sum().backward()
        torch.testing.assert_close(masks[1].grad, masks[0].grad)


def test_a_bias_of_parameters_is_made_at_each_call() -> None:
    stock, ours = twins(BeitBlock(D, H, qkv_bias=True, window_size=(2, 3), init_values=0.5))
    for step in range(4):
        for module in (stock, ours):
            with torch.no_grad():
                module.attn.relative_position_bias_table.add_(0.1 * step)  # type: ignore[union-attr,operator]
        check(stock, ours, WHOLE)
    shared = torch.randn(1, H, N, N)
    check(stock, ours, WHOLE, shared_rel_pos_bias=shared)


def test_what_a_call_is_decides_how_it_runs(reads: list[Any]) -> None:
    """Positions that learn are plain torch's; autocast, halves of a dtype and none of it by turns."""
    stock, ours = eva()
    for _ in range(3):
        check(stock, ours, TURNED, rope=rope())
        check(stock, ours, TURNED, autocast=True, rope=rope())
        check(stock, ours, WHOLE)
    learned = WHOLE - {"attention_qkv"} | {"attention"}
    for _ in range(2):
        check(stock, ours, learned, rope=rope().requires_grad_())
    check(stock, ours, TURNED, rope=rope().double())
    assert {each["rope"] is None for each in reads} == {True, False}


def test_a_change_of_the_modules_is_seen() -> None:
    stock, ours = twins(Block(D, H, qk_norm=True))
    options = {"attn_mask": torch.randn(N, N)}
    for _ in range(3):
        check(stock, ours, TURNED, **options)
    for module in (stock, ours):
        module.attn.q_norm.eps = module.attn.k_norm.eps = 0.5  # type: ignore[union-attr]
    check(stock, ours, TURNED, **options)
    for module in (stock, ours):
        module.attn.q_norm.eps = 0.25  # type: ignore[union-attr]  # one op has one eps for both
    check(stock, ours, WHOLE - {"attention_qkv"} | {"attention"}, **options)
    seen: list[Tensor] = []
    ours.attn.k_norm.register_forward_hook(lambda *given: seen.append(given[2]))  # type: ignore[union-attr]
    check(stock, ours, WHOLE - {"attention_qkv"} | {"attention"}, **options)
    assert len(seen) == 1


@pytest.mark.parametrize("block", [eva, lambda: twins(Block(D, H))], ids=["positions", "a mask"])
def test_nothing_of_a_call_is_held(block: Callable[[], tuple[nn.Module, nn.Module]]) -> None:
    _, ours = block()
    assert isinstance(ours, PreNormBlock)
    name = "rope" if isinstance(ours, EvaBlock) else "attn_mask"
    for _ in range(4):
        gc.disable()
        try:
            given = rope() if name == "rope" else torch.randn(N, N)
            given = given * torch.ones((), requires_grad=name != "rope")  # with a graph behind a mask
            died = weakref.ref(given)
            ours(torch.randn(2, N, D), **{name: given}).sum().backward()
            del given
            assert died() is None
        finally:
            gc.enable()
