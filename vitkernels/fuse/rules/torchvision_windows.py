"""torchvision: Swin and Swin v2 (swin_t ... swin_v2_b), read from torchvision 0.28.

The masks of shifted windows are one for each window of an image, which serve in turn.
"""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.around import attention_within
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.swap import Fused, PreNormBlock, branch_of
from vitkernels.ops._windows import Windows, to_windows
from vitkernels.residual import known, parts
from vitkernels.residual.stream import Part, Step, Sublayer, added_norms
from vitkernels.residual.sublayers import ATTENTION, attention_step, join_heads, split_heads, why_not_linears


def _draw(module: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """StochasticDepth's factor of each sample, or of all together."""
    keep = 1.0 - module.p
    noise = tokens.new_empty(tokens.shape[0] if module.mode == "row" else 1, dtype=dtype).bernoulli_(keep)
    return (noise.div_(keep) if keep > 0 else noise).expand(tokens.shape[0])


known.DROP_PATHS["torchvision.ops.stochastic_depth.StochasticDepth"] = _draw


class FusedShiftedAttention(Fused):
    """ShiftedWindowAttention: [B, H, W, D], with the windows that it makes itself."""

    axes = 4
    reads = ("qkv",)

    def forward(self, x: Tensor) -> Tensor:
        attn: Any = self
        if self.declines(x, self.why_not_now):
            return super().forward(x)
        with self.backend():
            size, sides = attn.window_size, x.shape[1:3]
            padded = [length + -length % side for length, side in zip(sides, size, strict=True)]
            windows = self.windows(*padded)
            image = F.pad(x, (0, 0, 0, padded[1] - sides[1], 0, padded[0] - sides[0]))
            heads = self.attend(self.project(windows.made(image)), self.bias(windows))
            out = F.dropout(ops.linear(heads, attn.proj.weight, attn.proj.bias), attn.dropout, self.training)
            image = windows.undone(out, image.shape)
            return image[:, : sides[0], : sides[1]].contiguous()

    def bias(self, windows: Windows) -> Tensor:
        """What is added to the scores, [1 or windows of an image, H, N, N]."""
        attn: Any = self
        bias: Tensor = attn.get_relative_position_bias()
        return bias + _masks(bias, windows)[:, None] if any(windows.shift) else bias

    def windows(self, height: int, width: int) -> Windows:
        """Of an image; they are not shifted along a side that is one window."""
        attn: Any = self
        (down, right), (below, beside) = attn.window_size, attn.shift_size
        shift = 0 if down >= height else below, 0 if right >= width else beside
        return Windows((height, width), (down, right), shift)

    def step_within(self, height: int, width: int) -> Step | None:
        """Its norm, the windows made and undone, and the attention within them as one Function; None where the windows
        of such an image are not whole, or a dropout follows."""
        attn: Any = self
        windows = self.windows(height, width)
        if self.why_not_now() is not None or not windows.whole or (attn.dropout > 0 and self.training):
            return None
        bias = functools.partial(self.bias, windows)
        return attention_step(
            lambda: (attn.qkv.weight, attn.qkv.bias), attn.proj, attn.num_heads, attn_mask=bias, windows=windows
        )

    def why_not_now(self) -> str | None:
        """Why torchvision's own function must compute: it reads the weights itself, past anything hung on a Linear."""
        attn: Any = self
        if attn.attention_dropout > 0 and self.training:
            return "a dropout of attention's weights"
        return why_not_linears(qkv=attn.qkv, proj=attn.proj)

    def project(self, windows: Tensor) -> Tensor:
        """q, k and v side by side."""
        attn: Any = self
        return ops.linear(windows, attn.qkv.weight, attn.qkv.bias)

    def attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """To the heads' outputs side by side."""
        return ops.attention_qkv(qkv, self.num_heads, attn_mask=bias)  # type: ignore[arg-type]

    def parts(self) -> list[Part]:
        return [Part("", ATTENTION, self.why_not_now())]


class FusedShiftedV2Attention(FusedShiftedAttention):
    """ShiftedWindowAttentionV2: q and k of length 1, a factor for each head, and no bias on k."""

    def step_within(self, height: int, width: int) -> None:
        """None: the step has nothing between the projection and the scores."""
        return None

    def project(self, windows: Tensor) -> Tensor:
        attn: Any = self
        bias = attn.qkv.bias
        if bias is not None:
            q, k, v = bias.chunk(3)
            bias = torch.cat([q, torch.zeros_like(k), v])
        return ops.linear(windows, attn.qkv.weight, bias)

    def attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        attn: Any = self
        q, k, v = split_heads(qkv, attn.num_heads)
        factor = attn.logit_scale.clamp(max=math.log(100.0)).exp()
        q, k = (F.normalize(q, dim=-1) * factor).to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)
        return join_heads(ops.attention(q, k, v, attn_mask=bias, scale=1.0))


