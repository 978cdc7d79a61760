"""timm: CoAtNet's Transformer blocks (Dai et al. 2021), whose tokens are an image and whose Linears are convolutions.

The ops see the image channels last, which is how its memory lies from the first op on. Read from timm 1.0.31.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.around import attention_within
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.timm_window_attention import FusedPartitionAttention, why_not_bias
from vitkernels.fuse.swap import Fused
from vitkernels.residual import parts
from vitkernels.residual.genuine import owner_name
from vitkernels.residual.stream import Branch, Part

_NORM = "timm.layers.norm.LayerNorm2d"


def _why_not_pixels(**convs: Any) -> str | None:
    """Which of these convolutions cannot be read as Linears, and why; None when all can."""
    for name, conv in convs.items():
        if (reason := parts.why_not_part(name, conv, nn.Conv2d)) is not None:
            return reason
        if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.groups != 1 or any(conv.padding):
            return f"{name} is no convolution of one pixel"
    return None


class FusedImageAttention(FusedPartitionAttention):
    """MaxViT's Attention2d: [B, D, H, W]."""

    axes = 4

    def branch(self, **options: Any) -> Branch:
        why_not = _why_not_pixels(qkv=self.qkv, proj=self.proj)
        return Branch(lambda x, bias_apart: (self.run(x, **options), None), self.steps, None, why_not)

    def why_not_now(self) -> str | None:
        attn: Any = self
        usual = attn.fused_attn or parts.is_usual(attn.scale, attn.dim_head**-0.5)
        reason = None if usual else "a scale of its own"
        drops = (attn.attn_drop.p if attn.training else 0.0) or not parts.drops_nothing(attn.attn_drop)
        reason = reason or ("a dropout of attention's weights" if drops else None)
        if reason is None and not parts.drops_nothing(attn.proj_drop):
            reason = "a dropout behind it, which draws in the order in which torch's attention lays its image out"
        return reason or _why_not_pixels(qkv=attn.qkv, proj=attn.proj) or why_not_bias(attn)

    def run(self, x: Tensor, **options: Any) -> Tensor:
        attn: Any = self
        with self.backend():
            qkv = ops.linear(_tokens(x), attn.qkv.weight.flatten(1), attn.qkv.bias)
            out = ops.linear(self.attend(qkv, **options), attn.proj.weight.flatten(1), attn.proj.bias)
        return attn.proj_drop(_image(out, x.shape[2:]))


def _tokens(image: Tensor) -> Tensor:
    return image.flatten(2).transpose(1, 2)


def _image(tokens: Tensor, sides: tuple[int, ...]) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, sides)


class FusedImageBlock(Fused):
    """TransformerBlock2d; the sums are torch's."""

    is_block = True
    axes = 4

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        block: Any = self
        if self.declines(x):
            return super().forward(x, shared_rel_pos)
        with self.backend():
            out = block.attn(self._first_normed(x), shared_rel_pos=shared_rel_pos)
            x = block.shortcut(x) + block.drop_path1(block.ls1(out))
            return x + block.drop_path2(block.ls2(self._fed(_normed(block.norm2, x))))

    def _first_normed(self, x: Tensor) -> Tensor:
        norm: Any = self.norm1
        if not isinstance(norm, nn.Sequential):
            return _normed(norm, x)
        read = parts.why_not_part("norm1", norm) is None
        return norm.down(_normed(norm.norm, x)) if read else norm(x)  # type: ignore[operator]

    def _why_not_feed(self) -> str | None:
        """Why the feed-forward is called as it is."""
        mlp: Any = self.mlp
        if reason := parts.why_not_part("mlp", mlp) or _why_not_pixels(fc1=mlp.fc1, fc2=mlp.fc2):
            return reason
        if owner_name(mlp) != "timm.layers.mlp.ConvMlp" or not parts.is_identity(mlp.norm):
            return f"mlp is {type(mlp).__name__}, or has a norm inside"
        if parts.activation(mlp.act) is None:
            return f"the activation is {type(mlp.act).__name__}"
        return None if parts.drops_nothing(mlp.drop) else "a dropout after the activation"

    def _fed(self, image: Tensor) -> Tensor:
        mlp: Any = self.mlp
        if self._why_not_feed() is not None:
            return mlp(image)
        weights = mlp.fc1.weight.flatten(1), mlp.fc1.bias, mlp.fc2.weight.flatten(1), mlp.fc2.bias
        return _image(ops.mlp(_tokens(image), *weights, activation=parts.activation(mlp.act) or ""), image.shape[2:])

    def parts(self) -> list[Part]:
        block: Any = self
        attention = attention_within("attn", block.attn, block.attn, "a relative bias on its scores")
        why_not = self._why_not_feed()
        norms = {"norm1": getattr(block.norm1, "norm", block.norm1), "norm2": block.norm2}
        reasons = (_why_not_norm(name, norm) for name, norm in norms.items())
        reason = next((each for each in reasons if each is not None), None)
        return [
            attention.part("attn"),
            Part("mlp", "mlp" if why_not is None else "", why_not),
            Part("norms", "add_layer_norm" if reason is None else "", reason),
        ]


def _why_not_norm(name: str, norm: Any) -> str | None:
    if owner_name(norm) != _NORM:
        return f"{name} is {type(norm).__name__}, not LayerNorm2d"
    if norm._fast_norm:
        return f"{name} runs timm's fast norm"
    return parts.why_not_part(name, norm) or (None if norm.weight is not None else f"{name} has no weight")


def _normed(norm: Any, image: Tensor) -> Tensor:
    if _why_not_norm("", norm) is not None:
        return norm(image)
    last = image.permute(0, 2, 3, 1)
    out_dtype = parts.operand_dtype(None, last)
    _, normed = ops.add_layer_norm(last, None, norm.weight, norm.bias, norm.eps, out_dtype=out_dtype)
    return normed.permute(0, 3, 1, 2)


RULES = (
    Rule(
        FusedImageAttention,
        frozenset({"timm.models.maxxvit.Attention2d"}),
        lambda attn: differs(attn, ("x", "shared_rel_pos"), ("qkv", "attn_drop", "proj", "proj_drop"), ("rel_pos",)),
    ),
    Rule(
        FusedImageBlock,
        frozenset({"timm.models.maxxvit.TransformerBlock2d"}),
        lambda block: differs(
            block,
            ("x", "shared_rel_pos"),
            ("shortcut", "norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"),
        ),
    ),
)
