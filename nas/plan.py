"""What a stage will take, before it is done: counts, memory, bytes, FLOPs, and time.

FLOPs are counted; time is measured: `nas score` times a few batches of one layer with the functions that will do the work,
so its ETA holds on any device and for any parent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blocks.shape import ModelShape, as_built
from blocks.spec import Architecture, LayerSpec
from distill.config import DistillConfig
from distill.memory import healing_memory, step_flops
from nas.config import RunConfig, SearchConfig
from nas.costs import Scenario
from nas.guard import guard_set
from search_spaces import SearchSpace

if TYPE_CHECKING:
    import torch

    from blocks.parent import Parent
    from blocks.ranks import Ranks
    from nas.engine import Arrangement, Memory
    from nas.engine_config import EngineConfig

FP32 = 4
GB = 1e9
LARGEST_LIBRARY = 32e9  # bytes of fitted candidates that are kept on disk unless told
EXACT_STREAMS = 16  # children carried through the layers behind at once


@dataclass(frozen=True)
class Counts:
    """How much of what `nas score` does, over all ranks."""

    layers: int
    candidates: int
    scored_exactly: int
    suffix_layers: int
    """Layers that exact scores run, over all candidates."""
    fit_tokens: int
    calibration_tokens: int
    exact_tokens: int
    sequence_length: int
    library_bytes: int
    local_tokens: int
    """Of block-local distillation, for each layer."""
    suffix_sweeps: int
    """Times that streams of exact scores are run to the end, so many at a time ..."""
    suffix_reads: int
    """... and the layers read for it, where weights are streamed."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations (two a multiply-add) by what they are for, over all ranks."""

    forward: int
    statistics: int
    solve: int
    one_pass: int
    vocabulary: int
    exact: int
    local: int
    """Of block-local distillation."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def count(config: RunConfig, shape: ModelShape, space: SearchSpace, tokens: Mapping[str, int], length: int) -> Counts:
    """Counts for packs of so many `tokens` ("fit", "calibration") in sequences of `length`."""
    candidates = [space.layer_candidates(shape, index) for index in shape.layers]
    changed = [specs[1:] for specs in candidates]
    score = config.score
    exact = changed if score.method != "one-pass" else guard_set(shape, candidates, score.exact_share, score.seed)
    local = score.bld_tokens > 0
    sweeps = _suffix_sweeps([len(specs) for specs in exact])
    return Counts(
        layers=shape.num_hidden_layers,
        candidates=sum(map(len, changed)),
        scored_exactly=sum(map(len, exact)),
        suffix_layers=sum((shape.num_hidden_layers - 1 - index) * len(specs) for index, specs in enumerate(exact)),
        fit_tokens=tokens["fit"],
        calibration_tokens=tokens["calibration"] if score.method != "exact" else 0,
        exact_tokens=max(1, min(score.exact_tokens, tokens["calibration"]) // length) * length,
        sequence_length=length,
        library_bytes=2 * sum(candidate_parameters(shape, specs, local) for specs in changed),
        local_tokens=score.bld_tokens,
        suffix_sweeps=len(sweeps),
        suffix_reads=sum(sweeps),
    )


def _suffix_sweeps(candidates: Sequence[int]) -> list[int]:
    """How many layers each suffix sweep reads, for so many exactly scored candidates of each layer; see `ExactScores`."""
    sweeps: list[int] = []
    waiting, behind = 0, 0
    for index in reversed(range(len(candidates))):
        added = candidates[index]
        while added:
            now = min(added, EXACT_STREAMS - waiting)
            waiting, added, behind = waiting + now, added - now, len(candidates) - 1 - index
            if waiting == EXACT_STREAMS:
                sweeps.append(behind)
                waiting = 0
    return sweeps + [behind] * (waiting > 0)


def candidate_parameters(shape: ModelShape, specs: Sequence[LayerSpec], local: bool) -> int:
    """Values that the library keeps of the candidates of one layer; `local`: after block-local distillation."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    kept = 0
    for attention in {spec.attention for spec in specs}:
        if attention.kind == "kv" and attention.kv_heads < shape.num_key_value_heads:
            kept += 2 * hidden * (heads + attention.kv_heads * shape.head_dim)
        kept += hidden * hidden * (attention.kind == "linear")
    for spec in specs:
        if spec.ffn.kind == "width":
            narrower = spec.ffn.width < shape.intermediate_size
            changed = narrower or spec.attention != shape.parent_layer.attention
            kept += hidden * spec.ffn.width * changed * (3 if local else 1)
        elif spec.ffn.kind == "linear":
            kept += hidden * hidden
        elif spec.attention.kind != "skip":
            kept += hidden * (hidden if spec.attention.kind == "linear" else heads)
            if local and spec.attention.kind == "kv":
                kept += hidden * (heads + 2 * spec.attention.kv_heads * shape.head_dim)
    return kept


