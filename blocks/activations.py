"""Where activations lie, and how they come to the device batch by batch.

    device    on the device that computes: nothing is copied
    host      in page-locked host memory: a parent or a text larger than the device
    disk      in a file that vanishes when the tensor does: larger than host memory, too

The code that reads and writes them is the same; for host and disk the next batch is copied while this one is computed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

PLACES = ("device", "host", "disk")


@dataclass(frozen=True)
class Activations:
    """A place for activations.

    Attributes:
        device: where batches are computed.
        place: one of `PLACES`.
        directory: of the files, for "disk"; None takes the system's temporary directory.
    """

    device: torch.device
    place: str = "device"
    directory: Path | None = None

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor in this place."""
        if self.place == "device":
            return torch.empty(shape, dtype=dtype, device=self.device)
        if self.place == "host":
            return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        with tempfile.NamedTemporaryFile(dir=self.directory, prefix=".activations-") as file:
            size = prod(shape)
            file.truncate(size * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)

    def read(self, batches: Iterable[slice], *tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """(batch, its part of each tensor on the device) for slices of the first dimension; the next one is on its way."""
        if self.place == "device" or self.device.type != "cuda":
            for batch in batches:
                yield batch, [tensor[batch].to(self.device) for tensor in tensors]
            return
        copying, computing = copy_stream(self.device, "activations"), torch.cuda.current_stream(self.device)

        def fetch(batch: slice) -> tuple[slice, list[Tensor]]:
            copying.wait_stream(computing)  # what is computed now may still be writing these tensors
            with torch.cuda.stream(copying):
                return batch, [tensor[batch].to(self.device, non_blocking=True) for tensor in tensors]

        waiting: tuple[slice, list[Tensor]] | None = None
        for batch in batches:
            fetched = fetch(batch)
            if waiting is not None:
                yield waiting
            computing.wait_stream(copying)
            for part in fetched[1]:
                part.record_stream(computing)
            waiting = fetched
        if waiting is not None:
            yield waiting

    def write(self, to: Tensor, batch: slice, values: Tensor) -> None:
        """Puts a computed batch in its place."""
        to[batch].copy_(values, non_blocking=True)


@cache
def copy_stream(device: torch.device, what: str) -> torch.cuda.Stream:
    """The one CUDA stream that carries `what` to the device: memory is pooled by stream, so each has to be used again."""
    return torch.cuda.Stream(device)
