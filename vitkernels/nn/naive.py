"""The Vision Transformer as the tutorials teach it, in one file: plain PyTorch, one step after the other.

Read it from top to bottom to learn what a ViT computes; `VisionTransformer` computes the same with fused ops, and the
tests hold the two together, output by output and gradient by gradient.

    pixels -> [0, 1] -> patches -> tokens -> class token before them -> positions added
           -> Transformer encoder -> head -> cross-entropy
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels.nn import _check
from vitkernels.nn.block import Block
from vitkernels.nn.mlp import GluMlp
from vitkernels.nn.vision_transformer import VisionTransformer

# ------------------------------------------------------------------------------------------- step 1: image to tokens


def scale_pixels(
    image: Tensor,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Bytes 0..255 become numbers 0..1; then each channel is centred by its mean and divided by its deviation.

    Args:
        image: [B, C, H, W], uint8, or floating point that is scaled already.
        mean, std: C numbers each, in units of the scaled pixels.
        dtype: of the result.

    Returns:
        [B, C, H, W].
    """
    pixels = image.to(dtype)
    if image.dtype == torch.uint8:
        pixels = pixels / 255
    if mean is not None:
        pixels = pixels - pixels.new_tensor(mean).view(-1, 1, 1)
    if std is not None:
        pixels = pixels / pixels.new_tensor(std).view(-1, 1, 1)
    return pixels


def embed_dnn(image: Tensor, weight: Tensor, bias: Tensor, patch_size: int) -> Tensor:
    """The fully connected way: cut the image into patches, lay each one out as a row, and multiply.

    Args:
        image: [B, C, H, W], floating point.
        weight: [D, C * P * P]; bias: [D].

    Returns:
        [B, N, D], N = (H / P) * (W / P).
    """
    columns = F.unfold(image, kernel_size=patch_size, stride=patch_size)  # [B, C * P * P, N]
    patches = columns.transpose(1, 2)  # [B, N, C * P * P]
    return patches @ weight.t() + bias


def embed_cnn(image: Tensor, weight: Tensor, bias: Tensor, patch_size: int) -> Tensor:
    """The convolutional way: a kernel of P x P that steps by P sees each patch once. The same weights, the same tokens.

    Args:
        image: [B, C, H, W], floating point.
        weight: [D, C * P * P]; bias: [D].

    Returns:
        [B, N, D], N = (H / P) * (W / P).
    """
    kernel = weight.view(-1, image.shape[1], patch_size, patch_size)  # [D, C, P, P]
    maps = F.conv2d(image, kernel, bias, stride=patch_size)  # [B, D, H / P, W / P]
    return maps.flatten(2).transpose(1, 2)


EMBEDDINGS = {"dnn": embed_dnn, "cnn": embed_cnn}

# ------------------------------------------------------------------------------------------------ step 2: the model


