"""PTX of CUDA C++ on the machine: what nvcc 13.0 made of ptx/data/reduce.cu, kept beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ptx.findings import PROGRAMS, Fault
from ptx.launch import run
from ptx.snippet import kinds

PTX = (Path(__file__).parent / "ptx" / "data" / "reduce.ptx").read_text()


def test_shuffles_calls_local_memory_and_atomics() -> None:
    """block_sums, against the same in Python."""
    x = np.arange(-50, 150, dtype="f4")
    out = np.zeros(2, "f4")
    launch = run(PTX, "block_sums", (2,), (128,), 4 * 4, [x, out, 200])
    assert kinds(launch) == []
    want = 0.0
    for block in range(2):
        v = np.zeros(128)
        part = x[128 * block : 128 * block + 128]
        v[: len(part)] = part
        t = np.zeros(32)
        t[:4] = v.reshape(4, 32).sum(1)
        t += [sum(range(1, lane % 4 + 2)) for lane in range(32)]
        table = [t[0] * i for i in range(8)]
        want += sum(table[i * 3 % 8] for i in range(4)) + (t > 3).sum()
    assert out.tolist() == [want, float((x > 0).sum())]


def test_dynamic_shared_memory_is_what_the_launch_gives() -> None:
    with pytest.raises(Fault, match="out of bounds"):
        run(PTX, "block_sums", (1,), (128,), 2 * 4, [np.zeros(128, "f4"), np.zeros(2, "f4"), 128])


def test_the_last_block_reads_what_all_wrote() -> None:
    x = torch.arange(500).to(torch.bfloat16)
    sums, done, out = torch.zeros(5), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    arguments = [x, sums, done, out, 500]
    assert kinds(run(PTX, "last_block", (5,), (32,), 0, arguments)) == []
    assert out.item() == (2 * x).float().sum().item()
    assert done.item() == 0
    # without the fence nothing says that the sums have arrived
    assert kinds(run(PTX.replace("membar.gl;", ""), "last_block", (5,), (32,), 0, arguments)) == [PROGRAMS]


@pytest.mark.parametrize("steps", [1, 5, 8])
def test_a_ring_of_buffers(steps: int) -> None:
    x, out = np.arange(32 * steps, dtype="f4"), np.zeros(32, "f4")
    assert kinds(run(PTX, "ring", (1,), (64,), 0, [x, out, steps])) == []
    assert (out == x.reshape(steps, 32).sum(0)).all()


def test_a_kernel_has_to_be_named_where_there_are_several() -> None:
    with pytest.raises(ValueError, match=r"kernel: got None; needs one of \['block_sums', 'last_block', 'ring'\]"):
        run(PTX, None, (1,), (32,), 0, [])
