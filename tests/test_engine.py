"""The arithmetic of memory against what is really alive, and the choice between arrangements."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import blocks.fit
from blocks.candidates import FitConfig, fit_layer
from blocks.errors import ConfigError
from blocks.shape import ModelShape
from blocks.sweep import Sweep
from nas import engine
from nas.engine import Arrangement, Work, choose, memory
from nas.engine_config import EngineConfig
from nas.plan import candidate_parameters
from search_spaces import load_space

CPU = torch.device("cpu")
SMALL = Work(4096, 4096, 512, 2, 16, 1_000_000, 300_000, 4)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that Python holds, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.holders: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes(), tensor)
        return result

    def hold(self, pointer: int, size: int, tensor: torch.Tensor) -> None:
        if self.holders.get(pointer, 0) == 0:
            self.now += size
            self.peak = max(self.peak, self.now)
        self.holders[pointer] = self.holders.get(pointer, 0) + 1
        weakref.finalize(tensor, self.release, pointer, size)

    def release(self, pointer: int, size: int) -> None:
        self.holders[pointer] -= 1
        if self.holders[pointer] == 0:
            self.now -= size


@pytest.mark.parametrize("sums", [torch.float32, torch.float64], ids=["as on a GPU", "as on a CPU"])
def test_fitting_takes_the_memory_that_is_planned(
    tiny_sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch, sums: torch.dtype
) -> None:
    """A wide FFN, where Gram, factor and temporaries are nearly all of it."""
    monkeypatch.setattr(blocks.fit, "sum_dtype", lambda device: sums)
    monkeypatch.setattr("blocks.merge.sum_dtype", lambda device: sums)
    monkeypatch.setattr(blocks.fit, "FEW_CHANNELS", 64)
    sweep = tiny_sweep(hidden_size=256, intermediate_size=1024, num_hidden_layers=1)
    shape = sweep.parent.shape
    specs = load_space("default").layer_candidates(shape, 1)[1:]
    stream, weights = sweep.embed(torch.randint(0, 256, (16, 32))), sweep.layer(0)
    with LiveBytes() as live:
        fit_layer(sweep, weights, stream, specs, FitConfig())
    how = Arrangement("resident", "device", 1, 128)
    kept = candidate_parameters(shape, specs, local=False)
    planned = memory(shape, 4, Work(512, 0, 0, 0, 0, kept, kept, 4), how, on_cpu=sums == torch.float64)
    deltas = 2 * 512 * 256 * 4  # what the parent adds to the stream; the rest of `activations` was there before
    assert live.peak == pytest.approx(planned.working + deltas, rel=0.3)


def test_memory_grows_where_it_should() -> None:
    shape = ModelShape(4096, 14336, 32, 32, 8, 128, 128256)
    work = Work(131_072, 131_072, 8192, 4, 16, 10**9, 2 * 10**8, 2)
    resident, streamed = (
        memory(shape, 2, work, Arrangement(weights, place, 1, 8192))
        for weights, place in (("resident", "device"), ("streamed", "host"))
    )
    assert resident.weights == 2 * shape.parameters(shape.parent_architecture)
    assert resident.elsewhere == 0 and streamed.elsewhere == resident.activations > 0 == streamed.activations
    assert streamed.device < 12e9 < resident.device
    fewer = memory(shape, 2, work, Arrangement("streamed", "host", 6, 8192))
    assert fewer.elsewhere < streamed.elsewhere / 2 and fewer.device == streamed.device


@pytest.mark.parametrize(
    ("free", "host", "expected"),
    [
        (20e9, 100e9, ("resident", "device", 1)),
        (10e9, 100e9, ("resident", "device", 6)),
        (3e9, 100e9, ("resident", "host", 1)),
        (3e9, 10e9, ("resident", "host", 6)),
        (1.7e9, 100e9, ("streamed", "host", 1)),
        (1.7e9, 1e6, ("streamed", "disk", 1)),
    ],
)
def test_the_first_arrangement_that_fits_is_taken(
    monkeypatch: pytest.MonkeyPatch, free: float, host: float, expected: tuple[str, str, int]
) -> None:
    """A model of 0.6 GB with 13.8 GB of everything on the device, and 1.4 GB if only one layer is."""
    shape = ModelShape(1024, 2048, 40, 16, 8, 64, 4096)
    monkeypatch.setattr(engine, "free_memory", lambda device: host if device.type == "cpu" else free)
    monkeypatch.setattr(engine, "free_disk", lambda directory: 1e12)
    work = Work(65_536, 65_536, 512, 2, 16, 1_000_000, 300_000, 2)
    how, need = choose(shape, 2, work, EngineConfig(tokens_per_batch=1024), torch.device("cuda"), None)
    assert (how.weights, how.activations, how.every) == expected
    assert need.device <= 0.9 * free


def test_what_does_not_fit_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ModelShape(1024, 2048, 40, 16, 8, 64, 4096)
    monkeypatch.setattr(engine, "free_memory", lambda device: 1e6)
    with pytest.raises(ConfigError, match=r"needs .* GB on cpu .* but 0\.0 GB are free on cpu; lower --fit-tokens"):
        choose(shape, 4, SMALL, EngineConfig(), CPU, None)


@pytest.mark.parametrize(("name", "value"), [("weights", "here"), ("activations", "ram"), ("tokens_per_batch", 0)])
def test_wrong_settings_are_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=str(value)):
        EngineConfig(**{name: value})
