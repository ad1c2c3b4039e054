"""How number formats are told in pictures and words: which an architecture uses, bits per weight, names of baselines.

A candidate's text without its precision is its structure: `attention:kv1@fp8` is `attention:kv1` in fp8. Nothing here needs
torch unless another format than bf16 is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from blocks.errors import ConfigError
from blocks.shape import ModelShape, as_built
from blocks.spec import BF16, Architecture, AttentionSpec, FFNSpec, LayerSpec
from nas.costs import CostModel, Scenario

UNIFORM = {"parent-uniform-precision": "parent", "child-uniform-precision": "best structure"}
"""Baselines with one format in all layers, and what is in it."""
LARGE = 8192  # of a matrix whose sizes are not known: what its scales take does not change a third digit


def taken_apart(name: str) -> tuple[str, str | None]:
    """The structure and the precision of a subblock's name: None for a skip, and for a name that is not one of ours."""
    structure, _, precision = name.partition("@")
    part, _, body = structure.partition(":")
    if part not in ("attention", "ffn"):
        return name, None
    return structure, None if body == "skip" else precision or BF16


def by_structure(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares that candidates keep, by their names and by those of their structures: of one that is not there in bf16, the largest."""
    found = dict(shares)
    for name, share in shares.items():
        structure, _ = taken_apart(name)
        if structure not in shares:
            found[structure] = max(share, found.get(structure, 0.0))
    return found


def used(layers: Iterable[str]) -> list[str]:
    """The formats of layers ("attention:kv1@fp8+ffn:768"), in the order of their names; those of skips do not count."""
    return sorted({spec.precision for spec in _subblocks(layers)})


def baseline_name(kind: str, layers: Iterable[str] | None) -> str:
    """ "parent in fp8" of "parent-uniform-precision"; other baselines keep their names."""
    if kind not in UNIFORM:
        return kind
    formats = used(layers or [])
    other = [name for name in formats if name != BF16]  # one that cannot hold a matrix leaves it in bf16
    return f"{UNIFORM[kind]} in {'/'.join(other or formats) or 'one format'}"


def formats_told(layers: Iterable[str], shape: ModelShape | None = None) -> list[dict[str, Any]]:
    """Each format of these layers: `name`, `bits` per weight with its scales (None: not known here), `subblocks` in it.

    The most bits first. Empty if all are bf16. Without a shape, bits are those of large matrices.
    """
    counts = Counter(_subblocks(layers, shape))
    names = sorted({spec.precision for spec in counts})
    if set(names) <= {BF16}:
        return []
    told = []
    for name in names:
        own = {spec: count for spec, count in counts.items() if spec.precision == name}
        told.append({"name": name, "bits": _bits(own, shape, name), "subblocks": sum(own.values())})
    return sorted(told, key=lambda format: (-(format["bits"] or 0.0), format["name"]))


def mean_bits(layers: Iterable[str], shape: ModelShape) -> float | None:
    """Bits per weight over all matrices inside the layers, scales included; None if a format is not known here."""
    return _bits(Counter(_subblocks(layers, shape)), shape)


def bits_text(bits: float | None) -> str:
    return "bits not known here" if bits is None else f"{bits:.3g} bits a weight"


def scenario_of(found: Mapping[str, Any]) -> Scenario:
    """The scenario of an architecture.json, with the KV dtype that was chosen where it had several."""
    known = {field.name for field in fields(Scenario)}
    chosen = {"kv_dtype": found["kv_dtype"]} if found.get("kv_dtype") else {}
    return Scenario(**{key: value for key, value in found["scenario"].items() if key in known} | chosen)


def costs_of(found: Mapping[str, Any]) -> CostModel:
    """The prices of an architecture.json that has a shape."""
    return CostModel(ModelShape(**found["shape"]), scenario_of(found))


def _subblocks(layers: Iterable[str], shape: ModelShape | None = None) -> Iterator[AttentionSpec | FFNSpec]:
    """All but skips; as built, if the shape is known. Names that are not ours are left out."""
    for text in layers:
        try:
            layer = LayerSpec.parse(text)
        except ConfigError:
            continue
        if shape is not None:
            _, (layer,) = as_built(shape, Architecture((layer,)))
        yield from (spec for spec in (layer.attention, layer.ffn) if spec.kind != "skip")


def _bits(counts: Mapping[AttentionSpec | FFNSpec, int], shape: ModelShape | None, name: str = "") -> float | None:
    """Per weight, over the matrices of subblocks by how often they are there."""
    from blocks.formats import FORMATS

    if any(spec.precision not in FORMATS for spec in counts):
        return None
    if shape is None:
        return FORMATS[name].bits_per_weight(LARGE, LARGE)
    size = weights = 0
    for spec, count in counts.items():
        for rows, columns in shape.matrices(spec):
            size += count * FORMATS[spec.precision].bytes(rows, columns)
            weights += count * rows * columns
    return 8 * size / weights if weights else None