def count_flops(config: RunConfig, shape: ModelShape, space: SearchSpace, counts: Counts, every: int) -> Flops:
    """FLOPs of every part of `nas score`, matrix products and attention only."""
    hidden, wide, layers = shape.hidden_size, shape.intermediate_size, counts.layers
    samples = config.score.label_samples
    heads = shape.num_attention_heads * shape.head_dim

    def attention(kv_heads: int) -> int:
        """Per token, o_proj left out."""
        return 2 * hidden * (heads + 2 * kv_heads * shape.head_dim) + 2 * counts.sequence_length * heads

    def gram(channels: int) -> int:
        from blocks.fit import FEW_CHANNELS, GRAM_BLOCKS

        return int(2 * channels**2 * (1 if channels <= FEW_CHANNELS else (GRAM_BLOCKS + 1) / (2 * GRAM_BLOCKS)))

    own = shape.num_key_value_heads
    up, layer = 4 * hidden * wide, attention(own) + 2 * heads * hidden + 6 * hidden * wide
    statistics = solve = outputs = local = 0
    for index in shape.layers:
        specs = space.layer_candidates(shape, index)[1:]
        local += layer + 6 * candidate_parameters(shape, specs, local=True)
        for attended in dict.fromkeys(spec.attention for spec in specs):
            pairs = [spec for spec in specs if spec.attention == attended]
            widths = [s.ffn.width for s in pairs if s.ffn.kind == "width"]
            reads = attention(attended.kv_heads) if attended.kind == "kv" else 0
            last = {"kv": heads, "linear": hidden, "skip": 0}[attended.kind]
            outputs += reads + 2 * last * hidden + (up if widths else 0)
            outputs += 2 * hidden * (sum(widths) + 2 * samples * len(pairs))
            if config.score.fit != "fitted":
                continue
            if last and (attended.kv_heads != own or any(s.ffn.kind == "skip" for s in pairs)):
                statistics += reads + gram(last) + 4 * last * hidden
                solve += last**3 // 3 + 4 * last**2 * hidden
            if widths:
                again = 0 if attended.kv_heads == own else reads + 2 * last * hidden
                statistics += again + up + gram(wide) + 2 * wide * hidden
                longest, narrow = max(widths), max([w for w in widths if w < wide], default=0)
                solve += 2 * narrow * wide * (wide + hidden) + longest**3 * 4 // 3 + 3 * longest**2 * hidden
    fit, calibration, exact = counts.fit_tokens, counts.calibration_tokens, counts.exact_tokens
    passes = 1 if every == 1 else 2
    return Flops(
        forward=layers * layer * (passes * (fit + calibration + exact) + fit),
        statistics=statistics * fit,
        solve=solve,
        one_pass=(layers * layer * (2 + samples) + outputs) * calibration,
        vocabulary=2 * shape.vocab_size * hidden * (2 * calibration + exact * (counts.scored_exactly + 1)),
        exact=layer * exact * (counts.suffix_layers + counts.scored_exactly),
        local=local * counts.local_tokens,
    )


