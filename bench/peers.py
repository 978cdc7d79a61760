"""Each op as others compute it: plain torch, torch.compile, every SDPA backend, and other people's kernels.

A peer takes the op's arguments by name and returns its results. Packages are imported when a peer runs; those that are
not installed are listed in the report and have no rows.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[..., Tensor | tuple[Tensor, ...]]
EPS = 1e-6


@dataclass(frozen=True)
class Peer:
    """How someone else computes an op."""

    op: str
    name: str
    call: Call
    package: str | None = None  # what it needs, beside torch
    cuda_only: bool = False
    compiled: bool = False  # also through torch.compile


PEERS: list[Peer] = []


def peer(op: str, name: str, **more: Any) -> Callable[[Call], Call]:
    def add(call: Call) -> Call:
        PEERS.append(Peer(op, name, call, **more))
        return call

    return add


def absent() -> list[str]:
    """Packages with peers that are not installed here."""
    packages = {each.package for each in PEERS if each.package} | {"timm", "torchvision", "transformers"}
    return sorted(package for package in packages if importlib.util.find_spec(package) is None)


def builders(op: str, device: torch.device, autotune: bool = True) -> dict[str, Callable[[], Call]]:
    """An op's peers that can be tried on a device, by lane: each makes the function that is called."""
    found: dict[str, Callable[[], Call]] = {}
    missing = absent()
    for each in PEERS:
        if each.op != op or each.package in missing or (each.cuda_only and device.type != "cuda"):
            continue
        found[each.name] = functools.partial(_plain, each.call)
        if each.compiled:
            found[f"{each.name}, compiled"] = functools.partial(compile_it, each.call)
            if autotune and device.type == "cuda":
                found[f"{each.name}, max-autotune"] = functools.partial(compile_it, each.call, "max-autotune")
    return found


def _plain(call: Call) -> Call:
    return call


def compile_it(call: Any, mode: str | None = None) -> Any:
    """torch.compile that must compile the whole."""
    return torch.compile(call, fullgraph=True, dynamic=False, mode=mode)


# ------------------------------------------------------------------------------------------------------------- linear


@peer("linear", "eager")
def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


@peer("linear", "transformer-engine", package="transformer_engine", cuda_only=True)
def _te_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    import transformer_engine.pytorch as te

    module = te.Linear(weight.shape[1], weight.shape[0], params_dtype=weight.dtype, device="meta")
    return torch.func.functional_call(module, {"weight": weight, "bias": bias}, x)


# -------------------------------------------------------------------------------------------------------- patch_embed


