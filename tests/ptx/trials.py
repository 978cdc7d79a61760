"""What runs on the machine: cases of the one list, for a GPU and a dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from case import Case
from cases import (
    CASES,
    add_layer_norm,
    add_rms_norm,
    attention,
    attention_qkv,
    attention_rel_pos_qkv,
    attention_varlen_qkv,
    glu_mlp,
    linear,
    mlp,
    patch_embed,
    rotary,
    rotary_qkv,
)
from not_on_cuda import why_not_on

from ptx import cuda
from ptx.call import Call, Record

CAPABILITIES = ((9, 0), (8, 0), (8, 9), (8, 6))
CUDA_CAPABILITIES = ((8, 0), (7, 5), (9, 0), (8, 6), (8, 9))
BACKENDS = ("triton", "cuda")  # whose kernels: Triton's, and the extension's CUDA C++
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# ops whose launches ask for multiprocessors
PERSISTENT = ("linear", "mlp", "glu_mlp", "add_layer_norm", "add_rms_norm", "patch_embed")

HEADS = ("attention", "attention_qkv")  # few heads for the multiprocessors go to the long kernels

# launches of real models: tiles and loops that small cases do not reach
_AUTOCAST = {"image": {"dtype": F32}, "table": F32, "dtypes": (BF16, F16)}
REAL = [
    attention("ViT, 50 queries of 197 keys", 2, 12, 50, 197, 64),
    attention_qkv("ViT-S", 2, 6, 197, 64),
    attention_qkv("ViT-B", 2, 12, 197, 64),
    attention_qkv("so400m", 2, 16, 256, 72),
    attention_qkv("text, causal", 2, 8, 77, 64, causal=True),
    attention_qkv("DINOv2", 1, 6, 1370, 64),
    attention_rel_pos_qkv("SAM, windows", 2, 12, (14, 14), 64),
    attention_rel_pos_qkv("SAM, an image", 1, 2, (32, 32), 64),
    attention_varlen_qkv("images of three sizes", (256, 100, 576), 4, 72),
    add_layer_norm("ViT-B", (2, 197, 768)),
    add_layer_norm("ViT-S, autocast", (2, 197, 384), x=F32, parameters=F32, dtypes=(BF16, F16)),
    add_layer_norm("so400m", (2, 256, 1152)),
    add_layer_norm("DiT-B", (2, 256, 768), vectors=("bias", "scale"), by_sample=("weight", "scale")),
    add_rms_norm("Qwen-VL", (2, 256, 1280), vectors=()),
    rotary("DINOv3", (2, 12, 201, 64), prefix=5, half=True, layout="packed"),
    rotary("EVA-02", (2, 12, 197, 64), prefix=1, layout="packed"),
    rotary_qkv("images of three sizes", (932, 3, 4, 72), norm="rms_norm", vectors=("q_weight", "k_weight")),
    patch_embed("ViT-S", 16, (14, 14), width=384, prefix=1, pos_embed=197),
    patch_embed("ViT-B", 16, (14, 14), width=768, prefix=1, pos_embed=197),
    patch_embed("ViT-B, autocast", 16, (14, 14), width=768, prefix=1, pos_embed=197, **_AUTOCAST),
    patch_embed("DINOv2, autocast", 14, (16, 16), width=384, prefix=1, pos_embed=257, **_AUTOCAST),
    patch_embed("so400m", 14, (16, 16), width=1152, pos_embed=256),
    linear("ViT-B", (2, 197), 768, 2304),
    mlp("ViT-S, one image", (1, 197), (384, 1536, 384)),
    mlp("ViT-B", (2, 197), (768, 3072, 768)),
    mlp("so400m", (1, 256), (1152, 4304, 1152)),
    glu_mlp("Qwen-VL", (1, 256), (1280, 3420, 1280)),
]


@dataclass(frozen=True)
class Trial:
    """A case for a GPU that is not there."""

    case: Case
    dtype: torch.dtype
    capability: tuple[int, int] = (9, 0)
    processors: int = 1
    backend: str = "triton"

    def __str__(self) -> str:
        gpu, dtype = name_of(self.capability, self.backend), str(self.dtype).removeprefix("torch.")
        return f"{gpu} x{self.processors} {dtype} {self.case}"

    def launching(self, take: Callable[[Call, Record], None]) -> contextlib.AbstractContextManager[Record]:
        """Let the package believe in the GPU, and `take` have every launch."""
        return launching(self.backend, self.capability, self.processors, take)


def name_of(capability: tuple[int, int], backend: str) -> str:
    """Such as "sm_90", or "cuda sm_90" for CUDA C++."""
    gpu = f"sm_{capability[0]}{capability[1]}"
    return gpu if backend == "triton" else f"{backend} {gpu}"


def in_package(backend: str) -> str:
    """The package's own name for a backend, as `vk.use` has it."""
    return {"triton": "triton", "cuda": "ext"}[backend]


