"""Hugging Face transformers: the layers of its Vision Transformers (read from transformers 5.23).

Pre-norm layers with an attention of one image's tokens. The modules inside are in `transformers_attention` and
`transformers_mlp`; layers with rotary positions, with packed images, and layers that spread a sub-layer over several
modules, have pages of their own.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from vitkernels.fuse.around import attention_of
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.transformers_parts import FusedAttention, owners
from vitkernels.fuse.rules.transformers_spelling import why_not_without
from vitkernels.fuse.swap import PreNormBlock, branch_of
from vitkernels.residual import known
from vitkernels.residual.stream import Branch, Sublayer
from vitkernels.residual.sublayers import dropped

known.DROP_PATHS.update(
    dict.fromkeys(
        owners(
            """
            beit.BeitDropPath cvt.CvtDropPath data2vec.data2vec_vision.Data2VecVisionDropPath dinat.DinatDropPath
            dinov2.Dinov2DropPath dinov2_with_registers.Dinov2WithRegistersDropPath dinov3_vit.Dinov3ViTDropPath
            donut.donut_swin.DonutDropPath eomt.EomtDropPath eomt_dinov3.EomtDinov3DropPath florence2.Florence2DropPath
            glpn.GlpnDropPath hiera.HieraDropPath maskformer.maskformer_swin.MaskFormerDropPath mgp_str.MgpStrDropPath
            pixio.PixioDropPath pvt.PvtDropPath pvt_v2.PvtV2DropPath qianfan_ocr.QianfanOCRDropPath radio.RadioDropPath
            rf_detr.RfDetrDinov2DropPath sapiens2.Sapiens2DropPath segformer.SegformerDropPath seggpt.SegGptDropPath
            swin.SwinDropPath swin2sr.Swin2SRDropPath swinv2.Swinv2DropPath timesformer.TimesformerDropPath
            tipsv2.Tipsv2VisionDropPath videomt.VideomtDropPath vitdet.VitDetDropPath vjepa2.VJEPA2DropPath
            x_clip.XCLIPDropPath
            """
        ),
        known.draw_uniform,
    )
)
known.LAYER_SCALES.update(
    dict.fromkeys(
        owners(
            """
            dinov2.Dinov2LayerScale dinov2_with_registers.Dinov2WithRegistersLayerScale
            dinov3_vit.DINOv3ViTLayerScale eomt.EomtLayerScale eomt_dinov3.EomtDinov3LayerScale
            radio.RadioLayerScale rf_detr.RfDetrDinov2LayerScale sapiens2.Sapiens2LayerScale
            tipsv2.Tipsv2VisionLayerScale videomt.VideomtLayerScale
            """
        ),
        "lambda1",
    )
)


@dataclass(frozen=True, slots=True)
class Names:
    """What a text calls the parts of its layer, of the attention's step and of the feed-forward's."""

    norms: tuple[str, str]
    attention: str
    mlp: str = "mlp"
    scales: tuple[str, str] | None = None
    drop_paths: tuple[str, str] | None = None
    dropouts: tuple[str | None, str | None] = (None, None)

    def children(self) -> set[str]:
        """Those that are modules in every layer of the text."""
        given = (*self.norms, self.attention, self.mlp, *(self.drop_paths or ()), *self.dropouts)
        return {name for name in given if name is not None}


class FusedLayer(PreNormBlock):
    """What the layers share: pre-norm, attention, feed-forward; called with tokens and keywords for the attention."""

    names: ClassVar[Names]
    needs: ClassVar[tuple[str, ...]] = ()  # keywords

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if self.leaves(hidden_states, attention_mask=attention_mask, **kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs)
        return self.run(hidden_states, attention_mask=attention_mask, **kwargs)

    def leaves(self, x: Tensor, **options: Any) -> bool:
        """Whether a call with these keywords for the attention belongs to the layer's own class."""
        return self.declines(
            x,
            lambda: why_not_without(self.needs, options) or self.why_not_call(**options),
            options.get("attention_mask"),
        )

    def why_not_call(self, **options: Any) -> str | None:
        """Why a call with these keywords is more than residual steps, or None where it is not."""
        return None

    def reader(self) -> object:
        return getattr(self, self.names.norms[0], None)

    def sublayers(self, **options: Any) -> list[Sublayer]:
        names = self.names
        one, two = (getattr(self, name) for name in names.norms)
        scales, drop_paths = (
            [None, None] if pair is None else [getattr(self, name) for name in pair]
            for pair in (names.scales, names.drop_paths)
        )
        dropouts = [None if name is None else getattr(self, name) for name in names.dropouts]
        attention, feed_forward = self.attention_branch(**options), self.mlp_branch()
        return [
            Sublayer(names.attention, one, dropped(attention, dropouts[0]), scales[0], drop_paths[0]),
            Sublayer(names.mlp, two, dropped(feed_forward, dropouts[1]), scales[1], drop_paths[1]),
        ]

    def attention_branch(self, **options: Any) -> Branch:
        """By its parts where they serve this call, else as the layer itself calls it."""
        name = self.names.attention
        attn = getattr(self, name)
        why_not = attn.why_not_call(**options) if isinstance(attn, FusedAttention) else None
        if why_not is not None:
            return Branch(lambda x, bias_apart: (self.call(attn, x, **options), None), "", None, why_not)
        return attention_of(name, attn, lambda x: self.call(attn, x, **options), **options)

    def call(self, attn: nn.Module, x: Tensor, **options: Any) -> Tensor:
        """The attention as the layer's own class calls it."""
        return attn(x, **options)[0]

    def mlp_branch(self) -> Branch:
        """The branch of the second step."""
        return branch_of(self.names.mlp, getattr(self, self.names.mlp))


