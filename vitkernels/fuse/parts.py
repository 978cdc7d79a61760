"""Reading the parts of other libraries' modules, and computing with them through the ops.

A fused module runs its children's arithmetic inside its own ops. It may do so only while calling the child would do
nothing else: `obstacle` says what else it would do, and every function here calls the child as it is while there is
an obstacle. What a class computes is settled by the class that defines its `forward` (`owner`): a subclass that adds
a method stays known, one that changes `forward` (LoRA, quantized Linears) does not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.nn._stock import added
from vitkernels.ops._amp import autocast_dtype

# By the name of the owner. Rule files add their ecosystem's classes.
LAYER_NORMS: dict[str, Callable[[nn.Module], bool]] = {
    "LayerNorm": lambda norm: not getattr(norm, "_fast_norm", False),
    "LayerNormFp32": lambda norm: True,
}
LINEARS: set[str] = set()  # those that make their bias at each call, and multiply as nn.Linear does
LAYER_SCALES: dict[str, str] = {"LayerScale": "gamma"}  # the name of the parameter
# How DropPath's factor of each sample is drawn: (module, tokens, dtype) -> [B]
DROP_PATHS: dict[str, Callable[[nn.Module, Tensor, torch.dtype], Tensor]] = {}
ACTIVATIONS: dict[str, Callable[[nn.Module], str | None]] = {
    "GELU": lambda act: "gelu_tanh" if getattr(act, "approximate", "none") == "tanh" else "gelu",
    "ReLU": lambda act: "relu",
    "SiLU": lambda act: "silu",
    "QuickGELU": lambda act: "quick_gelu",
}
FUNCTIONS: dict[Callable[..., Tensor], str] = {F.gelu: "gelu", F.relu: "relu", torch.relu: "relu", F.silu: "silu"}


def stock_type(module: nn.Module) -> type[nn.Module]:
    """The module's class before it was swapped for a fused one."""
    return getattr(type(module), "stock", type(module))


def owner(module: nn.Module) -> type[nn.Module]:
    """The class that defines what the module computes: of its bases, the first one with a `forward`."""
    cls = type(module)
    if "forward" in cls.__dict__:  # most; a fused class has its mixin's
        return cls
    for cls in stock_type(module).__mro__:
        if "forward" in cls.__dict__:
            return cls
    raise AssertionError("nn.Module defines forward")


