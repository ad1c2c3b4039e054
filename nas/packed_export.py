"""A child with precisions, written with its weights in them: rounded layer by layer, packed, whole or not at all.

write_packed(child, rewrite, out, Packing("gptq", run=Path("runs/default")), reporter)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from blocks.calibrated import CalibratedLayer, calibrated_layers, nearest_layers, needs_text
from blocks.canonical import Rewrite
from blocks.checkpoint import write_child
from blocks.child.layout import expected_tensors
from blocks.errors import ConfigError
from blocks.layer import Weights
from blocks.parent import child_as_parent
from blocks.rounded import subblock_bytes
from blocks.sweep import Sweep
from nas.config import QUANTIZERS

if TYPE_CHECKING:
    from nas.export import Child
    from nas.progress import Reporter

TEXT = Path("data") / "fit.npy"


@dataclass(frozen=True)
class Packing:
    """How weights are rounded.

    Attributes:
        quantizer: "nearest", or "gptq" (blocks/gptq.py), which takes text.
        run: whose fit text is taken; None: that of the run which the child is of.
        device: where layers are rounded and run; a torch device, "cpu" or "cuda".
    """

    quantizer: str = "nearest"
    run: Path | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.quantizer not in QUANTIZERS:
            raise ConfigError(f"--quantizer {self.quantizer}: not known; write {' or '.join(QUANTIZERS)}")


class RewrittenLayers(Sequence[Weights]):
    """The master weights of a rewritten child, a layer at a time; nothing is kept."""

    def __init__(self, rewrite: Rewrite, read: Callable[[str], Tensor], device: torch.device) -> None:
        self.rewrite, self.read, self.device = rewrite, read, device

    def __len__(self) -> int:
        return len(self.rewrite.architecture)

    @overload
    def __getitem__(self, index: int) -> Weights: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Weights]: ...

    def __getitem__(self, index: int | slice) -> Weights | Sequence[Weights]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index >= len(self):
            raise IndexError(index)
        return {name: tensor.to(self.device) for name, tensor in self.rewrite.layer(index, self.read).items()}


def write_packed(child: Child, rewrite: Rewrite, out: Path, packing: Packing, reporter: Reporter) -> None:
    """Writes a child as `rewrite` says, in the precisions of its architecture.

    Raises:
        ConfigError: a format that cannot hold a matrix, or text that is needed and not there.
        NasError: inputs that are not finite.
    """
    from nas.export import sizes_for

    for layer in rewrite.architecture:  # before anything is read or run
        for part in (layer.attention, layer.ffn):
            subblock_bytes(rewrite.shape, part, 2)
    config = sizes_for(child, rewrite)
    if packing.quantizer == "gptq" and (why := made_for_nearest(child.path)):
        reporter.say(f"  warning: {why}; --quantizer nearest keeps that, gptq rounds anew")
    words = "Rounding by GPTQ" if packing.quantizer == "gptq" else "Rounding"
    with reporter.task(f"{words} into {out}", len(rewrite.architecture)) as advance:
        layers = rounded_layers(child, rewrite, packing, lambda _: advance())
        pairs = _tensors(child, rewrite, layers)
        write_child(out, child.path, rewrite.architecture, pairs, child.dtype, config=config, packed=True)


def made_for_nearest(child: Path) -> str:
    """What the run of a child says against rounding it by GPTQ: it is one whose rounding to nearest is what was made; or ""."""

    child = child.resolve()

    def told(name: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((child.parent / name).read_text())
        except (OSError, ValueError):
            return {}
        return found

    if child.name == "healed" and any(stage["config"].get("qad") for stage in told("results.json").get("stages", [])):
        return "it was healed as it is rounded to nearest"
    return "nas search chose its weights by GPTQ" if told("architecture.json").get("quantizer") == "gptq" else ""


def rounded_layers(
    child: Child, rewrite: Rewrite, packing: Packing, on_layer: Callable[[int], None] | None = None
) -> Iterator[CalibratedLayer]:
    """The layers of a rewritten child in the precisions of its architecture, from first to last."""
    device, nearest = torch.device(packing.device), packing.quantizer == "nearest"
    masters = RewrittenLayers(rewrite, child.read, device)
    if not needs_text(rewrite.architecture, nearest):
        for layer in nearest_layers((masters[index] for index in range(len(masters))), rewrite.architecture):
            yield layer
            if on_layer is not None:
                on_layer(layer.index)
        return
    tokens = calibration_text(child, packing)
    sweep = Sweep(child_as_parent(child.path), device, torch.float32, resident=False).of(masters)
    yield from calibrated_layers(sweep, rewrite.architecture, tokens, nearest=nearest, on_layer=on_layer)


def calibration_text(child: Child, packing: Packing) -> Tensor:
    """Token ids [N, S] of a run's fit text: of the run that is named, else of the one that the child is of.

    Raises:
        ConfigError: if there is none, or it is another model's.
    """
    from nas.data import load_pack, to_tokens

    asked = [packing.run] if packing.run is not None else list(child.path.resolve().parents[:3])  # RUN/family/0.9/child
    places = [run / TEXT for run in asked if (run / TEXT).is_file()]
    why = "GPTQ takes calibration text" if packing.quantizer == "gptq" else "nvfp4 scales inputs by calibration text"
    if not places:
        raise ConfigError(f"{why}, and {asked[0] / TEXT} is not there; name a run of this parent with --run")
    tokens: Tensor = to_tokens(load_pack(places[0]), None, torch.device("cpu"))
    if int(tokens.max()) >= child.shape.vocab_size:
        raise ConfigError(
            f"{places[0]} holds token {int(tokens.max())}, the child knows {child.shape.vocab_size}: it is of another parent"
        )
    return tokens


def _tensors(child: Child, rewrite: Rewrite, layers: Iterator[CalibratedLayer]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the packed child by their names on disk, one layer at a time."""
    for name in expected_tensors(rewrite.shape, rewrite.architecture):
        if not name.startswith("model.layers."):
            yield name, child.read(name)
    for layer in layers:
        prefix = f"model.layers.{layer.index}."
        for name, tensor in layer.weights.items():
            module = name.removesuffix(".weight")
            if module not in layer.matrices:
                yield f"{prefix}{name}", tensor.to(child.store.dtype)
        for module, matrix in layer.matrices.items():
            yield from ((f"{prefix}{module}.{part}", tensor) for part, tensor in matrix.tensors().items())
