"""DaViT (Ding et al. 2022), timm's and transformers' (Florence-2's tower): blocks with attention in windows and blocks
with attention among features in turn, and a convolution of neighbours before each step.

Read from timm 1.0.31 and transformers 5.23. The attention among features runs its own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from vitkernels.fuse.around import attention_within
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.timm_window_attention import FusedPlainAttention
from vitkernels.fuse.rules.transformers_parts import FusedAttention, attention_rule, owners
from vitkernels.fuse.rules.transformers_spelling import Spelling
from vitkernels.fuse.swap import PreNormBlock, branch_of
from vitkernels.ops._windows import from_windows, to_windows
from vitkernels.residual import parts
from vitkernels.residual.stream import Sublayer, pre_norm

Sides = tuple[int, int]


class FusedWindowAttention(FusedPlainAttention):
    """timm's WindowAttention: of windows, without a bias."""

    def why_not_now(self) -> str | None:
        attn: Any = self
        usual = attn.fused_attn or parts.is_usual(attn.scale, (attn.qkv.in_features // attn.num_heads) ** -0.5)
        return None if usual else "a scale of its own"

    def is_plain(self) -> bool:
        return True

    def output(self, x: Tensor | None, heads: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
        return parts.last_linear(self.proj, heads, bias_apart)  # type: ignore[arg-type]


class FusedFlorenceAttention(FusedAttention):
    """Florence2VisionWindowAttention: it cuts its image into windows, [B, H, W, D] to [B, H * W, D]."""

    axes = 4
    spelling = Spelling(("qkv",), "proj", "num_heads", "scale", is_causal=False)
    hears_keywords = False
    returns_weights = False

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        if self.leaves(hidden_states):
            return super(FusedAttention, self).forward(hidden_states)
        return self.attended(hidden_states)

    def attended(self, x: Tensor, **options: Any) -> Tensor:
        attn: Any = self
        size = (attn.window_size, attn.window_size)
        windows, counts = to_windows(x, size)
        return from_windows(super().attended(windows), size, counts, x.shape[1:3]).flatten(1, 2)

    def _drops(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Names:
    """What a block calls its parts: the convolutions before its steps, the attention, the feed-forward."""

    convolutions: tuple[str, str]
    attention: str
    mlp: str

    def children(self) -> set[str]:
        steps = {"norm1", "drop_path1", "norm2", "drop_path2"}
        return {*self.convolutions, self.attention, self.mlp, *steps}


class FusedChannelBlock(PreNormBlock):
    """timm's ChannelBlock: an image, [B, D, H, W]."""

    axes = 4
    names: ClassVar[Names] = Names(("cpe1", "cpe2"), "attn", "mlp")

    def forward(self, x: Tensor) -> Tensor:
        if self.declines(x):
            return super().forward(x)
        state = self._vitkernels
        with self.backend():
            steps = self.sublayers(sides=(x.shape[2], x.shape[3]))
            for name, step in zip(self.names.convolutions, steps, strict=True):
                image = self.moved(getattr(self, name), x)
                tokens = pre_norm(
                    image.flatten(2).transpose(1, 2), [step], state.residual_dtype, again=state.recompute_norms
                )
                x = tokens.transpose(1, 2).unflatten(2, image.shape[2:])
        return x

    def moved(self, convolution: Any, x: Tensor) -> Tensor:
        """The image with what its convolution adds."""
        return convolution(x)

    def attend(self, x: Tensor, sides: Sides) -> Tensor:
        """The attention on the normed tokens of an image of these sides."""
        return getattr(self, self.names.attention)(x)

    def sublayers(self, sides: Sides = (0, 0), **options: Any) -> list[Sublayer]:
        block: Any = self
        attn, mlp = (getattr(self, name) for name in (self.names.attention, self.names.mlp))
        attention = attention_within(
            self.names.attention, attn, lambda x: self.attend(x, sides), "it is among features"
        )
        return [
            Sublayer(self.names.attention, block.norm1, attention, None, block.drop_path1),
            Sublayer(self.names.mlp, block.norm2, branch_of(self.names.mlp, mlp), None, block.drop_path2),
        ]

    def why_not_joined(self) -> str | None:
        return "convolutions stand between its steps"


class FusedSpatialBlock(FusedChannelBlock):
    """timm's SpatialBlock."""

    def attend(self, x: Tensor, sides: Sides) -> Tensor:
        block: Any = self
        windows, counts = to_windows(x.unflatten(1, sides), block.window_size)
        return from_windows(block.attn(windows), block.window_size, counts, sides).flatten(1, 2)


class FusedFlorenceBlock(FusedChannelBlock):
    """Florence2VisionChannelBlock."""

    names = Names(("conv1", "conv2"), "channel_attn", "ffn")

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)

    def moved(self, convolution: Any, x: Tensor) -> Tensor:
        return convolution(x) + x


class FusedFlorenceSpatialBlock(FusedFlorenceBlock):
    """Florence2VisionSpatialBlock."""

    names = Names(("conv1", "conv2"), "window_attn", "ffn")

    def attend(self, x: Tensor, sides: Sides) -> Tensor:
        return super().attend(x.unflatten(1, sides), sides)


def _block(mixin: type[FusedChannelBlock], owner: frozenset[str], argument: str) -> Rule:
    def contract(block: nn.Module) -> str | None:
        return differs(block, (argument,), mixin.names.children())

    return Rule(mixin, owner, contract)


_TIMM = "timm.models.davit"
_FLORENCE = "florence2.Florence2Vision"
RULES = (
    Rule(
        FusedWindowAttention,
        frozenset({f"{_TIMM}.WindowAttention"}),
        lambda attn: differs(attn, ("x",), ("qkv", "proj", "softmax")),
    ),
    _block(FusedSpatialBlock, frozenset({f"{_TIMM}.SpatialBlock"}), "x"),
    _block(FusedChannelBlock, frozenset({f"{_TIMM}.ChannelBlock"}), "x"),
    attention_rule(FusedFlorenceAttention, owners(f"{_FLORENCE}WindowAttention"), ("hidden_states",)),
    _block(FusedFlorenceSpatialBlock, owners(f"{_FLORENCE}SpatialBlock"), "hidden_states"),
    _block(FusedFlorenceBlock, owners(f"{_FLORENCE}ChannelBlock"), "hidden_states"),
)
