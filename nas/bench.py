"""Measures what every candidate takes on this device, and checks the sum against assembled models: `nas bench`.

A subblock in the middle of a model costs the slope over chains: (T(long) - T(short)) / (long - short), where a chain is
that many copies of it, each with weights and a cache of its own, in one CUDA graph. What starting a graph costs is in both
and falls out; it is in the `fixed` part, which is measured as a graph of its own. Every round goes through all candidates
and all assembled models in a new order, so that they share clocks, power and temperature; times are medians over rounds.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blocks.errors import ConfigError
from blocks.shape import ModelShape
from blocks.spec import Architecture, AttentionSpec, FFNSpec
from nas.clock import MS, PHASES, Check, Measured, Profile, ProfileClock, architecture_times, built_layer
from nas.costs import Scenario
from nas.engine import free_memory
from nas.inference import Workshop, inference, run_chain, run_model
from nas.progress import Reporter
from nas.timing import Timer, Work, make_timer

Spec = AttentionSpec | FFNSpec
SPARE = 0.75  # of free memory: the rest is for activations and the libraries
WARM_SECONDS = 1.0  # a GPU at work before anything counts


@dataclass(frozen=True)
class Effort:
    """How much is done: rounds, and copies of a subblock in the short and the long chain of each phase."""

    rounds: int
    prefill: tuple[int, int]
    decode: tuple[int, int]

    def copies(self, phase: str) -> tuple[int, int]:
        return self.prefill if phase == "prefill" else self.decode


EFFORT = {"cuda": Effort(20, (2, 6), (4, 20)), "cpu": Effort(5, (1, 3), (1, 3))}


def effort_for(device: torch.device, repeats: int | None) -> Effort:
    """The device's defaults, with `repeats` rounds if given. Raises ConfigError for fewer than 1."""
    own = EFFORT[device.type]
    if repeats is not None and repeats < 1:
        raise ConfigError(f"--repeats must be at least 1, not {repeats}")
    return Effort(repeats or own.rounds, own.prefill, own.decode)


# Measuring


@dataclass(frozen=True)
class Series:
    """One thing that is timed: prepared works that run after one another, and nanoseconds of each, round by round."""

    works: dict[str, tuple[Work, ...]] = field(default_factory=dict)
    rounds: dict[str, list[list[float]]] = field(default_factory=lambda: {phase: [] for phase in PHASES})

    def nanoseconds(self, phase: str, work: int) -> list[float]:
        return [taken[work] for taken in self.rounds[phase]]


