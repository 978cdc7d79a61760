"""What is built to be installed: the wheel works elsewhere, the archive lacks nothing, a failure is one sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import skip_without

import vitkernels

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import versions

ROOT = versions.ROOT
SETUP = ["-c", "import runpy, sys; sys.argv[0] = 'setup.py'; {}; runpy.run_path('setup.py', run_name='__main__')"]
NO_TORCH = "sys.modules['torch'] = None"


def setup(*words: str, before: str = "pass", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py in another process, which does `before` first."""
    code = [part.format(before) for part in SETUP]
    environment = {**os.environ, "VITKERNELS_BUILD_CUDA": "0", **variables}
    return subprocess.run(
        [sys.executable, *code, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def built(folder: Path, *commands: str, **variables: str) -> Path:
    """The one file that commands put into a folder; nothing is written into the checkout."""
    words = ["-q", "egg_info", "--egg-base", str(folder), *commands, "--dist-dir", str(folder / "dist")]
    done = setup(*words, **variables)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "dist").iterdir()
    return path


# ------------------------------------------------------------------------------------------------- what is built


def test_the_wheel_trains_ten_steps_elsewhere(tmp_path: Path) -> None:
    """Built around the extension that is there: compiling it again would take minutes."""
    skip_without("ext")
    lib = tmp_path / "lib"
    (tmp_path / ".pydistutils.cfg").write_text(f"[build]\nbuild_base = {tmp_path / 'build'}\nbuild_lib = {lib}\n")
    (lib / "vitkernels").mkdir(parents=True)
    shutil.copy(Path(vitkernels.__file__).parent / "_C.abi3.so", lib / "vitkernels")
    options = ["bdist_wheel", "--skip-build", "--bdist-dir", str(tmp_path / "bdist")]
    wheel = built(tmp_path, "build_py", *options, HOME=str(tmp_path))
    assert wheel.name.startswith(f"vitkernels-{vitkernels.__version__}-cp310-abi3-linux"), wheel.name
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info" not in name}
    here = Path(vitkernels.__file__).parent
    files = (
        path for path in here.rglob("*") if path.is_file() and path.suffix != ".pyc" and path.name != "_cuda.abi3.so"
    )
    assert packed == {str(path.relative_to(here.parent)) for path in files}

    target = tmp_path / "environment"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    install += ["--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, timeout=120)
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", versions.TEN_STEPS], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"trained ten steps with {target}" in done.stdout


def test_a_wheel_without_the_extension_needs_no_torch(tmp_path: Path) -> None:
    words = ["-q", "egg_info", "--egg-base", str(tmp_path), "build", "--build-base", str(tmp_path / "build")]
    words += ["bdist_wheel", "--bdist-dir", str(tmp_path / "lib"), "--dist-dir", str(tmp_path)]
    done = setup(*words, before=NO_TORCH, VITKERNELS_BUILD_EXT="0")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"vitkernels-{vitkernels.__version__}-py3-none-any.whl").exists()


def test_the_archive_holds_what_its_tests_need(tmp_path: Path) -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to it is not known")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tarfile.open(built(tmp_path, "sdist")) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert set(tracked.splitlines()) - held == set()
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


# ------------------------------------------------------------------------------------------- what cannot be built


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The sentence that a build stopped with; nothing else of length was printed."""
    assert done.returncode == 1
    lines = (done.stdout + done.stderr).strip().splitlines()
    assert len(lines) < 5, lines
    assert lines[-1].startswith("vitkernels: ")
    return lines[-1]


def test_without_torch_one_sentence_says_how() -> None:
    sentence = said(setup("-q", "bdist_wheel", before=NO_TORCH))
    assert "Needs torch 2.11 or later installed first" in sentence
    assert "then: pip install . " in sentence


@pytest.mark.parametrize("command", ["bdist_wheel", "editable_wheel"])
def test_without_a_compiler_one_sentence_says_how(command: str, tmp_path: Path) -> None:
    sentence = said(setup(command, "--dist-dir", str(tmp_path), CXX="/nowhere/c++"))
    assert "there is no C++ compiler '/nowhere/c++'; needs gcc 9 or later" in sentence
    assert "VITKERNELS_BUILD_EXT=0 installs without the extension" in sentence
    assert list(tmp_path.iterdir()) == []


def test_torch_is_found_from_within_an_environment_of_the_build(tmp_path: Path) -> None:
    """As pip makes one: its own setuptools before everything, and no site-packages."""
    import setuptools

    (tmp_path / "setuptools").symlink_to(Path(setuptools.__file__).parent)
    alone = f"sys.path[:] = [{str(tmp_path)!r}, *(each for each in sys.path if 'site-packages' not in each)]"
    done = setup("--name", before=alone)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["vitkernels"]
