"""timm: blocks whose attention is of a kind that no op serves, and NesT's (read from timm 1.0.31).

Swin, MaxViT and CoAtNet, XCiT, CaiT, Twins, GCViT, SAM, ConViT, Hiera: attention runs its own code, with the windows
that its block makes around it; the residual steps, their norms and the feed-forward are fused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.around import own_attention
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.timm import FusedAttention, FusedBlock
from vitkernels.fuse.swap import PreNormBlock, branch_of
from vitkernels.residual import genuine
from vitkernels.residual.stream import Step, Sublayer
from vitkernels.residual.sublayers import linear_step

_BIAS = "a relative bias on its scores"


@dataclass(frozen=True, slots=True)
class Names:
    """What a block calls the factors of its two steps: LayerScale's modules or parameters, and DropPath's."""

    scales: tuple[str, str] | None = None
    drop_paths: tuple[str, str] = ("drop_path1", "drop_path2")


class FusedOwnBlock(PreNormBlock):
    """A pre-norm block called with tokens [B, ..., D] and keywords for its attention, which runs its own code."""

    reads = ("norm1",)
    axes = None
    names: ClassVar[Names] = Names()
    kind: ClassVar[str] = _BIAS

    def own(self, x: Tensor, **options: Any) -> Tensor:
        """From the normed tokens to what is added to the stream, but for its factors."""
        block: Any = self
        return block.attn(x, **options)

    def sublayers(self, **options: Any) -> list[Sublayer]:
        block: Any = self
        names = self.names
        scales = (None, None) if names.scales is None else [getattr(block, name) for name in names.scales]
        one, two = (getattr(block, name) for name in names.drop_paths)
        attention = own_attention("attn", block.attn, lambda x: self.own(x, **options), self.kind)
        return [
            Sublayer("attn", block.norm1, attention, scales[0], one),
            Sublayer("mlp", block.norm2, branch_of("mlp", block.mlp), scales[1], two),
        ]

    def why_not_joined(self) -> str | None:
        return "its attention runs its own code"

    def forward(self, x: Tensor) -> Tensor:
        if self.declines(x):
            return super().forward(x)
        return self.run(x)


class FusedSwinBlock(FusedOwnBlock):
    """SwinTransformerBlock."""

    def own(self, x: Tensor, **options: Any) -> Tensor:
        block: Any = self
        return block._attn(x)


class FusedPartitionBlock(FusedOwnBlock):
    """PartitionAttentionCl."""

    names = Names(("ls1", "ls2"))

    def own(self, x: Tensor, **options: Any) -> Tensor:
        block: Any = self
        return block._partition_attn(x)


class FusedCaitBlock(FusedOwnBlock):
    """LayerScaleBlock of CaiT: its heads talk to each other (Shazeer et al. 2020)."""

    names = Names(("gamma_1", "gamma_2"), ("drop_path", "drop_path"))
    kind = "heads that talk to each other"


class FusedConvitBlock(FusedOwnBlock):
    """ConViT's Block: attention that learns to be a convolution, or plain."""

    names = Names(None, ("drop_path", "drop_path"))
    kind = "it is gated by position, or written out"


class FusedHieraBlock(FusedOwnBlock):
    """HieraBlock that leaves the number of its tokens as it is."""

    names = Names(("ls1", "ls2"))
    kind = "units of a mask"


class FusedXcaBlock(FusedOwnBlock):
    """XCABlock: attention among features (El-Nouby et al. 2021), and a step of convolutions between neighbours."""

    names = Names(("gamma1", "gamma2"))
    kind = "it is among features"

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:  # type: ignore[override]
        if self.declines(x):
            return super(FusedOwnBlock, self).forward(x, H, W)
        return self.run(x, sides=(H, W))

    def sublayers(self, sides: tuple[int, int] = (0, 0)) -> list[Sublayer]:  # type: ignore[override]
        block: Any = self
        attention, feed_forward = super().sublayers()
        local = own_attention(
            "local_mp", block.local_mp, lambda x: block.local_mp(x, *sides), "convolutions between neighbours"
        )
        return [attention, Sublayer("local_mp", block.norm3, local, block.gamma3, block.drop_path3), feed_forward]


class FusedTwinsBlock(FusedOwnBlock):
    """Twins' Block: attention within windows and to a smaller image in turn."""

    kind = "windows, or keys of an image that a convolution makes smaller"

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        if self.declines(x):
            return super(FusedOwnBlock, self).forward(x, size)
        return self.run(x, size=size)

    def own(self, x: Tensor, **options: Any) -> Tensor:
        block: Any = self
        return block.attn(x, options["size"])


class FusedGlobalContextBlock(FusedOwnBlock):
    """GlobalContextVitBlock."""

    names = Names(("ls1", "ls2"))

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        if self.declines(x):
            return super(FusedOwnBlock, self).forward(x, q_global)
        return self.run(x, q_global=q_global)

    def own(self, x: Tensor, **options: Any) -> Tensor:
        block: Any = self
        return block._window_attn(x, options["q_global"])


