"""Device-seconds by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Clock:
    """Adds up the seconds of named phases, each second in exactly one (a nested phase pauses its parent).

    On CPU a second is a second of this process's CPU time, which a busy neighbour does not change; on a GPU it is
    wall time between synchronisations.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    _stack: list[str] = field(default_factory=list)
    _mark: float = 0.0

    def now(self) -> float:
        """Seconds on the clock: CPU time of this process, or wall time after a synchronisation on a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    def _charge(self) -> None:
        now = self.now()
        if self._stack:
            phase = self._stack[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._mark
        self._mark = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time inside to `name`."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def take(self) -> dict[str, float]:
        """The seconds since the last call, by phase, and start anew."""
        taken, self.seconds = self.seconds, {}
        return {name: round(value, 6) for name, value in taken.items()}
