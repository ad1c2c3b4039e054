"""Errors that a user can cause. Each message says what, where and what to do; the CLI prints it as one line."""

from __future__ import annotations

from collections.abc import Sequence


class NasError(Exception):
    """Base of all errors shown to the user without a traceback. `exit_code` is the process's exit status."""

    exit_code = 1


class ConfigError(NasError):
    """A wrong option, recipe key or value."""

    exit_code = 2


class DataError(NasError):
    """Text that cannot be read, or too little of it."""

    exit_code = 2


class UnsupportedModelError(NasError):
    """A parent (or a part of one) that this toolkit cannot take apart."""


class CheckpointError(NasError):
    """A checkpoint or run directory that is damaged, incomplete, of another parent, or that cannot be written."""


class InfeasibleBudgetError(NasError):
    """No architecture of the space fits.

    Attributes:
        smallest_gb: the smallest budget (GB, 1e9 bytes) that the space can reach under the other constraints.
        binding: the name of the constraint that cannot be met.
    """

    exit_code = 3

    def __init__(self, message: str, smallest_gb: float, binding: str) -> None:
        super().__init__(message)
        self.smallest_gb = smallest_gb
        self.binding = binding


def some_of(items: Sequence[str], limit: int = 3) -> str:
    """The first few of many names, for a message: "a, b, c and 7 more"."""
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")
