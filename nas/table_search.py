"""`nas search --scores TABLE`: the arithmetic of a search on a score table alone, with no parent at hand.

The proven optimum under all limits, a pool of diverse near-optima, the best uniform choice, what binds and what more of it
would be worth. No child is built and no KL is measured: the table is believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blocks.errors import ConfigError, InfeasibleBudgetError
from blocks.files import save_json
from nas.config import SearchConfig
from nas.costs import Scenario
from nas.external import ExternalTable, load_external
from nas.limits import UNITS, Bound, as_limits, bounds_of, infeasible
from nas.run import digest
from nas.solve import Problem, Solution, solve_pool

PLACES = ("memory", "parameters", "kv", "ttft", "tpot", "request")


def run_table_search(path: Path, config: SearchConfig, scenario: Scenario, run: Path, dry_run: bool) -> dict[str, Any]:
    """Solves the table's problem; writes RUN/architecture.json (and family.json of a sweep) unless `dry_run`."""
    if (run / "config.yaml").exists():
        raise ConfigError(f"{run} is a run of a parent; give `nas search --scores` a --run of its own")
    if config.clock is not None:
        raise ConfigError("--clock prices a parent's candidates; a table says its own times (prefill_ms, decode_ms)")
    table = load_external(path, scenario)
    if not config.sweep:
        found = search_table(table, config, scenario, None)
    else:
        members = [search_table(table, config, scenario, share) | {"share": share} for share in config.shares]
        family = {"members": [_member(member) for member in members]}
        found = members[-1] | family
        if not dry_run:
            save_json(run / "family.json", family)
    if not dry_run:
        save_json(run / "architecture.json", found)
    return found


def search_table(table: ExternalTable, config: SearchConfig, scenario: Scenario, share: float | None) -> dict[str, Any]:
    """The optimum and the pool under a configuration's limits (and a share of the parent instead of its budget)."""
    bounds = bounds_of(config.ranges_at(share), table)
    amounts = {bound.name: table.amounts(bound.name) for bound in bounds}
    fixed = {bound.name: table.fixed.get(bound.name, 0) for bound in bounds}
    problem = Problem(table.scores, as_limits(bounds, fixed, amounts))
    try:
        pool = solve_pool(problem, config.verify, config.distance)
    except InfeasibleBudgetError:
        raise infeasible(problem, fixed, bounds, "; change a limit, or give more candidates") from None
    return _told(table, scenario, bounds, pool, uniform(table, problem))


def uniform(table: ExternalTable, problem: Problem) -> tuple[int, ...] | None:
    """The same candidate in every layer (of each subblock) within the limits, with the least total score."""
    kinds = sorted({subblock for _, subblock in table.groups})
    names = {kind: [row.name for row in rows] for (_, kind), rows in zip(table.groups, table.rows, strict=True)}
    choices: list[tuple[float, tuple[int, ...]]] = []
    pairs: list[dict[str, str]] = [{}]
    for kind in kinds:
        pairs = [{**pair, kind: name} for pair in pairs for name in names[kind]]
    places = [{row.name: place for place, row in enumerate(rows)} for rows in table.rows]
    for pair in pairs:
        wanted = [pair[kind] for _, kind in table.groups]
        if all(name in known for name, known in zip(wanted, places, strict=True)):
            choice = tuple(known[name] for name, known in zip(wanted, places, strict=True))
            if problem.feasible(choice):
                choices.append((problem.total_score(choice), choice))
    return min(choices)[1] if choices else None


def _told(
    table: ExternalTable,
    scenario: Scenario,
    bounds: Sequence[Bound],
    pool: Sequence[Solution],
    same: tuple[int, ...] | None,
) -> dict[str, Any]:
    best = pool[0]
    cost = _cost(table, scenario, best.choice)
    kept = {}
    for rows, own in zip(table.rows, table.parent, strict=True):
        for row in rows:
            of = rows[own].amounts
            limit = next((name for name in PLACES if of.get(name)), None)
            kept[row.name] = 1.0 if limit is None else row.amounts[limit] / of[limit]
    budget = next((bound.high for bound in bounds if bound.name == "memory"), None)
    told: dict[str, Any] = {
        "key": digest(str(table.path), asdict(scenario), [asdict(bound) for bound in bounds]),
        "table": str(table.path),
        "scenario": asdict(scenario) | {"prompt": scenario.prompt_tokens, "output": scenario.output_tokens},
        "limits": {bound.name: {"low": bound.low, "high": bound.high, "unit": UNITS[bound.name]} for bound in bounds},
        "clock": None,
        "budget_bytes": budget,
        "budget_gb": None if budget is None else budget / 1e9,
        "formula": ", ".join(f"{name} {cost[_field(name)]:,}" for name in PLACES if cost.get(_field(name)) is not None),
        "cost": cost,
        "parent_cost": _cost(table, scenario, table.parent),
        "predicted_kl": best.score,
        "optimum": {
            "score": best.score,
            "bound": best.bound,
            "gap": best.gap,
            "binding": list(best.binding),
            "prices": best.prices,
        },
        "groups": [[str(layer), subblock] for layer, subblock in table.groups],
        "kept": kept,
        "layers": table.names(best.choice),
        "pool": [{"predicted_kl": s.score, "totals": s.totals, "layers": table.names(s.choice)} for s in pool],
        "baselines": {},
        "trials": [],
    }
    if same is not None:
        scores = zip(table.scores, same, strict=True)
        predicted = sum(row[c] for row, c in scores)
        told["baselines"]["uniform"] = {
            "layers": table.names(same),
            "cost": _cost(table, scenario, same),
            "predicted_kl": predicted,
        }
    if (architecture := table.architecture(best.choice)) is not None:
        told |= {"layers": architecture.to_list(), "groups": [[str(n), "layer"] for n in range(len(architecture))]}
    return told


def _field(limit: str) -> str:
    """The key of a cost, as architecture.json has it, that a limit counts."""
    return {"memory": "total_bytes", "kv": "kv_bytes", "parameters": "parameters"}.get(limit, f"{limit}_ns")


def _cost(table: ExternalTable, scenario: Scenario, choice: Sequence[int]) -> dict[str, Any]:
    cost: dict[str, Any] = {_field(name): table.total(name, choice) for name in PLACES if table.knows(name)}
    if "total_bytes" in cost:
        cost["gb"] = cost["total_bytes"] / 1e9
    if cost.get("request_ns"):
        cost["tokens_per_s"] = scenario.batch * scenario.output_tokens / cost["request_ns"] * 1e9
    for name, limit in (("prefill_ms", "ttft_ns"), ("decode_ms", "tpot_ns")):
        cost[name] = cost[limit] / 1e6 if limit in cost else None
    return cost


def _member(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "share": found["share"],
        "gb": found["cost"].get("gb"),
        "parameters": found["cost"].get("parameters"),
        "predicted_kl": found["predicted_kl"],
        "layers": found["layers"],
        "directory": "-",
    }
