"""The Vision Transformer (Dosovitskiy et al. 2020) on fused ops, with timm's argument names and state_dict keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitkernels.nn import _check
from vitkernels.nn.block import Block
from vitkernels.nn.masking import random_patches
from vitkernels.nn.mlp import ACTIVATIONS
from vitkernels.nn.packing import pack, unpack
from vitkernels.nn.patch_embed import PatchEmbed, place
from vitkernels.nn.pos_embed import resize_pos_embed
from vitkernels.nn.rope import Rope, rotary_positions
from vitkernels.residual import parts
from vitkernels.residual.chain import Chain, why_not_joined
from vitkernels.residual.genuine import owner, why_not_around, why_not_read
from vitkernels.residual.kept import Kept

POOLS = ("token", "avg", "")
POSITIONS = ("learn", "none")


class VisionTransformer(nn.Module):
    """Pre-norm Vision Transformer; checkpoints of timm's `vision_transformer` load strictly, and the other way.

    `load_state_dict` takes a table of positions of another square grid and interpolates it to this model's; one that
    holds NaN raises ValueError before anything is loaded.

    Args:
        img_size: usual image size in pixels, int or (height, width), a multiple of patch_size.
        patch_size: int or (height, width).
        in_chans: C, the image's channels.
        num_classes: width of the head; 0 for none.
        global_pool: what the head sees: "token" (the class token), "avg" (the mean of the patches, then the
            norm `fc_norm`) or "" (every token).
        embed_dim: D, the width of the tokens.
        depth: blocks.
        num_heads: H; must divide D.
        mlp_ratio: the feed-forward's hidden width over D.
        qkv_bias: whether the packed projection has a bias.
        qk_norm: a norm over the head width on q and k.
        init_values: where LayerScale starts; None for none.
        class_token: whether there is one.
        reg_tokens: number of registers (Darcet et al. 2023), placed after the class token.
        no_embed_class: positions for the patches alone.
        pos_embed: "learn" for a table of positions that is added to the tokens, "none" for none.
        use_rot_pos_emb: rotary positions of the patches, in every attention (timm's Eva); needs a width of heads that 4
            divides. Those of an image of another size are scaled to the usual grid.
        rope_temperature: of those positions.
        patch_drop_rate: the share of patches that each image loses at random in training, 0 to below 1.
        drop_path_rate: of the last block, 0 to below 1; growing linearly from 0 at the first.
        drop_path_subset: the samples that a block drops are not computed, as in `Block`.
        activation: of the feed-forward, as in `Mlp`.
        mean, std: C numbers each, in [0, 1] pixel units: images come as pixels and are normalised on their way in.
        eps: of all norms.
        norm: "layer" for LayerNorm, "rms" for RMSNorm (timm's `norm_layer`).
        gated_mlp: whether feed-forwards are `GluMlp` (timm's `mlp_layer=SwiGLUPacked`, with the activation "silu").

    Raises:
        ValueError: an argument out of range, or two that do not fit together.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        init_values: float | None = None,
        class_token: bool = True,
        reg_tokens: int = 0,
        no_embed_class: bool = False,
        drop_path_rate: float = 0.0,
        activation: str = "gelu",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        eps: float = 1e-6,
        norm: str = "layer",
        gated_mlp: bool = False,
        pos_embed: str = "learn",
        use_rot_pos_emb: bool = False,
        rope_temperature: float = 10000.0,
        patch_drop_rate: float = 0.0,
        drop_path_subset: bool = False,
    ) -> None:
        super().__init__()
        owner = "VisionTransformer"
        embed_dim, depth, num_heads = _check.positive(owner, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        num_classes, reg_tokens = _check.not_negative(owner, num_classes=num_classes, reg_tokens=reg_tokens)
        _check.divisible(owner, "embed_dim", embed_dim, "num_heads", num_heads)
        _check.one_of(owner, "global_pool", global_pool, POOLS)
        _check.one_of(owner, "activation", activation, ACTIVATIONS)
        _check.one_of(owner, "pos_embed", pos_embed, POSITIONS)
        _check.rate(owner, "drop_path_rate", drop_path_rate)
        _check.rate(owner, "patch_drop_rate", patch_drop_rate)
        if use_rot_pos_emb:
            _check.divisible(owner, "embed_dim", embed_dim, "4 * num_heads", 4 * num_heads)
            if not rope_temperature > 0:
                raise ValueError(f"{owner}: argument 'rope_temperature' is {rope_temperature!r}; needs more than 0")
        norm_layer = _check.norm(owner, norm)
        if global_pool == "token" and not class_token:
            raise ValueError(f"{owner}: argument 'class_token' is False with global_pool='token'; needs a class token")
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.no_embed_class = no_embed_class
        self.use_rot_pos_emb, self.rope_temperature = use_rot_pos_emb, float(rope_temperature)
        self.patch_drop_rate = patch_drop_rate
        self.grad_checkpointing = False
        self._kept = Kept()

        size = _check.pair(owner, "img_size", img_size)
        self.patch_embed = PatchEmbed(size, patch_size, in_chans, embed_dim, mean=mean, std=std)
        self.patch_size, self.grid_size = self.patch_embed.patch_size, self.patch_embed.grid_size
        rows = self.patch_embed.num_patches + self._pos_prefixes
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.pos_embed = nn.Parameter(torch.empty(1, rows, embed_dim)) if pos_embed == "learn" else None
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_norm=qk_norm,
                    init_values=init_values,
                    drop_path=rate,
                    activation=activation,
                    eps=eps,
                    norm=norm,
                    gated_mlp=gated_mlp,
                    drop_path_subset=drop_path_subset,
                )
                for rate in torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
            )
        )
        pooled = global_pool == "avg"  # the mean is taken of raw tokens and normalised after
        self.norm = nn.Identity() if pooled else norm_layer(embed_dim, eps=eps)
        self.fc_norm = norm_layer(embed_dim, eps=eps) if pooled else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights()
        self.register_load_state_dict_pre_hook(_fit_pos_embed)

    @property
    def _pos_prefixes(self) -> int:
        """Rows of the position table that stand for prefix tokens."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def init_weights(self) -> None:
        """Draw new weights, as timm does: truncated normal of 0.02 for Linear and positions, biases 0."""
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimizers should not decay."""
        return {"pos_embed", "cls_token", "reg_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers by the names of their parameters, as timm's layer-wise learning rates read them."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs and run each block again in backward: less memory, more time."""
        self.grad_checkpointing = enable

    def forward(self, image: Tensor | Sequence[Tensor], keep: Tensor | None = None) -> Tensor | list[Tensor]:
        """Classify a batch of images.

        Args:
            image: [B, C, H, W], floating point or uint8 (scaled to [0, 1]). H and W may differ from img_size by
                multiples of the patch: the positions are interpolated. A list of such batches, each of a size of its
                own, runs as one packed sequence, without padding: each image attends to itself and is pooled apart.
            keep: as in `forward_features`.

        Returns:
            [B, num_classes]; with global_pool="", [B, R + N, num_classes]. Of a list, the rows of all images in order;
            with global_pool="" a list.
        """
        features = self.forward_features(image, keep)
        if isinstance(features, Tensor):
            return self.forward_head(features)
        if self.global_pool == "":
            return [self.forward_head(each) for each in features]
        return self._classify(torch.cat([self._pool(each) for each in features]))

    def forward_features(self, image: Tensor | Sequence[Tensor], keep: Tensor | None = None) -> Tensor | list[Tensor]:
        """The tokens after the last block and norm, class token and registers first.

        Args:
            image: as in `forward`.
            keep: [B, M] int64, the patches of each image to read, by row-major index, each once; the others are left
                out (`random_masking`). Of one batch, not of a list.

        Returns:
            [B, R + N, D], or [B, R + M, D]; of a list of batches, a list.

        Raises:
            TypeError, ValueError: images or keep that do not fit.
        """
        if isinstance(image, Tensor):
            x, rope = self._embed(image, keep)
            return self._encode(x, rope=rope)
        if keep is not None:
            raise ValueError("VisionTransformer: argument 'keep' is given with a list of images; needs one batch")
        if len(image) == 0:
            raise ValueError("VisionTransformer: argument 'image' is an empty list; needs a batch or more")
        embedded = [self._embed(batch, None) for batch in image]
        batches = [tokens for tokens, _ in embedded]
        x, packing, rope = pack(batches, [each for _, each in embedded])
        return unpack(self._encode(x, rope=rope, packing=packing), batches)

    def _encode(self, x: Tensor, **given: Any) -> Tensor:
        """Blocks and norm; what is given, but None, goes to the blocks."""
        options = {name: value for name, value in given.items() if value is not None}
        if self.grad_checkpointing and why_not_read(self.blocks) is None:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False, **options)
        elif (chain := self._chain(x, options)) is not None:
            return chain.run(x, last_norm=self.norm)
        elif options:
            for block in self.blocks:
                x = block(x, **options)
        else:
            x = self.blocks(x)
        return parts.layer_norm(self.norm, x)

    def _chain(self, x: Tensor, options: dict[str, Any]) -> Chain | None:
        """The blocks as one residual stream, where nobody stands between two of them."""
        if options or torch.compiler.is_compiling() or why_not_around() is not None:
            return self._read_chain(x, options)
        chain = self._kept.get(self.blocks, x.device, lambda: self._read_chain(x, options))
        return chain if chain is None or chain.fits(x) else self._read_chain(x, options)

    def _read_chain(self, x: Tensor, options: dict[str, Any]) -> Chain | None:
        if parts.why_not_part("blocks", self.blocks, nn.Sequential) is not None:
            return None
        blocks: list[Any] = list(self.blocks)
        joined = all(owner(each) is Block and why_not_joined(each, x) is None for each in blocks)
        if not joined or any(each.drops_samples() for each in blocks):
            return None
        return Chain(blocks, **options)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify features.

        Args:
            x: [B, R + N, D], from forward_features.
            pre_logits: stop before the head.

        Returns:
            [B, num_classes], or [B, D] before the head; with global_pool="" one for each token.
        """
        return self._classify(self._pool(x), pre_logits)

    def _pool(self, x: Tensor) -> Tensor:
        if self.global_pool == "token":
            return x[:, 0]
        return x[:, self.num_prefix_tokens :].mean(dim=1) if self.global_pool == "avg" else x

    def _classify(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = parts.layer_norm(self.fc_norm, x)
        return x if pre_logits else self.head(x)

    def _embed(self, image: Tensor, keep: Tensor | None) -> tuple[Tensor, Rope | None]:
        """Image to [B, R + N, D] with positions, and the patches' rotary positions."""
        _check.image("VisionTransformer", image, self.patch_size)
        grid = (image.shape[2] // self.patch_size[0], image.shape[3] // self.patch_size[1])
        if keep is not None:
            _check.keep("VisionTransformer", keep, len(image), grid[0] * grid[1])
        elif self.training and self.patch_drop_rate > 0:
            keep = random_patches(len(image), grid[0] * grid[1], self.patch_drop_rate, image.device)
        table = rope = None
        if self.pos_embed is not None:
            table = resize_pos_embed(self.pos_embed, self.grid_size, grid, self._pos_prefixes)[0]
        if self.use_rot_pos_emb:
            rope = rotary_positions(
                grid,
                self.embed_dim // self.num_heads,
                usual_grid=self.grid_size,
                temperature=self.rope_temperature,
                device=image.device,
            )
            rope = rope._replace(prefix=self.num_prefix_tokens).kept(keep)
        prefixes = [token[0] for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = torch.cat(prefixes) if prefixes else None
        if parts.why_not_part("", self.patch_embed, PatchEmbed) is None:
            return self.patch_embed(image, prefix, table, keep), rope
        return place(self.patch_embed(image), prefix, table, keep), rope


def _fit_pos_embed(model: VisionTransformer, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: no NaN in the table of positions, and a square grid of another size becomes the model's."""
    key = f"{prefix}pos_embed"
    table = state_dict.get(key)
    if not isinstance(table, Tensor) or model.pos_embed is None:
        return
    if not table.is_meta and table.isnan().any():
        raise ValueError(f"load_state_dict: '{key}' holds NaN; needs numbers (nothing was loaded)")
    side = math.isqrt(max(table.shape[1] - model._pos_prefixes, 0)) if table.dim() == 3 else 0
    if table.shape != model.pos_embed.shape and side and side * side == table.shape[1] - model._pos_prefixes:
        state_dict[key] = resize_pos_embed(table, (side, side), model.grid_size, model._pos_prefixes)
