"""Towers of timm and transformers, stock and after `vk.fuse`, as cases to time: what people train beside plain ViTs.

Whole towers of few blocks, at the widths that are trained: packed images of mixed sizes, padded ones, windows, keys of
a smaller image, videos. Forward and backward, without dropout.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import accuracy
import peers as libraries
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import vitkernels as vk
from bench import towers
from bench.measure import Key, Lane, Truth
from bench.models import ROUNDING
from vitkernels.models import stir

FUSED, STOCK = "vk.fuse", "stock"
KIND = "tower"
Draw = Callable[..., Tensor]  # of a shape, normal
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Tower:
    """A model of a library and what it is called with.

    Attributes:
        name: as the report has it.
        package: the library's.
        shape: of what it is called with, in words.
        make: the model, with its own starting weights.
        draw: (draw, device) -> the keywords of a call. Tokens among them that require gradients get them.
    """

    name: str
    package: str
    shape: str
    make: Callable[[], nn.Module]
    draw: Callable[[Draw, torch.device], Inputs]

    def is_installed(self) -> bool:
        return all(importlib.util.find_spec(package) is not None for package in (self.package, "timm", "torchvision"))


def _timm(name: str, **options: Any) -> nn.Module:
    return libraries.import_timm().create_model(name, **options)  # type: ignore[no-any-return]


def _transformers(name: str, **options: Any) -> nn.Module:
    libraries.import_timm()  # it declares what transformers' import of torchvision asks for, too
    cls = towers.tower_class(name)
    return cls(cls.config_class(**options))  # type: ignore[attr-defined,no-any-return]


def image_tower(name: str, batch: int, side: int, **options: Any) -> Tower:
    """A model of timm's on images of one size."""
    make = functools.partial(_timm, name, **options)
    return Tower(name, "timm", f"B={batch} {side} px", make, lambda draw, device: {"x": draw(batch, 3, side, side)})


def _sizes(images: int) -> list[tuple[int, int]]:
    """Height and width in patches of so many images of mixed sizes: even, at most 256 patches."""
    some = ((16, 16), (24, 10), (10, 20), (16, 12), (12, 20), (8, 24), (14, 14), (10, 18))
    return [some[i % len(some)] for i in range(images)]


