"""Swapping a module's class for a fused subclass of it, and back.

The module stays the object it is: its parameters, buffers, children, hooks and name are untouched, and only its class
changes, to one made of a mixin (which has the fused `forward`) and the module's own class. `isinstance` holds, and the
new class wears the old one's name, since wrapping policies and device maps go by it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitkernels import dispatch
from vitkernels.fuse.unserved import why_not_child
from vitkernels.fuse.worth import why_not_small
from vitkernels.nn.transformer import Twin
from vitkernels.ops._amp import autocast_dtype
from vitkernels.ops._check import is_argument_error
from vitkernels.residual import parts
from vitkernels.residual.genuine import acts, owner_name, replaced, why_not_around, why_not_methods
from vitkernels.residual.kept import Kept
from vitkernels.residual.late import read_for
from vitkernels.residual.stream import Branch, Part, Sublayer, pre_norm


@dataclass
class State:
    """What a fused module remembers beside its own attributes.

    Attributes:
        residual_dtype: dtype of the residual stream; None for the stock model's.
        recompute_norms: whether backward makes norms again; None for what suits the device.
        backends: the order of backends that its calls ask; None for the process's.
        fallbacks: why calls went to the stock `forward`, and how many.
        kept: what was read off the module's parts at the last calls.
        dropouts: all of the model's, for a module that `lays_out` its result otherwise than stock.
    """

    residual_dtype: torch.dtype | None = None
    recompute_norms: bool | None = None
    backends: tuple[str, ...] | None = None
    fallbacks: dict[str, int] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)
    dropouts: tuple[nn.Module, ...] = ()


class Fused(nn.Module):
    """What all mixins share. A mixin defines `forward` with the stock one's signature, and begins it so:

    if self.declines(x, lambda: why_not(self, x)):
        return super().forward(x)
    """

    stock: ClassVar[type[nn.Module]]
    is_block: ClassVar[bool] = False  # whether it counts as a Transformer block
    replaces: ClassVar[frozenset[str]] = frozenset({"forward"})  # the stock class's methods that the mixin has too
    follows: ClassVar[tuple[str, ...]] = ()  # methods that the stock `forward` calls, and the mixin's own does not
    reads: ClassVar[tuple[str, ...]] = ()  # names of the child that reads the tokens first; the first one there is
    axes: ClassVar[int | None] = 3  # of the tokens, as the stock module takes them; None for any number
    loses_small: ClassVar[int | None] = None  # the axis of features of tokens few of which take longer fused on a CPU
    lays_out: ClassVar[bool] = False  # whether its result lies in memory in another order than the stock module's
    _vitkernels: State

    def __init__(self, *args: Any, **keywords: Any) -> None:
        # run where somebody makes another one by the module's type, as peft does for LoRA on a Conv2d
        super().__init__(*args, **keywords)
        self.__dict__["_vitkernels"] = State()

    def reader(self) -> object:
        """The child that reads the tokens first, a norm or a Linear; None where a call need not be held against it."""
        children = (getattr(self, name, None) for name in self.reads)
        return next((child for child in children if child is not None), None)

    def parts(self) -> list[Part]:
        """The rows of `explain`: what would run fused if the module were called now."""
        raise NotImplementedError

    def branch(self, **options: Any) -> Branch:
        """The module as the branch of a residual step, for the block around it; the options are its `forward`'s."""
        raise NotImplementedError

    def why_not_now(self) -> str | None:
        """Why the module must be called as a whole now, though it is fused; None where it need not be."""
        return None

    @classmethod
    def block_names(cls, module: nn.Module) -> list[str]:
        """The Transformer blocks that the module's own forward runs, by their names in it; "" for the module itself.

        Args:
            module: fused with this mixin, or one that might be.
        """
        return [""] if cls.is_block else []

    def declines(self, x: Any, why_not: Callable[[], str | None] = lambda: None, mask: Any = None) -> bool:
        """Whether this call belongs to the stock `forward`; the reason is kept for `explain`.

        Args:
            x: the call's first argument.
            why_not: the caller's own reason, or None; asked only of real tensors.
            mask: an attention mask of the call.
        """
        reason = (
            self._why_not_small(x)  # first: what is small for being slow must not be slowed down
            or why_not_around()
            or self.why_not_own()
            or _why_not_call(x)
            or why_not_tokens(x, self.reader(), self.axes)
            or why_not_mask(mask, x)
            or why_not()
        )
        if reason is None:
            return False
        if not torch.compiler.is_compiling():
            self.count_fallback(reason)
        return True

    def _why_not_small(self, x: Any) -> str | None:
        axis = self.loses_small
        return None if axis is None else why_not_small(x, axis, self._vitkernels.backends)

    def count_fallback(self, reason: str) -> None:
        """Keep for `explain` why a call went to the stock `forward`."""
        counts = self._vitkernels.fallbacks
        counts[reason] = counts.get(reason, 0) + 1

    def why_not_own(self) -> str | None:
        """Why the module's own class must compute, whatever is called: somebody gave it another `forward`."""
        if replaced(type(self)):
            return f"somebody replaced the forward of {owner_name(self)}"
        return why_not_methods(self, self.follows)

    def backend(self) -> contextlib.AbstractContextManager[object]:
        """The order of backends that `fuse` was given, around a call."""
        order = self._vitkernels.backends
        if order is None or torch.compiler.is_compiling():
            return contextlib.nullcontext()
        return dispatch.scope(order)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # the class is made at run time: a copy or a pickle says of what it was made
        return _make, (_mixin(type(self)), self.stock), self.__dict__.copy()


