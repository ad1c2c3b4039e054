"""FFN fusion of one child: FFNs in sequence become one wide FFN where that is faster and hurts little (blocks/fuse.py).

Everything is decided on calibration text, and reported on held-out text. Nothing is written before all is decided. What of a
run, or of no run, is fused: nas/fusion_run.py and nas/fusion_path.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blocks.checkpoint import check_child, read_architecture, write_child
from blocks.digest import sample_file
from blocks.errors import ConfigError
from blocks.files import remove_directory, save_json
from blocks.fuse import Run as FusedRun
from blocks.fuse import ffn_stretches, fused_architecture, fused_layers, fused_width
from blocks.parent import Parent, child_as_parent
from blocks.spec import Architecture
from blocks.sweep import Sweep
from blocks.weights import EMBEDDING, FINAL_NORM, HEAD
from nas.clock import MS, part_of
from nas.config import require, to_dict
from nas.costs import Scenario
from nas.data import to_tokens
from nas.engine import make_sweep
from nas.fusion_search import Chooser, FusingChild, Proposal, Row, count_proposals, fused_runs, propose
from nas.fusion_times import DEFAULT_SHEET, HERE, FFNTimes, ffn_times
from nas.measure import measure
from nas.progress import Reporter
from nas.run import digest


@dataclass(frozen=True)
class FusionConfig:
    """What may be fused, and at what price."""

    max_kl: float = 0.02
    """Nats per token that all fusions together may add to the child's KL to the parent, on calibration text."""
    max_length: int | None = None
    """FFNs in one run at most; None is no limit."""
    per_length: int = 2
    """Runs of each length that are measured in each stretch of layers without attention, those of least dependency."""
    include_last: bool = False
    """Whether the last FFN of a stretch may be fused too; the paper leaves it out."""
    tokens: int = 32_768
    """Calibration tokens for dependencies and KLs."""
    clock: str | None = None
    """"device" measures here, a datasheet (H100, ...) estimates; None measures on a GPU and else estimates an H100."""
    sync_us: float = 0.0
    """Microseconds of one all-reduce, counted once an FFN with `tp` above 1: one GPU cannot measure it."""

    def __post_init__(self) -> None:
        require("max_kl", self.max_kl, self.max_kl >= 0, "0 or more")
        require("max_length", self.max_length, self.max_length is None or self.max_length >= 2, "at least 2")
        require("sync_us", self.sync_us, self.sync_us >= 0, "0 or more")
        for name in ("per_length", "tokens"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")


@dataclass(frozen=True)
class Task:
    """One child to fuse.

    Attributes:
        source, out: the child's directory, and where the fused one goes.
        record: the JSON file that says what was found.
        calibration, heldout: token packs [sequences, S].
    """

    source: Path
    out: Path
    record: Path
    calibration: np.ndarray
    heldout: np.ndarray


def open_sweep(path: Path, device: torch.device) -> Sweep:
    """A sweep over a child's own layers, embedding, norm and head. Raises CheckpointError as `check_child`."""
    check_child(path)
    return make_sweep(child_as_parent(path), device)


def plan_fusion(source: Path, out: Path, config: FusionConfig, scenario: Scenario, on_gpu: bool) -> dict[str, Any]:
    """What would be done, for --dry-run; reads no weights. Raises ConfigError as `fuse_child`."""
    shape, architecture = read_architecture(source)
    _check_formats(source, architecture)
    part_of("num_attention_heads", shape.num_attention_heads, scenario.tp)
    stretches = ffn_stretches(architecture)
    return {
        "child": str(source),
        "stretches": [list(stretch) for stretch in stretches],
        "proposals": count_proposals(stretches, config.include_last, config.max_length, config.per_length),
        "max_kl": config.max_kl,
        "tokens": config.tokens,
        "clock": config.clock or (HERE if on_gpu else f"{DEFAULT_SHEET} datasheet"),
        "batch": scenario.batch,
        "prompt": scenario.prompt_tokens,
        "output": scenario.output_tokens,
        "out": str(out),
    }


def _check_formats(source: Path, architecture: Architecture) -> None:
    if architecture.rounded:
        formats = ", ".join(architecture.rounded)
        raise ConfigError(
            f"{source} has number formats ({formats}), which fusion would lose; fuse a child of bf16 alone"
        )


# ---- one child


def fuse_child(
    task: Task, parent: Parent, config: FusionConfig, scenario: Scenario, device: torch.device, reporter: Reporter
) -> dict[str, Any]:
    """Decides what is fused, writes the fused child to `task.out` and the record; or reads what was done already.

    Raises ConfigError for a child with number formats: a fused FFN would have none, and other bytes than were asked for.
    """
    key = _key(task.source, config, scenario, device)
    if (done := _done(task, key)) is not None:
        reporter.say(f"This child was fused already: {task.record}")
        return done
    shape, architecture = read_architecture(task.source)
    _check_formats(task.source, architecture)
    part_of("num_attention_heads", shape.num_attention_heads, scenario.tp)
    sweep = open_sweep(task.source, device)
    stretches = ffn_stretches(architecture)
    tokens = to_tokens(task.calibration, config.tokens, device)
    rows: list[Row] = []
    child = times = None
    if count_proposals(stretches, config.include_last, config.max_length, config.per_length):
        hidden, head = _parent_states(parent, tokens, device, reporter)
        with reporter.task("Running the child", 1) as advance:
            child = FusingChild(sweep, architecture, tokens, hidden, head)
            advance()
        proposals = propose_all(child, config, reporter)
        widths = _widths(architecture, proposals)
        times = ffn_times(config.clock, shape, scenario, widths, device, config.sync_us, reporter)
        rows = Chooser(child, scenario, times, config.max_kl, reporter).choose(proposals)
    runs = fused_runs(rows)
    result: dict[str, Any] = {"key": key, "child": str(task.source), "fused": str(task.out) if runs else None}
    result |= {"runs": [list(run) for run in runs], "stretches": [list(stretch) for stretch in stretches]}
    result |= _told(rows, child, times, architecture, scenario, config, tokens.numel())
    made_before = task.record.exists()
    task.record.unlink(missing_ok=True)
    if runs:
        with reporter.task("Writing the fused child", 1) as advance:
            write_fused(task.source, task.out, sweep, architecture, runs)
            advance()
        del child, sweep
        directories = {"unfused": task.source, "fused": task.out}
        result["heldout"] = measure(parent, directories, task.heldout, device, reporter)
    elif made_before and task.out.exists():
        remove_directory(task.out)  # of another setting; this one fuses nothing
    save_json(task.record, result)
    return result


def _key(source: Path, config: FusionConfig, scenario: Scenario, device: torch.device) -> str:
    files = sorted(source.glob("*.safetensors"))
    measured = config.clock == HERE or (config.clock is None and device.type == "cuda")
    where = torch.cuda.get_device_name(device) if measured and device.type == "cuda" else str(measured)
    weights = [sample_file(file).hex() for file in files]
    return digest(to_dict(config), asdict(scenario), where, (source / "config.json").read_text(), weights)


def _done(task: Task, key: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(task.record.read_text())
    except (OSError, ValueError):
        return None
    whole = found.get("fused") is None or (task.out / "config.json").exists()
    return found | {"child": str(task.source)} if whole and found.get("key") == key else None


def _parent_states(parent: Parent, tokens: Tensor, device: torch.device, reporter: Reporter) -> tuple[Tensor, Tensor]:
    with reporter.task("Running the parent", 1) as advance:
        sweep = make_sweep(parent, device)
        hidden, head = sweep.run(tokens), sweep.head
        advance()
    return hidden, head


def propose_all(child: FusingChild, config: FusionConfig, reporter: Reporter) -> list[Proposal]:
    """Proposals of every stretch."""
    with reporter.task("Dependencies of FFNs", len(child.stretches)) as advance:
        matrices = child.dependencies(advance)
    return [
        proposal
        for stretch, matrix in matrices.items()
        for proposal in propose(stretch, matrix, config.include_last, config.max_length, config.per_length)
    ]


def _widths(architecture: Architecture, proposals: Sequence[Proposal]) -> set[int]:
    apart = {architecture[index].ffn.width for proposal in proposals for index in proposal.run}
    return apart | {fused_width(architecture, proposal.run) for proposal in proposals}


def write_fused(source: Path, out: Path, sweep: Sweep, architecture: Architecture, runs: Sequence[FusedRun]) -> None:
    """Writes a child with these runs fused, in the dtype it is stored in; at most one run and one shard are held."""
    weights = sweep.parent.weights()
    dtype = str(weights.dtype).removeprefix("torch.")
    write_child(out, source, fused_architecture(architecture, runs), _tensors(sweep, len(architecture), runs), dtype)


def _tensors(sweep: Sweep, layers: int, runs: Sequence[FusedRun]) -> Iterator[tuple[str, Tensor]]:
    weights = sweep.parent.weights()
    yield EMBEDDING, weights.embedding
    for index, layer in fused_layers(((index, weights.layer(index)) for index in range(layers)), runs):
        for name, tensor in layer.items():
            yield f"model.layers.{index}.{name}", tensor
    yield FINAL_NORM, weights.final_norm
    if HEAD in weights.shapes:
        yield HEAD, weights.head


# ---- what is told


def _told(
    rows: Sequence[Row],
    child: FusingChild | None,
    times: FFNTimes | None,
    architecture: Architecture,
    scenario: Scenario,
    config: FusionConfig,
    tokens: int,
) -> dict[str, Any]:
    runs = fused_runs(rows)
    told: dict[str, Any] = {
        "layers": fused_architecture(architecture, runs).to_list(),
        "unfused_layers": architecture.to_list(),
        "config": to_dict(config),
        "scenario": scenario.to_json(),
        "tokens": tokens,
        "proposals": [_row(row, scenario) for row in rows],
        "clock": None,
        "kl": None,
        "times": None,
    }
    if child is None or times is None:
        return told
    after = child.measure(child.kept)
    kept = [row for row in rows if row.kept]
    return told | {
        "clock": {"name": times.name, "device": times.device, "estimate": times.estimate},
        "kl": {
            "before": child.unfused.kl,
            "before_se": standard_error(child.unfused.parent),
            "after": after.kl,
            "after_se": standard_error(after.parent),
            "added_se": standard_error(after.parent - child.unfused.parent),
            "to_unfused": after.kl_unfused,
        },
        "times": {name: sum(_row(row, scenario)[name] for row in kept) for name in TIMES},
    }


def standard_error(values: Tensor) -> float | None:
    """Of the mean of one value a sequence [N]; None for fewer than two."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else None


TIMES = ("prefill_ms", "fused_prefill_ms", "decode_ms", "fused_decode_ms", "request_ms", "fused_request_ms")


def _row(row: Row, scenario: Scenario) -> dict[str, Any]:
    def request(times: Any) -> float:
        return scenario.request_ns(times.prefill_ns, times.decode_ns) / MS

    return {
        "run": list(row.run),
        "length": len(row.run),
        "dependency": row.proposal.dependency,
        "dependency_sum": row.proposal.dependency_sum,
        "kl": row.alone.kl,
        "kl_to_unfused": row.alone.kl_unfused,
        "added": row.added,
        "prefill_ms": row.apart.prefill_ns / MS,
        "fused_prefill_ms": row.fused.prefill_ns / MS,
        "decode_ms": row.apart.decode_ns / MS,
        "fused_decode_ms": row.fused.decode_ns / MS,
        "request_ms": request(row.apart),
        "fused_request_ms": request(row.fused),
        "kept": row.kept,
        "why": row.why,
    }
