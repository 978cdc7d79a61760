"""Hugging Face transformers: layers whose q and k are turned by their positions (read from transformers 5.23).

DINOv3 and its copies, MLCD, Step, Pixtral, Llama 4, V-JEPA 2. Packed images are in `transformers_packed`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from vitkernels.fuse.rules.transformers import FusedDinoLayer, FusedLayer, Names, layer_rule
from vitkernels.fuse.rules.transformers_parts import FusedAttention, attention_rule, owners
from vitkernels.fuse.rules.transformers_spelling import Spelling
from vitkernels.ops._steps import Called, HeadNorms, Positions
from vitkernels.residual import parts
from vitkernels.residual.sublayers import ROTARY, rotary

Tables = tuple[Tensor, Tensor]


# ------------------------------------------------------------------------------------------------------- attention


class FusedRopeAttention(FusedAttention):
    """DINOv3ViTAttention and its like: rotary positions on the patches' q and k, none on the prefix tokens'."""

    steps = ROTARY
    spelling = Spelling(heads="num_heads", dropout="dropout")
    has_prefix: ClassVar[bool] = True
    axes_of_tables: ClassVar[tuple[int, ...]] = (2, 3, 4)  # they broadcast to [B, H, N, K]
    of_images: ClassVar[bool] = False  # whether the first of three is one of images, and not of heads
    by_halves = True
    needs = ("position_embeddings",)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tables | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        options = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, **kwargs}
        if self.leaves(hidden_states, **options):
            return super(FusedAttention, self).forward(hidden_states, **options)
        return self.attended(hidden_states, **options), None

    def why_not_call(self, attention_mask: Any = None, position_embeddings: Any = None, **options: Any) -> str | None:
        for each in position_embeddings or ():
            if each.dim() not in self.axes_of_tables:
                return f"called with positions of {each.dim()} axes"
        return super().why_not_call(attention_mask, **options)

    def is_plain(self) -> bool:
        return False

    def positions(self, **options: Any) -> Positions:
        cos, sin = self.tables(**options)
        if self.of_images:
            cos, sin = (each[:, None] if each.dim() == 3 else each for each in (cos, sin))
        return Positions(sin, cos, None if self.has_prefix else 0)

    def tables(self, position_embeddings: Tables, **options: Any) -> Tables:
        """Cosines and sines of a call's tokens."""
        return position_embeddings

    def is_one_step(self, **options: Any) -> bool:
        """Positions that learn are plain torch's."""
        return super().is_one_step() and not any(each.requires_grad for each in self.tables(**options))

    def head_norms(self) -> HeadNorms | None:
        return HeadNorms(self.by_halves)

    def turned(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        sin, cos, prefix = self.positions(**options).of(q.shape[2])
        assert sin is not None
        assert cos is not None
        q, k = (rotary(each, sin, cos, prefix=prefix, half=self.by_halves) for each in (q, k))
        return q, k, v


def _grouped(packed: Tensor, heads: int, shared: int) -> list[Tensor]:
    """q, [B, heads, N, K], k and v, [B, shared, N, K], of the projections' results side by side."""
    each = packed.unflatten(-1, (heads + 2 * shared, -1)).transpose(1, 2)
    return list(each.split([heads, shared, shared], dim=1))


class FusedSapiensAttention(FusedRopeAttention):
    """Sapiens2Attention: norms of each head's q and k; in some layers several heads of q share those of k and v."""

    spelling = Spelling(heads="num_heads", dropout="dropout", norms=("q_norm", "k_norm"), each_head=True)

    def head_norms(self) -> HeadNorms | None:
        attn: Any = self
        if attn.num_key_value_heads != attn.num_heads:
            return None
        return FusedAttention.head_norms(self)

    def split(self, packed: Tensor) -> list[Tensor]:
        attn: Any = self
        q, k, v = _grouped(packed, attn.num_heads, attn.num_key_value_heads)
        return [parts.layer_norm(attn.q_norm, q).to(v.dtype), parts.layer_norm(attn.k_norm, k).to(v.dtype), v]


class FusedPixtralAttention(FusedRopeAttention):
    """PixtralAttention: every token has a position."""

    has_prefix = False
    axes_of_tables: ClassVar[tuple[int, ...]] = (2, 3)


class FusedOcrAttention(FusedPixtralAttention):
    """DeepseekOcr2VisionAttention, a language model's: several heads of q may share those of k and v."""

    spelling = Spelling(heads="config.num_attention_heads", is_causal="is_causal")
    axes_of_tables: ClassVar[tuple[int, ...]] = (3,)
    of_images = True

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: Tables,
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        options = {"position_embeddings": position_embeddings, "attention_mask": attention_mask, **kwargs}
        if self.leaves(hidden_states, past_key_values=past_key_values, **options):
            return super(FusedAttention, self).forward(hidden_states, past_key_values=past_key_values, **options)
        return self.attended(hidden_states, **options), None

    def why_not_now(self) -> str | None:
        attn: Any = self
        return "a window that slides" if attn.sliding_window is not None else super().why_not_now()

    def why_not_call(
        self,
        attention_mask: Any = None,
        position_embeddings: Any = None,
        past_key_values: Any = None,
        position_ids: Any = None,
        **options: Any,
    ) -> str | None:
        if past_key_values is not None:
            return "called with past_key_values"
        return super().why_not_call(attention_mask, position_embeddings, **options)

    def head_norms(self) -> HeadNorms | None:
        heads = self.config.num_attention_heads  # type: ignore[union-attr]
        return super().head_norms() if self.config.num_key_value_heads == heads else None  # type: ignore[union-attr]

    def split(self, packed: Tensor) -> list[Tensor]:
        attn: Any = self
        return _grouped(packed, attn.config.num_attention_heads, attn.config.num_key_value_heads)


class FusedStepAttention(FusedRopeAttention):
    """Step3p7VisionAttention: the same, by other names."""

    spelling = Spelling(out="out_proj", heads="num_heads", scale="scale", dropout="dropout")
    has_prefix = False
    axes_of_tables: ClassVar[tuple[int, ...]] = (2, 3)
    of_images = True

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: Tables,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        return super().forward(hidden_states, attention_mask, position_embeddings, **kwargs)


class FusedMlcdAttention(FusedStepAttention):
    """MLCDAttention."""

    stock_only = ("out_proj",)  # the sequence comes first there
    axes_of_tables: ClassVar[tuple[int, ...]] = (2,)
    spelling = Spelling(out="out_proj", heads="num_heads", scale="scale", dropout="dropout", is_causal="is_causal")


class FusedLlamaAttention(FusedRopeAttention):
    """Llama4VisionAttention: positions as complex numbers, and no mask whatever it is given."""

    spelling = Spelling(heads="num_heads", scale=None, is_causal=False)
    has_prefix = False
    by_halves = False
    needs = ("freqs_ci",)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        freqs_ci: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        options = {"freqs_ci": freqs_ci, "attention_mask": attention_mask, **kwargs}
        if self.leaves(hidden_states, **options):
            return super(FusedAttention, self).forward(hidden_states, past_key_values=past_key_values, **options)
        return self.attended(hidden_states, **options), None

    def why_not_call(  # type: ignore[override]
        self, attention_mask: Any = None, freqs_ci: Any = None, **options: Any
    ) -> str | None:
        return super().why_not_call(None, **options)

    def called(self, attention_mask: Tensor | None = None, **options: Any) -> Called:
        return super().called(None, **options)

    def tables(self, freqs_ci: Tensor, **options: Any) -> Tables:  # type: ignore[override]
        turns = freqs_ci.reshape(-1, int(self.head_dim) // 2).repeat_interleave(2, dim=-1)  # type: ignore[arg-type]
        return turns.real, turns.imag


class FusedJepaAttention(FusedAttention):
    """VJEPA2RopeAttention: positions in time, height and width turn a third of each head; by the module's own code."""

    steps = "linear, rotary of torch, attention, linear"
    spelling = Spelling(("query", "key", "value"), "proj", dropout="dropout_prob", is_causal="is_causal")

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, position_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.leaves(hidden_states, position_mask=position_mask):
            return super(FusedAttention, self).forward(hidden_states, position_mask)
        return self.attended(hidden_states, position_mask=position_mask), None

    def why_not_call(self, attention_mask: Any = None, **options: Any) -> str | None:
        return None

    def is_plain(self) -> bool:
        return False

    def turned(
        self, q: Tensor, k: Tensor, v: Tensor, position_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        attn: Any = self
        places = attn.get_position_ids(v.transpose(1, 2), masks=position_mask)
        q, k = (attn.apply_rotary_embeddings(each, places).to(v.dtype) for each in (q, k))
        return q, k, v


# ---------------------------------------------------------------------------------------------------------- layers


class FusedRopeLayer(FusedDinoLayer):
    """DINOv3ViTLayer: DINOv2's, with rotary positions."""

    needs = ("position_embeddings",)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tables | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, **kwargs}
        if self.leaves(hidden_states, **options):
            return super(FusedLayer, self).forward(hidden_states, **options)
        return self.run(hidden_states, **options)


class FusedPixtralLayer(FusedRopeLayer):
    """PixtralAttentionLayer."""

    names = Names(("attention_norm", "ffn_norm"), "attention", "feed_forward")

    def call(self, attn: Any, x: Tensor, **options: Any) -> Tensor:
        return attn(hidden_states=x, **options)[0]


class FusedOcrLayer(FusedRopeLayer):
    """DeepseekOcr2VisionEncoderLayer."""

    names = Names(("input_layernorm", "post_attention_layernorm"), "self_attn")

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Tables | None = None,
        **kwargs: Any,
    ) -> Tensor:
        given = {"position_ids": position_ids, "past_key_values": past_key_values, "use_cache": use_cache, **kwargs}
        return super().forward(hidden_states, attention_mask, position_embeddings, **given)

    def call(self, attn: Any, x: Tensor, **options: Any) -> Tensor:
        return attn(hidden_states=x, **options)[0]


class FusedStepLayer(FusedRopeLayer):
    """Step3p7VisionEncoderLayer."""

    names = Names(("layernorm_before", "layernorm_after"), "self_attn", scales=("lambda_1", "lambda_2"))


class FusedMlcdLayer(FusedRopeLayer):
    """MLCDEncoderLayer."""

    names = Names(("layer_norm1", "layer_norm2"), "self_attn")

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: Tables,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        return super().forward(hidden_states, attention_mask, position_embeddings, **kwargs)

    def call(self, attn: Any, x: Tensor, **options: Any) -> Tensor:
        return attn(hidden_states=x, **options)[0]


class FusedLlamaLayer(FusedLayer):
    """Llama4VisionEncoderLayer."""

    names = Names(("input_layernorm", "post_attention_layernorm"), "self_attn")

    def forward(  # type: ignore[override]
        self,
        hidden_state: Tensor,
        freqs_ci: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[Tensor, ...]:
        options = {"freqs_ci": freqs_ci, "attention_mask": attention_mask}
        if self.declines(hidden_state, lambda: "called with output_attentions" if output_attentions else None):
            return super(FusedLayer, self).forward(hidden_state, output_attentions=output_attentions, **options)
        return (self.run(hidden_state, **options),)


class FusedJepaLayer(FusedLayer):
    """VJEPA2Layer, which returns the attention's weights beside its tokens."""

    names = Names(("norm1", "norm2"), "attention", drop_paths=("drop_path", "drop_path"))

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, position_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.leaves(hidden_states):
            return super(FusedLayer, self).forward(hidden_states, position_mask, **kwargs)
        return self.run(hidden_states, position_mask=position_mask), None

    def why_not_call(self, **options: Any) -> str | None:
        attn: Any = getattr(self, self.names.attention)
        eager = isinstance(attn, FusedAttention) and attn.implementation() == "eager"
        return "eager attention returns its weights" if eager else None


_ROPE = ("hidden_states", "attention_mask", "position_embeddings", "kwargs")
_STEP = ("hidden_states", "position_embeddings", "attention_mask", "kwargs")
RULES = (
    attention_rule(FusedRopeAttention, owners("dinov3_vit.DINOv3ViTAttention eomt_dinov3.EomtDinov3Attention"), _ROPE),
    attention_rule(FusedSapiensAttention, owners("sapiens2.Sapiens2Attention"), _ROPE, shares_keys=True),
    attention_rule(FusedPixtralAttention, owners("pixtral.PixtralAttention"), _ROPE),
    attention_rule(
        FusedOcrAttention,
        owners("deepseek_ocr2.DeepseekOcr2VisionAttention"),
        ("hidden_states", "position_embeddings", "attention_mask", "past_key_values", "kwargs"),
        shares_keys=True,
    ),
    attention_rule(FusedStepAttention, owners("step3p7.Step3p7VisionAttention"), _STEP),
    attention_rule(FusedMlcdAttention, owners("mlcd.MLCDAttention"), _STEP),
    attention_rule(
        FusedLlamaAttention,
        owners("llama4.Llama4VisionAttention"),
        ("hidden_states", "freqs_ci", "attention_mask", "past_key_values", "kwargs"),
    ),
    layer_rule(
        FusedRopeLayer,
        owners("dinov3_vit.DINOv3ViTLayer eomt_dinov3.EomtDinov3Layer sapiens2.Sapiens2Layer"),
        _ROPE,
    ),
    layer_rule(FusedPixtralLayer, owners("pixtral.PixtralAttentionLayer"), _ROPE),
    layer_rule(
        FusedOcrLayer,
        owners("deepseek_ocr2.DeepseekOcr2VisionEncoderLayer"),
        (*_ROPE[:2], "position_ids", "past_key_values", "use_cache", *_ROPE[2:]),
    ),
    layer_rule(FusedStepLayer, owners("step3p7.Step3p7VisionEncoderLayer"), _ROPE),
    layer_rule(FusedMlcdLayer, owners("mlcd.MLCDEncoderLayer"), _STEP),
    layer_rule(
        FusedLlamaLayer,
        owners("llama4.Llama4VisionEncoderLayer"),
        ("hidden_state", "freqs_ci", "attention_mask", "output_attentions"),
    ),
    attention_rule(
        FusedJepaAttention, owners("vjepa2.VJEPA2RopeAttention"), ("hidden_states", "position_mask"), ("dropout",)
    ),
    layer_rule(FusedJepaLayer, owners("vjepa2.VJEPA2Layer"), ("hidden_states", "position_mask", "kwargs")),
)