class FusedViTLayer(FusedLayer):
    """ViTLayer and its copies: a dropout after each sub-layer."""

    names = Names(("layernorm_before", "layernorm_after"), "attention", dropouts=("dropout", "dropout"))

    def call(self, attn: nn.Module, x: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        return attn(x, attention_mask, **options)[0]


class FusedPixioLayer(FusedViTLayer):
    """PixioLayer: the same with a DropPath."""

    names = Names(
        ("layernorm_before", "layernorm_after"),
        "attention",
        drop_paths=("drop_path", "drop_path"),
        dropouts=("dropout", "dropout"),
    )


class FusedDinoLayer(FusedLayer):
    """Dinov2Layer and its copies: LayerScale, and one DropPath for both sub-layers."""

    names = Names(
        ("norm1", "norm2"),
        "attention",
        scales=("layer_scale1", "layer_scale2"),
        drop_paths=("drop_path", "drop_path"),
    )


class FusedClipLayer(FusedLayer):
    """CLIPEncoderLayer and its copies, of the image's tower and of the text's."""

    names = Names(("layer_norm1", "layer_norm2"), "self_attn")

    def call(self, attn: nn.Module, x: Tensor, **options: Any) -> Tensor:
        return attn(hidden_states=x, **options)[0]


class FusedAim2Layer(FusedLayer):
    """Aimv2EncoderLayer and its copy."""

    names = Names(("rms_norm1", "rms_norm2"), "attention", "ffn")
    call = FusedClipLayer.call


class FusedKeywordLayer(FusedLayer):
    """A layer that takes tokens, and hands every keyword to its attention."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if self.leaves(hidden_states, **kwargs):
            return super(FusedLayer, self).forward(hidden_states, **kwargs)
        return self.run(hidden_states, **kwargs)


class FusedBlipLayer(FusedKeywordLayer):
    """BlipEncoderLayer and its copies."""

    names = FusedClipLayer.names
    call = FusedClipLayer.call


class FusedQianfanLayer(FusedKeywordLayer):
    """QianfanOCRVisionLayer."""

    names = Names(
        ("layernorm_before", "layernorm_after"),
        "attention",
        scales=("lambda_1", "lambda_2"),
        drop_paths=("drop_path1", "drop_path2"),
        dropouts=(None, "dropout"),
    )


class FusedInternLayer(FusedLayer):
    """InternVLVisionLayer."""

    names = Names(
        ("layernorm_before", "layernorm_after"),
        "attention",
        scales=("lambda_1", "lambda_2"),
        dropouts=(None, "dropout"),
    )

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        if self.leaves(hidden_states):
            return super(FusedLayer, self).forward(hidden_states)
        return self.run(hidden_states)


class FusedBeitLayer(FusedLayer):
    """BeitLayer: LayerScale or none, and a relative bias that is the attention's mask."""

    names = Names(
        ("layernorm_before", "layernorm_after"),
        "attention",
        scales=("lambda_1", "lambda_2"),
        drop_paths=("drop_path", "drop_path"),
        dropouts=("dropout", "dropout"),
    )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        layer: Any = self
        relative = layer.relative_position_bias
        unknown = relative is not None and resolution is None  # the layer's own error is the one to see
        if self.declines(hidden_states, lambda: "called without a resolution" if unknown else None, attention_mask):
            return super(FusedLayer, self).forward(
                hidden_states, attention_mask, interpolate_pos_encoding, resolution, **kwargs
            )
        if relative is not None:
            window = tuple(size // layer.patch_size for size in resolution)  # type: ignore[union-attr]
            bias = relative(window, interpolate_pos_encoding, dim_size=hidden_states.shape[1])
            attention_mask = bias if attention_mask is None else bias + attention_mask
        return self.run(hidden_states, attention_mask=attention_mask, **kwargs)

    def sublayers(self, **options: Any) -> list[Sublayer]:
        steps = super().sublayers(**options)
        for step in steps:
            step.scale = step.scale if isinstance(step.scale, Tensor) else None  # 1.0, where there is no LayerScale
        return steps


class FusedTextVisionLayer(FusedLayer):
    """Kosmos2_5VisionLayer."""

    names = Names(("pre_attention_layer_norm", "pre_mlp_layer_norm"), "attention")


class FusedPix2StructLayer(FusedTextVisionLayer):
    """Pix2StructVisionLayer, which returns the attention's weights beside its tokens."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.leaves(hidden_states, attention_mask=attention_mask, **kwargs):
            return super(FusedLayer, self).forward(hidden_states, attention_mask, **kwargs)
        return self.run(hidden_states, attention_mask=attention_mask, **kwargs), None

    def why_not_call(self, **options: Any) -> str | None:
        attn: Any = getattr(self, self.names.attention)
        eager = isinstance(attn, FusedAttention) and attn.implementation() == "eager"
        return "eager attention returns its weights" if eager else None


class FusedMllamaLayer(FusedLayer):
    """MllamaVisionEncoderLayer: in some, a learned gate on all features of a branch alike."""

    names = Names(("input_layernorm", "post_attention_layernorm"), "self_attn")

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if self.leaves(hidden_states, attention_mask=attention_mask):
            return super(FusedLayer, self).forward(hidden_states, attention_mask)
        return self.run(hidden_states, attention_mask=attention_mask)

    def sublayers(self, **options: Any) -> list[Sublayer]:
        layer: Any = self
        steps = super().sublayers(**options)
        if layer.is_gated:
            for step, gate in zip(steps, (layer.gate_attn, layer.gate_ffn), strict=True):
                step.scale = lambda gate=gate: gate.tanh().expand(layer.hidden_size)
        return steps


_ARGUMENTS = ("hidden_states", "attention_mask", "kwargs")


def layer_rule(
    mixin: type[FusedLayer],
    names: frozenset[str],
    arguments: Collection[str] = _ARGUMENTS,
    optional: Collection[str] = (),
    parameters: Collection[str] = (),
) -> Rule:
    """The rule of one text; its children are those that the mixin's names say."""
    children = mixin.names.children()
    scales = mixin.names.scales or ()

    def contract(layer: nn.Module) -> str | None:
        modules = {name for name in scales if name in layer._modules}
        return differs(layer, arguments, children | modules, optional, {*parameters, *scales} - modules)

    return Rule(mixin, names, contract)


RULES = (
    layer_rule(
        FusedViTLayer,
        owners(
            """
            audio_spectrogram_transformer.ASTLayer deit.DeiTLayer ijepa.IJepaLayer videoprism.VideoPrismLayer
            vit.ViTLayer vit_mae.ViTMAELayer vit_msn.ViTMSNLayer vivit.VivitLayer
            """
        ),
    ),
    layer_rule(FusedPixioLayer, owners("pixio.PixioLayer")),
    layer_rule(
        FusedDinoLayer,
        owners(
            """
            dinov2.Dinov2Layer dinov2_with_registers.Dinov2WithRegistersLayer eomt.EomtLayer radio.RadioLayer
            tipsv2.Tipsv2VisionLayer videomt.VideomtLayer
            """
        ),
    ),
    layer_rule(
        FusedClipLayer,
        owners(
            """
            altclip.AltCLIPEncoderLayer chinese_clip.ChineseCLIPVisionLayer clip.CLIPEncoderLayer
            clipseg.CLIPSegEncoderLayer git.GitVisionEncoderLayer granite_docling.GraniteDoclingEncoderLayer
            groupvit.GroupViTEncoderLayer hunyuan_vl.HunYuanVLVisionBlock idefics2.Idefics2EncoderLayer
            idefics3.Idefics3EncoderLayer janus.JanusVisionEncoderLayer kosmos2.Kosmos2VisionEncoderLayer
            metaclip_2.MetaClip2EncoderLayer minicpm_ocr.MiniCPMOcrVisionEncoderLayer
            minicpmv4_6.MiniCPMV4_6VisionEncoderLayer minicpmv4_7.MiniCPMV4_7VisionEncoderLayer
            molmo2.Molmo2VisionEncoderLayer owlv2.Owlv2EncoderLayer owlvit.OwlViTEncoderLayer
            phi4_multimodal.Phi4MultimodalVisionEncoderLayer siglip.SiglipEncoderLayer siglip2.Siglip2EncoderLayer
            smolvlm.SmolVLMEncoderLayer unlimited_ocr.UnlimitedOcrEncoderLayer x_clip.XCLIPEncoderLayer
            """
        ),
    ),
    layer_rule(
        FusedBlipLayer,
        owners(
            """
            blip.BlipEncoderLayer blip_2.Blip2EncoderLayer instructblip.InstructBlipEncoderLayer
            instructblipvideo.InstructBlipVideoEncoderLayer
            """
        ),
        ("hidden_states", "kwargs"),
    ),
    layer_rule(FusedAim2Layer, owners("aimv2.Aimv2EncoderLayer ovis2.Ovis2VisionEncoderLayer")),
    layer_rule(FusedQianfanLayer, owners("qianfan_ocr.QianfanOCRVisionLayer"), ("hidden_states", "kwargs")),
    layer_rule(FusedInternLayer, owners("internvl.InternVLVisionLayer"), ("hidden_states",)),
    layer_rule(
        FusedBeitLayer,
        owners("beit.BeitLayer"),
        ("hidden_states", "attention_mask", "interpolate_pos_encoding", "resolution", "kwargs"),
        ("relative_position_bias",),
    ),
    layer_rule(FusedTextVisionLayer, owners("kosmos2_5.Kosmos2_5VisionLayer")),
    layer_rule(FusedPix2StructLayer, owners("pix2struct.Pix2StructVisionLayer")),
    layer_rule(
        FusedMllamaLayer,
        owners("mllama.MllamaVisionEncoderLayer"),
        ("hidden_states", "attention_mask"),
        (),
        ("gate_attn", "gate_ffn"),
    ),
)
