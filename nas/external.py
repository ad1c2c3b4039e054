"""A score table from elsewhere, which stands alone: what each candidate hurts and what it takes (docs/tables.md).

    layer   subblock    candidate       score   parameters  bytes  kv_bytes  prefill_ms  decode_ms
    0       attention   kv8             0.0     ...
    0       ffn         w14336          0.0     ...
    fixed               embeddings              ...

A layer has joint rows, attention x FFN, or rows for each of its subblocks. Our own scores.csv is such a table, too. Candidates
named as ours may carry a number format ("attention:kv8@fp8").
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from blocks.errors import ConfigError, DataError
from blocks.shape import ModelShape
from blocks.spec import BF16, AttentionSpec, FFNSpec, LayerSpec
from nas.costs import DTYPE_BYTES, Scenario
from nas.external_rows import TIMES, WHOLE, Record, read_records
from nas.external_shape import Count, find_shape
from nas.limits import FLAGS

FIXED = "fixed"
SUBBLOCKS = ("layer", "attention", "ffn")
LIMITS = ("memory", "parameters", "kv", "ttft", "tpot", "request")
PARTS = {"memory": ("weights", "kv")}  # of a limit that needs more than one amount
NEEDS = {
    "weights": "bytes or parameters",
    "kv": "kv_bytes or kv_bytes_per_token (0 where nothing is cached)",
    "parameters": "parameters",
    "ttft": "prefill_ms",
    "tpot": "decode_ms",
    "request": "prefill_ms and decode_ms, or ms",
}
"""The columns that say an amount."""


@dataclass(frozen=True)
class Candidate:
    """One row: a candidate of one group, and what it takes of each limit (nas/limits.py) that the row says something of.

    Attributes:
        row: its number in the file.
        spec: what this package calls it, None if its name is not one of ours.
        amounts: whole numbers, by limit; "weights", too: memory without the KV cache.
    """

    row: int
    name: str
    spec: LayerSpec | AttentionSpec | FFNSpec | None
    score: float
    amounts: Mapping[str, int]


@dataclass(frozen=True)
class ExternalTable:
    """Candidates by group; a group is a layer, or one subblock of it.

    Attributes:
        scenario: that it is priced in.
        groups: (layer, subblock) of each, in order.
        rows: candidates of each.
        fixed: what is there whatever is chosen, by limit; the scenario's reserve is part of its memory.
        has_fixed: whether the table has rows of that.
        shape: of the parent, where the names and counts of the rows tell it (nas/external_shape.py).
    """

    path: Path
    scenario: Scenario
    groups: tuple[tuple[int, str], ...]
    rows: tuple[tuple[Candidate, ...], ...]
    fixed: Mapping[str, int]
    has_fixed: bool
    shape: ModelShape | None = None

    @property
    def scores(self) -> list[list[float]]:
        return [[row.score for row in rows] for rows in self.rows]

    def amounts(self, limit: str) -> list[list[int]]:
        """What each candidate takes. Raises ConfigError if the table does not say."""
        for rows in self.rows:
            for row in rows:
                if missing := [part for part in PARTS.get(limit, (limit,)) if part not in row.amounts]:
                    needs = " and ".join(NEEDS[part] for part in missing)
                    raise ConfigError(f"{self.path}, row {row.row}: {FLAGS[limit]} needs {needs} in every row")
        return [[row.amounts[limit] for row in rows] for rows in self.rows]

    @cached_property
    def known(self) -> tuple[str, ...]:
        """The limits that every row says something of."""
        return tuple(limit for limit in LIMITS if all(limit in row.amounts for rows in self.rows for row in rows))

    @cached_property
    def parent(self) -> tuple[int, ...]:
        """The candidate of each group that takes most, of those the one with the least score: what nothing was cut from."""
        order = ("memory", "parameters", "request", "tpot", "ttft", "kv")
        limit = next((name for name in order if name in self.known), None)

        def size(row: Candidate) -> int:
            return 0 if limit is None else row.amounts[limit]

        return tuple(min(range(len(rows)), key=lambda c: (-size(rows[c]), rows[c].score)) for rows in self.rows)

    def in_formats(self, formats: Collection[str]) -> ExternalTable:
        """Without the candidates in other number formats than bf16 and these. Raises ConfigError for one that no row is in."""
        found = {name for rows in self.rows for row in rows for name in _formats(row)}
        for name in formats:
            if name not in found | {BF16}:
                told = ", ".join(sorted(found - {BF16})) or "bf16 alone"
                raise ConfigError(f"--precisions {name}: {self.path} has no row in it; it has {told}")
        kept = found & {BF16, *formats}
        rows = tuple(tuple(row for row in rows if kept.issuperset(_formats(row))) for rows in self.rows)
        for (layer, subblock), left in zip(self.groups, rows, strict=True):
            if not left:
                raise ConfigError(
                    f"--precisions {','.join(formats)}: {self.path} has no other candidate than in further formats for {subblock} "
                    f"of layer {layer}; name one of these, too"
                )
        return replace(self, rows=rows)

    def budget_for_share(self, share: float) -> int:
        """Bytes of the budget that keeps `share` of what the parent's candidates take, what is fixed added."""
        self.amounts("memory")  # says what is missing
        return self.fixed["memory"] + int(share * (self.total("memory", self.parent) - self.fixed["memory"]))

    def total(self, limit: str, choice: Sequence[int]) -> int:
        """Of a whole child, what is fixed included."""
        return self.fixed[limit] + sum(row.amounts[limit] for row in self.chosen(choice))

    def chosen(self, choice: Sequence[int]) -> list[Candidate]:
        return [rows[c] for rows, c in zip(self.rows, choice, strict=True)]

    @cached_property
    def ours(self) -> bool:
        """Whether all candidates are named as this package names them, so that choices are architectures."""
        return all(row.spec is not None for rows in self.rows for row in rows)

    @property
    def places(self) -> list[tuple[str, str]]:
        """(layer, subblock) of each of `names`."""
        if not self.ours:
            return [(str(layer), subblock) for layer, subblock in self.groups]
        return [(str(layer), "layer") for layer in dict.fromkeys(layer for layer, _ in self.groups)]

    def names(self, choice: Sequence[int]) -> list[str]:
        """Layer by layer in the text form of blocks/spec.py if candidates are `ours`, else group by group."""
        if not self.ours:
            return [row.name for row in self.chosen(choice)]
        layers: dict[int, list[str]] = {}
        for (layer, _), row in zip(self.groups, self.chosen(choice), strict=True):
            layers.setdefault(layer, []).append(str(row.spec))
        return ["+".join(parts) for parts in layers.values()]  # attention comes before ffn


