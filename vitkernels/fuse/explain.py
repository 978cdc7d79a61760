"""explain: which modules of a model run fused, on which backend, and why each other one does not."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vitkernels import dispatch
from vitkernels.fuse import unserved
from vitkernels.fuse.candidates import candidates
from vitkernels.fuse.swap import Fused
from vitkernels.nn import Block
from vitkernels.residual.stream import Part


@dataclass(frozen=True, slots=True)
class Row:
    """One part of one module.

    Attributes:
        module: its name in the model.
        part: the part of it ("attn", "mlp residual"); "" for the module itself.
        ops: the ops that serve it, "" for none.
        backend: the backend that is asked first and there.
        why_not: what is not fused, or None.
        own: whether the part is an attention of a kind that no op serves, run by its own code.
    """

    module: str
    part: str
    ops: str
    backend: str
    why_not: str | None
    own: bool = False


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; print it, or read it with `to_dict`."""

    rows: list[Row]
    blocks: dict[str, str | None]  # name of each Transformer block: what of it is not fused, or None
    fallbacks: dict[str, dict[str, int]] = field(default_factory=dict)  # calls that ran a module's own code, and why

    @property
    def unfused(self) -> dict[str, str]:
        """The blocks that are not fused whole, and why."""
        return {name: reason for name, reason in self.blocks.items() if reason is not None}

    @property
    def around(self) -> dict[str, str]:
        """Of the unfused blocks those of which the attention alone is not, being of a kind that no op serves."""
        own: dict[str, bool] = {}
        for row in self.rows:
            if row.why_not is not None:
                own[row.module] = own.get(row.module, True) and row.own
        return {name: reason for name, reason in self.unfused.items() if own.get(name)}

    @property
    def summary(self) -> str:
        """The last line, for instance 11 of 12 blocks fused, and what keeps block 7 from it.

        Blocks of `around` are counted apart: "12 of 12 blocks: residual and feed-forward fused, attention its own".
        """
        count, around = len(self.blocks), self.around
        said = [f"{count - len(self.unfused)} of {count} blocks fused"]
        if around:
            said.append(f"{len(around)} of {count} blocks: residual and feed-forward fused, attention its own")
        said += [f"block {_index(name)}: {reason}" for name, reason in self.unfused.items() if name not in around]
        return "; ".join(said)

    def to_dict(self) -> dict[str, Any]:
        """The same for programs, in plain Python values.

        Keys: `blocks`, `fused`, `around`, `rows`, `unfused`, `fallbacks`, `summary`.
        """
        return {
            "blocks": len(self.blocks),
            "fused": len(self.blocks) - len(self.unfused),
            "around": self.around,
            "unfused": self.unfused,
            "rows": [
                {"module": row.module, "part": row.part, "ops": row.ops, "backend": row.backend, "why_not": row.why_not}
                for row in self.rows
            ],
            "fallbacks": self.fallbacks,
            "summary": self.summary,
        }

    def __str__(self) -> str:
        table = [("module", "part", "fused ops", "backend", "why not")]
        table += [
            (row.module, row.part, row.ops, row.backend if row.ops else "", row.why_not or "") for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        for name, counts in self.fallbacks.items():
            lines += [f"{name}: {count} calls ran its own code: {reason}" for reason, count in counts.items()]
        return "\n".join([*lines, self.summary])

    __repr__ = __str__


def explain(model: nn.Module) -> Explanation:
    """Say of every module that a rule knows what runs fused, on which backend, and what keeps the rest from it.

    Args:
        model: fused or not; it is only looked at.

    Returns:
        An `Explanation`: printed, a table that ends in a line like "11 of 12 blocks fused; block 7: LoRA on qkv".

    Raises:
        TypeError: model is no Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: argument 'model' is a {type(model).__name__}; needs a torch.nn.Module")
    rows: list[Row] = []
    blocks: dict[str, str | None] = {}
    fallbacks: dict[str, dict[str, int]] = {}
    known = {each.name: each for each in candidates(model)}
    inside: tuple[str, ...] = ()  # blocks: what is in them is told by their own rows
    for name, module in model.named_modules():
        if isinstance(module, Fused) and module._vitkernels.fallbacks:
            fallbacks[name] = dict(module._vitkernels.fallbacks)
        if inside and name.startswith(inside):
            continue
        if isinstance(module, Fused):
            backend, reason = _backend(module), module.why_not_own()
            inner = module.block_names(module)
            parts = module.parts() if reason is None else [Part("", "", reason, block) for block in inner or [""]]
            found = [
                Row(_join(name, part.module), part.name, part.ops, backend, part.why_not, part.own) for part in parts
            ]
        elif isinstance(module, Block):  # vitkernels' own
            parts = [part for sublayer in module.sublayers() for part in sublayer.parts()]
            found = [Row(name, part.name, part.ops, _backend(module), part.why_not) for part in parts]
            inner = [""]
        elif name in known:
            inner = known[name].match.rule.mixin.block_names(module)
            reason = known[name].declined or "not fused"
            found = [Row(_join(name, block), "", "", "", reason) for block in inner or [""]]
        elif _looks_like_block(module):
            found = [Row(name, "", "", "", unserved.why_not_block(module))]
            inner = [""]
        else:
            continue
        rows += found
        for block in (_join(name, each) for each in inner):
            blocks[block] = next((row.why_not for row in found if row.module == block and row.why_not), None)
        if isinstance(module, Fused | Block) and inner:
            inside = (*inside, f"{name}." if name else "")
    return Explanation(rows, blocks, fallbacks)


def _join(name: str, inner: str) -> str:
    return ".".join(filter(None, (name, inner)))


def _backend(module: nn.Module) -> str:
    """The first backend in the module's order that is there."""
    kind = next((weight.device.type for weight in module.parameters()), "cpu")
    order = (isinstance(module, Fused) and module._vitkernels.backends) or dispatch.order(kind)
    return next((backend for backend in order if dispatch.why_not(backend) is None), "none")


def _looks_like_block(module: nn.Module) -> bool:
    """Whether a module that no rule knows is a Transformer block by the names of its children."""
    kind = type(module).__name__.lower()
    if "pool" in kind or kind == "globalcontext":  # a head over one token, a gate of convolutional networks
        return False
    names = {name.lower() for name, _ in module.named_children()}
    return any("att" in name for name in names) and any(
        word in name for name in names for word in ("mlp", "ffn", "feed", "intermediate", "fc1", "linear1")
    )


def _index(name: str) -> str:
    """The block's number, the last one in its name; the name where there is none, 0 for the model itself."""
    numbers = re.findall(r"\d+", name)
    return numbers[-1] if numbers else name or "0"
