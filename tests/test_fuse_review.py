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
    assert vk.explain(twin).summary == "3 of 3 blocks fused"
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

    # twice two blocks as one stream (a slice is a Sequential, fused as the whole one is), then the last one in 4 steps
    check_same(run, vit(), adds=2 * (1 + 3) + 4 * 2)


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

    check_same(run, vit(), adds=2 * 2)


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

    check_same(run, vit(), adds=2 + 1 + 3)  # the block with the hook is called by itself


def test_prompts_written_between_blocks() -> None:
    def run(model: nn.Module) -> list[Tensor]:
        prompts = nn.Parameter(torch.randn(1, 2, 48))
        tokens = torch.randn(2, 5, 48)
        for block in model.blocks:
            tokens = block(tokens).clone()
            tokens[:, 1:3] = prompts
        model.norm(tokens).square().mean().backward()
        return [prompts.grad, *(each.grad for each in model.blocks.parameters())]

    check_same(run, vit(), adds=3 * 2)


PROMPT = torch.linspace(-1, 1, 48)


def _by_index(tokens: Tensor) -> None:
    tokens[:, 1:3] = PROMPT


def _by_data(tokens: Tensor) -> None:
    tokens.data[:, 1:3] = PROMPT


def _by_numpy(tokens: Tensor) -> None:
    tokens.detach().numpy()[:, 1:3] = PROMPT.numpy()


def _by_dlpack(tokens: Tensor) -> None:
    torch.from_dlpack(tokens.detach())[:, 1:3] = PROMPT


def _by_factor(tokens: Tensor) -> None:
    tokens.mul_(0.3)


WRITES: dict[str, Callable[[Tensor], None]] = {
    "index": _by_index,
    "data": _by_data,
    "numpy": _by_numpy,
    "dlpack": _by_dlpack,
    "factor": _by_factor,
}


class Prompted(nn.Module):
    """A model's blocks, with tokens written in place between them."""

    def __init__(self, model: nn.Module, write: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.blocks, self.norm, self.write = model.blocks, model.norm, write

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
            self.write(tokens)
        return self.norm(tokens)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("write", WRITES)
def test_prompts_written_without_a_copy(write: str, grad: bool) -> None:
    def run(model: nn.Module) -> list[Tensor]:
        prompted, tokens = Prompted(model, WRITES[write]), torch.randn(2, 5, 48, requires_grad=True)
        with torch.set_grad_enabled(grad):
            out = prompted(tokens)
        return [out] if not grad else [out, *torch.autograd.grad(out.sin().sum(), [tokens, *prompted.parameters()])]

    check_same(run, vit(), adds=3 * 2)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("write", ["index", "factor"])
def test_prompts_written_in_a_compiled_model(write: str, grad: bool) -> None:
    def run(model: nn.Module) -> list[Tensor]:
        prompted, tokens = Prompted(model, WRITES[write]), torch.randn(2, 5, 48, requires_grad=True)
        with torch.set_grad_enabled(grad):
            out = torch.compile(prompted, fullgraph=True, backend="aot_eager")(tokens)
        return [out] if not grad else [out, *torch.autograd.grad(out.sin().sum(), [tokens, *prompted.parameters()])]

    check_same(run, vit(), adds=3 * 2)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("write", ["index", "factor"])
def test_prompts_written_in_an_exported_model(write: str, strict: bool) -> None:
    prompted, tokens = Prompted(vit().eval(), WRITES[write]), torch.randn(2, 5, 48)
    with torch.no_grad():
        expected = prompted(tokens)
        program = torch.export.export(vk.fuse(prompted), (tokens,), strict=strict)
        with vk.record() as calls:
            got = program.module()(tokens)
    assert [call.op for call in calls].count("add_layer_norm") == 3 * 2
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


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
