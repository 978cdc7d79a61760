"""An op as a case to time: the tests' case at a size that people train at, ours and its peers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import accuracy
import cases
import torch
from case import Case, T
from torch import Tensor

from bench import peers
from bench.measure import OURS, Key, Lane, Truth
from vitkernels import dispatch, ext_cuda

CUDA_CPP = "vitkernels, CUDA C++"  # where Triton is there too


@dataclass(frozen=True)
class Size:
    """The sizes of a Vision Transformer that its ops see."""

    batch: int
    tokens: int
    width: int
    heads: int
    hidden: int = 0  # of the feed-forward; 4 times the width where 0
    patch: int = 16

    def __str__(self) -> str:
        return f"B={self.batch} N={self.tokens} D={self.width} H={self.heads}"


def of_size(size: Size) -> Iterator[Case]:
    """The tests' cases at this size; the tokens include one that stands for no patch where they are no square."""
    rows, width = (size.batch, size.tokens), size.width
    side = math.isqrt(size.tokens)
    yield cases.patch_embed(
        f"{size.batch} images of {side * size.patch} px, P={size.patch} D={width}",
        size.patch,
        (side, side),
        batch=size.batch,
        width=width,
        image={"grad": False},
    )
    yield cases.attention_qkv(f"{size}", size.batch, size.heads, size.tokens, width // size.heads)
    yield cases.attention_rel_pos_qkv(f"{size}", size.batch, size.heads, (side, side), width // size.heads)
    counts = tuple(size.tokens * (1 + 6 * i // max(size.batch - 1, 1)) // 4 for i in range(size.batch))
    yield cases.attention_varlen_qkv(f"{size} on average", counts, size.heads, width // size.heads)
    yield cases.rotary(f"{size}", (size.batch, size.heads, size.tokens, width // size.heads))
    norms = {"norm": "rms_norm", "vectors": ("q_weight", "k_weight")}
    yield cases.rotary_qkv(f"{size}", (*rows, 3, size.heads, width // size.heads), **norms)
    yield cases.add_layer_norm(f"{size}", (*rows, width), vectors=("bias",))
    yield cases.add_rms_norm(f"{size}", (*rows, width), vectors=())
    hidden = size.hidden or 4 * width
    yield cases.mlp(f"{size}", rows, (width, hidden, width))
    yield cases.glu_mlp(f"{size}", rows, (width, hidden * 2 // 3 // 8 * 8, width))  # as many weights as mlp's
    yield cases.linear(f"{size}, qkv", rows, width, 3 * width)


class Inputs(NamedTuple):
    """The arguments of an op by name, and the gradients that arrive at its results."""

    tensors: dict[str, Tensor | None]
    gradients: dict[str, Tensor]


class OpBench:
    """One op at one size, forward alone or with its backward."""

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        device: torch.device,
        backward: bool,
        *,
        autotune: bool = True,
        **sweep: Any,
    ) -> None:
        self.case, self.dtype, self.device, self.backward = case, dtype, device, backward
        self.autotune = autotune  # whether peers are compiled with max-autotune too, which takes minutes
        direction = "forward + backward" if backward else "forward"
        self.key = Key("op", case.op, case.name, str(dtype).removeprefix("torch."), direction, **sweep)

    def inputs(self, index: int) -> Inputs:
        generator = torch.Generator(self.device).manual_seed(index)

        def draw(spec: T) -> Tensor:
            values = torch.randn(spec.shape, generator=generator, device=self.device) * spec.gain + spec.mean
            if spec.convert is not None:
                values = spec.convert(values).to(self.device)
            return values.to(spec.dtype or self.dtype).requires_grad_(spec.grad)

        tensors = {name: None if spec is None else draw(spec) for name, spec in self.case.tensors.items()}
        gradients = {name: draw(T(tuple(out.shape), dtype=out.dtype, grad=False)) for name, out in self._shapes.items()}
        return Inputs(tensors, gradients)

    def truth(self, inputs: Inputs) -> Truth:
        reference = accuracy.run(self.case, *inputs, forward="reference")
        exact = accuracy.run_truth(self.case, *inputs)
        wanted = [name for name in exact if self.backward or name in self.case.results]
        floor = accuracy.floor_of(inputs.tensors)
        return Truth({name: reference[name] for name in wanted}, {name: exact[name] for name in wanted}, floor)

    def lanes(self) -> Mapping[str, Callable[[], Lane]]:
        theirs = peers.builders(self.case.op, self.device, self.autotune)
        return {
            OURS: lambda: OpLane(self, lambda **tensors: tuple(self.case.call(tensors).values())),
            **({CUDA_CPP: lambda: OpLane(self, self._in_cuda_cpp)} if self._has_cuda_cpp() else {}),
            **{name: functools.partial(self._peer, build) for name, build in theirs.items()},
        }

    def _has_cuda_cpp(self) -> bool:
        return self.device.type == "cuda" and ext_cuda.Cuda().why_not() is None

    def _in_cuda_cpp(self, **tensors: Any) -> tuple[Tensor, ...]:
        with dispatch.scope(("ext",)):
            return tuple(self.case.call(tensors).values())

    def _peer(self, build: Callable[[], peers.Call]) -> OpLane:
        return OpLane(self, functools.partial(build(), **self.case.options))

    @functools.cached_property
    def _shapes(self) -> dict[str, Tensor]:
        """The results without their numbers."""
        specs = self.case.tensors.items()
        return self.case.call(
            {
                name: None if spec is None else torch.empty(spec.shape, dtype=spec.dtype or self.dtype, device="meta")
                for name, spec in specs
            }
        )

    @functools.cached_property
    def flops(self) -> float:
        """Of the matrix products, two backward for each one forward; each way of a norm about 8 an element, of rotary
        3, and of rotary_qkv, which normalises first, 8.

        What a kernel computes anew to save memory is not counted.
        """
        shapes = {name: spec.shape for name, spec in self.case.tensors.items() if spec is not None}
        backward = 2 * self.backward
        if self.case.op == "linear":
            return 2.0 * math.prod(shapes["x"]) * shapes["weight"][0] * (1 + backward)
        if self.case.op == "mlp":
            products = math.prod(shapes["x"]) * shapes["w1"][0] * 2
            return 2.0 * products * (1 + backward)
        if self.case.op == "glu_mlp":
            rows = math.prod(shapes["x"][:-1])
            return 2.0 * rows * (math.prod(shapes["w_gate_up"]) + math.prod(shapes["w_down"])) * (1 + backward)
        if self.case.op == "patch_embed":
            rows = math.prod(self._shapes["out"].shape[:2])
            return 2.0 * rows * math.prod(shapes["weight"]) * (1 + self.backward)  # no gradient of the image
        if self.case.op == "attention_qkv":
            batch, tokens, packed = shapes["qkv"]
            return 4.0 * batch * tokens**2 * packed / 3 * (1 + backward)
        if self.case.op == "attention_rel_pos":
            batch, tokens, *packed = shapes["qkv"]
            return 4.0 * batch * tokens**2 * math.prod(packed) / 3 * (1 + backward)
        if self.case.op == "attention_varlen":
            _, _, *head = shapes["qkv"]
            ends = self.case.tensors["cu_seqlens"]
            assert ends is not None
            assert ends.convert is not None
            scores = ends.convert(torch.empty(0)).diff().double().square().sum().item()
            return 4.0 * scores * math.prod(head) * (1 + backward)
        elements = math.prod(shapes["qkv" if self.case.op == "rotary_qkv" else "x"])
        return (3.0 if self.case.op == "rotary" else 8.0) * elements * (1 + self.backward)

    @functools.cached_property
    def bytes(self) -> float:
        """Every argument, result and gradient once each way: what no kernel can do without.

        Backward, a norm needs neither x nor branch but their sum, and their gradients are one; rotary needs its sines
        and cosines alone, and rotary_qkv its norms' input too.
        """
        specs = {name: spec for name, spec in self.case.tensors.items() if spec is not None}
        sizes = {name: math.prod(spec.shape) * (spec.dtype or self.dtype).itemsize for name, spec in specs.items()}
        read = sum(sizes.values())
        written = sum(out.numel() * out.dtype.itemsize for out in self._shapes.values())
        if not self.backward:
            return float(read + written)
        gradients = sum(sizes[name] for name, spec in specs.items() if spec.grad)
        spared = sizes["x"] if self.case.op == "rotary" else 2 * sizes.get("branch", 0)
        return float(2 * (read + written) + gradients - spared)


@dataclass(frozen=True)
class OpLane:
    """One way to compute an op."""

    bench: OpBench
    call: peers.Call

    def step(self, inputs: Inputs) -> Any:
        if not self.bench.backward:
            with torch.no_grad():
                return self.call(**inputs.tensors)
        outputs = self._outputs(inputs)
        return torch.autograd.grad(list(outputs.values()), self._leaves(inputs), list(inputs.gradients.values()))

    def results(self, inputs: Inputs) -> dict[str, Tensor]:
        if not self.bench.backward:
            with torch.no_grad():
                return self._outputs(inputs)
        outputs = self._outputs(inputs)
        leaves = [name for name, tensor in inputs.tensors.items() if tensor is not None and tensor.requires_grad]
        gradients = torch.autograd.grad(list(outputs.values()), self._leaves(inputs), list(inputs.gradients.values()))
        named = {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return {name: output.detach() for name, output in outputs.items()} | named

    def _outputs(self, inputs: Inputs) -> dict[str, Tensor]:
        out = self.call(**inputs.tensors)
        return dict(zip(self.bench.case.results, out if isinstance(out, tuple) else (out,), strict=True))

    def _leaves(self, inputs: Inputs) -> list[Tensor]:
        return [tensor for tensor in inputs.tensors.values() if tensor is not None and tensor.requires_grad]
