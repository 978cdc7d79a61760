"""Steps in compiled code: one op each way, which gives the bits of the uncompiled steps."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from step_layers import (
    FACTORS,
    KINDS,
    MASKED,
    WINDOWS,
    Layer,
    Results,
    check_equal,
    keep_smaller_norms,
    launches,
    norms,
)
from torch import Tensor, nn

import vitkernels as vk
from vitkernels.ops import _stretch_op

kinds = pytest.mark.parametrize("kind", KINDS)
FORWARD, BACKWARD = (f"vitkernels.stretch_{each}.default" for each in ("forward", "backward"))


@pytest.fixture(autouse=True)
def _no_graphs_of_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No result shares memory with an argument or another result: a compiler writes where nobody reads any more."""
    for make in (_stretch_op._forward_of, _stretch_op._backward_of):

        def watched(*args: Any, make: Callable[..., Any] = make) -> Callable[..., Any]:
            compute = make(*args)

            def checked(launch: Any, *tensors: Tensor) -> Sequence[Tensor]:
                results = compute(launch, *tensors)
                memories = [each.untyped_storage()._cdata for each in results if each.numel()]
                assert len(set(memories)) == len(memories)
                assert {each.untyped_storage()._cdata for each in tensors}.isdisjoint(memories)
                return results

            return checked

        monkeypatch.setattr(_stretch_op, make.__name__, watched)


