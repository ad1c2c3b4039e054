"""What FFN fusion costs and what it wins: the tables of docs/fusion.md.

    python benchmarks/fusion.py --out build/fusion.json     a GPU of 100 GB or more: about three minutes
    python benchmarks/fusion.py --small                     the CPU, little text, a tiny stack: some minutes, to see that it runs
    python benchmarks/fusion.py --only stack                one of the two parts: child, stack

child: a child of SmolLM2-135M without attention in the `--window` neighbouring layers that miss it least (each scored
exactly), refitted in closed form, not trained. Of every length the run of least dependency is fused: KL to the parent and to
the unfused child on held-out documents, and the time of the whole model. Then the same run one FFN later, so that it takes in
the last of the stretch, which the paper leaves out.

stack: FFNs of Llama-3.1-405B (hidden 16384, 53248 channels) one after another, random weights, as one GPU and as one of eight
(tensor parallelism, without what GPUs say to one another). The same weights in every row: `--stack` FFNs, fused 2, 3, 4, ...
at a time. Beside the measured gain what `nas fuse` would have estimated from the H200's datasheet.

Times are medians over rounds of CUDA graphs (nas/timing.py), all rows in a new order each round.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blocks.fuse import fused_architecture, span
from blocks.layer import Weights
from blocks.parent import Parent, open_parent
from blocks.refit import refit_sweep
from blocks.shape import ModelShape
from blocks.spec import Architecture, AttentionSpec, FFNSpec, LayerSpec
from blocks.sweep import StreamCheckpoints, Sweep
from nas.bench import WARM_SECONDS, Bench, device_name, effort_for, spread
from nas.clock import MS, PHASES
from nas.costs import DTYPE_BYTES, Scenario
from nas.data import DataConfig, prepare_data, to_tokens
from nas.datasheet import DATASHEETS, RooflineClock
from nas.engine import free_memory, make_sweep
from nas.exact import kl_to_parent
from nas.fusion_search import FusingChild, Proposal, propose
from nas.fusion_times import EstimatedFFNs, make_workshop
from nas.inference import Workshop, inference, run_chain
from nas.progress import Reporter
from nas.timing import Timer, make_timer

LLAMA_405B = ModelShape(16_384, 53_248, 126, 128, 8, 128, 128_256)
TINY_STACK = ModelShape(128, 512, 8, 8, 4, 16, 512)
PSEUDO_TOKENS = 1000.0


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    small: bool
    device: torch.device
    rounds: int
    parent: str
    data: str
    window: int
    stack: int

    @property
    def tokens(self) -> dict[str, Any]:
        """Of each part of the text; a sequence has 512 tokens, or 64."""
        few = {"fit_tokens": 1024, "calibration_tokens": 512, "heldout_tokens": 512, "train_tokens": 1024}
        many = {"fit_tokens": 81_920, "calibration_tokens": 16_384, "heldout_tokens": 32_768, "train_tokens": 81_920}
        return few if self.small else many


# ---- child


def child_part(plan: Plan) -> dict[str, Any]:
    """KL and whole-model time of a child, unfused and with one run of every length fused."""
    parent = open_parent(plan.parent)
    data = DataConfig(source=plan.data, sequence_length=64 if plan.small else 512, **plan.tokens)
    with tempfile.TemporaryDirectory() as directory:
        split = prepare_data(data, parent.tokenizer(), parent.shape.vocab_size, Path(directory))
        packs = {part: to_tokens(split.pack(part), None, plan.device) for part in ("fit", "calibration", "heldout")}
    sweep = make_sweep(parent, plan.device)
    window = best_window(sweep, packs["calibration"], plan.window)
    layers = without_attention(sweep, window, packs["fit"])
    architecture = architecture_of(parent, window)
    child = sweep.of(layers)
    chooser = FusingChild(child, architecture, packs["calibration"], sweep.run(packs["calibration"]), sweep.head)
    matrix = chooser.dependencies()[tuple(window)]
    proposals = propose(tuple(window), matrix, per_length=1)
    with_last = [p for p in propose(tuple(window), matrix, True, per_length=99) if p.run[-1] == window[-1]]
    proposals += [p for p in with_last if len(p.run) in (2, len(window) - 1, len(window))]
    tested = FusingChild(child, architecture, packs["heldout"], sweep.run(packs["heldout"]), sweep.head)
    rows = [kl_row(tested, proposal, window) for proposal in proposals]
    times = model_times(plan, parent, architecture, [row["run"] for row in rows])
    for row in rows:
        row |= times[span(row["run"])]
    return {
        "parent": plan.parent,
        "window": window,
        "matrix": matrix.tolist(),
        "tokens": {name: tokens.numel() for name, tokens in packs.items()},
        "unfused": {"kl": tested.unfused.kl} | times["unfused"],
        "parent_times": times["parent"],
        "rows": rows,
    }


def best_window(sweep: Sweep, tokens: Tensor, length: int) -> list[int]:
    """The neighbouring layers, never the first, whose attentions add least KL one by one when they are left out."""
    count = sweep.parent.shape.num_hidden_layers
    streams = StreamCheckpoints(sweep, tokens, dtype=torch.float32)
    hidden = sweep.hidden(streams[count])
    scores = [float("inf")]
    for changed in range(1, count):
        stream = sweep.forward(bare(sweep.layer(changed)), streams[changed])
        for _, weights in sweep.layers(range(changed + 1, count)):
            stream = sweep.forward(weights, stream)
        scores.append(float(kl_to_parent(sweep, hidden, [sweep.hidden(stream)]).mean()))
    start = min(range(1, count - length + 1), key=lambda first: sum(scores[first : first + length]))
    return list(range(start, start + length))


def bare(weights: Weights) -> Weights:
    """A layer without its attention."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(("self_attn.", "input_layernorm."))}


