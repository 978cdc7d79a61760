"""Hugging Face transformers: towers that pack images of many sizes into one row of tokens (read from 5.23).

Qwen-VL and its relatives, GLM-V, Kimi, PaddleOCR, VideoLLaMA and others: `cu_seqlens` says where each image begins, and
attention stays within it.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.rules.transformers import FusedLayer, Names, layer_rule
from vitkernels.fuse.rules.transformers_parts import FusedAttention, attention_rule, owners
from vitkernels.fuse.rules.transformers_spelling import Spelling
from vitkernels.ops._steps import Called, HeadNorms, Images, Positions
from vitkernels.residual import parts
from vitkernels.residual.sublayers import ROTARY, rotary

Tables = tuple[Tensor, Tensor]  # cosines and sines


def attention_apart(q: Tensor, k: Tensor, v: Tensor, images: Images, scale: float | None = None) -> Tensor:
    """Attention of each image to itself, side by side.

    Args:
        q: [1, H, T, K], the images one behind the other.
        k, v: [1, G, T, K]; each of the G heads serves H / G of q's.
        images: where they end.
        scale: factor on the scores.

    Returns:
        [1, T, H * K].
    """
    ends, longest = images
    q, k, v = (each[0].transpose(0, 1) for each in (q, k, v))
    return ops.attention_varlen(q, k, v, ends, ends, longest, longest, scale=scale).flatten(1)[None]


def images_of(cu_seqlens: Tensor, max_seqlen: Any, device: torch.device) -> Images:
    """Where images end, [S + 1] integers from 0 to T, and tokens of the longest: an int, a tensor of one, or None to
    look."""
    ends = cu_seqlens.to(device, torch.int32)
    return Images(ends, int(ends.diff().max()) if max_seqlen is None else int(max_seqlen))


# ------------------------------------------------------------------------------------------------------- attention


class FusedPackedAttention(FusedAttention):
    """Qwen2-VL's VisionAttention and its copies: one projection, rotary positions, attention within each image."""

    axes = 2
    steps = ROTARY
    spelling = Spelling(("qkv",), "proj", "num_heads", is_causal=False)
    returns_weights = False
    is_packed = True
    by_halves = True
    needs: ClassVar[tuple[str, ...]] = ("cu_seqlens", "position_embeddings")

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: Tables | None = None,
        max_seqlen: Any = None,
        **kwargs: Any,
    ) -> Any:
        options = {
            "cu_seqlens": cu_seqlens,
            "position_embeddings": position_embeddings,
            "max_seqlen": max_seqlen,
            **kwargs,
        }
        if self.leaves(hidden_states, **options):
            return super(FusedAttention, self).forward(hidden_states, **options)
        return self.returned(self.attended(hidden_states, **options))

    def returned(self, out: Tensor) -> Any:
        """What the stock module returns."""
        return (out, None) if self.returns_weights else out

    def why_not_call(  # type: ignore[override]
        self,
        cu_seqlens: Any = None,
        position_embeddings: Any = None,
        max_seqlen: Any = None,
        attention_mask: Any = None,
        **options: Any,
    ) -> str | None:
        for each in position_embeddings or ():
            if each.dim() != 2:
                return f"called with positions of {each.dim()} axes"
        return super().why_not_call(None, **options)

    def is_plain(self) -> bool:
        return False

    def is_one_step(self, position_embeddings: Tables | None = None, **options: Any) -> bool:
        """Positions that learn are plain torch's; in compiled code the longest image is a size, and no constant."""
        learned = position_embeddings is not None and any(each.requires_grad for each in position_embeddings)
        return not learned and not torch.compiler.is_compiling() and super().is_one_step()

    def head_norms(self) -> HeadNorms | None:
        return HeadNorms(self.by_halves) if self.spelling.norms is None else super().head_norms()

    def called(  # type: ignore[override]
        self, cu_seqlens: Tensor, position_embeddings: Tables | None = None, max_seqlen: Any = None, **options: Any
    ) -> Called:
        cos, sin = position_embeddings or (None, None)
        like = next(itertools.chain(self.parameters(), self.buffers()), cu_seqlens) if cos is None else cos
        return Called(positions=Positions(sin, cos), images=images_of(cu_seqlens, max_seqlen, like.device))

    def attend(self, packed: Tensor, **options: Any) -> Tensor:
        if self.is_one_step(**options):
            return super().attend(packed, **options)
        (sin, cos, _), images = self.called(**options)[2:]
        q, k, v = self.split(packed if packed.dim() == 3 else packed[None])
        if sin is not None and cos is not None:
            q, k = (self.placed(each, cos, sin) for each in (q, k))
        assert images is not None
        return attention_apart(q, k, v, images, self.score_factor()).view(*packed.shape[:-1], -1)

    def placed(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """q or k, [1, H, T, K], turned by its tokens' positions, [T, K]; what of a head has none stays as it is."""
        width = cos.shape[-1]
        turned = rotary(x[..., :width], sin, cos, half=self.by_halves)
        return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)


