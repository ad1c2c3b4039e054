"""SIGTERM and Ctrl-C as a request to stop after the present step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from blocks.errors import NasError


class HealingStopped(NasError):
    """Healing was asked to stop and did, with a checkpoint written. `exit_code` is the shell's 128 + signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopRequest:
    """While entered, remembers SIGINT or SIGTERM in `signal_number` (0: none) instead of dying of it.

    What is done in it may end all the same; it then raises HealingStopped, so that nothing is begun after it.

    A second Ctrl-C acts as usual, for the impatient. A second SIGTERM does not: schedulers and torchrun both send one, to the
    same processes. Outside the main thread, where Python allows no handlers,
    it does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal_number = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self.signal_number and kind is None:
            raise HealingStopped(
                "healing stopped; what is done is written. Run the same command again to go on", self.signal_number
            )

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = self.signal_number or number

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
