"""Made-up results files for the tests of what is made of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bench.measure import OURS, Key

OP = Key("op", "mlp", "B=8 N=197 D=384 H=6", "float32", "forward + backward")
MODEL = Key("model", "vit_small_patch16", "B=8 224 px, N=197", "float32", "training step")


def row(key: Key, lane: str, seconds: float, **more: Any) -> dict[str, Any]:
    """A row under ceilings of 100 GFLOP/s and 10 GB/s, of work that takes 1 s at the first."""
    figures = {"seconds": seconds, "spread": 0.02, "rounds": 9, "memory": 2**30, "backends": ["ext"]}
    work = {"flops": 1e11, "bytes": 1e9, "gemm": 1e11, "copy": 1e10}
    return {**asdict(key), **work, "lane": lane, **figures, "share": 1 / seconds, "mfu": 1 / seconds, **more}


def failed(key: Key, lane: str, reason: str) -> dict[str, Any]:
    return {**asdict(key), "flops": 1e11, "bytes": 1e9, "lane": lane, "failed": reason}


def content(*rows: dict[str, Any], kind: str = "cpu", device: str = "Abacus (2 threads)") -> dict[str, Any]:
    return {"device": device, "kind": kind, "versions": {"torch": "2.0"}, "absent": ["apex"], "rows": list(rows)}


def case(key: Key, ours: float, **peers: float) -> list[dict[str, Any]]:
    return [row(key, OURS, ours), *(row(key, lane, seconds) for lane, seconds in peers.items())]


def swept(power: float, sizes: tuple[int, ...] = (64, 256, 1024)) -> list[dict[str, Any]]:
    """Blocks whose time is tokens^power milliseconds for us, and twice that for timm, which does not bear the last."""
    rows = []
    for size in sizes:
        key = Key("block", "block", f"B=1 N={size} D=384 H=6", "float32", "forward + backward", "tokens", size)
        rows.append(row(key, OURS, size**power / 1e3))
        broken = failed(key, "timm", "OutOfMemoryError: no more")
        rows.append(broken if size == sizes[-1] else row(key, "timm", 2 * size**power / 1e3))
    return rows
