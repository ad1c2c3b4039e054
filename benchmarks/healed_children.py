"""What healing makes of children of one budget, and what each part of a recipe does (SmolLM2-135M at half its budget).

    python benchmarks/healed_children.py --data runs/manuals --general runs/brown.jsonl --work runs/healed-children

The text is that of benchmarks/manuals.py and benchmarks/brown.py. Children: what a search returns with fitted weights (`fitted`)
and with cut ones (`cut weights`), the best uniform child, fitted, and the published way, cut candidates scored as such and never
fitted (`cut only`). The first is also healed by other recipes. KL to the parent on held-out manuals and on general English,
which is not in the mix, at 1M, 5M, 9.4M and 18.9M tokens. What is done is kept in --work; --cases chooses; --small is a check.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blocks.checkpoint import load_child
from blocks.parent import Parent, open_parent
from blocks.spec import Architecture
from distill.config import DistillConfig
from distill.stages import Stage, heal_in_stages
from nas.assemble import Child
from nas.config import DataConfig, RunConfig, ScoreConfig, SearchConfig, build
from nas.costs import Scenario
from nas.data import load_pack, prepare_data
from nas.measure import load_parent_model
from nas.progress import Reporter
from nas.run import Run, create_run
from nas.score import run_score
from nas.search import Search

TOKENS = 18_900_000
MARKS = (1_000_000, 5_000_000, 9_400_000, 18_900_000)
BLD_TOKENS = 1_000_000
SEED = 0


@dataclass(frozen=True)
class Case:
    """A child and how it is healed."""

    child: str
    settings: dict[str, Any] = field(default_factory=dict)
    bld: bool = False
    """Whether the first million tokens are block-local."""


CASES = {
    "fitted": Case("fitted"),
    "fitted, one shot": Case("optimum"),
    "cut weights": Case("cut-weights"),
    "uniform": Case("uniform"),
    "cut only": Case("cut-only"),
    "fitted + cosine": Case("fitted", {"cosine": 1.0}),
    "fitted, JSD": Case("fitted", {"loss": "jsd"}),
    "fitted, CE": Case("fitted", {"loss": "ce"}),
    "fitted, BLD first": Case("fitted", bld=True),
    "fitted, AdamW": Case("fitted", {"optimizer": "adamw", "learning_rate": 6e-4}),
    "fitted, wsd": Case("fitted", {"schedule": "wsd"}),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--parent", default="smollm2")
    arguments.add_argument("--data", default="python-docs")
    arguments.add_argument("--general", default="python-docs")
    arguments.add_argument("--work", type=Path, default=Path("runs/healed-children"))
    arguments.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--small", action="store_true", help="few tokens, on the CPU: a check of this script")
    chosen = arguments.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not chosen.small else "cpu")
    parent = open_parent(chosen.parent)
    run = scored(chosen, parent, device, "fitted")
    children = chosen.work / "children"
    make_children(chosen, parent, device, run, children)
    general = general_pack(chosen, parent)
    teacher, rows = load_parent_model(parent, device), {}
    for name in chosen.cases:
        rows[name] = heal_case(chosen, CASES[name], name, run, teacher, children, general, device)
        print(
            f"{name}: held-out KL {[round(p['kl'], 4) for p in rows[name]['curve'] if p['text'] == 'held-out']}",
            flush=True,
        )
    if chosen.out:
        chosen.out.write_text(json.dumps(rows, indent=1))
    print_table(rows)


def scored(chosen: argparse.Namespace, parent: Parent, device: torch.device, fit: str) -> Run:
    sizes: dict[str, Any] = {
        "fit_tokens": 81_920,
        "calibration_tokens": 32_768,
        "heldout_tokens": 65_536,
        "train_tokens": 19_000_000,
    }
    if chosen.small:
        sizes = {
            "fit_tokens": 1024,
            "calibration_tokens": 1024,
            "heldout_tokens": 1024,
            "train_tokens": 4096,
            "sequence_length": 64,
        }
    flags = {"fit": fit, "seed": SEED, **({"exact_tokens": 128} if chosen.small else {})}
    config = RunConfig(
        chosen.parent,
        space="keep_or_skip" if chosen.small else "default",
        data=DataConfig(chosen.data, **sizes),
        score=build(ScoreConfig, {}, flags, device.type),
    )
    run = create_run(chosen.work / f"run-{fit}", config, parent.fingerprint)
    run_score(run, parent, device, Reporter(quiet=True))
    return run


def make_children(chosen: argparse.Namespace, parent: Parent, device: torch.device, run: Run, out: Path) -> None:
    """Each child that the cases need, as a checkpoint in `out`."""
    small = (
        {"path_steps": 2, "path_tokens": 256, "verify": 1, "verify_tokens": 1024, "trials": 6} if chosen.small else {}
    )
    config = build(SearchConfig, {}, {"budget": 0.5, "seed": SEED, "finalists": 1, **small}, device.type)

    def search_of(run: Run) -> Search:
        return Search(run, parent, config, Scenario(), device, Reporter(quiet=True), DistillConfig())

    search = search_of(run)
    found = Architecture.from_list(search.run_all()["layers"])
    cut = search_of(scored(chosen, parent, device, "cut"))
    one_shot = [s.candidates.architecture(s.candidates.optimum().choice) for s in (search, cut)]
    assemble: dict[str, Callable[[], Child]] = {
        "fitted": lambda: search.assembler.assemble(found),
        "optimum": lambda: search.assembler.assemble(one_shot[0]),
        "uniform": lambda: search.assembler.assemble(search.baselines["uniform"]),
        "cut-weights": lambda: cut.assembler.assemble(found, refit=False),
        "cut-only": lambda: cut.assembler.assemble(one_shot[1], refit=False),
    }
    for name in {CASES[case].child for case in chosen.cases}:
        if not (out / name / "config.json").exists():
            search.assembler.write(assemble[name](), out / name, "float32")


def general_pack(chosen: argparse.Namespace, parent: Parent) -> np.ndarray:
    """65,536 tokens of other text."""
    small = {"sequence_length": 64, "fit_tokens": 4096, "calibration_tokens": 4096} if chosen.small else {}
    config = DataConfig(chosen.general, heldout_tokens=4096 if chosen.small else 65_536, train_tokens=100_000, **small)
    packs = prepare_data(config, parent.tokenizer(), parent.shape.vocab_size, chosen.work / "general")
    return packs.pack("heldout")


def heal_case(
    chosen: argparse.Namespace,
    case: Case,
    name: str,
    run: Run,
    teacher: torch.nn.Module,
    children: Path,
    general: np.ndarray,
    device: torch.device,
) -> dict[str, Any]:
    """Heals, resumably; held-out and general KL and perplexity at the marks, and how fast it went."""
    out = chosen.work / "heals" / "".join(letter if letter.isalnum() else "-" for letter in name)
    if (out / "row.json").exists():
        row: dict[str, Any] = json.loads((out / "row.json").read_text())
        return row
    flags: dict[str, Any] = {
        "tokens": TOKENS,
        "eval_every": 0,
        "eval_tokens": 0,
        "checkpoint_every": 0,
        **case.settings,
    }
    if chosen.small:
        flags |= {"tokens": 4096, "sequence_length": 64, "device": "cpu"}
    config = build(DistillConfig, {}, flags, device.type)
    first = BLD_TOKENS if not chosen.small else 1024
    configs = [config]
    if case.bld:
        configs = [replace(config, loss="bld", tokens=first), replace(config, tokens=config.tokens - first)]
    pack = load_pack(run.path("data") / "train.npy")
    results = heal_in_stages(
        [
            Stage(each, pack, eval_at=tuple(steps_at(configs, index, chosen.small)))
            for index, each in enumerate(configs)
        ],
        lambda _: (teacher, load_child(children / case.child)),
        load_pack(run.path("data") / "heldout.npy"),
        out,
        other_texts={"general": general},
    )
    row = {"tokens_per_s": results[-1].tokens_per_s, "curve": list(curve(out / "metrics.jsonl", configs))}
    (out / "row.json").write_text(json.dumps(row))
    return row


def steps_at(configs: list[DistillConfig], index: int, small: bool) -> Iterator[int]:
    """The steps of a stage at which the whole healing has seen the tokens of a mark."""
    before = sum(config.tokens for config in configs[:index])
    total = sum(config.tokens for config in configs)
    for mark in MARKS:
        tokens = (mark * total // TOKENS if small else mark) - before
        if 0 < tokens <= configs[index].tokens:
            yield min(configs[index].steps, -(-tokens // configs[index].step_tokens))


def curve(metrics: Path, configs: list[DistillConfig]) -> Iterator[dict[str, Any]]:
    """The evaluations, tokens counted over all stages."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    before, stage = 0, None
    for line in lines:
        if line.get("stage") != stage:
            before += configs[0].tokens if stage is not None else 0
            stage = line.get("stage")
        if line["kind"] == "eval":
            kept = {
                key: line[key] for key in ("kl", "kl_se", "student_perplexity", "teacher_perplexity", "top1_agreement")
            }
            yield {"text": line.get("text", "held-out"), "tokens": before + line["tokens"]} | kept


def nearest(points: list[dict[str, Any]], tokens: float) -> dict[str, Any]:
    return min(points, key=lambda point: abs(float(point["tokens"]) - tokens))


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    for text in ("held-out", "general"):
        print(f"\n{text}: KL to the parent, nats per token, and perplexity at the end")
        print("| child and recipe | before | 1M | 5M | 9.4M | 18.9M | perplexity | top-1 | tokens/s |\n|" + "---|" * 9)
        for name, row in rows.items():
            values = [point for point in row["curve"] if point["text"] == text]
            scale = max(point["tokens"] for point in values) / TOKENS
            at = [nearest(values, mark * scale) for mark in (0, *MARKS)]
            cells = [f"{point['kl']:.4f}" for point in at]
            last = at[-1]
            cells += [
                f"{last['student_perplexity']:.2f}",
                f"{last['top1_agreement']:.3f}",
                f"{row['tokens_per_s']:,.0f}",
            ]
            print(f"| {name} | " + " | ".join(cells) + " |")
        print(
            f"parent's perplexity: {values[-1]['teacher_perplexity']:.2f}; standard error of the last KL: {values[-1]['kl_se']:.4f}"
        )


if __name__ == "__main__":
    main()
