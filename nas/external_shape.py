"""The sizes of a parent, worked out from what a score table says of candidates that are named as ours.

A table has no shape, but its counts leave no choice: an FFN of w channels has 3 D w + D parameters, an attention's key and
value matrices grow by 2 D E a KV head, the rest of it is queries and output. What is found is tried on every row; if one
count is not met to the parameter, nothing is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from blocks.shape import ModelShape
from blocks.spec import NO_ATTENTION, NO_FFN, AttentionSpec, FFNSpec, LayerSpec


@dataclass(frozen=True)
class Count:
    """What a row says of a layer, or of a subblock beside a skip: parameters, and KV bytes a token in bf16."""

    layer: LayerSpec
    parameters: int
    kv_bytes_per_token: int | None = None

    @classmethod
    def of(cls, spec: LayerSpec | AttentionSpec | FFNSpec, parameters: int, kv_bytes_per_token: int | None) -> Count:
        if isinstance(spec, AttentionSpec):
            spec = LayerSpec(spec, NO_FFN)
        elif isinstance(spec, FFNSpec):
            spec = LayerSpec(NO_ATTENTION, spec)
        return cls(spec.structure, parameters, kv_bytes_per_token)


def find_shape(counts: Iterable[Count], layers: int) -> ModelShape | None:
    """The shape that all counts fit to the parameter, None if there is none. Its `vocab_size` is 0: no layer tells it."""
    known = list(dict.fromkeys(counts))
    widest = max((count.layer.ffn.width for count in known), default=0)
    most = max((count.layer.attention.kv_heads for count in known), default=0)
    if not (widest and most):
        return None
    for hidden, mlp_bias in dict.fromkeys(_hidden_sizes(known)):
        ffn = ModelShape(hidden, widest, layers, 1, 1, 1, 0, mlp_bias=mlp_bias)
        attentions = {
            count.layer.attention.kv_heads: (count.parameters - ffn.ffn_parameters(count.layer.ffn), count)
            for count in known
            if count.layer.attention.kv_heads
        }
        for head_dim in dict.fromkeys(_head_dims(attentions, hidden)):
            for qkv_bias, qk_norm, o_bias in product((False, True), repeat=3):
                flags = {"qkv_bias": qkv_bias, "qk_norm": qk_norm, "o_bias": o_bias, "mlp_bias": mlp_bias}
                none = ModelShape(hidden, widest, layers, 0, most, head_dim, 0, **flags)
                left = attentions[most][0] - none.attention_parameters(AttentionSpec("kv", most))
                heads, rest = divmod(left, head_dim * (2 * hidden + qkv_bias))  # of the query and output matrices
                if rest == 0 and heads > 0 and heads % most == 0:
                    found = ModelShape(hidden, widest, layers, heads, most, head_dim, 0, **flags)
                    if _fits(found, known):
                        return found
    return None


def _hidden_sizes(counts: Sequence[Count]) -> Iterator[tuple[int, bool]]:
    """(hidden_size, mlp_bias) that FFNs alone, or pairs of rows with the same attention, may have."""
    for count in counts:
        width = count.layer.ffn.width
        if width and count.layer.attention.kind == "skip":
            for bias in (False, True):
                hidden, rest = divmod(count.parameters - 2 * width * bias, 3 * width + 1 + bias)
                if rest == 0 and hidden > 0:
                    yield hidden, bias
    by_attention: dict[AttentionSpec, dict[int, int]] = {}
    for count in counts:
        by_attention.setdefault(count.layer.attention, {})[count.layer.ffn.width] = count.parameters
    for own in by_attention.values():
        for (width, parameters), (other, fewer) in combinations(sorted(own.items(), reverse=True), 2):
            if other:
                grown, rest = divmod(parameters - fewer, width - other)
                if rest == 0 and grown > 0 and grown % 3 != 1:
                    yield grown // 3, grown % 3 == 2


def _head_dims(attentions: dict[int, tuple[int, Count]], hidden: int) -> Iterator[int]:
    """By the KV cache of a token, or by how much attentions grow with their KV heads."""
    for heads, (_, count) in attentions.items():
        if count.kv_bytes_per_token and count.kv_bytes_per_token % (4 * heads) == 0:
            yield count.kv_bytes_per_token // (4 * heads)
    for (heads, (parameters, _)), (fewer, (less, _)) in combinations(sorted(attentions.items(), reverse=True), 2):
        for bias in (False, True):
            size, rest = divmod(parameters - less, 2 * (hidden + bias) * (heads - fewer))
            if rest == 0 and size > 0:
                yield size


def _fits(shape: ModelShape, counts: Sequence[Count]) -> bool:
    def kv(count: Count) -> bool:
        told = count.kv_bytes_per_token
        return told is None or told == 2 * shape.kv_values_per_token(count.layer.attention)

    return all(shape.layer_parameters(count.layer) == count.parameters and kv(count) for count in counts)
