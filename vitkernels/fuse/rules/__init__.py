"""One file of rules for each ecosystem: which of its modules are served, by what mixin, and in what they may differ.

To add an ecosystem, add a file here: it defines `RULES`. No file imports the ecosystem: modules are known by the class
that defines their `forward`, and by their structure.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitkernels.fuse.swap import Fused
from vitkernels.residual import genuine


@dataclass(frozen=True)
class Rule:
    """How one kind of module is served.

    Attributes:
        mixin: what is swapped in.
        owners: the classes whose `forward` it stands for, as "package.module.Class"; of those made of nn.Sequential,
            which have none, the class itself.
        contract: (module) -> in what the module differs from what the mixin knows, or None: a newer version, say.
        structure: (module) -> whether a class that `owners` does not hold has the same structure; None to look at no
            other. Such a module is run both ways on random tokens before it is swapped.
        keywords: (module, tokens) -> what such a run passes beside the tokens [B, N, D].
        is_common: whether most modules of the class are none of the package's business: a declined one goes unsaid.
    """

    mixin: type[Fused]
    owners: frozenset[str]
    contract: Callable[[nn.Module], str | None]
    structure: Callable[[nn.Module], bool] | None = None
    keywords: Callable[[nn.Module, Tensor], dict[str, Any]] = lambda module, tokens: {}
    is_common: bool = False


@dataclass(frozen=True)
class Match:
    """A rule that knows a module, and why the module cannot be served all the same."""

    rule: Rule
    declined: str | None
    certain: bool  # by its owner; else by its structure


@functools.cache
def all_rules() -> tuple[Rule, ...]:
    """The rules of every ecosystem."""
    pages = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return tuple(rule for page in pages for rule in page.RULES)


def match(module: nn.Module) -> Match | None:
    """The rule for a module; None where there is none."""
    names = _names(module)
    known = [Match(rule, _declined(rule, module), True) for rule in all_rules() if names & rule.owners]
    known = [each for each in known if each.declined is None or not each.rule.is_common]
    if known:  # several, where versions of a class differ
        return next((each for each in known if each.declined is None), known[0])
    for rule in all_rules():
        if rule.structure is not None and rule.structure(module) and rule.contract(module) is None:
            return Match(rule, None, False)
    return _relative(module)


def _declined(rule: Rule, module: nn.Module) -> str | None:
    return rule.contract(module) or genuine.why_not_methods(module, rule.mixin.follows)


def _names(module: nn.Module) -> set[str]:
    """What the owners of rules are held against: the module's owner, and for a Sequential each class that made it."""
    if genuine.owner(module) is not nn.Sequential:
        return {genuine.owner_name(module)}
    return {genuine.name_of(cls) for cls in genuine.stock_type(module).__mro__}


def _relative(module: nn.Module) -> Match | None:
    """A block that no rule serves, but whose base class or structure one knows: in what it differs."""
    bases = {genuine.name_of(base) for base in genuine.stock_type(module).__mro__}
    for rule in all_rules():
        if not rule.mixin.is_block:
            continue
        if bases & rule.owners:
            return Match(rule, rule.contract(module) or f"forward is {genuine.owner_name(module)}'s own", True)
        if rule.structure is not None and rule.structure(module):
            return Match(rule, rule.contract(module), False)
    return None


# ------------------------------------------------------------------------------------------------- for contracts


def differs(
    module: nn.Module,
    arguments: Collection[str],
    children: Collection[str],
    optional: Collection[str] = (),
    parameters: Collection[str] = (),
) -> str | None:
    """In what a module differs from the one that a mixin was written for, in a sentence; None in nothing.

    Args:
        module: to look at.
        arguments: of its `forward`, in order.
        children: what it must have.
        optional: what it may have beside them.
        parameters: its own parameters that the mixin knows.
    """
    found = list(inspect.signature(genuine.owner(module).forward).parameters)[1:]
    if found != list(arguments):
        return f"forward takes ({', '.join(found)}), not ({', '.join(arguments)})"
    names = {name for name, child in module._modules.items() if child is not None}
    if missing := sorted(set(children) - names):
        return f"it has no {', '.join(missing)}"
    if unknown := sorted(names - set(children) - set(optional)):
        return f"it has {', '.join(unknown)}, of which nothing is known"
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    if unknown := sorted(own - set(parameters)):
        return f"it has the parameters {', '.join(unknown)}, of which nothing is known"
    return None
