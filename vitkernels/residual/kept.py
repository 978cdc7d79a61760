"""What was read off a tree of modules, kept while nothing in the tree has changed.

Whether a block's parts may be read, which of them drop something now, which weights they hold: all of it stands in the
modules' own dictionaries and classes, and is asked again only when one of these is no longer what it was. Comparing
dictionaries that hold the same objects takes a tenth of the time of asking.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

from vitkernels.residual.genuine import is_idle

Value = TypeVar("Value")
_MOST_CHANGES = 32  # in a row: a tree that changes at each call (as some wrappers have it) is not compared any more
_NO_CONFIGURATION = (nn.Module, Tensor, type, dict, list, set, FunctionType, BuiltinFunctionType, MethodType)
_TENSORS = (Tensor, nn.Parameter)  # others may refuse to be asked
# Of a module's dictionaries those that say nothing of what it computes, or nothing that the others do not say too: each
# that is looked into is a miss of the caches.
_ASIDE = frozenset(
    {"_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"}
    | {"_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"}
    | {"_non_persistent_buffers_set"}
)
_SIMPLE = (type(None), bool, int, float, str)


class Late(tuple[Any, ...]):
    """The key of options with tensors: what is read for it must not hold them."""


def key_of(options: Mapping[str, Any]) -> Hashable | None:
    """A call's options, where what is read for them may be kept for the next call with the same; None where not.

    Of tensors the key has what decides how modules are read: the dtype, the number of axes, and whether it learns.
    """
    found: list[Hashable] = []
    kind: type[tuple[Any, ...]] = tuple
    for name, value in options.items():
        if type(value) in _SIMPLE:
            found.append((name, type(value), value))  # 1 is no True: torch refuses it for a flag
            continue
        inner: Any
        if type(value) is Tensor:
            inner = Late((value.dtype, value.dim(), value.requires_grad))
        elif isinstance(value, Mapping):
            inner = key_of(value)
        elif isinstance(value, tuple):
            inner = key_of(dict(enumerate(value)))  # type: ignore[arg-type]
        else:
            return None
        if inner is None:
            return None
        found.append((name, type(value), inner))
        kind = Late if type(inner) is Late else kind
    return kind(found)


class Kept:
    """One value that was read off a tree of modules. A copy of it, as copies of the modules have, holds nothing."""

    __slots__ = ("_changes", "_found")

    def __init__(self) -> None:
        self._found: tuple[nn.Module, Hashable, _Tree, Any] | None = None
        self._changes = 0

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()

    def get(self, root: nn.Module, key: Hashable, read: Callable[[], Value]) -> Value:
        """read(), or what it gave at a call with this key since which the tree has not changed.

        Args:
            root: of the tree, all that `read` looks at.
            key: what else `read` depends on.
            read: it looks at modules, never at values of tensors.
        """
        found = self._found  # once: other threads may run copies of the module that share this
        if found is not None and found[0] is root and found[1] == key and found[2].is_unchanged():
            self._changes = 0
            return found[3]
        value = read()
        if self._changes < _MOST_CHANGES:
            self._changes += 1
            self._found = root, key, _Tree(root), value
        return value


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    for own in (module._parameters, module._buffers, module.__dict__):
        for value in own.values():
            if isinstance(value, Tensor):
                yield value


class _Tree:
    """The modules of a tree as they are now."""

    __slots__ = (
        "_classes",
        "_empty",
        "_hooks",
        "_kinds",
        "_methods",
        "_numbers",
        "_objects",
        "_sizes",
        "_spaces",
        "_vectors",
        "_weights",
    )

    def __init__(self, root: nn.Module) -> None:
        self._empty: list[Any] = []  # hooks and the like that are not there
        self._numbers: list[tuple[Mapping[str, Any], str, Tensor]] = []  # tensors of one element: they compare by value
        # a weight may become one of another class where it lies (torch.utils.swap_tensors), a bias one that broadcasts
        self._weights = [each for module in root.modules() for each in _own_tensors(module)]
        self._kinds = list(map(type, self._weights))
        self._vectors = [(each, each.shape) for each in self._weights if type(each) in _TENSORS and each.dim() <= 1]
        self._hooks = [(hook, is_idle(hook)) for each in root.modules() for hook in each._forward_hooks.values()]
        objects: dict[int, Any] = {}
        for module in root.modules():
            objects[id(module)] = module
            for value in vars(module).values():  # configurations, which several modules may share
                if hasattr(value, "__dict__") and not isinstance(value, _NO_CONFIGURATION):
                    objects[id(value)] = value
        self._objects = [(each, type(each), self._copied(vars(each))) for each in objects.values()]
        kinds = {type(each) for each in root.modules()}
        stocks = {kind.stock: kind for kind in kinds if hasattr(kind, "stock")}  # what fused classes stand for
        self._classes = [(kind, kind.forward, kind.__call__) for kind in {*kinds, *stocks}]
        # a property that somebody puts on a class hides what its modules hold
        self._spaces = list({id(each): vars(each) for kind in kinds for each in kind.__mro__}.values())
        self._sizes = list(map(len, self._spaces))
        self._methods = [
            (stock, name, getattr(stock, name, None))
            for stock, kind in stocks.items()
            for name in getattr(kind, "follows", ())
        ]

    def _copied(self, own: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self._each_copied(own))

    def _each_copied(self, own: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        self._note_numbers(own)
        for name, value in own.items():
            if name in _ASIDE:
                pass  # itself, compared by identity
            elif isinstance(value, dict | list | set) and not value:
                self._empty.append(value)  # itself: it is compared by identity, and asked whether it is still empty
            elif isinstance(value, dict):
                self._note_numbers(value)
                value = dict(value)
            elif isinstance(value, list | set):
                value = value.copy()
            yield name, value

    def _note_numbers(self, own: Mapping[str, Any]) -> None:
        self._numbers += [(own, *item) for item in own.items() if type(item[1]) in _TENSORS and item[1].numel() == 1]

    def is_unchanged(self) -> bool:
        if any(self._empty) or list(map(len, self._spaces)) != self._sizes:
            return False
        if any(own.get(name) is not tensor for own, name, tensor in self._numbers):
            return False
        if list(map(type, self._weights)) != self._kinds or any(each.shape != was for each, was in self._vectors):
            return False
        if any(getattr(stock, name, None) is not method for stock, name, method in self._methods):
            return False
        if any(is_idle(hook) is not was for hook, was in self._hooks):
            return False
        for kind, forward, call in self._classes:
            if kind.forward is not forward or kind.__call__ is not call:
                return False
        try:
            for each, kind, was in self._objects:
                if type(each) is not kind or each.__dict__ != was:
                    return False
        except (RuntimeError, ValueError, TypeError):  # another tensor or array stands there: equal has no answer
            return False
        return True
