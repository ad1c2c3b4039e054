"""What a subblock costs in time: the interface, and the profile files that `nas bench` measures.

    load_clock("profiles/h200.json", shape, scenario)     measured on the device that the file names
    load_clock("H200", shape, scenario)                   a roofline from a datasheet: an estimate (nas/datasheet.py)

A time is that of one whole batch of the scenario, in one of `tp` GPUs. What they say to one another is not in it:
docs/clocks.md gives the definitions. Integers are nanoseconds, so that sums over layers are exact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from blocks.errors import CheckpointError, ConfigError, some_of
from blocks.files import save_json
from blocks.shape import ModelShape, as_built
from blocks.spec import BF16, Architecture, AttentionSpec, FFNSpec, LayerSpec
from nas.costs import Scenario

FORMAT = 1  # raised when an older reader would misread a newer profile
PHASES = ("prefill", "decode")
MS = 1e6  # nanoseconds


@dataclass(frozen=True)
class Times:
    """Nanoseconds of one whole batch.

    Attributes:
        prefill_ns: reading `prompt` tokens of each of `batch` sequences.
        decode_ns: generating one token for each of them, half-way through the output: attending `attended_tokens`.
    """

    prefill_ns: int
    decode_ns: int

    def __add__(self, other: Times) -> Times:
        return Times(self.prefill_ns + other.prefill_ns, self.decode_ns + other.decode_ns)


class Clock(Protocol):
    """Says how long the parts of a child take.

    Attributes:
        name: a profile's path, or "H100 datasheet".
        device: as the driver or the datasheet names it.
        estimate: whether nothing was measured; say so wherever a time is printed.
        fixed: what no choice changes: embedding, final norm, head, and what starting a step costs.
    """

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def estimate(self) -> bool: ...
    @property
    def fixed(self) -> Times: ...

    def layer(self, spec: LayerSpec) -> Times:
        """Attention and FFN of one layer as the child has it on disk. Raises ConfigError for one it cannot tell."""
        ...


def architecture_times(clock: Clock, architecture: Architecture) -> Times:
    """The whole child: the fixed part and every layer."""
    return sum((clock.layer(layer) for layer in architecture), clock.fixed)


def tokens_per_second(scenario: Scenario, prefill_ns: int, decode_ns: int) -> float:
    """Generated tokens per second: batch * output / (prefill + output * decode)."""
    return scenario.tokens_per_s(scenario.request_ns(prefill_ns, decode_ns))


def attended_tokens(scenario: Scenario) -> int:
    """Tokens that the timed decode step attends to, its own included: prompt + output / 2, rounded up."""
    return scenario.prompt_tokens + (scenario.output_tokens + 1) // 2


# One rank of `tp`


def part_of(what: str, size: int, tp: int) -> int:
    """One rank's part of `size`. Raises ConfigError if `tp` does not divide it."""
    if size % tp:
        raise ConfigError(f"--tp {tp} does not divide {what} ({size}); choose a --tp that divides it")
    return size // tp


def rank_kv_heads(spec: AttentionSpec, tp: int) -> int:
    """KV heads on one rank; heads are replicated where there are fewer than ranks. Raises ConfigError if neither divides."""
    if tp % spec.kv_heads == 0:
        return 1
    return part_of(f"the KV heads of {spec}", spec.kv_heads, tp)


# Profiles


@dataclass(frozen=True)
class Measured:
    """Medians over rounds of one subblock, or of the fixed part.

    Attributes:
        prefill_ms, decode_ms: one subblock in the middle of a model: the slope over chains of different lengths.
        prefill_spread, decode_spread: half the distance of the quartiles of the rounds, as a share of the median.
        prefill_chained_ms, decode_chained_ms: the long chain divided by its length, its start included.
    """

    prefill_ms: float
    decode_ms: float
    prefill_spread: float = 0.0
    decode_spread: float = 0.0
    prefill_chained_ms: float = 0.0
    decode_chained_ms: float = 0.0

    @property
    def times(self) -> Times:
        return Times(round(self.prefill_ms * MS), round(self.decode_ms * MS))


@dataclass(frozen=True)
class Check:
    """One assembled model: what the sum of its parts predicts, and what it took. Errors are shares of the measured time."""

    label: str
    architecture: tuple[str, ...]
    prefill_predicted_ms: float
    prefill_measured_ms: float
    decode_predicted_ms: float
    decode_measured_ms: float
    prefill_spread: float = 0.0
    decode_spread: float = 0.0

    @property
    def prefill_error(self) -> float:
        return self.prefill_predicted_ms / self.prefill_measured_ms - 1

    @property
    def decode_error(self) -> float:
        return self.decode_predicted_ms / self.decode_measured_ms - 1

    def to_json(self) -> dict[str, Any]:
        errors = {"prefill_error": self.prefill_error, "decode_error": self.decode_error}
        return asdict(self) | {"architecture": list(self.architecture)} | errors


