"""The search on SmolLM2-135M: what each part brings, what it is worth after healing, and how samplers compare.

    python benchmarks/search.py budgets  --out budgets.json                    # Python's manual, 0.7 and 0.5, three seeds
    python benchmarks/search.py healed   --data runs/manuals --out healed.json # half budget, every finalist healed on 18.9M tokens
    python benchmarks/search.py samplers --out samplers.json                   # 300 true KLs each, from the same start

`budgets` splits its text by sequence, as the prototype whose figures are the floors did. `healed` needs the text of
benchmarks/manuals.py. All take --small for a check on a CPU, and --seeds; what is done is in --out and --work, and is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from blocks.checkpoint import load_child
from blocks.parent import Parent, open_parent
from blocks.spec import Architecture
from distill.config import DistillConfig
from distill.trainer import heal
from nas.config import DataConfig, RunConfig, ScoreConfig, SearchConfig, build
from nas.costs import Scenario
from nas.data import load_pack, to_tokens
from nas.exact import kl_to_parent
from nas.finalists import choose_finalists
from nas.measure import load_parent_model
from nas.path import walk
from nas.progress import Reporter
from nas.run import Run, create_run
from nas.samplers import make_sampler
from nas.score import run_score
from nas.search import Search
from nas.study import Ledger, architecture_of
from nas.trials import Trials, meets_limits, origin_of

TOKENS = 18_900_000
MARKS = (1_000_000, 5_000_000, 18_900_000)
SMALL_DATA = {"fit_tokens": 1024, "calibration_tokens": 1024, "heldout_tokens": 1024, "sequence_length": 64}
ORIGINS = ("optimum", "pool", "path", "around", "swap")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("what", choices=("budgets", "healed", "samplers"))
    arguments.add_argument("--parent", default="smollm2")
    arguments.add_argument("--data", default="python-docs")
    arguments.add_argument("--work", type=Path, default=Path("runs/benchmark-search"))
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--finalists", type=int, default=3)
    arguments.add_argument("--evaluations", type=int, default=300)
    arguments.add_argument("--small", action="store_true")
    chosen = arguments.parse_args()
    chosen.out = chosen.out or Path(f"{chosen.what}.json")
    chosen.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if chosen.device.type == "cuda" else "cpu"
    result = json.loads(chosen.out.read_text()) if chosen.out.exists() else {"device": name, "rows": []}
    {"budgets": budgets, "healed": healed, "samplers": samplers}[chosen.what](
        chosen, open_parent(chosen.parent), result
    )
    print(f"\n{name}")
    {"budgets": print_budgets, "healed": print_healed, "samplers": print_samplers}[chosen.what](result["rows"])


def save(chosen: argparse.Namespace, result: dict[str, Any], row: dict[str, Any]) -> None:
    result["rows"].append(row)
    chosen.out.write_text(json.dumps(result, indent=1))
    print(json.dumps({name: value for name, value in row.items() if name != "layers"}), flush=True)


def scored_run(chosen: argparse.Namespace, parent: Parent, data: DataConfig, seed: int) -> Run:
    """A run scored with this seed; the split of the text is the same for all."""
    if chosen.small:
        data = replace(data, **SMALL_DATA)
    score = build(
        ScoreConfig, {}, {"seed": seed, **({"exact_tokens": 128} if chosen.small else {})}, chosen.device.type
    )
    space = "keep_or_skip" if chosen.small else "default"
    config = RunConfig(chosen.parent, space=space, data=data, score=score)
    run = create_run(chosen.work / f"{chosen.what}-{seed}", config, parent.fingerprint)
    started = time.perf_counter()
    run_score(run, parent, chosen.device, Reporter(quiet=True))
    print(f"seed {seed}: scored in {time.perf_counter() - started:.1f} s", flush=True)
    return run


def open_search(
    chosen: argparse.Namespace, parent: Parent, run: Run, seed: int, budget: float, **settings: Any
) -> Search:
    small = (
        {"path_steps": 2, "path_tokens": 256, "trials": 12, "verify": 2, "verify_tokens": 1024} if chosen.small else {}
    )
    flags = {"budget": budget, "seed": seed, **small, **settings}
    config = build(SearchConfig, {}, flags, chosen.device.type)
    healing = build(DistillConfig, {}, {"device": "cpu"} if chosen.device.type == "cpu" else {}, chosen.device.type)
    return Search(run, parent, config, Scenario(), chosen.device, Reporter(quiet=True), healing)


class HeldOut:
    """True KL on the held-out text of a run."""

    def __init__(self, search: Search) -> None:
        self.search, self.sweep = search, search.assembler.sweep
        self.tokens = to_tokens(load_pack(search.run.path("data") / "heldout.npy"), None, search.device)
        self.hidden = self.sweep.run(self.tokens)

    def __call__(self, architecture: Architecture, refit: bool = True) -> float:
        child = self.search.assembler.assemble(architecture, refit=refit)
        return float(kl_to_parent(self.sweep, self.hidden, [self.sweep.of(child.layers).run(self.tokens)]).mean())


# ---- what each part brings


def budgets(chosen: argparse.Namespace, parent: Parent, result: dict[str, Any]) -> None:
    data = DataConfig(chosen.data, split="sequence", fit_tokens=86_528, heldout_share=0.29, calibration_share=0.15)
    done = {(row["seed"], row["budget"]) for row in result["rows"]}
    for seed in chosen.seeds:
        run = scored_run(chosen, parent, data, seed)
        for budget in (0.7, 0.5):
            if (seed, budget) not in done:
                save(chosen, result, parts(open_search(chosen, parent, run, seed, budget, finalists=1), seed, budget))


def parts(search: Search, seed: int, budget: float) -> dict[str, Any]:
    """One whole search, timed; then the held-out KL of the best of each origin by calibration text."""
    started = time.perf_counter()
    found = search.run_all()
    seconds = time.perf_counter() - started
    trials, heldout = search.begin(search.candidates.optimum()), HeldOut(search)
    best = {
        origin: trial
        for origin in (*ORIGINS, *search.baselines)
        if (trial := next(iter(trials.measured(lambda name, wanted=origin: name == wanted)), None)) is not None
    }
    optimum = architecture_of(best["optimum"].params)
    row: dict[str, Any] = {"seed": seed, "budget": budget, "seconds": seconds, "trials": len(found["trials"])}
    row |= {
        "chosen": found["origin"],
        "child": heldout(Architecture.from_list(found["layers"])),
        "no_refit": heldout(optimum, False),
    }
    row |= {
        "predicted": found["optimum"]["score"],
        "heldout": {name: heldout(architecture_of(t.params)) for name, t in best.items()},
    }
    row["calibration"] = {name: trial.value for name, trial in best.items()}
    row["path_without_refit"] = path_without_refit(search, heldout)
    row["layers"] = found["layers"]
    return row


def path_without_refit(search: Search, heldout: HeldOut) -> float | None:
    """The last child of a path whose children are not refitted on the way; refitted at its end."""
    assembler = search.assembler
    kept, assembler.pseudo_tokens = assembler.pseudo_tokens, None
    steps = list(walk(assembler, search.candidates, search.config.path_steps, search.rescoring, search.path_start))
    assembler.pseudo_tokens = kept
    return heldout(steps[-1].architecture) if steps else None


def print_budgets(rows: Sequence[dict[str, Any]]) -> None:
    print("Held-out KL before training, nats per token; the best of each origin by calibration text")
    print(
        "| budget | seed | predicted | optimum, no refit | optimum | pool | path | path, no refit inside | around | swaps | child | seconds |"
    )
    print("|" + "---|" * 12)
    for row in sorted(rows, key=lambda row: (-row["budget"], row["seed"])):
        of = row["heldout"]
        middle = [
            of.get("optimum"),
            of.get("pool"),
            of.get("path"),
            row["path_without_refit"],
            of.get("around"),
            of.get("swap"),
        ]
        cells = [row["predicted"], row["no_refit"], *middle, row["child"]]
        print(f"| {row['budget']} | {row['seed']} | " + " | ".join(map(_number, cells)) + f" | {row['seconds']:.0f} |")
    print("\n| budget | seed | uniform | depth, contiguous | depth, by score | random | child |\n|" + "---|" * 7)
    for row in sorted(rows, key=lambda row: (-row["budget"], row["seed"])):
        cells = [row["heldout"].get(name) for name in ("uniform", "depth-contiguous", "depth-score", "random")]
        print(f"| {row['budget']} | {row['seed']} | " + " | ".join(map(_number, [*cells, row["child"]])) + " |")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


# ---- after healing


def healed(chosen: argparse.Namespace, parent: Parent, result: dict[str, Any]) -> None:
    """Searches with every seed first, then heals: the returned children, then the other finalists, then the optimum."""
    data = DataConfig(chosen.data, heldout_tokens=65_536, train_tokens=19_000_000)
    wanted: list[tuple[int, dict[str, Any], Run, str]] = []
    for seed in chosen.seeds:
        run = scored_run(chosen, parent, data, seed)
        heal_tokens = 4096 if chosen.small else 1_000_000
        search = open_search(chosen, parent, run, seed, 0.5, finalists=chosen.finalists, heal_tokens=heal_tokens)
        started = time.perf_counter()
        found = search.done or search.run_all()
        print(
            f"seed {seed}: searched in {time.perf_counter() - started:.1f} s ({found['seconds']} s at first)",
            flush=True,
        )
        trials = search.begin(search.candidates.optimum())
        names = {f.name: f for f in choose_finalists(trials, chosen.finalists)}
        for told in found["finalists"]:
            finalist = names[told["name"]]
            directory = chosen.work / f"children-{seed}" / finalist.name
            if not (directory / "config.json").exists():
                search.assembler.write(search.assembler.assemble(finalist.architecture), directory, "bfloat16")
            row = facts(search, finalist.architecture) | {"seed": seed, "name": finalist.name, "chosen": told["chosen"]}
            row |= {
                "calibration": finalist.trial.value,
                "short": told["heal"][-1]["kl"],
                "search_seconds": found["seconds"],
            }
            wanted.append((0 if told["chosen"] else 1, row, run, str(directory)))
    done = {(row["seed"], row["name"]) for row in result["rows"]}
    teacher = load_parent_model(parent, chosen.device)
    for _, row, run, directory in sorted(wanted, key=lambda item: item[0]):
        if (row["seed"], row["name"]) not in done:
            save(chosen, result, row | heal_one(chosen, run, teacher, directory))


def facts(search: Search, architecture: Architecture) -> dict[str, Any]:
    """What may foretell the KL after healing."""
    costs = search.candidates.costs
    cost, parent = costs.cost(architecture), costs.cost(costs.shape.parent_architecture)
    return {
        "predicted": search.candidates.predicted(architecture),
        "unfitted": float(search.assembler.true_kl(search.assembler.assemble(architecture, refit=False)).mean()),
        "attention_kept": cost.attention_bytes / parent.attention_bytes,
        "ffn_kept": cost.ffn_bytes / parent.ffn_bytes,
        "kv_kept": cost.kv_bytes / parent.kv_bytes,
        "parameters": cost.parameters,
        "layers": architecture.to_list(),
    }


def heal_one(chosen: argparse.Namespace, run: Run, teacher: torch.nn.Module, directory: str) -> dict[str, Any]:
    """Heals a child with the default recipe of this device; its held-out KL at the marks."""
    flags: dict[str, Any] = {"tokens": TOKENS, "eval_every": 0, "eval_tokens": 0, "checkpoint_every": 0}
    if chosen.small:
        flags |= {"tokens": 2048, "sequence_length": 64, "device": "cpu"}
    config = build(DistillConfig, {}, flags, chosen.device.type)
    marks = [min(config.steps, -(-tokens // config.step_tokens)) for tokens in MARKS]
    packs = (load_pack(run.path("data") / f"{part}.npy") for part in ("train", "heldout"))
    out = Path(directory) / "heal"
    found = heal(config, teacher, load_child(directory), *packs, out, eval_at=marks)
    curve = {str(tokens): found.evaluations[mark].kl for tokens, mark in zip(MARKS, marks, strict=True)}
    return {"before": found.before.kl, **curve, "se": found.after.kl_se, "tokens_per_s": found.tokens_per_s}


def print_healed(rows: Sequence[dict[str, Any]]) -> None:
    columns = ["before", *map(str, MARKS)]
    print("Held-out KL of the manuals, nats per token; 'short' is calibration text after the short heal of the search")
    print(
        "| seed | finalist | returned | attention | FFN | KV | predicted | calibration | short | before | 1M | 5M | 18.9M | tokens/s |"
    )
    print("|" + "---|" * 14)
    for row in sorted(rows, key=lambda row: (row["seed"], row["name"])):
        kept = [f"{row[name]:.2f}" for name in ("attention_kept", "ffn_kept", "kv_kept")]
        numbers = [_number(row[name]) for name in ("predicted", "calibration", "short", *columns)]
        mark = "yes" if row["chosen"] else ""
        cells = [str(row["seed"]), row["name"], mark, *kept, *numbers, f"{row['tokens_per_s']:,.0f}"]
        print("| " + " | ".join(cells) + " |")
    print("\nSpearman's rank correlation over all finalists with the KL after 18.9M tokens:")
    last = [row[columns[-1]] for row in rows]
    told = (
        "predicted",
        "unfitted",
        "calibration",
        "short",
        *columns[:-1],
        "attention_kept",
        "ffn_kept",
        "kv_kept",
        "parameters",
    )
    for name in told:
        values = [row[name] for row in rows]
        if len(set(values)) > 1:
            print(f"| {name} | {spearmanr(values, last).statistic:.2f} |")


# ---- samplers


def samplers(chosen: argparse.Namespace, parent: Parent, result: dict[str, Any]) -> None:
    """The same start for each: optimum, pool and baselines. Children are not refitted, which makes 300 of them affordable."""
    data = DataConfig(chosen.data, split="sequence", fit_tokens=86_528, heldout_share=0.29, calibration_share=0.15)
    done = {(row["seed"], row["sampler"]) for row in result["rows"]}
    for seed in chosen.seeds:
        run = scored_run(chosen, parent, data, seed)
        for name in ("swap", "tpe", "nsga2", "random"):
            if (seed, name) in done:
                continue
            search = open_search(chosen, parent, run, seed, 0.5, refit=False, prune=False, finalists=1)
            sampler = make_sampler(name, search.candidates, seed)
            ledger = Ledger(chosen.work / f"{name}-{seed}.journal", name, search.candidates.specs, sampler)
            trials = Trials(search.candidates, search.assembler, ledger, Reporter(quiet=True), False)
            pool = search.candidates.pool(search.config.verify, search.config.distance)
            for architecture in [*(search.candidates.architecture(s.choice) for s in pool), *search.baselines.values()]:
                ledger.queue(architecture, "start")
            started = time.perf_counter()
            trials.run(chosen.evaluations)
            save(chosen, result, history(trials, name, seed, time.perf_counter() - started))


def history(trials: Trials, name: str, seed: int, seconds: float) -> dict[str, Any]:
    """The best KL within the budget after so many evaluations."""
    best, curve, within = float("inf"), [], 0
    for trial in trials.ledger.finished:
        fits = meets_limits(trial)
        if fits and trial.value is not None:
            best = min(best, trial.value)
        within += fits and origin_of(trial) == "swap"
        curve.append(best)
    marks = {str(n): curve[min(n, len(curve)) - 1] for n in (13, 50, 100, 200, 300)}
    return {"sampler": name, "seed": seed, "seconds": seconds, "within_budget": within, **marks}


def print_samplers(rows: Sequence[dict[str, Any]]) -> None:
    print(
        "Best true KL on calibration text (not refitted) after so many evaluations, median of the seeds (least to largest)"
    )
    print("| sampler | 13 (start) | 50 | 100 | 200 | 300 | proposals within budget | seconds |\n|" + "---|" * 8)
    for name in ("swap", "tpe", "nsga2", "random"):
        own = [row for row in rows if row["sampler"] == name]
        if own:
            cells = [_spread([row[str(n)] for row in own]) for n in (13, 50, 100, 200, 300)]
            within, seconds = (np.median([row[key] for row in own]) for key in ("within_budget", "seconds"))
            print(f"| {name} | " + " | ".join(cells) + f" | {within:.0f} | {seconds:.0f} |")


def _spread(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    return f"{middle:.4f} ({min(values):.4f}-{max(values):.4f})" if len(values) > 1 else f"{middle:.4f}"


if __name__ == "__main__":
    main()
