"""What only a GPU can show of the Triton kernels: repeatable bits, graphs, streams, devices, compiled models, sizes.

Accuracy on the case list is `test_triton.py`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accuracy import check_case, run
from case import Case
from cases import (
    IMAGENET,
    SMALL,
    UINT8,
    add_layer_norm,
    add_rms_norm,
    attention,
    attention_qkv,
    glu_mlp,
    linear,
    mlp,
    patch_embed,
    rotary,
)
from torch import Tensor

import vitkernels as vk
from vitkernels import dispatch

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)
if dispatch.why_not("triton") is not None:
    pytest.skip(f"triton: {dispatch.why_not('triton')}", allow_module_level=True)

BF16 = torch.bfloat16
VIT_B = attention_qkv("ViT-B", 26, 12, 197, 64)
_VIT_B_PATCHES: dict[str, Any] = {"width": 768, "prefix": 1, "pos_embed": 197}
# tokens, widths and heads of ViT-B and ViT-S, in small batches: the tiles that training runs. Heads are two or more for
# each of 148 multiprocessors where the short kernels are meant, fewer where small batches are.
REAL = [
    linear("ViT-B", (2, 197), 768, 2304),
    patch_embed("ViT-B", 16, (14, 14), **_VIT_B_PATCHES),
    patch_embed("ViT-B, float32 image", 16, (14, 14), **_VIT_B_PATCHES, image={"dtype": torch.float32}),
    patch_embed("ViT-B, uint8 image", 16, (14, 14), **_VIT_B_PATCHES, image=UINT8, **IMAGENET),
    patch_embed("ViT-B, float32 table", 16, (14, 14), **_VIT_B_PATCHES, table=torch.float32),
    patch_embed("ViT-B, autocast", 16, (14, 14), **_VIT_B_PATCHES, image={"dtype": torch.float32}, table=torch.float32),
    attention("cross", 26, 12, 50, 197, 64),
    VIT_B,
    attention_qkv("ViT-B, a small batch", 2, 12, 197, 64),
    attention_qkv("so400m", 20, 16, 256, 72),
    attention_qkv("text", 38, 8, 77, 64, causal=True),
    attention_qkv("dinov2", 1, 6, 1370, 64),
    add_layer_norm("ViT-B", (2, 197, 768)),
    add_layer_norm("ViT-S", (2, 197, 384), x=torch.float32, parameters=torch.float32),
    add_layer_norm("DiT-B", (4, 256, 768), vectors=("bias", "scale"), by_sample=("weight", "scale")),
    add_rms_norm("Qwen-VL", (2, 256, 1280), vectors=()),
    mlp("ViT-B", (16, 197), (768, 3072, 768)),
    glu_mlp("Qwen-VL", (16, 256), (1280, 3420, 1280)),
    rotary("dinov3", (2, 12, 201, 64), prefix=5, half=True, layout="packed"),
    rotary("eva02", (2, 12, 197, 64), prefix=1, layout="packed"),
]


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()
    torch.compiler.reset()


def _leaves(case: Case, seed: int = 0) -> dict[str, Tensor | None]:
    return case.build(BF16, "cuda", seed)


def _same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


@pytest.mark.parametrize("case", REAL, ids=str)
def test_accuracy_at_real_sizes(case: Case) -> None:
    check_case(case, BF16, "triton", device="cuda")


@pytest.mark.parametrize(("forward", "backward"), list(itertools.permutations(("triton", "reference"))))
@pytest.mark.parametrize("case", [*SMALL, VIT_B], ids=str)
def test_backward_after_another_backends_forward(case: Case, forward: str, backward: str) -> None:
    check_case(case, BF16, forward, backward, device="cuda")


@pytest.mark.parametrize("case", REAL, ids=str)
def test_twenty_runs_give_the_same_bits(case: Case) -> None:
    tensors = _leaves(case)
    first = run(case, tensors, forward="triton")
    for _ in range(20):
        assert _same_bits(first, run(case, tensors, forward="triton"))


@pytest.mark.parametrize("case", REAL, ids=str)
def test_chosen_by_default(case: Case) -> None:
    with vk.record() as calls:
        case.call(_leaves(case))
    assert [call.backend for call in calls] == ["triton"]


@pytest.mark.parametrize("case", REAL, ids=str)
def test_cuda_graph(case: Case) -> None:
    """Captured once, replayed on other numbers: nothing synchronises, nothing is baked in."""
    tensors, others = _leaves(case), _leaves(case, seed=7)
    leaves = [tensor for tensor in tensors.values() if tensor is not None and tensor.requires_grad]
    gradients = case.build_gradients(case.call(tensors))

    def step() -> list[Tensor]:
        with vk.use("triton"):
            outputs = case.call(tensors)
            roots = [outputs[name] for name in gradients]
            grads = torch.autograd.grad(roots, leaves, list(gradients.values()), allow_unused=True)
        return [tensor for tensor in (*outputs.values(), *grads) if tensor is not None]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
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


@pytest.mark.parametrize("case", REAL, ids=str)
def test_two_streams(case: Case) -> None:
    """Two calls at once on streams of their own do what each does alone."""
    inputs = [_leaves(case, seed) for seed in (0, 7)]
    alone = [run(case, tensors, forward="triton") for tensors in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    together: list[dict[str, Tensor]] = []
    for tensors, stream in zip(inputs, streams, strict=True):
        with torch.cuda.stream(stream):
            together.append(run(case, tensors, forward="triton"))
    torch.cuda.synchronize()
    assert all(_same_bits(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_another_device_than_the_current_one(case: Case) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device; needs two")
    check_case(case, BF16, "triton", device="cuda:1")
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_compiled(case: Case) -> None:
    tensors = _leaves(case)

    def function() -> Tensor:
        return torch.stack([output.float().square().sum() for output in case.call(tensors).values()]).sum()

    with vk.record() as calls:
        got = torch.compile(function, fullgraph=True, backend="aot_eager")()
        got.backward()
    assert {call.backend for call in calls} == {"triton"}
    torch.testing.assert_close(got, function())


def test_a_model_trains_in_bf16() -> None:
    """Two steps of a small ViT under autocast, compiled and not: the same losses within bf16."""

    def losses(compiled: bool) -> list[float]:
        torch.manual_seed(0)
        model = vk.nn.VisionTransformer(img_size=64, patch_size=16, embed_dim=192, depth=2, num_heads=3, num_classes=10)
        model = model.cuda()
        step: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        images, labels = torch.randn(8, 3, 64, 64, device="cuda"), torch.arange(8, device="cuda")
        found = []
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(step(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses(True) == pytest.approx(losses(False), rel=0.02)


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("autocast", [True, False], ids=["bf16", "float32"])
def test_a_fused_encoder_has_its_own_numbers(autocast: bool, norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        192, 3, 768, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    )
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).cuda()
    tokens, weights = torch.randn(2, 4, 197, 192, device="cuda")

    def run_once() -> dict[str, Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            output = model(tokens)
        grads = torch.autograd.grad((output.float() * weights).sum(), list(model.parameters()))
        return {"output": output, **dict(zip((name for name, _ in model.named_parameters()), grads, strict=True))}

    own = run_once()
    assert vk.explain(vk.fuse(model)).summary == "2 of 2 blocks fused"
    with vk.record() as calls:
        got = run_once()
    assert {call.backend for call in calls} == {"triton"}
    for name, tensor in own.items():
        error = (got[name].float() - tensor.float()).norm() / tensor.float().norm()
        assert error < (0.03 if autocast else 1e-3), f"{name}: {error:.2g}"
    assert vk.verify(model, tokens).ok


# ------------------------------------------------------------------------------------------------------- more than 2^31


# 48 GiB each: one worker runs them, one after the other (pytest-xdist, --dist loadgroup)
@pytest.mark.xdist_group("more than 2^31")
@pytest.mark.parametrize(
    ("case", "axis"),
    [
        (add_layer_norm("2^31 elements", (2**11 + 1, 2**10, 2**10), vectors=("bias",)), "x"),
        (attention_qkv("2^31 elements", 4800, 12, 197, 64), "qkv"),
        (mlp("2^31 elements", (2**11 + 8, 2**10), (64, 2**10, 64)), "x"),
        (linear("2^31 elements", (2**11 + 8, 2**10), 64, 2**10), "x"),
    ],
    ids=str,
)
def test_more_than_2_31_elements(case: Case, axis: str) -> None:
    """The last samples of a batch past what 32 bits can index are what they are in a batch of their own."""
    needed = 48 * 2**30
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"{free / 2**30:.0f} GiB of memory free; needs {needed / 2**30:.0f}")
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = {
        name: torch.randn(spec.shape, generator=generator, device="cuda", dtype=BF16).mul_(spec.gain)
        for name, spec in case.tensors.items()
        if spec is not None
    }
    batched = [
        name for name, tensor in tensors.items() if tensor.shape[0] == tensors[axis].shape[0] and tensor.dim() > 2
    ]

    def gradients_of_last(rows: slice) -> list[Tensor]:
        part = {
            name: (tensor[rows] if name in batched else tensor).detach().requires_grad_(name in batched)
            for name, tensor in tensors.items()
        }
        with vk.use("triton"):
            outputs = case.call(part)
            # the same few numbers arrive at each sample
            arriving = [torch.ones_like(output[:1]).cumsum(-1).expand_as(output) / 64 for output in outputs.values()]
            grads = torch.autograd.grad(list(outputs.values()), [part[name] for name in batched], arriving)
        return [tensor[-2:].clone() for tensor in (*outputs.values(), *grads)]

    whole, last = gradients_of_last(slice(None)), gradients_of_last(slice(-2, None))
    for a, b in zip(whole, last, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * b.abs().max().item())