@dataclass(frozen=True)
class Profile:
    """What `nas bench` measured on one device for one shape and scenario.

    Attributes:
        name: for print; not read back, a profile is named by its path.
        about: torch version, date, command, rounds and the like, for the record.
        entries: by candidate, "attention:kv1" or "ffn:768", widths as the child has them on disk.
    """

    name: str
    device: str
    shape: ModelShape
    scenario: Scenario
    fixed: Measured
    entries: Mapping[str, Measured]
    checks: tuple[Check, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self.name,
            "device": self.device,
            **self.about,
            "shape": asdict(self.shape),
            "scenario": asdict(self.scenario),
            "fixed": asdict(self.fixed),
            "entries": {name: asdict(entry) for name, entry in self.entries.items()},
            "checks": [check.to_json() for check in self.checks],
        }

    def save(self, path: Path) -> None:
        save_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Reads a profile. Raises CheckpointError if it is none, damaged, or of a newer format."""
        remedy = "make it anew with `nas bench`"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = content["format"]
            if not isinstance(found, int) or found > FORMAT:
                raise CheckpointError(
                    f"{path} is a profile of format {found!r}, newer than {FORMAT}; update this package, or {remedy}"
                )
            return _profile(str(path), content)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}; {remedy}") from error
        except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            detail = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"{path} is not a profile of `nas bench` ({detail}); {remedy}") from error


def _profile(name: str, content: dict[str, Any]) -> Profile:
    parts = {"format", "name", "device", "shape", "scenario", "fixed", "entries", "checks"}
    return Profile(
        name=name,
        device=str(content["device"]),
        shape=ModelShape(**content["shape"]),
        scenario=Scenario(**content["scenario"]),
        fixed=_measured(content["fixed"]),
        entries={key: _measured(value) for key, value in content["entries"].items()},
        checks=tuple(_check(check) for check in content["checks"]),
        about={key: value for key, value in content.items() if key not in parts},
    )


def _measured(content: dict[str, Any]) -> Measured:
    measured = Measured(**{key: float(value) for key, value in content.items()})
    if not all(0 <= getattr(measured, f"{phase}_ms") < float("inf") for phase in PHASES):
        raise ValueError("a time that is not a number of milliseconds")
    return measured


def _check(content: dict[str, Any]) -> Check:
    own = {key: value for key, value in content.items() if key in {f.name for f in fields(Check)}}
    return Check(**own | {"architecture": tuple(content["architecture"])})


@dataclass(frozen=True)
class ProfileClock:
    """A clock that was measured."""

    profile: Profile
    estimate: bool = False

    @property
    def name(self) -> str:
        return self.profile.name

    @property
    def device(self) -> str:
        return self.profile.device

    @property
    def fixed(self) -> Times:
        return self.profile.fixed.times

    def layer(self, spec: LayerSpec) -> Times:
        """Raises ConfigError naming the candidate that the profile lacks."""
        built = built_layer(self.profile.shape, spec)
        return self._time(built.attention) + self._time(built.ffn)

    def _time(self, spec: AttentionSpec | FFNSpec) -> Times:
        if spec.kind == "skip":
            return Times(0, 0)
        entry = self.profile.entries.get(str(spec))
        if entry is None and spec.precision != BF16:
            raise ConfigError(
                f"{self.name} has no time for {spec}: a profile of `nas bench` knows bf16 alone; price number formats by a "
                "datasheet (--clock H100), or leave --precisions out"
            )
        if entry is None:
            raise ConfigError(
                f"{self.name} has no time for {spec} (it has {some_of(sorted(self.profile.entries), 20)}); "
                "measure it: `nas bench` with a --space that holds it"
            )
        return entry.times


def built_layer(shape: ModelShape, spec: LayerSpec) -> LayerSpec:
    """The layer as a child has it on disk: FFN widths padded to multiples of 256."""
    _, (built,) = as_built(shape, Architecture((spec,)))
    return built


# Loading


def load_clock(text: str, shape: ModelShape, scenario: Scenario) -> Clock:
    """The clock that `text` names: the path of a profile, or a datasheet (A100, H100, H200, B200, L40S, RTX4090).

    Raises:
        ConfigError: for a name that is neither, with the nearest; for a profile of another shape or scenario, with what
            differs; for a `tp` that cannot share the parent out.
        CheckpointError: for a file that is no profile.
    """
    from nas.datasheet import DATASHEETS, RooflineClock, find_datasheet, nearest_datasheet

    sheet = find_datasheet(text)
    if sheet is not None:
        return RooflineClock(sheet, shape, scenario)
    path = Path(text)
    if not path.is_file():
        known = ", ".join(DATASHEETS)
        raise ConfigError(
            f"clock {text}: no such profile, and no datasheet of that name{nearest_datasheet(text)}; "
            f"give a file of `nas bench`, or one of {known}"
        )
    profile = Profile.load(path)
    require_same(profile, shape, scenario)
    return ProfileClock(profile)


def require_same(profile: Profile, shape: ModelShape, scenario: Scenario) -> None:
    """Raises ConfigError, saying what differs, if the profile was not measured for this shape and scenario."""
    mine, theirs = asdict(shape), asdict(profile.shape)
    different = [f"{key} {theirs[key]}, not {mine[key]}" for key in mine if mine[key] != theirs[key]]
    old, new = _timed(profile.scenario), _timed(scenario)
    different += [f"{key} {old[key]}, not {new[key]}" for key in new if old[key] != new[key]]
    if different:
        raise ConfigError(
            f"{profile.name} was measured for something else: {'; '.join(different)}; "
            "measure this one with `nas bench` and the same flags"
        )


def _timed(scenario: Scenario) -> dict[str, Any]:
    """What of a scenario changes a time: not how long the cache may grow, nor the reserve."""
    return {
        "--batch": scenario.batch,
        "--prompt": scenario.prompt_tokens,
        "--output": scenario.output_tokens,
        "--tp": scenario.tp,
        "--weight-dtype": scenario.weight_dtype,
        "--kv-dtype": scenario.kv_dtype,
    }