def launching(
    backend: str, capability: tuple[int, int], processors: int, take: Callable[[Call, Record], None]
) -> contextlib.AbstractContextManager[Record]:
    """Let the package believe in a GPU inside the block, and `take` have every launch of a backend's."""
    if backend == "cuda":
        return cuda.activate(capability, processors, architecture=10 * capability[0] + capability[1], take=take)
    from ptx import driver  # needs triton, without which CUDA C++ is run too

    return driver.activate(driver.Gpu(capability, processors), driver.taking(take))


def _on(
    cases: list[Case], dtypes: tuple[torch.dtype, ...], capability: tuple[int, int], spread: tuple[str, ...] = HEADS
) -> Iterator[Trial]:
    """Each case in each of its dtypes; with 1 and with 132 multiprocessors in persistent ops and those of `spread`."""
    for case in cases:
        for dtype in dtypes:
            if dtype in case.dtypes:
                for processors in (1, 132) if case.op in (*PERSISTENT, *spread) else (1,):
                    yield Trial(case, dtype, capability, processors)


def _on_cuda(cases: list[Case], dtypes: tuple[torch.dtype, ...], capability: tuple[int, int]) -> Iterator[Trial]:
    """The same for CUDA C++, of what it serves there; its norms alone ask for multiprocessors."""
    for case in cases:
        for dtype in dtypes:
            if dtype in case.dtypes and why_not_on(capability, case, dtype) is None:
                for processors in (1, 132) if "norm" in case.op else (1,):
                    yield Trial(case, dtype, capability, processors, "cuda")


def named(*names: str) -> list[Case]:
    """Cases of the list by op and name, in the list's order."""
    found = [case for case in CASES if str(case) in names]
    assert len(found) == len(names), set(names) - {str(case) for case in found}
    return found


FEW = named(
    "linear: blocked gemm",
    "patch_embed: uint8, mean and std",
    "attention: key padding, cross",
    "attention: relative position bias",
    "attention_qkv: head width 72",
    "attention_qkv: causal",
    "add_layer_norm: 197 tokens",
    "add_layer_norm: width 768",
    "add_layer_norm: adaptive, many rows",
    "add_rms_norm: width 768",
    "mlp: gelu, blocked gemm",
    "glu_mlp: silu, blocked gemm",
    "attention_rel_pos: a smaller image of keys",
    "attention_varlen: grouped keys, causal, cross",
    "attention_varlen: packed, head width 72",
    "rotary: head width 64, halves",
    "rotary_qkv: LayerNorm, halves",
)


def everything(backend: str) -> list[Trial]:
    """What `make emulate` runs: every case in every dtype on every capability, real models last."""
    trials: list[Trial] = []
    if backend == "cuda":
        for capability in CUDA_CAPABILITIES:
            trials += _on_cuda(CASES, (BF16, F16, F32), capability)
        for capability in CUDA_CAPABILITIES:
            trials += _on_cuda(REAL, (BF16, F16) if capability == (8, 0) else (BF16,), capability)
        return trials
    for dtypes in ((BF16, F16), (F32,)):
        for capability in CAPABILITIES:
            trials += _on(CASES, dtypes, capability)
    trials += _on(FEW, (BF16, F16), (12, 0))
    for capability in CAPABILITIES:
        trials += _on(REAL, (BF16, F16) if capability == (9, 0) else (BF16,), capability)
    return trials
