"""timm: the blocks of `vision_transformer`, and the attention and feed-forward layers that many models share.

Read from timm 1.0.31. EVA's and BEiT's blocks, built on the same pieces, are in `timm_positions`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.around import attention_of
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.swap import Fused, PreNormBlock, branch_of
from vitkernels.ops import _steps
from vitkernels.ops._steps import Called, HeadNorms, Positions
from vitkernels.residual import known, parts, sublayers
from vitkernels.residual.stream import Branch, Part, Step, Sublayer
from vitkernels.residual.sublayers import (
    attention_step,
    join_heads,
    linear_step,
    read_head_norms,
    split_heads,
    why_not_linears,
)

known.LAYER_NORMS.update(
    {
        "timm.layers.norm.LayerNorm": lambda norm: "runs timm's fast norm" if norm._fast_norm else None,
        "timm.layers.norm.LayerNormFp32": lambda norm: None,
    }
)
known.RMS_NORMS.update(
    {
        "timm.layers.norm.RmsNorm": lambda norm: "runs timm's fast norm" if norm._fast_norm else norm.eps,
        "timm.layers.norm.RmsNormFp32": lambda norm: norm.eps,
    }
)
known.LAYER_SCALES["timm.layers.layer_scale.LayerScale"] = "gamma"
known.DROP_PATHS["timm.layers.drop.DropPath"] = known.draw_bernoulli
known.ACTIVATIONS.update(
    {
        "timm.layers.activations.GELU": lambda act: "gelu",
        "timm.layers.activations.GELUTanh": lambda act: "gelu_tanh",
        "timm.layers.activations.QuickGELU": lambda act: "quick_gelu",
    }
)


# ------------------------------------------------------------------------------------------------------- attention


def _why_not_heads(attn: Any) -> str | None:
    """Why the heads are not those that their shapes alone settle; the stock module computes with them, or raises."""
    if getattr(attn, "attn_dim", None) not in (None, attn.num_heads * getattr(attn, "head_dim", 0)):
        return f"{attn.num_heads} heads do not make up its width"
    width = getattr(attn.proj, "in_features", 0)
    if width % attn.num_heads:
        return f"{attn.num_heads} heads do not make up its width"
    usual = (getattr(attn, "head_dim", None) or width // attn.num_heads or 1) ** -0.5
    plain = getattr(attn, "fused_attn", False) or parts.is_usual(getattr(attn, "scale", usual), usual)
    return None if plain else "a scale of its own"


def why_not_two_masks(attn_mask: Tensor | None, is_causal: bool) -> str | None:
    """Whether a call asks for what timm itself answers in two ways."""
    return "called with attn_mask and is_causal" if attn_mask is not None and is_causal else None


class FusedAttention(Fused):
    """timm.layers.attention.Attention on `ops.attention_qkv`; its relatives change how q, k and v are made."""

    steps: ClassVar[str] = sublayers.ATTENTION
    reads: ClassVar[tuple[str, ...]] = ("qkv", "q_proj")
    makes_mask: ClassVar[bool] = False  # of parameters, at each call

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.declines(x, lambda: self.why_not_now() or why_not_two_masks(attn_mask, is_causal), attn_mask):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.run(x, attn_mask=attn_mask, is_causal=is_causal)

    def run(self, x: Tensor, **options: Any) -> Tensor:
        """The module on [B, N, D]; the options are its forward's."""
        with self.backend():
            return self.output(x, self.attend(self.project(x), **options), False)[0]

    def why_not_now(self) -> str | None:
        """Why the attention between its projections cannot run fused now, or None when it can."""
        attn: Any = self
        rate = getattr(attn.attn_drop, "p", 0.0) if attn.training else 0.0  # read past the module's own mode
        if rate or not parts.drops_nothing(attn.attn_drop):
            return "a dropout of attention's weights"
        return _why_not_heads(attn)

    def project(self, x: Tensor) -> Tensor:
        """[B, N, D] to q, k and v side by side."""
        return parts.linear(self.qkv, x)  # type: ignore[arg-type]

    def packed(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of `project`, where its Linears may be read."""
        attn: Any = self
        return attn.qkv.weight, attn.qkv.bias

    def is_plain(self) -> bool:
        """Whether nothing happens to q and k between the projection and the scores."""
        attn: Any = self
        return parts.is_identity(attn.q_norm) and parts.is_identity(attn.k_norm)

    def head_norms(self) -> HeadNorms | None:
        """Norms of each head's q and k, as `ops.rotary_qkv` has them; None where it cannot stand between the projection
        and the scores."""
        attn: Any = self
        return HeadNorms() if self.is_plain() else read_head_norms(attn.q_norm, attn.k_norm, attn.proj)

    def called(self, attn_mask: Tensor | None = None, is_causal: bool = False, **options: Any) -> Called:
        """What a call with these options brings to the scores."""
        return Called(attn_mask, is_causal, self.positions(**options))

    def positions(self, **options: Any) -> Positions:
        """Of a call's tokens."""
        return Positions()

    def is_one_step(self, **options: Any) -> bool:
        """Whether nothing but the ops of `attention_step` stands between the projections in such a call."""
        return self.head_norms() is not None

    def attend(self, qkv: Tensor, **options: Any) -> Tensor:
        """What `project` gave to the heads' outputs side by side, [B, N, H * K]."""
        attn: Any = self
        called = self.called(**options)
        if self.is_one_step(**options):
            norms = self.head_norms()
            assert norms is not None
            return _steps.between(qkv, attn.num_heads, norms, called)
        q, k, v = split_heads(qkv, attn.num_heads)
        q, k = parts.layer_norm(attn.q_norm, q).to(v.dtype), parts.layer_norm(attn.k_norm, k).to(v.dtype)
        return join_heads(ops.attention(q, k, v, attn_mask=called.attn_mask, is_causal=called.is_causal))

    def output(self, x: Tensor | None, heads: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
        """What follows the heads: norm, gate (which reads x), projection and dropout; as `parts.last_linear`."""
        attn: Any = self
        if not parts.is_identity(getattr(attn, "norm", None)):
            heads = parts.layer_norm(attn.norm, heads)
        if getattr(attn, "gate", None) is not None:
            heads = heads * parts.linear(attn.gate, x).sigmoid()  # type: ignore[arg-type]
        if parts.drops_nothing(attn.proj_drop):
            return parts.last_linear(attn.proj, heads, bias_apart)
        return attn.proj_drop(parts.linear(attn.proj, heads)), None

    def branch(self, **options: Any) -> Branch:
        attn: Any = self
        names = ("qkv", "q_proj", "k_proj", "v_proj", "gate", "proj")
        linears = {name: attn._modules.get(name) for name in names}
        why_not = why_not_linears(**{name: linear for name, linear in linears.items() if linear is not None})

        def run(x: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            return self.output(x, self.attend(self.project(x), **options), bias_apart)

        return Branch(
            run,
            self.steps,
            linears["qkv"] or linears["q_proj"],
            why_not,
            step=self.step(**options) if why_not is None and linears["gate"] is None else None,
        )

    def step(self, **options: Any) -> Step:
        """The branch with its norm as one Function, where all Linears may be read and there is no gate."""
        attn: Any = self
        ends_plain = parts.is_identity(getattr(attn, "norm", None)) and parts.drops_nothing(attn.proj_drop)
        if ends_plain and self.is_one_step(**options):
            turns = not self.is_plain() or self.positions(**options).sin is not None
            return attention_step(
                self.packed,
                attn.proj,
                attn.num_heads,
                norms=self.head_norms if turns else None,  # type: ignore[arg-type]
                call=self.called,
                options=options,
                is_made=self.makes_mask,
            )
        return linear_step(
            self.packed, lambda qkv, bias_apart: self.output(None, self.attend(qkv, **options), bias_apart)
        )

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

    reads: ClassVar[tuple[str, ...]] = ("fc1", "fc1_g", "w0")
    axes = None

    def forward(self, x: Tensor) -> Tensor:
        if self.declines(x):
            return super().forward(x)
        with self.backend():
            return self.branch().run(x, False)[0]

    def inner(self) -> Branch:
        """All but the last dropout."""
        mlp: Any = self
        if parts.is_identity(mlp.norm):
            return sublayers.mlp_branch(mlp.fc1, mlp.act, mlp.fc2, mlp.drop1)

        def finish(hidden: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            hidden = parts.layer_norm(mlp.norm, mlp.drop1(mlp.act(hidden)))
            return parts.last_linear(mlp.fc2, hidden, bias_apart)

        why_not = parts.why_not_layer_norm("norm", mlp.norm) or why_not_linears(fc1=mlp.fc1, fc2=mlp.fc2)
        return Branch(
            lambda x, bias_apart: finish(parts.linear(mlp.fc1, x), bias_apart),
            "linear, activation of torch, add_layer_norm, linear",
            mlp.fc1,
            why_not,
            step=linear_step(lambda: sublayers.joined(mlp.fc1), finish) if why_not is None else None,
        )

    def branch(self, **options: Any) -> Branch:
        return sublayers.dropped(self.inner(), self.drop2)  # type: ignore[arg-type]

    def parts(self) -> list[Part]:
        return [self.branch().part("")]


class FusedGluMlp(FusedMlp):
    """timm.layers.mlp.GluMlp; where a dropout or a norm stands before its last product, the gate is torch's."""

    def gate(self, both: Tensor) -> Tensor:
        mlp: Any = self
        first, second = both.chunk(2, dim=-1)
        hidden = first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
        return parts.layer_norm(mlp.norm, mlp.drop1(hidden)) if not parts.is_identity(mlp.norm) else mlp.drop1(hidden)

    def first(self) -> dict[str, nn.Module]:
        """The Linears before the gate, by name."""
        return {"fc1": self.fc1}  # type: ignore[dict-item]

    def inner(self) -> Branch:
        mlp: Any = self
        alone = parts.is_identity(mlp.norm) and parts.drops_nothing(mlp.drop1)
        act = mlp.act if alone else None
        return sublayers.gated_branch(self.first(), self.gate, {"fc2": mlp.fc2}, act=act, gate_last=mlp.gate_last)


class FusedSwiGLU(FusedGluMlp):
    """timm.layers.mlp.SwiGLU: as GluMlp, with the gate's projection apart."""

    gate_last = False

    def first(self) -> dict[str, nn.Module]:
        return {"fc1_g": self.fc1_g, "fc1_x": self.fc1_x}  # type: ignore[dict-item]


class FusedGeGluMlp(FusedMlp):
    """ViTamin's GeGluMlp: with a norm of its own in front."""

    def inner(self) -> Branch:
        mlp: Any = self

        def gate(both: Tensor) -> Tensor:
            first, second = both.chunk(2, dim=-1)
            return mlp.drop1(mlp.act(first) * second)

        act = mlp.act if parts.drops_nothing(mlp.drop1) else None
        inner = sublayers.gated_branch({"w0": mlp.w0, "w1": mlp.w1}, gate, {"w2": mlp.w2}, act=act)
        return Branch(
            lambda x, bias_apart: inner.run(parts.layer_norm(mlp.norm, x), bias_apart),
            f"add_layer_norm, {inner.ops}",
            None,
            inner.why_not,
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


class FusedBlock(PreNormBlock):
    """timm.models.vision_transformer.Block, its adds run with the norms that follow them."""

    reads = ("norm1",)
    passes: ClassVar[dict[str, Any]] = {"attn_mask": None, "is_causal": False}  # what a plain call hands to attn

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.declines(x, lambda: why_not_two_masks(attn_mask, is_causal), attn_mask):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.run(x, attn_mask=attn_mask, is_causal=is_causal)

    def sublayers(self, **options: Any) -> list[Sublayer]:
        block: Any = self
        attention = attention_of("attn", block.attn, **(self.passes | options))
        return [
            Sublayer("attn", block.norm1, attention, block.ls1, block.drop_path1),
            Sublayer("mlp", block.norm2, branch_of("mlp", block.mlp), block.ls2, block.drop_path2),
        ]


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