def without_attention(sweep: Sweep, window: Sequence[int], fit_tokens: Tensor) -> list[Weights]:
    """The parent's layers, bare in the window, refitted in closed form."""
    layers = [bare(sweep.layer(i)) if i in window else sweep.layer(i) for i in sweep.parent.shape.layers]
    return list(refit_sweep(sweep, layers, set(window), fit_tokens, PSEUDO_TOKENS))


def architecture_of(parent: Parent, window: Sequence[int]) -> Architecture:
    own = parent.shape.parent_layer
    bare_layer = LayerSpec(AttentionSpec("skip"), own.ffn)
    return Architecture(tuple(bare_layer if i in window else own for i in parent.shape.layers))


def kl_row(tested: FusingChild, proposal: Proposal, window: Sequence[int]) -> dict[str, Any]:
    found = tested.measure(frozenset([proposal.run]))
    return {
        "run": proposal.run,
        "length": len(proposal.run),
        "takes_the_last": proposal.run[-1] == window[-1],
        "dependency": proposal.dependency,
        "dependency_sum": proposal.dependency_sum,
        "kl": found.kl,
        "kl_to_unfused": found.kl_unfused,
    }


def model_times(
    plan: Plan, parent: Parent, architecture: Architecture, runs: Sequence[tuple[int, ...]]
) -> dict[str, dict[str, float]]:
    """Prefill and decode of the whole parent, child and fused children, in milliseconds."""
    dtype = "float32" if plan.device.type == "cpu" else "bfloat16"
    scenario = Scenario(batch=1, context=64 if plan.small else 2048, weight_dtype=dtype, kv_dtype=dtype)
    models = {"parent": parent.shape.parent_architecture, "unfused": architecture}
    models |= {span(run): fused_architecture(architecture, [run]) for run in runs}
    with inference():
        workshop = Workshop.open(parent.shape, scenario, plan.device, 0.4 * free_memory(plan.device))
        bench = Bench(workshop, make_timer(plan.device), effort_for(plan.device, plan.rounds), [], models)
        bench.build(Reporter())
        bench.measure(Reporter(), WARM_SECONDS if plan.device.type == "cuda" else 0.0)
    return {
        name: {f"{phase}_ms": statistics.median(bench.series[name].nanoseconds(phase, 0)) / MS for phase in PHASES}
        for name in models
    }


