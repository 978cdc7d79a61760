"""The workflows do what anybody can do here: each step is a make target, and what they and the image name is there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        yield from job["steps"]


def test_all_are_there() -> None:
    assert [path.stem for path in WORKFLOWS] == ["docs", "lint", "tests", "wheels"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_each_step_is_a_target_or_an_action_of_a_version(path: Path) -> None:
    for step in steps(path):
        if "run" in step:
            program, target, *_ = step["run"].split()
            assert program == "make"
            assert target in TARGETS, step
        else:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]), step


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_its_paths_are_there(path: Path) -> None:
    text = path.read_text()
    named = re.findall(r"paths: \[(.*)\]", text)
    patterns = [each.strip() for line in named for each in line.split(",")]
    patterns += re.findall(r"cache-dependency-path: ([^}\s]+)", text)
    assert [pattern for pattern in patterns if not any(ROOT.glob(pattern))] == []


def test_the_image_uses_targets() -> None:
    text = (ROOT / "Dockerfile").read_text()
    used = set(re.findall(r"RUN make (\w+)", text)) | set(re.findall(r'"make", "(\w+)"', text))
    assert used == {"install", "gpu"}
    assert used <= TARGETS
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert container["postCreateCommand"] in text


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_it_may_do_no_more_than_read(path: Path) -> None:
    """But for the job that publishes the site."""
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    more = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert more == ({"publish": {"pages": "write", "id-token": "write"}} if path.stem == "docs" else {})
