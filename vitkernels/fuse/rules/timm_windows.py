"""timm: blocks that lay their tokens out anew around their attention, or have one of a kind that no op serves.

Swin, MaxViT, Twins, PVT v2, GCViT, NesT: the attention runs fused by itself (`timm_window_attention`). XCiT, CaiT, SAM,
ConViT: it runs its own code; the residual steps, their norms and the feed-forward are fused. Read from timm 1.0.31.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.around import attention_within, own_attention
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.timm import FusedAttention, FusedBlock
from vitkernels.fuse.rules.timm_window_attention import FusedSwinAttention
from vitkernels.fuse.swap import Fused, PreNormBlock, branch_of, why_not_mask
from vitkernels.ops._windows import Windows
from vitkernels.residual import genuine, parts
from vitkernels.residual.stream import Branch, Part, Step, Sublayer, rows_behind
from vitkernels.residual.sublayers import dropped, joined, linear_step, why_not_linears

_BIAS = "a relative bias on its scores"


@dataclass(frozen=True, slots=True)
class Names:
    """What a block calls the factors of its two steps: LayerScale's modules or parameters, and DropPath's."""

    scales: tuple[str, str] | None = None
    drop_paths: tuple[str, str] = ("drop_path1", "drop_path2")


class FusedOwnBlock(PreNormBlock):
    """A pre-norm block called with tokens [B, ..., D] and keywords for its attention, which runs its own code."""

    reads: ClassVar[tuple[str, ...]] = ("norm1",)
    axes: ClassVar[int | None] = None
    names: ClassVar[Names] = Names()
    kind: ClassVar[str] = _BIAS
    attention: ClassVar[str] = "attn"  # what the block calls it

    def own(self, x: Tensor, **options: Any) -> Tensor:
        """From the normed tokens to what is added to the stream, but for its factors."""
        return getattr(self, self.attention)(x, **options)

    def sublayers(self, **options: Any) -> list[Sublayer]:
        block: Any = self
        names = self.names
        scales = (None, None) if names.scales is None else [getattr(block, name) for name in names.scales]
        one, two = (getattr(block, name) for name in names.drop_paths)
        attn = getattr(self, self.attention)
        attention = attention_within(self.attention, attn, lambda x: self.own(x, **options), self.kind)
        return [
            Sublayer(self.attention, block.norm1, attention, scales[0], one),
            Sublayer("mlp", block.norm2, branch_of("mlp", block.mlp), scales[1], two),
        ]

    def why_not_joined(self) -> str | None:
        return "its attention runs its own code"

    def forward(self, x: Tensor) -> Tensor:
        if self.declines(x):
            return super().forward(x)
        return self.run(x)


class FusedRowsBlock(FusedOwnBlock):
    """A block of an image, [B, H, W, D], whose feed-forward has tokens row by row."""

    def steps(self, x: Tensor, sublayers: Sequence[Sublayer]) -> Tensor:
        return rows_behind(x, sublayers, super().steps, self._vitkernels.recompute_norms)


class FusedSwinBlock(FusedRowsBlock):
    """SwinTransformerBlock: windows of its image are made and undone within the step, where they are whole."""

    follows = ("_attn",)

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        if self.declines(x):
            return super(FusedOwnBlock, self).forward(x)
        sides = (0, 0) if x.dim() != 4 or why_not_mask(block.attn_mask, x) else x.shape[1:3]
        return self.run(x, height=sides[0], width=sides[1])

    def own(self, x: Tensor, **options: Any) -> Tensor:
        block: Any = self
        return block._attn(x)

    def sublayers(self, height: int = 0, width: int = 0) -> list[Sublayer]:  # type: ignore[override]
        block: Any = self
        steps = super().sublayers()
        attn = block.attn
        if isinstance(attn, FusedSwinAttention) and parts.why_not_part("attn", attn) is None and not block.dynamic_mask:
            windows = Windows((height, width), tuple(block.window_size), tuple(block.shift_size))
            steps[0].branch.step = attn.step_within(windows, block.attn_mask)
        return steps


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


class FusedCoatBlock(FusedOwnBlock):
    """CoaT's SerialBlock (Xu et al. 2021): a convolution of neighbours is added in front."""

    reads = ()
    names = Names(None, ("drop_path", "drop_path"))
    kind = "it is factorised, with positions by convolution"
    attention = "factoratt_crpe"

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        block: Any = self
        if self.declines(x):
            return super(FusedOwnBlock, self).forward(x, size)
        return self.run(block.cpe(x, size), size=tuple(size))


