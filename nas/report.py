"""`nas report`: everything that a run has found, in one dict (report.json) that the page is drawn from.

    collect(directory)         reads the run's files, however far it has got, into plain data
    write_report(directory)    writes report.html and report.json

Keys of report.json: KL is in nats per token, a size in bytes unless it is named gb (1e9 bytes), null where nothing is known.

    run, parent, scenario, precisions, kv_dtype, limits, clock, budget_bytes, formula, optimum, warnings, seconds    as in architecture.json
    models      parent, child, baselines, healed child, children of a sweep's other budgets: name, kind, cost, layers, kl, kl_se (calibration text), heldout
    points      every child measured, the parent and the baselines among them, once each
    map         columns, parts (rows), the parts of each architecture, and the share of the parent's bytes that a part keeps;
                precisions: the number formats of each part with their bits per weight, null where all is bf16
    scores      the score table by candidate and layer, with the chosen candidate of each layer
    finalists   KL of each over healing tokens;  made: score.json;  eval: eval.json, without models that changed since
    learning    held-out evaluations over healing tokens, with other_texts, training and stages (nas/report_metrics.py)
    notes       by figure, why it is left out
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from blocks.errors import CheckpointError
from blocks.files import save_json, save_text
from nas.eval_table import of_run
from nas.format_words import baseline_name
from nas.report_layers import map_of, scores_of
from nas.report_metrics import healing_of

FORMAT = 1
AS_THEY_ARE = (
    "parent", "scenario", "precisions", "kv_dtype", "clock", "budget_bytes", "formula", "optimum", "warnings", "seconds"
)  # fmt: skip


def write_report(directory: Path, out: Path | None = None) -> dict[str, Any]:
    """Writes the page to `out` (report.html in the run) and report.json into the run; returns what the latter holds.

    Raises:
        CheckpointError: if there is no run, or a file of it is damaged, or the disk refuses.
    """
    from nas.report_html import page

    report = collect(directory)
    save_text(out or directory / "report.html", page(report))
    save_json(directory / "report.json", report)
    return report


def collect(directory: Path) -> dict[str, Any]:
    """What report.json holds (see above). Raises CheckpointError if there is no run, or a file of it is damaged."""
    found, made = _json(directory / "architecture.json"), _json(directory / "score.json")
    if not found and not (directory / "scores.csv").exists():
        raise CheckpointError(f"no run at {directory}; start one with `nas score --run {directory}`")
    try:
        return _report(directory, found, made)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{directory / 'architecture.json'} cannot be told ({error!r}); run `nas search` again"
        ) from error


def _report(directory: Path, found: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    results = _json(directory / "results.json")
    if results.get("search") != found.get("key"):
        results = {}  # of an earlier search: not this child's
    healing = _json(directory / "distill" / "search.json").get("search") in (None, found.get("key"))
    stages = [stage["name"] for stage in results["stages"]] if "stages" in results else None
    models = _models(found, results) + _family(directory, found)
    report: dict[str, Any] = {"format": FORMAT, "run": directory.resolve().name}
    report |= {key: found.get(key) for key in AS_THEY_ARE}
    report |= {
        "parent": found.get("parent") or made.get("parent"),
        "limits": {name: _limit(name, limit) for name, limit in (found.get("limits") or {}).items()},
        "models": models,
        "points": _points(found, models),
        "map": map_of(found, models),
        "scores": scores_of(directory / "scores.csv", found),
        "finalists": found.get("finalists") or [],
        **healing_of(directory / "distill" / ("metrics.jsonl" if found and healing else "none"), stages),
        "heldout_tokens": results.get("heldout_tokens") or (found.get("heldout") or {}).get("tokens"),
        "healing": results.get("healing"),
        "made": made or None,
        "eval": of_run(directory, found.get("key")) if found else None,
    }
    return report | {"notes": _notes(report)}


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if the file is not there. Raises CheckpointError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete it and run the stage that writes it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged (no JSON object); delete it and run the stage that writes it again")
    return content


def _limit(name: str, limit: dict[str, Any]) -> dict[str, Any]:
    """A limit with times in ms, whichever unit the search counts in."""
    factor = 1e-6 if limit.get("unit") == "ns" else 1.0
    ends = {end: None if limit.get(end) is None else limit[end] * factor for end in ("low", "high")}
    return {**ends, "unit": "ms" if limit.get("unit") == "ns" else limit.get("unit") or "", "per_unit": 1 / factor}


# Models


def _models(found: dict[str, Any], results: dict[str, Any]) -> list[dict[str, Any]]:
    """The parent, the child, the baselines and the healed child, as far as there are any."""
    if not found:
        return []
    heldout, healed = found.get("heldout") or {}, None
    child = _model("child before healing", "child", found, found.get("cost"), heldout.get("child"))
    if child["kl"] is None:
        child["kl"], child["kl_se"] = _measured(found, found.get("layers"))
    models = [_model("parent", "parent", {"kl": 0.0}, found.get("parent_cost"), heldout.get("parent")), child]
    baselines = dict(found.get("baselines") or {})
    if "uniform" not in baselines and found.get("uniform_layers"):
        baselines["uniform"] = {"layers": found["uniform_layers"], "cost": found.get("uniform_cost")}
    for kind, baseline in baselines.items():
        name = baseline_name(kind, baseline.get("layers"))
        model = _model(name, kind, baseline, baseline.get("cost"), heldout.get(kind))
        if model["kl"] is None:
            model["kl"], model["kl_se"] = _measured(found, baseline.get("layers"), kind)
        models.append(model)
    if alone := found.get("fp8_alone"):  # of a search on a table alone
        facts = {"predicted_kl": alone["predicted_kl"]}
        models.append(_model("parent in fp8", "parent-uniform-precision", facts, alone, None))
    healed = next((row for row in results.get("rows") or [] if row.get("name") == "child after healing"), None)
    if healed:
        models.append(_model("child after healing", "healed", {}, found.get("cost"), healed))
    return models


def _family(directory: Path, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Children of the other budgets of a `nas search --sweep` whose last member is this run's child."""
    members = _json(directory / "family.json").get("members") or []
    if not found or not any(m.get("directory") == "." and m.get("layers") == found.get("layers") for m in members):
        return []
    models = []
    for member in members:
        if member.get("directory") != ".":
            own = _json(directory / member["directory"] / "architecture.json")
            cost, heldout = own.get("cost"), (own.get("heldout") or {}).get("child")
            facts = {key: own.get(key, member.get(key)) for key in ("layers", "kl", "kl_se", "predicted_kl")}
            models.append(_model(f"budget {member['share']:g}", "family", facts, cost, heldout))
    return models


