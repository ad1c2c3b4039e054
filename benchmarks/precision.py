"""Precision as one more choice: the tables of docs/benchmarks.md on number formats (SmolLM2-135M).

    python benchmarks/precision.py --data runs/manuals --other-data runs/general            all parts, on this GPU
    python benchmarks/precision.py --small                                                  a check of this script, on the CPU

The weights of the embedded parent come out of a 4-bit file and lie on its grid, which flatters int4. So the first part trains the
parent on other text until they are off it, and all other parts take that one; their own text, --data, it was not trained on. Parts
(--parts chooses; what is done is kept in --work):

    parent       trained off the grid; KL of the parent in each format before and after, to itself
    additivity   structure + precision against joint true KLs of single layers
    budgets      held-out KL at shares of the parent's bf16 weights + KV: structure only, best uniform format on the parent, best
                 structure in a uniform format, joint; those searched and rounded to nearest, and by GPTQ (--quantizers)
    gptq         round to nearest against GPTQ, whole parent, each format, calibrated on the fitting text
    qad          quantization-aware distillation of the whole parent: by KL and by cross-entropy, against rounding alone
    healed       children of `budgets`, healed on the same tokens: structure only; joint, as it is served, or as its master first
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blocks.calibrated import calibrated_layers
from blocks.checkpoint import load_child, read_architecture
from blocks.files import save_json
from blocks.formats import FORMATS
from blocks.parent import Parent, open_parent
from blocks.rounded import round_layer
from blocks.rounded_model import round_model
from blocks.spec import Architecture
from distill.config import DistillConfig
from distill.stages import Stage, heal_in_stages
from distill.trainer import heal
from nas.additivity import Additivity
from nas.assemble import Assembler, Child
from nas.baselines import CHILD_PRECISION, PARENT_PRECISION
from nas.config import ON_GPU, QUANTIZERS, DataConfig, RunConfig, ScoreConfig, SearchConfig, build
from nas.costs import CostModel, Scenario
from nas.data import load_pack, prepare_data, to_tokens
from nas.engine import make_sweep
from nas.exact import kl_to_parent
from nas.heal_stages import FULL_RATE_KL
from nas.measure import load_parent_model
from nas.precisions import PrecisionScoring
from nas.progress import Reporter
from nas.run import Run, create_run
from nas.score import run_score
from nas.search import Search
from nas.search_problem import choose_kv_dtype, score_precisions

SEARCHED = "bf16,fp8,int8,nvfp4,nvfp4a16,int4-g32"
ROUNDED = ("fp8", "int8", "nvfp4", "nvfp4a16", "int4-g32", "int3")
LEARNED: dict[str, tuple[float, ...]] = {
    "fp8": (1e-5,),
    "nvfp4": (1e-5, 1e-4),
    "int4-g32": (1e-5, 1e-4),
    "int3": (1e-5, 1e-4),
}
"""Peak learning rates of quantization-aware distillation by format."""
BUDGETS = (0.7, 0.5, 0.35, 0.25)
KV_DTYPES = "bfloat16,float8"
PARTS = ("parent", "additivity", "budgets", "gptq", "qad", "healed")
SIZES: dict[str, Any] = {
    "fit_tokens": 81_920,
    "calibration_tokens": 32_768,
    "heldout_tokens": 65_536,
    "train_tokens": 19_000_000,
}
SMALL_SIZES: dict[str, Any] = {
    "fit_tokens": 1024,
    "calibration_tokens": 1024,
    "heldout_tokens": 512,
    "train_tokens": 4096,
    "sequence_length": 64,
}
SMALL_SEARCH = {
    "path_steps": 2,
    "path_tokens": 256,
    "verify": 1,
    "verify_tokens": 512,
    "trials": 8,
    "precision_tokens": 256,
}
OFF_GRID = 4_000_000
LEARNING = 3_000_000
HEALED = (0.7, 0.5, 0.35)
HEALING = 9_400_000
BY_DAMAGE: dict[str, Any] = {"full_rate_kl": FULL_RATE_KL}
ROUNDED_LAST: dict[str, Any] = {"share": 0.25, "qad": True, "optimizer": "adamw", "learning_rate": 7.1e-5}
WAYS: dict[str, tuple[str, tuple[dict[str, Any], ...]]] = {
    "structure only": ("structure only", (BY_DAMAGE,)),
    "joint, in two stages, full rate": ("joint", ({"share": 0.75}, ROUNDED_LAST)),
    "joint, in two stages": ("joint", ({"share": 0.75, **BY_DAMAGE}, ROUNDED_LAST)),
    "joint": ("joint", ({"qad": True, **BY_DAMAGE},)),
    "joint, GPTQ, in two stages": ("joint, GPTQ", ({"share": 0.75, **BY_DAMAGE}, ROUNDED_LAST)),
    "joint, GPTQ": ("joint, GPTQ", ({"qad": True, **BY_DAMAGE},)),
}
"""Which child, and its stages."""


class Bench:
    """One run of this script: where things lie, and the parent off the grid."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen, self.small, self.work = chosen, chosen.small, chosen.work
        self.device = torch.device("cuda" if torch.cuda.is_available() and not chosen.small else "cpu")
        self.reporter = Reporter(quiet=True)

    # ---- the parent

    def parent(self) -> Parent:
        """The parent trained off the grid of the file that it came in."""
        directory = self.work / "parent"
        if not (directory / "config.json").exists():
            start = open_parent(self.chosen.parent)
            for source, name in ((self.chosen.data, "text"), (self.chosen.other_data, "other-text")):
                data = DataConfig(source, **(SMALL_SIZES if self.small else SIZES))
                prepare_data(data, start.tokenizer(), start.shape.vocab_size, self.work / name)
            model = load_parent_model(start, self.device)
            student = copy.deepcopy(model).requires_grad_(True)
            packs = (load_pack(self.work / "other-text" / f"{part}.npy") for part in ("train", "heldout"))
            settings = self.training(OFF_GRID) | {"loss": "ce", "learning_rate": 2e-4, "optimizer": "adamw"}
            result = heal(DistillConfig(**settings), model, student, *packs, self.work / "off-grid")
            tell(
                self.work / "off-grid.json",
                {"tokens": result.tokens, "before": result.before.to_dict(), "after": result.after.to_dict()},
            )
            student.to(torch.bfloat16).save_pretrained(directory)
            start.tokenizer().save_pretrained(directory)
        return open_parent(str(directory))

    def training(self, tokens: int) -> dict[str, Any]:
        if self.small:
            return {
                "tokens": 1024,
                "sequence_length": 64,
                "batch_sequences": 4,
                "micro_batch": 4,
                "eval_tokens": 256,
                "device": "cpu",
            }
        return {**ON_GPU["distill"], "tokens": tokens, "micro_batch": 16, "eval_every": 0, "eval_tokens": 65_536}

    def grid_part(self) -> dict[str, Any]:
        """KL of a parent rounded to nearest to itself: the one of the file, and the one off the grid."""
        parents = {"of the file": open_parent(self.chosen.parent), "off the grid": self.parent()}
        found: dict[str, Any] = {"training": json.loads((self.work / "off-grid.json").read_text())}
        for name, parent in parents.items():
            found[name] = {each: self.whole(parent, each) for each in ROUNDED if self.holds(parent, each)}
        return found

    def holds(self, parent: Parent, precision: str) -> bool:
        return CostModel(parent.shape, Scenario()).holds(parent.shape.parent_layer.at(precision))

    def whole(self, parent: Parent, precision: str) -> float:
        """Held-out KL of a parent with every matrix inside layers rounded to nearest."""
        sweep, tokens = make_sweep(parent, self.device), self.text("heldout")
        spec = parent.shape.parent_layer.at(precision)
        layers = [round_layer(sweep.layer(index), spec) for index in parent.shape.layers]
        return float(kl_to_parent(sweep, sweep.run(tokens), [sweep.of(layers).run(tokens)])[0].mean())

    def text(self, part: str) -> torch.Tensor:
        return to_tokens(load_pack(self.work / "text" / f"{part}.npy"), None, self.device)

    # ---- scores and searches

    def run(self) -> tuple[Run, Parent]:
        parent = self.parent()
        config = RunConfig(
            str(self.work / "parent"),
            space="keep_or_skip" if self.small else "default",
            data=DataConfig(self.chosen.data, **(SMALL_SIZES if self.small else SIZES)),
            score=build(ScoreConfig, {}, {"exact_tokens": 128} if self.small else {}, self.device.type),
        )
        run = create_run(self.work / "run", config, parent.fingerprint)
        run_score(run, parent, self.device, self.reporter)
        return run, parent

    def additivity_part(self) -> dict[str, Any]:
        run, parent = self.run()
        names = [name for name in SEARCHED.split(",") if name != "bf16"]
        tokens = 256 if self.small else 8192
        scoring = PrecisionScoring(run, parent, self.device, self.reporter, tokens)
        return Additivity(scoring, scoring.ensure(names), names, draws=2 if self.small else 24).run()

    def budgets_part(self) -> list[dict[str, Any]]:
        run, parent = self.run()
        return [
            row
            for share in self.chosen.budgets[: 1 if self.small else None]
            for row in self.at_budget(run, parent, share)
        ]

    def at_budget(self, run: Run, parent: Parent, share: float) -> Iterator[dict[str, Any]]:
        yield from self.searched(run, parent, share, "structure only", "bf16", "bfloat16", "nearest")
        for quantizer in self.chosen.quantizers:
            yield from self.searched(run, parent, share, "joint", SEARCHED, KV_DTYPES, quantizer)

    def searched(
        self, run: Run, parent: Parent, share: float, name: str, precisions: str, kv: str, quantizer: str
    ) -> list[dict[str, Any]]:
        """The rows of one search: what it is compared with, and its child."""
        by = ", GPTQ" if quantizer == "gptq" else ""
        name += by
        file = self.work / f"budget-{share}-{slug(name)}.json"
        if file.exists():
            found: list[dict[str, Any]] = json.loads(file.read_text())
            return found
        flags = {
            "budget": share,
            "precisions": precisions,
            "quantizer": quantizer,
            "finalists": 1,
            **(SMALL_SEARCH if self.small else {"trials": 40}),
        }
        config = build(SearchConfig, {}, flags, self.device.type)
        started, scenario = time.perf_counter(), Scenario(kv_dtype=kv)
        score_precisions(run, parent, config, scenario, self.device, self.reporter)
        scenario = choose_kv_dtype(run, parent.shape, config, scenario, self.reporter)
        search = Search(run, parent, config, scenario, self.device, self.reporter, DistillConfig())
        layers = search.run_all()["layers"]
        took = time.perf_counter() - started
        compared = ((f"parent, one format{by}", PARENT_PRECISION), (f"structure, one format{by}", CHILD_PRECISION))
        rows = [
            self.row(each, search, search.baselines[key], share) for each, key in compared if key in search.baselines
        ]
        rows.append(self.row(name, search, Architecture.from_list(layers), share) | {"seconds": round(took, 1)})
        tell(file, rows)
        return rows

    def row(self, name: str, search: Search, architecture: Architecture, share: float) -> dict[str, Any]:
        heldout = self.text("heldout")
        assembler: Assembler = replace(search.assembler, verify_tokens=heldout, _hidden=None)
        child: Child = assembler.assemble(architecture)
        assembler.write(child, self.work / "children" / f"{slug(name)}-{share}", "bfloat16")
        cost = search.candidates.costs.cost(architecture)
        row = {
            "budget": share,
            "name": name,
            "kl": float(assembler.true_kl(child).mean()),
            "gb": cost.gb,
            "kv_dtype": search.scenario.kv_dtype,
            "precisions": shares(architecture),
            "skipped": sum(layer.attention.kind == "skip" for layer in architecture),
            "layers": architecture.to_list(),
        }
        print({key: value for key, value in row.items() if key != "layers"}, flush=True)
        return row

    # ---- rounding and learning

    def gptq_part(self) -> dict[str, Any]:
        parent = self.parent()
        sweep, tokens = make_sweep(parent, self.device), self.text("heldout")
        hidden, found = sweep.run(tokens), {}
        for name in ROUNDED[: 1 if self.small else None]:
            if not self.holds(parent, name):
                continue
            architecture, started = parent.shape.parent_architecture.at(name), time.perf_counter()
            layers = [layer.weights for layer in calibrated_layers(sweep, architecture, self.text("fit"))]
            took = time.perf_counter() - started
            kl = float(kl_to_parent(sweep, hidden, [sweep.of(layers).run(tokens)])[0].mean())
            found[name] = {"nearest": self.whole(parent, name), "gptq": kl, "seconds": took}
            print(name, found[name], flush=True)
        return found

    def qad_part(self) -> dict[str, Any]:
        parent, found = self.parent(), {}
        teacher = load_parent_model(parent, self.device)
        packs = [load_pack(self.work / "text" / f"{part}.npy") for part in ("train", "heldout")]
        cases = [(name, rate) for name, rates in LEARNED.items() for rate in rates]
        for name, rate in cases[: 1 if self.small else None]:
            for loss in ("kl", "ce"):
                student = copy.deepcopy(teacher).requires_grad_(True)
                round_model(student, parent.shape.parent_architecture.at(name))
                settings = self.training(LEARNING) | {
                    "loss": loss,
                    "qad": True,
                    "learning_rate": rate,
                    "optimizer": "adamw",
                }
                work = self.work / f"qad-{name}-{rate}-{loss}"
                result = heal(DistillConfig(**settings), teacher, student, *packs, work)
                after = result.after
                found[f"{name} {loss} {rate}"] = {
                    "rounded": result.before.kl,
                    "learned": after.kl,
                    "ce_before": result.before.student_ce,
                    "ce_after": after.student_ce,
                    "tokens": result.tokens,
                    "tokens_per_s": result.tokens_per_s,
                }
                print(name, loss, rate, found[f"{name} {loss} {rate}"], flush=True)
        return found

    def healed_part(self) -> list[dict[str, Any]]:
        self.budgets_part()
        parent, rows = self.parent(), []
        teacher = load_parent_model(parent, self.device)
        train, heldout = (load_pack(self.work / "text" / f"{part}.npy") for part in ("train", "heldout"))
        budgets = self.chosen.budgets
        for share in budgets[:1] if self.small else [each for each in HEALED if each in budgets]:
            for name, (child, stages) in WAYS.items():
                file = self.work / f"healed-{share}-{slug(name)}.json"
                directory = self.work / "children" / f"{slug(child)}-{share}"
                if not directory.exists():  # by a quantizer that was not asked for
                    continue
                if not file.exists():
                    _, architecture = read_architecture(directory)

                    def load(config: DistillConfig, directory: Path = directory) -> tuple[Any, Any]:
                        student = load_child(directory, rounded=False)
                        return teacher, round_model(student, through=torch.bfloat16) if config.qad else student

                    configs = [self.stage(architecture, **settings) for settings in stages]
                    work = self.work / f"heal-{share}-{slug(name)}"
                    results = heal_in_stages([Stage(config, train) for config in configs], load, heldout, work)
                    row = {"budget": share, "name": name, "tokens": sum(r.tokens for r in results)}
                    row |= {"before": results[0].before.kl, "stages": [r.after.kl for r in results]}
                    tell(file, row | {"tokens_per_s": results[-1].tokens_per_s, "qad_before": results[-1].before.kl})
                rows.append(json.loads(file.read_text()))
                print(rows[-1], flush=True)
        return rows

    def stage(self, architecture: Architecture, share: float = 1.0, **settings: Any) -> DistillConfig:
        whole = self.training(HEALING)
        return DistillConfig(**(whole | {"tokens": round(share * whole["tokens"])} | settings)).suited_to(architecture)


