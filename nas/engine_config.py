"""Where the engine puts weights and activations: settings of the machine, not of the run."""

from __future__ import annotations

from dataclasses import dataclass

from blocks.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """Where weights and activations lie: speed and memory. Results stay the same to the bit; another batch size changes rounding."""

    weights: str = "auto"
    """"resident" on the device, "streamed" from disk layer by layer, or "auto": resident if they fit."""
    activations: str = "auto"
    """"device", "host" memory, "disk", or "auto": the first of them that is large enough."""
    tokens_per_batch: int | None = None
    """Tokens that go through a layer at a time; None takes about a gigabyte's worth on a GPU, 2,048 on a CPU."""

    def __post_init__(self) -> None:
        for name, known in (
            ("weights", ("auto", "resident", "streamed")),
            ("activations", ("auto", "device", "host", "disk")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"--{name} {getattr(self, name)}: not known; known: {', '.join(known)}")
        if self.tokens_per_batch is not None and self.tokens_per_batch < 1:
            raise ConfigError(f"tokens_per_batch is {self.tokens_per_batch}; it must be at least 1")
