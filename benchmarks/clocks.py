"""Is a child as fast as the sum of its parts says, and what does fusing its FFNs win? The tables of docs/clocks.md.

    python benchmarks/clocks.py             a Llama-3.1-8B shape in bfloat16 on this GPU: parent, mild, half and deep children
    python benchmarks/clocks.py --small     a tiny shape on the CPU, to see that it runs

One process measures every candidate of the `default` space and the assembled models in the same rounds, with
random weights. First come diagnostics: what each candidate took, how far its rounds were apart, and what it made of the
memory and the matrix units. Then predicted against measured times, with the slope over chains (which is what a
profile keeps) and with the plain mean of a chain (which counts the start of each graph once a subblock). Last, tokens per
second of every model, and of the fused ones against the same child unfused.

`mild`, `half` and `deep` draw their layers at random, so that hardly two neighbours lack their attention: nothing can be
fused in them. For fusion there is of each share a second child, "contiguous", made as depth pruning of attention makes one:
neighbouring layers lose their attention, and FFNs are narrowed (none is dropped) until the bytes are those of the share.
"fused" is the same child as `nas fuse` would publish it if all runs were kept: the FFNs of the stretch, without its last one,
in one wide FFN (`--longest` cuts the run into several). Only its time is measured; what fusion costs in KL is in
benchmarks/fusion.py.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch

from blocks.fuse import Run, ffn_stretches, fused_architecture
from blocks.shape import ModelShape
from blocks.spec import Architecture, AttentionSpec, FFNSpec, LayerSpec
from nas.bench import effort_for, run_bench
from nas.bench_command import candidates, made_child
from nas.clock import PHASES, Check, Measured, Profile, built_layer, tokens_per_second
from nas.costs import CostModel, Scenario
from nas.datasheet import DATASHEETS, RooflineClock
from nas.progress import Reporter
from search_spaces import SearchSpace, load_space

LLAMA_8B = ModelShape(4096, 14_336, 32, 32, 8, 128, 128_256)
TINY = ModelShape(128, 1024, 6, 8, 4, 16, 512)
SHARES = {"mild": 0.8, "half": 0.5, "deep": 0.3}
TARGET = 0.05
CONTIGUOUS, FUSED = "contiguous", "fused"


# Children


def children_of(
    space: SearchSpace, shape: ModelShape, scenario: Scenario, longest: int | None
) -> dict[str, Architecture]:
    """By label: of each share the random child, the contiguous one and the fused one."""
    children = {label: made_child(space, shape, scenario, share) for label, share in SHARES.items()}
    for label, share in SHARES.items():
        unfused = contiguous_child(space, shape, scenario, share)
        children[f"{label} {CONTIGUOUS}"] = unfused
        children[f"{label} {FUSED}"] = fused_architecture(unfused, runs_of(unfused, longest))
    return children


def contiguous_child(space: SearchSpace, shape: ModelShape, scenario: Scenario, share: float) -> Architecture:
    """A child that keeps about `share` of the parent's weights and KV cache: of its attentions, by leaving neighbours out;
    of its FFNs, by narrower ones of the space."""
    rng, costs, count = random.Random(0), CostModel(shape, scenario), shape.num_hidden_layers
    bare = max(3, round((1 - share) * count))  # of two FFNs, none but the last one left out would remain
    start = max(1, count - count // 8 - bare)
    own = shape.parent_layer
    layers = [LayerSpec(AttentionSpec("skip"), own.ffn) if start <= i < start + bare else own for i in shape.layers]
    widths = [ffn for ffn in space.ffn_candidates(shape) if ffn.kind == "width"]
    order = list(shape.layers) * len(widths)
    rng.shuffle(order)
    excess = sum(map(costs.layer_bytes, layers)) + costs.fixed_bytes - costs.budget_for_share(share)
    for index in order:
        narrower = widths[widths.index(layers[index].ffn) + 1 :]
        if excess > 0 and narrower:
            new = LayerSpec(layers[index].attention, narrower[0])
            excess -= costs.layer_bytes(layers[index]) - costs.layer_bytes(new)
            layers[index] = new
    return Architecture(tuple(layers))


def runs_of(architecture: Architecture, longest: int | None) -> list[Run]:
    """Every stretch without its last FFN, in runs of at most `longest`."""
    runs = []
    for stretch in ffn_stretches(architecture):
        usable = stretch[:-1]
        length = longest or len(usable)
        runs += [usable[i : i + length] for i in range(0, len(usable), length)]
    return [run for run in runs if len(run) > 1]


# Tables


def diagnostics(profile: Profile) -> None:
    """One line a candidate: times, spread, what the start of a graph would add, GB/s of a decode, TFLOP/s of a prefill."""
    roofline = RooflineClock(DATASHEETS["H200"], profile.shape, profile.scenario)  # for its counts alone
    print("\n| candidate | prefill ms | ± | chained | TFLOP/s | decode ms | ± | chained | GB/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, entry in [*profile.entries.items(), ("fixed", profile.fixed)]:
        kind = AttentionSpec if name.startswith("attention") else FFNSpec
        flops = rate = ""
        if name != "fixed" and entry.decode_ms and entry.prefill_ms:
            prefill, decode = roofline.work(kind.parse(name))
            flops, rate = f"{prefill.flops / entry.prefill_ms / 1e9:.1f}", f"{decode.bytes / entry.decode_ms / 1e6:.0f}"
        print(
            f"| {name} | {entry.prefill_ms:.4f} | {entry.prefill_spread:.1%} | {entry.prefill_chained_ms:.4f} | {flops} "
            f"| {entry.decode_ms:.5f} | {entry.decode_spread:.1%} | {entry.decode_chained_ms:.5f} | {rate} |"
        )


def chained_sum(profile: Profile, architecture: Architecture, phase: str) -> float:
    """Milliseconds of a child by the plain means of chains."""
    parts: list[Measured] = [profile.fixed]
    for layer in architecture:
        built = built_layer(profile.shape, layer)
        parts += [profile.entries[str(built.attention)], profile.entries[str(built.ffn)]]
    return sum(float(getattr(part, f"{phase}_chained_ms")) for part in parts)


def comparison(profile: Profile) -> float:
    """Predicted and measured times of the assembled models; returns the largest error of a child."""
    costs, largest = CostModel(profile.shape, profile.scenario), 0.0
    print("\n| model | GB | phase | predicted ms | measured ms | ± | error | error of plain means |")
    print("|---|---|---|---|---|---|---|---|")
    for check in profile.checks:
        architecture = Architecture.from_list(list(check.architecture))
        gb = costs.cost(architecture).gb
        for phase in PHASES:
            predicted, measured = getattr(check, f"{phase}_predicted_ms"), getattr(check, f"{phase}_measured_ms")
            error = float(getattr(check, f"{phase}_error"))
            plain = chained_sum(profile, architecture, phase) / measured - 1
            spread = getattr(check, f"{phase}_spread")
            print(
                f"| {check.label} | {gb:.2f} | {phase} | {predicted:.3f} | {measured:.3f} | {spread:.1%} | {error:+.2%} | {plain:+.2%} |"
            )
            if check.label != "parent":
                largest = max(largest, abs(error))
    return largest


def throughput(profile: Profile) -> None:
    """Tokens per second of every model, measured and predicted, and how many times the parent's that is."""

    def rate(check: Check, what: str) -> float:
        times = [round(getattr(check, f"{phase}_{what}_ms") * 1e6) for phase in PHASES]
        return tokens_per_second(profile.scenario, *times)

    parent = profile.checks[0]
    print("\n| model | tokens/s measured | of the parent's | tokens/s predicted | of the parent's |")
    print("|---|---|---|---|---|")
    for check in profile.checks:
        measured, predicted = rate(check, "measured"), rate(check, "predicted")
        print(
            f"| {check.label} | {measured:,.0f} | {measured / rate(parent, 'measured'):.2f} x "
            f"| {predicted:,.0f} | {predicted / rate(parent, 'predicted'):.2f} x |"
        )


