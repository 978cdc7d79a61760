"""Checks that run before any kernel: one clear sentence that names the argument, what came and what is needed."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitkernels.ops._amp import cast_dtype

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MOST = 4096  # kinds of calls that a check remembers


def is_argument_error(error: BaseException) -> bool:
    """Whether an op's check raised this, before any kernel."""
    return getattr(error, "_vitkernels_argument", False)


def refused(kind: type[Exception], sentence: str) -> Exception:
    """An error that `is_argument_error` knows."""
    error = kind(sentence)
    error._vitkernels_argument = True  # type: ignore[attr-defined]
    return error


def once(check: Callable[..., None]) -> Callable[..., None]:
    """A check that lets through what it let through before: tensors of the same shapes, dtypes and devices.

    At small sizes asking takes as long as the kernel. Such a check looks at nothing else of a tensor, takes its
    arguments by position, and raises or returns None.
    """
    passed: set[tuple[Any, ...]] = set()

    @functools.wraps(check)
    def checked(*args: Any) -> None:
        if torch.compiler.is_compiling():  # asked once anyway
            return check(*args)
        call = tuple([(a.shape, a.dtype, a.device) if isinstance(a, Tensor) else (type(a), a) for a in args])
        try:
            if call in passed:
                return None
        except TypeError:  # a traced size has no hash
            return check(*args)
        try:
            check(*args)
        except (TypeError, ValueError) as error:
            error._vitkernels_argument = True  # type: ignore[union-attr]
            raise
        if len(passed) == _MOST:
            passed.clear()
        passed.add(call)
        return None

    return checked


def integer(value: Any) -> Any:
    """An int of whatever is one (`__index__`: numpy's, a tensor of one) but no bool; anything else as it is."""
    if isinstance(value, int | torch.SymInt) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return value
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor without values
        return value


def is_flag(op: str, name: str, value: Any) -> None:
    """True or False, and no number in its place: torch's attention refuses that too."""
    if not isinstance(value, bool | torch.SymBool):
        raise refused(TypeError, f"{op}: argument '{name}' got {type(value).__name__}; needs a bool")


def is_integer(value: Any) -> bool:
    """Whether a value, as `integer` gave it, is one; a traced size is."""
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def scale(op: str, value: Any, width: Any) -> Any:
    """The factor on an attention's scores as a number, 1 / sqrt(width) for None; one that learns is refused: nothing
    here makes its gradient."""
    if value is None:
        return 1 / math.sqrt(width)
    if isinstance(value, Tensor) and value.requires_grad:
        raise refused(
            TypeError,
            f"{op}: argument 'scale' is a tensor that requires a gradient; needs a number (what learns may multiply q)",
        )
    return float(value)


def is_tensor(op: str, *, optional: dict[str, Any], **tensors: Any) -> None:
    """Each argument is a tensor, and all are on the first one's device; the optional ones may be None."""
    first_name, first = next(iter(tensors.items()))
    given = {name: value for name, value in optional.items() if value is not None}
    for name, value in (tensors | given).items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: argument '{name}' got {type(value).__name__}; needs a torch.Tensor")
        if value.device != first.device:
            raise ValueError(
                f"{op}: argument '{name}' is on {value.device} while '{first_name}' is on {first.device}; "
                "needs one device"
            )


def is_pair(op: str, name: str, value: Sequence[Any], *, optional: bool = False) -> None:
    """Two tensors of one shape, dtype and device, with an axis or more; each may be None where they are optional."""
    if len(value) != 2 or not all(isinstance(each, Tensor) or (optional and each is None) for each in value):
        told = ", ".join(type(each).__name__ for each in value)
        raise refused(
            TypeError, f"{op}: argument '{name}' got {type(value).__name__}({told}); needs a torch.Tensor, or two"
        )
    kinds = [(list(each.shape), each.dtype, str(each.device)) for each in value if each is not None]
    if any(not shape for shape, *_ in kinds) or kinds[:1] != kinds[-1:]:
        told = " and ".join(f"{shape} {dtype} on {device}" for shape, dtype, device in kinds)
        raise refused(
            ValueError, f"{op}: argument '{name}' is {told}; needs two tensors of one shape, dtype and device"
        )


def is_floating(op: str, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and value.dtype not in FLOATING:
            raise TypeError(
                f"{op}: argument '{name}' has dtype {value.dtype}; needs one of float32, float64, bfloat16, float16"
            )


def has_rank(op: str, name: str, tensor: Tensor, layout: str, *, at_least: bool = False) -> None:
    """`layout` names the axes, as in "[B, H, N, K]"; its length is the rank that is needed."""
    rank = layout.count(",") + 1
    if tensor.dim() != rank and not (at_least and tensor.dim() > rank):
        more = "at least " if at_least else ""
        raise ValueError(
            f"{op}: argument '{name}' has shape {list(tensor.shape)}; needs {more}{rank} dimension"
            f"{'s' if rank > 1 else ''}, {layout}"
        )


def has_shape(op: str, name: str, tensor: Tensor | None, expected: Sequence[int], because: str) -> None:
    if tensor is not None and tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: argument '{name}' has shape {list(tensor.shape)}; needs {list(expected)} ({because})")


def same_dtype(op: str, autocast: torch.dtype | None, **tensors: Tensor | None) -> None:
    """All that multiply each other have one dtype, once they are cast to autocast's where that is on."""
    given = {name: cast_dtype(value, autocast) for name, value in tensors.items() if value is not None}
    first_name, first = next(iter(given.items()))
    for name, dtype in given.items():
        if dtype != first:
            raise TypeError(
                f"{op}: argument '{name}' has dtype {dtype} while '{first_name}' has {first}; "
                "needs one dtype, or autocast"
            )
