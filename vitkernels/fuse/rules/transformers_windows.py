"""Hugging Face transformers: layers that lay their tokens out anew around their attention (read from 5.23).

Windows of an image (SAM, SAM 3, ViTDet, LW-DETR, RF-DETR), a token for each frame (X-CLIP). The norms work on each
token by itself, so that the residual stream keeps one layout throughout.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.fuse.around import attention_of, own_attention
from vitkernels.fuse.rules.transformers import FusedDinoLayer, FusedKeywordLayer, FusedLayer, Names, layer_rule
from vitkernels.fuse.rules.transformers_parts import FusedAttention, attention_rule, owners
from vitkernels.fuse.rules.transformers_spelling import Spelling
from vitkernels.residual import genuine
from vitkernels.residual.stream import Branch, Sublayer, pre_norm
from vitkernels.residual.sublayers import ROTARY, rotary


def between(branch: Branch, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> Branch:
    """The branch on tokens that are laid out anew before it, and back after it; nothing is computed on the way."""

    def run(x: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
        out, bias = branch.run(before(x), bias_apart)
        return after(out), bias

    return dataclasses.replace(branch, run=run, step=None)


def _functions(layer: nn.Module) -> Any:
    """The module in which the layer's own class stands."""
    return sys.modules[genuine.owner(layer).__module__]


# ----------------------------------------------------------------------------------------- attention that is served


