"""One run of a model on a batch: its outputs and gradients, with nothing of what the caller has changed by it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves, tree_map_with_path

from vitkernels.fuse.swap import Fused

GRADIENT = "gradient of "


@dataclass(frozen=True)
class Batch:
    """What a model is called with, and what is made of its outputs; no run changes it."""

    inputs: tuple[Any, ...]
    keywords: Mapping[str, Any]
    loss: Callable[[Any], Tensor] | None = None

    def tensors(self) -> list[Tensor]:
        return [each for each in tree_leaves((self.inputs, dict(self.keywords))) if isinstance(each, Tensor)]

    def copy(self, wide: bool = False) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Tensor]]:
        """The inputs and keywords once more, with leaves for tensors, and those that require a gradient by name.

        Args:
            wide: with floating-point tensors in float64.
        """
        leaves: dict[str, Tensor] = {}
        copies: dict[int, Tensor] = {}  # one tensor given twice stays one: modules ask `key is query`

        def anew(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in copies:
                dtype = torch.float64 if wide and value.is_floating_point() else value.dtype
                copies[id(value)] = value.detach().clone().to(dtype).requires_grad_(value.requires_grad)
                if value.requires_grad:
                    leaves[name] = copies[id(value)]
            return copies[id(value)]

        inputs = tree_map_with_path(lambda path, value: anew(f"input{keystr(path)}", value), self.inputs)
        keywords = {
            key: tree_map_with_path(lambda path, value, key=key: anew(f"{key}{keystr(path)}", value), given)
            for key, given in self.keywords.items()
        }
        return inputs, keywords, leaves


@dataclass(frozen=True)
class Run:
    """What a run gave, on the CPU.

    Attributes:
        outputs: every floating-point tensor in what the model returned, and the caller's loss, by name.
        gradients: of every parameter and input that requires one; None where the loss does not depend on it.
        start, end: the random generators' states before and after it, the CPU's first.
    """

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    start: list[Tensor]
    end: list[Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Outputs, and the gradients that there are."""
        gradients = {f"{GRADIENT}{name}": each for name, each in self.gradients.items() if each is not None}
        return {**self.outputs, **gradients}


def run(model: nn.Module, batch: Batch, *, wide: bool = False) -> Run:
    """Call the model and take gradients, under the caller's autocast; the same random numbers each time.

    Args:
        model: called as it is.
        batch: what it is called with.
        wide: the model is in float64: so are the inputs, and no autocast.

    Raises:
        ValueError: what the model or the loss raised, introduced by a sentence; or nothing that comes out depends on
            anything that requires a gradient.
        TypeError: the caller's loss is no scalar tensor.
    """
    inputs, keywords, leaves = batch.copy(wide)
    indices = _cuda_indices(model, batch)
    with torch.random.fork_rng(devices=indices), contextlib.ExitStack() as stack:
        for kind in _autocast_kinds(model, batch):
            # without the cache: the caller's region would go on with weights cast here
            stack.enter_context(
                torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=not wide, cache_enabled=False)
            )
        start = _random_states(indices)
        with _introduced("the model does not run on these inputs"):
            returned = model(*inputs, **keywords)
        outputs = {name: each for name, each in tensors_in(returned) if each.is_floating_point()}
        loss = _projection(outputs) if batch.loss is None else _loss(batch.loss, returned)
        for kind in _autocast_kinds(model, batch):  # training loops run backward outside of autocast
            stack.enter_context(torch.autocast(kind, enabled=False))
        with _introduced("the model's backward pass fails"):
            gradients = _gradients(loss, {**_trained(model), **leaves})
        end = _random_states(indices)
    if batch.loss is not None:
        outputs["loss"] = loss
    # copies: an output may be a buffer, which takes its value back
    kept = {name: each.detach().to("cpu", copy=True) for name, each in outputs.items()}
    return Run(kept, gradients, start, end)