class FusedNormedAttention(FusedPackedAttention):
    """GlmOcrVisionAttention and its copies: with norms of each head's q and k."""

    stock_only = ("q_norm", "k_norm")
    spelling = Spelling(("qkv",), "proj", "num_heads", norms=("q_norm", "k_norm"), each_head=True, is_causal=False)


class FusedGroupedAttention(FusedPackedAttention):
    """Exaone4_5_VisionAttention: several heads of q share those of k and v (Ainslie et al. 2023)."""

    def head_norms(self) -> None:
        return None

    def split(self, packed: Tensor) -> list[Tensor]:
        attn: Any = self
        three = packed.split([attn.q_dim, attn.kv_dim, attn.kv_dim], dim=-1)
        return [each.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for each in three]


class FusedKimiAttention(FusedPackedAttention):
    """Kimi_K25VisionAttention and its copies: three projections."""

    spelling = Spelling(out="proj", heads="num_heads", is_causal=False)


class FusedOmniAttention(FusedPackedAttention):
    """Qwen2_5OmniVisionAttention: the same by other names."""

    spelling = Spelling(("q", "k", "v"), "proj", "num_heads", is_causal=False)


class FusedPaddleAttention(FusedPackedAttention):
    """PaddleOCRVisionAttention and its copies, which return weights too."""

    spelling = Spelling(out="out_proj", heads="num_heads", is_causal=False)
    returns_weights = True


class FusedMiniMaxAttention(FusedPaddleAttention):
    """MiniMaxM3VLVisionAttention: the last elements of a head have no position."""

    def head_norms(self) -> None:
        return None


class FusedPairwiseAttention(FusedPaddleAttention):
    """Inkling2VisionAttention: neighbours make a pair."""

    by_halves = False


