"""One step of a residual stream: add, norm, and a product that reads the norm.

    total  = x + row_scale[b] * scale * (branch + branch_bias)
    result = product(layer_norm(total))

A step computes what the ops one by one compute, through the same kernels. It keeps less: `normed` is made again from
`total`, which is kept anyway (one pass over memory gives the same bits), and under autocast weights are cast again
instead of kept as copies. `_stretch` makes autograd Functions of steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkernels import ops
from vitkernels.op import Op
from vitkernels.ops._amp import CODES, cast, cast_dtype
from vitkernels.ops._plan import Launch
from vitkernels.ops.add_layer_norm import KEPT, op_rms
from vitkernels.ops.add_layer_norm import backward as norm_backward
from vitkernels.ops.add_layer_norm import check as check_norm
from vitkernels.ops.add_layer_norm import kept as kept_of_norm
from vitkernels.ops.add_layer_norm import op as op_norm

_SMALL = 2**16  # elements; a norm's result of fewer is kept: making it again would take longer than its memory is worth
# Autocast's copies of weights are kept for fewer rows than this: making them again would cost what a product does.
FEW_ROWS = 256
# A backend that rounds weights as it multiplies keeps no copies up to ROUNDED rows. From there on a library may
# multiply, which would cast each weight twice, forward and backward: copies are kept up to FEW_ROWS_OF_COPIES.
FEW_ROWS_OF_COPIES, ROUNDED = 1024, 200


class Norm(NamedTuple):
    """A norm's weight, bias (as in `ops.add_layer_norm`) and eps; and whether its result is made again in backward.

    `again` is None for what suits the device: on GPUs the pass over memory costs more than the memory is worth. `rms`
    says that it is an RMSNorm.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    again: bool | None = None
    rms: bool = False


class Added(NamedTuple):
    """What a step adds to the stream: the branch of the sub-layer before it, [B, N, D], and its factors.

    Attributes are those of `ops.add_layer_norm`: the bias of the branch's projection, [D]; LayerScale's gamma, [D];
    DropPath's factor of each sample, [B].
    """

    branch: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    row_scale: Tensor | None = None


NOTHING_ADDED = (None, None, None, None)


