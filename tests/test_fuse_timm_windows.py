"""vk.fuse on timm's blocks with windows, pooled keys or norms behind their branches, each held to its own numbers."""

from __future__ import annotations

import copy
import sys
from typing import Any

import fused
import peers
import pytest
import torch
from timm_blocks import BLOCKS, OWN
from torch import nn
from torch.utils.checkpoint import checkpoint

import vitkernels as vk
from vitkernels import dispatch
from vitkernels.fuse.swap import Fused

AROUND = "0 of 1 blocks fused; 1 of 1 blocks: residual and feed-forward fused, attention its own"


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", BLOCKS)
def test_output_and_every_gradient(name: str, autocast: bool) -> None:
    build, size, keywords, ops = BLOCKS[name]
    torch.manual_seed(0)
    block = build()
    fused.stir(block)
    block.train("network" not in name and "cr" not in name)  # their bias draws a dropout
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):  # its statistics are rounded by themselves, and parity is the rest's
            module.eval()
    inputs = (torch.randn(size, requires_grad=True),)
    explanation = fused.check_parity(
        block, inputs, keywords, ops=ops, autocast=autocast, absolute=4e-3 if autocast else None
    )
    assert explanation.summary == (AROUND if ops == OWN else "1 of 1 blocks fused")
    assert not explanation.fallbacks


@pytest.mark.parametrize("name", ["swin", "swin v2", "sam", "hiera", "mvit v2, wider behind"])
def test_drop_path_draws_as_ever(name: str) -> None:
    build, size, keywords, _ = BLOCKS[name]
    block = build()
    fused.stir(block)
    for place in ("drop_path1", "drop_path2"):
        setattr(block, place, peers.import_timm().layers.DropPath(0.5))
    inputs, runs = (torch.randn(8, *size[1:], requires_grad=True),), []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append((fused.output_and_gradients(block.train(), inputs, keywords), torch.get_rng_state()))
        vk.fuse(block)
    (own, state), (got, after) = runs
    assert torch.equal(state, after)
    fused.check_same(got, own)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_call_that_is_left_to_the_stock_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, size, keywords, _ = BLOCKS[name]
    block, x = build().eval(), torch.randn(size)
    own = block(x, **keywords)
    vk.fuse(block)
    with monkeypatch.context() as patch, vk.use("reference"), vk.record() as calls:
        patch.setattr(Fused, "why_not_own", lambda self: "a test")
        torch.testing.assert_close(block(x, **keywords), own, rtol=0, atol=0)
    assert not calls
    assert {"a test": 1} in vk.explain(block).fallbacks.values()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_hook_on_a_part_sees_what_stock_gives_it(name: str) -> None:
    """Of every part in turn: as often, and tokens laid out as the block's own code has them."""
    build, size, keywords, ops = BLOCKS[name]
    torch.manual_seed(0)
    block, x = build().eval(), torch.randn(size)
    fused.stir(block)

    def seen(part: str) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        hook = block.get_submodule(part).register_forward_hook(
            lambda module, given, result: found.extend(each for each in (*given, result) if torch.is_tensor(each))
        )
        with torch.no_grad(), vk.use(*dispatch.order("cpu")):
            block(x, **keywords)
        hook.remove()
        return found

    parts = [part for part, module in block.named_modules() if part and not isinstance(module, nn.ModuleList)]
    own = {part: seen(part) for part in parts}
    vk.fuse(block)
    with vk.record() as calls:
        got = {part: seen(part) for part in parts}
    assert {call.op for call in calls} & ops or not ops
    for part in parts:
        assert [each.shape for each in got[part]] == [each.shape for each in own[part]], part
        torch.testing.assert_close(got[part], own[part], rtol=1e-3, atol=1e-4)


def test_a_hook_on_the_feed_forward_is_no_affair_of_the_attentions() -> None:
    block = BLOCKS["cait"][0]()
    block.mlp.register_forward_hook(lambda module, args, output: None)
    explanation = vk.explain(vk.fuse(block))
    assert not explanation.around
    assert (
        explanation.summary
        == "0 of 1 blocks fused; block 0: attn is TalkingHeadAttn, its own: heads that talk to each other"
    )


