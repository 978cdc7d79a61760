"""Hugging Face transformers: what each text calls the parts of its attention, and what a call of it must bring."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vitkernels.fuse.rules import Rule
from vitkernels.residual.genuine import owner_name


@dataclass(frozen=True, slots=True)
class Spelling:
    """What a text calls the parts of its attention; a dot reads into a module inside.

    Attributes:
        inputs: the projections of q, k and v, or the one for all three.
        out: the projection behind.
        heads, scale, dropout, config: their attributes; no scale is 1 / sqrt(K). The dropout is a rate or a module.
        norms: of q and of k, over all heads together, or over each where `each_head`.
        last: the dropout behind `out`.
        inside: modules within, which are read past.
        is_causal: False where the text says so itself, the attribute that it hands over, or None where the call is
            heard.
    """

    inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    heads: str = "num_attention_heads"
    scale: str | None = "scaling"
    dropout: str = "attention_dropout"
    norms: tuple[str, str] | None = None
    each_head: bool = False
    last: str | None = None
    inside: tuple[str, ...] = ()
    is_causal: str | bool | None = None
    config: str = "config"


def written_out(inside: str) -> Spelling:
    """Of attention without a config, in the module of that name and one called "output"."""
    return Spelling(
        tuple(f"{inside}.{name}" for name in ("query", "key", "value")),
        "output.dense",
        f"{inside}.num_attention_heads",
        None,
        f"{inside}.dropout",
        last="output.dropout",
        inside=(inside, "output"),
    )


def why_not_without(needed: Collection[str], options: Mapping[str, Any]) -> str | None:
    """Which keyword a call lacks that it cannot do without; the module's own error is the one to see."""
    return next((f"called without {name}" for name in needed if options.get(name) is None), None)


def why_not_inside(module: nn.Module, inside: Mapping[str, frozenset[str]]) -> str | None:
    """Which child that is read past is of another class than these; None for none."""
    named = ((name, owner_name(module._modules[name]), known) for name, known in inside.items())  # type: ignore[arg-type]
    return next(
        (f"its {name} is {found}, of which nothing is known" for name, found, known in named if found not in known),
        None,
    )


def at(module: nn.Module, path: str) -> Any:
    """What stands at a dotted path of attributes."""
    return functools.reduce(getattr, path.split("."), module)


RULES: tuple[Rule, ...] = ()  # the texts have pages of their own
