"""Which modules of a model the rules know, and why one that is known stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from vitkernels.fuse import rules
from vitkernels.fuse.probe import difference
from vitkernels.fuse.swap import Fused, hidden
from vitkernels.nn import Attention, Block, Mlp, PatchEmbed
from vitkernels.residual import genuine

OWN = (Attention, Block, Mlp, PatchEmbed)  # built on the ops already


@dataclass(frozen=True, slots=True)
class Candidate:
    """A module that a rule knows: fused already, about to be, or declined with a reason."""

    name: str
    module: nn.Module
    match: rules.Match
    declined: str | None


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every module of the model that a rule knows, fused or not; `vitkernels.nn`'s own are what they should be."""
    own = {inner for module in model.modules() if isinstance(module, OWN) for inner in module.modules()}
    for name, module in model.named_modules():
        match = None if module in own else rules.match(module)
        if match is None:
            continue
        declined = match.declined
        if declined is None and "forward" in vars(module) and not isinstance(module, Fused):
            declined = "a forward of its own, which another class would not change"
        if declined is None and match.certain and genuine.replaced(type(module)):
            declined = f"somebody replaced the forward of {genuine.owner_name(module)}"
        if declined is None and not isinstance(module, Fused):
            declined = hidden(module, match.rule.mixin)
        if declined is None and not match.certain and not isinstance(module, Fused):
            declined = difference(module, match.rule.mixin, match.rule.keywords)
        yield Candidate(name, module, match, declined)
