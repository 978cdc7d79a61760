"""The vision towers of Hugging Face transformers: of each model that has Transformer blocks for images or videos of its
own, the class that holds them (read from transformers 5.23). A name with a dot says in which of a model's files it is.
"""

from __future__ import annotations

import importlib

from torch import nn

_TOWERS = """
aimv2 Aimv2VisionModel
altclip AltCLIPVisionModel
beit BeitModel
blip BlipVisionModel
blip_2 Blip2VisionModel
bridgetower BridgeTowerVisionModel
chinese_clip ChineseCLIPVisionModel
clip CLIPVisionModel
clipseg CLIPSegVisionModel
cohere_compass CohereCompassVisionModel
cosmos3_edge Cosmos3EdgeVisionModel
cvt CvtModel
data2vec.data2vec_vision Data2VecVisionModel
deepseek_ocr2 DeepseekOcr2VisionModel
deit DeiTModel
dinat DinatModel
dinov2 Dinov2Model
dinov2_with_registers Dinov2WithRegistersModel
dinov3_vit DINOv3ViTModel
donut.donut_swin DonutSwinModel
dots3_note Dots3NoteVisionModel
dpt DPTModel
eomt EomtForUniversalSegmentation
eomt_dinov3 EomtDinov3ForUniversalSegmentation
ernie4_5_vl_moe Ernie4_5_VLMoeVisionTransformerPretrainedModel
exaone4_5 Exaone4_5_VisionModel
flava FlavaImageModel
florence2 Florence2VisionBackbone
gemma4 Gemma4VisionModel
git GitVisionModel
glm4v Glm4vVisionModel
glm4v_moe Glm4vMoeVisionModel
glm5_next Glm5NextVisionModel
glm_image GlmImageVisionModel
glm_ocr GlmOcrVisionModel
glpn GLPNModel
got_ocr2 GotOcr2VisionEncoder
granite_docling GraniteDoclingVisionModel
groupvit GroupViTVisionModel
hiera HieraModel
hunyuan_vl HunYuanVLVisionTransformer
idefics2 Idefics2VisionTransformer
idefics3 Idefics3VisionTransformer
ijepa IJepaModel
inkling InklingVisionModel
inkling2 Inkling2VisionModel
instructblip InstructBlipVisionModel
instructblipvideo InstructBlipVideoVisionModel
internvl InternVLVisionModel
janus JanusVisionModel
kimi_k25 Kimi_K25VisionModel
kosmos2 Kosmos2VisionModel
kosmos2_5 Kosmos2_5VisionModel
layoutlmv3 LayoutLMv3Model
levit LevitModel
lfm3_vl Lfm3VlVisionModel
llama4 Llama4VisionModel
lw_detr LwDetrViTBackbone
maskformer.maskformer_swin MaskFormerSwinModel
metaclip_2 MetaClip2VisionModel
mgp_str MgpstrModel
minicpm_ocr MiniCPMOcrVisionModel
minicpmv4_6 MiniCPMV4_6VisionModel
minicpmv4_7 MiniCPMV4_7VisionModel
minimax_m3_vl MiniMaxM3VLVisionModel
mlcd MLCDVisionModel
mllama MllamaVisionModel
mobilevit MobileViTModel
mobilevitv2 MobileViTV2Model
molmo2 Molmo2VisionModel
muse_glimmer MuseGlimmerVisionModel
muse_spark MuseSparkVisionModel
ovis2 Ovis2VisionModel
owlv2 Owlv2VisionModel
owlvit OwlViTVisionModel
paddleocr_vl PaddleOCRVisionModel
phi4_multimodal Phi4MultimodalVisionModel
pix2struct Pix2StructVisionModel
pixio PixioModel
pixtral PixtralVisionModel
pp_formulanet PPFormulaNetVisionModel
pvt PvtModel
pvt_v2 PvtV2Model
qianfan_ocr QianfanOCRVisionModel
qwen2_5_omni Qwen2_5OmniVisionEncoder
qwen2_5_vl Qwen2_5_VisionTransformerPretrainedModel
qwen2_vl Qwen2VisionTransformerPretrainedModel
qwen3_5 Qwen3_5VisionModel
qwen3_5_moe Qwen3_5MoeVisionModel
qwen3_omni_moe Qwen3OmniMoeVisionEncoder
qwen3_vl Qwen3VLVisionModel
qwen3_vl_moe Qwen3VLMoeVisionModel
qwen4_exp Qwen4ExpVisionModel
radio RadioModel
rf_detr RfDetrDinov2Backbone
sam SamVisionModel
sam2 Sam2HieraDetModel
sam3 Sam3ViTModel
sam_hq SamHQVisionModel
sapiens2 Sapiens2Model
segformer SegformerModel
seggpt SegGptModel
siglip SiglipVisionModel
siglip2 Siglip2VisionModel
slanext SLANeXtVisionEncoder
smolvlm SmolVLMVisionTransformer
step3p7 Step3p7VisionModel
swiftformer SwiftFormerModel
swin SwinModel
swin2sr Swin2SRModel
swinv2 Swinv2Model
timesformer TimesformerModel
tipsv2 Tipsv2VisionModel
tvp TvpModel
unlimited_ocr UnlimitedOcrVisionModel
video_llama_3 VideoLlama3VisionModel
videomae VideoMAEModel
videomt VideomtForUniversalSegmentation
videoprism VideoPrismVisionModel
vilt ViltModel
vit ViTModel
vit_mae ViTMAEModel
vit_msn ViTMSNModel
vitdet VitDetModel
vitpose_backbone VitPoseBackbone
vivit VivitModel
vjepa2 VJEPA2Model
x_clip XCLIPVisionModel
yolos YolosModel
"""
TOWERS: dict[str, str] = {line.split()[0]: line.split()[1] for line in _TOWERS.strip().splitlines()}


def tower_class(name: str) -> type[nn.Module]:
    """A tower's class.

    Args:
        name: of `TOWERS`.
    """
    package, _, file = name.partition(".")
    module = importlib.import_module(f"transformers.models.{package}.modeling_{file or package}")
    return getattr(module, TOWERS[name])  # type: ignore[no-any-return]


def build(name: str) -> nn.Module:
    """A tower in its config's own settings, on the device that is the default now."""
    cls = tower_class(name)
    return cls(cls.config_class())  # type: ignore[attr-defined,operator]
