"""Which backend serves a call, who decides it, and what one can read about it; importing decides nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import skip_without
from torch import Tensor

import vitkernels as vk
from vitkernels import dispatch

ROOT = Path(vk.__file__).parents[1]


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VITKERNELS_")}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def _linear() -> Tensor:
    return vk.ops.linear(torch.ones(2, 4), torch.ones(3, 4))


def _ran() -> list[str]:
    with vk.record() as calls:
        _linear()
    return [call.backend for call in calls]


@pytest.fixture
def only_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the extension was not built."""
    monkeypatch.setattr(dispatch, "why_not", lambda backend: None if backend == "reference" else f"no {backend} here")
    monkeypatch.setattr(dispatch, "_warned", set())


# ------------------------------------------------------------------------------------------------------------ order


def test_default_order() -> None:
    assert dispatch.order("cpu") == ("ext", "reference")
    assert dispatch.order("cuda") == ("triton", "ext", "reference")
    assert dispatch.order("xpu") == ("reference",)


def test_default_is_the_extension_where_it_is_there() -> None:
    skip_without("ext")
    assert _ran() == ["ext"]


def test_the_extension_is_there() -> None:
    """Where it was built, and in CI, a test run on the reference alone must not pass for one on the extension."""
    if not (os.environ.get("CI") or list((ROOT / "vitkernels").glob("_C*.so"))):
        pytest.skip("the extension was not built here, and this is not CI")
    assert vk.backends()["ext"] == "available"


def test_use_as_a_statement() -> None:
    vk.use("reference")
    assert dispatch.order("cpu") == dispatch.order("cuda") == ("reference",)
    assert _ran() == ["reference"]


def test_use_as_a_context_restores_the_order() -> None:
    vk.use("reference", "ext")
    with vk.use("ext", "triton"):
        assert dispatch.order("cpu") == ("ext", "triton")
        with vk.use("reference"):
            assert dispatch.order("cpu") == ("reference",)
        assert dispatch.order("cpu") == ("ext", "triton")
    assert dispatch.order("cpu") == ("reference", "ext")


def test_use_restores_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), vk.use("reference"):
        raise ZeroDivisionError
    assert dispatch.order("cpu") == ("ext", "reference")


def test_use_drops_names_that_come_twice() -> None:
    with vk.use("reference", "ext", "reference"):
        assert dispatch.order("cpu") == ("reference", "ext")


def test_use_holds_on_autograds_own_threads(backend: str) -> None:
    """Backward passes of other threads follow it too."""
    weight = torch.ones(3, 4, requires_grad=True)
    with vk.use(backend), vk.record() as calls:
        out = vk.ops.linear(torch.ones(2, 4), weight).sum()
        thread = threading.Thread(target=out.backward)
        thread.start()
        thread.join()
    assert [(call.direction, call.backend) for call in calls] == [("forward", backend), ("backward", backend)]


@pytest.mark.parametrize("value", ["reference", " reference , ext", "reference,ext,reference"])
def test_environment_variable_sets_the_first_order(value: str) -> None:
    code = "import vitkernels as vk; from vitkernels import dispatch; print(*dispatch.order('cpu'))"
    done = _python(code, VITKERNELS_BACKEND=value)
    assert done.stdout.split() == list(dict.fromkeys(name.strip() for name in value.split(","))), done.stderr


def test_environment_variable_with_an_unknown_backend() -> None:
    done = _python("import vitkernels", VITKERNELS_BACKEND="ext,cuda")
    assert done.returncode != 0
    assert "environment variable VITKERNELS_BACKEND: unknown backend 'cuda'; needs one of" in done.stderr


# --------------------------------------------------------------------------------------------- what can be read


def test_backends_says_why_not(only_the_reference: None) -> None:
    status = vk.backends()
    assert status == {"triton": "no triton here", "ext": "no ext here", "reference": "available"}
    lines = str(status).splitlines()
    assert repr(status) == str(status)
    assert [line.split(maxsplit=1) for line in lines] == [[name, text] for name, text in status.items()]


def test_backends_here() -> None:
    status = vk.backends()
    assert list(status) == list(dispatch.BACKENDS)
    assert status["reference"] == "available"
    assert all(len(text) > 5 for text in status.values())


