"""What a subblock can become: specs, layers of specs, and architectures, with their text forms.

    attention:kv3 | attention:linear | attention:skip         ffn:1536 | ffn:linear | ffn:skip
    attention:kv1+ffn:768                                     one layer

An architecture is one `LayerSpec` per layer. Specs are values: frozen, hashable, equal when their text is equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blocks.errors import CheckpointError, ConfigError

WIDTH_MULTIPLE = 256  # serving engines derive FFN widths as multiples of this


@dataclass(frozen=True, order=True)
class AttentionSpec:
    """One attention. `kind` is "kv" (with `kv_heads` key/value heads), "linear" (one matrix) or "skip"."""

    kind: str
    kv_heads: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("kv", "linear", "skip") or (self.kind == "kv") != (self.kv_heads > 0):
            raise ConfigError(f"not an attention candidate: kind {self.kind!r} with {self.kv_heads} KV heads")

    @classmethod
    def parse(cls, text: str) -> AttentionSpec:
        body = text.removeprefix("attention:")
        if body in ("linear", "skip"):
            return cls(body)
        if match := re.fullmatch(r"kv([1-9]\d*)", body):
            return cls("kv", int(match[1]))
        raise ConfigError(
            f"cannot read attention candidate {text!r}; write attention:kvN, attention:linear or attention:skip"
        )

    def __str__(self) -> str:
        return f"attention:kv{self.kv_heads}" if self.kind == "kv" else f"attention:{self.kind}"


@dataclass(frozen=True, order=True)
class FFNSpec:
    """One FFN. `kind` is "width" (with `width` = `intermediate_size` channels), "linear" (one matrix) or "skip"."""

    kind: str
    width: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("width", "linear", "skip") or (self.kind == "width") != (self.width > 0):
            raise ConfigError(f"not an FFN candidate: kind {self.kind!r} with width {self.width}")

    @classmethod
    def parse(cls, text: str) -> FFNSpec:
        body = text.removeprefix("ffn:")
        if body in ("linear", "skip"):
            return cls(body)
        if re.fullmatch(r"[1-9]\d*", body):
            return cls("width", int(body))
        raise ConfigError(f"cannot read FFN candidate {text!r}; write ffn:WIDTH, ffn:linear or ffn:skip")

    def __str__(self) -> str:
        return f"ffn:{self.width}" if self.kind == "width" else f"ffn:{self.kind}"


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
