"""At which rate a child should be healed, by how much it is hurt: children without a few attentions, healed on the same tokens.

    python benchmarks/rates.py                                                            SmolLM2-135M, 32,768 tokens, AdamW, on a laptop
    python benchmarks/rates.py --data runs/manuals --tokens 4700000 --rates 1e-3 5e-4 2.5e-4 1e-4       on a GPU, Muon

The last row of each child is that of `nas distill` where no rate is given. KLs are to the parent, on held-out text of the same source.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from pathlib import Path

import torch

from blocks.parent import open_parent
from distill.trainer import heal
from nas.data import DataConfig, load_pack, prepare_data
from nas.heal_stages import build_stage
from nas.measure import load_parent_model

CHILDREN: dict[str, tuple[int, ...]] = {"1": (28,), "3": (6, 9, 28), "10": (5, 6, 7, 9, 11, 13, 26, 27, 28, 29)}
"""Layers of SmolLM2 whose attention is left out."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--parent", default="smollm2")
    arguments.add_argument("--data", default="python-docs")
    arguments.add_argument("--children", nargs="+", default=list(CHILDREN), choices=list(CHILDREN))
    arguments.add_argument("--rates", nargs="*", type=float, default=[3e-4, 1e-4, 3e-5])
    arguments.add_argument("--tokens", type=int, default=32_768)
    arguments.add_argument("--eval-tokens", type=int, default=8192)
    arguments.add_argument("--work", type=Path, default=Path("runs/rates"))
    chosen = arguments.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parent = open_parent(chosen.parent)
    data = DataConfig(chosen.data, train_tokens=chosen.tokens)
    prepare_data(data, parent.tokenizer(), parent.shape.vocab_size, chosen.work / "text", overwrite=True)
    packs = [load_pack(chosen.work / "text" / f"{part}.npy") for part in ("train", "heldout")]
    teacher = load_parent_model(parent, device)
    flags = {"tokens": chosen.tokens, "eval_every": 0, "eval_tokens": chosen.eval_tokens, "checkpoint_every": 0}
    by_damage = build_stage({}, flags, device.type, parent.shape.hidden_size)

    print(f"{by_damage.optimizer}, {by_damage.steps} steps of {by_damage.step_tokens:,} tokens", flush=True)
    print("| attentions left out | peak rate | KL before | KL after |\n|" + "---|" * 4)
    for name in chosen.children:
        configs = [replace(by_damage, learning_rate=rate, full_rate_kl=None) for rate in chosen.rates]
        for config in (*configs, by_damage):
            student = without_attentions(teacher, CHILDREN[name])
            result = heal(config, teacher, student, *packs, chosen.work / "heal", resume=False)
            before, after = result.before.kl, result.after.kl
            rate = config.learning_rate * config.rate_share(before)
            by = "" if config.full_rate_kl is None else " (by damage)"
            print(f"| {name} | {rate:.1e}{by} | {before:.4f} | {after:.4f} |", flush=True)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{where}, torch {torch.__version__}")


def without_attentions(teacher: torch.nn.Module, layers: tuple[int, ...]) -> torch.nn.Module:
    """A copy that learns, whose attentions in these layers add nothing, and never will: neither matrix gets a gradient."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    with torch.no_grad():
        for index in layers:
            attention = student.get_submodule(f"model.layers.{index}.self_attn")
            attention.v_proj.weight.zero_()
            attention.o_proj.weight.zero_()
    return student


if __name__ == "__main__":
    main()