class FusedLwDetrLayer(FusedKeywordLayer):
    """LwDetrViTLayer: its batch is windows, which some layers join."""

    names = Names(("layernorm_before", "layernorm_after"), "attention", "intermediate", scales=("gamma_1", "gamma_2"))

    def attention_branch(self, **options: Any) -> Branch:
        layer: Any = self
        branch = super().attention_branch(**options)
        if layer.window:
            return branch
        windows = layer.num_windows
        return between(
            branch,
            lambda x: x.reshape(x.shape[0] // windows, windows * x.shape[1], -1),
            lambda x: x.reshape(x.shape[0] * windows, x.shape[1] // windows, -1),
        )


class FusedRfDetrLayer(FusedDinoLayer):
    """RfDetrDinov2Layer: the same of DINOv2's layer."""

    def attention_branch(self, **options: Any) -> Branch:
        layer: Any = self
        branch = super().attention_branch(**options)
        if not layer.global_attention:
            return branch
        return between(
            branch,
            layer.window_unpartition_before_attention,
            lambda x: layer.window_partition_after_attention(x.shape, x),
        )


class FusedMessageLayer(FusedLayer):
    """XCLIPVisionEncoderLayer: each frame gets a token that has looked at the other frames'."""

    names = Names(("layer_norm1", "layer_norm2"), "self_attn")

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        layer: Any = self
        if self.leaves(hidden_states, attention_mask=attention_mask, **kwargs):
            return super(FusedLayer, self).forward(hidden_states, attention_mask, **kwargs)
        messages = layer.message_fc(hidden_states[:, 0]).unflatten(0, (-1, layer.num_frames))
        with self.backend():
            messages = pre_norm(messages, [self.message(**kwargs)], self._vitkernels.residual_dtype)
        # what becomes of the token is thrown away: a token more costs less than a pass that leaves it out
        x = torch.cat([hidden_states, messages.flatten(0, 1)[:, None]], dim=1)
        return self.run(x, attention_mask=attention_mask, **kwargs)[:, : hidden_states.shape[1]]

    def steps(self, x: Tensor, sublayers: Sequence[Sublayer]) -> Tensor:
        if sublayers[1].is_read(x.shape[-1], self._vitkernels.recompute_norms):
            return super().steps(x, sublayers)
        x = super().steps(x, sublayers[:1])  # a module that is called gets the tokens without the messages
        return super().steps(x[:, :-1], sublayers[1:])

    def message(self, **options: Any) -> Sublayer:
        """The step between frames, [B, frames, D]."""
        layer: Any = self
        attention = attention_of(
            "message_attn", layer.message_attn, lambda x: layer.message_attn(x, **options)[0], **options
        )
        return Sublayer("message_attn", layer.message_ln, attention, None, layer.drop_path)

    def parts(self) -> list[Any]:
        return [*self.message().parts(), *super().parts()]

    def why_not_call(self, attention_mask: Any = None, **options: Any) -> str | None:
        layer: Any = self
        attentions = (layer.message_attn, layer.self_attn)
        reasons = (each.why_not_call(**options) for each in attentions if isinstance(each, FusedAttention))
        return next((reason for reason in reasons if reason is not None), None)

    def call(self, attn: nn.Module, x: Tensor, **options: Any) -> Tensor:
        return attn(hidden_states=x, **options)[0]


class FusedSam3Attention(FusedAttention):
    """Sam3ViTRoPEAttention: rotary positions of neighbours in a head, tokens as [B, height, width, D]."""

    axes = 4
    steps = ROTARY
    spelling = Spelling(is_causal="is_causal")

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.leaves(hidden_states, position_embeddings=position_embeddings, **kwargs):
            return super(FusedAttention, self).forward(hidden_states, position_embeddings, **kwargs)
        return self.attended(hidden_states, position_embeddings=position_embeddings, **kwargs), None

    def why_not_call(self, attention_mask: Any = None, position_embeddings: Any = None, **options: Any) -> str | None:
        return super().why_not_call(None, **options)

    def is_plain(self) -> bool:
        return False

    def attend(self, packed: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        return super().attend(packed.flatten(1, 2), **options).unflatten(1, packed.shape[1:3])

    def turned(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, position_embeddings: tuple[Tensor, Tensor], **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = position_embeddings
        q, k = (rotary(each, sin, cos) for each in (q, k))
        return q, k, v


class FusedSam3Layer(FusedKeywordLayer):
    """Sam3ViTLayer: [B, height, width, D] in windows or whole."""

    axes = 4
    names = Names(("layer_norm1", "layer_norm2"), "attention", dropouts=(None, "dropout"))

    def attention_branch(self, **options: Any) -> Branch:
        """Windows are made and undone around the attention, whose positions are a window's."""
        layer: Any = self
        attn, size = layer.attention, layer.window_size

        def run(x: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            own, sides = _functions(self), x.shape[1:3]
            padded = sides
            if size > 0:
                x, padded = own.window_partition(x, size)
            places = layer.rotary_emb(x, layer.position_ids)
            branch = attention_of(
                "attention",
                attn,
                lambda x: attn(x, places, **options)[0],
                **options,
                position_embeddings=places,
            )
            out, bias = branch.run(x, bias_apart)
            return (own.window_unpartition(out, size, padded, sides) if size > 0 else out), bias

        return dataclasses.replace(super().attention_branch(**options), run=run, step=None)


class FusedWindowsLayer(FusedLayer):
    """A layer whose attention sees windows of its image, or all of it."""

    axes = 4

    def functions(self) -> Any:
        """What has `window_partition` and `window_unpartition`."""
        return self

    def attention_branch(self, **options: Any) -> Branch:
        layer: Any = self
        whole = super().attention_branch(**options)
        if layer.window_size <= 0:
            return whole

        def run(x: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            own, size, sides = self.functions(), layer.window_size, x.shape[1:3]
            windows, padded = own.window_partition(x, size)
            out, bias = whole.run(windows, bias_apart)
            return own.window_unpartition(out, size, padded, sides), bias

        return dataclasses.replace(whole, run=run, step=None)


class FusedSamLayer(FusedWindowsLayer):
    """SamVisionLayer and its copies: [B, height, width, D]."""

    names = Names(("layer_norm1", "layer_norm2"), "attn")

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        if self.leaves(hidden_states):
            return super(FusedLayer, self).forward(hidden_states)
        return self.run(hidden_states)


class FusedVitDetLayer(FusedWindowsLayer):
    """VitDetLayer: [B, D, height, width] outside, and a convolution after it in some."""

    names = Names(("norm1", "norm2"), "attention", drop_paths=("drop_path", "drop_path"))

    def functions(self) -> Any:
        return _functions(self)

    def reader(self) -> object:
        return None  # the norm sees the tokens the other way round

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        layer: Any = self
        if self.leaves(hidden_states, output_attentions=output_attentions):
            return super(FusedLayer, self).forward(hidden_states, output_attentions)
        x = self.run(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (layer.residual(x) if layer.use_residual_block else x,)

    def why_not_call(self, output_attentions: bool = False, **options: Any) -> str | None:
        return "called with output_attentions" if output_attentions else None


class FusedSegGptLayer(FusedLayer):
    """SegGptLayer: [B, height, width, D]; prompts that are averaged over a batch are its class's."""

    axes = 4
    names = Names(("layernorm_before", "layernorm_after"), "attention", drop_paths=("drop_path", "drop_path"))

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, ensemble_cond: int, feature_ensemble: bool = False, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        given = {"feature_ensemble": feature_ensemble, "output_attentions": output_attentions}
        if self.leaves(hidden_states, **given):
            return super(FusedLayer, self).forward(hidden_states, ensemble_cond, **given)
        return self.run(hidden_states), None

    def why_not_call(self, **options: Any) -> str | None:
        return next((f"called with {name}" for name, value in options.items() if value), None)


# ------------------------------------------------------------------------------- attention that runs its own code


class FusedTupleLayer(FusedLayer):
    """MgpstrLayer: the attention's weights are returned beside the tokens."""

    names = Names(("norm1", "norm2"), "attn", drop_paths=("drop_path", "drop_path"))

    def attention_branch(self, **options: Any) -> Branch:
        attn: Any = self.attn
        return own_attention("attn", attn, lambda x: self.call(attn, x, **options), "its weights are returned")

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if self.leaves(hidden_states):
            return super(FusedLayer, self).forward(hidden_states)
        weights: list[Tensor] = []
        return self.run(hidden_states, weights=weights), weights[0]

    def call(self, attn: nn.Module, x: Tensor, weights: list[Tensor]) -> Tensor:  # type: ignore[override]
        out, found = attn(x)
        weights.append(found)
        return out


RULES = (
    layer_rule(FusedLwDetrLayer, owners("lw_detr.LwDetrViTLayer"), ("hidden_states", "kwargs")),
    layer_rule(FusedRfDetrLayer, owners("rf_detr.RfDetrDinov2Layer")),
    layer_rule(
        FusedMessageLayer,
        owners("x_clip.XCLIPVisionEncoderLayer"),
        optional=("message_fc", "message_ln", "message_attn", "drop_path"),
    ),
    attention_rule(
        FusedSam3Attention,
        owners("sam3.Sam3ViTRoPEAttention"),
        ("hidden_states", "position_embeddings", "kwargs"),
    ),
    layer_rule(FusedSam3Layer, owners("sam3.Sam3ViTLayer"), ("hidden_states", "kwargs"), ("rotary_emb",)),
    layer_rule(
        FusedSamLayer,
        owners(
            """
            deepseek_ocr2.DeepseekOcr2SamVisionLayer got_ocr2.GotOcr2VisionLayer pp_formulanet.PPFormulaNetVisionLayer
            sam.SamVisionLayer sam_hq.SamHQVisionLayer slanext.SLANeXtVisionLayer
            unlimited_ocr.UnlimitedOcrSamVisionLayer
            """
        ),
        ("hidden_states",),
    ),
    layer_rule(FusedVitDetLayer, owners("vitdet.VitDetLayer"), ("hidden_states", "output_attentions"), ("residual",)),
    layer_rule(
        FusedSegGptLayer,
        owners("seggpt.SegGptLayer"),
        ("hidden_states", "ensemble_cond", "feature_ensemble", "output_attentions"),
    ),
    layer_rule(FusedTupleLayer, owners("mgp_str.MgpstrLayer"), ("hidden_states",)),
)
