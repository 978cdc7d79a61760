"""glu_mlp beyond the case list: projections apart, and what is kept for the backward pass."""

from __future__ import annotations

import torch
from cases import glu_mlp

import vitkernels as vk


def test_projections_apart_are_those_packed(backend: str) -> None:
    case = glu_mlp("apart", (2, 5), (16, 24, 8))
    tensors = case.build(torch.float32)
    apart = {
        name: tuple(half.detach().clone().requires_grad_() for half in tensors[name].chunk(2))
        for name in ("w_gate_up", "b_gate_up")
    }
    with vk.use(backend), vk.record() as calls:
        packed, split = (case.call({**tensors, **given})["out"] for given in ({}, apart))
        packed.square().sum().backward()
        split.square().sum().backward()
    assert [(call.op, call.backend) for call in calls] == [("glu_mlp", backend)] * 4
    assert torch.equal(split, packed)
    for name, halves in apart.items():
        assert torch.equal(torch.cat([half.grad for half in halves]), tensors[name].grad), name


def test_the_pre_activations_alone_are_kept(backend: str) -> None:
    tensors = glu_mlp("kept").build(torch.float32)
    kept: list[torch.Tensor] = []
    with vk.use(backend), torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda x: x):
        vk.ops.glu_mlp(**tensors)
    arguments = {each.data_ptr() for each in tensors.values()}
    assert [list(each.shape) for each in kept if each.data_ptr() not in arguments] == [[2, 5, 48]]