@dataclass(frozen=True)
class ScorePlan:
    """What `nas score` will take, on each rank where ranks differ in nothing."""

    counts: Counts
    flops: Flops
    arrangement: Arrangement
    memory: Memory
    bytes_read: int
    seconds_by_part: dict[str, float]
    keeps_library: bool
    ranks: int

    @property
    def seconds(self) -> float:
        return sum(self.seconds_by_part.values())

    def lines(self) -> list[str]:
        """For people."""
        c, m, how = self.counts, self.memory, self.arrangement
        kept = "all kept" if how.every == 1 else f"every {how.every}th layer kept, the others run again"
        shared = f" by {self.ranks} processes" if self.ranks > 1 else ""
        library = f"kept ({c.library_bytes / GB:.2f} GB)" if self.keeps_library else "rebuilt for each child"
        return [
            f"Plan: {c.candidates} candidates in {c.layers} layers, {c.scored_exactly} of them scored exactly too{shared}",
            f"  text    {c.fit_tokens:,} tokens to fit, {c.calibration_tokens:,} to score, {c.exact_tokens:,} for exact scores",
            f"  memory  {m.device / GB:.2f} GB: weights {how.weights} {m.weights / GB:.2f}, streams {m.activations / GB:.2f}, "
            f"working {m.working / GB:.2f}"
            + (f"; {m.elsewhere / GB:.2f} GB of streams on {how.activations}" if m.elsewhere else ""),
            f"          streams of the layers: {kept}; library {library}",
            f"  work    {self.flops.total / 1e12:,.1f} TFLOP, {self.bytes_read / GB:,.2f} GB of weights read",
            f"  time    about {in_words(self.seconds)}: "
            + ", ".join(
                f"{part.replace('_', ' ')} {in_words(seconds)}" for part, seconds in self.seconds_by_part.items()
            ),
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self.counts),
            "flops": asdict(self.flops) | {"total": self.flops.total},
            "arrangement": asdict(self.arrangement),
            "memory_gb": round(self.memory.device / GB, 3),
            "memory": asdict(self.memory),
            "bytes_read": self.bytes_read,
            "seconds": round(self.seconds, 1),
            "seconds_by_part": {part: round(seconds, 2) for part, seconds in self.seconds_by_part.items()},
            "keeps_library": self.keeps_library,
        }