class PreNormBlock(Fused):
    """A Transformer block made of residual steps with the norm in front; a mixin says which in `sublayers`."""

    is_block = True

    def sublayers(self, **options: Any) -> list[Sublayer]:
        """The residual steps of a call, in order; the options are what `run` was given."""
        raise NotImplementedError

    def why_not_joined(self) -> str | None:
        """Why a call with tokens alone is more than `sublayers()` in a row, or None where it is that."""
        return "somebody replaced its forward" if replaced(type(self)) else why_not_methods(self, self.follows)

    def run(self, x: Tensor, **options: Any) -> Tensor:
        """The block on its tokens, [B, N, D] to the same."""
        with self.backend():
            state = self._vitkernels
            if torch.compiler.is_compiling():
                return self.steps(x, self.sublayers(**options))
            plain = type(self).steps is PreNormBlock.steps  # others may call branches by their `run`
            return self.steps(x, read_for(self, state.kept, self.sublayers, x, options, state.recompute_norms, plain))

    def steps(self, x: Tensor, sublayers: Sequence[Sublayer]) -> Tensor:
        """The residual steps on their tokens."""
        state = self._vitkernels
        return pre_norm(x, sublayers, state.residual_dtype, again=state.recompute_norms)

    def parts(self) -> list[Part]:
        return [part for sublayer in self.sublayers() for part in sublayer.parts()]


def _why_not_call(x: Any) -> str | None:
    if not isinstance(x, Tensor):
        return (
            "traced by torch.fx" if isinstance(x, torch.fx.Proxy) else f"called with a {type(x).__name__}, not a tensor"
        )
    if torch.jit.is_tracing():
        return "traced by torch.jit"
    if x.is_nested:
        return "called with a nested tensor"
    if not x.is_floating_point():
        return f"called with {x.dtype}"
    return f"called with a {type(x).__name__}, which acts itself" if acts(type(x)) else None


def why_not_tokens(x: Tensor, reader: object, axes: int | None = 3) -> str | None:
    """Why a call with these tokens is left to the stock module's own checks; None where it fits.

    Args:
        x: [..., D].
        reader: what reads them first, a norm, a Linear or a convolution; one without a weight checks them itself.
        axes: how many the stock module takes; None for any number.
    """
    if axes is not None and x.dim() != axes:
        return f"called with {x.dim()} axes, not {axes}"
    weight = reader._parameters.get("weight") if isinstance(reader, nn.Module) else None
    if weight is None:  # or made at each look (a parametrization), or hung on by somebody: its own call checks
        return None
    if weight.device != x.device:
        return f"called with a tensor on {x.device}, and its weights are on {weight.device}"
    return parts.why_not_dtypes(reader, x)  # type: ignore[arg-type]