def shares(architecture: Architecture) -> dict[str, int]:
    """Subblocks by precision."""
    parts = [part for layer in architecture for part in (layer.attention, layer.ffn) if part.kind != "skip"]
    return {name: sum(part.precision == name for part in parts) for name in architecture.precisions}


def slug(name: str) -> str:
    """A name for files."""
    return re.sub(r"[^a-z0-9.-]+", "-", name.lower())


def tell(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_json(path, content)


def tables(found: dict[str, Any]) -> None:
    """What docs/benchmarks.md shows."""
    if grid := found.get("parent"):
        print("\n| parent | " + " | ".join(grid["off the grid"]) + " |\n|" + "---|" * (1 + len(grid["off the grid"])))
        for name in ("of the file", "off the grid"):
            print(f"| {name} | " + " | ".join(f"{kl:.4f}" for kl in grid[name].values()) + " |")
    if additivity := found.get("additivity"):
        print("\n| format | sum against joint: median | largest | apart: median | largest |\n|" + "---|" * 5)
        for name, errors in additivity["errors"].items():
            if errors:
                print(f"| {name} | " + " | ".join(f"{value:.2%}" for value in errors.values()) + " |")
    if budgets := found.get("budgets"):
        print(
            "\n| budget | child | held-out KL | GB | KV cache | subblocks by format | attentions skipped | search s |\n|"
            + "---|" * 8
        )
        for row in budgets:
            formats = ", ".join(f"{count} {name}" for name, count in row["precisions"].items())
            print(
                f"| {row['budget']} | {row['name']} | {row['kl']:.4f} | {row['gb']:.4f} | {row['kv_dtype']} | {formats} "
                f"| {row['skipped']} | {row.get('seconds', '')} |"
            )
    if gptq := found.get("gptq"):
        print("\n| format | bits a weight | nearest | GPTQ | ratio | s |\n|" + "---|" * 6)
        for name, of in gptq.items():
            bits = FORMATS[name].bits_per_weight(1536, 576)
            print(
                f"| {name} | {bits:.2f} | {of['nearest']:.5f} | {of['gptq']:.5f} | {of['nearest'] / of['gptq']:.2f} | {of['seconds']:.1f} |"
            )
    if qad := found.get("qad"):
        print(
            "\n| format | loss | rate | KL rounded | KL learned | ratio | CE before | CE after | tokens | tokens/s |\n|"
            + "---|" * 10
        )
        for name, of in qad.items():
            print(
                f"| {name.replace(' ', ' | ')} | {of['rounded']:.4f} | {of['learned']:.4f} | {of['rounded'] / of['learned']:.2f} "
                f"| {of['ce_before']:.4f} | {of['ce_after']:.4f} | {of['tokens']:,} | {of['tokens_per_s']:,.0f} |"
            )
    if healed := found.get("healed"):
        print(
            "\n| budget | child | tokens | KL before | after each stage | of the last, before | tokens/s |\n|"
            + "---|" * 7
        )
        for row in healed:
            after = ", ".join(f"{kl:.4f}" for kl in row["stages"])
            print(
                f"| {row['budget']} | {row['name']} | {row['tokens']:,} | {row['before']:.4f} | {after} | {row['qad_before']:.4f} "
                f"| {row['tokens_per_s']:,.0f} |"
            )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--parent", default="smollm2")
    arguments.add_argument("--data", default="python-docs")
    arguments.add_argument(
        "--other-data", default="python-docs", help="trains the parent off its grid; not the text of --data"
    )
    arguments.add_argument("--work", type=Path, default=Path("runs/precision"))
    arguments.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    arguments.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    arguments.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=QUANTIZERS)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--small", action="store_true", help="few tokens, on the CPU: a check of this script")
    chosen = arguments.parse_args()
    bench, found = Bench(chosen), {}
    parts: dict[str, Callable[[], Any]] = {
        "parent": bench.grid_part,
        "additivity": bench.additivity_part,
        "budgets": bench.budgets_part,
        "gptq": bench.gptq_part,
        "qad": bench.qad_part,
        "healed": bench.healed_part,
    }
    for name in chosen.parts:
        started = time.perf_counter()
        found[name] = parts[name]()
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        if chosen.out:
            tell(chosen.out, found)
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    print(f"\n{device}, torch {torch.__version__}")
    tables(found)


if __name__ == "__main__":
    main()
