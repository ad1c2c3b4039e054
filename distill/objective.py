"""What a student is taught: one frozen dataclass, free of torch so that a configuration may hold it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from blocks.errors import ConfigError

LOSSES = ("kl", "jsd", "ce", "bld")


@dataclass(frozen=True)
class Objective:
    """The loss of a stage. Raises ConfigError for a value that cannot be meant."""

    loss: str = "kl"
    """"kl": forward KL(teacher || student). "jsd": the generalised Jensen-Shannon divergence, between forward and reverse
    KL. "ce": cross-entropy on the text itself, continual pretraining; needs no teacher. "bld": block-local, every layer
    of the student learns, apart from the others, what the teacher's layer makes of the teacher's residual stream."""

    jsd_beta: float = 0.5
    """Of "jsd": the teacher's share of the mixture. Near 0 the loss behaves like `jsd_beta` times forward KL, near 1 like
    1 - `jsd_beta` times reverse KL (arXiv 2306.13649)."""

    cosine: float = 0.0
    """Weight of a further term: 1 - cos(student's stream, teacher's stream) after each layer, the mean over the layers
    that both have. 0 leaves it out."""

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ConfigError(f"loss is {self.loss!r}; it must be {', '.join(LOSSES[:-1])} or {LOSSES[-1]}")
        if not 0 < self.jsd_beta < 1:
            raise ConfigError(
                f"jsd_beta is {self.jsd_beta!r}; it must lie between 0 and 1, both excluded (loss kl is its limit at 0)"
            )
        if not 0 <= self.cosine < math.inf:
            raise ConfigError(f"cosine is {self.cosine!r}; it must be 0 or a positive number")
        if self.loss == "bld" and self.cosine > 0:
            raise ConfigError(
                "cosine does not go with loss bld, whose layers never see the student's own stream; set 0"
            )

    @property
    def needs_teacher(self) -> bool:
        return self.loss != "ce" or self.cosine > 0

    @property
    def needs_streams(self) -> bool:
        """Whether it needs the teacher's residual stream after every layer."""
        return self.loss == "bld" or self.cosine > 0
