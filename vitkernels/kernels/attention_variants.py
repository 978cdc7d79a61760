"""What `make audit` compiles of the attention kernels: the shapes of common ViTs, every row, mask and dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vitkernels.kernels import attention_long, attention_rel_pos_kernels, attention_short, configs
from vitkernels.kernels.configs import AttentionTile, Capability
from vitkernels.kernels.variants import Variant

# tokens, head width
_SHAPES = (
    *((7, 64), (17, 64), (17, 128), (40, 64), (40, 128), (49, 32), (49, 64), (64, 64), (64, 80), (64, 104), (64, 128)),
    *((65, 128), (77, 64), (128, 104), (128, 128), (196, 64)),
    *((197, 32), (197, 48), (197, 64), (197, 80), (256, 64), (256, 72), (257, 64), (257, 80), (257, 88), (257, 96)),
    *((577, 64), (577, 72), (577, 80), (577, 88), (577, 96), (577, 104), (577, 128), (1370, 64)),
)
_MASKS: dict[str, dict[str, Any]] = {
    "causal": {"CAUSAL": True},
    "key padding": {"MASK": "bool", "PLAIN": False},
    "bool": {"MASK": "bool", "MASK_ROWS": True, "PLAIN": False},
    "additive": {"MASK": "add", "MASK_ROWS": True, "PLAIN": False},
    "additive in turn": {"MASK": "add", "MASK_ROWS": True, "PLAIN": False},
    "additive, gradient": {"MASK": "add", "MASK_ROWS": True, "PLAIN": False, "STORE_DS": True},
}
_UNMASKED: dict[str, Any] = {"MASK": "none", "MASK_ROWS": False, "CAUSAL": False, "PLAIN": True, "STORE_DS": False}


def variants(capability: Capability) -> list[Variant]:
    """Every kernel at every row of a capability: B=256 H=12 up to 288 tokens, B=32 H=16 above."""
    found = [variant for tokens, width in _SHAPES for variant in _Shape(tokens, width, "bf16", capability).variants()]
    for mask in _MASKS:
        found += _Shape(577, 64, "bf16", capability, mask).variants()
    for mask in ("causal", "key padding"):
        for tokens, width in ((77, 64), (128, 128), (197, 32), (197, 64), (256, 80)):
            found += _Shape(tokens, width, "bf16", capability, mask).variants()
    return found + list(_Shape(577, 64, "fp32", capability).variants())


def variants_varlen(capability: Capability) -> list[Variant]:
    """The long kernels as `attention_varlen` launches them: sequences of one length here, which the rooflines need."""
    shapes = [_Shape(577, width, "bf16", capability, packed=True) for width in (64, 72, 80, 128)]
    shapes += [_Shape(577, 64, "bf16", capability, mask, packed=True, group=4) for mask in ("", "causal")]
    return [
        variant for shape in (*shapes, _Shape(577, 64, "fp32", capability, packed=True)) for variant in shape.long()
    ]


def variants_rel_pos(capability: Capability) -> list[Variant]:
    """The kernels as `attention_rel_pos` launches them: windows of 7 and of 14, images of 32 and of 64."""
    images = ((7, 32), (14, 64), (14, 80), (32, 64), (64, 64), (64, 80), (64, 128))
    shapes = [_Shape(side * side, width, "bf16", capability, columns=side) for side, width in images]
    shapes += [_Shape(side * side, 64, "fp32", capability, columns=side) for side in (14, 64)]
    return [variant for shape in shapes for variant in shape.long()]


_OF_SEQUENCES = ("p_cu_q", "p_cu_k", "LONGEST")  # arguments that are None where all sequences have one length


@dataclass(frozen=True)
class _Shape:
    tokens: int
    width: int
    dtype: str
    capability: Capability
    mask: str = ""
    packed: bool = False  # many sequences in one
    group: int = 1  # heads of q that share one of k and v
    columns: int = 0  # of an image of keys

    @property
    def heads(self) -> int:
        return 256 * 12 if self.tokens <= 288 else 32 * 16

    def variants(self) -> Iterator[Variant]:
        forward, *backward = self.long()
        short = self._short("forward")
        if short is not None:
            pieces = configs.attention_keys(self.tokens)
            constants = {"KEYS": pieces, "NK": self.tokens}
            yield self._variant(attention_short.attention_short_forward, short, 4, 4, sum(pieces), constants)
        else:
            yield forward
        short = self._short("backward")
        if short is not None:
            constants = {"NK": self.tokens, "PREFETCH": short.stages > 1}
            short = dataclasses.replace(short, stages=1)
            yield self._variant(attention_short.attention_short_backward, short, 7, 10, short.keys, constants)
        else:
            yield from backward

    def long(self) -> Iterator[Variant]:
        dq = configs.LONG_DS if "gradient" in self.mask else configs.LONG_DQ
        dq_kernel: Any = attention_long.attention_long_dq
        call = {"width": self.width, "float32": self.dtype == "fp32", "image": bool(self.columns)}
        if self.columns:
            dq, dq_kernel = configs.REL_POS_DQ, attention_rel_pos_kernels.attention_rel_pos_dq
            call["columns"] = self.columns
        for kernel, table, tensors, flops in (
            (attention_long.attention_long_forward, configs.LONG_FORWARD, 4, 4),
            (attention_long.attention_long_delta, configs.LONG_DELTA, 2, 0),
            (dq_kernel, dq, 5, 6),
            (attention_long.attention_long_dkdv, configs.LONG_DKDV, 6, 8),
        ):
            tile = table.pick(self.capability, **call)
            if table is configs.REL_POS_DQ:
                tile = dataclasses.replace(tile, keys=configs.row_of_keys(self.columns))
            yield self._variant(kernel, tile, tensors, flops)

    def _short(self, direction: str) -> AttentionTile | None:
        if self.mask not in ("", "causal", "key padding") or self.dtype == "fp32":
            return None
        table = configs.SHORT[direction]
        return table.find(self.capability, keys=self.tokens, width=self.width, masked=self.mask != "")

    def _variant(
        self, kernel: Any, tile: AttentionTile, tensors: int, flops: int, keys: int = 0,
        constants: dict[str, Any] | None = None,
    ) -> Variant:  # fmt: skip
        """A kernel that reads and writes so many [B, H, N, K], and takes so many operations a score and column."""
        size = 4 if self.dtype == "fp32" else 2
        widths = configs.attention_widths(self.width)
        keys = keys or -(-self.tokens // max(tile.keys, 1)) * tile.keys
        known = _UNMASKED | _MASKS.get(self.mask, {})
        if self.columns:
            known |= {"MASK": f"image {self.columns}", "MASK_ROWS": True, "PLAIN": False}
            if kernel is attention_rel_pos_kernels.attention_rel_pos_dq:
                keys = self.tokens // self.columns * tile.keys
        known |= {"K": self.width, "ALIGN": 8, "WIDTHS": widths, "BM": tile.queries, "BN": tile.keys}
        if constants:  # the short kernels
            known |= constants | {"MASK": "keys" if self.mask == "key padding" else "none"}
        known |= {name: 1 for name in kernel.arg_names if name.startswith("stride_") and name[-1] == "k"}
        known |= {"stride_mn": 1} if known["MASK"] != "none" else {}
        known |= {"p_mask": None} if known["MASK"] == "none" else {}
        known |= {} if "in turn" in self.mask else {"MASKS": None}
        known |= {"GROUP": self.group} | ({} if self.packed else dict.fromkeys(_OF_SEQUENCES))
        known |= {} if known["STORE_DS"] else {"p_ds": None}
        known = {name: value for name, value in known.items() if name in kernel.arg_names}
        queries = -(-self.tokens // tile.queries) * tile.queries
        mask = f" {self.mask}" if self.mask else ""
        mask += " varlen" if self.packed else ""
        mask += f" image of {self.columns} columns" if self.columns else ""
        mask += f" {self.group} heads a key" if self.group > 1 else ""
        return Variant(
            name=f"{kernel.__name__.replace('_', ' ')} N={self.tokens} K={self.width} {self.dtype}{mask}",
            kernel=kernel,
            signature={name: self._type(name) for name in kernel.arg_names if name not in known},
            constants=known,
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.maxnreg,
            divisible=("LONGEST",) if self.packed else (),
            spills=tile.spills,
            matrix=flops > 0 and self.dtype != "fp32",
            moved=tensors * self.heads * self.tokens * self.width * size,
            flops=flops * self.heads * queries * keys * sum(widths),
            useful=flops * self.heads * self.tokens**2 * self.width,
        )

    def _type(self, argument: str) -> str:
        if argument in ("p_stats", "p_delta", "p_ds", "p_sums", "p_shares", "p_exact"):
            return "*fp32"
        if argument in ("p_cu_q", "p_cu_k"):
            return "*i32"
        if argument == "p_mask":
            return "*u8" if _MASKS.get(self.mask, {}).get("MASK") == "bool" else f"*{self.dtype}"
        if argument.startswith("p_"):
            return f"*{self.dtype}"
        return "fp32" if argument in ("scale", "factor", "unit") else "i32"