def in_words(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{max(seconds, 0.1):.1f} s"


def plan_score(
    config: RunConfig,
    parent: Parent,
    space: SearchSpace,
    device: torch.device,
    engine: EngineConfig,
    ranks: Ranks,
    tokens: Mapping[str, int],
    length: int,
    directory: Path | None,
) -> ScorePlan:
    """The plan of `nas score`; times a few batches of one layer on the device.

    Args:
        tokens: of the packs "fit" and "calibration"; length: of their sequences.
        directory: of the run, where activations may lie.
    """
    import torch

    from nas.engine import Work, choose, free_disk, make_sweep, resident_memory
    from nas.probe import Probe

    shape, score = parent.shape, config.score
    counts = count(config, shape, space, tokens, length)
    compute = getattr(torch, score.compute_dtype)
    local = score.bld_tokens > 0
    changed = [space.layer_candidates(shape, index)[1:] for index in (0, shape.num_hidden_layers - 1)]
    work = Work(
        fit_tokens=-(-counts.fit_tokens // ranks.count),
        calibration_tokens=-(-counts.calibration_tokens // ranks.count),
        exact_tokens=-(-counts.exact_tokens // ranks.count),
        samples=score.label_samples,
        streams=min(EXACT_STREAMS, counts.scored_exactly),
        layer_candidates=max(candidate_parameters(shape, specs, local) for specs in changed),
        group_candidates=max(
            candidate_parameters(shape, [s for s in specs if s.attention == spec.attention], local)
            for specs in changed
            for spec in specs
        ),
        dtype_bytes=compute.itemsize,
        local=local,
    )
    existing = directory if directory is not None and directory.exists() else None
    how, memory = choose(shape, parent.dtype.itemsize, work, engine, device, existing)
    memory = replace(memory, working=memory.working + resident_memory(device))
    if score.library == "auto":
        keeps = counts.library_bytes < min(LARGEST_LIBRARY, free_disk(existing) / 2)
    else:
        keeps = score.library == "keep"
    reads = shape.parameters(shape.parent_architecture) * parent.dtype.itemsize
    if how.weights == "streamed":
        # Forward over the three texts, again between kept streams, once backward, and the suffixes of exact scores.
        passes = 4 * shape.num_hidden_layers + 3 * (how.every > 1) * shape.num_hidden_layers
        layer = shape.layer_parameters(shape.parent_layer)
        head = shape.vocab_size * shape.hidden_size * (1 + counts.suffix_sweeps)
        reads = (layer * (passes + counts.suffix_reads) + head) * parent.dtype.itemsize
    seconds = Probe(config, make_sweep(parent, device, compute, how), space, counts, how.every, ranks.count).seconds()
    return ScorePlan(
        counts, count_flops(config, shape, space, counts, how.every), how, memory, reads, seconds, keeps, ranks.count
    )


def plan_search(config: SearchConfig, scenario: Scenario, shape: ModelShape, candidates: Any) -> dict[str, Any]:
    """Counts and bytes of `nas search`."""
    optimum = candidates.optimum()
    return {
        "stage": "search",
        "limits": {b.name: {"low": b.low, "high": b.high} for b in candidates.bounds},
        "scenario": vars(scenario) | {},
        "candidates": sum(map(len, candidates.table)),
        "children_to_measure": config.trials,
        "path_steps": config.path_steps,
        "finalists": config.finalists,
        "healing_tokens": sum(count * tokens for count, tokens in new_tokens(config.finalists, config.heal_tokens)),
        "verify_tokens": config.verify_tokens,
        "refit": config.refit,
        "additive_optimum": optimum.score,
        "binding": list(optimum.binding),
        "memory_gb": round(2 * shape.parameters(shape.parent_architecture) * FP32 / 1e9, 3),
    }


def new_tokens(finalists: int, tokens: int) -> list[tuple[int, int]]:
    """(finalists, tokens that each is healed on beyond the round before) of every round of successive halving."""
    from nas.rungs import rungs

    rounds = rungs(finalists, tokens)
    return [(count, upto - before) for (count, upto), (_, before) in zip(rounds, [(0, 0), *rounds], strict=False)]


def plan_distill(
    stages: Sequence[DistillConfig], parent: Parent, child: Architecture, device: torch.device, ranks: int = 1
) -> dict[str, Any]:
    """Counts, memory by what takes it, and FLOPs of `nas distill`: of the longest stage in memory, and of all in work."""
    shape = parent.shape
    built = as_built(shape, child)[1]
    stages = [config.suited_to(child) for config in stages]
    stored = min(parent.dtype.itemsize, FP32)
    memories = [
        healing_memory(
            config, shape, built, ranks=ranks, teacher_bytes=stored if config.compute_dtype == "bfloat16" else FP32
        )
        for config in stages
    ]
    most = max(memories, key=lambda memory: memory.peak)
    flops = sum(config.steps * step_flops(config, shape, built) for config in stages)
    return {
        "stage": "distill",
        "tokens": sum(config.steps * config.step_tokens for config in stages),
        "steps": sum(config.steps for config in stages),
        "batch": ", ".join(f"{config.batch_sequences} x {config.sequence_length}" for config in stages),
        "ranks": ranks,
        "child_parameters": shape.parameters(built),
        "memory_gb": round(most.peak / 1e9, 3),
        "memory_of": "one rank" if ranks > 1 else str(device.type),
        **{f"{name.replace(' ', '_')}_gb": round(size / 1e9, 3) for name, size in most.parts.items()},
        "loss_gb": round(sum(most.loss.values()) / 1e9, 3),
        "backward_gb": round(sum(most.backward.values()) / 1e9, 3),
        "update_gb": round(sum(most.update.values()) / 1e9, 3),
        "tflop": round(flops / 1e12, 1),
    }
