"""The stages of `nas distill`, out of a recipe and flags: a child with number formats learns as it is served, unless told otherwise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from blocks.errors import ConfigError
from distill.config import DistillConfig
from nas.config import STAGES, build, flag

OF_ONE_STAGE = ("loss", "data", "tokens", "sequence_length", "learning_rate", "qad", "teacher")
QAD_RATES, RATED_WIDTH = {"adamw": 7.1e-5, "muon": 1e-3}, 576
"""Peak learning rates of quantization-aware distillation by optimizer, and the hidden size that they were tried on (`qad_rate`)."""
FULL_RATE_KL = 0.5
"""Where nobody said at which rate: the KL from which on a child is healed at the full one (docs/method.md)."""
SECOND_SHARE = 0.25
"""Of the tokens, what the stage with qad gets where a child with precisions is healed in two."""
OF_QAD = ("qad", "teacher")
NOT_OF_SECOND = ("loss", "cosine", "tokens", "learning_rate")
"""Settings that are meant for the first of these two stages."""


def qad_rate(optimizer: str, width: int) -> float:
    """Peak learning rate of quantization-aware distillation of models of a hidden size, for a KL of `FULL_RATE_KL` and more.

    1e-6 to 1e-5 with AdamW is published of large models (arXiv 2601.20088); the step that an optimizer should take falls with
    the width (muP, arXiv 2203.03466). So with AdamW it is 1e-5 at 4,096, and 2e-6 of a child whose KL is 0.02.
    """
    return QAD_RATES[optimizer] * min(1.0, RATED_WIDTH / width)


def build_stages(
    recipe: dict[str, dict[str, Any]],
    flags: dict[str, Any],
    device: str,
    *,
    width: int = RATED_WIDTH,
    rounded: bool = False,
    qad_tokens: int | None = None,
    qad_learning_rate: float | None = None,
) -> list[DistillConfig]:
    """The stages of `nas distill`: those that the recipe lists, each over what it says of all, or the only one.

    Args:
        width: hidden size of the parent.
        rounded: the child has precisions. If nobody said what to do about it, the only stage is one with qad.
        qad_tokens, qad_learning_rate: given, such a child learns as its master weights first, and so in a second stage,
            which takes its tokens out of all.
    """
    section = recipe.get("distill", {})
    stages: list[dict[str, Any]] = section.get(STAGES) or [{}]
    if len(stages) > 1:
        for name in OF_ONE_STAGE:
            if flags.get(name) is not None:
                raise ConfigError(f"{flag(name)}: the recipe has {len(stages)} stages; write {name} in each of them")
    of_second = (("qad_tokens", qad_tokens), ("qad_learning_rate", qad_learning_rate))
    given = [name for name, value in of_second if value is not None]
    if rounded and STAGES not in section and flags.get("qad") is None and "qad" not in section:
        if given:
            return _in_two(section, flags, device, width, qad_tokens, qad_learning_rate)
        return [build_stage(section, flags | {"qad": True}, device, width)]
    for name in given:
        of = "a child with precisions where no stages are given and neither --qad nor --no-qad"
        raise ConfigError(f"{flag(name)} is of the second stage of {of}; write {name.removeprefix('qad_')} instead")
    return [build_stage(section | stage, flags, device, width) for stage in stages]


def build_stage(section: dict[str, Any], flags: dict[str, Any], device: str, width: int) -> DistillConfig:
    """One stage: what is neither in the flags nor in the section, by what it learns and on which device. It stays on a CPU."""

    def said(name: str) -> Any:
        return section.get(name) if flags.get(name) is None else flags[name]

    own: dict[str, Any] = {}
    if said("learning_rate") is None:
        if said("loss") in (None, "kl", "jsd"):
            own["full_rate_kl"] = FULL_RATE_KL
        if said("qad"):
            optimizer = said("optimizer") or build(DistillConfig, {}, {}, device).optimizer
            if optimizer in QAD_RATES:  # or DistillConfig refuses it
                own["learning_rate"] = qad_rate(optimizer, width)
    on_cpu = {"device": "cpu"} if device == "cpu" else {}
    return build(DistillConfig, {"distill": section}, flags | on_cpu, device, own)


def _in_two(
    section: dict[str, Any],
    flags: dict[str, Any],
    device: str,
    width: int,
    qad_tokens: int | None,
    qad_learning_rate: float | None,
) -> list[DistillConfig]:
    """A stage of the master weights, and one with qad that takes its tokens from the first."""
    first = build_stage(_without(section, OF_QAD), _without(flags, OF_QAD), device, width)
    tokens = round(SECOND_SHARE * first.tokens) if qad_tokens is None else qad_tokens
    if not 0 < tokens < first.tokens:
        raise ConfigError(
            f"--qad-tokens {tokens} of --tokens {first.tokens}: each stage needs some; leave it out for one stage alone"
        )
    if qad_learning_rate is not None and not 0 < qad_learning_rate < math.inf:
        raise ConfigError(f"--qad-learning-rate is {qad_learning_rate}; it must be a positive number")
    own = {"qad": True, "tokens": tokens, "learning_rate": qad_learning_rate}
    second = build_stage(_without(section, NOT_OF_SECOND), _without(flags, NOT_OF_SECOND) | own, device, width)
    return [replace(first, tokens=first.tokens - tokens), second]


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
