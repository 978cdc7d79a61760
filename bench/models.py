"""A whole Vision Transformer, or one block of it, as a case to time: forward + backward, or a training step."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import accuracy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitkernels as vk
from bench import zoo
from bench.measure import Key, Lane, Truth
from bench.peers import compile_it
from vitkernels.nn import PRESETS, VisionTransformer

# The batch is run whole, and judged by what its first samples say of every weight: float64 activations of all of them
# do not fit everywhere.
JUDGED = 2
# A gradient that is the difference of larger ones (of q and k, where attention is nearly even; 0 for a bias on k) comes
# out as their rounding: of this share of the largest gradient.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


class ModelBench:
    """A model, or with `block` its first block alone.

    Args:
        name: a preset, or what the arguments are called.
        arguments: of `VisionTransformer`, over the preset's.
        batch: samples.
        dtype: float32, or what autocast multiplies in.
        lanes: names from `zoo`.
        tokens: of a block, N.
        update: with an optimizer's step, AdamW; forward + backward alone where False.
        kind: of the key, where it is no block.
        sweep: `sweep` and `at` of the key.
    """

    def __init__(
        self,
        name: str,
        arguments: Mapping[str, Any],
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        lanes: Sequence[str],
        *,
        block: bool = False,
        tokens: int = 0,
        update: bool = False,
        kind: str = "model",
        **sweep: Any,
    ) -> None:
        self.arguments = {"img_size": 224, "num_classes": 1000, **PRESETS.get(name, {}), **arguments}
        self.batch, self.dtype, self.device, self.block, self.update = batch, dtype, device, block, update
        self.names = [lane for lane in lanes if zoo.available(lane)]
        self.patches = (self.arguments["img_size"] // self.arguments["patch_size"]) ** 2
        self.tokens = tokens if block else self.patches + int(self.arguments.get("class_token", True))
        width, heads = self.arguments["embed_dim"], self.arguments["num_heads"]
        shape = f"B={batch} N={self.tokens} D={width} H={heads}"
        if not block:
            shape = f"B={batch} {self.arguments['img_size']} px, N={self.tokens}"
        self.key = Key(
            "block" if block else kind,
            name,
            shape,
            str(dtype).removeprefix("torch."),
            "training step" if update else "forward + backward",
            **sweep,
        )

    def inputs(self, index: int) -> tuple[Tensor, Tensor]:
        """Images and labels; tokens and the gradient of what the block makes of them."""
        generator = torch.Generator(self.device).manual_seed(index)
        if self.block:
            shape = (self.batch, self.tokens, self.arguments["embed_dim"])
            tokens, gradient = (torch.randn(shape, generator=generator, device=self.device) for _ in range(2))
            return tokens.requires_grad_(), gradient
        side = self.arguments["img_size"]
        images = torch.randn(self.batch, 3, side, side, generator=generator, device=self.device)
        return images, torch.randint(
            self.arguments["num_classes"], (self.batch,), generator=generator, device=self.device
        )

    def lanes(self) -> Mapping[str, Callable[[], Lane]]:
        return {name: functools.partial(self._lane, name) for name in self.names}

    def _lane(self, name: str) -> ModelLane:
        model = zoo.build(name, self.vit, self.arguments)
        if self.block:
            model = model.first_block()
        call: Callable[[Tensor], Any] = model.module
        if name in zoo.COMPILED:
            call = compile_it(model.module, zoo.COMPILED[name][1])
        return ModelLane(self, model, call)

    def truth(self, inputs: tuple[Tensor, Tensor]) -> Truth:
        ours = zoo.build("vitkernels", self.vit, self.arguments)
        wide = zoo.build("vitkernels", copy.deepcopy(self.vit).double(), self.arguments)
        if self.block:
            ours, wide = ours.first_block(), wide.first_block()
        with vk.use("reference"):
            few = inputs[0][:JUDGED].detach()
            reference = ModelLane(self, ours, ours.module).results((few.requires_grad_(self.block), inputs[1]))
            doubled = few.detach().double().requires_grad_(self.block)
            exact = ModelLane(self, wide, wide.module, autocast=False).results((doubled, inputs[1]))
        largest = max(accuracy.size_of(value).rms for name, value in exact.items() if name != "output")
        floor = accuracy.FLOORS[torch.float32]
        return Truth(reference, exact, dataclasses.replace(floor, absolute=ROUNDING[self.dtype] * largest))

    @functools.cached_property
    def vit(self) -> VisionTransformer:
        """The model whose weights all lanes have."""
        torch.manual_seed(0)
        vit = VisionTransformer(**self.arguments)
        with torch.no_grad():  # nothing is left at 0 or 1
            for parameter in vit.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        return vit.to(self.device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @functools.cached_property
    def flops(self) -> float:
        """Of the matrix products, two backward for each one forward; what is computed anew is not counted."""
        width, depth = self.arguments["embed_dim"], 1 if self.block else self.arguments["depth"]
        hidden = zoo.hidden(self.arguments)
        rows = self.batch * self.tokens
        blocks = depth * (2 * rows * width * (4 * width + 2 * hidden) + 4 * rows * self.tokens * width)
        if self.block:
            return 3.0 * blocks
        embed = 2 * self.batch * self.patches * width * 3 * self.arguments["patch_size"] ** 2
        head = 2 * self.batch * width * self.arguments["num_classes"]
        return 3.0 * (blocks + head) + 2.0 * embed  # no gradient of the image

    @functools.cached_property
    def bytes(self) -> float:
        """Of what comes in, twice; of the weights, read forward and backward, and of their gradients, written."""
        module: nn.Module = self.vit.blocks[0] if self.block else self.vit
        weights = sum(weight.numel() * weight.itemsize for weight in module.parameters())
        size = self.tokens * self.arguments["embed_dim"] if self.block else 3 * self.arguments["img_size"] ** 2
        return 3.0 * weights + 2.0 * 4 * self.batch * size


class ModelLane:
    """One model in training."""

    def __init__(
        self, bench: ModelBench, model: zoo.Model, call: Callable[[Tensor], Any], autocast: bool = True
    ) -> None:
        self.bench, self.model, self.call = bench, model, call
        self.autocast = bench.autocast if autocast else contextlib.nullcontext
        self.weights = dict(model.module.named_parameters())
        # lr=0: the same work, and the weights that were judged
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=0.0, fused=True) if bench.update else None

    def _forward(self, x: Tensor) -> Tensor:
        with self.autocast():
            output = self.call(x)
        if isinstance(output, tuple):
            return output[0]
        return self.model.output(output)

    def step(self, inputs: tuple[Tensor, Tensor]) -> None:
        x, target = inputs
        output = self._forward(x)
        if self.bench.block:
            torch.autograd.grad(output, [x, *self.weights.values()], target.to(output.dtype))
            return
        loss = F.cross_entropy(output.float(), target)
        if self.optimizer is None:
            torch.autograd.grad(loss, list(self.weights.values()))
            return
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def results(self, inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The output for the first samples, and the gradients of a weighted sum of it, by our names and shapes."""
        x, _ = inputs
        output = self._forward(x)[:JUDGED]
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(output).view_as(output)
        leaves = [*self.weights.values(), *([x] if self.bench.block else [])]
        gradients = torch.autograd.grad((output * weights).sum() / math.sqrt(output.numel()), leaves)
        by_name = dict(zip(self.weights, gradients, strict=False))
        results = {"output": output.detach()}
        if self.bench.block:
            results["gradient of x"] = gradients[-1][:JUDGED]
        for name, theirs in self.model.names.items():
            shape = self._shape_of(name)
            results[f"gradient of {name}"] = torch.cat([by_name[each].flatten() for each in theirs]).view(shape)
        return results

    def _shape_of(self, name: str) -> torch.Size:
        vit = self.bench.vit
        return (vit.blocks[0] if self.bench.block else vit).get_parameter(name).shape