def _model(name: str, kind: str, facts: dict[str, Any], cost: Any, heldout: Any) -> dict[str, Any]:
    keys = ("kl", "kl_se", "perplexity", "top1_agreement")
    return {
        "name": name,
        "kind": kind,
        "layers": facts.get("layers"),
        "cost": cost,
        "kl": facts.get("kl"),
        "kl_se": facts.get("kl_se"),
        "predicted_kl": facts.get("predicted_kl"),
        "heldout": None if not heldout else {key: heldout.get(key) for key in keys},
    }


def _measured(found: dict[str, Any], layers: Any, origin: str | None = None) -> tuple[Any, Any]:
    """True KL and its error of an architecture, from its trial."""
    for trial in found.get("trials") or []:
        if trial.get("layers", origin and (layers if trial.get("origin") == origin else None)) == layers and layers:
            return trial.get("kl"), trial.get("kl_se")
    return None, None


# Children measured


def _points(found: dict[str, Any], models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every child once: the parent, trials, and the baselines and path members that are no trials."""
    points, seen = [], set()
    finalists = [finalist.get("layers") for finalist in found.get("finalists") or []]

    def add(name: str, origin: str, facts: dict[str, Any]) -> None:
        layers = facts.get("layers")
        known = "|".join(layers) if layers else None
        if known is not None and known in seen and facts.get("number") is None:
            return
        seen.add(known)
        total, kl = facts.get("total_bytes"), facts.get("kl")
        points.append(
            {
                "name": name,
                "origin": origin,
                "number": facts.get("number"),
                "state": facts.get("state") or "complete",
                "within": facts.get("within", True),
                "kl": kl if kl is not None and math.isfinite(kl) else None,
                "kl_se": facts.get("kl_se"),
                "predicted_kl": facts.get("predicted_kl"),
                "gb": None if total is None else total / 1e9,
                "parameters": facts.get("parameters"),
                "tokens_per_s": facts.get("tokens_per_s"),
                "child": bool(layers) and layers == found.get("layers"),
                "finalist": bool(layers) and layers in finalists,
            }
        )

    parent = next((model for model in models if model["kind"] == "parent"), None)
    if parent and parent["cost"]:
        add("parent", "parent", {**parent["cost"], "kl": 0.0, "predicted_kl": 0.0})
    for index, trial in enumerate(found.get("trials") or []):
        number = trial.get("number", index)
        origin = trial.get("origin", "unknown")
        add(f"trial {number}, {baseline_name(origin, trial.get('layers'))}", origin, {**trial, "number": number})
    for index, step in enumerate(found.get("path") or []):
        step = {**step, "total_bytes": step.get("total_bytes", step.get("budget_bytes"))}
        add(f"path step {index + 1}", "path", step)
    for model in models:
        if model["kind"] in found.get("baselines", {}) or model["kind"] in ("child", "family"):
            facts = {**(model["cost"] or {}), **{key: model[key] for key in ("kl", "kl_se", "predicted_kl", "layers")}}
            add(model["name"], found.get("origin", "child") if model["kind"] == "child" else model["kind"], facts)
    return points


def _notes(report: dict[str, Any]) -> dict[str, str]:
    """Which figures there is nothing for, and what would make them."""
    measured = [point for point in report["points"] if point["kl"] is not None and point["origin"] != "parent"]
    timed = [point for point in measured if point["tokens_per_s"] is not None]
    search, run = "run nas search first", report["run"]
    unmeasured = f"No child was measured yet: {search}."
    if report["map"]:
        unmeasured = "No child was measured: without the parent at hand there is no true KL."
    notes = {
        "map": None if report["map"] else f"No architecture was chosen in {run} yet: {search}.",
        "scores": None if report["scores"] else "No score table lies in this run: it was searched on a table from elsewhere.",
        "pareto": None if measured else unmeasured,
        "speed": None if timed else "No clock: give nas search a --clock, a profile of nas bench or the name of a device.",
        "predicted": None if any(p["predicted_kl"] for p in measured) else "No child was measured, so no prediction was checked.",
        "budget": None if any((m["cost"] or {}).get("total_bytes") for m in report["models"]) else f"No costs yet: {search}.",
        "history": None if any(p["number"] is not None for p in measured) else f"No trials yet: {search}.",
        "finalists": None if report["finalists"] else "No finalists were healed: nas search --finalists K makes the last choice that way.",
        "learning": None if report["learning"] else "The child is not healed yet: run nas distill.",
        "perplexity": None if any(e["perplexity"] is not None for e in report["learning"]) else "The child is not healed yet: run nas distill.",
    }  # fmt: skip
    return {name: note for name, note in notes.items() if note is not None}
