"""When a module's weights may be read by a fused op, and when the module itself must be called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from vitkernels import ops
from vitkernels.ops._amp import autocast_dtype

ModuleT = TypeVar("ModuleT", bound=nn.Module)
# What knows other libraries' forward hooks that stay on a module and do nothing in the call at hand.
IDLE_HOOKS: list[Callable[[Callable[..., Any]], bool]] = []


def added(module: nn.Module) -> str | None:
    """What somebody hung on a module, so that calling it does more than its class says; None for nothing."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "a hook"
    hooks = module._forward_hooks
    if hooks and not all(any(idle(hook) for idle in IDLE_HOOKS) for hook in hooks.values()):
        return "a hook"
    if "forward" in module.__dict__:
        return "another forward"
    if torch_module._has_any_global_hook():
        return "a global hook"
    return odd_weight(module) if module._parameters else None


def odd_weight(module: nn.Module) -> str | None:
    """Which of the module's own parameters is a tensor subclass (sharded, quantized); None for none."""
    for weight in module._parameters.values():
        kind = type(weight)
        if kind is not nn.Parameter and hasattr(kind, "__tensor_flatten__"):  # asked at every call: the usual one first
            return f"a {kind.__name__} weight"
    return None


def is_stock(module: nn.Module, *kinds: type[ModuleT]) -> TypeGuard[ModuleT]:
    """Whether calling the module does just what one of these classes does with plain weights.

    A subclass, a wrapper (LoRA, parametrization, FSDP), a hook, a replaced `forward` or a weight that is a tensor
    subclass (sharded, quantized) does more: such a module is called, never read around.
    """
    return type(module) in kinds and added(module) is None


def is_layer_norm(module: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether the module is a LayerNorm over the last axis that `ops.add_layer_norm` can stand for."""
    return is_stock(module, nn.LayerNorm) and module.weight is not None and len(module.normalized_shape) == 1


def layer_norm(norm: nn.Module, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """norm(x); with `out_dtype`, rounded to the dtype that its consumer multiplies in."""
    if not is_layer_norm(norm):
        return norm(x)
    return ops.add_layer_norm(x, None, norm.weight, norm.bias, norm.eps, out_dtype=out_dtype)[1]


def linear(projection: nn.Module, x: Tensor) -> Tensor:
    """projection(x), through `ops.linear` where it is a stock Linear."""
    if not is_stock(projection, nn.Linear):
        return projection(x)
    return ops.linear(x, projection.weight, projection.bias)


def operand_dtype(first: nn.Module, x: Tensor) -> torch.dtype | None:
    """The dtype in which a norm hands x's normalised values to the Linear `first`; None leaves them in x's.

    Under autocast the Linear would round them anyway, so they are written rounded; any other module gets them whole.
    """
    return autocast_dtype(x) if is_stock(first, nn.Linear) and x.dtype != torch.float64 else None