def test_extension_that_is_not_built_says_how_to_build_it() -> None:
    code = """
import sys
sys.modules["vitkernels._C"] = None  # as if it were not there
import vitkernels as vk
print(vk.backends()["ext"])
"""
    done = _python(code)
    assert done.stdout.startswith("the compiled extension did not load ("), done.stderr
    assert done.stdout.rstrip().endswith("build it with: pip install -e .")


def test_record_holds_every_call_with_its_reasons(only_the_reference: None) -> None:
    weight = torch.ones(3, 4, requires_grad=True)
    with vk.use("triton", "ext", "reference"), vk.record() as calls:
        vk.ops.linear(torch.ones(2, 4), weight).sum().backward()
    declined = (("triton", "no triton here"), ("ext", "no ext here"))
    assert calls == [
        dispatch.Call("linear", "forward", "reference", declined),
        dispatch.Call("linear", "backward", "reference", declined),
    ]


def test_record_holds_the_reason_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is there may decline one direction of one call; the next in the order takes it."""
    linear = dispatch.OPS["linear"]
    given = linear.implementations["reference"]

    def why_not(direction: str, args: tuple[object, ...]) -> str | None:
        return "only forward today" if direction == "backward" else None

    picky = dispatch.Implementation(given.forward, given.backward, why_not)
    monkeypatch.setitem(linear.implementations, "ext", picky)
    monkeypatch.setattr(dispatch, "why_not", lambda backend: None)
    with vk.use("ext", "reference"), vk.record() as calls:
        vk.ops.linear(torch.ones(2, 4), torch.ones(3, 4, requires_grad=True)).sum().backward()
    assert [(call.direction, call.backend, call.declined) for call in calls] == [
        ("forward", "ext", ()),
        ("backward", "reference", (("ext", "only forward today"),)),
    ]


def test_a_backend_without_a_kernel_for_the_op_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "why_not", lambda backend: None)
    monkeypatch.delitem(dispatch.OPS["linear"].implementations, "triton", raising=False)
    with vk.use("triton", "reference"), vk.record() as calls:
        _linear()
    assert calls[0].declined == (("triton", "no triton kernel is registered for linear"),)


def test_records_nest_and_end() -> None:
    with vk.record() as outer:
        _linear()
        with vk.record() as inner:
            _linear()
        _linear()
    _linear()
    assert (len(outer), len(inner)) == (3, 1)


def test_record_ends_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), vk.record() as calls:
        raise ZeroDivisionError
    _linear()
    assert calls == []


def test_slow_reference_is_warned_about_once(only_the_reference: None) -> None:
    """In the default order, falling through to it is no choice of the user's."""
    with pytest.warns(UserWarning, match="linear runs on the plain-torch reference, which is slow. ext: no ext here"):
        _linear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _linear()


def test_chosen_reference_is_not_warned_about(only_the_reference: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with vk.use("reference"):
            _linear()
        with vk.use("ext", "reference"):
            _linear()


# ------------------------------------------------------------------------------------------------ importing is inert

_STATE = """
import json, sys, warnings
import torch
def state():
    return {
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn": torch.backends.cudnn.benchmark,
        "seed": torch.initial_seed(),
        "filters": len(warnings.filters),
        "linear": str(torch.nn.functional.linear),
        "attention": str(torch.nn.functional.scaled_dot_product_attention),
        "forward": str(torch.nn.Linear.forward),
    }
before = state()
import vitkernels
after = state()
"""


def _imported(question: str) -> Any:
    done = _python(f"{_STATE}print(json.dumps({question}))")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def after_import() -> dict[str, Any]:
    return _imported(
        "{'changed': [name for name in before if before[name] != after[name]],"
        " 'cuda': torch.cuda.is_initialized(), 'modules': sorted(sys.modules)}"
    )


OPTIONAL = {"triton", "timm", "torchvision", "matplotlib", "PIL", "rich", "sklearn", "safetensors"}
INERT: dict[str, Callable[[dict[str, Any]], object]] = {
    "changes no flag of torch, patches nothing": lambda found: not found["changed"],
    "initialises no device": lambda found: not found["cuda"],
    "loads no extension": lambda found: "vitkernels._C" not in found["modules"],
    "imports no optional package": lambda found: not OPTIONAL & set(found["modules"]),
    "imports no compiler": lambda found: "torch._inductor" not in found["modules"],
}


@pytest.mark.parametrize("promise", INERT)
def test_importing(promise: str, after_import: dict[str, Any]) -> None:
    assert INERT[promise](after_import), after_import
