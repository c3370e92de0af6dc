"""A progress bar with the time left on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 15.0  # seconds between lines where there is no terminal


class Bar:
    """Counts to `total`: `with Bar("predicting", 100) as bar: bar.advance()`."""

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.total = total
        self.count = 0
        self._started = self._told = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> "Bar":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def expect(self, total: int, title: str) -> None:
        """Correct the total, and say what is being done now."""
        self.total, self.title = total, title
        if self._bar is not None:
            self._bar.update(self._task, total=total, description=title)

    def advance(self, count: int = 1) -> None:
        """One more is done, or several."""
        self.count += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.advance(self._task, count)
        elif now - self._told > EVERY and 0 < self.count < self.total:
            self._told = now
            left = (now - self._started) / self.count * (self.total - self.count)
            print(f"{self.title} {self.count}/{self.total}, {left:.0f} s left", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line above the bar, as it is: no markup."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)
