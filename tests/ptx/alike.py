"""Trials that reach the machine in the same way: one of them is run.

sm_86 and sm_89 are mostly given the launches of sm_80, one multiprocessor the grid of 132, and a layout that the host
copies the launches of a contiguous tensor. Trials are alike where they make the same launches (`Call.description`) of
numbers drawn in the same way, held against the same reference. Compiling shows it (`digest`). What would be compiled is
known without (`sources`): where that is the same, so is what the same compiler makes of it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from accuracy import run
from case import Case

from ptx.call import Call, described
from ptx.trials import Trial, in_package
from vitkernels import ops


def digest(trial: Trial) -> str:
    """Equal for trials that are alike; "" where the launches cannot be told without running them."""
    return _digest(trial)


def sources(trial: Trial) -> str:
    """Equal for launches of the same kernels' texts with the same arguments and options; "" likewise.

    Nothing of Triton's is compiled. CUDA C++ is compiled once for all trials, and what that gives is looked at.
    """
    if trial.backend == "cuda":
        return digest(trial)
    from vitkernels.kernels import launch  # needs triton

    told: list[Any] = [trial.capability]

    def tell(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = [part for each in (*args, *options.values()) for part in _parts(each)]
        told.append((Call("", kernel.cache_key, grid, (), 0, given).description(), list(options)))

    with mock.patch.object(launch, "_launch", tell):
        return _digest(trial, told)


def _parts(value: Any) -> Iterator[Any]:
    """What an argument or option is made of: of a kernel its text, which has that of all that it calls."""
    if hasattr(value, "cache_key"):
        yield value.cache_key
    elif hasattr(value, "block_shape"):  # a tensor map
        yield from (value.base, value.shape, value.strides, value.block_shape, value.padding)
    elif isinstance(value, tuple):
        yield len(value)
        for each in value:
            yield from _parts(each)
    else:
        yield value


def _digest(trial: Trial, *more: Any) -> str:
    tensors = trial.case.build(trial.dtype)
    with trial.launching(described) as made:
        try:
            run(trial.case, tensors, forward=in_package(trial.backend))
        except Exception:  # the trial itself will say what is wrong
            return ""
    told = (_draws(trial.case, trial.dtype, tensors), made.launches, *more)
    return _short(f"{truth(trial.case.op)} {_short(repr(told))}")


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def truth(op: str) -> str:
    """Of the text of an op's reference: its module's, and that of other ops' modules from which it takes functions."""
    left, texts = [getattr(ops, op).__module__], {}
    while left:
        name = left.pop()
        if name.startswith(f"{ops.__name__}.") and name not in texts:
            module = importlib.import_module(name)
            texts[name] = inspect.getsource(module)
            left += [getattr(each, "__module__", None) or "" for each in vars(module).values()]
    return _short(repr(sorted(texts.items())))


def _draws(case: Case, dtype: torch.dtype, tensors: dict[str, Any]) -> list[Any]:
    """How a case's numbers are drawn, and what beside numbers it gives the op."""
    found: list[Any] = [case.op, dtype, sorted(case.options.items()), case.used, "expanded" in case.grad_layout]
    for name, spec in case.tensors.items():
        if spec is None:
            continue
        tensor = tensors[name].detach()
        if spec.convert is not None:  # masks, indices and pixels: what came of it
            found.append((name, hashlib.sha256(repr(tensor.tolist()).encode()).hexdigest()))
        repeated = 0 in tensor.stride()
        found.append((name, spec.shape, spec.gain, spec.mean, spec.dtype, spec.grad, repeated))
    return found
