"""Reads a search space recipe and lists the candidates of each layer."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from blocks.engines import ENGINES, engine_of
from blocks.errors import ConfigError
from blocks.shape import ModelShape
from blocks.spec import WIDTH_MULTIPLE, AttentionSpec, FFNSpec, LayerSpec

KEYS: dict[str, tuple[str, ...]] = {
    "": ("attention", "ffn", "keep_first_attention"),
    "attention": ("kv_heads", "skip", "linear"),
    "ffn": ("ratios", "widths", "skip", "linear"),
}


@dataclass(frozen=True)
class SearchSpace:
    """Which candidates a layer may become.

    Attributes:
        name: the recipe's name, for print.
        target: the engine that must serve the child.
        kv_heads: "divisors" (every divisor of the parent's), "parent" (no other), or a list of head counts.
        ffn_ratios: FFN widths as shares of the parent's, rounded to multiples of 256.
        ffn_widths: FFN widths in channels, beside the ratios.
        attention_skip, attention_linear, ffn_skip, ffn_linear: whether these kinds are in.
        keep_first_attention: layer 0 keeps an attention with a KV cache, which most engines need (blocks/engines.py).
    """

    name: str
    target: str = "vllm"
    kv_heads: str | tuple[int, ...] = "divisors"
    ffn_ratios: tuple[float, ...] = ()
    ffn_widths: tuple[int, ...] = ()
    attention_skip: bool = True
    attention_linear: bool = False
    ffn_skip: bool = True
    ffn_linear: bool = False
    keep_first_attention: bool = True

    def attention_candidates(self, shape: ModelShape, layer: int) -> list[AttentionSpec]:
        """Candidates of one attention, the parent's own first."""
        parent = shape.num_key_value_heads
        if self.kv_heads == "parent":
            counts: list[int] = []
        elif self.kv_heads == "divisors":
            counts = [n for n in range(parent - 1, 0, -1) if parent % n == 0]
        else:
            counts = sorted((n for n in self.kv_heads if isinstance(n, int) and n < parent), reverse=True)
        specs = [AttentionSpec("kv", n) for n in (parent, *counts)]
        if layer > 0 or not self.keep_first_attention:
            specs += [AttentionSpec("linear")] * self.attention_linear + [AttentionSpec("skip")] * self.attention_skip
        return specs

    def ffn_candidates(self, shape: ModelShape) -> list[FFNSpec]:
        """Candidates of one FFN, the parent's own first, then by falling width."""
        parent = shape.intermediate_size
        rounded = (max(1, round(ratio * parent / WIDTH_MULTIPLE)) * WIDTH_MULTIPLE for ratio in self.ffn_ratios)
        widths = sorted({w for w in (*rounded, *self.ffn_widths) if w < parent}, reverse=True)
        specs = [FFNSpec("width", w) for w in (parent, *widths)]
        return specs + [FFNSpec("linear")] * self.ffn_linear + [FFNSpec("skip")] * self.ffn_skip

    def layer_candidates(self, shape: ModelShape, layer: int) -> list[LayerSpec]:
        """All (attention, FFN) pairs of one layer, the parent's own first. Raises ConfigError for an impossible one."""
        ffns = self.ffn_candidates(shape)
        specs = [LayerSpec(a, f) for a in self.attention_candidates(shape, layer) for f in ffns]
        for spec in specs:
            shape.check(spec)
        return specs


def available_spaces() -> dict[str, Path]:
    """The recipes of this package by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def load_space(name: str, target: str = "vllm") -> SearchSpace:
    """Loads a recipe by name or path for a target engine (a key of `ENGINES`).

    What the engine cannot serve is no candidate. Raises ConfigError on anything unknown, and on a recipe that insists.
    """
    engine_of(target, "--target")
    path = available_spaces().get(name, Path(name))
    if not path.is_file():
        raise ConfigError(f"--space {name}: no such recipe or file; recipes here: {', '.join(available_spaces())}")
    try:
        recipe = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return _space(path, recipe, target)


def _space(path: Path, recipe: Any, target: str) -> SearchSpace:
    top = _section(path, recipe, "")
    attention = _section(path, top.get("attention", {}), "attention")
    ffn = _section(path, top.get("ffn", {}), "ffn")

    engine = ENGINES[target]

    def linear(section: dict[str, Any], where: str) -> bool:
        wish, served = section.get("linear", False), getattr(engine, f"linear_{where}")
        if wish == "if-served":
            return bool(served)
        if _flag(path, wish, f"{where}.linear") and not served:
            raise ConfigError(
                f"{path}: {where}.linear: {target} does not serve linear replacements; use --target transformers"
            )
        return bool(wish)

    keep_first = _flag(path, top.get("keep_first_attention", True), "keep_first_attention")
    if engine.first_attention and not keep_first:
        raise ConfigError(f"{path}: keep_first_attention: {target} needs an attention in layer 0; leave the key out")
    kv_heads = _kv_heads(path, attention.get("kv_heads", "divisors"))
    if engine.one_kv_count and kv_heads != "parent":
        if kv_heads != "divisors":
            raise ConfigError(
                f"{path}: attention.kv_heads: {target} serves one number of KV heads in all layers; write parent, or leave the key out"
            )
        kv_heads = "parent"

    return SearchSpace(
        name=path.stem,
        target=target,
        kv_heads=kv_heads,
        ffn_ratios=tuple(_numbers(path, ffn.get("ratios", []), "ffn.ratios", float)),
        ffn_widths=tuple(_numbers(path, ffn.get("widths", []), "ffn.widths", int)),
        attention_skip=_flag(path, attention.get("skip", False), "attention.skip"),
        attention_linear=linear(attention, "attention"),
        ffn_skip=_flag(path, ffn.get("skip", False), "ffn.skip"),
        ffn_linear=linear(ffn, "ffn"),
        keep_first_attention=keep_first,
    )


def _section(path: Path, section: Any, name: str) -> dict[str, Any]:
    where = f"{path}: {name or 'the recipe'}"
    if not isinstance(section, dict):
        raise ConfigError(f"{where} must be a mapping with keys {', '.join(KEYS[name])}")
    for key in section:
        if key not in KEYS[name]:
            raise ConfigError(
                f"{where}: unknown key {key!r}{_nearest(str(key), KEYS[name])}; known: {', '.join(KEYS[name])}"
            )
    return section


def _flag(path: Path, value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{path}: {where} must be true or false, not {value!r}")
    return value


def _numbers(path: Path, values: Any, where: str, kind: type[float] | type[int]) -> list[Any]:
    accepted = (int, float) if kind is float else (int,)
    wanted = "shares" if kind is float else "integers"
    if not isinstance(values, list) or not all(type(value) in accepted and value > 0 for value in values):
        raise ConfigError(f"{path}: {where} must be a list of positive {wanted}, not {values!r}")
    if kind is float and any(value > 1 for value in values):
        raise ConfigError(f"{path}: {where} are shares of the parent's width, at most 1; for channels use ffn.widths")
    return values


def _kv_heads(path: Path, value: Any) -> str | tuple[int, ...]:
    if value in ("divisors", "parent"):
        return str(value)
    return tuple(_numbers(path, value, 'attention.kv_heads (or "divisors" or "parent")', int))


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
