"""How long a run has taken, over all of its parts, and how long it may take."""

from __future__ import annotations

import time


class Clock:
    """Seconds of training.

    Args:
        before: of the run's earlier parts.
        minutes: that all of it may take; 0: any time.
    """

    def __init__(self, before: float, minutes: float) -> None:
        self._start = time.monotonic() - before
        self._limit = 60 * minutes

    @property
    def seconds(self) -> float:
        """Taken until now."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float | None:
        """Seconds until the limit, below 0 behind it; None: there is none."""
        return self._limit - self.seconds if self._limit else None

    @property
    def gone(self) -> float:
        """Share of the limit that was taken, 0 to 1; 0: there is none."""
        return min(1.0, self.seconds / self._limit) if self._limit else 0.0
