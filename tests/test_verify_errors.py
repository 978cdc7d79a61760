"""What vk.verify says of bad input: one sentence that names what it got and what it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm_vit import images, vit
from torch import Tensor, nn

import vitkernels as vk


class FullyShardedDataParallel(nn.Module):
    pass


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no Module": (lambda: vk.verify("vit"), TypeError, "argument 'model' is a str; needs a torch.nn.Module"),
    "a loss that is none": (
        lambda: vk.verify(vit(), images(2), loss=3),
        TypeError,
        "argument 'loss' is a int; needs a function of the model's outputs",
    ),
    "inputs that do not fit": (
        lambda: vk.verify(vit(), torch.randn(2, 3, 16, 16)),
        ValueError,
        r"the model does not run on these inputs: AssertionError: Input height \(16\) doesn't match model \(32\)",
    ),
    "no inputs": (
        lambda: vk.verify(vit()),
        ValueError,
        "the model does not run on these inputs: TypeError: .*missing 1 required positional argument",
    ),
    "nothing to train": (
        lambda: vk.verify(vit().requires_grad_(False), images(2)),
        ValueError,
        r"no floating-point tensor among the outputs \(output\) depends on a parameter or an input",
    ),
    "no floating-point output": (
        lambda: vk.verify(nn.Flatten(), torch.ones(2, 2, dtype=torch.long)),
        ValueError,
        r"among the outputs \(none\) depends",
    ),
    "a loss of many numbers": (
        lambda: vk.verify(vit(), images(2), loss=lambda output: output),
        TypeError,
        r"argument 'loss' returned a tensor of shape \[2, 10\]; needs a tensor of one element",
    ),
    "a loss of no tensor": (
        lambda: vk.verify(vit(), images(2), loss=lambda output: 1.0),
        TypeError,
        "argument 'loss' returned a float; needs a tensor of one element",
    ),
    "a loss without gradients": (
        lambda: vk.verify(vit(), images(2), loss=lambda output: output.detach().sum()),
        ValueError,
        "what argument 'loss' returned depends on nothing that requires a gradient",
    ),
    "a loss that wants other outputs": (
        lambda: vk.verify(vit(), images(2), loss=lambda output: output.logits),
        ValueError,
        "argument 'loss' does not take what the model returned: AttributeError",
    ),
    "no weights": (
        lambda: vk.verify(vit().to("meta"), images(2)),
        ValueError,
        "'cls_token' is on the meta device; needs a model with weights",
    ),
    "weights without a shape": (
        lambda: vk.verify(nn.LazyLinear(3), torch.randn(2, 4)),
        ValueError,
        "'weight' has no shape yet; needs a model that has run once",
    ),
    "shards": (
        lambda: vk.verify(nn.Sequential(FullyShardedDataParallel())),
        ValueError,
        "is sharded .FullyShardedDataParallel.; needs the model before it is sharded",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence(what: str) -> None:
    call, error, sentence = BAD[what]
    with pytest.raises(error, match=f"^verify: .*{sentence}"):
        call()


def test_a_sharded_parameter_is_named(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = vit()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"^verify: 'cls_token' is sharded \(a DTensor\)"):
        vk.verify(model, images(2))


def test_inside_compiled_code() -> None:
    model = nn.Linear(2, 2)

    @torch.compile(backend="eager", fullgraph=True)
    def call(x: Tensor) -> Any:
        return vk.verify(model, x)

    with pytest.raises(RuntimeError, match="called inside a function that is being compiled"):
        call(torch.randn(2, 2))
