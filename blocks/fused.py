"""Whether fused kernels can run here: `blocks/kernels.py` and `distill/kernels.py` need Triton."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


@cache
def kernels_in(package: str) -> ModuleType | None:
    """The module `kernels` of "blocks" or "distill"; None where Triton is not installed."""
    return import_module(f"{package}.kernels") if find_spec("triton") is not None else None