def _masks(like: Tensor, windows: Windows) -> Tensor:
    """[windows of an image, N, N]: -100 between tokens that were no neighbours before the shift."""
    regions = []
    for length, side, shift in zip(*windows, strict=True):
        places = torch.arange(length, device=like.device)
        # as slices from the end have it: a shift of 0 leaves no last region
        last = places >= length - shift if shift > 0 else torch.ones_like(places, dtype=torch.bool)
        regions.append((places >= length - side).long() + last.long())
    region = (regions[0][:, None] * 3 + regions[1]).to(like.dtype)
    tokens = to_windows(region[None, ..., None], windows.size)[0].squeeze(-1)
    return torch.where(tokens[:, None] == tokens[:, :, None], 0.0, -100.0).to(like.dtype)


class FusedSwinBlock(PreNormBlock):
    """SwinTransformerBlock: tokens as [B, H, W, D]."""

    axes = 4
    reads: ClassVar[tuple[str, ...]] = ("norm1",)

    def forward(self, x: Tensor) -> Tensor:
        if self.declines(x):
            return super().forward(x)
        return self.run(x, height=x.shape[1], width=x.shape[2])

    def sublayers(self, height: int = 0, width: int = 0) -> list[Sublayer]:  # type: ignore[override]
        block: Any = self
        attn = block.attn
        attention = attention_within("attn", attn, attn, "a relative bias on its scores")
        if isinstance(attn, FusedShiftedAttention) and parts.why_not_part("attn", attn) is None:
            attention.step = attn.step_within(height, width)
        return [
            Sublayer("attn", block.norm1, attention, None, block.stochastic_depth),
            Sublayer("mlp", block.norm2, branch_of("mlp", block.mlp), None, block.stochastic_depth),
        ]

    def why_not_joined(self) -> str | None:
        return "its tokens have four axes"


class FusedSwinV2Block(FusedSwinBlock):
    """SwinTransformerBlockV2: each norm comes behind its branch."""

    reads = ()

    def run(self, x: Tensor, **options: Any) -> Tensor:
        with self.backend():
            return added_norms(x, self.sublayers(), self._vitkernels.residual_dtype)


_SWIN = "torchvision.models.swin_transformer"


def _attention(mixin: type[Fused], owner: str, optional: tuple[str, ...], parameters: tuple[str, ...]) -> Rule:
    def contract(attn: nn.Module) -> str | None:
        return differs(attn, ("x",), ("qkv", "proj"), optional, parameters)

    return Rule(mixin, frozenset({f"{_SWIN}.{owner}"}), contract)


def _block(mixin: type[Fused], owner: str) -> Rule:
    def contract(block: nn.Module) -> str | None:
        return differs(block, ("x",), ("norm1", "attn", "stochastic_depth", "norm2", "mlp"))

    return Rule(mixin, frozenset({f"{_SWIN}.{owner}"}), contract)


RULES = (
    _attention(FusedShiftedAttention, "ShiftedWindowAttention", (), ("relative_position_bias_table",)),
    _attention(FusedShiftedV2Attention, "ShiftedWindowAttentionV2", ("cpb_mlp",), ("logit_scale",)),
    _block(FusedSwinBlock, "SwinTransformerBlock"),
    _block(FusedSwinV2Block, "SwinTransformerBlockV2"),
)