def fusion_table(profile: Profile) -> None:
    """Tokens per second read, generated, and of whole requests; how many times the parent's, and the unfused child's."""
    checks = {check.label: check for check in profile.checks}
    costs, parent = CostModel(profile.shape, profile.scenario), rates(profile, checks["parent"])
    columns = [f"{what} tokens/s | x parent" for what in ("prefill", "decode", "request")]
    print(f"\n| model | GB | {' | '.join(columns)} | x unfused: prefill | decode | request |\n|" + "---|" * 11)
    for label, check in checks.items():
        own = rates(profile, check)
        cells = [f"{rate:,.0f} | {rate / of:.3f} x" for rate, of in zip(own, parent, strict=True)]
        gains = [""] * len(own)
        if label.endswith(FUSED):
            unfused = rates(profile, checks[label.replace(FUSED, CONTIGUOUS)])
            gains = [f"{rate / of:.3f} x" for rate, of in zip(own, unfused, strict=True)]
        gb = costs.cost(Architecture.from_list(list(check.architecture))).gb
        print(f"| {label} | {gb:.2f} | {' | '.join(cells + gains)} |")


def rates(profile: Profile, check: Check) -> tuple[float, float, float]:
    """Prompt tokens read per second, tokens per second of a decode step, and generated tokens per second of whole requests."""
    s, times = profile.scenario, [round(getattr(check, f"{phase}_measured_ms") * 1e6) for phase in PHASES]
    read, generated = s.batch * s.prompt_tokens / times[0] * 1e9, s.batch / times[1] * 1e9
    return read, generated, tokens_per_second(s, *times)


