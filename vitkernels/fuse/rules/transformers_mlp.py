"""Hugging Face transformers: the feed-forward modules of its Vision Transformers (read from transformers 5.23)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.transformers_parts import owners
from vitkernels.fuse.swap import Fused
from vitkernels.residual import parts, sublayers
from vitkernels.residual.stream import Branch, Part


class FusedMlp(Fused):
    """Two projections and an activation, on `ops.mlp`."""

    names: ClassVar[tuple[str, str, str]] = ("fc1", "activation_fn", "fc2")
    axes = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.declines(hidden_states, self.why_not_now):
            return super().forward(hidden_states)
        with self.backend():
            return self.branch().run(hidden_states, False)[0]

    def reader(self) -> object:
        return getattr(self, self.names[0])

    def branch(self, **options: Any) -> Branch:
        first, act, last = (getattr(self, name) for name in self.names)
        return sublayers.mlp_branch(first, act, last, names=(self.names[0], self.names[2]))

    def parts(self) -> list[Part]:
        return [self.branch().part("")]


class FusedXMlp(FusedMlp):
    """The same where the tokens are called x."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class FusedStateMlp(FusedMlp):
    """The same where they are called hidden_state."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        return super().forward(hidden_state)


class FusedUpDownMlp(FusedXMlp):
    """DINOv3ViTMLP."""

    names = ("up_proj", "act_fn", "down_proj")


class FusedActMlp(FusedXMlp):
    """Qwen2-VL's VisionMlp and its copies."""

    names = ("fc1", "act", "fc2")


class FusedPoseMlp(FusedStateMlp):
    """VitPoseBackboneMLP and VJEPA2MLP."""

    names = ("fc1", "activation", "fc2")


class FusedLinearMlp(FusedStateMlp):
    """Qwen3VLVisionMLP and its copies."""

    names = ("linear_fc1", "act_fn", "linear_fc2")


class FusedSamMlp(FusedMlp):
    """SamMLPBlock and its copies."""

    names = ("lin1", "act", "lin2")


class FusedSam3Mlp(FusedMlp):
    """Sam3MLP: a dropout before the activation."""

    def why_not_now(self) -> str | None:
        return None if parts.drops_nothing(self.dropout) else "a dropout before the activation"  # type: ignore[arg-type]


class FusedDropMlp(FusedMlp):
    """A dropout behind each product: the first's name, and the second's."""

    drops: ClassVar[tuple[str, str]] = ("dropout1", "dropout2")

    def branch(self, **options: Any) -> Branch:
        first, act, last = (getattr(self, name) for name in self.names)
        one, two = (getattr(self, name) for name in self.drops)
        branch = sublayers.mlp_branch(first, act, last, one, (self.names[0], self.names[2]))
        return sublayers.dropped(branch, two)


class FusedTwiceMlp(FusedDropMlp):
    """VitDetMlp and LwDetrViTMlp: one dropout behind both."""

    names = ("fc1", "act", "fc2")
    drops = ("drop", "drop")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class FusedMgpMlp(FusedDropMlp):
    """MgpstrMlp."""

    names = ("fc1", "act", "fc2")
    drops = ("drop", "drop")


class FusedPvtMlp(FusedDropMlp):
    """PvtFFN."""

    names = ("dense1", "intermediate_act_fn", "dense2")
    drops = ("dropout", "dropout")


class FusedGatedMlp(FusedMlp):
    """SwiGLU (Shazeer 2020) of DINOv2, DINOv3 and others."""

    names = ("gate_proj", "act_fn", "down_proj")
    other: ClassVar[str] = "up_proj"
    between: ClassVar[str | None] = None  # a dropout behind the gate

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def branch(self, **options: Any) -> Branch:
        gating, act, last = (getattr(self, name) for name in self.names)

        def gate(both: Tensor) -> Tensor:
            first, second = both.chunk(2, dim=-1)
            return act(first) * second

        projections = {self.names[0]: gating, self.other: getattr(self, self.other)}
        dropout = None if self.between is None else getattr(self, self.between)
        return sublayers.gated_branch(projections, gate, {self.names[2]: last}, dropout, act=act)