def _formats(row: Candidate) -> set[str]:
    """The number formats of a candidate; none is told by a name that is not one of ours."""
    parts = (row.spec.attention, row.spec.ffn) if isinstance(row.spec, LayerSpec) else (row.spec,)
    return {part.precision for part in parts if part is not None}


def load_external(path: Path, scenario: Scenario) -> ExternalTable:
    """Reads a table and prices it in a scenario. Raises DataError in one line, with file and row."""
    found: dict[tuple[int, str], dict[str, Candidate]] = {}
    fixed: dict[str, Candidate] = {}
    records = [(record, *_place(record)) for record in read_records(path)]
    shape = _shape(records)
    for record, layer, subblock, name in records:
        group = fixed if layer is None else found.setdefault((layer, subblock), {})
        if name in group:
            of = FIXED if layer is None else f"layer {layer}"
            raise DataError(f"{record.where}: {name} of {of} is there twice, first in row {group[name].row}")
        score = record.number_of("score")
        if score is None and layer is not None:
            raise DataError(f"{record.where}: no score")
        spec = _spec(subblock, name)
        amounts = _amounts(record, subblock, scenario, _served(record, spec, shape, scenario))
        group[name] = Candidate(record.number, name, spec, score or 0.0, amounts)
    _require_whole(path, found)
    groups = tuple(sorted(found, key=lambda group: (group[0], SUBBLOCKS.index(group[1]))))
    rows = tuple(tuple(found[group].values()) for group in groups)
    return ExternalTable(path, scenario, groups, rows, _fixed(fixed.values(), scenario), bool(fixed), shape)


