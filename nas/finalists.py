"""The last choice: diverse children are healed a little, and the one that heals best is taken.

KL before healing does not foresee the order after it (docs/search.md has the measurements), so the finalists differ in kind, not
only in score. They are healed by successive halving (Jamieson & Talwalkar, arXiv 1502.07943) over healing tokens: all of them
on a part of the tokens, the better half on twice as many, until one is left. Each goes on from its checkpoint, along one
schedule, so nothing is trained twice.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from optuna.trial import FrozenTrial

from blocks.checkpoint import load_child
from blocks.files import save_json
from blocks.parent import Parent
from blocks.rounded_model import round_model
from blocks.spec import Architecture, AttentionSpec
from distill.config import DistillConfig
from distill.trainer import heal
from nas.additive import Candidates
from nas.assemble import Assembler
from nas.config import to_dict
from nas.costs import CostModel
from nas.data import load_pack
from nas.measure import load_parent_model
from nas.progress import Reporter
from nas.run import Run, digest
from nas.rungs import rungs
from nas.solve import Limit, Problem, Solution, solve_with
from nas.study import architecture_of
from nas.trials import Trials, origin_of

CLOSE = 1.5  # a finalist's true KL is at most this many times the best one's
SHIFT = (
    0.35  # how far the variants move the attention's share of what is kept, towards the largest and the least possible
)
VARIANT_GAP = 1e-2


def variants(candidates: Candidates, optimum: Solution) -> dict[str, Architecture]:
    """Children of another kind than the optimum, within the same limits, each the best of its kind by score.

    attention-rich, ffn-rich    more of the attention kept than in the optimum, and less
    contiguous                  attentions left out in one run of layers
    """
    best = optimum.choice
    amounts = [[_attention(candidates.costs, spec.attention) for spec in specs] for specs in candidates.specs]
    now = sum(row[c] for row, c in zip(amounts, best, strict=True))
    most, least = (sum(end(row) for row in amounts) for end in (max, min))
    rich = Limit("attention", amounts, low=now + round(SHIFT * (most - now)))
    poor = Limit("attention", amounts, high=now - round(SHIFT * (now - least)))
    found = {"attention-rich": _with(candidates.problem, rich), "ffn-rich": _with(candidates.problem, poor)}
    found["contiguous"] = _contiguous(candidates, best)
    return {name: candidates.architecture(choice) for name, choice in found.items() if choice is not None}


def _attention(costs: CostModel, spec: AttentionSpec) -> int:
    return costs.shape.attention_parameters(spec)


def _with(problem: Problem, limit: Limit) -> tuple[int, ...] | None:
    solution = solve_with(problem, limit, gap=VARIANT_GAP)
    return None if solution is None else solution.choice


def _contiguous(candidates: Candidates, best: Sequence[int]) -> tuple[int, ...] | None:
    """As many attentions left out as in the optimum, in the one run of layers that costs least."""
    skips = [[spec.attention.kind == "skip" for spec in specs] for specs in candidates.specs]
    length = sum(row[c] for row, c in zip(skips, best, strict=True))
    if length < 2:
        return None
    found = []
    for start in range(len(skips) - length + 1):
        in_run = [start <= index < start + length for index in range(len(skips))]
        wrong = [[skip != inside for skip in row] for row, inside in zip(skips, in_run, strict=True)]
        if all(not all(row) for row in wrong):
            choice = _with(candidates.problem, Limit("pattern", [[int(x) for x in row] for row in wrong], high=0))
            if choice is not None:
                found.append((candidates.problem.total_score(choice), choice))
    return min(found)[1] if found else None


@dataclass(frozen=True)
class Finalist:
    """A child that is healed before the last choice."""

    name: str
    trial: FrozenTrial

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.trial.params)


def choose_finalists(trials: Trials, most: int) -> list[Finalist]:
    """The best child by true KL, then the best of each other kind that is not much worse, then the next best."""
    measured = trials.measured()
    close = [t for t in measured if t.value is not None and t.value <= CLOSE * (measured[0].value or 0.0)]
    kinds = ("attention-rich", "ffn-rich", "contiguous", "path", "around", "swap", "optimum", "pool")
    first_of_kind = [next((t for t in close if origin_of(t) == kind), None) for kind in kinds]
    chosen: dict[Architecture, Finalist] = {}
    for trial in (measured[0], *first_of_kind, *measured):
        if trial is not None and len(chosen) < most:  # workers that start at once may queue a child twice
            name = f"{trial.number:04d}-{origin_of(trial)}"
            chosen.setdefault(architecture_of(trial.params), Finalist(name, trial))
    return list(chosen.values())


@dataclass
class ShortHeals:
    """Heals finalists in the run directory, resumably.

        finalists/NAME/curve.json       what it is of, and the rounds that are done
        finalists/NAME/child, heal      while it is going on

    Attributes:
        study: names how the children were made and measured; what another one left under a name is not gone on with.
        where: directory within the run.
        config: of the whole heal, whose schedule the rounds go along.
    """

    run: Run
    study: str
    where: str
    parent: Parent
    assembler: Assembler
    weight_dtype: str
    config: DistillConfig
    device: torch.device
    reporter: Reporter
    _teacher: torch.nn.Module | None = None

    def choose(self, finalists: Sequence[Finalist]) -> tuple[Finalist, list[dict[str, Any]]]:
        """The finalist that heals best, and what was measured of each."""
        curves: dict[str, list[dict[str, Any]]] = {}
        left = list(finalists)
        rounds = rungs(len(finalists), self.config.tokens)
        for count, tokens in rounds:
            for finalist in left[:count]:
                key = digest(self.study, finalist.architecture.to_list(), to_dict(self.config), rounds)
                curves[finalist.name] = self._heal(finalist, tokens, key)
            left = sorted(left[:count], key=lambda finalist: curves[finalist.name][-1]["kl"])
            best = curves[left[0].name][-1]["kl"]
            self.reporter.say(f"  {count} finalists after {tokens:,} tokens: best {left[0].name}, KL {best:.4f}")
        told = [
            {
                "name": finalist.name,
                "origin": origin_of(finalist.trial),
                "layers": finalist.architecture.to_list(),
                "chosen": finalist is left[0],
                "heal": [{"tokens": 0, "kl": finalist.trial.value}, *curves[finalist.name]],
            }
            for finalist in finalists
        ]
        return left[0], told

    def _heal(self, finalist: Finalist, tokens: int, key: str) -> list[dict[str, Any]]:
        """Heals one finalist up to `tokens`; returns its curve, what it was after every round."""
        directory = self.run.path(self.where) / finalist.name
        until = max(1, math.ceil(tokens / self.config.step_tokens))
        known = self.run.read_if(f"{self.where}/{finalist.name}/curve.json")
        if not isinstance(known, dict) or known.get("key") != key:
            shutil.rmtree(directory, ignore_errors=True)
            save_json(directory / "curve.json", known := {"key": key, "rounds": []})
        curve: list[dict[str, Any]] = known["rounds"]
        if curve and curve[-1]["steps"] >= until:
            return curve
        if not (directory / "child" / "config.json").exists():
            child = self.assembler.assemble(finalist.architecture)
            self.assembler.write(child, directory / "child", self.weight_dtype)
        result = self._run(finalist.architecture, directory, until)
        done = {"tokens": result.tokens, "steps": result.steps, "kl": result.after.kl, "kl_se": result.after.kl_se}
        save_json(directory / "curve.json", {"key": key, "rounds": [*curve, done]})
        return [*curve, done]

    def _run(self, architecture: Architecture, directory: Path, until: int) -> Any:
        if self._teacher is None:
            self._teacher = load_parent_model(self.parent, self.device)
        student = load_child(directory / "child", rounded=False)
        if architecture.rounded:
            round_model(student, through=getattr(torch, self.weight_dtype))
        config = replace(self.config, qad=bool(architecture.rounded)).suited_to(architecture)
        data = self.run.path("data")
        packs = load_pack(data / "train.npy"), load_pack(data / "calibration.npy")
        with self.reporter.bar(f"Healing {directory.name}", until) as (bar, task):
            return heal(
                config,
                self._teacher,
                student,
                *packs,
                directory / "heal",
                on_step=lambda progress: bar.update(task, completed=progress.step),
                until=until,
            )

    def clear(self) -> None:
        """Removes the weights; the curves stay."""
        for directory in self.run.path(self.where).glob("*"):
            for name in ("child", "heal"):
                shutil.rmtree(directory / name, ignore_errors=True)


def short(config: DistillConfig, tokens: int) -> DistillConfig:
    """The healing of finalists: as `nas distill` heals on this device, but short, from the parent, and evaluated only at its ends."""
    tokens = max(tokens, config.step_tokens)
    return replace(config, teacher="parent", tokens=tokens, eval_every=0, checkpoint_every=0, eval_tokens=0)