def owner_name(module: nn.Module) -> str:
    """`owner`, as "package.module.Class"."""
    cls = owner(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def is_patched(module: nn.Module) -> bool:
    """Whether somebody gave the class that defines the module's `forward` another function in its place."""
    cls = owner(module)
    forward = cls.__dict__["forward"]
    return (forward.__module__, forward.__qualname__) != (cls.__module__, f"{cls.__qualname__}.forward")


def obstacle(name: str, module: nn.Module, kind: type[nn.Module] | None = None) -> str | None:
    """Why the module must be called, not read around, in words like "LoRA on qkv"; None when it may be read.

    Args:
        name: what its parent calls it.
        module: the part.
        kind: the class whose `forward` it must have; None where the caller has looked already.
    """
    if kind is not None and owner(module) is not kind:
        if hasattr(module, "base_layer"):
            return f"LoRA on {name}" if hasattr(module, "lora_A") else f"an adapter on {name}"
        got = stock_type(module)
        same = f"{got.__module__}." if got.__name__ == kind.__name__ else ""  # quantized Linears are called so too
        return f"{name} is {same}{got.__name__}, not {kind.__name__}"
    extra = added(module)
    return None if extra is None else f"{extra} on {name}"


def is_identity(module: nn.Module | None) -> bool:
    """Whether the module is absent, or hands its input on."""
    return module is None or (owner(module) is nn.Identity and added(module) is None)


def dropout_rate(module: nn.Module | None) -> float:
    """The rate at which a Dropout (or an Identity in its place) drops now: 0 in eval."""
    return float(getattr(module, "p", 0.0)) if module is not None and module.training else 0.0


def drops_nothing(module: nn.Module | None) -> bool:
    """Whether calling this Dropout, Identity or None would change nothing."""
    if module is None or is_identity(module):
        return True
    return owner(module) is nn.Dropout and added(module) is None and dropout_rate(module) == 0.0


# ------------------------------------------------------------------------------------------------------- LayerNorm


def not_layer_norm(name: str, norm: nn.Module) -> str | None:
    """Why `ops.add_layer_norm` cannot stand for this norm, or None when it can."""
    known = LAYER_NORMS.get(owner(norm).__name__)
    if not isinstance(norm, nn.LayerNorm) or known is None:
        return f"{name} is {stock_type(norm).__name__}, not LayerNorm"
    if not known(norm):
        return f"{name} runs timm's fast norm"
    if norm.weight is None or len(norm.normalized_shape) != 1 or norm.weight.shape != norm.normalized_shape:
        return f"{name} has no weight of its last axis"
    return obstacle(name, norm)


def layer_norm(norm: nn.Module, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """norm(x); where it may be read, rounded to the dtype that its consumer multiplies in."""
    if not_layer_norm("norm", norm) is not None:
        return norm(x)
    return ops.add_layer_norm(x, None, norm.weight, norm.bias, norm.eps, out_dtype=out_dtype)[1]  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- Linear


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), through `ops.linear` where it is a Linear that may be read."""
    if obstacle("", module, nn.Linear) is not None:
        return module(x)
    return ops.linear(x, module.weight, module.bias)  # type: ignore[arg-type]


def last_linear(module: nn.Module, x: Tensor, split: bool) -> tuple[Tensor, Tensor | None]:
    """module(x); with `split`, its bias apart for an op that adds it on its way, or None where it is in already."""
    if not split or obstacle("", module, nn.Linear) is not None:
        return linear(module, x), None
    return ops.linear(x, module.weight), module.bias  # type: ignore[arg-type,return-value]


def operand_dtype(first: nn.Module | None, x: Tensor) -> torch.dtype | None:
    """The dtype in which a norm hands x's normalised values to `first`; None leaves them in x's.

    Under autocast a Linear (or the products of an nn.MultiheadAttention) would round them anyway, so they are written
    rounded. Any other module gets them as the norm itself would hand them over: on CUDA, autocast has it answer in
    float32.
    """
    dtype = autocast_dtype(x)
    if dtype is None or x.dtype == torch.float64:
        return None
    if first is not None and _rounds(owner(first)) and obstacle("", first) is None:
        return dtype
    return torch.float32 if x.is_cuda else None


def _rounds(kind: type[nn.Module]) -> bool:
    """Whether modules of this class round what they are given to autocast's dtype."""
    return kind in (nn.Linear, nn.MultiheadAttention) or kind.__name__ in LINEARS


# ------------------------------------------------------------------------------------------------------ activation


def activation(act: nn.Module | Callable[..., Tensor]) -> str | None:
    """The name by which `ops.mlp` knows an activation, or None where it does not."""
    if not isinstance(act, nn.Module):
        return FUNCTIONS.get(act)
    known = ACTIVATIONS.get(owner(act).__name__)
    return known(act) if known is not None and added(act) is None else None


# ------------------------------------------------------------------------------------------- LayerScale and DropPath


def scale_parameter(module: nn.Module | Tensor | None) -> Tensor | None:
    """LayerScale's parameter, [D]; None for an Identity, None or a module that `not_scale` declines."""
    if module is None or isinstance(module, Tensor):
        return module
    name = LAYER_SCALES.get(owner(module).__name__)
    return None if name is None else getattr(module, name)


def not_scale(name: str, module: nn.Module | Tensor | None) -> str | None:
    """Why the module cannot be read as a LayerScale (or nothing), or None when it can."""
    if module is None or isinstance(module, Tensor) or is_identity(module):
        return None
    if owner(module).__name__ not in LAYER_SCALES:
        return f"{name} is {stock_type(module).__name__}, not LayerScale"
    return obstacle(name, module)


def not_drop_path(name: str, module: nn.Module | None) -> str | None:
    """Why the module cannot be read as a DropPath (or nothing), or None when it can."""
    if module is None or is_identity(module):
        return None
    if owner(module).__name__ not in DROP_PATHS:
        return f"{name} is {stock_type(module).__name__}, not DropPath"
    return obstacle(name, module)


def drop_path_factor(module: nn.Module | None, tokens: Tensor, dtype: torch.dtype) -> Tensor | None:
    """DropPath's factor of each sample, [B], drawn as the module would draw it; None where nothing is dropped."""
    if module is None or is_identity(module) or not module.training or not getattr(module, "drop_prob", None):
        return None
    return DROP_PATHS[owner(module).__name__](module, tokens, dtype)