class FusedSamBlock(FusedOwnBlock):
    """SAM's Block: its factors of the attention are drawn for each window, and stay inside."""

    names = Names(("ls1", "ls2"))

    def own(self, x: Tensor, **options: Any) -> Tensor:
        block: Any = self
        size, sides = block.window_size, x.shape[1:3]
        if size <= 0:
            return self._scaled(block.attn(x))
        functions = sys.modules[genuine.owner(self).__module__]
        windows, padded = functions.window_partition(x, size)
        return functions.window_unpartition(self._scaled(block.attn(windows)), size, sides, padded)

    def _scaled(self, x: Tensor) -> Tensor:
        block: Any = self
        return block.drop_path1(block.ls1(x))

    def sublayers(self, **options: Any) -> list[Sublayer]:
        attention, feed_forward = super().sublayers(**options)
        attention.scale = attention.drop_path = None
        return [attention, feed_forward]


# ------------------------------------------------------------------------------------------- attention that is served


class FusedNestAttention(FusedAttention):
    """NesT's Attention: of the tokens of each block of an image, [B, T, N, D], and heads that lie within features."""

    axes = 4

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if self.declines(x, self.why_not_now):
            return super(FusedAttention, self).forward(x)
        return self.run(x)

    def is_plain(self) -> bool:
        return True

    def attend(self, qkv: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        attn: Any = self
        out = ops.attention_qkv(qkv.flatten(0, 1), attn.num_heads).unflatten(0, qkv.shape[:2])
        return out.unflatten(-1, (attn.num_heads, -1)).transpose(-1, -2).flatten(-2)

    def step(self, **options: Any) -> Step:
        return linear_step(self.packed, lambda qkv, bias_apart: self.output(None, self.attend(qkv), bias_apart))


class FusedNestBlock(FusedBlock):
    """NesT's TransformerLayer."""

    axes = 4
    passes: ClassVar[dict[str, Any]] = {}

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if self.declines(x):
            return super(FusedBlock, self).forward(x)
        return self.run(x)

    def sublayers(self, **options: Any) -> list[Sublayer]:
        block: Any = self
        return [
            Sublayer("attn", block.norm1, branch_of("attn", block.attn), None, block.drop_path1),
            Sublayer("mlp", block.norm2, branch_of("mlp", block.mlp), None, block.drop_path2),
        ]

    def why_not_joined(self) -> str | None:
        return "its tokens have four axes"


_STEPS = ("norm1", "attn", "norm2", "mlp")


def _rule(
    mixin: type[FusedOwnBlock],
    owner: str,
    arguments: tuple[str, ...] = ("x",),
    children: tuple[str, ...] = (),
    why_not: Callable[[Any], str | None] = lambda block: None,
    optional: tuple[str, ...] = (),
) -> Rule:
    names = mixin.names
    scales = names.scales or ()

    def contract(block: nn.Module) -> str | None:
        modules = {name for name in scales if name in block._modules}
        own = {*_STEPS, *names.drop_paths, *children, *modules}
        return differs(block, arguments, own, optional, {*scales, "gamma3"} - modules) or why_not(block)

    return Rule(mixin, frozenset({f"timm.models.{owner}"}), contract)


def _why_not_same_tokens(block: Any) -> str | None:
    return "it takes the largest of several tokens" if block.do_expand else None


RULES = (
    _rule(FusedSwinBlock, "swin_transformer.SwinTransformerBlock"),
    _rule(FusedPartitionBlock, "maxxvit.PartitionAttentionCl"),
    _rule(FusedCaitBlock, "cait.LayerScaleBlock"),
    _rule(FusedConvitBlock, "convit.Block"),
    _rule(FusedHieraBlock, "hiera.HieraBlock", why_not=_why_not_same_tokens, optional=("proj",)),
    _rule(FusedXcaBlock, "xcit.XCABlock", ("x", "H", "W"), ("norm3", "local_mp", "drop_path3")),
    _rule(FusedTwinsBlock, "twins.Block", ("x", "size")),
    _rule(FusedGlobalContextBlock, "gcvit.GlobalContextVitBlock", ("x", "q_global")),
    _rule(FusedSamBlock, "vision_transformer_sam.Block"),
    Rule(
        FusedNestAttention,
        frozenset({"timm.models.nest.Attention"}),
        lambda attn: differs(attn, ("x",), ("qkv", "attn_drop", "proj", "proj_drop")),
    ),
    Rule(
        FusedNestBlock,
        frozenset({"timm.models.nest.TransformerLayer"}),
        lambda block: differs(block, ("x",), (*_STEPS, "drop_path1", "drop_path2")),
    ),
)