def add_norm(x: Tensor, added: Added | None, norm: Norm, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(total, normed) by `ops.add_layer_norm` or `ops.add_rms_norm`."""
    branch, branch_bias, scale, row_scale = added or NOTHING_ADDED
    return (ops.add_rms_norm if norm.rms else ops.add_layer_norm)(
        x,
        branch,
        norm.weight,
        bias=norm.bias,
        eps=norm.eps,
        branch_bias=branch_bias,
        scale=scale,
        row_scale=row_scale,
        out_dtype=out_dtype,
    )


@dataclass
class Step:
    """A product that reads a norm.

    Attributes:
        name: of the product.
        check: (x, *arguments, autocast's dtype), which raises.
        ops: (normed, *arguments) -> result, through the public ops.
        forward: (launch, normed, learns, *arguments) -> (result, what its backward keeps).
        backward: (launch, dresult, normed, needs of normed and of the arguments, arguments, kept, grad_dtype) ->
            gradients of normed and of the arguments, these in any dtype; arguments that are biases come as None.
            grad_dtype is what backward ops have by that name.
        weights, biases: which of the arguments are; autocast rounds both. Nothing reads a bias again: it may be written
            into.
        keeps: how many tensors its backward keeps.
        op: that reads the norm.
        beside_norm: which of the weights are multiplied with the norm: their gradients read it.
        spares: (place, source) among what its backward keeps: where norms are made again and the source is kept, the
            other one is None there, and backward makes it anew.
        check_values: (x, *arguments), which raises; of what tensors hold, and so at each call. None where no op asks.
    """

    name: str
    check: Callable[..., None]
    ops: Callable[..., Tensor]
    forward: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    backward: Callable[..., Sequence[Tensor | None]]
    weights: tuple[int, ...]
    biases: tuple[int, ...]
    keeps: int
    op: Op
    beside_norm: tuple[int, ...] = (0,)
    spares: tuple[int, int] | None = None
    check_values: Callable[..., None] | None = None

    def __post_init__(self) -> None:
        STEPS[self.name] = self


STEPS: dict[str, Step] = {}  # by name


class Stream(NamedTuple):
    """What is known of the stream, [..., D], or of a branch before there is a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    learns: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Stream:
        return cls(tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)


ADDED = 9  # what a step is given before its product's arguments: x, and the eight that `Part` lists
BRANCH_BIAS = 4  # its place among them, behind x
_BEFORE_ARGUMENTS = 2 + KEPT  # tensors that are saved before them: normed, the norm's bias, what its backward keeps
SAVED_BIAS = _BEFORE_ARGUMENTS - 3  # of the branch: before its two factors


class Part:
    """What a step comes to for one kind of call.

    Args:
        step: the product.
        x, branch: the stream, and what is added to it.
        given: its inputs behind x: branch, weight, bias, eps, branch_bias, scale, row_scale, (autocast's dtype, whether
            the norm is made again, whether it is an RMSNorm), *arguments.

    Attributes:
        total, result: what it makes of them.
        multiplied: which of the arguments are weights that the product's backward reads.
        saves: how many tensors it saves.
    """

    def __init__(self, step: Step, x: Stream, branch: Stream | None, given: Sequence[Any]) -> None:
        _, weight, bias, self.eps, branch_bias, scale, row_scale, (self.dtype, again, rms), *arguments = given
        self.op_norm: Op = op_rms if rms else op_norm
        self.step = step
        factors = (branch_bias, scale, row_scale)
        learning = [each is not None and each.requires_grad for each in (*factors, weight, bias)]
        summed = x.learns or (branch is not None and branch.learns) or any(learning[:3])
        self.norm_learns, self._factors_learn = summed or any(learning[3:]), any(learning[1:3])
        dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
        self.branch_dtype = None if branch is None else branch.dtype
        self.normed_dtype = dtype if self.dtype is None else cast_dtype(torch.empty(0, dtype=dtype), self.dtype)
        beside_norm = [arguments[index] for index in step.beside_norm]
        reads = self.norm_learns or any(each is not None and each.requires_grad for each in beside_norm)
        self._again = is_made_again(again, x)
        # a frozen norm's input is anybody's to write into
        self.keeps_normed = not (self._again and self.norm_learns) and reads
        self.learns = self.norm_learns or any(isinstance(each, Tensor) and each.requires_grad for each in arguments)
        self.total = Stream(x.shape, dtype, x.device, summed)
        width = arguments[step.weights[-1]].shape[0]
        self.result = Stream(torch.Size([*x.shape[:-1], width]), self.normed_dtype, x.device, self.learns)
        self.read = [isinstance(each, Tensor) and index not in step.biases for index, each in enumerate(arguments)]
        self.multiplied = [index for index in sorted(step.weights) if self.read[index]]
        self.rest = [None if isinstance(each, Tensor) else each for each in arguments]
        self.dtypes = [each.dtype if isinstance(each, Tensor) else None for each in arguments]
        self.saves = _BEFORE_ARGUMENTS + len(arguments) + step.keeps
        parameters = {self.dtypes[index] for index in (*step.weights, *step.biases)} - {None}
        # backward ops give all gradients in one dtype: float16 would lose what others' parameters hold
        self._widest = torch.float32 if torch.float16 in parameters and len(parameters) > 1 else None

    def saved_at(self, argument: int) -> int:
        """Where an argument is among the tensors that are saved."""
        return _BEFORE_ARGUMENTS + argument

    def keeps_copies(self, like: Tensor, arguments: Sequence[Any]) -> bool:
        """Whether autocast's copies of the weights are kept from the forward pass for the backward one; `like` has the
        stream's device."""
        rows = self.total.shape[:-1].numel()
        normed = like.new_empty(1, dtype=self.normed_dtype).expand(self.total.shape)
        op = self.step.op  # its arguments are the first ones of the step's
        choice = op.choose("forward", (normed, *arguments)[: len(op.forward_op._schema.arguments)])
        rounds = op.implementations[choice.call.backend].rounds_weights
        return ROUNDED < rows < FEW_ROWS_OF_COPIES if rounds else rows < FEW_ROWS

    def compute(
        self,
        launch: Launch,
        learns: bool,
        copies: bool,
        x: Tensor,
        branch: Tensor | None,
        given: Sequence[Any],
    ) -> tuple[Tensor, Tensor, Sequence[Any], list[Tensor | None]]:
        """total, result, the arguments as they were multiplied, and what is to be saved.

        Args:
            launch: what launches.
            learns: whether there will be a backward pass.
            copies: whether autocast's copies of weights are made here; launchers make their own otherwise.
            x, branch, given: the inputs.
        """
        _, weight, bias, eps, branch_bias, scale, row_scale, _, *arguments = given
        total, normed, mean, rstd = launch(
            "norm", self.op_norm, x, branch, weight, bias, eps, branch_bias, scale, row_scale, CODES[self.normed_dtype]
        )
        total = x if branch is None else total
        rounded = self._rounded((*self.step.weights, *self.step.biases), arguments) if copies else arguments
        kept: tuple[Tensor | None, ...]
        result, kept = self.step.forward(launch, normed, learns, *rounded)
        if not learns:
            return total, result, rounded, []
        if self._again and self.step.spares is not None:
            place, source = self.step.spares
            if kept[source] is not None:
                kept = (*kept[:place], None, *kept[place + 1 :])
        of_norm = kept_of_norm(total, branch, weight, mean, rstd, branch_bias, scale, row_scale, self._factors_learn)
        saved = [
            normed if self.keeps_normed else None,
            bias if self.norm_learns else None,
            *(of_norm if self.norm_learns else [None] * KEPT),
            *[each if is_read else None for each, is_read in zip(arguments, self.read, strict=True)],
            *kept,
        ]
        return total, result, rounded, saved

    def gradients(
        self,
        launch: Launch,
        needs: Sequence[bool],
        dtotal: Tensor | None,
        dresult: Tensor | None,
        saved: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """Of x and of what was given; `saved` is what `compute` said, parameters by their values."""
        normed, bias, of_norm, tensors = saved[0], saved[1], saved[2:_BEFORE_ARGUMENTS], saved[_BEFORE_ARGUMENTS:]
        count = len(self.rest)
        both = zip(tensors[:count], self.rest, strict=True)
        arguments = [rest if tensor is None else tensor for tensor, rest in both]
        needs_normed, needs_arguments = any(needs[: ADDED - 1]), needs[ADDED:]
        dnormed: Tensor | None = None
        grads: Sequence[Tensor | None] = [None] * count
        if dresult is not None:
            if normed is None:
                reads = any(needs_arguments[index] for index in self.step.beside_norm)
                normed = self._normed_again(dresult, of_norm, bias, reads)
            needs_product = [needs_normed, *needs_arguments]
            dnormed, *found = self.step.backward(
                launch, dresult, normed, needs_product, arguments, tensors[count:], self._grad_dtype(tensors)
            )
            grads = [_in_dtype(*each) for each in zip(found, self.dtypes, strict=True)]
        above: Sequence[Tensor | None] = (None,) * (ADDED - 1)
        if needs_normed:
            run = functools.partial(launch, "norm", self.op_norm)
            above = norm_backward(needs, dtotal, dnormed, of_norm, self.branch_dtype, run)
        return [*above, None, *grads]

    def _grad_dtype(self, tensors: Sequence[Tensor | None]) -> int:
        """The dtype of weights that are here as copies in another; 0 where they are themselves."""
        if self._widest is not None:
            return CODES[self._widest]
        index = self.multiplied[0]
        weight, own = tensors[index], self.dtypes[index]
        return 0 if own is None or weight is None or weight.dtype == own else CODES[own]

    def _rounded(self, indices: Sequence[int], arguments: Sequence[Any]) -> Sequence[Any]:
        """The arguments, those of these indices as autocast gives them to a product."""
        assert self.dtype is not None
        found = list(arguments)
        for index in indices:
            (found[index],) = cast(self.dtype, found[index])
        return found

    def _normed_again(self, like: Tensor, of_norm: Sequence[Any], bias: Tensor | None, reads: bool) -> Tensor:
        """The norm's result once more, a forward launch of its op; without contents where nothing reads it."""
        if not reads:
            return like.new_empty(self.total.shape, dtype=self.normed_dtype)
        total, _, weight, *_ = of_norm
        with torch.no_grad():
            return self.op_norm(total, None, weight, bias, self.eps, None, None, None, CODES[self.normed_dtype])[1]


def is_made_again(again: bool | None, x: Tensor | Stream) -> bool:
    """Whether a norm of this stream is made again in backward, where it learns; `again` as in `Norm`."""
    return (x.device.type != "cuda" if again is None else again) and math.prod(x.shape) >= _SMALL


def check(step: Step, x: Tensor, given: Sequence[Any]) -> None:
    """Raise what the ops would raise for these inputs."""
    branch, weight, bias, _, branch_bias, scale, row_scale, (dtype, *_), *arguments = given
    check_norm(x, branch, weight, bias, branch_bias, scale, row_scale, dtype)
    step.check(x if branch is None else x.to(torch.promote_types(x.dtype, branch.dtype)), *arguments, dtype)


def _in_dtype(grad: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """A gradient in the dtype of what it is the gradient of."""
    return grad if grad is None or grad.dtype == dtype else grad.to(dtype)