def fused_lines(children: dict[str, Architecture]) -> None:
    """What the contiguous children are, and what was fused in them."""
    print()
    for label in SHARES:
        unfused, fused = children[f"{label} {CONTIGUOUS}"], children[f"{label} {FUSED}"]
        stretch = ffn_stretches(unfused)[0]
        wide = [f"{layer.ffn.width:,}" for i, layer in enumerate(fused) if i in stretch[:-1] and layer.ffn.width]
        print(
            f"{label}: layers {stretch[0]}-{stretch[-1]} without attention, FFNs {stretch[0]}-{stretch[-2]} fused to "
            f"{' + '.join(wide)} channels, mean width of an FFN {sum(x.ffn.width for x in unfused) / len(unfused):,.0f}"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny shape on the CPU")
    parser.add_argument("--batch", type=int, help="sequences at once; 16, or 2 with --small")
    parser.add_argument("--context", type=int, help="half of it prompt, half output; 2048, or 64 with --small")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--longest", type=int, help="FFNs in one fused run at most; the whole stretch without its last")
    parser.add_argument("--out", type=Path, default=Path("build/clocks.json"), help="the profile")
    chosen = parser.parse_args(arguments)
    started = time.perf_counter()
    shape, dtype = (TINY, "float32") if chosen.small else (LLAMA_8B, "bfloat16")
    device = torch.device("cpu" if chosen.small or not torch.cuda.is_available() else "cuda")
    batch, context = chosen.batch or (2 if chosen.small else 16), chosen.context or (64 if chosen.small else 2048)
    scenario = Scenario(batch=batch, context=context, weight_dtype=dtype, kv_dtype=dtype)
    space = load_space("default")
    children = children_of(space, shape, scenario, chosen.longest)
    specs, effort = candidates(space, shape, list(children.values())), effort_for(device, chosen.rounds)
    about = {"command": "python benchmarks/clocks.py", "longest": chosen.longest}
    profile = run_bench(shape, scenario, specs, children, device, effort, Reporter(), chosen.out, about)
    print(f"{profile.device}; {dict(profile.about)}; {scenario}")
    diagnostics(profile)
    largest = comparison(profile)
    throughput(profile)
    fused_lines(children)
    fusion_table(profile)
    peak = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most" if device.type == "cuda" else ""
    print(f"\nlargest error of a child: {largest:.2%} (to hold on a GPU: {TARGET:.0%}); {chosen.out} written")
    print(f"{time.perf_counter() - started:.0f} s{peak}")


if __name__ == "__main__":
    main()
