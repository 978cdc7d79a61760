"""What a case is: an op, its arguments as tensors still to be drawn, and what is special about it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from layouts import LAYOUTS
from torch import Tensor
from torch.utils import checkpoint

import vitkernels as vk
from vitkernels import dispatch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class T:
    """A tensor to draw: normal numbers times `gain` plus `mean`, or what `convert` makes of them."""

    shape: tuple[int, ...]
    gain: float = 1.0
    mean: float = 0.0
    dtype: torch.dtype | None = None  # None: the dtype under test
    layout: str = "contiguous"
    grad: bool = True
    convert: Callable[[Tensor], Tensor] | None = None

    def build(self, generator: torch.Generator, dtype: torch.dtype, device: str) -> Tensor:
        values = torch.randn(self.shape, generator=generator, dtype=torch.float64) * self.gain + self.mean
        if self.convert is not None:
            values = self.convert(values)
        if values.is_floating_point():
            values = values.to(self.dtype or dtype)
        return LAYOUTS[self.layout](values.to(device))


@dataclass(frozen=True, eq=False)
class Case:
    """One call of an op.

    Args:
        op: name in `vitkernels.ops`.
        name: what is special about the case.
        tensors: the tensor arguments by name.
        options: the other arguments by name.
        dtypes: dtypes under test that the case makes sense in.
        pairs: arguments of the op that are pairs, by the names of the two in `tensors`.
        used: results that a gradient arrives at; () for all of them.
        grad_layout: layout of the gradients that arrive.
    """

    op: str
    name: str
    tensors: Mapping[str, T | None]
    options: Mapping[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = DTYPES
    pairs: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    used: tuple[str, ...] = ()
    grad_layout: str = "contiguous"

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"

    @property
    def results(self) -> tuple[str, ...]:
        return ("total", "normed") if self.op in ("add_layer_norm", "add_rms_norm") else ("out",)

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(str(self).encode()) + seed)

    def build(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """The tensor arguments; those that take a gradient are leaves that require it."""
        generator = self._generator(seed)
        tensors: dict[str, Tensor | None] = {}
        for name, spec in self.tensors.items():
            if spec is not None:
                tensor = spec.build(generator, dtype, device)
                tensors[name] = tensor.requires_grad_(spec.grad and tensor.is_floating_point())
            else:
                tensors[name] = None
        return tensors

    def build_gradients(self, outputs: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
        """The gradients that arrive at the results of `call`, in the results' dtypes."""
        generator = self._generator(seed)
        return {
            name: T(tuple(out.shape), layout=self.grad_layout).build(generator, out.dtype, str(out.device))
            for name, out in outputs.items()
            if name in (self.used or self.results)
        }

    def call(self, tensors: Mapping[str, Any], **overrides: Any) -> dict[str, Tensor]:
        """The op's results by name."""
        given = dict(tensors)
        for name, both in self.pairs.items():
            given[name] = tuple(given.pop(each) for each in both)
        outputs = getattr(vk.ops, self.op)(**given, **{**self.options, **overrides})
        return dict(zip(self.results, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))


class Loss:
    """A case as a function of the tensors that take gradients: it goes through other ops on both sides."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        tensors = case.build(dtype)
        self.case = case
        self.names = [name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad]
        self.fixed = {name: tensor for name, tensor in tensors.items() if name not in self.names}
        self.values = [tensors[name].detach() for name in self.names]

    def outputs(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        scaled = [value * 0.7 for value in values]
        return self.case.call(self.fixed | dict(zip(self.names, scaled, strict=True)))

    def __call__(self, *values: Tensor) -> Tensor:
        return torch.stack([output.float().sin().sum() for output in self.outputs(values).values()]).sum()

    def saving_the_op(self) -> Callable[[], Any]:
        """A `context_fn` for `checkpoint` that saves what the op returns and lets the rest be computed again."""
        forward_op = dispatch.OPS[self.case.op].forward_op

        def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
            save = op == forward_op
            return checkpoint.CheckpointPolicy.MUST_SAVE if save else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

        def contexts() -> Any:
            return checkpoint.create_selective_checkpoint_contexts(policy)

        return contexts

    def leaves(self) -> list[Tensor]:
        return [value.clone().requires_grad_() for value in self.values]

    def gradients(self, function: Callable[..., Tensor] | None = None) -> list[Any]:
        leaves = self.leaves()
        (function or self)(*leaves).backward()
        return [leaf.grad for leaf in leaves]
