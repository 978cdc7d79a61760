"""Trials that reach the machine in the same way: one of them is run.

sm_86 and sm_89 are mostly given the launches of sm_80, one multiprocessor the grid of 132, and a layout that the host
copies the launches of a contiguous tensor. Trials are alike where they make the same launches (`Call.description`) of
numbers drawn in the same way, held against the same reference. Compiling, which shows it, takes a fraction of running.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
from typing import Any

import torch
from accuracy import run
from case import Case

from ptx.call import described
from ptx.trials import Trial, in_package
from vitkernels import ops


def digest(trial: Trial) -> str:
    """Equal for trials that are alike; "" where the launches cannot be told without running them."""
    tensors = trial.case.build(trial.dtype)
    with trial.launching(described) as made:
        try:
            run(trial.case, tensors, forward=in_package(trial.backend))
        except Exception:  # the trial itself will say what is wrong
            return ""
    told = _draws(trial.case, trial.dtype, tensors), made.launches
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
