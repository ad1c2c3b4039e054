"""Shared by all tests: one thread, repeatable hypothesis examples, and sweeps over tiny random parents."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from app import World, build_world
from hypothesis import settings
from tiny import tiny_llama

from blocks.parent import open_parent
from blocks.sweep import Sweep

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("repeatable")
torch.set_num_threads(1)  # sums are bit-equal only for equal numbers of threads


@pytest.fixture(scope="session")
def tiny_sweep(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Sweep]:
    """`tiny_sweep(seed=0, **overrides)`: an fp32 CPU sweep over a `tiny_llama`, built once per set of arguments.

    Its batches hold 128 tokens, so that every test with more text goes through several of them.
    """
    built: dict[str, Sweep] = {}

    def build(seed: int = 0, **overrides: Any) -> Sweep:
        key = repr((seed, sorted(overrides.items())))
        if key not in built:
            directory: Path = tiny_llama(tmp_path_factory.mktemp("parent"), seed, **overrides)
            built[key] = Sweep(open_parent(str(directory)), torch.device("cpu"), tokens_per_batch=128)
        return built[key]

    return build


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny parent, text, and runs done up to each stage."""
    directory = tmp_path_factory.mktemp("world")
    return build_world(directory, tiny_llama(directory / "parent", initializer_range=0.1, intermediate_size=768))


@pytest.fixture
def own_remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child's model code is copied to where transformers keeps such code: here, not in the user's home, and for this test alone."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    package = "transformers_modules"
    monkeypatch.setitem(
        sys.modules, package, ModuleType(package)
    )  # so that what stands there now comes back, or nothing
    del sys.modules[package]