class FusedGatedStateMlp(FusedGatedMlp):
    """Qwen2_5_VLMLP and its copies."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        return super().forward(hidden_state)


class FusedLimitedMlp(FusedGatedStateMlp):
    """Glm5NextVisionMLP: both halves are kept within a limit, and the gate is torch's."""

    def branch(self, **options: Any) -> Branch:
        mlp: Any = self
        limit = mlp.swiglu_limit

        def gate(both: Tensor) -> Tensor:
            first, second = both.chunk(2, dim=-1)
            return mlp.act_fn(first.clamp(max=limit)) * second.clamp(min=-limit, max=limit)

        projections = {"gate_proj": mlp.gate_proj, "up_proj": mlp.up_proj}
        return sublayers.gated_branch(projections, gate, {"down_proj": mlp.down_proj})


class FusedWiMlp(FusedGatedMlp):
    """Pix2StructVisionMlp and its copy, which cast to the last product's dtype on their way."""

    names = ("wi_0", "act", "wo")
    other = "wi_1"
    between = "dropout"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)

    def why_not_now(self) -> str | None:
        mlp: Any = self
        # a last product kept wider than the rest: its input is cast between, which no branch does
        same = parts.why_not_part("", mlp.wo, nn.Linear) is not None or mlp.wo.weight.dtype == mlp.wi_0.weight.dtype
        return None if same else f"wo is in {mlp.wo.weight.dtype}"


def _mlp(mixin: type[FusedMlp], argument: str, names: frozenset[str], children: tuple[str, ...] = ()) -> Rule:
    return Rule(mixin, names, lambda mlp: differs(mlp, (argument,), (*mixin.names, *children)))


def _has_mlp_parts(module: nn.Module) -> bool:
    """Whether a module is made as `FusedMlp` expects: many models have a copy of it under another name."""
    return set(module._modules) == set(FusedMlp.names) and isinstance(module._modules["fc1"], nn.Linear)


