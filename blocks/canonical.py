"""The canonical topology of a child: the same function in fewer layers, and in the form that one engine wants.

    rewrite = canonical(shape, architecture, Form(first_attention=True))
    rewrite.architecture, rewrite.shape, dict(rewrite.tensors(store.get)), rewrite.changes

A residual stack is a sequence of attentions and FFNs; layers only pair them. So wholly empty layers go, and an attention
without FFN takes the FFN of the next layer that has no attention: exact, and smaller in every engine. What else an
engine wants is added as zeros or repeated, which is exact as well:

    - an attention with one KV head and all weights zero, where layer 0 has no attention
    - an FFN of 256 zero channels, where a layer has an attention alone
    - KV heads repeated, where layers differ in their number: query head i reads a copy of the head it read before

Precisions go along with their attention or FFN; what is added as zeros is bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blocks.shape import ModelShape, as_built
from blocks.spec import NO_ATTENTION, NO_FFN, WIDTH_MULTIPLE, Architecture, AttentionSpec, FFNSpec, LayerSpec

if TYPE_CHECKING:  # planning needs no torch, so that a search space can ask what an engine serves
    from torch import Tensor

ZERO_ATTENTION, ZERO_FFN = AttentionSpec("kv", 1), FFNSpec("width", WIDTH_MULTIPLE)


@dataclass(frozen=True)
class Form:
    """What an engine wants of the layers, beyond the canonical order.

    Attributes:
        first_attention: layer 0 has an attention with a KV cache.
        ffn_after_attention: a layer with an attention has an FFN.
        one_kv_count: all attentions have one number of KV heads.
    """

    first_attention: bool = False
    ffn_after_attention: bool = False
    one_kv_count: bool = False


@dataclass(frozen=True)
class Change:
    """One difference between a child and its rewrite.

    Attributes:
        text: what is done, as in "ok with TEXT"; layers are numbered as in the child.
        parameters: how many more there are; 0 or less where something goes.
        kv_values: how many more scalars each token leaves in the cache.
        more_bytes: how many more bytes the weights take, beside what the parameters do.
    """

    text: str
    parameters: int = 0
    kv_values: int = 0
    more_bytes: int = 0


@dataclass(frozen=True)
class Placed:
    """One attention or FFN, and the layer it comes from; None: zeros."""

    spec: AttentionSpec | FFNSpec
    source: int | None


@dataclass(frozen=True)
class Rewrite:
    """A child in canonical form: sizes, and where the tensors of each of its layers come from.

    Attributes:
        shape, architecture: of the result.
        attentions, ffns: by layer; None where it has none.
        changes: what was done, empty if nothing.
    """

    shape: ModelShape
    architecture: Architecture
    attentions: tuple[Placed | None, ...]
    ffns: tuple[Placed | None, ...]
    changes: tuple[Change, ...]

    def tensors(self, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The result's tensors by their Llama names, one by one. `read` gives one of the child's by its name."""
        from blocks.child.layout import expected_tensors

        for name, size in expected_tensors(self.shape, self.architecture).items():
            yield name, self._tensor(name, size, read)

    def layer(self, index: int, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The result's tensors of one layer, by their names within it."""
        from blocks.child.layout import expected_tensors

        prefix = f"model.layers.{index}."
        sizes = expected_tensors(self.shape, self.architecture)
        wanted = {name: size for name, size in sizes.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): self._tensor(name, size, read) for name, size in wanted.items()}

    def _tensor(self, name: str, size: tuple[int, ...], read: Callable[[str], Tensor]) -> Tensor:
        if not name.startswith("model.layers."):
            return read(name)
        layer, part = name.removeprefix("model.layers.").split(".", 1)
        of_attention = part.startswith(("self_attn.", "input_layernorm."))
        placed = (self.attentions if of_attention else self.ffns)[int(layer)]
        assert placed is not None, name
        if placed.source is not None:
            return self._fitted(read(f"model.layers.{placed.source}.{part}"), part, size)
        import torch

        dtype = read("model.norm.weight").dtype
        return torch.ones(size, dtype=dtype) if "norm" in part else torch.zeros(size, dtype=dtype)

    def _fitted(self, tensor: Tensor, part: str, size: tuple[int, ...]) -> Tensor:
        """Repeats KV heads, and pads FFNs with zero channels."""
        if tuple(tensor.shape) == size:
            return tensor
        if part.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
            return repeated_heads(tensor, size[0] // tensor.shape[0], self.shape.head_dim)
        from torch.nn import functional as F

        lacking = [want - have for want, have in zip(size, tensor.shape, strict=True)]
        return F.pad(tensor, [end for extra in reversed(lacking) for end in (0, extra)])


def repeated_heads(tensor: Tensor, times: int, head_dim: int) -> Tensor:
    """Each KV head `times` times in a row. [heads * head_dim, ...] -> [heads * times * head_dim, ...]."""
    return tensor.unflatten(0, (-1, head_dim)).repeat_interleave(times, 0).flatten(0, 1)


def canonical(shape: ModelShape, architecture: Architecture, form: Form = Form()) -> Rewrite:
    """The smallest stack of layers that computes the same and is of that form. Exact: no logit changes."""
    built_shape, built = as_built(shape, architecture)
    changes = [_padding(shape, architecture)] if built != architecture else []
    parts = [placed for index, layer in enumerate(built) for placed in _parts(layer, index)]
    if form.first_attention and not (parts and parts[0].spec.kind == "kv"):
        parts.insert(0, Placed(ZERO_ATTENTION, None))
        changes.append(
            Change(
                "an attention of zeros with 1 KV head in layer 0",
                built_shape.attention_parameters(ZERO_ATTENTION),
                built_shape.kv_values_per_token(ZERO_ATTENTION),
            )
        )
    if form.one_kv_count:
        parts, repeats = _one_kv_count(built_shape, parts)
        changes += repeats
    layers = _packed(parts)
    changes[:0] = _fewer(built, layers)
    if form.ffn_after_attention:
        bare = [index for index, (attention, ffn) in enumerate(layers) if attention and not ffn]
        for index in bare:
            layers[index] = (layers[index][0], Placed(ZERO_FFN, None))
        if bare:
            places = [attention.source or 0 for index in bare if (attention := layers[index][0])]
            text = f"an FFN of {WIDTH_MULTIPLE} zero channels in {layers_of(places)}, where an attention stands alone"
            changes.append(Change(text, len(bare) * built_shape.ffn_parameters(ZERO_FFN)))
    return _rewrite(built_shape, layers, changes)


def _rewrite(shape: ModelShape, layers: list[tuple[Placed | None, Placed | None]], changes: list[Change]) -> Rewrite:
    specs = []
    for attention, ffn in layers:
        own_attention, own_ffn = attention.spec if attention else NO_ATTENTION, ffn.spec if ffn else NO_FFN
        assert isinstance(own_attention, AttentionSpec) and isinstance(own_ffn, FFNSpec)
        specs.append(LayerSpec(own_attention, own_ffn))
    heads = max((spec.attention.kv_heads for spec in specs), default=0) or shape.num_key_value_heads
    width = max((spec.ffn.width for spec in specs), default=0) or shape.intermediate_size
    return Rewrite(
        replace(shape, num_hidden_layers=len(specs), num_key_value_heads=heads, intermediate_size=width),
        Architecture(tuple(specs)),
        tuple(attention for attention, _ in layers),
        tuple(ffn for _, ffn in layers),
        tuple(changes),
    )


def _parts(layer: LayerSpec, index: int) -> list[Placed]:
    return [Placed(spec, index) for spec in (layer.attention, layer.ffn) if spec.kind != "skip"]


def _packed(parts: list[Placed]) -> list[tuple[Placed | None, Placed | None]]:
    """Pairs an attention with the FFN that follows it. At least one layer, be it empty: no engine loads none."""
    layers: list[tuple[Placed | None, Placed | None]] = []
    for placed in parts:
        if isinstance(placed.spec, AttentionSpec):
            layers.append((placed, None))
        elif layers and layers[-1][1] is None:
            layers[-1] = (layers[-1][0], placed)
        else:
            layers.append((None, placed))
    return layers or [(None, None)]


def _fewer(before: Architecture, layers: list[tuple[Placed | None, Placed | None]]) -> list[Change]:
    """What packing did, in words: layers that went because they were empty, and pairs that became one layer."""
    empty = [index for index, layer in enumerate(before) if not _parts(layer, index)]
    if len(empty) == len(before):
        empty = empty[1:]
    pairs = [
        f"{attention.source} and {ffn.source}"
        for attention, ffn in layers
        if attention and ffn and None not in (attention.source, ffn.source) and attention.source != ffn.source
    ]
    changes = []
    if empty:
        changes.append(Change(f"{layers_of(empty)}, empty, left out"))
    if pairs:
        changes.append(Change(f"layers {_listed(pairs)} packed into one" + (" each" if len(pairs) > 1 else "")))
    return changes


def _one_kv_count(shape: ModelShape, parts: list[Placed]) -> tuple[list[Placed], list[Change]]:
    """All attentions with as many KV heads, repeated: the least count that all counts divide (it divides the query heads)."""
    counts = {placed.spec.kv_heads for placed in parts if isinstance(placed.spec, AttentionSpec)} - {0}
    if len(counts) < 2:
        return parts, []
    common = AttentionSpec("kv", math.lcm(*counts))
    grown: list[Placed] = []
    parameters = values = 0
    for placed in parts:
        if isinstance(placed.spec, AttentionSpec) and placed.spec.kind == "kv":
            parameters += shape.attention_parameters(common) - shape.attention_parameters(placed.spec)
            values += shape.kv_values_per_token(common) - shape.kv_values_per_token(placed.spec)
            placed = Placed(common.at(placed.spec.precision), placed.source)
        grown.append(placed)
    return grown, [Change(f"KV heads repeated to {common.kv_heads} in every layer", parameters, values)]


def _padding(shape: ModelShape, architecture: Architecture) -> Change:
    _, built = as_built(shape, architecture)
    more = sum(
        shape.ffn_parameters(after.ffn) - shape.ffn_parameters(before.ffn)
        for before, after in zip(architecture, built, strict=True)
    )
    return Change(f"FFNs padded with zero channels to multiples of {WIDTH_MULTIPLE}", more)


def layers_of(indices: list[int], most: int = 6) -> str:
    """ "layer 3", "layers 3, 5 and 8"; of many the first few."""
    shown = [str(index) for index in indices[:most]]
    if len(indices) > most:
        return f"layers {', '.join(shown)} and {len(indices) - most} more"
    return f"layer{'s' if len(shown) > 1 else ''} {_listed(shown)}"


def _listed(items: list[str]) -> str:
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}" if " and " not in items[0] else ", ".join(items)