class Graphs:
    """A backend for torch.compile, by AOT: the ops of its graphs, by name."""

    def __init__(self) -> None:
        self.ops: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(fw_compiler=self._note, bw_compiler=self._note)(graph, inputs)  # type: ignore[no-any-return]

    def _note(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._functorch.aot_autograd import make_boxed_func

        targets = [str(node.target) for node in graph.graph.nodes]
        self.ops.append([each for each in targets if each.startswith("vitkernels")])
        return make_boxed_func(graph.forward)  # type: ignore[no-any-return]


def _check(layer: Layer, *, autocast: bool = False, use: str = "both") -> None:
    """The bits of the uncompiled step, by two ops, in four steps: the later ones come from tapes."""
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(layer.together, fullgraph=True, backend=graphs)
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            wanted, results = layer.together(), compiled()
        with vk.record() as calls:
            expected = layer.gradients(wanted, use)
        with vk.record() as compiled_calls:
            got = layer.gradients(results, use)
        for mine, tensor in zip(results, wanted, strict=True):
            assert torch.equal(mine, tensor)
            assert mine.requires_grad == tensor.requires_grad
        if "branch" not in layer.tensors:  # the sum is x itself: its two gradients are added behind the op
            torch.testing.assert_close(got.pop("x"), expected.pop("x"))
        for name, tensor in expected.items():
            if tensor is None and got[name] is not None:  # a compiler fills in zeros for a gradient that did not arrive
                assert not got.pop(name).any()
                expected = {each: value for each, value in expected.items() if each != name}
        check_equal(got, expected)
        if use != "total":  # for the zeros, too, ops run
            assert launches(compiled_calls) == launches(calls)
    backward = [[BACKWARD]] if any(each is not None for each in expected.values()) else []
    assert graphs.ops[:1] == [[FORWARD]]
    assert graphs.ops[1:] == backward


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("smallest", [0, 2**16], ids=["made again", "kept"])
@pytest.mark.parametrize("branch", [False, True], ids=["first", "added"])
@kinds
def test_bits(kind: str, branch: bool, smallest: int, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_smaller_norms(monkeypatch, smallest)
    factors = FACTORS if branch else ()
    _check(Layer(kind, branch=branch, factors=factors, mask=kind in MASKED), autocast=autocast)


@pytest.mark.parametrize("use", ["total", "product"])
@kinds
def test_one_result_read(kind: str, use: str) -> None:
    _check(Layer(kind, factors=FACTORS), use=use)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@kinds
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    _check(Layer(kind, dtype, bias=False))
    _check(Layer(kind, dtype, rms=True), autocast=True)


@kinds
def test_frozen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor by itself frozen, with norms made again; each by itself learning, with norms kept; and all frozen."""
    names = list(Layer(kind, factors=FACTORS).tensors)
    some = [(0, (name,)) for name in names] + [(2**16, [each for each in names if each != name]) for name in names]
    for smallest, frozen in (*some, (0, names)):
        keep_smaller_norms(monkeypatch, smallest)
        layer = Layer(kind, factors=FACTORS)
        layer.freeze(*frozen)
        _check(layer)


@pytest.mark.parametrize("causal", [False, True])
def test_masks(causal: bool) -> None:
    layer = Layer("attention", mask=not causal, causal=causal)
    _check(layer)
    if not causal:
        layer.freeze("mask")
        layer.tensors["mask"] = layer.tensors["mask"] > 0
        layer.tensors["mask"][..., 0] = True
        _check(layer)


@pytest.mark.parametrize("rows", [200, 202, 1024])
@kinds
def test_copies_of_weights(kind: str, rows: int) -> None:
    """Those that autocast made are kept for as many rows as uncompiled."""
    layer = Layer(kind)
    tokens = (rows // 24, *WINDOWS.sides, 24) if kind == "windows" else (2, rows // 2, 24)
    layer.resize(*tokens)
    _check(layer, autocast=True)


class Blocks(nn.Module):
    """Blocks of a tower: LayerScale, DropPath, sub-layers of other widths and eps."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"qkv_bias": True, "init_values": 0.1}
        self.blocks = nn.ModuleList(vk.nn.Block(24, 3, drop_path=0.1 * i, **options) for i in range(depth))
        for index, block in enumerate(self.blocks):
            block.norm1.eps = 10.0 ** (-3 - index)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("backend", "autocast"), [("eager", False), ("aot_eager", False), ("aot_eager", True), ("inductor", True)]
)
def test_blocks(backend: str, autocast: bool) -> None:
    """Several blocks in training, where DropPath draws, and in evaluation, with and without gradients."""
    model = Blocks()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(2, 7, 24)

    def step(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = run(leaf)
        grads = torch.autograd.grad(out.square().sum(), [leaf, *model.parameters()])
        return [out, *grads]

    with torch._inductor.config.patch(fallback_random=True, compile_threads=1):
        for _ in range(4):
            torch.testing.assert_close(step(compiled), step(model), rtol=1e-5, atol=1e-5)
        model.eval()
        torch.testing.assert_close(step(compiled), step(model), rtol=1e-5, atol=1e-5)
        for guard in (torch.no_grad, torch.inference_mode):
            with guard():
                torch.testing.assert_close(compiled(x), model(x))


# windows and images laid end to end have sizes of their own in the step
@pytest.mark.parametrize("kind", [each for each in KINDS if each not in ("windows", "packed")])
def test_one_graph_for_every_size(kind: str) -> None:
    layer, graphs = Layer(kind), Graphs()

    def loss(x: Tensor, branch: Tensor, *tables: Tensor) -> Tensor:
        places = dict(zip(("sin", "cos"), tables, strict=False))
        total, product = layer.together(x=x, branch=branch, **places)
        return total.sum() + product.sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=graphs, dynamic=True)
    for sizes in ((4, 11), (3, 9), (5, 7)):
        layer.resize(*sizes, 24)
        names = [each for each in ("x", "branch", "sin", "cos") if each in layer.tensors]
        given = [layer.tensors[name] for name in names]
        of = [*given[:2], layer.tensors["w1"], layer.tensors["weight"]]
        for _ in range(4):
            expected, got = (torch.autograd.grad(run(*given), of) for run in (loss, compiled))
            assert all(map(torch.equal, got, expected))
    assert graphs.ops == [[FORWARD], [BACKWARD]]


def test_follows_use() -> None:
    layer = Layer("mlp")
    compiled = torch.compile(layer.together, fullgraph=True, backend="aot_eager")
    compiled()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for backend in ("reference", "ext", "reference"):
            with vk.use(backend), vk.record() as calls:
                layer.gradients(compiled())
            assert [(call.op, call.backend) for call in calls] == [
                (op, backend) for op in ("add_layer_norm", "mlp", "mlp", "add_layer_norm")
            ]


@kinds
def test_double_backward_is_refused(kind: str) -> None:
    layer = Layer(kind)
    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(layer.together, fullgraph=True, backend=backend)
        gradient = layer.gradients(compiled(), create_graph=True)["x"]
        assert gradient is not None
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(gradient.sum(), layer.tensors["w1"])


@kinds
def test_written_between_the_passes(kind: str) -> None:
    """What autograd saved for the backward pass and somebody wrote into is an error, as it is uncompiled."""
    layer = Layer(kind)
    results = torch.compile(layer.together, fullgraph=True, backend="aot_eager")()
    with torch.no_grad():
        layer.tensors["w1"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        layer.gradients(results)


def test_a_norm_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for smallest in (0, 2**16):
        torch._dynamo.reset()
        keep_smaller_norms(monkeypatch, smallest)
        layer = Layer("mlp")
        results = torch.compile(layer.together, fullgraph=True, backend="aot_eager")()
        with vk.record() as calls:
            layer.gradients(results)
        assert norms(calls) == (smallest == 0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_sizes_by_turns(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some the norm is kept, of others made again; each goes on as it was when it came first, also traced anew."""
    keep_smaller_norms(monkeypatch, 500)
    layer = Layer("mlp")
    given = [torch.randn(batch, 5, 24, requires_grad=True) for batch in (2, 8, 2, 8)]
    of = [layer.tensors["w1"], layer.tensors["weight"]]

    def loss(x: Tensor, branch: Tensor, *tables: Tensor) -> Tensor:
        places = dict(zip(("sin", "cos"), tables, strict=False))
        total, product = layer.together(x=x, branch=branch, **places)
        return total.sum() + product.sin().sum()

    for _ in range(2):
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=False)
        for x in given * 3:
            expected, got = (torch.autograd.grad(run(x, x.sin()), [x, *of]) for run in (loss, compiled))
            torch.testing.assert_close(got, expected)


def test_bad_arguments_are_named() -> None:
    layer = Layer("linear")
    layer.tensors["w1"] = torch.randn(72, 23, requires_grad=True)
    for backend in ("eager", "inductor"):
        with pytest.raises(Exception, match=r"argument \\*'weight\\*' has shape \[72, 23\]"):
            torch.compile(layer.together, fullgraph=True, backend=backend)()


KEPT = """
import torch, vitkernels as vk
torch.manual_seed(0)
block = vk.nn.Block(24, 3, init_values=0.1)
x = torch.randn(2, 5, 24, requires_grad=True)
torch._inductor.config.compile_threads = 1
compiled = torch.compile(block, fullgraph=True)
for _ in range(4):
    wanted = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    with vk.record() as calls:
        got = torch.autograd.grad(compiled(x).square().sum(), [x, *block.parameters()])
    torch.testing.assert_close(got, wanted)
    assert len(calls) == 12
found = torch._dynamo.utils.counters
print(found["aot_autograd"]["autograd_cache_hit"], found["inductor"]["fxgraph_cache_hit"])
"""


def test_graphs_kept_on_disk(tmp_path: Path) -> None:
    """A process that finds its graphs there traces no backward pass."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    said = [
        subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True, env=environment).stdout
        for _ in range(2)
    ]
    assert said[0].split()[0] == "0"
    assert said[1].split()[0] == "1", said


def test_results() -> None:
    """(total, product) of one step, with nothing added: the sum is the stream."""
    layer = Layer("linear", branch=False)
    compiled: Callable[[], Results] = torch.compile(layer.together, fullgraph=True, backend="aot_eager")
    total, _ = compiled()
    assert total.data_ptr() == layer.tensors["x"].data_ptr()
