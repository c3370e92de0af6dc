"""Signals that ask a process to stop, and when to obey: at once, or where training can be continued from."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What a shell, a cluster's scheduler (SLURM's `--signal=USR1@90`) and Ctrl-C send."""

WORKER_GRACE = 120  # seconds that a loading process survives a SIGTERM, for its training process to finish and save


class Stopped(BaseException):
    """A signal asked to stop. Not an `Exception`: readers turn those into messages about damaged files.

    Attributes:
        signal: The number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signal = signum

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as of every command; else 143, which schedulers know as stopped on request."""
        return 130 if self.signal == signal.SIGINT else 143


class StopRequest:
    """Listens for the signals of `STOPPING` between `install` and `restore`.

    Attributes:
        signal: The first signal that came, or None.
        deferred: Whether to only note a signal. Training asks between two steps; anywhere else `Stopped` is raised
            where the signal arrives. A second Ctrl-C always raises it.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.deferred = False
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take the signals over, also from whoever took them since the last `install`. Needs the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOPPING:
            before = signal.signal(number, self._receive)
            self._before.setdefault(number, before)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a process forked from this one, which has not chosen a handler yet
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        again = self.signal is not None
        self.signal = self.signal or number
        if (not self.deferred and not again) or (again and number == signal.SIGINT):
            raise Stopped(self.signal)
        if not again:
            # os.write: print may not be entered again from within itself.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"stopping: finishing this step, then saving\n")


def leave_signals_to_parent() -> None:
    """In a loading process: outlive a signal sent to the whole group until the training process has saved.

    A loader that dies at once takes the training process down with a traceback. Should the training process not end
    its loaders, an alarm does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(WORKER_GRACE) and None)
