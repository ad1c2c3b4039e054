"""The score table: one row per candidate layer, `scores.csv` (docs/formats.md describes every column)."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, fields
from pathlib import Path

from blocks.errors import CheckpointError, ConfigError
from blocks.files import save_text
from blocks.spec import LayerSpec


@dataclass(frozen=True)
class ScoreRow:
    """One candidate of one layer. Scores are nats per token of KL(parent || parent with this one layer replaced)."""

    layer: int
    attention: str
    ffn: str
    score: float
    """What the search uses: the exact value where there is one, else the one-pass value mapped to nats."""
    score_low: float | None
    score_high: float | None
    """95 % bootstrap interval of the score over sequences; none where fewer than four were scored."""
    source: str
    """"parent", "exact" or "one-pass"."""
    one_pass: float | None
    """Per-token one-pass estimate (diagonal Fisher with `--estimator fisher`), unmapped."""
    one_pass_seq: float | None
    """Per-sequence one-pass estimate, unmapped: unbiased to second order, noisier."""
    exact: float | None
    parameters: int
    weight_bytes: int
    """At 2 bytes a parameter (bf16)."""
    kv_bytes_per_token: int
    """At 2 bytes a value (bf16)."""

    @property
    def spec(self) -> LayerSpec:
        return LayerSpec.parse(f"{self.attention}+{self.ffn}")


COLUMNS = [field.name for field in fields(ScoreRow)]
INTEGERS = {"layer", "parameters", "weight_bytes", "kv_bytes_per_token"}
TEXTS = {"attention", "ffn", "source"}


def save_table(path: Path, rows: list[ScoreRow]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        values = (getattr(row, name) for name in COLUMNS)
        writer.writerow(["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in values])
    save_text(path, buffer.getvalue())


def load_table(path: Path) -> list[list[ScoreRow]]:
    """Rows by layer. Raises CheckpointError if the table is not there or not whole."""
    try:
        with path.open(newline="") as file:
            rows = [_row(record) for record in csv.DictReader(file)]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there; run `nas score --run {path.parent}` first") from None
    except (OSError, KeyError, ValueError, TypeError, csv.Error, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); delete it and run `nas score` again") from error
    layers: list[list[ScoreRow]] = [[] for _ in range(max((row.layer for row in rows), default=-1) + 1)]
    for row in rows:
        layers[row.layer].append(row)
    if not layers or not all(layers):
        raise CheckpointError(f"{path} lacks rows for some layers; delete it and run `nas score` again")
    return layers


def _row(record: dict[str, str]) -> ScoreRow:
    values: dict[str, object] = {}
    for name in COLUMNS:
        text = record[name]
        if name in TEXTS:
            values[name] = text
        elif name in INTEGERS:
            values[name] = int(text)
        else:
            values[name] = float(text) if text else None
    row = ScoreRow(**values)  # type: ignore[arg-type]
    if row.layer < 0 or not math.isfinite(row.score):
        raise ValueError(f"layer {row.layer} has score {row.score}")
    _ = row.spec  # raises ConfigError for a text that is no candidate
    return row
