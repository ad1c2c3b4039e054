"""Made-up but plausible runs for the tests of the report: every file that `nas report` reads, without a model.

.venv/bin/python -m tests.report_run DIRECTORY      writes one, to look at
"""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blocks.shape import ModelShape
from blocks.spec import Architecture, LayerSpec
from nas.costs import CostModel, Scenario
from nas.table import ScoreRow, save_table

SMALL_SHAPE = ModelShape(
    num_hidden_layers=30,
    hidden_size=576,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49152,
    tie_word_embeddings=True,
)
ATTENTIONS = ("kv3", "kv1", "skip")
WIDTHS = ("1536", "1024", "512", "256", "skip")
HURTS = {"kv3": 0.0, "kv1": 0.1, "skip": 0.45, "1536": 0.0, "1024": 0.04, "512": 0.15, "256": 0.3}


class MadeUp:
    """One run. `layers` is the depth; everything follows from the seed."""

    def __init__(self, layers: int = 30, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.shape = ModelShape(**{**asdict(SMALL_SHAPE), "num_hidden_layers": layers})
        self.costs = CostModel(self.shape, Scenario())
        self.specs = [LayerSpec.parse(f"attention:{a}+ffn:{w}") for a in ATTENTIONS for w in WIDTHS]
        self.table = [[self._row(layer, spec) for spec in self.specs] for layer in range(layers)]
        self.sizes = [self.costs.layer_bytes(spec) for spec in self.specs]
        self.budget = self.costs.budget_for_share(0.6)

    def _row(self, layer: int, spec: LayerSpec) -> ScoreRow:
        """Ends of the stack hurt most; skipping both parts hurts more than the sum."""
        own = spec == self.shape.parent_layer
        depth = layer / max(1, self.shape.num_hidden_layers - 1)
        weight = 0.12 + 2.5 * math.exp(-depth * 14) + 1.2 * math.exp(-(1 - depth) * 12)
        attention, ffn = str(spec.attention).split(":")[1], str(spec.ffn).split(":")[1]
        score = 0.0 if own else weight * (HURTS[attention] + HURTS.get(ffn, 0.9)) * self.rng.lognormvariate(0, 0.4)
        exact = not own and (layer == 0 or "skip" in str(spec))
        return ScoreRow(
            layer=layer,
            attention=str(spec.attention),
            ffn=str(spec.ffn),
            score=score,
            score_low=None if own else score * 0.9,
            score_high=None if own else score * 1.1,
            source="parent" if own else "exact" if exact else "one-pass",
            one_pass=None if own else score * 1.2,
            one_pass_seq=None if own else score * 1.3,
            exact=score if exact else None,
            parameters=self.shape.layer_parameters(spec),
            weight_bytes=2 * self.shape.layer_parameters(spec),
            kv_bytes_per_token=2 * self.shape.kv_values_per_token(spec.attention),
        )

    # ---- children

    def cheapen(self, greed: float, budget: int | None = None) -> Architecture:
        """Replaces layers, least score for bytes saved first and with some luck, until the budget is met."""
        limit, chosen = budget or self.budget, [0] * len(self.table)
        while self.total(chosen) > limit:
            moves = []
            for layer, rows in enumerate(self.table):
                now = chosen[layer]
                for index in range(len(self.specs)):
                    saved = self.sizes[now] - self.sizes[index]
                    if saved > 0:
                        hurt = max(0.0, rows[index].score - rows[now].score)
                        moves.append((hurt / saved * self.rng.lognormvariate(0, greed), layer, index))
            _, layer, index = min(moves)
            chosen[layer] = index
        return self.architecture(chosen)

    def architecture(self, chosen: list[int]) -> Architecture:
        return Architecture(tuple(self.specs[index] for index in chosen))

    def total(self, chosen: list[int]) -> int:
        """Bytes of a child."""
        return self.costs.fixed_bytes + sum(self.sizes[index] for index in chosen)

    def predicted(self, architecture: Architecture) -> float:
        return sum(rows[self.specs.index(spec)].score for rows, spec in zip(self.table, architecture, strict=True))

    def true(self, architecture: Architecture) -> float:
        """Sums foresee too little of deep compression."""
        return self.predicted(architecture) ** 1.2 * 1.1 * self.rng.lognormvariate(0, 0.12)

    def timed(self, architecture: Architecture) -> dict[str, Any]:
        cost = self.costs.cost(architecture).to_json()
        prefill, decode = 4e-8 * cost["weight_bytes"], 9e-9 * cost["total_bytes"]
        return cost | {
            "prefill_ms": prefill,
            "decode_ms": decode,
            "tokens_per_s": 4096 / (prefill + 1024 * decode) * 1e3,
        }

    def trial(self, number: int, origin: str, architecture: Architecture, state: str = "complete") -> dict[str, Any]:
        cost, kl = self.timed(architecture), self.true(architecture)
        return {
            "number": number,
            "origin": origin,
            "state": state,
            "kl": kl * (1.3 if state == "pruned" else 1),
            "kl_se": None if state == "pruned" else 0.03 * kl,
            "predicted_kl": self.predicted(architecture),
            "total_bytes": cost["total_bytes"],
            "parameters": cost["parameters"],
            "tokens_per_s": cost["tokens_per_s"],
            "within": True,
            "layers": architecture.to_list(),
        }

    # ---- files

    def found(self) -> dict[str, Any]:
        """What `nas search` writes to architecture.json."""
        baselines = {
            "uniform": self._uniform(),
            "depth-contiguous": self._depth(range(8, len(self.table))),
            "depth-score": self._depth(sorted(range(2, len(self.table)), key=lambda i: self.table[i][-1].score)),
            "random": self.cheapen(2.5),
        }
        origins = ["optimum", *baselines, *["pool"] * 4, "attention-rich", "ffn-rich", "path"]
        origins += ["around"] * 4 + ["swap"] * 28
        trials = []
        for number, origin in enumerate(origins):
            architecture = baselines.get(origin) or self.cheapen(0.0 if origin == "optimum" else 0.25)
            state = "pruned" if origin == "swap" and number % 4 == 0 else "complete"
            trials.append(self.trial(number, origin, architecture, state))
        done = sorted((t for t in trials if t["state"] == "complete"), key=lambda t: t["kl"])
        finalists = [self._finalist(trial, index) for index, trial in enumerate(done[:5])]
        chosen = min(finalists, key=lambda finalist: finalist["heal"][-1]["kl"])
        chosen["chosen"] = True
        best = next(trial for trial in trials if trial["layers"] == chosen["layers"])
        optimum = trials[0]["predicted_kl"]
        return {
            "key": "0123456789ab",
            "parent": "smollm2",
            "fingerprint": "0" * 16,
            "shape": asdict(self.shape),
            "scenario": asdict(Scenario()) | {"prompt": 1024, "output": 1024},
            "limits": {
                "memory": {"low": None, "high": self.budget, "unit": "bytes"},
                "throughput": {"low": 1000.0, "high": None, "unit": "tokens/s"},
                "tpot": {"low": None, "high": 4_000_000, "unit": "ns"},
            },
            "clock": {"name": "H100 datasheet", "device": "H100", "estimate": True},
            "budget_bytes": self.budget,
            "budget_gb": self.budget / 1e9,
            "formula": self.costs.formula(Architecture.from_list(best["layers"])),
            "cost": self.timed(Architecture.from_list(best["layers"])),
            "parent_cost": self.timed(self.shape.parent_architecture),
            "optimum": {
                "score": optimum,
                "bound": optimum * 0.9999,
                "gap": optimum * 1e-4,
                "binding": ["memory"],
                "prices": {"memory": -8.1e-9},
            },
            "layers": best["layers"],
            "kl": best["kl"],
            "kl_se": best["kl_se"],
            "origin": best["origin"],
            "trials": trials,
            "baselines": {
                name: {"layers": made.to_list(), "cost": self.timed(made)}
                | {key: next(t[key] for t in trials if t["origin"] == name) for key in ("kl", "kl_se")}
                for name, made in baselines.items()
            },
            "path": self._path(),
            "finalists": finalists,
            "heldout": {
                "tokens": 32768,
                "parent": {"perplexity": 14.21},
                "child": {"kl": best["kl"] * 1.05, "kl_se": 0.008, "perplexity": 22.9, "top1_agreement": 0.702},
                "uniform": {"kl": trials[1]["kl"] * 1.04, "kl_se": 0.021, "perplexity": 88.1, "top1_agreement": 0.41},
            },
            "warnings": ["the path did not help: its child is worse than the optimum of the summed scores"],
            "seconds": 104.2,
        }

    def _uniform(self) -> Architecture:
        made = [Architecture.uniform(len(self.table), spec) for spec in self.specs if "skip" not in str(spec)]
        return min((a for a in made if self.costs.cost(a).total_bytes <= self.budget), key=self.predicted)

    def _depth(self, order: Any) -> Architecture:
        """Whole layers left out, in this order, until the budget is met."""
        chosen = [0] * len(self.table)
        for layer in order:
            if self.total(chosen) > self.budget:
                chosen[layer] = len(self.specs) - 1
        return self.architecture(chosen)

    def _path(self) -> list[dict[str, Any]]:
        steps = []
        for number in range(1, 13):
            made = self.cheapen(0.1, self.costs.budget_for_share(1 - number * 0.4 / 12))
            size = self.costs.cost(made).total_bytes
            facts = {"progress": number / 12, "budget_bytes": size, "predicted_kl": self.predicted(made)}
            steps.append({**facts, "kl": self.true(made), "layers": made.to_list()})
        return steps

    def _finalist(self, trial: dict[str, Any], index: int) -> dict[str, Any]:
        heal = [{"tokens": 0, "kl": trial["kl"]}]
        for tokens in (1_048_576, 5_242_880, 18_874_368)[: 1 if index == 4 else 2 if index > 1 else 3]:
            kl = 0.29 + 0.3 * trial["kl"] * (tokens / 2e6) ** -0.4 * self.rng.uniform(0.8, 1.2)
            heal.append({"tokens": tokens, "kl": kl, "kl_se": 0.006})
        name = f"{trial['number']:04d}-{trial['origin']}"
        return {"name": name, "origin": trial["origin"], "layers": trial["layers"], "chosen": False, "heal": heal}

    def write(self, directory: Path) -> Path:
        """Writes the run directory and returns it."""
        directory.mkdir(parents=True, exist_ok=True)
        found = self.found()
        save_table(directory / "scores.csv", [row for rows in self.table for row in rows])
        _write(directory / "architecture.json", found)
        _write(directory / "score.json", SCORE)
        healed = {"name": "child after healing", "kl": 0.31, "kl_se": 0.005, "perplexity": 16.4, "top1_agreement": 0.81}
        healing = {"tokens": 18_874_368, "steps": 576, "best_step": 560}
        _write(directory / "eval.json", evaluation(found["key"]))
        results = {"key": "x", "search": found["key"], "rows": [healed], "heldout_tokens": 32768, "healing": healing}
        _write(directory / "results.json", results)
        (directory / "distill").mkdir(exist_ok=True)
        lines = [json.dumps(line) for line in self._metrics(found["kl"])]
        (directory / "distill" / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "ev')  # cut off by a crash
        return directory

    def _metrics(self, start: float) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        for step in range(0, 577, 48):
            kl = 0.3 + (start - 0.3) * math.exp(-step / 60) + 0.06 * math.exp(-step / 300)
            tokens = step * 32768
            lines.append({"kind": "train", "step": step, "tokens": tokens, "loss": kl * 1.1, "lr": 6e-4})
            for name, more in (("held-out", 0.0), ("general", 0.2)):
                facts = {"kl": kl + more, "kl_se": 0.005, "student_ce": 2.65 + (kl + more) / 2, "top1_agreement": 0.8}
                facts["student_perplexity"] = math.exp(facts["student_ce"])
                text = {} if name == "held-out" else {"text": name}
                lines.append({"kind": "eval", "step": step, "tokens": tokens, **facts, **text})
        return lines


SCORE = {
    "parent": "smollm2",
    "candidates": 420,
    "exact": 71,
    "estimator": "tok",
    "rank_correlation": {"candidates": 71, "spearman": 0.963},
    "one_pass_tokens": 32768,
    "exact_tokens": 8192,
    "tokens": {"fit": 81920, "calibration": 32768},
    "device": "NVIDIA H200",
    "seconds": 15.4,
}


def evaluation(search: str) -> dict[str, Any]:
    """An eval.json of parent and child: a text, questions, samples."""
    text = {"tokens": 32704, "sequences": 64, "top1_agreement": 0.7, "top1_agreement_se": 0.004}
    choices = {"questions": 8, "chance": 0.25, "acc": 0.75, "acc_se": 0.16366, "acc_norm": 0.5, "acc_norm_se": 0.18898}
    results: dict[str, Any] = {}
    for model, kl, right in (("p", 0.0, "11101110"), ("c", 0.61, "11000010")):
        results[f"{model}:t"] = text | {"kl": kl, "kl_se": 0.0123, "perplexity": 14.0 + 9 * kl, "perplexity_se": 0.3}
        share = right.count("1") / 8
        results[f"{model}:q"] = choices | {"acc": share, "right": right, "right_norm": right[::-1]}
        results[f"{model}:s"] = {"samples": [{"prompt": "The <b>sun</b>", "text": f" is {model} & warm"}]}
    measures = [("text", "held-out", "t"), ("choices", "quiz", "q"), ("samples", "samples", "s")]
    return {
        "format": 1,
        "search": search,
        "models": [{"name": n, "path": f"/{n}", "fingerprint": n[0]} for n in ("parent", "child")],
        "measures": [{"kind": kind, "name": name, "id": id, "about": {}} for kind, name, id in measures],
        "results": results,
        "parameters": {"p": 134_515_008, "c": 81_000_000},
    }


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


if __name__ == "__main__":
    print(MadeUp().write(Path(sys.argv[1])))
