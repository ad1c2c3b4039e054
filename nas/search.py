"""`nas search`: the architecture that fits the budget and hurts least, and its child before healing.

The additive problem (sum of scores, sum of bytes) is solved exactly; the best few of its solutions are assembled,
refitted and measured by true KL on calibration text, beside the uniform baseline; the best measured one is written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from blocks.errors import CheckpointError, InfeasibleBudgetError
from blocks.files import remove_directory, save_json
from blocks.library import BlockLibrary
from blocks.parent import Parent
from blocks.shape import ModelShape
from blocks.spec import Architecture, LayerSpec
from nas.assemble import Assembler, Child
from nas.config import SearchConfig, to_dict
from nas.costs import CostModel, Scenario
from nas.data import load_pack, to_tokens
from nas.engine import make_sweep
from nas.measure import measure
from nas.progress import Reporter
from nas.run import Run, digest
from nas.score import build_again
from nas.solve import Problem, Solution, solve_pool
from nas.study import Ledger
from nas.table import ScoreRow, load_table


@dataclass(frozen=True)
class Candidates:
    """The score table as the additive problem of one budget."""

    table: list[list[ScoreRow]]
    costs: CostModel
    budget_bytes: int

    @property
    def specs(self) -> list[list[LayerSpec]]:
        return [[row.spec for row in rows] for rows in self.table]

    def problem(self) -> Problem:
        return Problem(
            scores=[[row.score for row in rows] for rows in self.table],
            costs=[[self.costs.layer_bytes(spec) for spec in specs] for specs in self.specs],
            limit=self.budget_bytes - self.costs.fixed_bytes,
        )

    def architecture(self, choice: Sequence[int]) -> Architecture:
        return Architecture(tuple(specs[c] for specs, c in zip(self.specs, choice, strict=True)))

    def predicted(self, architecture: Architecture) -> float:
        """Sum of the scores: the additive prediction of the child's KL."""
        return sum(
            next(row.score for row in rows if row.spec == spec)
            for rows, spec in zip(self.table, architecture, strict=True)
        )  # fmt: skip

    def pool(self, size: int, distance: int) -> list[Solution]:
        """The exact optimum first. Raises InfeasibleBudgetError with the smallest budget and what binds."""
        try:
            return solve_pool(self.problem(), size, distance)
        except InfeasibleBudgetError:
            raise self._infeasible() from None

    def uniform(self) -> Architecture | None:
        """The same candidate in every layer, no skips: of those within the budget, the one with the least total score."""
        fitting: list[tuple[float, Architecture]] = []
        for spec in self.specs[0]:
            everywhere = all(spec in specs for specs in self.specs)
            if "skip" in (spec.attention.kind, spec.ffn.kind) or not everywhere:
                continue
            architecture = Architecture.uniform(len(self.table), spec)
            if self.costs.cost(architecture).total_bytes <= self.budget_bytes:
                fitting.append((self.predicted(architecture), architecture))
        return min(fitting, key=lambda pair: pair[0])[1] if fitting else None

    def _infeasible(self) -> InfeasibleBudgetError:
        problem, fixed = self.problem(), self.costs.fixed_bytes
        smallest = problem.smallest_cost + fixed
        cheapest = [min(specs, key=self.costs.layer_bytes) for specs in self.specs]
        kv = sum(self.costs.layer_kv_bytes(spec) for spec in cheapest)
        parts = {
            "embeddings, head and final norm": fixed - self.costs.reserve_bytes,
            "the reserve": self.costs.reserve_bytes,
            "the KV cache of the smallest layers": kv,
            "the weights of the smallest layers": problem.smallest_cost - kv,
        }
        binding = max(parts, key=lambda name: parts[name])
        sizes = ", ".join(f"{name} {size / 1e9:.4f} GB" for name, size in parts.items())
        scenario = self.costs.scenario
        parent = self.costs.cost(self.costs.shape.parent_architecture).total_bytes
        share = -(-(smallest - fixed) * 10_000 // (parent - fixed)) / 10_000
        message = (
            f"no child of this space fits {self.budget_bytes / 1e9:.4f} GB: the smallest takes {_up(smallest)} GB ({sizes}); "
            f"what binds is {binding}. Raise --budget-gb to {_up(smallest)} (--budget to {share:.4f}) or more, or lower --batch {scenario.batch} or "
            f"--context {scenario.context}, or use a wider --space"
        )
        return InfeasibleBudgetError(message, smallest / 1e9, binding)


def _how_measured(config: SearchConfig) -> dict[str, Any]:
    """What the true KL of a child depends on: how many are measured does not matter."""
    return {name: value for name, value in to_dict(config).items() if name not in ("verify", "distance")}


def _up(size: int) -> str:
    """Bytes as GB, rounded up in the fourth digit."""
    return f"{-(-size // 100_000) / 10_000:.4f}"


def load_candidates(run: Run, shape: ModelShape, config: SearchConfig, scenario: Scenario) -> Candidates:
    """The run's score table under a budget. Raises CheckpointError if it is of another parent."""
    table = load_table(run.path("scores.csv"))
    if len(table) != shape.num_hidden_layers:
        raise CheckpointError(
            f"{run.path('scores.csv')} has {len(table)} layers, the parent {shape.num_hidden_layers}; run `nas score` again"
        )
    costs = CostModel(shape, scenario)
    if config.budget_gb is not None:
        budget = round(config.budget_gb * 1e9)  # int() would lose a byte of 0.0157 GB
    else:
        assert config.budget is not None
        budget = costs.budget_for_share(config.budget)
    return Candidates(table, costs, budget)


def run_search(
    run: Run, parent: Parent, config: SearchConfig, scenario: Scenario, device: torch.device, reporter: Reporter
) -> dict[str, Any]:
    """Does what is missing of `nas search` and returns what it wrote to architecture.json."""
    started = time.perf_counter()
    candidates = load_candidates(run, parent.shape, config, scenario)
    key_parts = {"search": to_dict(config), "scenario": asdict(scenario), "scores": run.path("scores.csv").read_text()}
    key = digest(key_parts)
    if run.has("architecture.json") and run.has("child/config.json"):
        done = run.read("architecture.json", "search")
        if done.get("key") == key:
            reporter.say(f"This search was done already: {run.path('architecture.json')}")
            return done
    pool = candidates.pool(config.verify, config.distance)
    proposals = [("pool", candidates.architecture(solution.choice)) for solution in pool]
    if (uniform := candidates.uniform()) is not None:
        proposals.append(("uniform", uniform))

    build_again(run, parent, device, reporter, [architecture for _, architecture in proposals])
    sweep = make_sweep(parent, device)
    data = run.path("data")
    assembler = Assembler(
        sweep=sweep,
        library=BlockLibrary(run.path("library")),
        fit_tokens=to_tokens(load_pack(data / "fit.npy"), None, device),
        verify_tokens=to_tokens(load_pack(data / "calibration.npy"), config.verify_tokens, device),
        pseudo_tokens=config.refit_pseudo_tokens if config.refit else None,
        reporter=reporter,
    )
    measured_with = digest(key_parts | {"search": _how_measured(config)})
    ledger = Ledger(run.path("study.journal"), f"search-{measured_with}", candidates.specs, candidates.budget_bytes)
    trials, children = _measure(candidates, proposals, assembler, ledger, reporter)
    best = children["child"]
    for name, child in children.items():
        assembler.write(child, run.path(name), scenario.weight_dtype)
        run.path("architecture.json").unlink(missing_ok=True)  # of an earlier search, whose child is gone now
    if uniform is None and run.has("uniform"):
        remove_directory(run.path("uniform"))
    directories = {name: run.path(name) for name in children}
    heldout = measure(parent, directories, load_pack(data / "heldout.npy"), device, reporter)
    result = {
        "key": key,
        "parent": run.config.parent,
        "fingerprint": run.fingerprint,
        "budget_bytes": candidates.budget_bytes,
        "budget_gb": candidates.budget_bytes / 1e9,
        "scenario": asdict(scenario),
        "formula": candidates.costs.formula(best.architecture),
        "cost": candidates.costs.cost(best.architecture).to_json(),
        "parent_cost": candidates.costs.parent_cost().to_json(),
        "uniform_cost": None if uniform is None else candidates.costs.cost(uniform).to_json(),
        "predicted_kl": candidates.predicted(best.architecture),
        "optimum": {"score": pool[0].score, "bound": pool[0].bound},
        "layers": best.architecture.to_list(),
        "uniform_layers": None if uniform is None else uniform.to_list(),
        "trials": trials,
        "heldout": heldout,
        "seconds": round(time.perf_counter() - started, 1),
    }
    save_json(run.path("architecture.json"), result)
    return result


def _measure(
    candidates: Candidates,
    proposals: list[tuple[str, Architecture]],
    assembler: Assembler,
    ledger: Ledger,
    reporter: Reporter,
) -> tuple[list[dict[str, Any]], dict[str, Child]]:
    """True KL of every proposal, remembered in the ledger; the best of all ("child") and the uniform one, assembled."""
    trials: list[dict[str, Any]] = []
    kept: dict[str, tuple[Architecture, Child | None]] = {}
    for number, (origin, architecture) in enumerate(proposals, 1):
        name = f"{origin} {number} of {len(proposals)}"
        total = candidates.costs.cost(architecture).total_bytes
        assert total <= candidates.budget_bytes
        predicted = candidates.predicted(architecture)
        kl, child = ledger.value(architecture), None
        if kl is None:
            child = assembler.assemble(architecture, name)
            kl = assembler.true_kl(child)
            ledger.record(architecture, origin, kl, total, predicted)
        reporter.say(f"  {name}: {total / 1e9:.4f} GB, predicted KL {predicted:.4f}, true KL {kl:.4f}")
        if kl < min((trial["kl"] for trial in trials), default=float("inf")):
            kept["child"] = architecture, child
        if origin == "uniform":
            kept["uniform"] = architecture, child
        trials.append({"name": name, "origin": origin, "kl": kl, "predicted_kl": predicted, "total_bytes": total})
    if min(trials, key=lambda trial: trial["kl"])["origin"] == "uniform":
        reporter.say(
            "  warning: the uniform baseline is the best child measured; try more --verify or calibration text"
        )
    # What an earlier session measured is assembled again, to the same weights.
    return trials, {
        name: child or assembler.assemble(architecture, f"the {name}") for name, (architecture, child) in kept.items()
    }
