"""`nas search --scores TABLE`: the arithmetic of a search on a score table alone, with no parent at hand.

The proven optimum under all limits, a pool of diverse near-optima, the best uniform choice, what binds and what more of it
would be worth. No child is built and no KL is measured: the table is believed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import Any

from blocks.errors import CheckpointError, ConfigError, InfeasibleBudgetError
from blocks.files import save_json
from blocks.spec import AttentionSpec, FFNSpec, LayerSpec
from nas.config import SearchConfig
from nas.costs import Scenario
from nas.external import Candidate, ExternalTable, load_external
from nas.limits import Bound, as_limits, bounds_of, cost_field, infeasible, limits_told
from nas.run import digest
from nas.solve import Problem, Solution, extreme, solve_pool
from nas.table_fp8 import fp8_alone, subblock_size


def run_table_search(
    path: Path,
    config: SearchConfig,
    scenario: Scenario,
    run: Path,
    dry_run: bool,
    formats: Collection[str] | None = None,
) -> dict[str, Any]:
    """Solves the table's problem; writes RUN/architecture.json (and family.json of a sweep) unless `dry_run`.

    Args:
        formats: number formats that candidates may be in, beside bf16; None takes all that the table has.

    Raises:
        DataError: for a table that cannot be read or is not whole.
        ConfigError: for a run of a parent, and for limits and formats that the table says nothing of.
        InfeasibleBudgetError: if no choice meets the limits.
    """
    if (run / "config.yaml").exists():
        raise ConfigError(f"{run} is a run of a parent; give `nas search --scores` a --run of its own")
    if config.clock is not None:
        raise ConfigError("--clock prices a parent's candidates; a table says its own times (prefill_ms, decode_ms)")
    if scenario.tp != 1:
        raise ConfigError(
            f"--tp {scenario.tp}: a table does not say what {scenario.tp} GPUs can share; leave out the rows that they cannot, "
            "with bytes and times of all of them"
        )
    table = load_external(path, scenario)
    if formats is not None:
        table = table.in_formats(formats)
    if config.sweep is None:
        found = search_table(table, config, None)
        family: list[tuple[str, dict[str, Any]]] = []
    else:
        family = [(_where(share, config), search_table(table, config, share)) for share in config.shares]
        members = [_member(share, member) for share, member in zip(config.shares, family, strict=True)]
        found = family[-1][1] | {"members": members}
    if not dry_run:
        for where, member in family[:-1]:
            save_json(run / where / "architecture.json", member)
        save_json(run / "architecture.json", found)
        if family:
            save_json(run / "family.json", {"members": found["members"]})
    return found


def read_table_run(run: Path) -> dict[str, Any] | None:
    """What `run_table_search` wrote to a directory; None if that is a run of a parent, or none. Raises CheckpointError."""
    path = run / "architecture.json"
    if (run / "config.yaml").exists() or not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if "table" in found else None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); run `nas search --scores` again") from error


def search_table(table: ExternalTable, config: SearchConfig, share: float | None) -> dict[str, Any]:
    """The optimum and the pool under a configuration's limits (and a share of the parent instead of its budget)."""
    bounds = bounds_of(config.ranges_at(share), table)
    amounts = {bound.name: table.amounts(bound.name) for bound in bounds}
    problem = Problem(table.scores, as_limits(bounds, table.fixed, amounts))
    try:
        pool = solve_pool(problem, config.verify, config.distance)
    except InfeasibleBudgetError:
        raise _infeasible(table, problem, bounds) from None
    return _told(table, bounds, pool, uniform(table, problem))


def _infeasible(table: ExternalTable, problem: Problem, bounds: Sequence[Bound]) -> InfeasibleBudgetError:
    """With the smallest budget under the other limits to the byte, as --budget-gb takes it, where a larger one would do."""
    error = infeasible(problem, table.fixed, bounds)
    most = next((bound.high for bound in bounds if bound.name == "memory"), None)
    least = None if most is None else extreme(problem, "memory", "min")
    size = 0 if least is None else least + table.fixed["memory"]
    alone = fp8_alone(table, bounds)
    fp8 = (
        ""
        if alone is None
        else f"; the parent in fp8 alone takes {'' if alone['exact'] else 'at least '}{alone['gb']:.4f} GB"
    )
    if most is None or size <= most:
        return InfeasibleBudgetError(
            f"{error}; change a limit, or give more candidates{fp8}", error.smallest_gb, error.binding
        )
    advice = f"; the smallest budget is --budget-gb {Decimal(size) / 10**9:f}, or give more candidates{fp8}"
    return InfeasibleBudgetError(f"{error}{advice}", size / 1e9, "memory")


