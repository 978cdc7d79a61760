"""Meta's DINOv2 and DINOv3 repositories, and the many copies of their files: known by structure wherever they lie.

Their blocks take a tensor, or a list of them (crops of several sizes), which is served one by one: attention between
the crops there is none. While samples are dropped in training, blocks run on a random subset of the batch: such a call
runs their own code, around fused attention and feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.swap import Fused, PreNormBlock, branch_of
from vitkernels.ops import _steps
from vitkernels.ops._amp import autocast_dtype
from vitkernels.ops._check import integer, is_integer
from vitkernels.ops._steps import Called, HeadNorms, Positions
from vitkernels.residual import known, parts
from vitkernels.residual.stream import Branch, Part, Step, Sublayer
from vitkernels.residual.sublayers import (
    ATTENTION,
    ROTARY,
    attention_step,
    dropped,
    gated_branch,
    join_heads,
    linear_step,
    mlp_branch,
    plain_rotary,
    rotary,
    split_heads,
    why_not_linears,
)

known.MASKED_LINEARS.add("dinov3.layers.attention.LinearKMaskedBias")
known.LAYER_SCALES.update(dict.fromkeys((f"dinov{n}.layers.layer_scale.LayerScale" for n in (2, 3)), "gamma"))
known.DROP_PATHS["dinov2.layers.drop_path.DropPath"] = known.draw_bernoulli
Rope = tuple[Tensor, Tensor]  # sines and cosines, each [patches, K], or with samples and heads in front

# ------------------------------------------------------------------------------------------------------- attention


class FusedAttention(Fused):
    """dinov2.layers.attention.Attention on `ops.attention_qkv`; its relatives take more arguments."""

    steps: ClassVar[str] = ATTENTION
    reads = ("qkv",)

    def forward(self, x: Tensor) -> Tensor:
        if self.declines(x, self.why_not_now):
            return super().forward(x)
        return self._whole(x)

    def why_not_now(self) -> str | None:
        drop: Any = getattr(self, "attn_drop", None)
        drops = self.training and drop > 0 if isinstance(drop, float | int) else not parts.drops_nothing(drop)
        if drops:
            return "a dropout of attention's weights"
        scale: Any = getattr(self, "scale", None)
        usual = isinstance(scale, float | int) and abs(scale * _head_width(self) ** 0.5 - 1) < 1e-6
        return None if scale is None or usual else "a scale of its own"

    def branch(self, **options: Any) -> Branch:
        attn: Any = self

        def finish(qkv: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            return parts.last_linear(attn.proj, self.attend(qkv, **options), bias_apart)

        why_not = (None if _is_masked(attn.qkv) else why_not_linears(qkv=attn.qkv)) or why_not_linears(proj=attn.proj)
        branch = Branch(
            lambda x, bias_apart: finish(_project(attn.qkv, x), bias_apart),
            self.steps,
            attn.qkv,
            why_not,
            step=self.step(finish, **options) if why_not is None else None,
        )
        return dropped(branch, getattr(attn, "proj_drop", None))

    def step(
        self, finish: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]], is_causal: bool = False, **options: Any
    ) -> Step:
        """The branch with its norm as one Function, where both Linears may be read; finish is all behind qkv's."""
        attn: Any = self
        if not self.is_one_step(**options):
            return linear_step(lambda: _packed(attn.qkv), finish)
        return attention_step(
            lambda: _packed(attn.qkv),
            attn.proj,
            attn.num_heads,
            norms=None if options.get("rope") is None else lambda: HeadNorms(half=True),
            call=self.called,
            options={"is_causal": is_causal, **options},
        )

    def is_one_step(self, **options: Any) -> bool:
        """Whether nothing but the ops of `attention_step` stands between the projections in such a call."""
        return True

    def called(self, is_causal: bool = False, rope: Rope | None = None) -> Called:
        """What a call with these options brings to the scores; class token and registers have no place."""
        return Called(None, is_causal, Positions() if rope is None else Positions(*rope, prefix=None))

    def attend(self, qkv: Tensor, **options: Any) -> Tensor:
        """[B, N, 3 * D] to the heads' outputs side by side, [B, N, D]."""
        return _steps.between(qkv, self.num_heads, HeadNorms(half=True), self.called(**options))  # type: ignore[arg-type]

    def parts(self) -> list[Part]:
        why_not = self.why_not_now()
        return [Part("", "", why_not) if why_not else self.branch().part("")]

    def _whole(self, x: Tensor, **options: Any) -> Tensor:
        with self.backend():
            return self.branch(**options).run(x, False)[0]