def test_the_report_says_both_counts() -> None:
    model = nn.ModuleList([BLOCKS["cait"][0](), BLOCKS["nest"][0](), BLOCKS["cait"][0]()])
    explanation = vk.explain(vk.fuse(model))
    assert explanation.summary == (
        "1 of 3 blocks fused; 2 of 3 blocks: residual and feed-forward fused, attention its own"
    )
    assert explanation.to_dict()["around"] == explanation.unfused
    with pytest.raises(RuntimeError, match="heads that talk to each other"):
        vk.fuse(vk.unfuse(model), strict=True)


def _ways(name: str) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    build, size, keywords, _ = BLOCKS[name]
    torch.manual_seed(0)
    block = build()
    fused.stir(block)
    return vk.fuse(block), torch.randn(size, requires_grad=True), keywords


COMPILED = [
    "swin",
    "swin v2",
    "sam",
    "hiera, wider",
    "mvit v2, a smaller image",
    "volo, class token",
    "side by side",
]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_and_checkpointed(name: str) -> None:
    block, tokens, keywords = _ways(name)
    own = fused.output_and_gradients(block, (tokens,), keywords)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    checkpointed = Checkpointed(block)
    for other in (compiled, checkpointed):
        with vk.record() as calls:
            got = fused.output_and_gradients(other, (tokens,), keywords)
        assert "add_layer_norm" in {call.op for call in calls if call.direction == "backward"}
        fused.check_same({key.removeprefix("_orig_mod.").removeprefix("block."): got[key] for key in got}, own)


class Checkpointed(nn.Module):
    """A block in a checkpoint."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, **keywords: Any) -> torch.Tensor:
        return checkpoint(self.block, x, use_reentrant=False, **keywords)  # type: ignore[no-any-return]


def swin(**options: Any) -> tuple[nn.Module, torch.Tensor]:
    """A block of Swin's whose windows are shifted, stock; and tokens that windows fill."""
    build, size, _, _ = BLOCKS["swin"]
    torch.manual_seed(0)
    block = build()
    fused.stir(block)
    return block, torch.randn(size, requires_grad=True)


def test_windows_are_laid_out_as_the_attention_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In autocast's dtype, half the bytes: rounded before they are moved, they are what they would be after it."""
    block, tokens = swin()
    module, moved = sys.modules[type(block).__module__], []
    own = module.window_partition
    monkeypatch.setattr(module, "window_partition", lambda x, size: moved.append(x.dtype) or own(x, size))
    vk.fuse(block)
    with torch.autocast("cpu", torch.bfloat16), vk.record() as calls:
        block(tokens[:, :, :-1])  # not whole windows: they are made by the block's own code
    assert moved == [torch.bfloat16]
    assert "attention_qkv" in [call.op for call in calls]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_a_block_of_whole_windows_is_two_nodes(autocast: bool) -> None:
    """Both sub-layers and their norms, and the last addition; beside them stands what makes the bias."""
    block, tokens = swin()
    vk.fuse(block)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), vk.record() as calls:
        found = fused.nodes(block(tokens))
    assert [call.op for call in calls].count("attention_qkv") == 1
    names = [name.removesuffix("Backward") for name in found]
    assert names.count("residual_steps") == 1
    assert not {"linear", "attention_qkv", "mlp"} & set(names)
    assert len(names) < 10


@pytest.mark.parametrize("columns", [8, 7], ids=["whole", "padded"])
def test_windows_of_an_image_of_another_size(columns: int) -> None:
    """Masks of a fixed image serve in turn, whatever windows they meet, or are refused, as the library has it."""
    block, tokens = swin()
    tokens = torch.randn(2, 12, columns, tokens.shape[-1], requires_grad=True)
    for each in (block, BLOCKS["swin, masks by the call"][0]()):
        fused.check_parity(each, (tokens,), ops=BLOCKS["swin"][3])
    stock = copy.deepcopy(block)
    refusals = []
    for each in (vk.unfuse(stock), vk.fuse(block)):
        with pytest.raises(RuntimeError) as refusal:
            each(tokens[:1])
        refusals.append(str(refusal.value).splitlines()[0])
    assert "is invalid for input of size" in refusals[0]
    assert refusals[0] == refusals[1]


def test_a_block_that_moves_its_tokens_otherwise_runs_its_own_code() -> None:
    block, tokens = swin()
    cls = type("Turned", (type(block),), {"_attn": lambda self, x: super(type(self), self)._attn(x.flip(1)).flip(1)})
    block.__class__ = cls
    expected = block(tokens)
    vk.fuse(block)
    torch.testing.assert_close(block(tokens), expected)
    assert "it has a _attn of its own" in str(vk.explain(block))
