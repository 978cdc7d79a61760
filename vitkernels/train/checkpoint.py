"""Files that are whole or not there: written beside their place, synced to the disk, then moved into it.

A checkpoint is a dictionary of tensors, numbers, strings and lists, so it is read back with weights_only=True: a file
from elsewhere cannot run code.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

FORMAT = 1


def atomic_write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a file that takes `path`'s place once it is whole and on the disk.

    Raises:
        OSError: it could not be written; what stood at `path` still does, and nothing is left beside it.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        cause = _os_error(error)
        if cause is None:
            raise
        kept = "; the earlier one is kept" if path.exists() else ""
        raise OSError(f"cannot write {path}: {cause.strerror or cause}{kept}") from error


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's word behind an error: torch's zip writer wraps it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    atomic_write(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def write_weights(path: Path, model: nn.Module) -> None:
    """A model's state_dict as safetensors, atomically."""
    from safetensors.torch import save

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    atomic_write(path, lambda file: file.write(save(weights)))


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, atomically.

    Raises:
        OSError: as `atomic_write`.
    """
    atomic_write(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or not this trainer's.
    """
    if not path.is_file():
        raise FileNotFoundError(f"train: argument 'resume' is set, and there is no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise ValueError(f"its format is {state['format']}")
    except Exception as error:  # torch.load and zipfile raise a dozen types on damaged bytes
        reason = str(error).split("\n", 1)[0]
        raise ValueError(
            f"train: the checkpoint {path} is not a whole checkpoint ({reason}); it was left as it is"
        ) from error
    return state


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator that a training step may draw from."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    cuda: Tensor | None = state.get("cuda")
    if device.type == "cuda" and cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
