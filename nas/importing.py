"""`nas import`: a published child (a nemotron-nas checkpoint, or its config.json alone) as a run, counted, priced and drawn.

    run_import(Path("Llama-3_3-Nemotron-Super-49B-v1"), Path("runs/super"), Scenario())

Writes `architecture.json` and, where the weights are at hand, `child/`: the same weights (links, nothing is copied) with our
configuration and model code, which current transformers load. Published checkpoints carry code of an older one. The source is not changed.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from blocks.child.layout import expected_tensors, read_architecture, read_config
from blocks.errors import CheckpointError
from blocks.files import replace_directory, save_json
from blocks.shape import ModelShape
from blocks.spec import Architecture
from nas.costs import CostModel, Scenario
from nas.run import digest


def run_import(source: Path, directory: Path, scenario: Scenario, clock: str | None = None) -> dict[str, Any]:
    """Reads a published child and makes `directory` its run; returns what architecture.json holds.

    Args:
        source: a checkpoint's directory, or a config.json.
        directory: the run; made, or of an earlier import.
        scenario: what it is priced for.
        clock: a profile or a datasheet (nas/clock.py), to price time as well; None for bytes alone.

    Raises:
        CheckpointError: if there is nothing to read, it is of another kind or uses what our model code lacks, its weights
            are damaged or do not fit its configuration, or `directory` holds another run.
    """
    _require_free(directory)
    content = read_config(source)
    shape, architecture = read_architecture(content if source.is_dir() else source)
    shape = with_usual_sizes(shape, architecture)
    found = describe(shape, architecture, scenario, clock) | {"imported": str(source), "child": None}
    if source.is_dir() and has_weights(source):
        if content.get("quantization_config"):
            raise CheckpointError(
                f"{source} is packed, and `nas check` says what loads it; import the bf16 child that it was made from, or its "
                "config.json alone"
            )
        _write_child(directory / "child", source, content, shape, architecture)
        found["child"] = "child"
    save_json(directory / "architecture.json", found)
    return found


def _require_free(directory: Path) -> None:
    if (directory / "config.yaml").exists():
        raise CheckpointError(f"{directory} is a run that `nas score` began; import into another --run")
    if (directory / "architecture.json").exists() and read_import(directory) is None:
        raise CheckpointError(f"{directory} holds a search on a table; import into another --run")


def with_usual_sizes(shape: ModelShape, architecture: Architecture) -> ModelShape:
    """`shape` with the FFN width of a usual layer, against which the others are drawn.

    A published child does not say how wide its parent was. Fused FFNs are wider and stand in layers without attention, so
    the widest FFN beside an attention is taken, if there is one.
    """
    beside = [layer.ffn.width for layer in architecture if layer.attention.kind == "kv"]
    return replace(shape, intermediate_size=max(beside, default=0) or shape.intermediate_size)


def describe(shape: ModelShape, architecture: Architecture, scenario: Scenario, clock: str | None) -> dict[str, Any]:
    """Exact counts and costs of a child, in the words of architecture.json (docs/formats.md)."""
    from nas.clock import load_clock

    opened = None if clock is None else load_clock(clock, shape, scenario)
    costs = CostModel(shape, scenario, opened)
    kv_values = sum(shape.kv_values_per_token(layer.attention) for layer in architecture)
    return {
        "layers": architecture.to_list(),
        "key": digest(architecture.to_list(), asdict(shape), scenario.to_json(), clock),
        "shape": asdict(shape),
        "scenario": scenario.to_json(),
        "clock": None
        if opened is None
        else {"name": opened.name, "device": opened.device, "estimate": opened.estimate},
        "parameters": shape.parameters(architecture),
        "kv_bytes_per_token": kv_values * scenario.kv_value_bytes,
        "cost": costs.cost(architecture).to_json(),
        "formula": costs.formula(architecture),
    }


def has_weights(source: Path) -> bool:
    return any(source.glob("*.safetensors"))


def _write_child(
    path: Path, source: Path, content: Mapping[str, Any], shape: ModelShape, architecture: Architecture
) -> None:
    """The checkpoint with our configuration and model code. Weights are links, other files of its tokenizer are copies."""
    from blocks.checkpoint import COPIED_FILES, MODEL_CODE
    from blocks.child import layout
    from blocks.weights import INDEX, WeightStore

    store = WeightStore(source)
    store.check(expected_tensors(shape, architecture), only=True)
    config = layout.published_config(content)
    code = Path(layout.__file__).parent
    with replace_directory(path) as directory:
        (directory / "config.json").write_text(config.to_json_string())
        for name in MODEL_CODE:
            shutil.copyfile(code / name, directory / name)
        for name in (*COPIED_FILES, INDEX):
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
        for file in store.files:
            (directory / file.name).symlink_to(file.resolve())


def read_import(directory: Path) -> dict[str, Any] | None:
    """What `run_import` wrote to a directory; None if that is another run, or none. Raises CheckpointError if it is damaged."""
    path = directory / "architecture.json"
    if (directory / "config.yaml").exists() or not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if "imported" in found else None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); run `nas import` again") from error


def import_lines(found: Mapping[str, Any], width: int) -> RenderableType:
    """An imported child on the terminal: the map, what its layers are, what it costs."""
    from nas.show import architecture_map

    shape, architecture = ModelShape(**found["shape"]), Architecture.from_list(found["layers"])
    lines = [
        f"{'imported':<11}{found['imported']}",
        f"{'layers':<11}{kinds_in_words(architecture)}",
        f"{'size':<11}{found['parameters']:,} parameters, {found['kv_bytes_per_token']:,} bytes of KV cache a token "
        f"({found['scenario']['kv_dtype']})",
        f"{'memory':<11}{found['formula']}",
    ]
    cost = found["cost"]
    if cost.get("tokens_per_s"):
        about = " (estimate)" if found["clock"]["estimate"] else ""
        lines.append(
            f"{'speed':<11}first token {cost['prefill_ms']:.1f} ms, then {cost['decode_ms']:.2f} ms a token, "
            f"{cost['tokens_per_s']:,.0f} tokens/s, by {found['clock']['name']}{about}"
        )
    costs = CostModel(shape, Scenario(**found["scenario"]))
    return Group(architecture_map(architecture, costs, width), Text("\n".join(lines)))


def kinds_in_words(architecture: Architecture) -> str:
    """How many layers keep what: "80: 49 with attention (kv8 49), 31 without; FFNs from 1,024 to 28,672"."""
    attention = Counter(str(layer.attention).removeprefix("attention:") for layer in architecture)
    ffn = Counter(layer.ffn.kind for layer in architecture)
    widths = [layer.ffn.width for layer in architecture if layer.ffn.kind == "width"]
    counts = ", ".join(f"{name} {count}" for name, count in sorted(attention.items(), key=lambda item: -item[1]))
    empty = sum(layer.attention.kind == layer.ffn.kind == "skip" for layer in architecture)
    span = f"{min(widths):,} to {max(widths):,} channels" if widths else "none"
    rest = "".join(f", {kind} {ffn[kind]}" for kind in ("linear", "skip") if ffn[kind])
    return f"{len(architecture)}: attention {counts}; FFNs {span}{rest}; {empty} layers empty"