MLP = Rule(
    FusedMlp,
    owners(
        """
        altclip.AltCLIPMLP audio_spectrogram_transformer.ASTMLP beit.BeitMLP blip.BlipMLP blip_2.Blip2MLP
        chinese_clip.ChineseCLIPVisionMLP clip.CLIPMLP clipseg.CLIPSegMLP cosmos3_edge.Cosmos3EdgeMLP deit.DeiTMLP
        dinov2.Dinov2MLP dinov2_with_registers.Dinov2WithRegistersMLP eomt.EomtMLP florence2.Florence2VisionMLP
        git.GitVisionMLP glm_image.GlmImageVisionMLP granite_docling.GraniteDoclingVisionMLP groupvit.GroupViTMLP
        hiera.HieraMlp hunyuan_vl.HunYuanVLVisionMLP idefics2.Idefics2VisionMLP idefics3.Idefics3VisionMLP
        ijepa.IJepaMLP inkling2.Inkling2VisionMLP instructblip.InstructBlipMLP
        instructblipvideo.InstructBlipVideoMLP internvl.InternVLVisionMLP kosmos2.Kosmos2VisionMLP
        llama4.Llama4VisionMLP metaclip_2.MetaClip2MLP minicpm_ocr.MiniCPMOcrVisionMLP
        minicpmv4_6.MiniCPMV4_6VisionMLP minicpmv4_7.MiniCPMV4_7VisionMLP minimax_m3_vl.MiniMaxM3VLVisionMLP
        mlcd.MLCDMLP mllama.MllamaVisionMLP molmo2.Molmo2VisionMLP owlv2.Owlv2MLP owlvit.OwlViTMLP
        paddleocr_vl.PaddleOCRVisionMLP phi4_multimodal.Phi4MultimodalVisionMLP pixio.PixioMLP
        qianfan_ocr.QianfanOCRVisionMLP radio.RadioMLP rf_detr.RfDetrDinov2MLP siglip.SiglipMLP siglip2.Siglip2MLP
        smolvlm.SmolVLMVisionMLP step3p7.Step3p7VisionMLP swin.SwinMLP tipsv2.Tipsv2VisionMLP
        unlimited_ocr.UnlimitedOcrMLP video_llama_3.VideoLlama3VisionMLP videomt.VideomtMLP
        videoprism.VideoPrismMLP vit.ViTMLP vit_mae.ViTMAEMLP vit_msn.ViTMSNMLP vivit.VivitMLP x_clip.XCLIPMLP
        """
    ),
    lambda mlp: differs(mlp, ("hidden_states",), FusedMlp.names),
    _has_mlp_parts,
)
RULES = (
    MLP,
    _mlp(FusedUpDownMlp, "x", owners("dinov3_vit.DINOv3ViTMLP eomt_dinov3.EomtDinov3MLP")),
    _mlp(
        FusedActMlp,
        "x",
        owners(
            """
            ernie4_5_vl_moe.Ernie4_5VLVisionMLP kimi_k25.Kimi_K25VisionMLP muse_glimmer.MuseGlimmerVisionMLP
            muse_spark.MuseSparkVisionMLP qwen2_vl.VisionMlp
            """
        ),
    ),
    _mlp(FusedPoseMlp, "hidden_state", owners("vitpose_backbone.VitPoseBackboneMLP vjepa2.VJEPA2MLP")),
    _mlp(
        FusedLinearMlp,
        "hidden_state",
        owners(
            """
            cohere_compass.CohereCompassVisionMLP qwen3_5.Qwen3_5VisionMLP qwen3_5_moe.Qwen3_5MoeVisionMLP
            qwen3_omni_moe.Qwen3OmniMoeVisionMLP qwen3_vl.Qwen3VLVisionMLP qwen3_vl_moe.Qwen3VLMoeVisionMLP
            qwen4_exp.Qwen4ExpVisionMLP
            """
        ),
    ),
    _mlp(
        FusedSamMlp,
        "hidden_states",
        owners(
            """
            deepseek_ocr2.DeepseekOcr2SamMLPBlock got_ocr2.GotOcr2MLPBlock pp_formulanet.PPFormulaNetMLPBlock
            sam.SamMLPBlock sam_hq.SamHQMLPBlock seggpt.SegGptMlp slanext.SLANeXtMLPBlock
            unlimited_ocr.UnlimitedOcrSamMLPBlock
            """
        ),
    ),
    _mlp(FusedSam3Mlp, "hidden_states", owners("sam3.Sam3MLP"), ("dropout",)),
    _mlp(FusedDropMlp, "hidden_states", owners("janus.JanusVisionMLP"), FusedDropMlp.drops),
    _mlp(FusedTwiceMlp, "x", owners("lw_detr.LwDetrViTMlp vitdet.VitDetMlp"), FusedTwiceMlp.drops),
    _mlp(FusedMgpMlp, "hidden_states", owners("mgp_str.MgpstrMlp"), FusedMgpMlp.drops),
    _mlp(FusedPvtMlp, "hidden_states", owners("pvt.PvtFFN"), FusedPvtMlp.drops),
    _mlp(
        FusedGatedMlp,
        "x",
        owners(
            """
            aimv2.Aimv2MLP deepseek_ocr2.DeepseekOcr2VisionMLP dinov2.Dinov2SwiGLUFFN
            dinov2_with_registers.Dinov2WithRegistersSwiGLUFFN dinov3_vit.DINOv3ViTGatedMLP
            dots3_note.Dots3NoteVisionMLP eomt.EomtSwiGLUFFN eomt_dinov3.EomtDinov3GatedMLP
            ovis2.Ovis2MLP pixtral.PixtralMLP radio.RadioSwiGLUFFN rf_detr.RfDetrDinov2SwiGLUFFN
            sapiens2.Sapiens2GatedMLP tipsv2.Tipsv2VisionSwiGLUFFN
            """
        ),
        ("up_proj",),
    ),
    _mlp(
        FusedGatedStateMlp,
        "hidden_state",
        owners(
            """
            exaone4_5.Exaone4_5_MLP glm4v.Glm4VisionMlp glm4v_moe.Glm4vMoeisionMlp glm_ocr.GlmOcrVisionMlp
            qwen2_5_omni.Qwen2_5OmniMLP qwen2_5_vl.Qwen2_5_VLMLP
            """
        ),
        ("up_proj",),
    ),
    _mlp(FusedLimitedMlp, "hidden_state", owners("glm5_next.Glm5NextVisionMLP"), ("up_proj",)),
    _mlp(
        FusedWiMlp,
        "hidden_states",
        owners("kosmos2_5.Kosmos2_5VisionMlp pix2struct.Pix2StructVisionMlp"),
        ("wi_1", "dropout"),
    ),
)
