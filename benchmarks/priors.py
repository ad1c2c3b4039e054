"""How strongly fits should hold to the parent's matrices when text is little: held-out KL of one architecture.

Takes the architecture and the text of a run (`make demo`), rebuilds its candidates with several strengths of the prior
(`pseudo_tokens`), and runs the refit sweep with several others. No training.

    python benchmarks/priors.py --run runs/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from blocks.candidates import FitConfig, fit_layer
from blocks.layer import Weights
from blocks.parent import open_parent
from blocks.refit import refit_sweep
from blocks.spec import Architecture
from blocks.sweep import Sweep
from nas.data import load_pack, to_tokens
from nas.engine import make_sweep
from nas.exact import kl_to_parent
from nas.run import open_run

FITS = (100.0, 1000.0, 10_000.0)
REFITS = (1000.0, 10_000.0, 30_000.0)
HELDOUT_TOKENS = 4096


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--run", type=Path, default=Path("runs/demo"))
    run = open_run(arguments.parse_args().run)
    parent = open_parent(run.config.parent)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sweep = make_sweep(parent, device)
    architecture = Architecture.load(run.path("architecture.json"))
    text = to_tokens(load_pack(run.path("data") / "fit.npy"), None, device)
    heldout = to_tokens(load_pack(run.path("data") / "heldout.npy"), HELDOUT_TOKENS, device)
    hidden = sweep.run(heldout)

    def true_kl(layers: list[Weights]) -> float:
        return float(kl_to_parent(sweep, hidden, [sweep.of(layers).run(heldout)]).mean())

    changed = [i for i, spec in enumerate(architecture) if spec != parent.shape.parent_layer]
    print(f"{text.numel():,} tokens for fitting, {heldout.numel():,} held out; KL in nats per token", flush=True)
    print("| fit | no refit | " + " | ".join(f"refit {strength:,.0f}" for strength in REFITS) + " |")
    print("|---" * (2 + len(REFITS)) + "|", flush=True)
    for strength in FITS:
        layers = build(sweep, architecture, text, strength)
        refitted = [true_kl(list(refit_sweep(sweep, layers, changed, text, again))) for again in REFITS]
        print(
            f"| {strength:,.0f} | " + " | ".join(f"{kl:.4f}" for kl in (true_kl(layers), *refitted)) + " |", flush=True
        )


def build(sweep: Sweep, architecture: Architecture, tokens: Tensor, pseudo_tokens: float) -> list[Weights]:
    """The layers of a child, each fitted on the parent's own stream."""
    stream = sweep.embed(tokens)
    layers: list[Weights] = []
    for index, spec in enumerate(architecture):
        weights = sweep.layer(index)
        if spec == sweep.parent.shape.parent_layer:
            layers.append(weights)
        else:
            library = fit_layer(sweep, weights, stream, [spec], FitConfig(pseudo_tokens=pseudo_tokens))
            layers.append(library.layer_weights(spec))
        stream = sweep.forward(weights, stream)
    return layers


if __name__ == "__main__":
    main()
