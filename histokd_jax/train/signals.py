"""Ctrl-C and SIGTERM as a request to stop at the next step, so that a checkpoint can be written first."""

from __future__ import annotations

import signal
import threading


class Interrupted(Exception):
    """Training stopped on request after writing a checkpoint; running the same command again continues."""


class StopRequest:
    """Context manager that turns SIGINT and SIGTERM into a flag. A second SIGINT stops at once.

    Outside the main thread (where Python allows no handlers) it only offers the flag.
    """

    def __init__(self):
        self.signal: int | None = None
        self._old: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def _handle(self, number, frame) -> None:
        del frame
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
