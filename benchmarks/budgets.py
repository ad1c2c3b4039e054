"""SmolLM2-135M at 0.9, 0.7 and 0.5 of its attention + FFN weights + KV cache (bf16, batch 4, context 2048).

True KL to the parent on held-out Python topics, before any training, for cut-only and fitted candidates, each without and
with the refit sweep, and for the best of a small pool by true KL; both splits (by document, and by sequence as the
prototype had it). Then one-pass against exact scores on calibration documents that no fit saw.

    python benchmarks/budgets.py --out table.json              # a GPU: minutes
    python benchmarks/budgets.py --small                       # a CPU: tens of minutes, less text, a sanity check
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blocks.library import BlockLibrary
from blocks.parent import Parent, open_parent
from nas.assemble import Assembler, Child
from nas.config import DataConfig, RunConfig, ScoreConfig, SearchConfig
from nas.costs import Scenario
from nas.data import load_pack, to_tokens
from nas.engine import make_sweep
from nas.exact import kl_to_parent
from nas.progress import Reporter
from nas.run import Run, create_run
from nas.score import run_score
from nas.search_problem import load_candidates

BUDGETS = (0.9, 0.7, 0.5)
FLOORS = {0.9: 0.072, 0.7: 0.314, 0.5: 0.745}
POOL = 4


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--parent", default="smollm2")
    arguments.add_argument("--data", default="python-docs")
    arguments.add_argument("--out", type=Path, default=Path("budgets.json"))
    arguments.add_argument("--splits", nargs="+", default=["sequence", "document"])
    arguments.add_argument("--small", action="store_true")
    chosen = arguments.parse_args()
    parent = open_parent(chosen.parent)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "rows": []}
    with tempfile.TemporaryDirectory() as directory:
        for split in chosen.splits:
            data = DataConfig(
                source=chosen.data, split=split, fit_tokens=86_528, heldout_share=0.29, calibration_share=0.15
            )
            if chosen.small:
                data = replace(data, fit_tokens=12_288, calibration_tokens=4096, heldout_tokens=8192)
            for fit in ("cut", "fitted"):
                config = RunConfig(chosen.parent, data=data, score=ScoreConfig(fit=fit))
                run = create_run(Path(directory) / f"{split}-{fit}", config, parent.fingerprint)
                result["rows"] += measure(run, parent, device, split, fit)
        result["rank_correlation"] = correlate(run, parent, device)
    chosen.out.write_text(json.dumps(result, indent=1))
    print_table(result)


def measure(run: Run, parent: Parent, device: torch.device, split: str, fit: str) -> list[dict[str, Any]]:
    """Scores one way of building candidates; the children of each budget on held-out text."""
    started = time.perf_counter()
    summary = run_score(run, parent, device, Reporter())
    seconds = time.perf_counter() - started
    sweep = make_sweep(parent, device)
    data = run.path("data")
    heldout = to_tokens(load_pack(data / "heldout.npy"), None, device)
    hidden = sweep.run(heldout)
    library = BlockLibrary(run.path("library"))
    assembler = Assembler(
        sweep=sweep,
        library=library,
        fit_tokens=to_tokens(load_pack(data / "fit.npy"), None, device),
        verify_tokens=to_tokens(load_pack(data / "calibration.npy"), None, device),
        pseudo_tokens=None,
        reporter=Reporter(quiet=True),
    )

    def true_kl(child: Child) -> float:
        return float(kl_to_parent(sweep, hidden, [sweep.of(child.layers).run(heldout)]).mean())

    rows = []
    for budget in BUDGETS:
        search = SearchConfig(budget=budget)
        candidates = load_candidates(run, parent.shape, search, Scenario())
        started = time.perf_counter()
        pool = [candidates.architecture(solution.choice) for solution in candidates.pool(POOL, search.distance)]
        assembler.pseudo_tokens = None
        plain = assembler.assemble(pool[0], "the optimum")
        assembler.pseudo_tokens = search.refit_pseudo_tokens
        refitted = [assembler.assemble(architecture, "the pool") for architecture in pool]
        best = min(refitted, key=assembler.true_kl)
        rows.append(
            {
                "split": split,
                "fit": fit,
                "budget": budget,
                "gb": candidates.costs.cost(pool[0]).gb,
                "budget_gb": candidates.budget_bytes / 1e9,
                "predicted": candidates.predicted(pool[0]),
                "kl": true_kl(plain),
                "kl_refit": true_kl(refitted[0]),
                "kl_pool": true_kl(best),
                "score_seconds": seconds,
                "search_seconds": time.perf_counter() - started,
                "tokens": summary["tokens"] | {"heldout": heldout.numel()},
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def correlate(run: Run, parent: Parent, device: torch.device) -> dict[str, Any]:
    """Every candidate of the fitted run scored both ways, on calibration documents."""
    both = replace(run.config, score=replace(run.config.score, method="both"))
    again = create_run(run.directory.with_name("both"), both, parent.fingerprint)
    again.path("library").symlink_to(run.path("library"))
    correlation: dict[str, Any] = run_score(again, parent, device, Reporter())["rank_correlation"]
    return correlation


def print_table(result: dict[str, Any]) -> None:
    print(f"\n{result['device']}; KL to the parent on held-out text, nats per token, no training")
    print("| split | budget | floor | cut only | cut + refit | fitted | fitted + refit | + best of pool |")
    print("|---|---|---|---|---|---|---|---|")
    for row in (r for r in result["rows"] if r["fit"] == "fitted"):
        cut = next(
            r
            for r in result["rows"]
            if r["fit"] == "cut" and (r["split"], r["budget"]) == (row["split"], row["budget"])
        )
        floor = f"{FLOORS[row['budget']]:.3f}"
        numbers = " | ".join(
            f"{x:.4f}" for x in (cut["kl"], cut["kl_refit"], row["kl"], row["kl_refit"], row["kl_pool"])
        )
        print(f"| {row['split']} | {row['budget']} | {floor} | {numbers} |")
    print(f"\nrank correlation of one-pass with exact scores: {result['rank_correlation']}")


if __name__ == "__main__":
    main()
