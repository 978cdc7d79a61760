"""Whether calling a module does what its class's own text does with the module's parameters, and nothing else.

A fused module computes with its children's parameters in place of calling the children. That is the same only while
nobody looks on or changes something: a hook, a forward replaced on the module or on its class, a weight that acts when
it is multiplied, a mode that sees every torch function, a torch function that somebody replaced. Everything here
answers with the reason, or with None where the parameters may be read.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import _symbolic_trace
from torch.nn.modules import module as torch_module

_MODULE_CALL = nn.Module.__call__
# What knows other libraries' forward hooks that stay on a module and do nothing in the call at hand.
IDLE_HOOKS: list[Callable[[Callable[..., Any]], bool]] = []
# Wrappers that other libraries put around a class's own forward when it is defined: module, and name of the function.
WRAPPERS: set[tuple[str, str]] = set()


def stock_type(module: nn.Module) -> type[nn.Module]:
    """The module's class before it was swapped for a fused one."""
    return getattr(type(module), "stock", type(module))


def owner(module: nn.Module) -> type[nn.Module]:
    """The class that defines what the module computes: of its bases, the first one with a `forward`."""
    cls = type(module)
    if "forward" in cls.__dict__ and "stock" not in cls.__dict__:  # most; a fused class has its mixin's
        return cls
    for cls in stock_type(module).__mro__:
        if "forward" in cls.__dict__:
            return cls
    raise AssertionError("nn.Module defines forward")


def name_of(cls: type) -> str:
    """A class as "package.module.Class"."""
    return f"{cls.__module__}.{cls.__qualname__}"


def owner_name(module: nn.Module) -> str:
    """`owner`, as "package.module.Class"."""
    return name_of(owner(module))


# ----------------------------------------------------------------------------------------------------- one module


def why_not_read(module: nn.Module) -> str | None:
    """Why this module must be called, in a word or two ("a hook"); None where its parameters may be read.

    Asked of every part of a block at every call.
    """
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "a hook"
    if module._forward_hooks and not all(map(is_idle, module._forward_hooks.values())):
        return "a hook"
    cls = type(module)
    if "forward" in module.__dict__ or replaced(cls):
        return "another forward"
    if cls.__call__ is not _MODULE_CALL and not (torch.compiler.is_compiling() and cls.__call__ is nn.Module.__call__):
        return "a __call__ of its own"  # tracers that export wrap Module's
    return why_not_weights(module) or _why_not_looks(module) or _watched()


def is_idle(hook: Callable[..., Any]) -> bool:
    """Whether a forward hook is known to do nothing in the call at hand; in another call it may."""
    return any(idle(hook) for idle in IDLE_HOOKS)


_WEIGHTS = ("weight", "bias", "gamma", "in_proj_weight")  # where one that is no parameter is an attribute


def why_not_weights(module: nn.Module) -> str | None:
    """Which of its own weights acts (sharded, quantized) or is made at each look; None for none."""
    if "parametrizations" in module._modules:
        return "a parametrization"  # it computes at each look, and may draw or count
    for weight in module._parameters.values():
        kind = type(weight)
        if kind is not nn.Parameter and kind is not type(None) and acts(kind):
            return f"a {kind.__name__} weight"
    others = [*module._buffers.values()] if module._buffers else []
    others += [module.__dict__[name] for name in _WEIGHTS if name in module.__dict__]
    return next(
        (f"a {type(each).__name__} weight" for each in others if isinstance(each, Tensor) and acts(type(each))), None
    )


# what is read off parts of blocks, and kept while nothing in the modules' own dictionaries changes
_READ = ("weight", "bias", "gamma", "eps", "p", "drop_prob", "normalized_shape", "approximate")
# by class: how much its bases held when it was judged, what is made at each look, what it has itself
_looks: dict[type, tuple[list[int], str | None, tuple[str, ...]]] = {}


def _why_not_looks(module: nn.Module) -> str | None:
    """What of the module is made at each look, or is its class's, where no change of the module tells of it."""
    reason, names = _looks_of(stock_type(module))  # a mixin's own names are none of the module's
    if reason is not None or not names:
        return reason
    return next((f"{name} of its class" for name in names if name not in module.__dict__), None)


def sizes(cls: type) -> list[int]:
    """How many attributes the class and its bases have: more, once somebody puts one on them."""
    return [len(vars(each)) for each in cls.__mro__]


def _looks_of(cls: type[nn.Module]) -> tuple[str | None, tuple[str, ...]]:
    judged, now = _looks.get(cls), sizes(cls)
    if judged is None or judged[0] != now:
        found = {name: inspect.getattr_static(cls, name) for name in _READ if hasattr(cls, name)}
        made = next((f"{name} made at each look" for name, each in found.items() if hasattr(each, "__get__")), None)
        if cls.__getattr__ is not nn.Module.__getattr__ or cls.__getattribute__ is not nn.Module.__getattribute__:
            made = "attributes made at each look"
        judged = _looks[cls] = now, made, tuple(found)
    return judged[1:]


_looks_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


# of each class: the stock class, the forward of it that was judged, and whether that is not the one in the class's text
_forwards: dict[type, tuple[Any, Any, bool]] = {}


def replaced(cls: type[nn.Module]) -> bool:
    """Whether somebody gave the class that defines what modules of `cls` compute another `forward` than its own."""
    judged = _forwards.get(cls)
    if judged is None or judged[0].forward is not judged[1]:
        stock = getattr(cls, "stock", cls)
        definer = next(each for each in stock.__mro__ if "forward" in each.__dict__)
        judged = _forwards[cls] = stock, stock.forward, not _is_own(definer, definer.__dict__["forward"])
    return judged[2]


