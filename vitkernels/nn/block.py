"""The pre-norm Transformer block, with each residual add fused into the norm that follows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.nn import _check
from vitkernels.nn.attention import Attention
from vitkernels.nn.drop_path import DropPath
from vitkernels.nn.layer_scale import LayerScale
from vitkernels.nn.mlp import GluMlp, Mlp
from vitkernels.nn.packing import DropPathOfImages, Packing
from vitkernels.nn.rope import Rope
from vitkernels.residual import parts
from vitkernels.residual.genuine import why_not_around
from vitkernels.residual.kept import Kept
from vitkernels.residual.late import read_for
from vitkernels.residual.stream import Branch, Sublayer, normed_branch, pre_norm


class Block(nn.Module):
    """x = x + drop_path(ls1(attn(norm1(x)))); x = x + drop_path(ls2(mlp(norm2(x)))).

    Args:
        dim: D, the width of the tokens.
        num_heads: H; must divide D.
        mlp_ratio: the feed-forward's hidden width over D; of a gated one, that of gate and up together.
        qkv_bias, qk_norm: of the attention.
        proj_bias: whether proj, fc1 and fc2 have a bias.
        init_values: where LayerScale starts; None for none.
        drop_path: rate of stochastic depth, 0 to below 1.
        activation: of the feed-forward, as in `Mlp`.
        eps: of the norms.
        norm: "layer" for LayerNorm, "rms" for RMSNorm.
        gated_mlp: whether the feed-forward is a `GluMlp`: SwiGLU with the activation "silu".
        drop_path_subset: in training, a sub-layer runs on a random subset of the samples, as many as stay on average,
            and what it adds is scaled up by as much (DINOv2): the others are not computed. In a packed sequence the
            samples are its images.

    Raises:
        ValueError: sizes below 1, a dim that num_heads does not divide, an unknown activation or norm, a rate out of
            range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        drop_path: float = 0.0,
        activation: str = "gelu",
        eps: float = 1e-6,
        norm: str = "layer",
        gated_mlp: bool = False,
        drop_path_subset: bool = False,
    ) -> None:
        super().__init__()
        dim, num_heads = _check.positive("Block", dim=dim, num_heads=num_heads)
        _check.rate("Block", "drop_path", drop_path)
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"Block: argument 'mlp_ratio' is {mlp_ratio!r}; needs at least 1 / dim = 1 / {dim}")
        norm_layer = _check.norm("Block", norm)
        self.norm1 = norm_layer(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_norm, proj_bias, eps, norm)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, eps=eps)
        self.mlp = (GluMlp if gated_mlp else Mlp)(dim, int(dim * mlp_ratio), activation=activation, bias=proj_bias)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path_subset = drop_path_subset
        self._kept = Kept()

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Rope | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            x: [B, N, D], or packed, [T, 1, D].
            attn_mask, is_causal, rope, packing: as in `Attention`.

        Returns:
            x's shape.
        """
        given = {"attn_mask": attn_mask, "is_causal": is_causal or None, "rope": rope, "packing": packing}
        options = {name: value for name, value in given.items() if value is not None}
        if self.drops_samples():
            return self._on_subsets(x, options)
        if why_not_around() is not None:  # every module is called, and seen
            paths = [each.drop_path for each in self.sublayers(**options)]
            x = x + paths[0](self.ls1(self.attn(self.norm1(x), **options)))  # type: ignore[misc]
            return x + paths[1](self.ls2(self.mlp(self.norm2(x))))  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return pre_norm(x, self.sublayers(**options))
        return pre_norm(x, read_for(self, self._kept, self.sublayers, x, options))

    def sublayers(self, **options: Any) -> list[Sublayer]:
        """The block's residual steps; the options are forward's."""
        paths: list[nn.Module] = [self.drop_path1, self.drop_path2]
        packing = options.get("packing")
        if packing is not None:
            paths = [each if parts.is_identity(each) else DropPathOfImages(each, packing) for each in paths]
        return [
            Sublayer("attn", self.norm1, _branch("attn", self.attn, **options), self.ls1, paths[0]),
            Sublayer("mlp", self.norm2, _branch("mlp", self.mlp), self.ls2, paths[1]),
        ]

    def drops_samples(self) -> bool:
        """Whether sub-layers run on subsets of the samples now."""
        drops = all(isinstance(each, DropPath) for each in (self.drop_path1, self.drop_path2))
        return self.training and self.drop_path_subset and drops

    def _on_subsets(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        """x + scale(branch(norm(x))) on the samples that each sub-layer draws."""
        for index, drop_path in enumerate((self.drop_path1, self.drop_path2)):
            assert isinstance(drop_path, DropPath)
            rows, factor, own = _drawn(x, drop_path, options)
            sublayer = self.sublayers(**own)[index]
            out = normed_branch(x.index_select(0, rows), sublayer.norm, sublayer.branch)
            scale: Any = sublayer.factor()
            if not parts.is_identity(scale):
                out = scale(out)
            x = x.index_add(0, rows, out.to(x.dtype), alpha=factor)
        return x


def _drawn(x: Tensor, drop_path: DropPath, options: dict[str, Any]) -> tuple[Tensor, float, dict[str, Any]]:
    """The rows of x that run, the factor of what they add, and the options of a call with these rows alone."""
    packing, rope, mask = (options.get(name) for name in ("packing", "rope", "attn_mask"))
    own = dict(options)
    if packing is not None:
        count = len(packing.lengths)
        images = drop_path.subset(count, torch.device("cpu"))  # their lengths are needed here, not on the device
        own["packing"], rows = packing.only(images)
        if rope is not None:
            own["rope"] = rope._replace(sin=rope.sin[rows], cos=rope.cos[rows])
        return rows, count / len(images), own
    rows = drop_path.subset(len(x), x.device)
    if rope is not None and rope.sin.dim() == 4:
        own["rope"] = rope._replace(sin=rope.sin[rows], cos=rope.cos[rows])
    if mask is not None and mask.dim() == 4 and len(mask) > 1:
        own["attn_mask"] = mask[rows]
    return rows, len(x) / len(rows), own


def _branch(name: str, layer: nn.Module, **options: Any) -> Branch:
    """A sub-layer by its parts, or called as it is where it may not be read."""
    kind = Attention if name == "attn" else GluMlp if isinstance(layer, GluMlp) else Mlp
    why_not = parts.why_not_part(name, layer, kind)
    if why_not is None:
        return layer.branch(**options)  # type: ignore[operator]
    return Branch(lambda x, bias_apart: (layer(x, **options), None), "", None, why_not)