def _shape(records: Sequence[tuple[Record, int | None, str, str]]) -> ModelShape | None:
    """The parent's, from the rows whose names are ours."""
    counts, layers = [], set()
    for record, layer, subblock, name in records:
        layers.add(layer)
        spec = None if layer is None else _spec(subblock, name)
        parameters = _parameters(record)
        if spec is not None and parameters is not None:
            per_token = record.number_of("kv_bytes_per_token", least=0.0)
            counts.append(Count.of(spec, round(parameters), None if per_token is None else round(per_token)))
    return find_shape(counts, len(layers - {None}))


def _parameters(record: Record) -> float | None:
    """As they are told, or by `weight_bytes` in bf16."""
    told, half = record.number_of("parameters", least=0.0), record.number_of("weight_bytes", least=0.0)
    return told if told is not None or half is None else half / 2


def _served(
    record: Record, spec: LayerSpec | AttentionSpec | FFNSpec | None, shape: ModelShape | None, scenario: Scenario
) -> int | None:
    """Bytes of the weights of a candidate in another format than bf16 that says its parameters and not its bytes.

    Raises DataError if they cannot be known, for a format that is not known here, or one that cannot hold its matrices.
    """
    if spec is None or spec == spec.structure or record.text("bytes") or _parameters(record) is None:
        return None
    if shape is None:
        raise DataError(
            f"{record.where}: {spec} has no bytes, its weights as they are served; parameters do not tell them, nor do the "
            "rows of this table tell the sizes of its matrices"
        )
    from blocks.rounded import subblock_bytes

    parts = (spec.attention, spec.ffn) if isinstance(spec, LayerSpec) else (spec,)
    try:
        return sum(subblock_bytes(shape, part, DTYPE_BYTES[scenario.weight_dtype]) for part in parts)
    except ConfigError as error:
        raise DataError(f"{record.where}: {error}; give its bytes, or leave it out") from error


def _fixed(rows: Iterable[Candidate], scenario: Scenario) -> dict[str, int]:
    every = [row.amounts for row in rows]
    total = {limit: sum(amounts[limit] for amounts in every) for limit in (*LIMITS, "weights")}
    return total | {"memory": total["memory"] + scenario.reserve_bytes}


def _require_whole(path: Path, found: Mapping[tuple[int, str], Mapping[str, Candidate]]) -> None:
    """Every layer from 0 has its candidates, joint or of both subblocks."""
    if not found:
        raise DataError(f"{path} has no rows of layers")
    for expected, layer in enumerate(sorted({layer for layer, _ in found})):
        own = {subblock: rows for (number, subblock), rows in found.items() if number == layer}
        row = min(row.row for rows in own.values() for row in rows.values())
        if layer != expected:
            raise DataError(f"{path}, row {row}: layer {layer}, but there are no rows of layer {expected}")
        if set(own) not in ({"layer"}, {"attention", "ffn"}):
            told = " and ".join(name for name in SUBBLOCKS if name in own) + (" only" if len(own) == 1 else "")
            raise DataError(
                f"{path}, row {row}: layer {layer} has rows of {told}; give it attention and ffn, or whole layers alone"
            )


