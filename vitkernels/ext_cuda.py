"""The extension's CUDA half, `vitkernels._cuda`: whether it is there, for which GPUs, and what it leaves to others.

It is built from csrc/cuda where torch has CUDA and a CUDA toolkit is found, and serves NVIDIA GPUs where Triton cannot.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any, Protocol

import torch

LOWEST_CAPABILITY = (7, 5)
ATTENTION = ("attention", "attention_qkv", "attention_rel_pos", "attention_varlen")
WIDEST_HEAD, WIDEST_TURING_HEAD = 128, 104  # csrc/cuda/attention.h, attention_f32.cu
FEWEST_TOKENS, MOST_BLOCKS = 32, 2**31 - 1  # of a block of attention, of a launch
FEWEST_OF_IMAGE = 8  # the same of keys that are an image: csrc/cuda/attention.h, ImageTiles
MOST_TOKENS = 2**31 - 256  # of attention, which counts them in 32 bits to the end of a tile
NORMS = ("add_layer_norm", "add_rms_norm")
MOST_COLUMNS, MOST_SAMPLES = 6144, 65535  # of a norm, and with weights of their own: csrc/cuda/add_layer_norm.cu
WIDEST_ROTARY_HEAD = 256  # csrc/cuda/rotary_qkv.cu
MOST_CHANNELS = 64  # that patch_embed normalises: csrc/cuda/patch_embed.cuh
PRODUCTS = ("linear", "mlp", "glu_mlp", "patch_embed")  # ops that multiply matrices


class Gpu(Protocol):
    """What the extension asks of the devices that its CUDA kernels run on.

    Attributes:
        kind: the torch device type of the tensors that its kernels take.
    """

    @property
    def kind(self) -> str: ...

    def why_not(self) -> str | None:
        """A sentence that says why no kernel can run on one in this process, or None."""

    def capability(self, device: torch.device) -> tuple[int, int]:
        """Compute capability of one of them."""

    def serves(self, capability: tuple[int, int]) -> bool:
        """Whether the module holds code for such a one."""

    def launcher(self, name: str) -> Callable[..., Any] | None:
        """What launches an op of that name; None for the extension's own, which goes by the tensors' device."""


class Cuda:
    """The NVIDIA GPUs that torch sees."""

    kind = "cuda"

    @functools.cache  # noqa: B019  # one object for the life of the process
    def why_not(self) -> str | None:
        try:
            self._targets()
        except ImportError as error:
            if torch.version.cuda is None:
                return "torch was built without CUDA"
            if isinstance(error, ModuleNotFoundError):
                return "it was not built; with a CUDA toolkit there: pip install -e ."
            return f"vitkernels._cuda did not load ({error})"
        return None if torch.cuda.is_available() else "torch sees no CUDA device"

    @functools.cache  # noqa: B019
    def _targets(self) -> tuple[str, ...]:
        """What the module was built for: "sm_80", "compute_90"."""
        return tuple(re.findall(r"(?:sm|compute)_\d+", importlib.import_module("vitkernels._cuda").TARGETS))

    @functools.cache  # noqa: B019
    def capability(self, device: torch.device) -> tuple[int, int]:
        return torch.cuda.get_device_capability(device)

    @functools.cache  # noqa: B019
    def serves(self, capability: tuple[int, int]) -> bool:
        return any(_runs_on(target, capability) for target in self._targets())

    def launcher(self, name: str) -> None:
        return None

    def describe(self) -> str:
        """What it was built for, or why it is not there."""
        reason = self.why_not()
        return f"CUDA C++ is not there: {reason}" if reason else f"CUDA C++ for {', '.join(self._targets())}"


def _runs_on(target: str, capability: tuple[int, int]) -> bool:
    """sm_80 runs on 8.0 to 8.9; compute_80 is compiled by the driver for 8.0 and all later ones."""
    kind, number = target.split("_")
    built = divmod(int(number), 10)
    return capability >= built and (kind == "compute" or capability[0] == built[0])


def why_not_call(gpu: Gpu, op: str, call: Any) -> str | None:
    """A sentence that says why the CUDA kernels cannot serve a call, or None."""
    reason = gpu.why_not()
    if reason is not None:
        return f"the extension has no CUDA kernels here: {reason}"
    tensors = [arg for arg in call if isinstance(arg, torch.Tensor)]
    device = tensors[0].device
    major, minor = capability = gpu.capability(device)
    if capability < LOWEST_CAPABILITY:
        return f"the CUDA C++ kernels need compute capability 7.5 or later, and {device} has {major}.{minor}"
    if not gpu.serves(capability):
        return f"the CUDA C++ kernels were not built for compute capability {major}.{minor} of {device}"
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "the CUDA C++ kernels have no float64"
    if op in ATTENTION:
        return _why_not_attention(call, capability)
    if op in PRODUCTS and capability < (8, 0) and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return f"bfloat16 products need compute capability 8.0 or later, and {device} has {major}.{minor}"
    if op == "patch_embed" and (reason := _why_not_channels(call)):
        return reason
    if op in NORMS and (reason := _why_not_norm(call)):
        return reason
    if op == "rotary_qkv" and (width := tensors[0].shape[-1]) > WIDEST_ROTARY_HEAD:
        return f"the CUDA C++ kernels turn heads up to {WIDEST_ROTARY_HEAD} wide, and these are {width}"
    return None


def _why_not_norm(call: Any) -> str | None:
    shape = (call.x if "x" in call._fields else call.total).shape
    samples, width = shape[0], shape[-1]
    by_sample = any(each is not None and each.dim() == 2 for each in (call.weight, call.scale))
    if by_sample and samples > MOST_SAMPLES:
        return f"the CUDA C++ kernels take weights or scales of up to {MOST_SAMPLES} samples; got {samples}"
    if width > MOST_COLUMNS:
        return f"the CUDA C++ kernels take rows of up to {MOST_COLUMNS} columns; got {width}"
    return None


def _why_not_attention(call: Any, capability: tuple[int, int]) -> str | None:
    fewest = FEWEST_TOKENS
    if "qkv" in call._fields:
        first, heads = call.qkv, call.num_heads
        batch, tokens, width = first.shape[0], first.shape[1], first.shape[2] // (3 * heads)
    elif "cu_seqlens_q" in call._fields:
        first, batch = call.q, call.cu_seqlens_q.shape[0] - 1
        (heads, width), tokens = first.shape[-2:], max(call.max_seqlen_q, call.max_seqlen_k)
    elif "rel_h" in call._fields:
        first, fewest = call.q, FEWEST_OF_IMAGE
        batch, heads, queries, rows = call.rel_h.shape
        width, tokens = first.shape[-1], max(queries, rows * call.rel_w.shape[3])
    else:
        first, (batch, heads, tokens, width) = call.q, call.q.shape
        tokens = max(tokens, call.k.shape[2])
    if width > WIDEST_HEAD:
        return f"the CUDA C++ kernels take heads up to {WIDEST_HEAD} wide, and these are {width}"
    if tokens > MOST_TOKENS:
        return f"the CUDA C++ kernels take up to {MOST_TOKENS} tokens; got {tokens}"
    sequences = batch * heads
    if sequences * -(-tokens // fewest) > MOST_BLOCKS:
        return f"the CUDA C++ kernels take up to {MOST_BLOCKS} tiles of tokens; {sequences} x {tokens} tokens are more"
    if capability >= (8, 0):
        return None
    has = f"{first.device} has {capability[0]}.{capability[1]}"
    if first.dtype != torch.float32:
        return f"attention in {first.dtype} needs compute capability 8.0 or later, and {has}"
    if width > WIDEST_TURING_HEAD:
        return f"attention of heads over {WIDEST_TURING_HEAD} wide needs compute capability 8.0 or later, and {has}"
    return None


def _why_not_channels(call: Any) -> str | None:
    channels = call.image.shape[1]
    normalises = call.image.dtype == torch.uint8 or call.mean is not None or call.std is not None
    if normalises and channels > MOST_CHANNELS:
        return f"the CUDA C++ kernels normalise up to {MOST_CHANNELS} channels; got {channels}"
    return None
