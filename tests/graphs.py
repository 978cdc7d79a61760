"""A case in a CUDA graph: captured once, replayed on other numbers."""

from __future__ import annotations

import torch
from case import Case
from torch import Tensor

import vitkernels as vk


def check_replay(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Nothing synchronises, nothing is baked in: what is replayed is what the same calls give eagerly."""
    tensors, others = case.build(dtype, "cuda"), case.build(dtype, "cuda", seed=7)
    leaves = [tensor for tensor in tensors.values() if tensor is not None and tensor.requires_grad]
    gradients = case.build_gradients(case.call(tensors))

    def step() -> list[Tensor]:
        with vk.use(backend):
            outputs = case.call(tensors)
            roots = [outputs[name] for name in gradients]
            grads = torch.autograd.grad(roots, leaves, list(gradients.values()), allow_unused=True)
        return [tensor for tensor in (*outputs.values(), *grads) if tensor is not None]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(
            2
        ):  # the first call is taped, later ones replay: what loads a kernel must not come while capturing
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor is not None:
                tensor.copy_(others[name])
    graph.replay()
    torch.cuda.synchronize()
    for replayed, eager in zip(captured, step(), strict=True):
        torch.testing.assert_close(replayed, eager)