def uniform(table: ExternalTable, problem: Problem) -> tuple[int, ...] | None:
    """The same candidate in every layer (of each subblock), no skips, within the limits, with the least total score.

    Where some layers have joint rows and others subblocks, a joint name must be that of the two with a plus between them.
    """
    places = [{_name(row): place for place, row in enumerate(rows) if not _skips(row)} for rows in table.rows]
    names: dict[str, list[str]] = {}
    for (_, subblock), known in zip(table.groups, places, strict=True):
        names[subblock] = [name for name in names.get(subblock, known) if name in known]
    choices: list[tuple[float, tuple[int, ...]]] = []
    for combination in itertools.product(*names.values()):
        wanted = dict(zip(names, combination, strict=True))
        if len(wanted) == 3 and wanted["layer"] != f"{wanted['attention']}+{wanted['ffn']}":
            continue
        choice = tuple(known[wanted[subblock]] for (_, subblock), known in zip(table.groups, places, strict=True))
        if problem.feasible(choice):
            choices.append((problem.total_score(choice), choice))
    return min(choices)[1] if choices else None


def _name(row: Candidate) -> str:
    """The same for the same candidate, however it is spelt."""
    return row.name if row.spec is None else str(row.spec)


def _skips(row: Candidate) -> bool:
    parts = (row.spec.attention, row.spec.ffn) if isinstance(row.spec, LayerSpec) else (row.spec,)
    return any(part is not None and part.kind == "skip" for part in parts)


def _told(
    table: ExternalTable, bounds: Sequence[Bound], pool: Sequence[Solution], same: tuple[int, ...] | None
) -> dict[str, Any]:
    """What architecture.json says, in the words that it has for a search with a parent (docs/formats.md)."""
    best, scenario = pool[0], table.scenario
    limits = limits_told(bounds)
    content = hashlib.sha256(table.path.read_bytes()).hexdigest()
    told: dict[str, Any] = {
        "key": digest(content, asdict(scenario), limits["limits"]),
        "table": str(table.path),
        "scenario": scenario.to_json(),
        **limits,
        "clock": {"name": "the table", "device": "the table's device", "estimate": False} if _timed(table) else None,
        "formula": _formula(table, best.choice),
        "cost": _cost(table, best.choice),
        "parent_cost": _cost(table, table.parent),
        "predicted_kl": best.score,
        "optimum": best.proof(),
        "groups": table.places,
        "layers": table.names(best.choice),
        "pool": [{"predicted_kl": s.score, "totals": _whole(table, s), "layers": table.names(s.choice)} for s in pool],
        "baselines": {},
        "fp8_alone": fp8_alone(table, bounds),
        "trials": [],
        "warnings": [] if table.has_fixed else [_NOTHING_FIXED],
    }
    if kept := _kept(table):
        told["kept"] = kept
    if same is not None:
        score = math.fsum(row.score for row in table.chosen(same))
        told["baselines"]["uniform"] = {
            "layers": table.names(same),
            "cost": _cost(table, same),
            "predicted_kl": score,
        }
    return told


_NOTHING_FIXED = "the table has no fixed rows, so embeddings, head and final norm are counted nowhere"


def _timed(table: ExternalTable) -> bool:
    return any(limit in table.known for limit in ("ttft", "tpot", "request"))


def _whole(table: ExternalTable, solution: Solution) -> dict[str, int]:
    """Totals of whole children: the solver's are those of the choices alone."""
    return {limit: total + table.fixed[limit] for limit, total in solution.totals.items()}


def _formula(table: ExternalTable, choice: Sequence[int]) -> str:
    """What the budget is a sum of, in bytes, GB and GiB; without sizes, the other totals."""
    cost = _cost(table, choice)
    if "total_bytes" not in cost:
        return ", ".join(f"{name} {cost[cost_field(name)]:,}" for name in table.known)
    of = f" of {cost['parameters']:,} parameters" if "parameters" in cost else ""
    total = cost["total_bytes"]
    return (
        f"weights{of} {cost['weight_bytes']:,} B + KV {cost['kv_bytes']:,} B + reserve {cost['reserve_bytes']:,} B"
        f" = {total:,} B = {total / 1e9:.4f} GB = {total / 2**30:.4f} GiB"
    )


def _cost(table: ExternalTable, choice: Sequence[int]) -> dict[str, Any]:
    """A whole child's totals of every limit that the table knows of, under the keys of `nas.costs.Cost`."""
    scenario = table.scenario
    cost: dict[str, Any] = {cost_field(name): table.total(name, choice) for name in table.known}
    if "total_bytes" in cost:
        reserve = scenario.reserve_bytes
        weights = cost["total_bytes"] - cost["kv_bytes"] - reserve
        cost |= {"gb": cost["total_bytes"] / 1e9, "weight_bytes": weights, "reserve_bytes": reserve}
        cost |= {"fixed_bytes": table.fixed["weights"], **_by_kind(table, choice)}
    if cost.get("request_ns"):
        cost["tokens_per_s"] = scenario.tokens_per_s(cost["request_ns"])
    for name, limit in (("prefill_ms", "ttft_ns"), ("decode_ms", "tpot_ns")):
        cost[name] = cost[limit] / 1e6 if limit in cost else None
    return cost