class FusedCausalAttention(FusedAttention):
    """The same in DINOv2's later versions."""

    def forward(self, x: Tensor, is_causal: bool = False) -> Tensor:
        if self.declines(x, self.why_not_now):
            return super(FusedAttention, self).forward(x, is_causal)
        return self._whole(x, is_causal=is_causal)


class FusedMemEffAttention(FusedAttention):
    """dinov2.layers.attention.MemEffAttention; a bias is one of xformers' own objects, which xformers gets."""

    def forward(self, x: Tensor, attn_bias: Any = None) -> Tensor:
        if self.declines(x, lambda: self.why_not_now() or _biased(attn_bias)):
            return super(FusedAttention, self).forward(x, attn_bias)
        return self._whole(x)


class FusedSelfAttention(FusedAttention):
    """dinov3.layers.attention.SelfAttention: rotary positions on the patches, in their own dtype."""

    steps = ROTARY
    replaces = frozenset({"forward", "compute_attention"})

    def forward(self, x: Tensor, attn_bias: Any = None, rope: Rope | None = None) -> Tensor:
        if self.declines(x, lambda: self.why_not_now() or _biased(attn_bias)):
            return super(FusedAttention, self).forward(x, attn_bias, rope)
        return self._whole(x, rope=rope)

    def compute_attention(self, qkv: Tensor, attn_bias: Any = None, rope: Rope | None = None) -> Tensor:
        """What the repository's own code for lists calls between the projections."""
        if self.declines(qkv, lambda: self.why_not_now() or _biased(attn_bias)):
            return super().compute_attention(qkv, attn_bias, rope)  # type: ignore[misc]
        with self.backend():
            return self.attend(qkv, rope=rope)

    def is_one_step(self, rope: Rope | None = None, **options: Any) -> bool:
        """Positions that learn are plain torch's; so are those coarser than q, whose every step is rounded so."""
        if rope is None:
            return True
        weight = getattr(self.proj, "weight", None)
        if weight is None:  # a wrapper: q itself says in which dtype it is
            return False
        dtype = autocast_dtype(weight) or weight.dtype
        return not any(each.requires_grad or torch.promote_types(dtype, each.dtype) != each.dtype for each in rope)

    def attend(self, qkv: Tensor, rope: Rope | None = None, **options: Any) -> Tensor:
        if rope is None or self.is_one_step(rope):
            return super().attend(qkv, rope=rope, **options)
        sin, cos = rope
        q, k, v = split_heads(qkv, self.num_heads)  # type: ignore[arg-type]
        prefix = q.shape[2] - sin.shape[-2]
        turn = rotary
        if torch.promote_types(q.dtype, sin.dtype) != sin.dtype:
            turn, q, k = plain_rotary, q.to(sin.dtype), k.to(sin.dtype)
        q, k = (turn(each, sin, cos, prefix=prefix, half=True).to(v.dtype) for each in (q, k))
        return join_heads(ops.attention(q, k, v))


def _biased(attn_bias: Any) -> str | None:
    return None if attn_bias is None else f"called with a {type(attn_bias).__name__} as attn_bias"


def _is_masked(qkv: Any) -> bool:
    """Whether this is DINOv3's LinearKMaskedBias, and may be read around."""
    return known.is_masked_linear(qkv) and parts.why_not_part("qkv", qkv) is None


def _project(qkv: Any, x: Tensor) -> Tensor:
    return ops.linear(x, *_packed(qkv)) if _is_masked(qkv) else parts.linear(qkv, x)


