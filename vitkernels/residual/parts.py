"""Reading the parts of other libraries' modules, and computing with them through the ops.

A fused module runs its children's arithmetic inside its own ops. It may do so only while calling the child would do
nothing else: `why_not_part` says what else it would do, and every function here calls the child as it is while there is
a reason to. What a class computes is settled by the class that defines its `forward` (`genuine.owner`): a subclass that
adds a method stays known, one that changes `forward` (LoRA, quantized Linears) does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.ops import _steps
from vitkernels.ops._amp import autocast_dtype
from vitkernels.residual import known
from vitkernels.residual.genuine import name_of, owner, owner_name, stock_type, why_not_read


def why_not_part(name: str, module: nn.Module, kind: type[nn.Module] | None = None) -> str | None:
    """Why the module must be called, not read around, in words like "LoRA on qkv"; None when it may be read.

    Args:
        name: what its parent calls it.
        module: the part.
        kind: the class whose `forward` it must have; None where the caller has looked already.
    """
    if kind is not None and owner(module) is not kind:
        if hasattr(module, "base_layer"):
            return f"LoRA on {name}" if hasattr(module, "lora_A") else f"an adapter on {name}"
        return f"{name} is {_told_apart(stock_type(module), kind.__name__)}, not {kind.__name__}"
    extra = why_not_read(module) or (_why_not_bias(module) if kind is nn.Linear else None)
    return None if extra is None else f"{extra} on {name}"


def _why_not_bias(linear: nn.Module) -> str | None:
    """torch adds any bias that broadcasts; the ops want one number for each feature."""
    weight, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
    if bias is None or weight is None or weight.dim() != 2 or bias.shape == weight.shape[:1]:
        return None
    return f"a bias of shape {list(bias.shape)}"


def _told_apart(kind: type[nn.Module], name: str) -> str:
    """A class's name; qualified where it is the name of what it is not, as quantized Linears have it."""
    return name_of(kind) if kind.__name__ == name else kind.__name__


def is_identity(module: nn.Module | None) -> bool:
    """Whether the module is absent, or hands its input on."""
    return module is None or (owner(module) is nn.Identity and why_not_read(module) is None)


def dropout_rate(module: nn.Module | None) -> float:
    """The rate at which a Dropout (or an Identity in its place, whatever is set on it) drops now: 0 in eval."""
    if module is None or not module.training or is_identity(module):
        return 0.0
    return float(getattr(module, "p", 0.0))


def drops_nothing(module: nn.Module | None) -> bool:
    """Whether calling this Dropout, Identity or None would change nothing."""
    if module is None or is_identity(module):
        return True
    if owner(module) is not nn.Dropout or not is_fixed(getattr(module, "p", None)):
        return False
    return why_not_read(module) is None and dropout_rate(module) == 0.0


def is_fixed(value: Any) -> bool:
    """Whether a module's number stays what it is while the module holds it: a tensor's or an array's may change, and
    nothing of the module with it."""
    return isinstance(value, float | int | None) or (type(value).__hash__ is not None and not isinstance(value, Tensor))


def is_usual(scale: Any, usual: float) -> bool:
    """Whether an attention's factor on its scores is a number, and this one; a tensor may learn."""
    return isinstance(scale, float | int) and scale == usual


# --------------------------------------------------------------------------------------------- LayerNorm and RMSNorm


def norm_op(norm: nn.Module) -> str:
    """The op that stands for a norm."""
    return "add_rms_norm" if owner_name(norm) in known.RMS_NORMS else "add_layer_norm"


