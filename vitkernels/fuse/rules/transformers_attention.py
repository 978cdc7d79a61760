"""Hugging Face transformers: attention of one image's tokens, text by text (read from transformers 5.23)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitkernels.fuse.rules.transformers_parts import FusedAttention, attention_rule, owners
from vitkernels.fuse.rules.transformers_spelling import Spelling


class FusedClipAttention(FusedAttention):
    """CLIPAttention and its copies."""

    spelling = Spelling(out="out_proj", heads="num_heads", scale="scale", dropout="dropout")


class FusedGitAttention(FusedClipAttention):
    """GitVisionAttention and its like: whether later tokens are hidden is the module's own affair."""

    spelling = Spelling(out="out_proj", heads="num_heads", scale="scale", dropout="dropout", is_causal="is_causal")


class FusedSiglipAttention(FusedClipAttention):
    """SiglipAttention and its copies: deaf to keywords."""

    hears_keywords = False


class FusedPhiAttention(FusedAttention):
    """Phi4MultimodalVisionAttention."""

    spelling = Spelling(out="out_proj", heads="num_heads")


class FusedTextAttention(FusedAttention):
    """Kosmos2_5VisionAttention: it asks the registry for an attribute that it never has, and so runs eager."""

    spelling = Spelling(("query", "key", "value"), "output", "n_heads", dropout="dropout")
    has_functions = False


class FusedPixAttention(FusedTextAttention):
    """Pix2StructVisionAttention."""

    has_functions = True


class FusedMllamaAttention(FusedAttention):
    """MllamaVisionAttention: without dropout."""

    spelling = Spelling(heads="num_heads")

    def _drops(self) -> bool:
        return False


class FusedInternAttention(FusedAttention):
    """InternVLVisionAttention and its copy: norms of q and k over all heads together."""

    spelling = Spelling(
        out="projection_layer",
        heads="num_heads",
        scale="scale",
        norms=("q_norm", "k_norm"),
        last="projection_dropout",
        is_causal=False,
    )


class FusedJanusAttention(FusedAttention):
    """JanusVisionAttention: norms of each head's q and k."""

    stock_only = ("q_norm", "k_norm")  # of the tokens of all images in a row
    spelling = Spelling(
        out="projection_layer",
        heads="num_heads",
        scale="scale",
        norms=("q_norm", "k_norm"),
        each_head=True,
        last="projection_dropout",
        is_causal="is_causal",
    )


class FusedMolmoAttention(FusedAttention):
    """Molmo2VisionAttention: to its own tokens; to others' it is its class's."""

    spelling = Spelling(heads="config.num_attention_heads", is_causal="is_causal")

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        options = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask, **kwargs}
        if self.leaves(hidden_states, **options):
            return super(FusedAttention, self).forward(hidden_states, **options)
        return self.attended(hidden_states, **options), None

    def why_not_call(self, attention_mask: Any = None, encoder_hidden_states: Any = None, **options: Any) -> str | None:
        if encoder_hidden_states is not None:
            return "called with encoder_hidden_states"
        return super().why_not_call(attention_mask, **options)


class FusedPackedProjection(FusedAttention):
    """Blip2Attention and its copies: one projection for q, k and v, and no mask."""

    spelling = Spelling(("qkv",), "projection", "num_heads", "scale")

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        if self.leaves(hidden_states, **kwargs):
            return super(FusedAttention, self).forward(hidden_states, **kwargs)
        return self.attended(hidden_states, **kwargs), None


class FusedBlipAttention(FusedPackedProjection):
    """BlipAttention: written out, and deaf to keywords."""

    spelling = Spelling(("qkv",), "projection", "num_heads", "scale", "dropout")
    has_functions = False
    hears_keywords = False


VIT_ATTENTION = attention_rule(
    FusedAttention,
    owners(
        """
        audio_spectrogram_transformer.ASTAttention beit.BeitAttention deit.DeiTAttention dinov2.Dinov2Attention
        dinov2_with_registers.Dinov2WithRegistersAttention ijepa.IJepaAttention lw_detr.LwDetrViTAttention
        pixio.PixioAttention rf_detr.RfDetrDinov2Attention tipsv2.Tipsv2VisionAttention vit.ViTAttention
        vit_mae.ViTMAEAttention vit_msn.ViTMSNAttention vivit.VivitAttention
        """
    ),
)
CLIP_ATTENTION = attention_rule(
    FusedClipAttention,
    owners(
        """
        altclip.AltCLIPAttention chinese_clip.ChineseCLIPVisionAttention clip.CLIPAttention clipseg.CLIPSegAttention
        metaclip_2.MetaClip2Attention unlimited_ocr.UnlimitedOcrAttention x_clip.XCLIPAttention
        """
    ),
)
OWL_ATTENTION = attention_rule(FusedClipAttention, owners("owlvit.OwlViTAttention owlv2.Owlv2Attention"))
GIT_ATTENTION = attention_rule(FusedGitAttention, owners("git.GitVisionAttention"))
KOSMOS_ATTENTION = attention_rule(FusedGitAttention, owners("kosmos2.Kosmos2VisionAttention"))
SIGLIP_ATTENTION = attention_rule(
    FusedSiglipAttention,
    owners(
        """
        aimv2.Aimv2Attention eomt.EomtAttention granite_docling.GraniteDoclingVisionAttention
        idefics2.Idefics2VisionAttention idefics3.Idefics3VisionAttention ovis2.Ovis2VisionAttention
        siglip.SiglipAttention siglip2.Siglip2Attention smolvlm.SmolVLMVisionAttention videomt.VideomtAttention
        """
    ),
)
RULES = (
    VIT_ATTENTION,
    CLIP_ATTENTION,
    OWL_ATTENTION,
    GIT_ATTENTION,
    KOSMOS_ATTENTION,
    SIGLIP_ATTENTION,
    attention_rule(FusedPhiAttention, owners("phi4_multimodal.Phi4MultimodalVisionAttention")),
    attention_rule(
        FusedMolmoAttention,
        owners("molmo2.Molmo2VisionAttention"),
        ("hidden_states", "encoder_hidden_states", "attention_mask", "kwargs"),
    ),
    attention_rule(FusedTextAttention, owners("kosmos2_5.Kosmos2_5VisionAttention")),
    attention_rule(FusedPixAttention, owners("pix2struct.Pix2StructVisionAttention")),
    attention_rule(FusedMllamaAttention, owners("mllama.MllamaVisionAttention")),
    attention_rule(
        FusedInternAttention, owners("internvl.InternVLVisionAttention qianfan_ocr.QianfanOCRVisionAttention")
    ),
    attention_rule(FusedJanusAttention, owners("janus.JanusVisionAttention")),
    attention_rule(
        FusedPackedProjection,
        owners("blip_2.Blip2Attention instructblip.InstructBlipAttention instructblipvideo.InstructBlipVideoAttention"),
        ("hidden_states", "kwargs"),
    ),
    attention_rule(FusedBlipAttention, owners("blip.BlipAttention"), ("hidden_states", "kwargs"), ("dropout",)),
)