class NaiveVisionTransformer(nn.Module):
    """A Vision Transformer from PyTorch's own building blocks.

    Args:
        img_size, patch_size: in pixels; the image is square and a multiple of the patch.
        in_chans: C, the channels of the image.
        num_classes: width of the head.
        global_pool: "token" classifies the class token, "avg" the mean of the patches.
        embed_dim: D, the width of the tokens.
        depth, num_heads, mlp_ratio: of the encoder.
        class_token: whether there is one; "token" needs it.
        embedding: "dnn" (unfold and multiply) or "cnn" (convolve).
        norm_first: pre-norm, x + f(norm(x)), as ViT has it; False is post-norm, norm(x + f(x)), as the first
            Transformer had it.
        mean, std: C numbers each, for `scale_pixels`.
        eps: of the norms.

    Raises:
        ValueError: an argument out of range, or two that do not fit together.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        embedding: str = "dnn",
        norm_first: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        owner = "NaiveVisionTransformer"
        img_size, patch_size, in_chans, num_classes = _check.positive(
            owner, img_size=img_size, patch_size=patch_size, in_chans=in_chans, num_classes=num_classes
        )
        embed_dim, depth, num_heads = _check.positive(owner, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        _check.divisible(owner, "img_size", img_size, "patch_size", patch_size)
        _check.divisible(owner, "embed_dim", embed_dim, "num_heads", num_heads)
        _check.one_of(owner, "global_pool", global_pool, ("token", "avg"))
        _check.one_of(owner, "embedding", embedding, EMBEDDINGS)
        if global_pool == "token" and not class_token:
            raise ValueError(f"{owner}: argument 'class_token' is False with global_pool='token'; needs a class token")
        self.image_shape = (in_chans, img_size, img_size)
        self.patch_size = patch_size
        self.global_pool = global_pool
        self.embedding = embedding
        self.mean, self.std = mean, std

        tokens = (img_size // patch_size) ** 2 + int(class_token)
        self.patch_embed = nn.Linear(in_chans * patch_size**2, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, embed_dim) * 0.02)
        layer = nn.TransformerEncoderLayer(
            d_model=embed_dim,
            nhead=num_heads,
            dim_feedforward=int(embed_dim * mlp_ratio),
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=eps,
            batch_first=True,
            norm_first=norm_first,
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=depth, enable_nested_tensor=False)
        for weight in self.encoder.parameters():
            if weight.dim() > 1:  # the encoder is made of copies of one layer: let them start apart
                nn.init.xavier_uniform_(weight)
        self.norm = nn.LayerNorm(embed_dim, eps=eps)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, H, W], floating point or uint8, to [B, num_classes]."""
        if image.shape[1:] != self.image_shape:
            raise ValueError(
                f"NaiveVisionTransformer: argument 'image' has shape {list(image.shape)}; "
                f"needs [B, {', '.join(map(str, self.image_shape))}]"
            )
        image = scale_pixels(image, self.mean, self.std, self.patch_embed.weight.dtype)

        # each patch becomes a token
        embed = EMBEDDINGS[self.embedding]
        x = embed(image, self.patch_embed.weight, self.patch_embed.bias, self.patch_size)

        # one more token, which no patch stands behind, collects what the image is
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)

        # attention does not know where a token stands: its position is added to it
        x = x + self.pos_embed

        # the encoder: self-attention and feed-forward, depth times
        x = self.encoder(x)

        # what is classified: the class token, or the mean of the patches
        patches = x if self.cls_token is None else x[:, 1:]
        x = x[:, 0] if self.global_pool == "token" else patches.mean(dim=1)
        return self.head(self.norm(x))