def why_not_layer_norm(name: str, norm: nn.Module) -> str | None:
    """Why `ops.add_layer_norm`, or `ops.add_rms_norm`, cannot stand for this norm, or None when it can."""
    rms = known.RMS_NORMS.get(owner_name(norm))
    if rms is not None:
        eps = rms(norm)
        if isinstance(eps, str):
            return f"{name} {eps}"
        reason = why_not_part(name, norm) or _why_not_eps(name, eps)
        if reason is not None:
            return reason
        gain = getattr(norm, "weight", None)
        return None if gain is not None and gain.dim() == 1 else f"{name} has no weight of its last axis"
    known_why_not = known.LAYER_NORMS.get(owner_name(norm))
    if known_why_not is None or not isinstance(norm, nn.LayerNorm):
        return f"{name} is {_told_apart(stock_type(norm), 'LayerNorm')}, not LayerNorm"
    reason = known_why_not(norm)
    if reason is not None:
        return f"{name} {reason}"
    # before any look at its weight, which may be made at each
    reason = why_not_part(name, norm) or _why_not_eps(name, norm.eps)
    if reason is not None:
        return reason
    weight: Any = norm.weight
    shape = getattr(norm, "normalized_shape", None)
    if weight is None or weight.dim() != 1 or shape not in (None, weight.shape):
        return f"{name} has no weight of its last axis"
    return None


def _why_not_eps(name: str, eps: Any) -> str | None:
    return None if is_fixed(eps) else f"{name} has a {type(eps).__name__.lower()} for eps"


def read_norm(norm: nn.Module, again: bool | None = None) -> _steps.Norm:
    """A norm that `why_not_layer_norm` lets pass, by its parameters; `again` as there."""
    rms: Any = known.RMS_NORMS.get(owner_name(norm))
    weight: Any = norm.weight
    if rms is None:
        return _steps.Norm(weight, norm.bias, norm.eps, again)  # type: ignore[arg-type]
    return _steps.Norm(weight, None, rms(norm), again, rms=True)


def why_not_dtypes(reader: nn.Module, x: Tensor) -> str | None:
    """Why torch would refuse tokens of x's dtype beside the reader's weight, or None where it takes both."""
    weight = reader.weight
    assert isinstance(weight, Tensor)
    if isinstance(reader, nn.LayerNorm):
        return why_not_norm_dtypes(weight, x)
    return None if weight.dtype == x.dtype or _casts(weight, x) else _refusal(weight, x)


def why_not_norm_dtypes(weight: Tensor, x: Tensor, rms: bool = False) -> str | None:
    """The same for a norm: torch's LayerNorm on CPUs, which autocast leaves alone, takes tokens of 16 bits with weights
    of 32."""
    mixes = x.itemsize == 2 and weight.dtype == torch.float32
    takes = mixes if x.is_cpu and not rms else _casts(weight, x)
    return None if weight.dtype == x.dtype or takes else _refusal(weight, x)


def _casts(weight: Tensor, x: Tensor) -> bool:
    """Whether autocast brings both to one dtype."""
    return autocast_dtype(x) is not None and torch.float64 not in (x.dtype, weight.dtype)


def _refusal(weight: Tensor, x: Tensor) -> str:
    return f"called with {x.dtype}, and its weights are {weight.dtype}"


