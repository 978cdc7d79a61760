"""Fused models in the hands of people who train: cached features, prompts between blocks, patched classes."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable

import pytest
import timm_vit
import torch
from timm_vit import timm
from torch import Tensor, nn

import vitkernels as vk

vit = functools.partial(timm_vit.vit, depth=3)


def check_same(run: Callable[[nn.Module], list[Tensor]], model: nn.Module, *, adds: int) -> None:
    """What `run` returns is the same for the stock model and the fused one, which fused so many adds and norms."""
    twin = vk.fuse(copy.deepcopy(model))
    torch.manual_seed(0)
    expected = run(model)
    torch.manual_seed(0)
    with vk.record() as calls:
        got = run(twin)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert sum(call.op == "add_layer_norm" and call.direction == "forward" for call in calls) == adds


# --------------------------------------------------------------------------------------------- tokens that are kept


def test_features_of_a_frozen_trunk_train_a_head_for_epochs() -> None:
    def run(model: nn.Module) -> list[Tensor]:
        model.requires_grad_(False)
        head = nn.Sequential(model.blocks[2], model.norm, model.head).requires_grad_(True)
        optimizer = torch.optim.SGD(head.parameters(), 0.1)
        kept = [model.blocks[:2](torch.randn(2, 5, 48)) for _ in range(2)]
        assert not any(tokens.requires_grad for tokens in kept)
        for _ in range(2):
            for tokens in kept:
                optimizer.zero_grad()
                head(tokens).square().mean().backward()
                optimizer.step()
        return [each.detach() for each in head.parameters()]

    # twice: norm1, and three adds with the norm behind; then for 4 steps: two adds, and the norm where it was not taken
    check_same(run, vit(), adds=2 * (1 + 4) + 4 * 2 + 3)


@pytest.mark.parametrize("change", ["weight", "bias", "another weight"])
def test_a_norm_that_changes_while_tokens_wait(change: str) -> None:
    def run(model: nn.Module) -> list[Tensor]:
        norm = model.blocks[1].norm1
        with torch.no_grad():
            tokens = model.blocks[0](torch.randn(2, 5, 48))
            if change == "another weight":
                norm.weight = nn.Parameter(2 * norm.weight)
            else:
                getattr(norm, change).mul_(2)
            return [model.blocks[1](tokens)]

    check_same(run, vit(), adds=3 + 3)


def test_a_file_of_tokens_holds_tokens_alone() -> None:
    model, file = vk.fuse(vit()).eval(), io.BytesIO()
    with torch.no_grad():
        tokens = model.blocks[0](torch.randn(2, 5, 48))
        torch.save(tokens, file)
        file.seek(0)
        again = torch.load(file, weights_only=True)
        torch.testing.assert_close(model.blocks[1](again), model.blocks[1](tokens), atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------- tokens that are written into


def test_a_hook_that_writes_into_the_tokens_that_a_block_returns() -> None:
    def run(model: nn.Module) -> list[Tensor]:
        handle = model.blocks[0].register_forward_hook(lambda module, inputs, output: output.mul_(0.5))
        loss = model(torch.randn(2, 3, 32, 32)).square().mean()
        handle.remove()
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    check_same(run, vit(), adds=1 + 2 * 3 + 0)


def test_prompts_written_between_blocks() -> None:
    def run(model: nn.Module) -> list[Tensor]:
        prompts = nn.Parameter(torch.randn(1, 2, 48))
        tokens = torch.randn(2, 5, 48)
        for block in model.blocks:
            tokens = block(tokens).clone()
            tokens[:, 1:3] = prompts
        model.norm(tokens).square().mean().backward()
        return [prompts.grad, *(each.grad for each in model.blocks.parameters())]

    check_same(run, vit(), adds=3 * 3)


def test_prompts_written_without_a_copy_say_what_is_needed() -> None:
    model = vk.fuse(vit())
    tokens = model.blocks[0](torch.randn(2, 5, 48))
    tokens[:, 1:3] = 0.0
    loss = model.blocks[1](tokens).square().mean()
    with pytest.raises(RuntimeError, match=r"what a fused block returns.* clone it first"):
        loss.backward()


# -------------------------------------------------------------------------------------------------- patched classes


def test_a_forward_that_somebody_replaced_on_the_class_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = timm.layers.attention.Attention.forward
    doubled = lambda self, x, attn_mask=None, is_causal=False: 2 * stock(self, x)  # noqa: E731
    monkeypatch.setattr(timm.layers.attention.Attention, "forward", doubled)
    model, x = vit(), torch.randn(2, 3, 32, 32)
    expected = model(x)
    torch.testing.assert_close(vk.fuse(model)(x), expected, atol=1e-5, rtol=1e-5)
    assert "block 0: attn is Attention, which is not fused" in vk.explain(model).summary
    with pytest.raises(ValueError, match="somebody replaced the forward of timm"):
        vk.fuse(model.blocks[0].attn)
