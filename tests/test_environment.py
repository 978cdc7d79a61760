"""Where a process runs: without a home, beside a cache that cannot be used, under other defaults of torch's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from case import Loss
from conftest import skip_without
from timm_vit import images, vit
from torch import Tensor, nn
from train_setup import make_images, silent, tiny

import vitkernels as vk
from vitkernels import models, products
from vitkernels.fuse.swap import Fused
from vitkernels.train import load_model, train

# ------------------------------------------------------------------------------------------------- no home, no cache

FIRST_CALL = """
import os, sys, torch
import vitkernels as vk, vitkernels._C
from vitkernels import products
if os.getuid() == 0:  # root has a home, and writes everywhere
    os.setgid(54321)
    os.setuid(54321)
x, weight = torch.randn(2, 8), torch.randn(4, 8)
with vk.record() as calls:
    y = vk.ops.linear(x, weight)
assert torch.allclose(y, x @ weight.T, atol=1e-5)
print([call.backend for call in calls], products._path())
"""


def _start(code: str, **variables: str | None) -> subprocess.Popen[str]:
    """Another process, with these variables over this one's environment."""
    environment = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _shown(process: subprocess.Popen[str]) -> str:
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return shown.strip()


@pytest.fixture
def open_to_all(tmp_path: Path) -> Path:
    """A folder that another user can reach."""
    for each in (tmp_path, *tmp_path.parents[:2]):
        if each.stat().st_uid == os.getuid():
            each.chmod(0o755)
    return tmp_path


def test_a_user_without_a_home() -> None:
    skip_without("ext")
    if os.getuid() != 0:
        pytest.skip("needs to be root to become a user whom the system does not know")
    assert _shown(_start(FIRST_CALL, HOME=None, XDG_CACHE_HOME=None)) == "['ext'] None"


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["read-only", "closed"])
@pytest.mark.parametrize("there", [False, True], ids=["to be made", "there"])
def test_a_cache_folder_of_somebody_else(there: bool, mode: int, open_to_all: Path) -> None:
    skip_without("ext")
    folder = open_to_all / "cache" / "vitkernels" if there else open_to_all / "cache"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    try:
        assert _shown(_start(FIRST_CALL, XDG_CACHE_HOME=str(open_to_all / "cache"))).startswith("['ext'] ")
    finally:
        folder.chmod(0o755)
    assert not [path for path in (open_to_all / "cache").rglob("*") if path.is_file()]


def test_a_cache_folder_below_a_file(tmp_path: Path) -> None:
    skip_without("ext")
    (tmp_path / "file").write_text("")
    assert _shown(_start(FIRST_CALL, XDG_CACHE_HOME=str(tmp_path / "file"))).startswith("['ext'] ")


@pytest.mark.parametrize("content", [None, "{"], ids=["nothing kept", "spoilt"])
def test_processes_that_start_together_keep_one_choice(content: str | None, open_to_all: Path) -> None:
    skip_without("ext")
    code = "import vitkernels as vk; print(vk.backends().details['ext'])"
    if content is not None:
        shown = _shown(
            _start("from vitkernels import products; print(products._path())", XDG_CACHE_HOME=str(open_to_all))
        )
        Path(shown).parent.mkdir()
        Path(shown).write_text(content)
    processes = [_start(code, XDG_CACHE_HOME=str(open_to_all)) for _ in range(3)]
    first, *others = [_shown(each) for each in processes]
    assert "bfloat16 products by " in first
    assert others == [first, first]
    (path,) = (open_to_all / "vitkernels").iterdir()
    assert path.suffix == ".json"


def test_no_processor_that_tells_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **options: str) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    assert isinstance(products.cpu_name(), str)


# ----------------------------------------------------------------------------------------- another device or dtype