def _packed(qkv: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a Linear that may be read."""
    if not _is_masked(qkv) or qkv.bias is None:
        return qkv.weight, qkv.bias
    # the mask is read at each call: it is NaN until the model's weights are there
    return qkv.weight, qkv.bias * qkv.bias_mask.to(qkv.bias.dtype)


def _head_width(attn: Any) -> int:
    return attn.qkv.out_features // (3 * attn.num_heads)


def _attention_rule(mixin: type[Fused], owners: set[str], *arguments: str) -> Rule:
    return Rule(
        mixin,
        frozenset(owners),
        lambda attn: differs(attn, arguments, ("qkv", "proj"), ("attn_drop", "proj_drop")),
        lambda attn: hasattr(attn, "qkv") and is_integer(integer(getattr(attn, "num_heads", None))),
        lambda attn, tokens: {"rope": _random_rope(attn, tokens)} if "rope" in arguments else {},
    )


def _random_rope(attn: Any, tokens: Tensor) -> Rope:
    """Positions for a trial: of all tokens but the first."""
    width = _head_width(attn)
    angles = torch.linspace(0, 9, (tokens.shape[1] - 1) * width, dtype=tokens.dtype, device=tokens.device).view(
        -1, width
    )
    return angles.sin(), angles.cos()


# ---------------------------------------------------------------------------------------------------- feed-forward


class FusedMlp(Fused):
    """dinov2.layers.mlp.Mlp on `ops.mlp`: one dropout stands after the activation and at the end."""

    reads = ("fc1", "w12", "w1")
    axes = None

    def forward(self, x: Tensor) -> Tensor:
        if self.declines(x):
            return super().forward(x)
        with self.backend():
            return self.branch().run(x, False)[0]

    def branch(self, **options: Any) -> Branch:
        mlp: Any = self
        return dropped(mlp_branch(mlp.fc1, mlp.act, mlp.fc2, mlp.drop), mlp.drop)

    def parts(self) -> list[Part]:
        return [self.branch().part("")]


class FusedSwiGLU(FusedMlp):
    """DINOv2's SwiGLUFFN (w12, w3) and DINOv3's (w1, w2, w3)."""

    def branch(self, **options: Any) -> Branch:
        ffn: Any = self

        def gate(both: Tensor) -> Tensor:
            first, second = both.chunk(2, dim=-1)
            return F.silu(first) * second

        names = ("w12",) if getattr(ffn, "w12", None) is not None else ("w1", "w2")
        return gated_branch({name: getattr(ffn, name) for name in names}, gate, {"w3": ffn.w3}, act=F.silu)


# ----------------------------------------------------------------------------------------------------------- block


class FusedBlock(PreNormBlock):
    """dinov2.layers.block.Block, its adds run with the norms that follow them."""

    reads = ("norm1",)

    def forward(self, x: Tensor) -> Tensor:
        if self.declines(x, self.why_not_now):
            return super().forward(x)
        return self.run(x)

    def why_not_now(self) -> str | None:
        block: Any = self
        if not (block.training and block.sample_drop_ratio > self._dense_up_to()):
            return None
        return f"drop_path {block.sample_drop_ratio:g} in training: it runs a subset of the samples"

    def _dense_up_to(self) -> float:
        """The rate up to which the block drops paths of the whole batch."""
        return 0.1

    def sublayers(self, **options: Any) -> list[Sublayer]:
        block: Any = self
        drop_path = getattr(block, "drop_path1", None)  # DINOv2 uses the first one twice
        return [
            Sublayer("attn", block.norm1, branch_of("attn", block.attn, **options), block.ls1, drop_path),
            Sublayer("mlp", block.norm2, branch_of("mlp", block.mlp), block.ls2, drop_path),
        ]

    def parts(self) -> list[Part]:
        why_not = self.why_not_now()
        if why_not is None:
            return super().parts()
        return [Part("residual", "", why_not), *(each.branch.part(each.name) for each in self.sublayers())]


class FusedNestedTensorBlock(FusedBlock):
    """dinov2.layers.block.NestedTensorBlock: a tensor or a list of them."""

    def forward(self, x_or_x_list: Any) -> Any:
        tensors = x_or_x_list if isinstance(x_or_x_list, list) else [x_or_x_list]
        if any(self.declines(x, lambda: self.why_not_now() or self._dropped(x_or_x_list)) for x in tensors):
            return super(FusedBlock, self).forward(x_or_x_list)
        outputs = [self.run(x) for x in tensors]
        return outputs if isinstance(x_or_x_list, list) else outputs[0]

    def _dropped(self, x_or_x_list: Any) -> str | None:
        dropped = isinstance(x_or_x_list, list) and self.training and self.sample_drop_ratio > 0  # type: ignore[operator]
        return "called with a list in training with drop_path: it runs subsets of the samples" if dropped else None


class FusedSelfAttentionBlock(FusedBlock):
    """dinov3.layers.block.SelfAttentionBlock: a tensor or a list of them, with rotary positions for each."""

    def forward(self, x_or_x_list: Any, rope_or_rope_list: Any = None) -> Any:
        is_list = isinstance(x_or_x_list, list)
        tensors = x_or_x_list if is_list else [x_or_x_list]
        if any(self.declines(x, self.why_not_now) for x in tensors):
            return super(FusedBlock, self).forward(x_or_x_list, rope_or_rope_list)
        ropes = rope_or_rope_list if is_list and rope_or_rope_list is not None else [rope_or_rope_list] * len(tensors)
        outputs = [self.run(x, rope=rope) for x, rope in zip(tensors, ropes, strict=True)]
        return outputs if is_list else outputs[0]

    def _dense_up_to(self) -> float:
        return 0.0


def _is_block(module: nn.Module) -> bool:
    return isinstance(vars(module).get("sample_drop_ratio"), float | int)  # its own: wrappers hand on what is inside


_STEPS = ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")
_WITH_PATHS = (*_STEPS, "drop_path1", "drop_path2")
RULES = (
    Rule(
        FusedBlock,
        frozenset({"dinov2.layers.block.Block"}),
        lambda block: differs(block, ("x",), _WITH_PATHS),
        _is_block,
    ),
    Rule(
        FusedNestedTensorBlock,
        frozenset({"dinov2.layers.block.NestedTensorBlock"}),
        lambda block: differs(block, ("x_or_x_list",), _WITH_PATHS),
        _is_block,
    ),
    Rule(
        FusedSelfAttentionBlock,
        frozenset({"dinov3.layers.block.SelfAttentionBlock"}),
        lambda block: differs(block, ("x_or_x_list", "rope_or_rope_list"), _STEPS),
        _is_block,
        lambda block, tokens: {"rope_or_rope_list": _random_rope(block.attn, tokens)},
    ),
    _attention_rule(FusedAttention, {"dinov2.layers.attention.Attention"}, "x"),
    _attention_rule(FusedCausalAttention, {"dinov2.layers.attention.Attention"}, "x", "is_causal"),
    _attention_rule(FusedMemEffAttention, {"dinov2.layers.attention.MemEffAttention"}, "x", "attn_bias"),
    _attention_rule(FusedSelfAttention, {"dinov3.layers.attention.SelfAttention"}, "x", "attn_bias", "rope"),
    Rule(
        FusedMlp,
        frozenset({"dinov2.layers.mlp.Mlp", "dinov3.layers.ffn_layers.Mlp"}),
        lambda mlp: differs(mlp, ("x",), ("fc1", "act", "fc2", "drop")),
        lambda mlp: hasattr(mlp, "fc1") and hasattr(mlp, "fc2"),
    ),
    Rule(
        FusedSwiGLU,
        frozenset({"dinov2.layers.swiglu_ffn.SwiGLUFFN"}),
        lambda ffn: differs(ffn, ("x",), ("w12", "w3")),
        lambda ffn: hasattr(ffn, "w12"),
    ),
    Rule(
        FusedSwiGLU,
        frozenset({"dinov3.layers.ffn_layers.SwiGLUFFN"}),
        lambda ffn: differs(ffn, ("x",), ("w1", "w2", "w3")),
        lambda ffn: hasattr(ffn, "w2"),
    ),
)
