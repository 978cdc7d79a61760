"""timm: the blocks of `vision_transformer`, and the attention and feed-forward layers that many models share.

Read from timm 1.0.31. EVA's and BEiT's blocks, built on the same pieces, are in `timm_positions`.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse import parts, sublayers
from vitkernels.fuse.residual import Border, Branch, Part, Sublayer, pre_norm
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.sublayers import called, join_heads, split_heads
from vitkernels.fuse.swap import Fused, branch_of, following

TAILS = (("blocks", "norm"), ("blocks", "fc_norm"))


def _drop_path(module: nn.Module, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    keep = 1 - module.drop_prob  # type: ignore[operator]
    factor = tokens.new_empty(tokens.shape[0], dtype=dtype).bernoulli_(keep)
    return factor.div_(keep) if getattr(module, "scale_by_keep", True) and keep > 0 else factor


parts.DROP_PATHS["DropPath"] = _drop_path
parts.ACTIVATIONS["GELUTanh"] = lambda act: "gelu_tanh"


# ------------------------------------------------------------------------------------------------------- attention


def two_masks(attn_mask: Tensor | None, is_causal: bool) -> str | None:
    """Whether a call asks for what timm itself answers in two ways."""
    return "called with attn_mask and is_causal" if attn_mask is not None and is_causal else None


class FusedAttention(Fused):
    """timm.layers.attention.Attention on `ops.attention_qkv`; its relatives change how q, k and v are made."""

    steps: ClassVar[str] = sublayers.ATTENTION

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.declines(x, lambda: self.why_not_now() or two_masks(attn_mask, is_causal)):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        with self.backend():
            return self.output(x, self.heads(x, attn_mask=attn_mask, is_causal=is_causal), False)[0]

    def why_not_now(self) -> str | None:
        """Why the attention between its projections cannot run fused now, or None when it can."""
        attn: Any = self
        return None if parts.drops_nothing(attn.attn_drop) else "a dropout of attention's weights"

    def heads(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, D] to the heads' outputs side by side, [B, N, H * K]."""
        attn: Any = self
        qkv = parts.linear(attn.qkv, x)
        if parts.is_identity(attn.q_norm) and parts.is_identity(attn.k_norm):
            return ops.attention_qkv(qkv, attn.num_heads, attn_mask=attn_mask, is_causal=is_causal)
        q, k, v = split_heads(qkv, attn.num_heads)
        q, k = parts.layer_norm(attn.q_norm, q).to(v.dtype), parts.layer_norm(attn.k_norm, k).to(v.dtype)
        return join_heads(ops.attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal))

    def output(self, x: Tensor, heads: Tensor, split: bool) -> tuple[Tensor, Tensor | None]:
        """What follows the heads: norm, gate, projection and dropout; as `parts.last_linear`."""
        attn: Any = self
        if not parts.is_identity(getattr(attn, "norm", None)):
            heads = parts.layer_norm(attn.norm, heads)
        if getattr(attn, "gate", None) is not None:
            heads = heads * parts.linear(attn.gate, x).sigmoid()
        if parts.drops_nothing(attn.proj_drop):
            return parts.last_linear(attn.proj, heads, split)
        return attn.proj_drop(parts.linear(attn.proj, heads)), None

    def branch(self, **options: Any) -> Branch:
        attn: Any = self

        def run(x: Tensor, split: bool) -> tuple[Tensor, Tensor | None]:
            return self.output(x, self.heads(x, **options), split)

        def why_not() -> str | None:
            linears = {name: attn._modules.get(name) for name in ("qkv", "q_proj", "k_proj", "v_proj", "gate", "proj")}
            return called(**{name: linear for name, linear in linears.items() if linear is not None})

        return Branch(run, self.steps, attn.qkv, why_not)

    def parts(self) -> list[Part]:
        branch = self.branch()
        return [Part("", branch.ops, self.why_not_now() or branch.why_not)]


ATTENTION = Rule(
    FusedAttention,
    frozenset({"timm.layers.attention.Attention"}),
    lambda attn: differs(
        attn,
        ("x", "attn_mask", "is_causal"),
        ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"),
        ("gate",),
    ),
)


# ---------------------------------------------------------------------------------------------------- feed-forward


class FusedMlp(Fused):
    """timm.layers.mlp.Mlp on `ops.mlp`; its gated relatives change what happens between the products."""

    gated = False

    def forward(self, x: Tensor) -> Tensor:
        if self.declines(x):
            return super().forward(x)
        with self.backend():
            return self.output(x, False)[0]

    def hidden(self, x: Tensor) -> Tensor:
        """fc1 and the activation, where they run one by one."""
        mlp: Any = self
        return mlp.act(parts.linear(mlp.fc1, x))

    def output(self, x: Tensor, split: bool) -> tuple[Tensor, Tensor | None]:
        """The feed-forward; as `parts.last_linear`."""
        mlp: Any = self
        split = split and parts.drops_nothing(mlp.drop2)
        if not self.gated and parts.is_identity(mlp.norm):
            out, bias = sublayers.mlp(x, mlp.fc1, mlp.act, mlp.fc2, mlp.drop1, split)
        else:
            hidden = parts.layer_norm(mlp.norm, mlp.drop1(self.hidden(x)))
            out, bias = parts.last_linear(mlp.fc2, hidden, split)
        return (out, bias) if split else (mlp.drop2(out), None)

    def branch(self, **options: Any) -> Branch:
        mlp: Any = self
        if parts.is_identity(mlp.norm):
            inside = functools.partial(sublayers.not_mlp, mlp.fc1, mlp.act, mlp.fc2, mlp.drop1)
            return Branch(self.output, "mlp", mlp.fc1, inside, "linear, linear")
        return Branch(
            self.output,
            "linear, activation of torch, add_layer_norm, linear",
            mlp.fc1,
            lambda: parts.not_layer_norm("norm", mlp.norm) or called(fc1=mlp.fc1, fc2=mlp.fc2),
        )

    def parts(self) -> list[Part]:
        return [self.branch().part("")]


