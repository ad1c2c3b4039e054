"""What quantization-aware distillation starts from: a parent rounded to nearest, refitted, or chosen by GPTQ on the way.

    python benchmarks/starts.py                                                    SmolLM2-135M as it is, 16,384 tokens, on a laptop
    python benchmarks/starts.py --tokens 3000000 --fit-tokens 81920 --parent runs/precision/parent      on a GPU

Each start is trained on the same tokens. KLs are to the parent, on held-out text of the same source.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch

from blocks.layer import Weights
from blocks.parent import open_parent
from blocks.refit import refit_sweep
from blocks.rounded_model import round_model
from distill.trainer import heal
from nas.data import DataConfig, load_pack, prepare_data, to_tokens
from nas.engine import make_sweep
from nas.heal_stages import build_stage
from nas.measure import load_parent_model

HOLD = 1000.0  # pseudo-tokens of the refit sweep, as of `nas search`


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--parent", default="smollm2")
    arguments.add_argument("--data", default="python-docs")
    arguments.add_argument("--formats", nargs="+", default=["int4-g32"])
    arguments.add_argument("--tokens", type=int, default=16_384)
    arguments.add_argument("--fit-tokens", type=int, default=8192)
    arguments.add_argument("--eval-tokens", type=int, default=8192)
    arguments.add_argument("--work", type=Path, default=Path("runs/starts"))
    chosen = arguments.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parent = open_parent(chosen.parent)
    data = DataConfig(chosen.data, fit_tokens=chosen.fit_tokens, train_tokens=max(chosen.tokens, chosen.fit_tokens))
    prepare_data(data, parent.tokenizer(), parent.shape.vocab_size, chosen.work / "text", overwrite=True)
    fit, train, heldout = (load_pack(chosen.work / "text" / f"{part}.npy") for part in ("fit", "train", "heldout"))
    sweep, teacher = make_sweep(parent, device), load_parent_model(parent, device)
    given: list[Weights] = [sweep.layer(index) for index in parent.shape.layers]
    settings: dict[str, Any] = {
        "tokens": chosen.tokens,
        "qad": True,
        "eval_every": 0,
        "eval_tokens": chosen.eval_tokens,
        "checkpoint_every": 0,
    }
    config = build_stage({}, settings, device.type, parent.shape.hidden_size)

    rows = []
    for name in chosen.formats:
        architecture = parent.shape.parent_architecture.at(name)
        for start, refit, stored in (("nearest", False, None), ("refit", True, None), ("GPTQ", True, torch.bfloat16)):
            began, layers = time.perf_counter(), given
            if refit:
                text = to_tokens(fit, None, device)
                specs = architecture.layers
                layers = list(refit_sweep(sweep, given, range(len(given)), text, HOLD, None, specs, None, stored))
            took = time.perf_counter() - began
            student = copy.deepcopy(teacher).requires_grad_(True)
            for module, weights in zip(student.model.layers, layers, strict=True):
                module.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
            round_model(student, architecture, through=torch.bfloat16)
            out = chosen.work / f"{name}-{start}"
            result = heal(config, teacher, student, train, heldout, out, resume=False)
            rows.append((name, start, took, result.before.kl, result.after.kl, result.tokens_per_s))
            print(*rows[-1], flush=True)

    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{where}, torch {torch.__version__}; {config.tokens:,} tokens at {config.learning_rate:.1e}\n")
    print("| format | start | its s | KL before | KL after | tokens/s |\n|" + "---|" * 6)
    for name, start, took, before, after, speed in rows:
        print(f"| {name} | {start} | {took:.0f} | {before:.4f} | {after:.4f} | {speed:,.0f} |")


if __name__ == "__main__":
    main()
