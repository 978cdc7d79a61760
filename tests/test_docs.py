"""The pages say what is so: their Python runs as printed, their commands are there, their links and messages too."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest
import torch

from vitkernels import cli
from vitkernels.models import import_torchvision

README = pages.ROOT / "README.md"
MAKEFILE = (pages.ROOT / "Makefile").read_text()
OPTIONAL = {"timm", "torchvision", "transformers", "open_clip", "peft", "lightning", "vit_pytorch", "PIL", "sklearn"}
CHECKER, RULES = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture
def ordinary() -> Iterator[None]:
    """torch as a reader has it: conftest's deterministic algorithms warn where a page's own code is not."""
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


def run(page: Path) -> None:
    """The page's Python from top to bottom, in one namespace; a block of text right behind it is what it prints."""
    namespace = {"__name__": "__main__"}
    printed = ""
    for snippet in pages.snippets(page):
        if snippet.kind == "python":
            code = compile("\n" * (snippet.line - 1) + snippet.text, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, namespace)
            printed = out.getvalue()
        elif snippet.kind == "text" and snippet.follows:
            where = f"{pages.name(page)}, line {snippet.line}: printed\n{printed}"
            assert CHECKER.check_output(snippet.text, printed, RULES), where


@pytest.mark.parametrize("page", [page for page in pages.having("python") if page != README], ids=pages.name)
def test_its_python_runs_as_printed(
    page: Path, ordinary: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        run(page)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")


def test_the_readme_in_a_fresh_interpreter(tmp_path: Path) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    blocks = list(pages.snippets(README))
    code = "from vitkernels.models import import_torchvision\nimport_torchvision()\n"
    code += "".join(each.text for each in blocks if each.kind == "python")
    environment = {**os.environ, "PYTHONPATH": str(pages.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert all(each.text in done.stdout for each in blocks if each.kind == "text"), done.stdout


def commands(page: Path) -> list[list[str]]:
    """The words of each command of a page, without the environment that it sets."""
    text = "".join(snippet.text for snippet in pages.snippets(page) if snippet.kind == "bash")
    found = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    return [
        words[next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)) :] for words in found if words
    ]


def options_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    return set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))


@pytest.mark.parametrize("page", pages.having("bash"), ids=pages.name)
def test_its_commands_are_there(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for program, *words in commands(page):
        shown = " ".join([program, *words])
        if program == "make":
            targets = [word for word in words if "=" not in word]
            assert all(f"\n{target}:" in MAKEFILE for target in targets), shown
        elif program in ("python", "torchrun"):
            module = words[words.index("-m") + 1]
            assert importlib.util.find_spec(module) is not None, shown
            if module == "vitkernels":
                command, *rest = words[words.index("-m") + 2 :]
                used = {word.partition("=")[0] for word in rest if word.startswith("--")}
                assert used <= options_of(command, capsys), shown
        else:
            assert program in ("pip", "pytest", "docker"), f"{shown}: a command that nothing checks"


LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?P<target>[^)\s]+)\)")


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_its_links_lead_to_files(page: Path) -> None:
    """Those of the site are held by its strict build, and those of the README by this."""
    targets = [link["target"].partition("#")[0] for link in LINK.finditer(page.read_text())]
    missing = [target for target in targets if target and "://" not in target and not (page.parent / target).exists()]
    assert missing == []


# ------------------------------------------------------------------------------------------------------- messages

SOURCES = [*(pages.ROOT / "vitkernels").rglob("*.py"), pages.ROOT / "setup.py", *(pages.ROOT / "csrc").glob("*.py")]


def sentences() -> list[str]:
    """Every string in the code, with "..." for what is filled in."""

    def told(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(told(each) for each in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "..."

    trees = (ast.parse(path.read_text()) for path in SOURCES)
    return [told(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.Constant)]


def test_its_messages_are_those_of_the_code() -> None:
    found = [each.text.strip() for each in pages.snippets(pages.DOCS / "troubleshooting.md") if each.kind == "text"]
    assert len(found) > 20
    known = sentences()
    # what differs may be more than one thing, and a part of it may be a constant's value
    patterns = {each: re.compile(r".+".join(map(re.escape, each.split("...")))) for each in found}
    assert [each for each, pattern in patterns.items() if not any(map(pattern.search, known))] == []


def test_what_a_drawing_would_cut_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sphinx", reason="sphinx is not installed")
    monkeypatch.syspath_prepend(pages.ROOT / "docs")
    drawings, panels = importlib.import_module("drawings"), importlib.import_module("panels")
    assert all("<svg" in panel.svg() for each in panels.PANELS.values() for panel in each)
    with pytest.raises(ValueError, match=r"argument 'title' has 'xxx.*; needs 92 letters or less"):
        drawings.Panel("x" * 93, (), (), ())
    with pytest.raises(ValueError, match=r"argument 'does' has 'yyy.*; needs 40 letters or less"):
        drawings.Panel("x", (), ("y" * 41,), ())
