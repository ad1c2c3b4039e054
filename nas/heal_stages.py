"""The stages of `nas distill`, out of a recipe and flags: with number formats, one of the master weights and one as it is served."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from blocks.errors import ConfigError
from distill.config import DistillConfig
from nas.config import STAGES, build, flag

OF_ONE_STAGE = ("loss", "data", "tokens", "sequence_length", "learning_rate", "qad", "teacher")
QAD_OPTIMIZER, QAD_RATE, QAD_WIDTH = "adamw", 1e-5, 4096
"""What a stage with qad does otherwise unless it is told (`qad_rate`)."""
FULL_RATE_KL = 0.5
"""Where nobody said at which rate: the KL from which on master weights are healed at the full one (docs/method.md)."""
QAD_SHARE = 0.25
"""Of the tokens, what the stage with qad gets that is added for a child with precisions."""
OF_QAD = ("qad", "teacher")
NOT_OF_ADDED = ("loss", "cosine", "tokens", "learning_rate", "optimizer")
"""Settings that are meant for the stage before the one with qad that is added."""


def qad_rate(width: int) -> float:
    """Peak learning rate of quantization-aware distillation of models of a hidden size.

    1e-6 to 1e-5 is published of large models (arXiv 2601.20088); the step that AdamW should take falls with the width (muP,
    arXiv 2203.03466). So 1e-5 at 4,096, 2.5e-6 at 16,384 and 7e-5 at 576, where 1e-5 leaves much unlearned (docs/benchmarks.md 23).
    """
    return QAD_RATE * QAD_WIDTH / width


def build_stages(
    recipe: dict[str, dict[str, Any]],
    flags: dict[str, Any],
    device: str,
    *,
    width: int = QAD_WIDTH,
    rounded: bool = False,
    qad_tokens: int | None = None,
    qad_learning_rate: float | None = None,
) -> list[DistillConfig]:
    """The stages of `nas distill`: those that the recipe lists, each over what it says of all, or the only one.

    Args:
        width: hidden size of the parent.
        rounded: the child has precisions. If nobody said what to do about it, a stage with qad follows the only one.
        qad_tokens, qad_learning_rate: of that stage; out of all tokens.
    """
    section = recipe.get("distill", {})
    stages: list[dict[str, Any]] = section.get(STAGES) or [{}]
    if len(stages) > 1:
        for name in OF_ONE_STAGE:
            if flags.get(name) is not None:
                raise ConfigError(f"{flag(name)}: the recipe has {len(stages)} stages; write {name} in each of them")
    if rounded and STAGES not in section and flags.get("qad") is None and "qad" not in section:
        return _with_qad(section, flags, device, width, qad_tokens, qad_learning_rate)
    for name, value in (("qad_tokens", qad_tokens), ("qad_learning_rate", qad_learning_rate)):
        if value is not None:
            of = "a child with precisions where no stages are given and neither --qad nor --no-qad"
            raise ConfigError(f"{flag(name)} is of the second stage of {of}; write {name.removeprefix('qad_')} instead")
    return [build_stage(section | stage, flags, device, width) for stage in stages]


def build_stage(section: dict[str, Any], flags: dict[str, Any], device: str, width: int) -> DistillConfig:
    """One stage: what is neither in the flags nor in the section, by what it learns and on which device. It stays on a CPU."""

    def said(name: str) -> Any:
        return section.get(name) if flags.get(name) is None else flags[name]

    own: dict[str, Any] = {}
    if said("qad"):
        own = {"optimizer": QAD_OPTIMIZER, "learning_rate": qad_rate(width)}
    elif said("learning_rate") is None and said("loss") in (None, "kl", "jsd"):
        own = {"full_rate_kl": FULL_RATE_KL}
    on_cpu = {"device": "cpu"} if device == "cpu" else {}
    return build(DistillConfig, {"distill": section}, flags | on_cpu, device, own)


def _with_qad(
    section: dict[str, Any],
    flags: dict[str, Any],
    device: str,
    width: int,
    tokens: int | None,
    learning_rate: float | None,
) -> list[DistillConfig]:
    """The only stage, of the master weights, and one with qad that takes its tokens from the first."""
    first = build_stage(_without(section, OF_QAD), _without(flags, OF_QAD), device, width)
    tokens = round(QAD_SHARE * first.tokens) if tokens is None else tokens
    if not 0 < tokens < first.tokens:
        raise ConfigError(
            f"--qad-tokens {tokens} of --tokens {first.tokens}: each stage needs some; write --qad or --no-qad for one stage"
        )
    own = {"qad": True, "tokens": tokens, "learning_rate": learning_rate}
    second = build_stage(_without(section, NOT_OF_ADDED), _without(flags, NOT_OF_ADDED) | own, device, width)
    return [replace(first, tokens=first.tokens - tokens), second]


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