@peer("patch_embed", "conv2d", compiled=True)
def _conv2d(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(image, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


@peer("patch_embed", "unfold")
def _unfold(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    patch = tuple(weight.shape[2:])
    return F.linear(F.unfold(image, patch, stride=patch).transpose(1, 2), weight.flatten(1), bias)


# ---------------------------------------------------------------------------------------------------------- attention


def _split(qkv: Tensor, heads: int) -> Tensor:
    """[B, N, 3 * D] -> [B, N, 3, H, K]."""
    return qkv.unflatten(-1, (3, heads, -1))


@peer("attention_qkv", "sdpa")
def _sdpa(qkv: Tensor, num_heads: int) -> Tensor:
    q, k, v = _split(qkv, num_heads).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _backend(name: str, backend: SDPBackend, cuda_only: bool = False) -> None:
    @peer("attention_qkv", f"sdpa {name}", cuda_only=cuda_only)
    def _forced(qkv: Tensor, num_heads: int) -> Tensor | tuple[Tensor, ...]:
        with sdpa_kernel(backend):
            return _sdpa(qkv, num_heads)


_backend("math", SDPBackend.MATH)
_backend("flash", SDPBackend.FLASH_ATTENTION)
_backend("efficient", SDPBackend.EFFICIENT_ATTENTION, cuda_only=True)
_backend("cudnn", SDPBackend.CUDNN_ATTENTION, cuda_only=True)


@peer("attention_qkv", "flash-attn", package="flash_attn", cuda_only=True)
def _flash_attn(qkv: Tensor, num_heads: int) -> Tensor:
    from flash_attn import flash_attn_qkvpacked_func

    return flash_attn_qkvpacked_func(_split(qkv, num_heads)).flatten(2)


@peer("attention_qkv", "xformers", package="xformers", cuda_only=True)
def _xformers(qkv: Tensor, num_heads: int) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*_split(qkv, num_heads).unbind(2)).flatten(2)


@peer("attention_qkv", "transformer-engine", package="transformer_engine", cuda_only=True)
def _te_attention(qkv: Tensor, num_heads: int) -> Tensor:
    import transformer_engine.pytorch as te

    q, k, v = _split(qkv, num_heads).unbind(2)
    module = te.DotProductAttention(num_heads, q.shape[-1], attn_mask_type="no_mask", qkv_format="bshd")
    return module(q, k, v)


# -------------------------------------------------------------------------------------------------- attention_rel_pos


@peer("attention_rel_pos", "sdpa")
def _sdpa_biased(qkv: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """With the bias of all queries and keys as a mask, as SAM has it."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    bias = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2)


# --------------------------------------------------------------------------------------------------- attention_varlen


@peer("attention_varlen", "sdpa, one by one")
def _one_by_one(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Each sequence by itself, as models do without a kernel for all."""
    parts = qkv.split(cu_seqlens.diff().tolist())
    return torch.cat([_sdpa(part.flatten(1)[None], part.shape[2])[0] for part in parts]).unflatten(1, qkv.shape[2:])


@peer("attention_varlen", "sdpa, padded")
def _padded(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """A batch of the longest, with a mask of keys; packing and unpacking count."""
    taken = torch.arange(max_seqlen, device=qkv.device) < cu_seqlens.diff()[:, None]
    padded = qkv.new_zeros(*taken.shape, *qkv.shape[1:]).masked_scatter(taken[:, :, None, None, None], qkv)
    q, k, v = padded.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, taken[:, None, None]).transpose(1, 2)[taken]


@peer("attention_varlen", "flash-attn", package="flash_attn", cuda_only=True)
def _flash_varlen(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from flash_attn import flash_attn_varlen_qkvpacked_func

    return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen)


@peer("attention_varlen", "torch varlen_attn", cuda_only=True)
def _torch_varlen(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)


@peer("attention_varlen", "xformers", package="xformers", cuda_only=True)
def _xformers_varlen(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(cu_seqlens.diff().tolist())
    return memory_efficient_attention(*(each[None] for each in qkv.unbind(1)), attn_bias=mask)[0]


# ------------------------------------------------------------------------------------------------------------- rotary


@peer("rotary", "eager", compiled=True)
def _rotary(x: Tensor, sin: Tensor, cos: Tensor, prefix: int, half: bool) -> Tensor:
    """Pairs of neighbours, without a prefix, as the case has them."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return (x * cos + turned * sin).to(x.dtype)


@peer("rotary_qkv", "eager", compiled=True)
def _rotary_qkv(
    qkv: Tensor, sin: Tensor, cos: Tensor, q_weight: Tensor, k_weight: Tensor, prefix: int, half: bool, norm: str,
    eps: float,
) -> Tensor:  # fmt: skip
    """RMSNorm, then pairs of halves, without a prefix, as the case has them."""
    q, k, v = qkv.unbind(2)
    turned = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        normed = F.rms_norm(x, weight.shape, weight, eps)
        first, second = normed.chunk(2, -1)
        turned.append((normed * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]).to(x.dtype))
    return torch.stack([*turned, v], 2)


# ----------------------------------------------------------------------------------------------------- add_layer_norm


@peer("add_layer_norm", "eager", compiled=True)
def _add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + branch
    return total, F.layer_norm(total, weight.shape, weight, bias, EPS)


@peer("add_layer_norm", "apex", package="apex", cuda_only=True)
def _apex(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    total = x + branch
    return total, fused_layer_norm_affine(total, weight, bias, weight.shape, EPS)


@peer("add_layer_norm", "liger", package="liger_kernel", cuda_only=True)
def _liger(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers.functional import liger_layer_norm

    total = x + branch
    return total, liger_layer_norm(total, weight, bias, EPS)


@peer("add_layer_norm", "flash-attn", package="flash_attn", cuda_only=True)
def _flash_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    normed, total = layer_norm_fn(branch, weight, bias, residual=x, eps=EPS, prenorm=True)
    return total, normed


@peer("add_layer_norm", "quack", package="quack", cuda_only=True)
def _quack(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from quack.rmsnorm import layernorm_fwd  # it has no backward

    total = x + branch
    rows = layernorm_fwd(total.flatten(0, -2), weight.float(), bias.float(), eps=EPS)
    return total, rows.view_as(total)


@peer("add_layer_norm", "transformer-engine", package="transformer_engine", cuda_only=True)
def _te_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    import transformer_engine.pytorch as te

    total = x + branch
    module = te.LayerNorm(weight.shape[0], eps=EPS, device="meta")
    return total, torch.func.functional_call(module, {"weight": weight, "bias": bias}, total)


# ------------------------------------------------------------------------------------------------------- add_rms_norm


@peer("add_rms_norm", "eager", compiled=True)
def _add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + branch
    return total, F.rms_norm(total, weight.shape, weight, EPS)


@peer("add_rms_norm", "apex", package="apex", cuda_only=True)
def _apex_rms(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    total = x + branch
    return total, fused_rms_norm_affine(total, weight, weight.shape, EPS)


@peer("add_rms_norm", "liger", package="liger_kernel", cuda_only=True)
def _liger_rms(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    total = x + branch
    return total, LigerRMSNormFunction.apply(total, weight, EPS, 0.0, "llama", False)  # not in place


@peer("add_rms_norm", "flash-attn", package="flash_attn", cuda_only=True)
def _flash_rms(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    normed, total = rms_norm_fn(branch, weight, None, residual=x, eps=EPS, prenorm=True)
    return total, normed


@peer("add_rms_norm", "quack", package="quack", cuda_only=True)
def _quack_rms(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from quack import rmsnorm

    normed, total = rmsnorm(branch, weight.float(), residual=x, eps=EPS, prenorm=True)
    return total, normed


@peer("add_rms_norm", "transformer-engine", package="transformer_engine", cuda_only=True)
def _te_rms(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    import transformer_engine.pytorch as te

    total = x + branch
    module = te.RMSNorm(weight.shape[0], eps=EPS, device="meta")
    return total, torch.func.functional_call(module, {"weight": weight}, total)


# ---------------------------------------------------------------------------------------------------------------- mlp


@peer("mlp", "eager", compiled=True)
def _mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


@peer("mlp", "apex", package="apex", cuda_only=True)
def _apex_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    from apex.fused_dense import fused_dense_gelu_dense_function

    rows = fused_dense_gelu_dense_function(x.flatten(0, -2), w1, b1, w2, b2)
    return rows.unflatten(0, x.shape[:-1])


# ------------------------------------------------------------------------------------------------------------ glu_mlp


@peer("glu_mlp", "eager", compiled=True)
def _glu_mlp(x: Tensor, w_gate_up: Tensor, b_gate_up: Tensor, w_down: Tensor, b_down: Tensor) -> Tensor:
    gate, up = F.linear(x, w_gate_up, b_gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w_down, b_down)


@peer("glu_mlp", "liger", package="liger_kernel", cuda_only=True)
def _liger_glu(x: Tensor, w_gate_up: Tensor, b_gate_up: Tensor, w_down: Tensor, b_down: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up = F.linear(x, w_gate_up, b_gate_up).chunk(2, dim=-1)
    return F.linear(LigerSiLUMulFunction.apply(gate, up), w_down, b_down)
