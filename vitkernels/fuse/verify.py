"""verify: a model's own numbers against themselves fused, on the batch of the one who asks."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from vitkernels import dispatch
from vitkernels.accuracy import FLOORS
from vitkernels.fuse import memory
from vitkernels.fuse.explain import explain
from vitkernels.fuse.runs import Batch, Run, devices, run, unchanged
from vitkernels.fuse.swap import Fused, as_stock
from vitkernels.fuse.verification import Row, Verification, judge
from vitkernels.fuse.walk import fuse, unfuse

_UNSHARDED = "needs the model before it is sharded"


def verify(
    model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, **keywords: Any
) -> Verification:
    """Run a model stock and fused on a batch, and hold outputs and gradients to the tolerance rule.

    Truth is a float64 copy of the stock model, where that fits into memory: the fused model may err twice as much as
    the stock one does, plus a floor (`vitkernels.accuracy`). Where it does not fit, or draws other random numbers, the
    two are compared with one another, and the answer says so. Runs are as the caller stands: in training or eval,
    under autocast or not, each from the same random state. A model that is not fused is fused for the comparison; where
    no fused op runs then, or no output holds a finite number, nothing was verified, and the answer is not ok. A
    gradient that is None in one and zeros in the other is a difference: optimizers move the one and leave the other.
    Afterwards the model, its .grad fields, its buffers and the random state are what they were (parameters that the
    model's own forward writes into are not brought back).

    Args:
        model: fused or not. One in DistributedDataParallel or torch.compile is verified without the wrapper.
        inputs, keywords: what the model is called with.
        loss: a function of what the model returns, to a tensor of one element; by default every floating-point number
            that it returns is summed up, each with a sign that is always the same.

    Returns:
        A `Verification`: printed, the worst ten tensors; `.ok`, `.to_dict()`.

    Raises:
        TypeError: model is no Module, or loss no function to a tensor of one element.
        ValueError: the model cannot run on these inputs, nothing that comes out depends on a parameter or input that
            requires a gradient, or weights are sharded, on the meta device or not there yet.
        RuntimeError: inside a function that is being compiled.
    """
    model, notes = _inner(model)
    _check(model, loss)
    batch = Batch(inputs, keywords, loss)
    with torch.inference_mode(False), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        with _stock(model), memory.counting_saved() as saved:
            stock = run(model, batch)
        truth = _truth(model, batch, stock, sum(saved.values()), notes)
        failure, got = None, None
        with unchanged(model), _fused(model, notes), dispatch.record() as calls:
            before = _fallbacks(model)
            try:
                got = run(model, batch)
            except Exception as error:
                failure = _cause(error)
            declined, summary = _fallbacks(model) - before, explain(model).summary
    notes += [f"{count} calls ran a module's own code: {reason}" for reason, count in declined.most_common()]
    counts = Counter(f"{call.op} ({call.backend})" for call in calls)
    rows = [] if got is None else judge(got, stock, truth, _dtypes(model, batch, stock, truth))
    if got is not None:
        notes += _remarks(got, stock, rows)
    return Verification(
        rows, "the stock model" if truth is None else "float64", summary, dict(counts.most_common()), notes, failure
    )


# ------------------------------------------------------------------------------------------------ what is verified


def _inner(model: Any) -> tuple[Any, list[str]]:
    """The module inside wrappers that compute nothing themselves, and a note for each."""
    notes: list[str] = []
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        elif isinstance(model, nn.Module) and "_orig_mod" in model._modules:
            inner = model._orig_mod
        else:
            return model, notes
        notes.append(f"verified: what is inside {type(model).__name__}, on this process and not compiled")
        model = inner


def _check(model: Any, loss: Any) -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError("verify: called inside a function that is being compiled; needs to be called outside of it")
    if not isinstance(model, nn.Module):
        raise TypeError(f"verify: argument 'model' is a {type(model).__name__}; needs a torch.nn.Module")
    if loss is not None and not callable(loss):
        raise TypeError(f"verify: argument 'loss' is a {type(loss).__name__}; needs a function of the model's outputs")
    for each in model.modules():
        if type(each).__name__ == "FullyShardedDataParallel":
            raise ValueError(f"verify: argument 'model' is sharded ({type(each).__name__}); {_UNSHARDED}")
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(weight):
            raise ValueError(f"verify: {name!r} has no shape yet; needs a model that has run once")
        if type(weight).__name__ == "DTensor" or type(weight.data).__name__ == "DTensor":
            raise ValueError(f"verify: {name!r} is sharded (a DTensor); {_UNSHARDED}")
        if weight.is_meta:
            raise ValueError(f"verify: {name!r} is on the meta device; needs a model with weights")


@contextlib.contextmanager
def _stock(model: nn.Module) -> Iterator[None]:
    """The model as it is unfused, its own fused layers (`vitkernels.nn`) on plain torch."""
    with as_stock(model), unchanged(model), dispatch.use("reference"):
        yield


@contextlib.contextmanager
def _fused(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """The model fused: as it is if it is that already, else for the time being."""
    fused = [each for each in model.modules() if isinstance(each, Fused)]
    if fused:
        dtypes = {each._vitkernels.residual_dtype for each in fused} - {None}
        notes += [f"the residual stream is kept in {dtype}, which the stock model's is not" for dtype in dtypes]
        yield
        return
    try:
        try:
            fuse(model)
        except ValueError as nothing:
            notes.append(str(nothing).removeprefix("fuse: "))
        yield
    finally:
        unfuse(model)


def _fallbacks(model: nn.Module) -> Counter[str]:
    """Why calls of fused modules went to their own `forward`, and how many."""
    counts: Counter[str] = Counter()
    for each in model.modules():
        if isinstance(each, Fused):
            counts.update(each._vitkernels.fallbacks)
    return counts


# ------------------------------------------------------------------------------------------------ what is the truth


def _truth(model: nn.Module, batch: Batch, stock: Run, saved: int, notes: list[str]) -> Run | None:
    """The stock model in float64 on a copy; None, and a note that says why, where it cannot be had."""
    truth = None
    reason = memory.too_large(model, saved)
    if reason is None:
        try:
            with dispatch.use("reference"):
                truth = run(unfuse(copy.deepcopy(model)).double(), batch, wide=True)
        except Exception as error:  # out of memory, or a model that is tied to its dtype
            reason = f"the float64 run raised {_cause(error)}"
        else:
            reason = _other_draws(stock, truth)
    if reason is None:
        return truth
    notes.append(f"compared with the stock model alone: {reason}")
    return None


def _other_draws(stock: Run, truth: Run) -> str | None:
    """Why the two cannot have dropped the same, or None where they did.

    In float64 a CUDA generator gives other numbers. The CPU's gives the same ones, unless a number takes more of its
    bits in float64: then it stands elsewhere afterwards.
    """
    if any(not torch.equal(*states) for states in zip(stock.start[1:], stock.end[1:], strict=True)):
        return "it draws random numbers on CUDA, which are others in float64"
    if not torch.equal(stock.end[0], truth.end[0]):
        return "it draws random numbers that are others in float64"
    return None


def _dtypes(model: nn.Module, batch: Batch, stock: Run, truth: Run | None) -> set[torch.dtype]:
    """The dtypes that took part."""
    kinds = {each.type for each in devices(model, batch)}
    found = {each.dtype for each in stock.tensors().values()} & FLOORS.keys() or {torch.float32}
    found |= {torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
    if truth is None and "cuda" in kinds:
        found.add(torch.float16)  # cuDNN's convolutions round to TF32, which has as many bits, and no truth shows it
    return found


def _remarks(got: Run, stock: Run, rows: list[Row]) -> list[str]:
    notes = []
    if any(not torch.equal(*states) for states in zip(got.end, stock.end, strict=True)):
        notes.append("fused, the model draws other random numbers than stock")
    for name, own in stock.outputs.items():
        other = got.outputs.get(name)
        if other is None or (other.dtype, other.shape) != (own.dtype, own.shape):
            notes.append(f"{name} is {_kind(other)} fused, and {_kind(own)} stock")
    for where, here, there in (("stock", stock, got), ("fused", got, stock)):
        lost = [name for name, each in there.gradients.items() if each is not None and here.gradients[name] is None]
        if lost:
            notes.append(f"{where} alone, the gradient is None of {len(lost)} parameters and inputs, as {lost[0]}")
    void = [row.name for row in rows if not row.compared]
    if void:
        notes.append(
            f"{len(void)} outputs and gradients hold no finite number, and were compared as nothing, as {void[0]}"
        )
    infinite = [name for name, each in stock.tensors().items() if not each.isfinite().all()]
    if infinite:
        notes.append(f"stock, {len(infinite)} outputs and gradients are not finite, as {infinite[0]}")
    zero = [name for name, each in stock.gradients.items() if each is not None and not each.any()]
    if zero:
        notes.append(f"the gradient is 0 everywhere, whatever runs, of {len(zero)} parameters and inputs, as {zero[0]}")
    return notes


def _kind(tensor: Tensor | None) -> str:
    return "not there" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _cause(error: Exception) -> str:
    """What a model raised, in a line."""
    raised = error.__cause__ or error
    return f"{type(raised).__name__}: {' '.join(str(raised).split())}"
