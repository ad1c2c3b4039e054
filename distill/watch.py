"""What stops healing early: a loss that is not finite or leaps up, and held-out text on which nothing gets better."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping

WINDOW = 50
FEWEST = 20


class LossWatch:
    """Says what is wrong with a step's loss.

    Args:
        spike: how many times the mean of the last `WINDOW` losses is too much; 0 is never. The first `FEWEST` are not judged.
        recent: the losses before, oldest first, of a run that is gone on with.
    """

    def __init__(self, spike: float, recent: Iterable[float] = ()) -> None:
        self._spike = spike
        self._recent = deque(recent, maxlen=WINDOW)

    def fault(self, loss: float, gradient_norm: float) -> str | None:
        """Why the step must not be taken; None if it may, and then its loss counts among the recent ones."""
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return f"loss {loss} and gradient norm {gradient_norm}"
        if self._spike and len(self._recent) >= FEWEST:
            mean = sum(self._recent) / len(self._recent)
            if loss > self._spike * mean:
                return f"loss {loss:.4g}, {loss / mean:.1f} times the mean {mean:.4g} of the last {len(self._recent)} steps,"
        self._recent.append(loss)
        return None

    @property
    def recent(self) -> list[float]:
        return list(self._recent)


def has_settled(distance_by_step: Mapping[int, float], patience: int) -> bool:
    """Whether the last `patience` evaluations brought nothing lower than the ones before; never if that is 0."""
    values = [distance for _, distance in sorted(distance_by_step.items())]
    return 0 < patience < len(values) and min(values[-patience:]) >= min(values[:-patience])