def qwen2_5_vl(images: int, **options: Any) -> Tower:
    """A block of Qwen2.5-VL's: images packed into one row of tokens, attention within each."""
    lengths = [math.prod(size) for size in _sizes(images)]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    sizes = {"hidden_size": 1280, "num_heads": 16, **options}
    width = sizes["hidden_size"]
    one = {"depth": 1, "spatial_merge_size": 1, **sizes}  # what is behind the blocks is left out, and so may be small

    def draw_tokens(draw: Draw, device: torch.device) -> Inputs:
        angles = draw(sum(lengths), width // sizes["num_heads"] // 2)
        angles = torch.cat([angles, angles], dim=-1)
        return {
            "hidden_states": draw(sum(lengths), width).requires_grad_(),
            "cu_seqlens": ends.to(device),
            "position_embeddings": (angles.cos(), angles.sin()),
        }

    return Tower(
        "Qwen2.5-VL, a block",
        "transformers",
        f"{images} images of {min(lengths)} to {max(lengths)} patches, D={width} H={sizes['num_heads']}",
        lambda: _transformers("qwen2_5_vl", **one).blocks[0],  # type: ignore[index,union-attr]
        draw_tokens,
    )


def siglip2(images: int, **options: Any) -> Tower:
    """SigLIP 2's NaFlex: images of mixed sizes, padded to the longest."""
    sizes = torch.tensor(_sizes(images))
    longest = int(sizes.prod(1).max())
    return Tower(
        "SigLIP 2 NaFlex, 2 blocks",
        "transformers",
        f"{images} images of mixed sizes, to {longest} patches",
        functools.partial(_transformers, "siglip2", **{"num_hidden_layers": 2, "num_patches": 256, **options}),
        lambda draw, device: {
            "pixel_values": draw(images, longest, 3 * 16**2),
            "pixel_attention_mask": (torch.arange(longest) < sizes.prod(1)[:, None]).long().to(device),
            "spatial_shapes": sizes.to(device),
        },
    )


def naflex(images: int, **options: Any) -> Tower:
    """timm's NaFlexVit: the same, with a place for each patch."""
    sizes = _sizes(images)
    longest = max(math.prod(size) for size in sizes)

    def draw_images(draw: Draw, device: torch.device) -> Inputs:
        places = torch.zeros(images, longest, 2, dtype=torch.long, device=device)
        taken = torch.zeros(images, longest, dtype=torch.bool, device=device)
        for index, size in enumerate(sizes):
            count = math.prod(size)
            places[index, :count] = torch.cartesian_prod(*(torch.arange(side, device=device) for side in size))
            taken[index, :count] = True
        return {"x": {"patches": draw(images, longest, 3 * 16**2), "patch_coord": places, "patch_valid": taken}}

    return Tower(
        "NaFlexViT-B, 2 blocks",
        "timm",
        f"{images} images of mixed sizes, to {longest} patches",
        functools.partial(_timm, "naflexvit_base_patch16_gap", **{"depth": 2, **options}),
        draw_images,
    )


def dinov3(batch: int, **options: Any) -> Tower:
    """DINOv3 ViT-H+: rotary positions and SwiGLU."""
    images = image_tower("vit_huge_plus_patch16_dinov3", batch, 224, **{"depth": 1, **options})
    return dataclasses.replace(images, name="DINOv3 ViT-H+, 1 block")


def swin_stage(stage: int, batch: int) -> Tower:
    """Two blocks of a stage of Swin-T, the second with shifted windows."""
    side, width = 56 >> stage, 96 << stage
    return Tower(
        f"Swin-T, 2 blocks of stage {stage + 1}",
        "timm",
        f"B={batch} {side}x{side} tokens, D={width} H={3 << stage}",
        lambda: _timm("swin_tiny_patch4_window7_224", drop_path_rate=0.0).layers[stage].blocks[:2],  # type: ignore[index,union-attr]
        lambda draw, device: {"input": draw(batch, side, side, width).requires_grad_()},
    )


def video(name: str, clips: int, frames: int, **options: Any) -> Tower:
    """A tower of transformers' on clips of 224 pixels, two blocks deep."""
    key = "pixel_values_videos" if name == "vjepa2" else "pixel_values"
    options = {"num_hidden_layers": 2, **({"pred_num_hidden_layers": 1} if name == "vjepa2" else {}), **options}
    return Tower(
        f"{ {'vjepa2': 'V-JEPA 2', 'videomae': 'VideoMAE'}[name] }, 2 blocks",
        "transformers",
        f"B={clips} {frames} frames of 224 px",
        functools.partial(_transformers, name, **options),
        lambda draw, device: {key: draw(clips, frames, 3, 224, 224)},
    )


def segformer(batch: int, side: int, **options: Any) -> Tower:
    """SegFormer B0's encoder."""
    none = dict.fromkeys(("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    return Tower(
        "SegFormer-B0",
        "transformers",
        f"B={batch} {side} px",
        functools.partial(_transformers, "segformer", **none, **options),
        lambda draw, device: {"pixel_values": draw(batch, 3, side, side)},
    )


def all_towers(times: int = 1) -> list[Tower]:
    """Every tower, on `times` as much as a CPU is given."""
    still = {"drop_path_rate": 0.0}
    return [
        qwen2_5_vl(2 * times),
        dinov3(2 * times),
        naflex(4 * times),
        siglip2(4 * times),
        image_tower("swin_tiny_patch4_window7_224", 2 * times, 224, **still),
        *(swin_stage(stage, 2 * times) for stage in range(4)),
        image_tower("swinv2_tiny_window8_256", times, 256, **still),
        image_tower("hiera_tiny_224", 2 * times, 224, **still),
        image_tower("pvt_v2_b1", 2 * times, 224, **still),
        segformer(2 * times, 224),
        video("videomae", times, 8, num_frames=8),
        video("vjepa2", times, 4),
    ]


class TowerBench:
    """A tower, stock and fused, forward and backward.

    Args:
        tower: what is timed.
        dtype: float32, or what autocast multiplies in.
    """

    def __init__(self, tower: Tower, dtype: torch.dtype, device: torch.device) -> None:
        self.tower, self.dtype, self.device = tower, dtype, device
        self.key = Key(KIND, tower.name, tower.shape, str(dtype).removeprefix("torch."), "forward + backward")

    def inputs(self, index: int) -> Inputs:
        generator = torch.Generator(self.device).manual_seed(index)
        return self.tower.draw(lambda *shape: torch.randn(shape, generator=generator, device=self.device), self.device)

    @functools.cached_property
    def stock(self) -> nn.Module:
        """The model whose weights both lanes have."""
        torch.manual_seed(0)
        model = self.tower.make().to(self.device)
        stir(model)  # nothing is left at 0 or 1
        return model.train()

    def fused(self) -> nn.Module:
        """A copy of it, fused."""
        return vk.fuse(copy.deepcopy(self.stock))

    def lanes(self) -> Mapping[str, Callable[[], Lane]]:
        if not self.tower.is_installed():
            return {}
        return {FUSED: lambda: TowerLane(self, self.fused()), STOCK: lambda: TowerLane(self, self.stock)}

    def truth(self, inputs: Inputs) -> Truth:
        """Fused may err twice as much as stock does, as in the tests of `vk.fuse`."""
        own = TowerLane(self, self.stock).results(inputs)
        exact = TowerLane(self, copy.deepcopy(self.stock).double(), autocast=False).results(_wide(inputs))
        largest = max(accuracy.size_of(value).rms for name, value in exact.items() if name != "output")
        floor = accuracy.FLOORS[torch.float32]
        return Truth(own, exact, dataclasses.replace(floor, absolute=ROUNDING[self.dtype] * largest))

    @functools.cached_property
    def flops(self) -> float:
        """Of the stock model's products forward, thrice."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.stock(**self.inputs(0))
        return 3.0 * counter.get_total_flops()

    @functools.cached_property
    def bytes(self) -> float:
        """Of what comes in, twice; of the weights, read forward and backward, and of their gradients, written."""
        weights = sum(weight.numel() * weight.itemsize for weight in self.stock.parameters())
        return 3.0 * weights + 2.0 * sum(each.numel() * each.itemsize for each in _tensors(self.inputs(0)))


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [each for each in tree_leaves(inputs) if isinstance(each, Tensor)]


def _wide(inputs: Inputs) -> Inputs:
    def widen(each: Any) -> Any:
        is_floating = isinstance(each, Tensor) and each.is_floating_point()
        return each.detach().double().requires_grad_(each.requires_grad) if is_floating else each

    return tree_map(widen, inputs)  # type: ignore[no-any-return]


class TowerLane:
    """One of the two in training."""

    def __init__(self, bench: TowerBench, model: nn.Module, autocast: bool = True) -> None:
        self.bench, self.model = bench, model
        self.autocast = autocast and bench.dtype != torch.float32
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def step(self, inputs: Inputs) -> tuple[Tensor, list[Tensor | None]]:
        """The output, and the gradients of a weighted sum of it; None of what it does not depend on."""
        with torch.autocast(self.bench.device.type, self.bench.dtype, enabled=self.autocast):
            output = self.model(**inputs)
        output = output if isinstance(output, Tensor) else output[0]
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device)
        loss = (output * weights.to(output.dtype).view_as(output)).sum() / math.sqrt(output.numel())
        leaves = [*self.weights.values(), *(each for each in _tensors(inputs) if each.requires_grad)]
        return output, list(torch.autograd.grad(loss, leaves, allow_unused=True))

    def results(self, inputs: Inputs) -> dict[str, Tensor]:
        output, gradients = self.step(inputs)
        names = [*self.weights, *(f"input {index}" for index in range(len(gradients) - len(self.weights)))]
        found = {f"gradient of {name}": each for name, each in zip(names, gradients, strict=True) if each is not None}
        return {"output": output.detach(), **found}
