"""Do several GPUs do what one does? Scores and healing by one process, by DDP and by FSDP2, over NCCL.

    python benchmarks/two_gpus.py                  all GPUs there are, a random parent of SmolLM2-135M's shape
    python benchmarks/two_gpus.py --small          two gloo processes on the CPU, a tiny shape

Scores: `nas score`'s sweep on random tokens, compared row by row. Healing: the losses of 20 steps in float32 with the same global
batch, for student and teacher whole (DDP) and sharded (FSDP2), AdamW and Muon; then tokens/s and memory of the default recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from healing import SMALL, SMOLLM2, half_size
from transformers import LlamaConfig, LlamaForCausalLM

import nas.score
from blocks.checkpoint import load_child
from blocks.parent import Parent, open_parent
from blocks.ranks import join
from distill.config import DistillConfig
from distill.trainer import heal
from nas.config import ON_GPU, DataConfig, RunConfig, ScoreConfig
from nas.data import DataSplit
from nas.measure import load_parent_model
from nas.progress import Reporter
from nas.run import create_run
from nas.score import run_score
from nas.table import load_table

EXACT: dict[str, Any] = {
    "tokens": 20 * 8 * 256,
    "batch_sequences": 8,
    "micro_batch": 2,
    "eval_every": 10,
    "eval_tokens": 8192,
}
FAST: dict[str, Any] = {
    **ON_GPU["distill"],
    "tokens": 30 * 32 * 1024,
    "micro_batch": 16,
    "eval_every": 0,
    "eval_tokens": 1024,
}
WAYS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "adamw, FSDP2": {"optimizer": "adamw", "sharding": "full"},
    "muon": {"optimizer": "muon", "learning_rate": 1e-3},
    "muon, FSDP2": {"optimizer": "muon", "learning_rate": 1e-3, "sharding": "full"},
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--small", action="store_true")
    arguments.add_argument("--job", help=argparse.SUPPRESS)
    arguments.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.job:
        return run_job(chosen)
    with tempfile.TemporaryDirectory() as directory:
        chosen.work = Path(directory)
        make_pair(chosen)
        ranks = 2 if chosen.small else torch.cuda.device_count()
        for count in (1, ranks):
            launch(chosen, count)
            print(f"{count} done", flush=True)
        report(chosen, ranks)


def make_pair(chosen: argparse.Namespace) -> None:
    torch.manual_seed(0)
    shape = SMALL if chosen.small else SMOLLM2
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(chosen.work / "parent")
    parent = open_parent(str(chosen.work / "parent"))
    half_size(parent, load_parent_model(parent, "cpu"), chosen.work / "child")


def launch(chosen: argparse.Namespace, count: int) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(count),
        "--master-port",
        str(29_500 + count),
    ]
    command += [__file__, "--job", str(count), "--work", str(chosen.work), *["--small"] * chosen.small]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "2"})


def run_job(chosen: argparse.Namespace) -> None:
    """On each rank: scores, and healing in every way."""
    ranks, device = join(torch.device("cpu" if chosen.small else "cuda"))
    parent = open_parent(str(chosen.work / "parent"))
    nas.score.prepare_data = random_packs  # type: ignore[assignment]
    Parent.tokenizer = lambda self: None  # type: ignore[assignment,method-assign,return-value]
    config = RunConfig(
        str(chosen.work / "parent"), data=DataConfig(sequence_length=64), score=ScoreConfig(exact_share=0.0)
    )
    run = ranks.agree(
        create_run(chosen.work / f"run-{ranks.count}", config, parent.fingerprint) if ranks.main else None
    )
    run_score(run, parent, device, Reporter(quiet=True), ranks=ranks)
    teacher = load_parent_model(parent, device)
    vocabulary = parent.shape.vocab_size
    packs = [np.random.default_rng(seed).integers(vocabulary, size=(64, 1024), dtype=np.uint16) for seed in (0, 1)]
    for name, way in WAYS.items():
        if ranks.count == 1 and "sharding" in way:
            continue
        for kind, base in (("exact", EXACT), *([] if chosen.small else [("fast", FAST)])):
            settings = base | way | {"device": "cpu" if chosen.small else "auto"}
            torch.cuda.reset_peak_memory_stats() if device.type == "cuda" else None
            of = load_parent_model(parent, "cpu" if "sharding" in way else device) if "sharding" in way else teacher
            out = chosen.work / f"heal-{ranks.count}-{kind}-{name}"
            heal(DistillConfig(**settings), of, load_child(chosen.work / "child"), *packs, out)
    ranks.leave()


def random_packs(config: DataConfig, tokenizer: Any, vocabulary: int, out: Path, *_: Any, **__: Any) -> DataSplit:
    out.mkdir(parents=True, exist_ok=True)
    for index, part in enumerate(("fit", "calibration", "heldout", "train")):
        pack = np.random.default_rng(index).integers(vocabulary, size=(64, config.sequence_length), dtype=np.uint16)
        np.save(out / f"{part}.npy", pack)
    return DataSplit(out, {})


def report(chosen: argparse.Namespace, ranks: int) -> None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() and not chosen.small else "CPU"
    print(f"\n{ranks} x {name}, torch {torch.__version__}\n")
    one, several = (load_table(chosen.work / f"run-{count}" / "scores.csv") for count in (1, ranks))
    rows = [(a, b) for own, other in zip(one, several, strict=True) for a, b in zip(own, other, strict=True)]
    worst = max(abs(a.score - b.score) / max(abs(a.score), 1e-9) for a, b in rows)
    print(f"scores: {len(rows)} rows, largest relative difference {worst:.1e}\n")
    print("| healing | ranks | largest relative difference of a loss | tokens/s | GB a rank |\n|" + "---|" * 5)
    for way in WAYS:
        base = losses(chosen.work / f"heal-1-exact-{way.partition(',')[0]}")
        for count in (1, ranks):
            out = chosen.work / f"heal-{count}-exact-{way}"
            if not out.exists():
                continue
            difference = max(abs(a - b) / abs(a) for a, b in zip(base, losses(out), strict=True))
            fast = chosen.work / f"heal-{count}-fast-{way}"
            lines = [line for line in metrics(fast) if line["kind"] == "train"][5:] if fast.exists() else []
            speed = f"{float(np.median([line['tokens_per_s'] for line in lines])):,.0f}" if lines else ""
            memory = f"{lines[-1]['memory'] / 1e9:.2f}" if lines else ""
            print(f"| {way} | {count} | {difference:.1e} | {speed} | {memory} |")


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out) if line["kind"] == "train"]


if __name__ == "__main__":
    main()
