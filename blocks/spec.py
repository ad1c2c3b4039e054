"""What a subblock can become: specs, layers of specs, and architectures, with their text forms.

    attention:kv3 | attention:linear | attention:skip         ffn:1536 | ffn:linear | ffn:skip
    attention:kv1+ffn:768                                     one layer
    attention:kv1@fp8+ffn:768@nvfp4                           its matrices in other number formats than bf16 (blocks/formats.py)

All matrices of a subblock have one format: engines run q, k and v as one, and gate and up. A *structure* is a spec in bf16.
An architecture is one `LayerSpec` per layer. Specs are values: frozen, hashable, equal when their text is equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from blocks.errors import CheckpointError, ConfigError

WIDTH_MULTIPLE = 256  # serving engines derive FFN widths as multiples of this
BF16 = "bf16"
PRECISION = re.compile(r"[a-z][a-z0-9-]*")  # what can be a name in `blocks.formats.FORMATS`, which needs torch


def _split(text: str) -> tuple[str, str]:
    """A subblock's text without its precision, and the precision."""
    body, at, precision = text.partition("@")
    return body, precision if at else BF16


def _require_precision(spec: AttentionSpec | FFNSpec) -> None:
    if not PRECISION.fullmatch(spec.precision) or (spec.kind == "skip" and spec.precision != BF16):
        raise ConfigError(
            f"{spec}: {spec.precision!r} is no precision of it; write one such as fp8, and none for a skip"
        )


def _with_precision(body: str, precision: str) -> str:
    return body if precision == BF16 else f"{body}@{precision}"


@dataclass(frozen=True, order=True)
class AttentionSpec:
    """One attention. `kind` is "kv" (with `kv_heads` key/value heads), "linear" (one matrix) or "skip"; `precision` that of
    its matrices."""

    kind: str
    kv_heads: int = 0
    precision: str = BF16

    def __post_init__(self) -> None:
        if self.kind not in ("kv", "linear", "skip") or (self.kind == "kv") != (self.kv_heads > 0):
            raise ConfigError(f"not an attention candidate: kind {self.kind!r} with {self.kv_heads} KV heads")
        _require_precision(self)

    @classmethod
    def parse(cls, text: str) -> AttentionSpec:
        body, precision = _split(text.removeprefix("attention:"))
        if body in ("linear", "skip"):
            return cls(body, precision=precision)
        if match := re.fullmatch(r"kv([1-9]\d*)", body):
            return cls("kv", int(match[1]), precision)
        raise ConfigError(
            f"cannot read attention candidate {text!r}; write attention:kvN, attention:linear or attention:skip"
        )

    def __str__(self) -> str:
        body = f"attention:kv{self.kv_heads}" if self.kind == "kv" else f"attention:{self.kind}"
        return _with_precision(body, self.precision)

    def at(self, precision: str) -> AttentionSpec:
        """The same in another precision; a skip stays what it is."""
        return self if self.kind == "skip" else replace(self, precision=precision)

    @property
    def structure(self) -> AttentionSpec:
        return self.at(BF16)


@dataclass(frozen=True, order=True)
class FFNSpec:
    """One FFN. `kind` is "width" (with `width` = `intermediate_size` channels), "linear" (one matrix) or "skip"; `precision` that
    of its matrices."""

    kind: str
    width: int = 0
    precision: str = BF16

    def __post_init__(self) -> None:
        if self.kind not in ("width", "linear", "skip") or (self.kind == "width") != (self.width > 0):
            raise ConfigError(f"not an FFN candidate: kind {self.kind!r} with width {self.width}")
        _require_precision(self)

    @classmethod
    def parse(cls, text: str) -> FFNSpec:
        body, precision = _split(text.removeprefix("ffn:"))
        if body in ("linear", "skip"):
            return cls(body, precision=precision)
        if re.fullmatch(r"[1-9]\d*", body):
            return cls("width", int(body), precision)
        raise ConfigError(f"cannot read FFN candidate {text!r}; write ffn:WIDTH, ffn:linear or ffn:skip")

    def __str__(self) -> str:
        body = f"ffn:{self.width}" if self.kind == "width" else f"ffn:{self.kind}"
        return _with_precision(body, self.precision)

    def at(self, precision: str) -> FFNSpec:
        """The same in another precision; a skip stays what it is."""
        return self if self.kind == "skip" else replace(self, precision=precision)

    @property
    def structure(self) -> FFNSpec:
        return self.at(BF16)


@dataclass(frozen=True, order=True)
class LayerSpec:
    """The attention and the FFN of one layer. Text form: `attention:kv1+ffn:768`."""

    attention: AttentionSpec
    ffn: FFNSpec

    @classmethod
    def parse(cls, text: str) -> LayerSpec:
        attention, plus, ffn = text.partition("+")
        if not plus:
            raise ConfigError(f"cannot read layer {text!r}; write attention:KIND+ffn:KIND")
        return cls(AttentionSpec.parse(attention), FFNSpec.parse(ffn))

    def __str__(self) -> str:
        return f"{self.attention}+{self.ffn}"

    def at(self, attention: str, ffn: str | None = None) -> LayerSpec:
        """The same in other precisions; one for both subblocks if only one is given."""
        return LayerSpec(self.attention.at(attention), self.ffn.at(attention if ffn is None else ffn))

    @property
    def structure(self) -> LayerSpec:
        """The same in bf16."""
        return self.at(BF16)


@dataclass(frozen=True)
class Architecture:
    """One `LayerSpec` per layer of the parent."""

    layers: tuple[LayerSpec, ...]

    @classmethod
    def uniform(cls, num_layers: int, layer: LayerSpec) -> Architecture:
        return cls((layer,) * num_layers)

    def __iter__(self) -> Iterator[LayerSpec]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> LayerSpec:
        return self.layers[index]

    def at(self, precision: str) -> Architecture:
        """The same with every matrix inside layers in one precision."""
        return Architecture(tuple(layer.at(precision) for layer in self.layers))

    @property
    def structure(self) -> Architecture:
        """The same in bf16."""
        return self.at(BF16)

    @property
    def precisions(self) -> list[str]:
        """The formats that it uses, those of skips left out, in the order of their names."""
        subblocks = (subblock for layer in self.layers for subblock in (layer.attention, layer.ffn))
        return sorted({subblock.precision for subblock in subblocks if subblock.kind != "skip"})

    @property
    def rounded(self) -> list[str]:
        """The formats that its matrices are rounded to: all that it uses but bf16; none of a structure."""
        return [name for name in self.precisions if name != BF16]

    def to_list(self) -> list[str]:
        return [str(layer) for layer in self.layers]

    @classmethod
    def from_list(cls, layers: list[str]) -> Architecture:
        return cls(tuple(LayerSpec.parse(text) for text in layers))

    @classmethod
    def load(cls, path: Path) -> Architecture:
        """Reads the `layers` of an architecture.json. Raises CheckpointError if it is not one."""
        try:
            return cls.from_list(json.loads(path.read_text())["layers"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise CheckpointError(
                f"{path} is not an architecture file ({error}); run `nas search` to write one"
            ) from error


NO_ATTENTION, NO_FFN = AttentionSpec("skip"), FFNSpec("skip")
EMPTY = LayerSpec(NO_ATTENTION, NO_FFN)
