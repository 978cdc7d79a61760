"""Which classes of other libraries compute what, by the qualified name of the class that defines `forward`.

A bare name says nothing: people write a `GELU` or a `LayerScale` of their own with another formula. Rule files add
their ecosystem's classes to these tables. A class that stands in none runs as itself; inside blocks that are known by
their structure alone, `try_out` holds one against the usual formula first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels.residual.genuine import owner, owner_name, why_not_read

Draw = Callable[[nn.Module, Tensor, torch.dtype], Tensor]


def _keep_probability(module: nn.Module) -> float:
    return 1 - module.drop_prob  # type: ignore[operator,return-value]


def draw_bernoulli(module: nn.Module, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """DropPath's factor of each sample, [B], as timm draws it."""
    keep = _keep_probability(module)
    factor = tokens.new_empty(tokens.shape[0], dtype=dtype).bernoulli_(keep)
    return factor.div_(keep) if getattr(module, "scale_by_keep", True) and keep > 0 else factor


def draw_uniform(module: nn.Module, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The same as transformers draws it."""
    keep = _keep_probability(module)
    return (torch.rand(tokens.shape[0], dtype=dtype, device=tokens.device) + keep).floor().div(keep)


LAYER_NORMS: dict[str, Callable[[nn.Module], str | None]] = {  # why a module of the class is no plain LayerNorm
    "torch.nn.modules.normalization.LayerNorm": lambda norm: None,
}
RMS_NORMS: dict[str, Callable[[Any], float | str]] = {  # eps, or why a module of the class is no plain RMSNorm
    "torch.nn.modules.normalization.RMSNorm": lambda norm: (
        "has no eps, but that of the tokens' dtype" if norm.eps is None else norm.eps
    ),
}
MASKED_LINEARS: set[str] = set()  # nn.Linear with bias * bias_mask, made at each call
LAYER_SCALES: dict[str, str] = {"vitkernels.nn.layer_scale.LayerScale": "gamma"}  # the name of the parameter
DROP_PATHS: dict[str, Draw] = {"vitkernels.nn.drop_path.DropPath": draw_bernoulli}
ACTIVATIONS: dict[str, Callable[[nn.Module], str]] = {
    "torch.nn.modules.activation.GELU": lambda act: "gelu_tanh" if act.approximate == "tanh" else "gelu",
    "torch.nn.modules.activation.ReLU": lambda act: "relu",
    "torch.nn.modules.activation.SiLU": lambda act: "silu",
}
FUNCTIONS: dict[Callable[..., Tensor], str] = {F.gelu: "gelu", F.relu: "relu", torch.relu: "relu", F.silu: "silu"}

# by class, and by the attributes with which it was tried: what it computes may depend on them
_Tried = tuple[type, tuple[tuple[str, object], ...]]
_tried_linears: set[type] = set()
_tried_scales: dict[_Tried, str] = {}
_tried_paths: dict[_Tried, Draw] = {}
_MODULE = frozenset(vars(nn.Module()))  # attributes that every module has
_LISTED = torch.__version__ >= "2.13"  # compared as versions: Dynamo of torch 2.11 lists no attributes


def _tried(module: nn.Module) -> _Tried | None:
    """A module's class and its own attributes but for the rate, which is read at each call; None without a hash."""
    own = tuple((name, each) for name, each in vars(module).items() if name not in _MODULE and name != "drop_prob")
    key = owner(module), own
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _found(tried: dict[_Tried, Any], module: nn.Module) -> Any:
    if tried and not _LISTED and torch.compiler.is_compiling():
        return next((found for key, found in tried.items() if _is_like(key, module)), None)
    key = _tried(module) if tried else None
    return None if key is None else tried.get(key)


def _is_like(key: _Tried, module: nn.Module) -> bool:
    """Whether a module has a tried one's class and attributes; it may have others, which no older Dynamo can see."""
    kind, own = key
    return owner(module) is kind and all(
        name in module.__dict__ and _same(module.__dict__[name], each) for name, each in own
    )


def _same(one: object, other: object) -> bool:
    return one is other or (not isinstance(one, Tensor) and one == other)


def is_masked_linear(module: nn.Module) -> bool:
    """Whether a Linear multiplies its bias by a mask at each call."""
    return owner_name(module) in MASKED_LINEARS or owner(module) in _tried_linears


def scale_name(module: nn.Module) -> str | None:
    """What a LayerScale calls its parameter; None where the module is not known to be one."""
    return LAYER_SCALES.get(owner_name(module)) or _found(_tried_scales, module)


def drop_path_draw(module: nn.Module) -> Draw | None:
    """How a DropPath draws; None where the module is not known to be one."""
    return DROP_PATHS.get(owner_name(module)) or _found(_tried_paths, module)


# ---------------------------------------------------------------------------------------------- classes that are tried


def try_out(module: nn.Module) -> None:
    """Learn of every class inside a module that it is a LayerScale, a DropPath or a masked Linear, if it computes so.

    Args:
        module: one whose structure is known and whose package is not; it is left alone.
    """
    for each in module.modules():
        kind, key = owner(each), _tried(each)
        if key is None or each._modules or why_not_read(each) is not None or scale_name(each) or drop_path_draw(each):
            continue
        if isinstance(each, nn.Linear) and "bias_mask" in each._buffers:
            if _is_masked(each):
                _tried_linears.add(kind)
        elif list(each._parameters) == ["gamma"] and _is_scale(kind, each):
            _tried_scales[key] = "gamma"
        elif not each._parameters and isinstance(getattr(each, "drop_prob", None), float | int):
            draw = next((draw for draw in (draw_bernoulli, draw_uniform) if _draws_so(kind, each, draw)), None)
            if draw is not None:
                _tried_paths[key] = draw


def _twin(kind: type[nn.Module], module: nn.Module, **attributes: object) -> nn.Module:
    """A module with the same attributes but for some, and no parameters of the other's."""
    twin = kind.__new__(kind)
    nn.Module.__init__(twin)
    own = {name: value for name, value in vars(module).items() if name not in vars(twin)}
    vars(twin).update(own)
    for name, value in attributes.items():
        setattr(twin, name, value)
    return twin


@torch.no_grad()
def _is_masked(linear: nn.Linear) -> bool:
    """Whether a Linear of random weights computes with bias * bias_mask."""
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(3, linear.in_features, generator=generator, dtype=torch.float32, device="cpu").to(linear.weight)
    try:
        bias = None if linear.bias is None else linear.bias * linear.bias_mask  # type: ignore[operator]
        return torch.equal(linear(x), F.linear(x, linear.weight, bias))
    except Exception:
        return False


@torch.no_grad()
def _is_scale(kind: type[nn.Module], module: nn.Module) -> bool:
    """Whether the class multiplies by its parameter, in training and in eval."""
    generator = torch.Generator("cpu").manual_seed(0)
    gamma = torch.randn(6, generator=generator, dtype=torch.float32, device="cpu")
    x = torch.randn(2, 5, 6, generator=generator, dtype=torch.float32, device="cpu")
    twin = _twin(kind, module, gamma=nn.Parameter(gamma))
    try:
        return all(torch.equal(twin.train(mode)(x.clone()), x * gamma) for mode in (True, False))
    except Exception:
        return False


@torch.no_grad()
def _draws_so(kind: type[nn.Module], module: nn.Module, draw: Draw) -> bool:
    """Whether the class drops what `draw` drops from the same random state, and nothing in eval or at rate 0."""
    x = torch.ones(64, 3, 2, dtype=torch.float32, device="cpu")
    try:
        with torch.random.fork_rng(devices=[]):
            for seed, rate in enumerate((0.1, 0.5, 0.9)):
                twin = _twin(kind, module, drop_prob=rate).train()
                torch.default_generator.manual_seed(seed)
                got = twin(x.clone())
                torch.default_generator.manual_seed(seed)
                if not torch.equal(got, x * draw(twin, x, x.dtype).view(-1, 1, 1)):
                    return False
        idle = (_twin(kind, module, drop_prob=0.5).eval(), _twin(kind, module, drop_prob=0.0).train())
        return all(torch.equal(each(x.clone()), x) for each in idle)
    except Exception:
        return False