def _place(record: Record) -> tuple[int | None, str, str]:
    """(layer or None for what is fixed, subblock, name) of a row."""
    attention, ffn = record.text("attention"), record.text("ffn")
    name = record.text("candidate") or "+".join(part for part in (attention, ffn) if part)
    if not name:
        raise DataError(f"{record.where}: no candidate (nor attention or ffn)")
    if (text := record.text("layer")) == FIXED:
        return None, FIXED, name
    try:
        number = float(text)
        whole = number.is_integer() and number >= 0
    except ValueError:
        whole = False
    if not whole:
        raise DataError(f"{record.where}: layer is {text!r}; it must be a whole number from 0, or {FIXED}")
    subblock = record.text("subblock") or _subblock_of(name, attention, ffn)
    if subblock not in SUBBLOCKS:
        raise DataError(f"{record.where}: subblock is {subblock!r}; it must be attention, ffn or layer")
    return int(number), subblock, name


def _subblock_of(name: str, attention: str, ffn: str) -> str:
    if attention or ffn:
        return "layer" if attention and ffn else "attention" if attention else "ffn"
    if "+" not in name and name.startswith(("attention:", "ffn:")):
        return name.partition(":")[0]
    return "layer"


def _spec(subblock: str, name: str) -> LayerSpec | AttentionSpec | FFNSpec | None:
    try:
        if subblock == "attention":
            return AttentionSpec.parse(name)
        return FFNSpec.parse(name) if subblock == "ffn" else LayerSpec.parse(name)
    except ConfigError:
        return None


def _amounts(record: Record, subblock: str, scenario: Scenario, served: int | None) -> dict[str, int]:
    """What a row takes of every limit that it says something of, in whole numbers.

    `served` are its weights where its number format says them. An FFN caches nothing; what is fixed takes nothing of what it does not say.
    """
    value = {name: record.number_of(name, least=0.0) for name in (*WHOLE, *TIMES)}
    prefill, decode, whole = (None if ms is None else round(ms * 1e6) for ms in (value[name] for name in TIMES))
    kv = _kv(value, scenario)
    said = {
        "weights": _weights(record, value, scenario) if served is None else served,
        "parameters": None if value["parameters"] is None else round(value["parameters"]),
        "kv": 0 if kv is None and subblock == "ffn" else kv,
        "ttft": prefill,
        "tpot": decode,
    }
    if subblock == FIXED:
        said = {name: amount or 0 for name, amount in said.items()}
        whole = 0 if whole is None else whole
    found = {name: amount for name, amount in said.items() if amount is not None}
    if "weights" in found and "kv" in found:
        found["memory"] = found["weights"] + found["kv"]
    if "ttft" in found and "tpot" in found and (prefill, decode) != (None, None):
        found["request"] = scenario.request_ns(found["ttft"], found["tpot"])
    elif whole is not None:
        found["request"] = whole
    return found


def _weights(record: Record, value: Mapping[str, float | None], scenario: Scenario) -> int | None:
    """`bytes` as they are; else parameters, or `weight_bytes` (bf16), in the scenario's dtype."""
    size = DTYPE_BYTES[scenario.weight_dtype]
    given, parameters, half = value["bytes"], value["parameters"], value["weight_bytes"]
    if given is not None:
        return round(given)
    if parameters is not None and half is not None and round(half) != 2 * round(parameters):
        raise DataError(
            f"{record.where}: weight_bytes is {half:.0f}, but {parameters:.0f} parameters take {2 * parameters:.0f} in bf16; "
            "give weights of another form as bytes"
        )
    if parameters is not None:
        return round(parameters) * size
    return None if half is None else round(half) * size // 2


def _kv(value: Mapping[str, float | None], scenario: Scenario) -> int | None:
    """`kv_bytes` of the scenario as they are; else `kv_bytes_per_token` (bf16) for all its tokens, in its dtype."""
    if (given := value["kv_bytes"]) is not None:
        return round(given)
    if (per_token := value["kv_bytes_per_token"]) is None:
        return None
    return round(per_token) * scenario.batch * scenario.context * scenario.kv_value_bytes // 2