replaced._dynamo_marked_constant = True  # type: ignore[attr-defined]  # asked while tracing, not traced


def why_not_methods(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Which of these methods, called by the `forward` that the module has, is not the one beside it in its class's
    text; None for none. A subclass may have its own, and somebody may have put another in its place."""
    for name in names:
        if name in module.__dict__:
            return f"it has a {name} of its own"
    return _why_not_methods(stock_type(module), owner(module), names) if names else None


_methods: dict[tuple[type, tuple[str, ...]], tuple[list[Any], str | None]] = {}


def _why_not_methods(stock: type, definer: type, names: tuple[str, ...]) -> str | None:
    functions = [getattr(stock, name, None) for name in names]
    judged = _methods.get((stock, names))
    if judged is None or judged[0] != functions:
        judged = _methods[stock, names] = functions, _judged_methods(definer, names, functions)
    return judged[1]


_why_not_methods._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _judged_methods(definer: type, names: tuple[str, ...], functions: list[Any]) -> str | None:
    for name, function in zip(names, functions, strict=True):
        if function is not getattr(definer, name, None):
            return f"it has a {name} of its own"
        home = next((each for each in definer.__mro__ if name in each.__dict__), None)
        if home is not None and not _is_own(home, home.__dict__[name], name):
            return f"somebody replaced the {name} of {name_of(definer)}"
    return None


def _is_own(cls: type, forward: Any, method: str = "forward") -> bool:
    """Whether a function stands in the class's text: by its module's globals and its code's name, which wrappers that
    copy the other names cannot have."""
    home = sys.modules.get(cls.__module__)
    while type(forward) is FunctionType and (forward.__globals__["__name__"], forward.__code__.co_name) in WRAPPERS:
        forward = forward.__wrapped__  # type: ignore[attr-defined]
    if type(forward) is not FunctionType or home is None or forward.__globals__ is not vars(home):
        return False
    name = f"{cls.__qualname__}.{method}"
    return name == forward.__qualname__ == getattr(forward.__code__, "co_qualname", name)  # Python 3.11 and later


_acting: dict[type, bool] = {Tensor: False, nn.Parameter: False, nn.Buffer: False}


def acts(kind: type) -> bool:
    """Whether a class of tensors does something of its own when torch functions are called on it."""
    known = _acting.get(kind)
    if known is None:
        known = _acting[kind] = _has_behaviour(kind)
    return known


acts._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _has_behaviour(kind: Any) -> bool:
    if not issubclass(kind, Tensor) or hasattr(kind, "__tensor_flatten__"):
        return True
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    inert = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)  # type: ignore[attr-defined]
    return function not in inert


# -------------------------------------------------------------------------------------------- around all modules

_BUILTIN = ("linear", "gelu", "scaled_dot_product_attention", "conv2d")
_PYTHON = ("layer_norm", "rms_norm", "relu", "silu", "softmax", "multi_head_attention_forward")
_FUNCTIONS: dict[str, Any] = {name: getattr(F, name) for name in (*_BUILTIN, *_PYTHON)}


_GLOBAL_HOOKS = (
    torch_module._global_forward_pre_hooks,
    torch_module._global_forward_hooks,
    torch_module._global_backward_pre_hooks,
    torch_module._global_backward_hooks,
)


def _watched() -> str | None:
    """Who looks on at every module's call; None for nobody."""
    if any(_GLOBAL_HOOKS):
        return "a global hook"
    if torch._C._len_torch_function_stack():
        mode = _acting_mode()
        if mode is not None:
            return f"an active {mode}"
    if not torch.compiler.is_compiling() and _symbolic_trace.is_fx_symbolic_tracing():
        return "traced by torch.fx"
    return None


def why_not_around() -> str | None:
    """What is active around a call that sees, or changes, what every module computes; None for nothing."""
    return _watched() or _replaced_function()


# of torch's own modes: those that say where tensors are made, and those of its tracers, which call modules as they are
_IDLE_MODES = ("torch.utils._device", "torch.fx.", "torch._export.", "torch._dynamo.", "torch._higher_order_ops.")


def _acting_mode() -> str | None:
    """The first mode that sees torch functions and may do something of its own; None for none."""
    kinds = (type(mode) for mode in torch.overrides._get_current_function_mode_stack())
    return next((kind.__name__ for kind in kinds if not kind.__module__.startswith(_IDLE_MODES)), None)


_acting_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _replaced_function() -> str | None:
    """Which function of torch that modules call somebody replaced (counters of FLOPs, quantizers); None for none."""
    replaced_call = nn.Module.__call__ is not _MODULE_CALL and not torch.compiler.is_compiling()
    if replaced_call or not _call_is_own:
        return "somebody replaced torch.nn.Module.__call__"
    for name, own in _FUNCTIONS.items():
        if getattr(F, name) is not own or name in _replaced_at_import:
            return f"somebody replaced torch.nn.functional.{name}"
    return None


_replaced_function._dynamo_marked_constant = True  # type: ignore[attr-defined]
_call_is_own = getattr(_MODULE_CALL, "__globals__", None) is vars(torch_module)
_replaced_at_import = {
    name
    for name, function in _FUNCTIONS.items()
    if not (
        isinstance(function, BuiltinFunctionType)
        if name in _BUILTIN
        else getattr(function, "__globals__", None) is vars(F)
    )
}
