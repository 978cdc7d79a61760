"""Images of different sizes in one packed sequence: no padding, no mask, and attention within each image alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from vitkernels.nn.rope import Rope
from vitkernels.residual import known


@dataclass(frozen=True)
class Packing:
    """Where each image's tokens lie in [T, 1, D].

    Attributes:
        lengths: tokens of each image, in order.
        cu_seqlens: [S + 1] int32, where each image begins, and T.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        """For images of so many tokens."""
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
        return cls(tuple(lengths), ends.to(device, non_blocking=True))

    def images_of_tokens(self) -> Tensor:
        """[T] int64: which image each token is of."""
        images = torch.arange(len(self.lengths), device=self.cu_seqlens.device)
        return images.repeat_interleave(self.cu_seqlens.diff(), output_size=sum(self.lengths))

    def only(self, images: Tensor) -> tuple[Packing, Tensor]:
        """These images alone, [s] int64 on the CPU: their packing, and the rows of their tokens here."""
        begins = [0, *accumulate(self.lengths)]
        chosen = images.tolist()
        rows = torch.cat([torch.arange(begins[index], begins[index + 1], device="cpu") for index in chosen])
        device = self.cu_seqlens.device
        return Packing.of([self.lengths[index] for index in chosen], device), rows.to(device, non_blocking=True)


def pack(batches: Sequence[Tensor], ropes: Sequence[Rope | None]) -> tuple[Tensor, Packing, Rope | None]:
    """Tokens [B_i, N_i, D] as one sequence [T, 1, D], with rotary positions, where there are, of all its tokens."""
    lengths = [tokens.shape[1] for tokens in batches for _ in range(tokens.shape[0])]
    x = torch.cat([tokens.flatten(0, 1) for tokens in batches]).unsqueeze(1)
    tables = [rope.packed(len(tokens)) for tokens, rope in zip(batches, ropes, strict=True) if rope is not None]
    rope = Rope(torch.cat([sin for sin, _ in tables]), torch.cat([cos for _, cos in tables])) if tables else None
    return x, Packing.of(lengths, x.device), rope


def unpack(x: Tensor, batches: Sequence[Tensor]) -> list[Tensor]:
    """[T, 1, D] back to the shapes of the batches that it was packed from; views."""
    parts = x.squeeze(1).split([tokens.shape[0] * tokens.shape[1] for tokens in batches])
    return [part.view(*tokens.shape[:2], -1) for part, tokens in zip(parts, batches, strict=True)]


class DropPathOfImages(nn.Module):
    """A DropPath in a packed sequence: one draw for each image, for all its tokens."""

    def __init__(self, drop_path: Callable[[Tensor], Tensor], packing: Packing) -> None:
        super().__init__()
        self.drop_path, self.packing = drop_path, packing
        self.drop_prob = getattr(drop_path, "drop_prob", 0.0)
        self.training = getattr(drop_path, "training", False)

    def factor(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """[T], the factor of each token."""
        factors = self.drop_path(tokens.new_ones(len(self.packing.lengths), 1, dtype=dtype))
        return factors.squeeze(1)[self.packing.images_of_tokens()]

    def forward(self, x: Tensor) -> Tensor:
        """[T, 1, D] to the same."""
        return x * self.factor(x, x.dtype).view(-1, 1, 1)


known.DROP_PATHS["vitkernels.nn.packing.DropPathOfImages"] = DropPathOfImages.factor  # type: ignore[assignment]