class FusedGluMlp(FusedMlp):
    """timm.layers.mlp.GluMlp: the products are ours, the gate between them is torch's."""

    gated = True

    def hidden(self, x: Tensor) -> Tensor:
        mlp: Any = self
        first, second = parts.linear(mlp.fc1, x).chunk(2, dim=-1)
        return first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second

    def branch(self, **options: Any) -> Branch:
        mlp: Any = self
        return Branch(self.output, "linear, gate of torch, linear", mlp.fc1, lambda: called(fc1=mlp.fc1, fc2=mlp.fc2))


class FusedSwiGLU(FusedGluMlp):
    """timm.layers.mlp.SwiGLU: as GluMlp, with the gate's projection apart."""

    def hidden(self, x: Tensor) -> Tensor:
        mlp: Any = self
        return mlp.act(parts.linear(mlp.fc1_g, x)) * parts.linear(mlp.fc1_x, x)

    def branch(self, **options: Any) -> Branch:
        mlp: Any = self
        return Branch(
            self.output,
            "linear, gate of torch, linear",
            mlp.fc1_x,
            lambda: called(fc1_g=mlp.fc1_g, fc1_x=mlp.fc1_x, fc2=mlp.fc2),
        )


class FusedGeGluMlp(FusedGluMlp):
    """ViTamin's GeGluMlp: with a norm of its own in front."""

    def output(self, x: Tensor, split: bool) -> tuple[Tensor, Tensor | None]:
        mlp: Any = self
        x = parts.layer_norm(mlp.norm, x)
        hidden = mlp.drop1(mlp.act(parts.linear(mlp.w0, x)) * parts.linear(mlp.w1, x))
        if parts.drops_nothing(mlp.drop2):
            return parts.last_linear(mlp.w2, hidden, split)
        return mlp.drop2(parts.linear(mlp.w2, hidden)), None

    def branch(self, **options: Any) -> Branch:
        mlp: Any = self
        return Branch(
            self.output,
            "add_layer_norm, linear, gate of torch, linear",
            None,
            lambda: called(w0=mlp.w0, w1=mlp.w1, w2=mlp.w2),
        )


_MLP = ("act", "drop1", "norm", "fc2", "drop2")
MLP = Rule(FusedMlp, frozenset({"timm.layers.mlp.Mlp"}), lambda mlp: differs(mlp, ("x",), ("fc1", *_MLP)))
GLU_MLP = Rule(
    FusedGluMlp,
    frozenset({"timm.layers.mlp.GluMlp"}),
    lambda mlp: differs(mlp, ("x",), ("fc1", *_MLP)) or (None if mlp.chunk_dim == -1 else "it is made of convolutions"),
)
SWIGLU = Rule(
    FusedSwiGLU,
    frozenset({"timm.layers.mlp.SwiGLU"}),
    lambda mlp: differs(mlp, ("x",), ("fc1_g", "fc1_x", *_MLP)),
)
GEGLU_MLP = Rule(
    FusedGeGluMlp,
    frozenset({"timm.models.vitamin.GeGluMlp"}),
    lambda mlp: differs(mlp, ("x",), ("norm", "w0", "act", "w1", "drop1", "w2", "drop2")),
)


# ----------------------------------------------------------------------------------------------------------- block


class FusedBlock(Fused):
    """timm.models.vision_transformer.Block, its adds run with the norms that follow them."""

    is_block = True

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.declines(x, lambda: two_masks(attn_mask, is_causal)):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        with self.backend():
            state = self._vitkernels
            sublayers = self.sublayers(attn_mask=attn_mask, is_causal=is_causal)
            return pre_norm(x, sublayers, following(self), state.residual_dtype)

    def sublayers(self, **options: Any) -> list[Sublayer]:
        """The residual steps; the options are the attention's."""
        block: Any = self
        return [
            Sublayer("attn", block.norm1, branch_of("attn", block.attn, **options), block.ls1, block.drop_path1),
            Sublayer("mlp", block.norm2, branch_of("mlp", block.mlp), block.ls2, block.drop_path2),
        ]

    def entry(self) -> Border:
        first = self.sublayers()[0]
        return Border(first.norm, first.branch.first)

    def parts(self) -> list[Part]:
        return [part for sublayer in self.sublayers() for part in sublayer.parts()]


BLOCK = Rule(
    FusedBlock,
    frozenset({"timm.models.vision_transformer.Block"}),
    lambda block: differs(
        block,
        ("x", "attn_mask", "is_causal"),
        ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"),
    ),
)
RULES = (BLOCK, ATTENTION, MLP, GLU_MLP, SWIGLU, GEGLU_MLP)
