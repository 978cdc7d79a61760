"""Words are answered before torch is imported: help, version, completion, and what was misspelt."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vitkernels as vk
from vitkernels import cli
from vitkernels.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent


def _run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, which tells the imports that it made."""
    command = [sys.executable, "-X", "importtime", "-m", "vitkernels", *words]
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment, check=False)


def _imported(errors: str) -> set[str]:
    return {line.rpartition("|")[2].strip() for line in errors.splitlines() if line.startswith("import time:")}


def _said(errors: str) -> str:
    return "\n".join(line for line in errors.splitlines() if not line.startswith("import time:"))


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--help"], 0, "Vision Transformers on fused kernels."),
        (["train", "--help"], 0, "--batch-size"),
        (["--version"], 0, f"vitkernels {vk.__version__}"),
        (["tran"], 2, "did you mean train?"),
        (["train", "--data", "x", "--epoch", "3", "--batchsize", "4"], 2, "did you mean --batch-size or"),
        (["train", "--data", "x", "--amp", "bf61"], 2, "did you mean bf16?"),
        (["export", "runs/x", "--to", "onx"], 2, "did you mean onnx?"),
    ],
)
def test_answers_without_torch(words: list[str], code: int, sentence: str) -> None:
    ran = _run(*words)
    assert ran.returncode == code
    assert sentence in ran.stdout + _said(ran.stderr)
    imported = _imported(ran.stderr)
    assert "vitkernels.cli" in imported
    assert not {"torch", "numpy", "rich"} & imported
    assert _said(ran.stderr).count("\n") == 0, "one sentence"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_page(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: vitkernels {command} ")


def test_completion() -> None:
    if importlib.util.find_spec("argcomplete") is None:
        pytest.skip("argcomplete is not installed")
    # what a shell's completion does: the line in the environment, answers on descriptor 8
    line = "vitkernels train --layer"
    code = "import os, sys; os.dup2(1, 8); sys.argv[0] = 'vitkernels'; import vitkernels"
    environment = {**os.environ, "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    environment |= {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "1", "_ARC_DEBUG": ""}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment, check=False
    )
    assert ran.stdout.split() == ["--layer-decay"], ran.stderr


def test_importing_the_package_reads_no_words() -> None:
    code = "import sys; sys.argv = ['mine.py', 'tran']; import vitkernels; print('there')"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "there\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_among_the_imports_is_one_sentence(number: int, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "vitkernels", "info"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.rpartition("|")[2].strip() == "torch._environment":  # torch has begun
            break
    process.send_signal(number)
    errors = process.stderr.read()
    assert process.wait(60) == code
    assert _said(errors).strip() == "vitkernels: interrupted"
    assert process.stdout is not None
    assert process.stdout.read() == ""


@pytest.mark.parametrize("words", [["tran"], ["train", "--data", "nowhere"]])
def test_under_torchrun_the_first_process_tells_a_fault(words: list[str]) -> None:
    """The second one is ended by torchrun, with the code of the fault; one that is left alone has it to itself."""
    telling = "import time; sleep = time.sleep; time.sleep = lambda each: (print('waits', flush=True), sleep(each))"
    process = subprocess.Popen(
        [sys.executable, "-c", f"from vitkernels import cli; {telling}; cli.main({words})"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TORCHELASTIC_RUN_ID": "a", "LOCAL_RANK": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (2, "")


def test_a_fault_of_the_second_process_alone_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "a"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "PATIENCE", 0.01)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["train", "--epochs", "3"]) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err.startswith("vitkernels: train: needs --data")


def test_importing_the_package_needs_torch_alone() -> None:
    packages = ("rich", "PIL", "matplotlib", "safetensors", "sklearn", "timm", "torchvision", "transformers", "yaml")
    code = f"import sys; sys.modules.update(dict.fromkeys({packages})); import vitkernels; print(vitkernels.load_model)"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    ran = subprocess.run(
        f"{sys.executable} -m vitkernels info | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert ran.stderr == ""
    assert ran.stdout == "Versions\n"


def test_a_reader_that_leaves_while_a_command_writes(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from vitkernels import commands

    def info(arguments: dict[str, object]) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(commands.COMMANDS, "info", info)
    with monkeypatch.context() as patch:
        patch.setattr(os, "dup2", lambda *files: None)  # it would be of pytest's own output
        assert main(["info"]) == 0
    assert capfd.readouterr().err == ""


def test_info_needs_no_package_of_the_trainer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("rich", "matplotlib", "PIL", "safetensors", "sklearn"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main(["info"]) == 0
    assert "Backends" in capsys.readouterr().out


def test_answers_are_quick() -> None:
    """Well under a second on a busy machine; torch alone takes longer."""
    start = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "vitkernels", "--help"], capture_output=True, cwd=ROOT, timeout=60, check=True
    )
    assert time.monotonic() - start < 1.0
