"""Stopwatches: CUDA graphs between events on a GPU, plain calls on a CPU. Both take a pass over many works at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch

from nas.progress import Advance

Work = Callable[[], object]
LEAD_IN_SIZE, LEAD_IN_REPEATS = 4096, 24  # bf16 matrix products before a pass: about 4 ms on a Hopper GPU


class Timer(Protocol):
    """Prepares works once, and times them again and again."""

    def prepare(self, work: Work) -> Work:
        """Runs `work` warm and returns what to give to `time`."""
        ...

    def time(self, works: Sequence[Work], advance: Advance) -> list[float]:
        """Nanoseconds of each prepared work, run once each in this order."""
        ...


class CallTimer:
    """For a CPU."""

    def prepare(self, work: Work) -> Work:
        work()
        return work

    def time(self, works: Sequence[Work], advance: Advance) -> list[float]:
        taken = []
        for work in works:
            started = time.perf_counter_ns()
            work()
            taken.append(float(time.perf_counter_ns() - started))
            advance()
        return taken


class GraphTimer:
    """For a GPU: each work is one CUDA graph; a pass is queued whole, so that the device never waits for Python.

    The matrix products that lead in keep the clocks up and the device busy while the first graphs are queued. All graphs
    share one memory pool: they run one after another and nobody reads what they leave.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.pool: Any = torch.cuda.graph_pool_handle()
            self.factor = torch.randn(LEAD_IN_SIZE, LEAD_IN_SIZE, device=device, dtype=torch.bfloat16)
            self.product = torch.empty_like(self.factor)

    def prepare(self, work: Work) -> Work:
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                work()  # libraries choose their kernels and workspaces at the first call, which a graph cannot hold
            self.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                work()
            with torch.cuda.stream(self.stream):
                graph.replay()  # one that cannot run fails here, where it was made
            self.stream.synchronize()
        return _Captured(graph, work)

    def time(self, works: Sequence[Work], advance: Advance) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(works) + 1)]
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            for _ in range(LEAD_IN_REPEATS):
                torch.matmul(self.factor, self.factor, out=self.product)
            works[0]()  # what the lead-in left in the cache is not the first work's to clean up
            marks[0].record()
            for work, mark in zip(works, marks[1:], strict=True):
                work()
                mark.record()
            self.stream.synchronize()
        for _ in works:
            advance()
        return [before.elapsed_time(after) * 1e6 for before, after in pairwise(marks)]


@dataclass(frozen=True)
class _Captured:
    """A graph, and the work it was captured from: the graph knows the work's tensors by address alone, and holds none."""

    graph: torch.cuda.CUDAGraph
    work: Work

    def __call__(self) -> None:
        self.graph.replay()


def make_timer(device: torch.device) -> Timer:
    return GraphTimer(device) if device.type == "cuda" else CallTimer()