@dataclass
class Bench:
    """Everything that is timed in one scenario on one device, and the rounds done so far."""

    workshop: Workshop
    timer: Timer
    effort: Effort
    specs: Sequence[Spec]
    models: Mapping[str, Architecture]
    series: dict[str, Series] = field(default_factory=dict)
    rounds: int = 0

    def build(self, reporter: Reporter) -> None:
        """Makes and captures all chains and models."""
        self.series = {name: Series() for name in ("fixed", *map(str, self.timed), *self.models)}
        with reporter.task("Building", len(self.series)) as advance:
            self._add_fixed()
            advance()
            for spec in self.timed:
                self._add_chain(spec)
                advance()
            for label, architecture in self.models.items():
                self._add_model(label, architecture)
                advance()

    @property
    def timed(self) -> list[Spec]:
        """All but skips, which take no time."""
        return [spec for spec in self.specs if spec.kind != "skip"]

    def _add_fixed(self) -> None:
        ends = self.workshop.ends()
        for phase in PHASES:
            tokens = self.workshop.tokens(phase)
            self._prepare("fixed", phase, [partial(run_model, ends, (), phase, tokens)])

    def _add_chain(self, spec: Spec) -> None:
        copies = max(sum(self.effort.copies(phase)) for phase in PHASES)
        made = self.workshop.subblocks([spec] * copies)
        for phase in PHASES:
            short, long = self.effort.copies(phase)
            h = self.workshop.stream(phase)
            # No subblock is in both: the short chain must not leave the long one's weights in the cache.
            chains = [made[:short], made[short : short + long]]
            self._prepare(str(spec), phase, [partial(run_chain, chain, phase, h) for chain in chains])

    def _add_model(self, label: str, architecture: Architecture) -> None:
        shape = self.workshop.sizes.shape
        ends = self.workshop.ends()
        built = [built_layer(shape, layer) for layer in architecture]
        chain = self.workshop.subblocks([spec for layer in built for spec in (layer.attention, layer.ffn)])
        for phase in PHASES:
            tokens = self.workshop.tokens(phase)
            self._prepare(label, phase, [partial(run_model, ends, chain, phase, tokens)])

    def _prepare(self, name: str, phase: str, works: Sequence[Work]) -> None:
        self.series[name].works[phase] = tuple(self.timer.prepare(work) for work in works)

    def measure(self, reporter: Reporter, warm_seconds: float) -> None:
        """All rounds. A KeyboardInterrupt passes; whole rounds done before it count."""
        self._warm(reporter, warm_seconds)
        rng = random.Random(0)
        works = sum(len(series.works[phase]) for series in self.series.values() for phase in PHASES)
        with reporter.task("Measuring", self.effort.rounds * works) as advance:
            for _ in range(self.effort.rounds):
                order = rng.sample(list(self.series.values()), len(self.series))
                done = [
                    (series, phase, taken) for phase in PHASES for series, taken in self._pass(order, phase, advance)
                ]
                for series, phase, taken in done:
                    series.rounds[phase].append(taken)
                self.rounds += 1

    def _pass(self, order: Sequence[Series], phase: str, advance: Any) -> list[tuple[Series, list[float]]]:
        taken = iter(self.timer.time([work for series in order for work in series.works[phase]], advance))
        return [(series, [next(taken) for _ in series.works[phase]]) for series in order]

    def _warm(self, reporter: Reporter, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for phase in PHASES:
                self._pass(list(self.series.values()), phase, lambda: None)

    # Results

    def measured(self, name: str) -> Measured:
        """Of a candidate: slopes over its chains."""
        values: dict[str, float] = {}
        for phase in PHASES:
            short, long = self.effort.copies(phase)
            pairs = self.series[name].rounds[phase]
            slopes = [max(0.0, (b - a) / (long - short)) for a, b in pairs]
            values |= self._summary(phase, slopes)
            values[f"{phase}_chained_ms"] = self._whole(phase) * statistics.median(b for _, b in pairs) / long / MS
        return Measured(**values)

    def fixed(self) -> Measured:
        values: dict[str, float] = {}
        for phase in PHASES:
            values |= self._summary(phase, self.series["fixed"].nanoseconds(phase, 0))
            values[f"{phase}_chained_ms"] = values[f"{phase}_ms"]
        return Measured(**values)

    def check(self, label: str, clock: ProfileClock) -> Check:
        """An assembled model against the sum of its parts."""
        predicted = architecture_times(clock, self.models[label])
        values: dict[str, float] = {}
        for phase in PHASES:
            own = self._summary(phase, self.series[label].nanoseconds(phase, 0))
            values[f"{phase}_measured_ms"], values[f"{phase}_spread"] = own[f"{phase}_ms"], own[f"{phase}_spread"]
            values[f"{phase}_predicted_ms"] = getattr(predicted, f"{phase}_ns") / MS
        return Check(label, tuple(self.models[label].to_list()), **values)

    def _summary(self, phase: str, nanoseconds: Sequence[float]) -> dict[str, float]:
        middle = statistics.median(nanoseconds)
        return {f"{phase}_ms": self._whole(phase) * middle / MS, f"{phase}_spread": spread(nanoseconds)}

    def _whole(self, phase: str) -> int:
        """Runs of a graph that one whole batch takes."""
        return self.workshop.sizes.slices if phase == "prefill" else 1


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, as a share of the median; 0 of one value."""
    if len(values) < 2:
        return 0.0
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return (upper - lower) / 2 / middle if middle else 0.0


def run_bench(
    shape: ModelShape,
    scenario: Scenario,
    specs: Sequence[Spec],
    children: Mapping[str, Architecture],
    device: torch.device,
    effort: Effort,
    reporter: Reporter,
    out: Path,
    about: Mapping[str, Any] | None = None,
) -> Profile:
    """Measures `specs`, and the parent and `children` assembled, and writes the profile `out`.

    Stopped by Ctrl-C after at least one round, it writes what the rounds done so far say, and the interrupt passes.

    Args:
        children: architectures by label; each of their subblocks must be in `specs`.
        about: for the record: `command` and the like.

    Raises:
        ConfigError: if the device's memory does not hold it, or `tp` does not divide the parent.
    """
    models = {"parent": shape.parent_architecture, **children}
    warm_seconds = WARM_SECONDS if device.type == "cuda" else 0.0
    try:
        with inference():
            workshop = Workshop.open(shape, scenario, device, SPARE * free_memory(device))
            bench = Bench(workshop, make_timer(device), effort, specs, models)
            bench.build(reporter)
            try:
                bench.measure(reporter, warm_seconds)
            except KeyboardInterrupt:
                if bench.rounds:
                    write_profile(bench, shape, out, about or {})
                    reporter.say(f"{out} written from {bench.rounds} of {effort.rounds} rounds")
                raise
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{device} has too little memory for batch {scenario.batch}, prompt {scenario.prompt_tokens}, output "
            f"{scenario.output_tokens}; lower them, or raise --tp"
        ) from error
    return write_profile(bench, shape, out, about or {})


def write_profile(bench: Bench, shape: ModelShape, out: Path, about: Mapping[str, Any]) -> Profile:
    """What the rounds done so far say, written to `out`."""
    sizes = bench.workshop.sizes
    entries = {str(spec): Measured(0.0, 0.0) for spec in bench.specs}
    entries |= {str(spec): bench.measured(str(spec)) for spec in bench.timed}
    record = {**environment(), "rounds": bench.rounds, "prefill_slices": sizes.slices, **about}
    profile = Profile(str(out), device_name(sizes.device), shape, sizes.scenario, bench.fixed(), entries, about=record)
    clock = ProfileClock(profile)
    checks = tuple(bench.check(label, clock) for label in bench.models)
    profile = replace(profile, checks=checks)
    profile.save(out)
    return profile


def environment() -> dict[str, Any]:
    """Versions and the date, for the record."""
    from datetime import UTC, datetime

    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, "torch": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}


def device_name(device: torch.device) -> str:
    """As the driver or the system names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()} (CPU)"
