"""What an FFN of any width takes on a device, for `nas fuse`: measured with CUDA graphs, or a datasheet's estimate.

A fused FFN does the arithmetic of its parts, and reads the same weights; what it saves is what each FFN pays however wide
it is: its norm, the residual stream read and written, the start of its kernels, multiplications too small for the device,
and with tensor parallelism one all-reduce. The roofline of `nas/datasheet.py` counts none of this, so `EstimatedFFNs` adds
it: for each FFN `STREAM_PASSES` times the stream through memory and `KERNELS` starts of `KERNEL_NS`, two assumptions of
ours and no vendor's figures. Better multiplications are not in an estimate; on a GPU all is measured, but the all-reduce
(`sync_us`), which one GPU cannot show.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from blocks.errors import ConfigError
from blocks.shape import ModelShape, rounded_width
from blocks.spec import FFNSpec
from nas.clock import Times
from nas.costs import DTYPE_BYTES, Scenario
from nas.datasheet import DATASHEETS, RooflineClock, find_datasheet, nearest_datasheet

if TYPE_CHECKING:
    import torch

    from nas.inference import Workshop
    from nas.progress import Reporter

STREAM_PASSES = 7  # norm: 1 read, 1 write; gate and up: 1 read; down: 1 write; sum: 2 reads, 1 write
KERNELS = 5  # norm, gate and up, activation, down, sum
KERNEL_NS = 1000  # an assumption: between two kernels of one CUDA graph
HERE, DEFAULT_SHEET = "device", "H100"
SHARE_OF_MEMORY = 0.5  # of what is free: what random weights may take


class FFNTimes(Protocol):
    """Says what one FFN takes in each phase of the scenario, on one of its `tp` GPUs.

    Attributes:
        name, device: as print names them.
        estimate: whether nothing was measured.
    """

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def estimate(self) -> bool: ...

    def ffn(self, width: int) -> Times:
        """One FFN of so many channels, with its norm and its sum."""
        ...


def run_times(times: FFNTimes, widths: Sequence[int]) -> tuple[Times, Times]:
    """FFNs of these widths one after another, and fused into one."""
    apart = sum((times.ffn(width) for width in widths), Times(0, 0))
    return apart, times.ffn(rounded_width(sum(widths)))


@dataclass(frozen=True)
class EstimatedFFNs:
    """A datasheet's roofline, and what every FFN pays however wide it is."""

    roofline: RooflineClock
    sync_ns: int = 0
    estimate: bool = True

    @property
    def name(self) -> str:
        return self.roofline.name

    @property
    def device(self) -> str:
        return self.roofline.device

    def ffn(self, width: int) -> Times:
        return self.roofline.subblock(FFNSpec("width", width)) + self.each

    @property
    def each(self) -> Times:
        """What an FFN pays however wide it is."""
        s, hidden = self.roofline.scenario, self.roofline.shape.hidden_size
        moved = STREAM_PASSES * hidden * DTYPE_BYTES[s.weight_dtype] / self.roofline.sheet.bandwidth * 1e9
        starts = KERNELS * KERNEL_NS + self.sync_ns
        return Times(round(s.batch * s.prompt_tokens * moved) + starts, round(s.batch * moved) + starts)


@dataclass(frozen=True)
class MeasuredFFNs:
    """Medians over rounds, by width; see nas/bench.py."""

    device: str
    taken: dict[int, Times]
    sync_ns: int = 0
    name: str = "measured here"
    estimate: bool = False

    def ffn(self, width: int) -> Times:
        return self.taken[width] + Times(self.sync_ns, self.sync_ns)


def ffn_times(
    clock: str | None,
    shape: ModelShape,
    scenario: Scenario,
    widths: Iterable[int],
    device: torch.device,
    sync_us: float,
    reporter: Reporter,
) -> FFNTimes:
    """Times of FFNs of the given widths.

    Args:
        clock: "device", a datasheet's name, or None: measured where the device is a GPU, else the H100's datasheet.
        sync_us: microseconds of one all-reduce, counted once an FFN where `tp` is above 1.

    Raises:
        ConfigError: for a clock that is neither, a `tp` that does not divide, or a device that does not hold the widest.
    """
    sync_ns = round(1000 * sync_us) if scenario.tp > 1 else 0
    clock = clock or (HERE if device.type == "cuda" else DEFAULT_SHEET)
    if clock != HERE:
        sheet = find_datasheet(clock)
        if sheet is None:
            raise ConfigError(
                f"--clock {clock}: no such datasheet{nearest_datasheet(clock)}; give {HERE} (measure here) or one of "
                f"{', '.join(DATASHEETS)} (a profile of `nas bench` has no fused widths)"
            )
        return EstimatedFFNs(RooflineClock(sheet, shape, scenario), sync_ns)
    return measure_ffns(shape, scenario, widths, device, sync_ns, reporter)


def measure_ffns(
    shape: ModelShape,
    scenario: Scenario,
    widths: Iterable[int],
    device: torch.device,
    sync_ns: int,
    reporter: Reporter,
    rounds: int | None = None,
) -> MeasuredFFNs:
    """Each width as a slope over chains of it, as `nas bench` measures candidates, with random weights."""
    import torch

    from nas.bench import WARM_SECONDS, Bench, device_name, effort_for
    from nas.inference import inference
    from nas.timing import make_timer

    specs = [FFNSpec("width", width) for width in sorted(set(widths))]
    try:
        with inference():
            workshop = make_workshop(shape, scenario, device, [spec.width for spec in specs])
            bench = Bench(workshop, make_timer(device), effort_for(device, rounds), specs, {})
            bench.build(reporter)
            bench.measure(reporter, WARM_SECONDS if device.type == "cuda" else 0.0)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{device} has too little memory for an FFN of {specs[-1].width} channels at batch {scenario.batch}, prompt "
            f"{scenario.prompt_tokens}; lower them, raise --tp, or estimate: --clock H100"
        ) from error
    return MeasuredFFNs(device_name(device), {spec.width: bench.measured(str(spec)).times for spec in specs}, sync_ns)


def make_workshop(
    shape: ModelShape, scenario: Scenario, device: torch.device, widths: Sequence[int], values: int | None = None
) -> Workshop:
    """Builds FFNs of these widths out of one ring of random weights, of `values` or else room for all, twice the widest."""
    from nas.engine import free_memory
    from nas.inference import ALIGNMENT, WEIGHT_SCALE, Ring, Rotary, Sizes, Workshop, largest_tensor

    # No layer is like the parent's: only the widest FFN and the ends say how large the largest tensor is.
    sizes = Sizes(replace(shape, intermediate_size=max(widths)), scenario, device)
    layers = [3 * shape.hidden_size * width // scenario.tp + 4 * ALIGNMENT for width in widths]
    room = int(SHARE_OF_MEMORY * free_memory(device)) // DTYPE_BYTES[scenario.weight_dtype]
    wanted = values or min(max(sum(layers), 2 * max(layers)), room)
    weights = Ring(max(wanted, largest_tensor(sizes)), sizes.dtype, device, WEIGHT_SCALE)
    return Workshop(sizes, weights, Ring(0, sizes.kv_dtype, device, 1.0), Rotary.of(sizes))