def child_table(found: dict[str, Any]) -> None:
    unfused, window = found["unfused"], found["window"]
    print(
        f"\n{found['parent']} without attention in layers {span(tuple(window))}, refitted, not trained; batch 1, "
        f"{found['tokens']['heldout']:,} held-out tokens\n"
    )
    print("| fused | FFNs | dependency | its sum | KL to parent | added | KL to unfused | prefill ms | decode ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    own = found["parent_times"]
    print(f"| parent | | | | 0 | | | {own['prefill_ms']:.3f} | {own['decode_ms']:.4f} |")
    print(f"| none | | | | {unfused['kl']:.4f} | | 0 | {unfused['prefill_ms']:.3f} | {unfused['decode_ms']:.4f} |")
    for row in found["rows"]:
        name = span(row["run"]) + (" (the last with them)" if row["takes_the_last"] else "")
        print(
            f"| {name} | {row['length']} | {row['dependency']:.4f} | {row['dependency_sum']:.4f} | {row['kl']:.4f} "
            f"| {row['kl'] - unfused['kl']:+.4f} | {row['kl_to_unfused']:.4f} "
            f"| {row['prefill_ms']:.3f} ({row['prefill_ms'] / unfused['prefill_ms'] - 1:+.1%}) "
            f"| {row['decode_ms']:.4f} ({row['decode_ms'] / unfused['decode_ms'] - 1:+.1%}) |"
        )


# ---- stack


@dataclass(frozen=True)
class Load:
    """What goes through the stack at once: [batch, tokens, D]."""

    phase: str
    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.phase} {self.batch} x {self.tokens}" if self.phase == "prefill" else f"decode {self.batch}"


def stack_part(plan: Plan) -> list[dict[str, Any]]:
    """The stack on one GPU and on one of eight."""
    if plan.small:
        loads = [Load("decode", 1, 1), Load("decode", 4, 1), Load("prefill", 1, 32)]
        return [stack_times(plan, TINY_STACK, tp, loads) for tp in (1, 2)]
    decodes = [Load("decode", batch, 1) for batch in (1, 8, 64)]
    # No activation of more than 2^31 values: kernels would go over it in pieces.
    prompts = {1: (256, 1024), 8: (1024, 4096)}
    return [
        stack_times(plan, LLAMA_405B, tp, [*decodes, *(Load("prefill", 1, tokens) for tokens in lengths)])
        for tp, lengths in prompts.items()
    ]


def stack_times(plan: Plan, shape: ModelShape, tp: int, loads: Sequence[Load]) -> dict[str, Any]:
    dtype = "float32" if plan.device.type == "cpu" else "bfloat16"
    scenario = Scenario(batch=1, context=64, tp=tp, weight_dtype=dtype, kv_dtype=dtype)
    lengths = [length for length in range(1, plan.stack + 1) if plan.stack % length == 0]
    values = 3 * shape.hidden_size * shape.intermediate_size * plan.stack // tp
    with inference():
        widest = plan.stack * shape.intermediate_size
        workshop = make_workshop(shape, scenario, plan.device, [widest], values + (1 << 16))
        timer = make_timer(plan.device)
        taken: dict[Load, dict[int, dict[str, float]]] = {}
        for load in loads:
            taken[load] = load_times(plan, workshop, timer, load, lengths, shape)
            if plan.device.type == "cuda":
                torch.cuda.empty_cache()
    result = {
        "tp": tp,
        "stack": plan.stack,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
    }
    rows = [
        {
            "load": str(load),
            "length": length,
            "estimated_ms": estimated(shape, scenario, load, plan.stack, length),
            **row,
        }
        for load, by_length in taken.items()
        for length, row in by_length.items()
    ]
    del workshop, timer
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
    return result | {"weights_gb": values * DTYPE_BYTES[dtype] / 1e9, "rows": rows}