def _by_kind(table: ExternalTable, choice: Sequence[int]) -> dict[str, int]:
    """Bytes of the weights of attentions and of FFNs; of whole layers where their rows do not tell the two apart."""
    found = {"attention": 0, "ffn": 0, "layer": 0}
    for (_, subblock), rows, c in zip(table.groups, table.rows, choice, strict=True):
        weights = rows[c].amounts["weights"]
        attention = _attention(table, rows, rows[c])
        if subblock == "layer" and attention is not None:
            found["attention"] += attention
            found["ffn"] += weights - attention
        else:
            found[subblock] += weights
    return {f"{kind}_bytes": size for kind, size in found.items() if size or kind != "layer"}


def _attention(table: ExternalTable, rows: Sequence[Candidate], row: Candidate) -> int | None:
    """Weights of the attention of a joint row: as a row tells, or by the parent's sizes where those give the whole row's."""
    told = _alone(rows, row, "weights")
    if told is not None or table.shape is None or not isinstance(row.spec, LayerSpec):
        return told
    try:
        attention, ffn = (subblock_size(table, part) for part in (row.spec.attention, row.spec.ffn))
    except ConfigError:
        return None
    return attention if attention + ffn == row.amounts["weights"] else None


def _alone(rows: Sequence[Candidate], row: Candidate, amount: str, ffn: bool = False) -> int | None:
    """What the attention (or the FFN) of a joint row takes: the row of the same one beside a skip tells."""
    if not isinstance(row.spec, LayerSpec):
        return None
    own = LayerSpec(AttentionSpec("skip"), row.spec.ffn) if ffn else LayerSpec(row.spec.attention, FFNSpec("skip"))
    return next((other.amounts[amount] for other in rows if other.spec == own), None)


def _kept(table: ExternalTable) -> dict[str, float]:
    """The share of the parent's bytes that each candidate of a subblock or layer keeps, over the layers that have it.

    Of a candidate in several number formats, that of bf16 alone: it says what is kept of the structure.

    Empty if the table has no bytes, or joint rows of ours that cannot be told apart into attention and FFN.
    """
    if "memory" not in table.known:
        return {}
    own: dict[str, int] = {}
    of: dict[str, int] = {}
    for rows, parent in zip(table.rows, table.parent, strict=True):
        sizes = [_sizes(table, rows, row) for row in rows if not _rounded(rows, row)]
        parents = _sizes(table, rows, rows[parent])
        if any(size is None for part in sizes for size in part.values()):
            return {}
        whole = list(parents.values())
        for name, size, all_ in {(n, s, p) for part in sizes for (n, s), p in zip(part.items(), whole, strict=True)}:
            own[name] = own.get(name, 0) + (size or 0)
            of[name] = of.get(name, 0) + (all_ or 0)
    return {name: own[name] / of[name] if of[name] else 1.0 for name in own}


def _rounded(rows: Sequence[Candidate], row: Candidate) -> bool:
    """Whether a candidate is one of these in another number format than bf16."""
    spec = row.spec
    return spec is not None and spec != spec.structure and any(other.spec == spec.structure for other in rows)


def _sizes(table: ExternalTable, rows: Sequence[Candidate], row: Candidate) -> dict[str, int | None]:
    """Bytes by the names that the report draws: of the two subblocks of a layer named as ours are, else of the row."""
    name = _name(row) if table.ours else row.name
    attention, plus, ffn = name.partition("+")
    if plus and attention.startswith("attention:") and ffn.startswith("ffn:"):
        return {attention: _alone(rows, row, "memory"), ffn: _alone(rows, row, "memory", ffn=True)}
    return {name: row.amounts["memory"]}


def _where(share: float, config: SearchConfig) -> str:
    return "." if share == config.shares[-1] else f"family/{share:.3f}"


def _member(share: float, member: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """A row of family.json, as `nas search --sweep` with a parent writes it, without what needs one."""
    where, found = member
    return {
        "share": share,
        "gb": found["cost"]["gb"],
        "parameters": found["cost"].get("parameters"),
        "predicted_kl": found["predicted_kl"],
        "tokens_per_s": found["cost"].get("tokens_per_s"),
        "layers": found["layers"],
        "directory": where,
    }
