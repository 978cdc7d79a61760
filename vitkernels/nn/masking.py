"""Masked autoencoding (He et al. 2021): an encoder sees a few patches of each image, a decoder gets all places back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitkernels.nn import _check
from vitkernels.ops._check import is_tensor


class Masking(NamedTuple):
    """Which patches are seen.

    Attributes:
        keep: [B, M] int64, the patches to read, for `VisionTransformer.forward_features(image, keep=keep)`.
        hidden: [B, N] bool, the others.
        restore: [B, N] int64, for `unshuffle`.
    """

    keep: Tensor
    hidden: Tensor
    restore: Tensor


def random_masking(batch: int, patches: int, ratio: float = 0.75, *, device: torch.device | None = None) -> Masking:
    """Hide a random share of each image's patches, drawn as MAE draws them.

    Args:
        batch: B.
        patches: N.
        ratio: the share to hide, 0 to below 1; N * (1 - ratio) patches, rounded down, are kept, and 1 at least.
        device: of the result.

    Raises:
        ValueError: sizes below 1, or a ratio out of range.
    """
    batch, patches = _check.positive("random_masking", batch=batch, patches=patches)
    _check.rate("random_masking", "ratio", ratio)
    shuffle = torch.rand(batch, patches, device=device).argsort(dim=1)
    count = max(int(patches * (1 - ratio)), 1)
    restore = shuffle.argsort(dim=1)
    return Masking(shuffle[:, :count], restore >= count, restore)


def random_patches(batch: int, patches: int, rate: float, device: torch.device) -> Tensor:
    """[B, M] int64, the patches that an image keeps where it loses this share of them: drawn as timm draws them."""
    order = torch.randn(batch, patches, device=device).argsort(dim=-1)
    return order[:, : max(1, int(patches * (1 - rate)))]


def unshuffle(tokens: Tensor, mask_token: Tensor, restore: Tensor, prefixes: int = 0) -> Tensor:
    """Put each token back to its patch's place, and the mask token on the places that were hidden.

    Args:
        tokens: [B, R + M, D], the kept patches in `Masking.keep`'s order.
        mask_token: D numbers, of any shape that holds as many ([1, 1, D]).
        restore: [B, N] int64, from the same `Masking`.
        prefixes: R, tokens at the front that stay there.

    Returns:
        [B, R + N, D].

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: shapes that do not fit.
    """
    owner = "unshuffle"
    is_tensor(owner, tokens=tokens, mask_token=mask_token, restore=restore, optional={})
    if tokens.dim() != 3:
        raise ValueError(f"{owner}: argument 'tokens' has shape {list(tokens.shape)}; needs [B, R + M, D]")
    batch, count, width = tokens.shape
    (prefixes,) = _check.not_negative(owner, prefixes=prefixes)
    if prefixes > count:
        raise ValueError(f"{owner}: argument 'prefixes' is {prefixes}; needs {count} or less, the number of tokens")
    if restore.dim() != 2 or len(restore) != batch or restore.shape[1] < count - prefixes:
        raise ValueError(
            f"{owner}: argument 'restore' has shape {list(restore.shape)}; "
            f"needs [{batch}, N], N of {count - prefixes} or more"
        )
    if mask_token.numel() != width:
        raise ValueError(f"{owner}: argument 'mask_token' has {mask_token.numel()} numbers; needs {width}")
    prefix, patches = tokens[:, :prefixes], tokens[:, prefixes:]
    hidden = mask_token.view(1, 1, width).to(tokens.dtype).expand(batch, restore.shape[1] - patches.shape[1], -1)
    whole = torch.cat([patches, hidden], dim=1)
    return torch.cat([prefix, whole.gather(1, restore.unsqueeze(-1).expand(-1, -1, width))], dim=1)
