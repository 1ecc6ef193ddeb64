"""Progress in budget units with time left: bars on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

LINE_SECONDS = 30.0


@dataclass(frozen=True)
class Bar:
    """One line of the display: `spent` of `planned` units of `currency`, and what is going on."""

    name: str
    spent: float
    planned: float
    currency: str
    message: str = ""

    @property
    def text(self) -> str:
        """Amounts as people write them: 1.2M/56M tokens."""
        unit = {"tokens_generated": "tokens"}.get(self.currency, self.currency)
        return f"{short(self.spent)}/{short(self.planned)} {unit}"

    @property
    def percent(self) -> float:
        """Share of the plan that is spent, in percent."""
        return 100.0 * self.spent / self.planned if self.planned else 100.0


def short(amount: float) -> str:
    """An amount in at most three significant digits with its thousands as a letter: 950, 1.25k, 56M, 3.1G."""
    for size, letter in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(amount) >= 0.9995 * size:
            return f"{amount / size:.3g}{letter}" if abs(amount) < 999.5 * size else f"{amount / size:.0f}{letter}"
    return f"{amount:.3g}" if abs(amount) < 999.5 else f"{amount:.0f}"


def duration(seconds: float) -> str:
    """A time span in its two leading units: 45 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    whole = round(seconds)
    for size, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {name}" + (f" {rest} {part_name}" if rest else "")
    return f"{whole} s"


class TimeLeft:
    """Time left by the pace since this process began to look, so that a resumed run is not flattered.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: tuple[float, float] | None = None

    def seconds(self, spent: float, planned: float) -> float | None:
        """Seconds until `planned` is spent, or None before any pace is known."""
        now = self._clock()
        if self._first is None:
            self._first = (now, spent)
        elapsed, gained = now - self._first[0], spent - self._first[1]
        if spent >= planned:
            return 0.0
        return elapsed / gained * (planned - spent) if gained > 0 and elapsed > 0 else None


class Display:
    """Shows a total and the bars of what is running now. Use as a context manager.

    Args:
        console: where to show it (standard error by default).
        clock: seconds, monotonic.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._left = TimeLeft(clock)
        self._last_line: float | None = None
        self._tasks: dict[str, TaskID] = {}
        self._bars: Progress | None = None
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.fields[text]}"),
                TextColumn("{task.fields[message]}"),
                console=self._console,
                transient=True,
            )

    def __enter__(self) -> Display:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, total: Bar, running: Sequence[Bar] = ()) -> None:
        """Show the present state; on a plain stream one line at once and then one every 30 seconds."""
        left = self._left.seconds(total.spent, total.planned)
        remaining = "" if left is None else f"{duration(left)} left"
        if self._bars is None:
            self._line(total, running, remaining)
            return
        # The total keeps its key, and so its place on top, while its name counts cells.
        shown = {"": replace(total, message=remaining), **{bar.name: bar for bar in running}}
        for key in set(self._tasks) - set(shown):
            self._bars.remove_task(self._tasks.pop(key))
        for key, bar in shown.items():
            if key not in self._tasks:
                self._tasks[key] = self._bars.add_task(bar.name, text="", message="")
            self._bars.update(
                self._tasks[key],
                description=bar.name,
                total=bar.planned,
                completed=bar.spent,
                text=bar.text,
                message=bar.message,
                refresh=True,
            )

    def _line(self, total: Bar, running: Sequence[Bar], remaining: str) -> None:
        now = self._clock()
        if self._last_line is not None and now - self._last_line < LINE_SECONDS:
            return
        self._last_line = now
        parts = [f"{total.name}: {total.text} ({total.percent:.0f} %)"]
        parts += [remaining] if remaining else []
        parts += [", ".join(f"{bar.name} {bar.percent:.0f} %" for bar in running)] if running else []
        self.note("; ".join(parts))