@contextlib.contextmanager
def _introduced(sentence: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(f"verify: {sentence}: {type(error).__name__}: {error}") from error


def tensors_in(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in what a model returned, however nested, with its path: "output.hidden_states[2]"."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from tensors_in(each, f"{name}.{key}")
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key, each in zip(value._fields, value, strict=True):
            yield from tensors_in(each, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from tensors_in(each, f"{name}[{index}]")
    elif dataclasses.is_dataclass(value):
        for each in dataclasses.fields(value):
            yield from tensors_in(getattr(value, each.name), f"{name}.{each.name}")


# ------------------------------------------------------------------------------------------------ loss and gradients


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def _projection(outputs: Mapping[str, Tensor]) -> Tensor:
    """The sum of all numbers that depend on something trained, each with a sign that is always the same.

    Signs are exact in every dtype: the gradient that arrives at an output does not depend on it.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    differentiable = [each for each in outputs.values() if each.requires_grad]
    if not differentiable:
        raise ValueError(
            f"verify: no floating-point tensor among the outputs ({', '.join(outputs) or 'none'}) depends on a "
            "parameter or an input that requires a gradient"
        )
    signs = [torch.randint(0, 2, each.shape, generator=generator, device="cpu") * 2 - 1 for each in differentiable]
    terms = [(each * sign.to(each)).sum() for each, sign in zip(differentiable, signs, strict=True)]
    return torch.stack([each.to(terms[0]) for each in terms]).sum()


def _loss(function: Callable[[Any], Tensor], returned: Any) -> Tensor:
    with _introduced("argument 'loss' does not take what the model returned"):
        loss = function(returned)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TypeError(f"verify: argument 'loss' returned {got}; needs a tensor of one element")
    if not loss.requires_grad:
        raise ValueError("verify: what argument 'loss' returned depends on nothing that requires a gradient")
    return loss


def _gradients(loss: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Gradients by name; .grad fields stay as they are, and hooks that wait for them are not called."""
    if _has_reentrant_checkpoint(loss):
        found: Sequence[Tensor | None] = _gradients_by_backward(loss, list(leaves.values()))
    else:
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: None if each is None else _plain(each) for name, each in zip(leaves, found, strict=True)}


def _plain(gradient: Tensor) -> Tensor:
    """On the CPU; one of an embedding may be sparse."""
    return (gradient if gradient.layout == torch.strided else gradient.to_dense()).detach().cpu()


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    seen, ahead = set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        ahead += [each for each, _ in node.next_functions]
    return False


def _gradients_by_backward(loss: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    """For reentrant checkpointing, which torch.autograd.grad refuses."""
    if any(getattr(each, "_post_accumulate_grad_hooks", None) for each in leaves):
        raise ValueError(
            "it has reentrant checkpoints, and parameters with post-accumulate-grad hooks, which would be "
            "called; needs use_reentrant=False"
        )
    before = [each.grad for each in leaves]
    try:
        for each in leaves:
            each.grad = None
        loss.backward()
        return [each.grad for each in leaves]
    finally:
        for each, grad in zip(leaves, before, strict=True):
            each.grad = grad


# ------------------------------------------------------------------------------------------ what a run must not change


def devices(model: nn.Module, batch: Batch) -> set[torch.device]:
    """Where the model and its inputs are."""
    return {each.device for each in (*model.parameters(), *model.buffers(), *batch.tensors())}


def _cuda_indices(model: nn.Module, batch: Batch) -> list[int]:
    return sorted({each.index for each in devices(model, batch) if each.type == "cuda"})


def _autocast_kinds(model: nn.Module, batch: Batch) -> list[str]:
    """The types of device on which the caller has autocast on."""
    kinds = {each.type for each in devices(model, batch)} - {"meta"}
    return sorted(kind for kind in kinds if torch.is_autocast_enabled(kind))


def _random_states(indices: Sequence[int]) -> list[Tensor]:
    """Of the CPU's generator, and of these CUDA devices'."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(each) for each in indices)]


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Undo at the end what calls did to a model: to buffers, flags, its modules' attributes and what these hold."""
    modules = list(model.modules())
    attributes = [dict(vars(each)) for each in modules]
    held = [
        (value, value.copy())
        for each in attributes
        for value in each.values()
        if type(value) in (dict, OrderedDict, list, set)
    ]
    counts = [each._vitkernels.fallbacks for each in modules if isinstance(each, Fused)]
    held += [(each, each.copy()) for each in counts]
    loose = [value for each in attributes for value in each.values() if isinstance(value, Tensor)]
    tensors = [
        (each, each.detach().clone()) for each in {id(each): each for each in [*model.buffers(), *loose]}.values()
    ]
    flags = [(each, each.requires_grad) for each in model.parameters()]
    try:
        yield
    finally:
        for module, before in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(before)
        for container, contents in held:
            _refill(container, contents)
        with torch.no_grad():
            for tensor, value in tensors:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(contents)
    else:
        container.update(contents)