class FusedRadioAttention(FusedAttention):
    """RadioAttention: of one image's tokens, or of packed ones."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        options = {"attention_mask": attention_mask, "cu_seqlens": cu_seqlens, **kwargs}
        if self.leaves(hidden_states, **options):
            return super(FusedAttention, self).forward(hidden_states, **options)
        return self.attended(hidden_states, **options), None

    def why_not_call(self, attention_mask: Any = None, cu_seqlens: Any = None, **options: Any) -> str | None:
        if cu_seqlens is not None:
            return "called with cu_seqlens"
        return super().why_not_call(attention_mask, **options)


# ---------------------------------------------------------------------------------------------------------- layers


class FusedPackedLayer(FusedLayer):
    """Qwen2VLVisionBlock and its copies."""

    axes = 2
    names = Names(("norm1", "norm2"), "attn")
    needs: ClassVar[tuple[str, ...]] = ("cu_seqlens", "position_embeddings")

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: Tables | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = {"cu_seqlens": cu_seqlens, "position_embeddings": position_embeddings, **kwargs}
        if self.leaves(hidden_states, **options):
            return super(FusedLayer, self).forward(hidden_states, **options)
        return self.run(hidden_states, **options)

    def call(self, attn: nn.Module, x: Tensor, **options: Any) -> Tensor:
        return attn(x, **options)


class FusedPaddleLayer(FusedPackedLayer):
    """PaddleOCRVisionEncoderLayer and its copy."""

    names = Names(("layer_norm1", "layer_norm2"), "self_attn")
    call = FusedLayer.call


class FusedInklingLayer(FusedPaddleLayer):
    """Inkling2VisionEncoderLayer."""

    names = Names(("layernorm_before", "layernorm_after"), "self_attn", scales=("lambda_1", "lambda_2"))


class FusedMiniMaxLayer(FusedPackedLayer):
    """MiniMaxM3VLVisionEncoderLayer: tokens as a batch of one, and a mask that is not looked at."""

    axes = 3
    names = Names(("layer_norm1", "layer_norm2"), "self_attn")

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if self.leaves(hidden_states, **kwargs):
            return super(FusedLayer, self).forward(hidden_states, attention_mask, **kwargs)
        return self.run(hidden_states[0], **kwargs)[None]

    def why_not_call(self, **options: Any) -> str | None:
        """Its modules would get the tokens without their first axis."""
        named = ((name, getattr(self, name)) for name in self.names.norms)
        reasons = (parts.why_not_layer_norm(name, norm) for name, norm in named)
        return next(filter(None, reasons), None) or self.mlp_branch().why_not

    call = FusedLayer.call


_PACKED = ("hidden_states", "cu_seqlens", "position_embeddings", "max_seqlen", "kwargs")
_LAYER = ("hidden_states", "cu_seqlens", "position_embeddings", "kwargs")
RULES = (
    attention_rule(
        FusedPackedAttention,
        owners(
            """
            cohere_compass.CohereCompassVisionAttention ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention
            glm4v.Glm4vVisionAttention glm4v_moe.Glm4vMoeVisionAttention qwen2_5_vl.Qwen2_5_VLVisionAttention
            qwen2_vl.VisionAttention qwen3_5.Qwen3_5VisionAttention qwen3_5_moe.Qwen3_5MoeVisionAttention
            qwen3_omni_moe.Qwen3OmniMoeVisionAttention qwen3_vl.Qwen3VLVisionAttention
            qwen3_vl_moe.Qwen3VLMoeVisionAttention qwen4_exp.Qwen4ExpVisionAttention
            """
        ),
        _PACKED,
    ),
    attention_rule(
        FusedNormedAttention,
        owners("dots3_note.Dots3NoteVisionAttention glm5_next.Glm5NextVisionAttention glm_ocr.GlmOcrVisionAttention"),
        _PACKED,
    ),
    attention_rule(
        FusedKimiAttention,
        owners(
            """
            kimi_k25.Kimi_K25VisionAttention muse_glimmer.MuseGlimmerVisionAttention
            muse_spark.MuseSparkVisionAttention
            """
        ),
        _PACKED,
    ),
    attention_rule(FusedGroupedAttention, owners("exaone4_5.Exaone4_5_VisionAttention"), _PACKED, shares_keys=True),
    attention_rule(FusedOmniAttention, owners("qwen2_5_omni.Qwen2_5OmniVisionAttention"), _PACKED),
    attention_rule(
        FusedPaddleAttention,
        owners("paddleocr_vl.PaddleOCRVisionAttention video_llama_3.VideoLlama3VisionAttention"),
        _PACKED,
    ),
    attention_rule(FusedMiniMaxAttention, owners("minimax_m3_vl.MiniMaxM3VLVisionAttention"), _PACKED),
    attention_rule(FusedPairwiseAttention, owners("inkling2.Inkling2VisionAttention"), _PACKED),
    attention_rule(
        FusedRadioAttention,
        owners("radio.RadioAttention"),
        ("hidden_states", "attention_mask", "cu_seqlens", "kwargs"),
    ),
    layer_rule(
        FusedPackedLayer,
        owners(
            """
            cohere_compass.CohereCompassVisionBlock dots3_note.Dots3NoteVisionBlock
            ernie4_5_vl_moe.Ernie4_5_VLMoeVisionBlock exaone4_5.Exaone4_5_VisionBlock glm4v.Glm4vVisionBlock
            glm4v_moe.Glm4vMoeVisionBlock glm5_next.Glm5NextVisionBlock glm_ocr.GlmOcrVisionBlock
            kimi_k25.Kimi_K25VisionEncoderLayer muse_glimmer.MuseGlimmerVisionEncoderLayer
            muse_spark.MuseSparkVisionEncoderLayer qwen2_5_omni.Qwen2_5OmniVisionBlock
            qwen2_5_vl.Qwen2_5_VLVisionBlock qwen2_vl.Qwen2VLVisionBlock qwen3_5.Qwen3_5VisionBlock
            qwen3_5_moe.Qwen3_5MoeVisionBlock qwen3_omni_moe.Qwen3OmniMoeVisionBlock qwen3_vl.Qwen3VLVisionBlock
            qwen3_vl_moe.Qwen3VLMoeVisionBlock qwen4_exp.Qwen4ExpVisionBlock
            """
        ),
        _LAYER,
    ),
    layer_rule(
        FusedPaddleLayer,
        owners("paddleocr_vl.PaddleOCRVisionEncoderLayer video_llama_3.VideoLlama3VisionEncoderLayer"),
        _LAYER,
    ),
    layer_rule(FusedMiniMaxLayer, owners("minimax_m3_vl.MiniMaxM3VLVisionEncoderLayer")),
    layer_rule(FusedInklingLayer, owners("inkling2.Inkling2VisionEncoderLayer"), _LAYER),
)