def why_not_mask(mask: Any, x: Tensor) -> str | None:
    """Why a call with this attention mask is left to the stock module's own checks; None where it fits."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        return f"called with a {type(mask).__name__} for a mask, not a tensor"
    if mask.dim() < 2:  # torch's attention looks at the queries' axis
        return f"called with a mask of {mask.dim()} axes"
    if acts(type(mask)):  # torch's CausalBias, whose numbers are none
        return f"called with a {type(mask).__name__} for a mask, which acts itself"
    if mask.dim() == 4 and mask.shape[0] != 1 and mask.shape[0] != x.shape[0]:  # the ops would repeat some
        return f"called with masks of {mask.shape[0]} sequences, and tokens of {x.shape[0]}"
    if mask.dtype in (torch.bool, x.dtype):
        return None
    floats = mask.is_floating_point() and autocast_dtype(x) is not None and mask.dtype != torch.float64
    return None if floats else f"called with a mask of {mask.dtype}, and tokens of {x.dtype}"


def branch_of(name: str, child: nn.Module, call: Callable[[Tensor], Tensor] | None = None, **options: Any) -> Branch:
    """A sub-layer as a branch: by its parts where it is fused and may be read around, else by calling it.

    Args:
        name: what its block calls it.
        child: the sub-layer.
        call: how its block calls it; with x and the options where none is given.
        options: keywords of its `branch`.
    """
    why_not: str | None
    if isinstance(child, Fused):
        why_not = parts.why_not_part(name, child) or why_not_methods(child, child.follows) or child.why_not_now()
        if why_not is None:
            return child.branch(**options)
    else:
        why_not = why_not_child(name, child)
    return Branch(lambda x, bias_apart: (child(x, **options) if call is None else call(x), None), "", None, why_not)


_classes: dict[tuple[type, type], type[Fused]] = {}


def fused_class(mixin: type[Fused], stock: type[nn.Module]) -> type[Fused]:
    """The class of modules that are `stock` with `mixin` swapped in; one for each pair."""
    if (mixin, stock) not in _classes:
        _classes[mixin, stock] = _join(mixin, stock)
    return _classes[mixin, stock]


def _join(mixin: type[Fused], stock: type[nn.Module]) -> type[Fused]:
    names = {key: stock.__dict__.get(key, getattr(stock, key)) for key in ("__module__", "__qualname__", "__doc__")}
    members = {**names, "stock": stock, "forward": _with_stock_errors(mixin.forward)}
    return type(stock.__name__, (mixin, stock), members)


def _with_stock_errors(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A mixin's forward, whose bad calls raise what the stock forward raises: its own error is the one to see.

    The twins in `vk.nn` are the package's own, and so are their errors.
    """

    @functools.wraps(forward)
    def checked(self: Fused, *args: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **keywords)
        try:
            return forward(self, *args, **keywords)
        except (TypeError, ValueError) as error:
            if not is_argument_error(error) or issubclass(self.stock, Twin):
                raise
            refusal = str(error)
        self.count_fallback(refusal)
        return self.stock.forward(self, *args, **keywords)

    return checked


def _mixin(cls: type) -> type[Fused]:
    return cls.__bases__[0]


def _make(mixin: type[Fused], stock: type[nn.Module]) -> Fused:
    cls = fused_class(mixin, stock)
    return cls.__new__(cls)


def hidden(module: nn.Module, mixin: type[Fused]) -> str | None:
    """Which attributes of a stock module the mixin's own would hide from its users, in a sentence; None for none."""
    bases = (base for base in mixin.__mro__ if issubclass(base, Fused))
    names = {name for base in bases for name in vars(base)} - set(dir(nn.Module)) - mixin.replaces
    taken = sorted(name for name in names if hasattr(module, name))
    return f"its {', '.join(taken)} would be hidden by what a fused module calls so" if taken else None


def swap(module: nn.Module, mixin: type[Fused]) -> Fused:
    """Swap the mixin in, in place."""
    module.__class__ = fused_class(mixin, type(module))
    module.__dict__["_vitkernels"] = State()
    assert isinstance(module, Fused)
    return module


def is_swapped(module: Fused) -> bool:
    """Whether the module still has the class that `swap` gave it."""
    return _classes.get((_mixin(type(module)), module.stock)) is type(module)


def restore(module: nn.Module) -> None:
    """Give the module its own class back, in place; one that is not fused, or was made so, stays as it is."""
    module.__dict__.pop("__prepare_scriptable__", None)
    if not isinstance(module, Fused):
        return
    if issubclass(module.stock, Twin):
        module._vitkernels = State()
    else:
        module.__class__ = module.stock  # type: ignore[assignment]
        del module._vitkernels


def keep_scriptable(model: nn.Module) -> None:
    """Have torch.jit.script compile a stock copy of every module that is fused or has fused ones in it.

    It asks each module for `__prepare_scriptable__`, and writes the answer into the module's parent: only a copy of
    the whole tree leaves the model itself alone.
    """
    for module in model.modules():
        if any(isinstance(inner, Fused) for inner in module.modules()):
            module.__dict__["__prepare_scriptable__"] = functools.partial(stock_copy, module)


@contextlib.contextmanager
def as_stock(model: nn.Module) -> Iterator[nn.Module]:
    """The model with every fused module as it was, inside the block."""
    swapped = [(module, type(module)) for module in model.modules() if isinstance(module, Fused)]
    for module, _ in swapped:
        module.__class__ = module.stock  # type: ignore[assignment]
    try:
        yield model
    finally:
        for module, cls in swapped:
            module.__class__ = cls


def stock_copy(module: nn.Module) -> nn.Module:
    """The tree of modules once more, of stock classes, over the same parameters and buffers."""
    twin = {
        name: value for name, value in module.__dict__.items() if name not in ("_vitkernels", "__prepare_scriptable__")
    }
    for table in ("_parameters", "_buffers"):
        twin[table] = dict(twin[table])
    twin["_modules"] = {name: child and stock_copy(child) for name, child in module._modules.items()}
    cls = module.stock if isinstance(module, Fused) else type(module)
    other = cls.__new__(cls)
    other.__dict__.update(twin)
    return other
