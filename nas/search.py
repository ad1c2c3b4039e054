"""`nas search`: the architecture that meets the limits and hurts least, and its child before healing.

    1. the additive problem (sum of scores under every limit), solved to proven optimality; diverse near-optima
    2. baselines: uniform, depth only (two kinds), random
    3. the path: from the parent to the budget in steps, scored again around each child
    4. all of them assembled, refitted and measured by true KL, in an Optuna study that many workers may share; around the best
       one, candidates are scored again, and a sampler proposes what else to measure
    5. diverse finalists are healed a little, and the one that heals best is the child

What is done is in the run directory (study.journal, path.json, finalists/), so a search that was stopped goes on.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from optuna.trial import FrozenTrial, TrialState

from blocks.files import remove_directory, save_json
from blocks.library import BlockLibrary
from blocks.parent import Parent
from blocks.spec import Architecture
from distill.config import DistillConfig
from nas.assemble import Assembler
from nas.baselines import BASELINES, baselines
from nas.config import SearchConfig, to_dict
from nas.costs import Scenario
from nas.data import load_pack, to_tokens
from nas.engine import make_sweep
from nas.finalists import ShortHeals, choose_finalists, short, variants
from nas.limits import limits_told
from nas.measure import measure
from nas.path import Rescoring, Step, around, walk
from nas.precisions import KV_DTYPES, parse_precisions, to_score
from nas.progress import Reporter
from nas.run import Run, digest
from nas.samplers import make_sampler
from nas.score import build_again
from nas.search_problem import choose_kv_dtype, load_candidates, score_precisions
from nas.set_aside import set_aside_other_healing
from nas.solve import Solution
from nas.study import Ledger, architecture_of
from nas.trials import Trials, meets_limits, origin_of, pruner
from nas.turns import turn

FREE = ("trials", "finalists", "heal_tokens", "storage", "verify", "path_steps", "sampler", "prune")
"""Settings that another search with the same ledger may change: they say what is measured, not what comes out."""


def run_search(
    run: Run,
    parent: Parent,
    config: SearchConfig,
    scenario: Scenario,
    device: torch.device,
    reporter: Reporter,
    healing: DistillConfig | None = None,
) -> dict[str, Any]:
    """Does what is missing of `nas search` and returns what it wrote to architecture.json.

    Of several KV dtypes in the scenario it takes the one with the least predicted KL.
    """
    score_precisions(run, parent, config, scenario, device, reporter)
    scenario = choose_kv_dtype(run, parent.shape, config, scenario, reporter)
    search = Search(run, parent, config, scenario, device, reporter, healing or DistillConfig())
    if (done := search.done) is not None:
        reporter.say(f"This search was done already: {run.path('architecture.json')}")
        return done
    return search.run_all()


@dataclass
class Search:
    """One search of one run.

    Attributes:
        budget, start, where: of a member of a family: its share of the parent, the child that its path starts from, and
            the directory within the run that it is written to.
    """

    run: Run
    parent: Parent
    config: SearchConfig
    scenario: Scenario
    device: torch.device
    reporter: Reporter
    healing: DistillConfig
    budget: float | None = None
    start: Architecture | None = None
    where: str = "."

    def __post_init__(self) -> None:
        self.started = time.perf_counter()
        self.candidates = load_candidates(self.run, self.parent.shape, self.config, self.scenario, self.budget)
        self.warnings: list[str] = []

    # ---- what it is called

    @cached_property
    def _made_from(self) -> dict[str, Any]:
        limits = {bound.name: [bound.low, bound.high] for bound in self.candidates.bounds}
        scores = self.run.path("scores.csv").read_text()
        made: dict[str, Any] = {"scenario": asdict(self.scenario), "scores": scores, "limits": limits}
        if (precisions := self.candidates.precisions) is not None:
            used = to_score(parse_precisions(self.config.precisions), [self.scenario.kv_dtype])
            made["precisions"] = [[*key, score] for key, score in sorted(precisions.values.items()) if key[2] in used]
        return made

    @cached_property
    def key(self) -> str:
        healing = to_dict(short(self.healing, self.config.heal_tokens)) if self.config.finalists > 1 else None
        start = None if self.start is None else self.start.to_list()
        return digest(self._made_from, to_dict(self.config), healing, start)

    @cached_property
    def study_name(self) -> str:
        """The same for all settings that measure the same children alike."""
        measured_with = {name: value for name, value in to_dict(self.config).items() if name not in FREE}
        return f"search-{digest(self._made_from, measured_with)}"

    @property
    def done(self) -> dict[str, Any] | None:
        """What an earlier call of this very search wrote."""
        if not (self.run.has(f"{self.where}/architecture.json") and self.run.has(f"{self.where}/child/config.json")):
            return None
        found = self.run.read(f"{self.where}/architecture.json", "search")
        searched = found.get("unfused", found)  # `nas fuse` may have come after it
        return found if searched.get("key") == self.key else None

    # ---- stages

    def run_all(self) -> dict[str, Any]:
        """Every stage, each resumable."""
        optimum = self.candidates.optimum()
        trials = self.begin(optimum)
        trials.run()
        self.walk_path(trials)
        self.look_around(trials)
        trials.run(self.config.trials)
        with turn(self.run.path("config.yaml")):
            if (done := self.done) is not None:  # another worker in this directory was quicker
                return done
            chosen, finalists = self.choose(trials)
            return self.write(optimum, trials, chosen, finalists)

    def begin(self, optimum: Solution) -> Trials:
        """Opens the ledger and queues what is known before anything is measured."""
        sampler = make_sampler(self.config.sampler, self.candidates, self.config.seed)
        storage = self.config.storage or self.run.path("study.journal")
        ledger = Ledger(storage, self.study_name, self.candidates.specs, sampler, pruner(self.config.prune))
        trials = Trials(self.candidates, self.assembler, ledger, self.reporter, self.config.prune)
        wanted = [("optimum", self.candidates.architecture(optimum.choice))]
        wanted += list(self.baselines.items())
        pool = self.candidates.pool(self.config.verify, self.config.distance)[1:]
        wanted += [("pool", self.candidates.architecture(solution.choice)) for solution in pool]
        if self.config.finalists > 1:
            wanted += list(variants(self.candidates, optimum).items())
        for origin, architecture in wanted:
            ledger.queue(architecture, origin)
        self._build([architecture for _, architecture in wanted])  # all in one sweep
        return trials

    def walk_path(self, trials: Trials) -> None:
        """The path, step by step into path.json, and its last child into the queue."""
        if not self.config.path_steps:
            return
        if not self.has_library:
            self.reporter.say("  no path: it needs the block library on disk (`nas score --library keep`)")
            return
        with turn(self.run.path("config.yaml")):
            steps = self._walk()
        if steps and self.candidates.allows(steps[-1].architecture):
            trials.ledger.queue(steps[-1].architecture, "path")
            trials.run()

    def _walk(self) -> list[Step]:
        """Does what is missing of the path."""
        steps = self.path
        with self.reporter.bar("Path to the limits", self.config.path_steps) as (bar, task):
            bar.update(task, completed=len(steps))
            walking = walk(
                self.assembler, self.candidates, self.config.path_steps, self.rescoring, self.path_start, steps
            )
            for step in walking:
                steps = [*steps, step]
                rows = [
                    {
                        "progress": step.progress,
                        "layers": step.architecture.to_list(),
                        "predicted": step.predicted,
                        "kl": step.kl,
                    }
                    for step in steps
                ]
                save_json(
                    self.run.path(f"{self.where}/path.json"),
                    {"study": self.study_name, "start": self.path_start.to_list(), "steps": rows},
                )
                bar.update(task, completed=len(steps), note=f"KL {step.kl:.4f}, {step.predicted:.4f} foreseen")
        return steps

    @property
    def path_start(self) -> Architecture:
        return self.start or self.parent.shape.parent_architecture

    @property
    def path(self) -> list[Step]:
        """The steps of the path that are done."""
        if not self.run.has(f"{self.where}/path.json"):
            return []
        found = self.run.read(f"{self.where}/path.json", "search")
        if (found.get("study"), found.get("start")) != (self.study_name, self.path_start.to_list()):
            return []
        steps = [
            Step(row["progress"], Architecture.from_list(row["layers"]), row["predicted"], row["kl"])
            for row in found["steps"]
        ]
        return (
            steps if all(abs(s.progress - (n + 1) / self.config.path_steps) < 1e-9 for n, s in enumerate(steps)) else []
        )

    def look_around(self, trials: Trials) -> None:
        """Scores the candidates again around the best child and measures what they lead to, until that is no better."""
        if not (self.config.path_steps and self.has_library):
            return
        looked_at: set[int] = set()
        while (best := trials.best()) is not None and best.number not in looked_at:
            begun = len(trials.ledger.trials)
            if begun >= self.config.trials:
                return
            looked_at.add(best.number)
            for architecture, _ in around(
                self.assembler, self.candidates, architecture_of(best.params), self.rescoring
            ):
                trials.ledger.queue(architecture, "around")
            trials.run()

    def choose(self, trials: Trials) -> tuple[FrozenTrial, list[dict[str, Any]]]:
        """The child: the best by true KL or, with finalists, the one that heals best."""
        best = trials.best()
        assert best is not None  # the optimum is measured first
        if origin_of(best) in BASELINES:
            self._warn(
                f"the {origin_of(best)} baseline is the best child measured; score on more text, or raise --trials"
            )
        if self.config.finalists == 1:
            return best, []
        finalists = choose_finalists(trials, self.config.finalists)
        heals = ShortHeals(
            self.run,
            self.study_name,
            f"{self.where}/finalists",
            self.parent,
            self.assembler,
            self.scenario.weight_dtype,
            short(self.healing, self.config.heal_tokens),
            self.device,
            self.reporter,
        )
        chosen, told = heals.choose(finalists)
        heals.clear()
        return chosen.trial, told

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        self.reporter.say(f"  warning: {message}")

    def _build(self, architectures: Collection[Architecture]) -> None:
        """Candidates of these children that are not on disk (`nas score --library rebuild`)."""
        build_again(self.run, self.parent, self.device, self.reporter, architectures)

    @cached_property
    def has_library(self) -> bool:
        """Whether every candidate is on disk; scores around a child need them all."""
        return all(self.library.has(index) for index in self.parent.shape.layers)

    @cached_property
    def library(self) -> BlockLibrary:
        return BlockLibrary(self.run.path("library"))

    @cached_property
    def baselines(self) -> dict[str, Architecture]:
        return baselines(self.candidates, self.config.seed)

    @cached_property
    def assembler(self) -> Assembler:
        data, device = self.run.path("data"), self.device
        return Assembler(
            sweep=make_sweep(self.parent, device),
            library=self.library,
            fit_tokens=to_tokens(load_pack(data / "fit.npy"), None, device),
            verify_tokens=to_tokens(load_pack(data / "calibration.npy"), self.config.verify_tokens, device),
            pseudo_tokens=self.config.refit_pseudo_tokens if self.config.refit else None,
            reporter=self.reporter,
            kv=KV_DTYPES.get(f"kv-{self.scenario.kv_dtype}"),
            stored=getattr(torch, self.scenario.weight_dtype) if self.config.quantizer == "gptq" else None,
            build=None if self.has_library else lambda architecture: self._build([architecture]),
        )

    @cached_property
    def rescoring(self) -> Rescoring:
        score = self.run.config.score
        dtype = getattr(torch, score.compute_dtype)
        return Rescoring(self.config.path_tokens, score.label_samples, dtype, self.config.seed)

    # ---- results

    def write(
        self, optimum: Solution, trials: Trials, chosen: FrozenTrial, finalists: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Writes the child, the uniform baseline and architecture.json."""
        architecture, costs = architecture_of(chosen.params), self.candidates.costs
        children = {"child": architecture}
        if (uniform := self.baselines.get("uniform")) is not None:
            children["uniform"] = uniform
        elif self.run.has(f"{self.where}/uniform"):
            remove_directory(self.run.path(f"{self.where}/uniform"))
        if self.where == ".":
            set_aside_other_healing(self.run, self.key, self.reporter)  # it is of the child that goes now
        earlier = self.run.path(f"{self.where}/architecture.json")
        for name, wanted in children.items():
            child = self.assembler.assemble(wanted, f"the {name}" if self.config.refit else "")
            self.assembler.write(child, self.run.path(f"{self.where}/{name}"), self.scenario.weight_dtype)
            earlier.unlink(missing_ok=True)  # its child is gone now
        directories = {name: self.run.path(f"{self.where}/{name}") for name in children}
        pack = load_pack(self.run.path("data") / "heldout.npy")
        heldout = measure(self.parent, directories, pack, self.device, self.reporter)
        clock = costs.clock
        result = {
            "key": self.key,
            "parent": self.run.config.parent,
            "fingerprint": self.run.fingerprint,
            "shape": asdict(self.parent.shape),
            "scenario": self.scenario.to_json(),
            **limits_told(self.candidates.bounds),
            "clock": None
            if clock is None
            else {"name": clock.name, "device": clock.device, "estimate": clock.estimate},
            "formula": costs.formula(architecture),
            "cost": costs.cost(architecture).to_json(),
            "parent_cost": costs.parent_cost().to_json(),
            "uniform_cost": None if uniform is None else costs.cost(uniform).to_json(),
            "predicted_kl": self.candidates.predicted(architecture),
            "optimum": optimum.proof(),
            "precisions": list(parse_precisions(self.config.precisions)),
            "quantizer": self.config.quantizer,
            "layers": architecture.to_list(),
            "uniform_layers": None if uniform is None else uniform.to_list(),
            "kl": chosen.value,
            "kl_se": chosen.user_attrs.get("kl_se"),
            "origin": origin_of(chosen),
            "trials": [_told(trial) for trial in trials.ledger.finished],
            "baselines": self._baselines(trials),
            "path": [self._step(step) for step in self.path],
            "finalists": finalists,
            "heldout": heldout,
            "warnings": self.warnings,
            "seconds": round(time.perf_counter() - self.started, 1),
        }
        save_json(self.run.path(f"{self.where}/architecture.json"), result)
        return result

    def _baselines(self, trials: Trials) -> dict[str, Any]:
        told = {}
        for name, architecture in self.baselines.items():
            trial = trials.ledger.trial_of(architecture)
            measured = {} if trial is None else {"kl": trial.value, "kl_se": trial.user_attrs.get("kl_se")}
            cost = self.candidates.costs.cost(architecture).to_json()
            told[name] = {"layers": architecture.to_list(), "cost": cost, **measured}
        return told

    def _step(self, step: Step) -> dict[str, Any]:
        total = self.candidates.costs.cost(step.architecture).total_bytes
        layers = step.architecture.to_list()
        return {
            "progress": step.progress,
            "budget_bytes": total,
            "predicted_kl": step.predicted,
            "kl": step.kl,
            "layers": layers,
        }


def _told(trial: FrozenTrial) -> dict[str, Any]:
    """A trial for architecture.json."""
    facts = trial.user_attrs
    return {
        "number": trial.number,
        "origin": origin_of(trial),
        "state": "complete" if trial.state == TrialState.COMPLETE else "pruned",
        "kl": trial.value if trial.state == TrialState.COMPLETE else facts.get("kl_so_far"),
        "kl_se": facts.get("kl_se"),
        "predicted_kl": facts.get("predicted_kl"),
        "total_bytes": facts.get("total_bytes"),
        "parameters": facts.get("parameters"),
        "tokens_per_s": facts.get("tokens_per_s"),
        "within": meets_limits(trial),
        "layers": architecture_of(trial.params).to_list(),
    }