def layer_norm(norm: nn.Module, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """norm(x); where it may be read, rounded to the dtype that its consumer multiplies in."""
    if why_not_layer_norm("norm", norm) is not None:
        return norm(x)
    read = read_norm(norm)
    if read.rms and out_dtype is None:  # torch's multiplication by the weight widens to its dtype
        out_dtype = torch.promote_types(x.dtype, read.weight.dtype)  # type: ignore[union-attr]
    return _steps.add_norm(x, None, read, out_dtype)[1]


# ---------------------------------------------------------------------------------------------------------- Linear


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), through `ops.linear` where it is a Linear that may be read."""
    if why_not_part("", module, nn.Linear) is not None:
        return module(x)
    return ops.linear(x, module.weight, module.bias)  # type: ignore[arg-type]


def last_linear(module: nn.Module, x: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
    """module(x); with `bias_apart`, its bias beside it for an op that adds it on its way, or None where it is in."""
    if not bias_apart or why_not_part("", module, nn.Linear) is not None:
        return linear(module, x), None
    return ops.linear(x, module.weight), module.bias  # type: ignore[arg-type,return-value]


def operand_dtype(reader: nn.Module | None, x: Tensor) -> torch.dtype | None:
    """The dtype in which a norm hands x's normalised values to `reader`; None leaves them in x's.

    Under autocast a Linear (or the products of an nn.MultiheadAttention) would round them anyway, so they are written
    rounded. Any other module gets them as the norm itself would hand them over: on CUDA, autocast has it answer in
    float32.
    """
    dtype = autocast_dtype(x)
    if dtype is None or x.dtype == torch.float64:
        return None
    if reader is not None and _rounds(reader) and why_not_part("", reader) is None:
        return dtype
    return torch.float32 if x.is_cuda else None


def _rounds(reader: nn.Module) -> bool:
    """Whether the module rounds what it is given to autocast's dtype."""
    return owner(reader) in (nn.Linear, nn.MultiheadAttention) or known.is_masked_linear(reader)


# ------------------------------------------------------------------------------------------------------ activation


def activation(act: nn.Module | Callable[..., Tensor]) -> str | None:
    """The name by which `ops.mlp` knows an activation, or None where it does not."""
    if not isinstance(act, nn.Module):
        return known.FUNCTIONS.get(act)
    name = known.ACTIVATIONS.get(owner_name(act))
    return name(act) if name is not None and why_not_read(act) is None else None


# ------------------------------------------------------------------------------------------- LayerScale and DropPath


def scale_parameter(module: nn.Module | Tensor | None) -> Tensor | None:
    """LayerScale's parameter, [D]; None for an Identity, None or a module that `why_not_scale` declines."""
    if module is None or isinstance(module, Tensor):
        return module
    name = known.scale_name(module)
    return None if name is None else getattr(module, name)


def why_not_scale(name: str, module: nn.Module | Tensor | None, width: int) -> str | None:
    """Why the module cannot be read as a LayerScale of D = width features (or nothing), or None when it can."""
    if module is None or (not isinstance(module, Tensor) and is_identity(module)):
        return None
    if not isinstance(module, Tensor):
        if known.scale_name(module) is None:
            return f"{name} is {_told_apart(stock_type(module), 'LayerScale')}, not LayerScale"
        reason = why_not_part(name, module)
        if reason is not None:
            return reason
    gamma = scale_parameter(module)
    return None if gamma is not None and gamma.shape == (width,) else f"{name} has no factor for each feature"


def why_not_drop_path(name: str, module: nn.Module | None) -> str | None:
    """Why the module cannot be read as a DropPath (or nothing), or None when it can."""
    if module is None or is_identity(module):
        return None
    if known.drop_path_draw(module) is None:
        return f"{name} is {_told_apart(stock_type(module), 'DropPath')}, not DropPath"
    rate = _path_rate(module)
    if not is_fixed(rate):
        return f"{name} has a {type(rate).__name__.lower()} for a rate"
    return why_not_part(name, module)


def drops_paths(module: nn.Module | None) -> bool:
    """Whether the module, one that `why_not_drop_path` lets pass, drops something now."""
    if module is None or not module.training or is_identity(module):
        return False
    return bool(_path_rate(module))


def _path_rate(module: nn.Module) -> Any:
    rate = getattr(module, "drop_prob", None)
    return getattr(module, "p", None) if rate is None else rate  # torchvision has the second


def drop_path_factor(module: nn.Module | None, tokens: Tensor, dtype: torch.dtype) -> Tensor | None:
    """DropPath's factor of each sample, [B], drawn as the module would draw it; None for none that `drops_paths`."""
    if module is None:
        return None
    draw = known.drop_path_draw(module)
    assert draw is not None, "asked before: why_not_drop_path"
    return draw(module, tokens, dtype)