# ------------------------------------------------------------------------------------------------- step 3: the loss


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Minus the log-probability that the model gives the right class, averaged over the batch.

    Args:
        logits: [B, classes]; labels: [B], int64.
        label_smoothing: the share of the target that is spread evenly over all classes.

    Returns:
        A number, as `torch.nn.functional.cross_entropy` has it.
    """
    log_probability = F.log_softmax(logits, dim=-1)
    right = log_probability.gather(1, labels.unsqueeze(1)).squeeze(1)
    return -((1 - label_smoothing) * right + label_smoothing * log_probability.mean(dim=-1)).mean()


# --------------------------------------------------------------------------- the same weights in the fused model

_LAYER_NAMES = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "self_attn.in_proj_weight": "attn.qkv.weight",
    "self_attn.in_proj_bias": "attn.qkv.bias",
    "self_attn.out_proj.weight": "attn.proj.weight",
    "self_attn.out_proj.bias": "attn.proj.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "linear1.weight": "mlp.fc1.weight",
    "linear1.bias": "mlp.fc1.bias",
    "linear2.weight": "mlp.fc2.weight",
    "linear2.bias": "mlp.fc2.bias",
}


def parameter_names(vit: VisionTransformer) -> dict[str, str]:
    """The naive model's name of each parameter -> its name in the fused model, so that gradients can be compared.

    Shapes are equal but for `patch_embed.weight`: [D, C * P * P] here, and [D, C, P, P] there, the same numbers in the
    same order.

    Raises:
        ValueError: a model with parts that the naive one does not have (registers, LayerScale, qk_norm, ...).
    """
    norm = "fc_norm" if vit.global_pool == "avg" else "norm"
    names = {
        "cls_token": "cls_token",
        "pos_embed": "pos_embed",
        "patch_embed.weight": "patch_embed.proj.weight",
        "patch_embed.bias": "patch_embed.proj.bias",
        **{
            f"encoder.layers.{index}.{naive}": f"blocks.{index}.{fused}"
            for index in range(len(vit.blocks))
            for naive, fused in _LAYER_NAMES.items()
        },
        "norm.weight": f"{norm}.weight",
        "norm.bias": f"{norm}.bias",
        "head.weight": "head.weight",
        "head.bias": "head.bias",
    }
    if vit.cls_token is None:
        del names["cls_token"]
    odd = set(names.values()) ^ {name for name, _ in vit.named_parameters()}
    if odd:
        raise ValueError(f"parameter_names: argument 'vit' differs in {sorted(odd)}; needs what the naive model has")
    return names


def naive_state_dict(vit: VisionTransformer) -> dict[str, Tensor]:
    """A fused model's weights under the naive model's names, detached and sharing memory; for `load_state_dict`.

    Raises:
        ValueError: as in `parameter_names`.
    """
    weights = {naive: vit.get_parameter(fused).detach() for naive, fused in parameter_names(vit).items()}
    weights["patch_embed.weight"] = weights["patch_embed.weight"].flatten(1)
    return weights


def from_fused(vit: VisionTransformer, embedding: str = "dnn") -> NaiveVisionTransformer:
    """A naive model with a copy of a fused model's weights, on its device and in its dtype.

    Raises:
        ValueError: a model that the naive one cannot be: as in `parameter_names`, or an image that is not square, an
            activation other than "gelu", a gated feed-forward, stochastic depth, no pooling, positions for the patches
            alone.
    """
    patch_embed, block = vit.patch_embed, vit.blocks[0]
    last = vit.blocks[-1]
    assert isinstance(block, Block)
    assert isinstance(last, Block)
    needs = {
        "patch_size": (patch_embed.patch_size, patch_embed.patch_size[:1] * 2),
        "grid_size": (patch_embed.grid_size, patch_embed.grid_size[:1] * 2),
        "global_pool": (vit.global_pool, "avg" if vit.global_pool == "avg" else "token"),
        "activation": (block.mlp.activation, "gelu"),
        "gated_mlp": (isinstance(block.mlp, GluMlp), False),
        "no_embed_class": (vit.no_embed_class, False),
        "use_rot_pos_emb": (vit.use_rot_pos_emb, False),
        "patch_drop_rate": (vit.patch_drop_rate, 0.0),
        "drop_path_rate": (getattr(last.drop_path1, "drop_prob", 0.0), 0.0),
    }
    for name, (got, need) in needs.items():
        if got != need:
            raise ValueError(f"from_fused: argument 'vit' has {name}={got!r}; the naive model needs {need!r}")
    weights = naive_state_dict(vit)
    assert isinstance(block.norm1, nn.LayerNorm), "another has no bias, which its names lack"
    model = NaiveVisionTransformer(
        img_size=patch_embed.grid_size[0] * patch_embed.patch_size[0],
        patch_size=patch_embed.patch_size[0],
        in_chans=patch_embed.proj.in_channels,
        num_classes=vit.num_classes,
        global_pool=vit.global_pool,
        embed_dim=vit.embed_dim,
        depth=len(vit.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / vit.embed_dim,
        class_token=vit.cls_token is not None,
        embedding=embedding,
        mean=patch_embed.mean,
        std=patch_embed.std,
        eps=block.norm1.eps,
    ).to(vit.pos_embed)
    model.load_state_dict(weights)
    return model.train(vit.training)
