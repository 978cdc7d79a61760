"""Trials that reach the machine in the same way: one of them is run.

sm_86 and sm_89 are mostly given the launches of sm_80, one multiprocessor the grid of 132, and a layout that the host
copies the launches of a contiguous tensor. Trials are alike where they make the same launches (`Call.description`) of
numbers drawn in the same way. Compiling, which shows it, takes a fraction of running.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from accuracy import run
from case import Case

from ptx.call import described
from ptx.trials import Trial, in_package


def digest(trial: Trial) -> str:
    """Equal for trials that are alike; "" where the launches cannot be told without running them."""
    tensors = trial.case.build(trial.dtype)
    with trial.launching(described) as made:
        try:
            run(trial.case, tensors, forward=in_package(trial.backend))
        except Exception:  # the trial itself will say what is wrong
            return ""
    told = _draws(trial.case, trial.dtype, tensors), made.launches
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


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