class _Dtype:
    """A default dtype for a while."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


class _Global:
    """A default device, set for all that follows."""

    def __enter__(self) -> None:
        torch.set_default_device("meta")

    def __exit__(self, *_: object) -> None:
        torch.set_default_device(None)


DEFAULTS: dict[str, Callable[[], Any]] = {
    "meta as the default device": _Global,
    "inside `with torch.device`": lambda: torch.device("meta"),
    "float64": lambda: _Dtype(torch.float64),
    "bfloat16": lambda: _Dtype(torch.bfloat16),
}


@pytest.fixture(params=DEFAULTS)
def other(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """Each other default in turn, as a context."""
    return DEFAULTS[request.param]


def _like(got: Tensor, expected: Tensor) -> None:
    assert (got.device, got.dtype) == (expected.device, expected.dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_every_op(backend: str, other: Callable[[], Any], loss: Loss) -> None:
    with vk.use(backend):
        expected = loss.gradients()
        leaves = loss.leaves()
        with other(), vk.record() as calls:
            outputs = loss.outputs(leaves)
            sum(each.float().sin().sum() for each in outputs.values()).backward()
    assert [(call.op, call.direction, call.backend) for call in calls] == [
        (loss.case.op, direction, backend) for direction in ("forward", "backward")
    ]
    for leaf, gradient in zip(leaves, expected, strict=True):
        _like(leaf.grad, gradient)


@pytest.mark.parametrize(
    "options",
    [{}, {"qk_norm": True, "init_values": 0.1, "drop_path_rate": 0.3}, {"mean": (0.5,) * 3, "std": (0.2,) * 3}],
    ids=["plain", "norms, scales, drops", "pixels"],
)
def test_own_modules(other: Callable[[], Any], options: dict[str, Any]) -> None:
    model = vk.nn.VisionTransformer(**peers.SIZES, **options)
    peers.stir(model)
    image = torch.randint(0, 256, (2, 3, 40, 24), dtype=torch.uint8)  # another size: positions are interpolated

    def step() -> list[Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        logits = model(image)
        logits.sum().backward()
        return [logits.detach(), *(each.grad.clone() for each in model.parameters())]

    expected = step()
    with other():
        found = step()
    for one, another in zip(found, expected, strict=True):
        _like(one, another)


@pytest.mark.parametrize("kind", [vk.nn.VisionTransformer, vk.nn.NaiveVisionTransformer])
def test_parameters_follow_the_defaults_as_those_of_torch_do(kind: type[nn.Module], other: Callable[[], Any]) -> None:
    with other():
        like, model = nn.Linear(2, 2).weight, kind(**peers.SIZES)
    assert {(each.device, each.dtype) for each in model.parameters()} == {(like.device, like.dtype)}


class Dense(nn.Module):
    """A feed-forward that fuse knows by its structure alone, and so tries out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


def test_modules_that_fuse_tries_out(other: Callable[[], Any]) -> None:
    model = nn.Sequential(Dense())
    with other():
        vk.fuse(model)
    assert isinstance(model[0], Fused), vk.explain(model)


def test_verify(other: Callable[[], Any]) -> None:
    model, batch = vit(init_values=1e-2), images(2)
    with other():
        found = vk.verify(model, batch)
    assert found.ok, found
    assert found.truth == "float64"
    assert len(found.rows) == 1 + len(list(model.parameters()))


def test_random_images_of_a_named_model(other: Callable[[], Any]) -> None:
    with other():
        batch = models.Named("name", nn.Identity(), (3, 4, 5)).images(2)
    assert (batch.shape, batch.dtype, batch.device.type) == ((2, 3, 4, 5), torch.float32, "cpu")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("default", [_Global, lambda: torch.device("meta")], ids=["set", "inside"])
def test_a_training_run_is_where_its_settings_say(default: Callable[[], Any], workers: int, tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", each=4)
    (folder / "red" / "0.png").write_bytes(b"damaged")
    expected = train(tiny(folder, tmp_path / "before", epochs=1, warmup_epochs=0.0), silent())
    with default():
        config = tiny(folder, tmp_path / "run", epochs=1, warmup_epochs=0.0, device="cpu", workers=workers)
        found = train(config, silent())
        model, classes = load_model(tmp_path / "run")
    assert found["last_loss"] == expected["last_loss"]
    assert found["skipped"] == expected["skipped"]
    assert len(classes) == 3
    assert {each.device.type for each in model.parameters()} == {"cpu"}
    with default():
        assert model(torch.zeros(1, 3, 16, 16, dtype=torch.uint8, device="cpu")).device.type == "cpu"


@pytest.mark.parametrize("model", ["vit_tiny_patch16", "timm:vit_tiny_patch16_224"])
def test_pixels_under_another_default_dtype(model: str, tmp_path: Path) -> None:
    if model.startswith("timm:"):
        peers.import_timm()
    folder = make_images(tmp_path / "images", each=4)
    arguments = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8}
    train(tiny(folder, tmp_path / "run", model=model, model_args=arguments, epochs=1, warmup_epochs=0.0), silent())
    trained, _ = load_model(tmp_path / "run")
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    expected = trained(pixels)
    with _Dtype(torch.float64):
        _like(trained(pixels), expected)
