"""`nas search --sweep`: a child for each of several budgets, along one path from the parent to the smallest.

    family.json                 the members, a row each
    family/0.900/               one search each: architecture.json, path.json, child/ (study.journal is the run's)

Each search starts its path at the child that the one before found, so the whole family costs little more than its last
member. The last member is the run's own: `nas distill` heals it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from blocks.files import save_json
from blocks.parent import Parent
from blocks.spec import Architecture
from distill.config import DistillConfig
from nas.config import SearchConfig
from nas.costs import Scenario
from nas.progress import Reporter
from nas.run import Run
from nas.search import Search
from nas.search_problem import choose_kv_dtype, score_precisions

STEP = 0.05  # of the parent's share: the path between two members is walked in steps no longer than this


def run_family(
    run: Run,
    parent: Parent,
    config: SearchConfig,
    scenario: Scenario,
    device: torch.device,
    reporter: Reporter,
    healing: DistillConfig,
) -> dict[str, Any]:
    """Searches every budget that is not done and returns what it wrote to family.json."""
    score_precisions(run, parent, config, scenario, device, reporter)
    # One cache for the whole family: the one that suits its smallest member.
    scenario = choose_kv_dtype(run, parent.shape, config, scenario, reporter, config.shares[-1])
    before, start = 1.0, parent.shape.parent_architecture
    members: list[dict[str, Any]] = []
    for share in config.shares:
        steps = max(1, round((before - share) / STEP)) if config.path_steps else 0
        own = replace(config, path_steps=steps)
        where = f"family/{share:.3f}" if share != config.shares[-1] else "."
        reporter.say(f"Budget {share:g} of the parent, in {where}")
        search = Search(run, parent, own, scenario, device, reporter, healing, budget=share, start=start, where=where)
        done = search.done
        found = done or search.run_all()
        members.append(_member(share, where, found))
        if done is None:
            save_json(run.path("family.json"), {"members": members})
        before, start = share, Architecture.from_list(found["layers"])
    family = {"members": members}
    if run.read_if("family.json") != family:
        save_json(run.path("family.json"), family)
    return family


def _member(share: float, where: str, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "share": share,
        "gb": found["cost"]["gb"],
        "parameters": found["cost"]["parameters"],
        "predicted_kl": found["predicted_kl"],
        "kl": found["kl"],
        "heldout_kl": found["heldout"]["child"]["kl"],
        "tokens_per_s": found["cost"]["tokens_per_s"],
        "origin": found["origin"],
        "layers": found["layers"],
        "directory": where,
    }
