"""Ctrl-C and SIGTERM: the run takes its step to the end, writes a checkpoint and says how to go on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from vitkernels.text import is_first

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop; `signal` is the number of the signal that asked."""

    def __init__(self, sentence: str, number: int = signal.SIGINT) -> None:
        super().__init__(sentence)
        self.signal = number


@dataclass
class Stop:
    """Whether a signal asked the run to stop: its number, or 0."""

    number: int = 0


@contextlib.contextmanager
def listening() -> Iterator[Stop]:
    """Note the first signal; the second one does what it would do without this."""
    stop, process = Stop(), os.getpid()
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main one alone
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        stop.number = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if os.getpid() == process and is_first():  # not a worker, forked with this handler
            os.write(2, b"\nvitkernels: stopping after this step; the same signal again stops at once\n")

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