class FusedConvitBlock(FusedOwnBlock):
    """ConViT's Block: attention that learns to be a convolution, or plain."""

    names = Names(None, ("drop_path", "drop_path"))
    kind = "it is gated by position, or written out"


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


class FusedConvMlp(Fused):
    """PVT v2's MlpWithDepthwiseConv: between its products, a convolution of each feature between neighbours."""

    reads = ("fc1",)
    loses_small = -1

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        if self.declines(x):
            return super().forward(x, feat_size)
        with self.backend():
            return self.branch(feat_size=feat_size).run(x, False)[0]

    def branch(self, feat_size: Sequence[int] = (), **options: Any) -> Branch:
        mlp: Any = self

        def finish(hidden: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            image = mlp.dwconv(mlp.relu(hidden.transpose(1, 2).unflatten(2, tuple(feat_size))))
            return parts.last_linear(mlp.fc2, mlp.drop(mlp.act(image.flatten(2).transpose(1, 2))), bias_apart)

        why_not = why_not_linears(fc1=mlp.fc1, fc2=mlp.fc2)
        branch = Branch(
            lambda x, bias_apart: finish(parts.linear(mlp.fc1, x), bias_apart),
            "linear, convolution of torch, linear",
            mlp.fc1,
            why_not,
            step=linear_step(lambda: joined(mlp.fc1), finish) if why_not is None else None,
        )
        return dropped(branch, mlp.drop)

    def parts(self) -> list[Part]:
        return [self.branch().part("")]


class FusedPvtBlock(FusedOwnBlock):
    """PVT v2's Block."""

    loses_small = -1
    kind = "keys of an image that a convolution makes smaller"

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:  # type: ignore[override]
        if self.declines(x):
            return super(FusedOwnBlock, self).forward(x, feat_size)
        return self.run(x, feat_size=tuple(feat_size))

    def sublayers(self, feat_size: tuple[int, ...] = ()) -> list[Sublayer]:  # type: ignore[override]
        block: Any = self
        attention, feed_forward = super().sublayers(feat_size=feat_size)
        feed_forward.branch = branch_of("mlp", block.mlp, lambda x: block.mlp(x, feat_size), feat_size=feat_size)
        return [attention, feed_forward]


class FusedVoloBlock(FusedOwnBlock):
    """VOLO's Transformer: attention of all tokens of an image."""


class FusedOutlooker(FusedOwnBlock):
    """VOLO's Outlooker (Yuan et al. 2021)."""

    kind = "its weights come from one token each"


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


class FusedSamBlock(FusedRowsBlock):
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

    def attend(self, qkv: Tensor, **options: Any) -> Tensor:
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
) -> Rule:
    names = mixin.names
    scales = names.scales or ()

    def contract(block: nn.Module) -> str | None:
        modules = {name for name in scales if name in block._modules}
        own = {*(set(_STEPS) - {"attn"}), mixin.attention, *names.drop_paths, *children, *modules}
        return differs(block, arguments, own, (), {*scales, "gamma3"} - modules)

    return Rule(mixin, frozenset({f"timm.models.{owner}"}), contract)


RULES = (
    _rule(FusedSwinBlock, "swin_transformer.SwinTransformerBlock"),
    _rule(FusedPartitionBlock, "maxxvit.PartitionAttentionCl"),
    _rule(FusedCaitBlock, "cait.LayerScaleBlock"),
    _rule(FusedCoatBlock, "coat.SerialBlock", ("x", "size"), ("cpe",)),
    _rule(FusedConvitBlock, "convit.Block"),
    _rule(FusedXcaBlock, "xcit.XCABlock", ("x", "H", "W"), ("norm3", "local_mp", "drop_path3")),
    _rule(FusedTwinsBlock, "twins.Block", ("x", "size")),
    _rule(FusedPvtBlock, "pvt_v2.Block", ("x", "feat_size")),
    Rule(
        FusedConvMlp,
        frozenset({"timm.models.pvt_v2.MlpWithDepthwiseConv"}),
        lambda mlp: differs(mlp, ("x", "feat_size"), ("fc1", "relu", "dwconv", "act", "fc2", "drop")),
    ),
    _rule(FusedOutlooker, "volo.Outlooker"),
    _rule(FusedVoloBlock, "volo.Transformer"),
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