def load_times(
    plan: Plan, workshop: Workshop, timer: Timer, load: Load, lengths: Sequence[int], shape: ModelShape
) -> dict[int, dict[str, float]]:
    """Milliseconds of the whole stack by how many FFNs are fused at a time."""
    generator = torch.Generator(plan.device).manual_seed(3)
    h = torch.randn(load.batch, load.tokens, shape.hidden_size, generator=generator, device=plan.device)
    h = h.to(workshop.sizes.dtype)
    works = {}
    for length in lengths:
        workshop.weights.offset = 0  # every row reads the same weights, all of them
        specs = [FFNSpec("width", length * shape.intermediate_size)] * (plan.stack // length)
        works[length] = timer.prepare(partial(run_chain, workshop.subblocks(specs), load.phase, h))
    rng = random.Random(0)
    taken: dict[int, list[float]] = {length: [] for length in lengths}
    with Reporter().task(f"{load} on one of {workshop.sizes.scenario.tp}", plan.rounds * len(lengths)) as advance:
        for round_ in range(-1, plan.rounds):
            order = rng.sample(list(lengths), len(lengths))
            times = timer.time([works[length] for length in order], advance if round_ >= 0 else lambda: None)
            if round_ >= 0:  # the first warms up
                for length, ns in zip(order, times, strict=True):
                    taken[length].append(ns)
    return {length: {"ms": statistics.median(t) / MS, "spread": spread(t)} for length, t in taken.items()}


def estimated(shape: ModelShape, scenario: Scenario, load: Load, stack: int, length: int) -> float:
    """Milliseconds that `nas fuse --clock H200` would say the stack takes."""
    half = "bfloat16"
    served = Scenario(
        batch=load.batch,
        context=2 * load.tokens,
        prompt=load.tokens,
        output=1,
        tp=scenario.tp,
        weight_dtype=half,
        kv_dtype=half,
    )
    ffn = EstimatedFFNs(RooflineClock(DATASHEETS["H200"], shape, served)).ffn(length * shape.intermediate_size)
    return (ffn.prefill_ns if load.phase == "prefill" else ffn.decode_ns) * (stack // length) / MS


def stack_table(found: dict[str, Any]) -> None:
    rows, loads = found["rows"], list(dict.fromkeys(row["load"] for row in found["rows"]))
    print(
        f"\n{found['stack']} FFNs of {found['hidden_size']} x {found['intermediate_size']}, one of {found['tp']} GPUs "
        f"({found['weights_gb']:.1f} GB of weights): ms, gain over unfused, in brackets the H200 datasheet's gain\n"
    )
    print("| fused at a time | " + " | ".join(loads) + " |")
    print("|---|" + "---|" * len(loads))
    cells = {(row["load"], row["length"]): row for row in rows}
    for length in dict.fromkeys(row["length"] for row in rows):
        texts = []
        for load in loads:
            own, first = cells[load, length], cells[load, 1]
            gains = [1 - own[name] / first[name] for name in ("ms", "estimated_ms")]
            texts.append(f"{own['ms']:.4g}" + (f", {gains[0]:+.2%} [{gains[1]:+.2%}]" if length > 1 else ""))
        print(f"| {length if length > 1 else 'none'} | " + " | ".join(texts) + " |")
    print(f"\nlargest spread of a row: {max(row['spread'] for row in rows):.2%}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the CPU, tiny shapes, little text")
    parser.add_argument("--only", choices=("child", "stack"))
    parser.add_argument("--parent", default="smollm2")
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--window", type=int, default=10, help="neighbouring layers that lose their attention")
    parser.add_argument("--stack", type=int, default=0, help="FFNs of the stack; 12, or 4 with --small")
    parser.add_argument("--rounds", type=int, default=0, help="10, or 3 with --small")
    parser.add_argument("--out", type=Path, default=Path("build/fusion.json"))
    chosen = parser.parse_args(arguments)
    started, small = time.perf_counter(), chosen.small
    device = torch.device("cpu" if small or not torch.cuda.is_available() else "cuda")
    plan = Plan(
        small,
        device,
        chosen.rounds or (3 if small else 10),
        chosen.parent,
        chosen.data,
        chosen.window,
        chosen.stack or (4 if small else 12),
    )
    result: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__}
    print(f"{result['device']}, torch {torch.__version__}; python benchmarks/fusion.py")
    if chosen.only != "stack":
        result["child"] = child_part(plan)
        child_table(result["child"])
    if chosen.only != "child":
        result["stack"] = stack_part(plan)
        for found in result["stack"]:
            stack_table(found)
    result["seconds"] = time.perf_counter() - started
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    peak = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most" if device.type == "cuda" else ""
    print(f"\n{chosen.out} written; {result['seconds']:.0f} s{peak}")


if __name__ == "__main__":
    main()
