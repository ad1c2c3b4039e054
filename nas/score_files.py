"""Scores on disk while they are made: per-sequence values of each candidate, a file for each layer and method.

scores/one_pass_007.json       {"attention:kv1+ffn:768": {"tok": [...], "seq": [...]}, ...}, nats per token
scores/one_pass_007.1.json     the same for the sequences of a later round (`--auto-tokens`)
scores/exact_007.json          {"attention:skip+ffn:1536": {"kl": [...]}, ...}
scores/precision-fp8_007.json  {"ffn:768": {"tok": [...]}, ...}
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from blocks.errors import CheckpointError
from blocks.files import save_json
from blocks.spec import LayerSpec

Values = dict[tuple[int, str], dict[str, list[float]]]
"""(layer, spec) -> name -> values by sequence."""


@dataclass(frozen=True)
class ScoreFiles:
    """The directory of score files."""

    directory: Path

    def path(self, kind: str, layer: int, number: int = 0) -> Path:
        """Of "one_pass", "exact" or "precision-FORMAT" values; `number` is that of the round."""
        return self.directory / (f"{kind}_{layer:03d}" + (f".{number}" if number else "") + ".json")

    def has(self, kind: str, layer: int, number: int = 0) -> bool:
        return self.path(kind, layer, number).exists()

    def save(self, kind: str, layer: int, number: int, specs: Sequence[LayerSpec], values: dict[str, Tensor]) -> None:
        """Writes values [specs, N] by name."""
        rows = {str(spec): {name: of[row] for name, of in values.items()} for row, spec in enumerate(specs)}
        self.save_named(kind, layer, rows, number)

    def save_named(self, kind: str, layer: int, rows: Mapping[str, Mapping[str, Tensor]], number: int = 0) -> None:
        """Writes values [N] by candidate and name."""
        content = {
            candidate: {name: [float(f"{x:.6g}") for x in tensor.tolist()] for name, tensor in values.items()}
            for candidate, values in rows.items()
        }
        save_json(self.path(kind, layer, number), content)

    def load(self, kind: str, layers: Sequence[int], rounds: int | None = None) -> Values:
        """Values of the first `rounds` (None: of all), one after the other. Raises CheckpointError if a file is damaged."""
        found: Values = {}
        for layer in layers:
            for number in itertools.count() if rounds is None else range(rounds):
                file = self.path(kind, layer, number)
                if not file.exists():
                    break
                try:
                    for spec, values in json.loads(file.read_text()).items():
                        own = found.setdefault((layer, spec), {})
                        for name, row in values.items():
                            own.setdefault(name, []).extend(float(x) for x in row)
                except (OSError, ValueError, TypeError, AttributeError) as error:
                    raise CheckpointError(
                        f"{file} is damaged ({error}); delete it and run `nas score` again"
                    ) from error
        return found
