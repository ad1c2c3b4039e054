"""The sizes of a Llama-like model, and what each spec costs in parameters. Pure integers, no torch.

Every count here equals the count of the built model, to the parameter: the tests build and compare.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from blocks.errors import ConfigError
from blocks.spec import WIDTH_MULTIPLE, Architecture, AttentionSpec, FFNSpec, LayerSpec


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the parent, named as Hugging Face names them.

    `qkv_bias`, `o_bias`, `mlp_bias` say which projections carry a bias; `qk_norm` whether queries and keys are
    RMS-normalised per head (Qwen3).
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def layers(self) -> range:
        """The indices of the layers."""
        return range(self.num_hidden_layers)

    @property
    def parent_layer(self) -> LayerSpec:
        """The spec that leaves a layer as it is."""
        return LayerSpec(AttentionSpec("kv", self.num_key_value_heads), FFNSpec("width", self.intermediate_size))

    @property
    def parent_architecture(self) -> Architecture:
        return Architecture.uniform(self.num_hidden_layers, self.parent_layer)

    @property
    def fixed_parameters(self) -> int:
        """Embedding, head (once if tied) and final norm: what no candidate changes."""
        table = self.vocab_size * self.hidden_size
        return table * (1 if self.tie_word_embeddings else 2) + self.hidden_size

    def attention_parameters(self, spec: AttentionSpec) -> int:
        """Parameters of one attention with its input norm; 0 for a skip."""
        hidden, q_out, kv_out = (
            self.hidden_size,
            self.num_attention_heads * self.head_dim,
            spec.kv_heads * self.head_dim,
        )
        if spec.kind == "skip":
            return 0
        if spec.kind == "linear":
            return hidden * hidden + hidden
        weights = hidden * q_out + 2 * hidden * kv_out + q_out * hidden
        biases = (q_out + 2 * kv_out) * self.qkv_bias + hidden * self.o_bias
        return weights + biases + 2 * self.head_dim * self.qk_norm + hidden

    def ffn_parameters(self, spec: FFNSpec) -> int:
        """Parameters of one FFN with its input norm; 0 for a skip."""
        hidden = self.hidden_size
        if spec.kind == "skip":
            return 0
        if spec.kind == "linear":
            return hidden * hidden + hidden
        return 3 * hidden * spec.width + (2 * spec.width + hidden) * self.mlp_bias + hidden

    def attention_matrices(self, spec: AttentionSpec) -> list[tuple[int, int]]:
        """(outputs, inputs) of each matrix of an attention: what a precision applies to."""
        hidden, q_out = self.hidden_size, self.num_attention_heads * self.head_dim
        if spec.kind == "kv":
            kv_out = spec.kv_heads * self.head_dim
            return [(q_out, hidden), (kv_out, hidden), (kv_out, hidden), (hidden, q_out)]
        return [(hidden, hidden)] if spec.kind == "linear" else []

    def ffn_matrices(self, spec: FFNSpec) -> list[tuple[int, int]]:
        """(outputs, inputs) of each matrix of an FFN."""
        hidden = self.hidden_size
        if spec.kind == "width":
            return [(spec.width, hidden), (spec.width, hidden), (hidden, spec.width)]
        return [(hidden, hidden)] if spec.kind == "linear" else []

    def subblock_parameters(self, spec: AttentionSpec | FFNSpec) -> int:
        """Of an attention or an FFN, with its norm."""
        return self.attention_parameters(spec) if isinstance(spec, AttentionSpec) else self.ffn_parameters(spec)

    def matrices(self, spec: AttentionSpec | FFNSpec) -> list[tuple[int, int]]:
        """(outputs, inputs) of each matrix of an attention or an FFN: what a precision applies to."""
        return self.attention_matrices(spec) if isinstance(spec, AttentionSpec) else self.ffn_matrices(spec)

    def layer_parameters(self, spec: LayerSpec) -> int:
        return self.attention_parameters(spec.attention) + self.ffn_parameters(spec.ffn)

    def parameters(self, architecture: Architecture) -> int:
        return self.fixed_parameters + sum(self.layer_parameters(layer) for layer in architecture)

    def kv_values_per_token(self, spec: AttentionSpec) -> int:
        """Cached key and value scalars one token leaves in one attention (multiply by bytes per scalar)."""
        return 2 * spec.kv_heads * self.head_dim if spec.kind == "kv" else 0

    def check(self, layer: LayerSpec) -> None:
        """Raises ConfigError if `layer` cannot be cut from this parent, nor be what fusing its FFNs gives (blocks/fuse.py)."""
        if layer.attention.kind == "kv" and self.num_key_value_heads % layer.attention.kv_heads:
            raise ConfigError(
                f"{layer.attention}: {layer.attention.kv_heads} does not divide the parent's {self.num_key_value_heads} KV heads"
            )
        if layer.ffn.width > self.intermediate_size and layer.attention.kind != "skip":
            raise ConfigError(
                f"{layer.ffn} is wider than the parent's {self.intermediate_size}; only fused FFNs are, in layers without attention"
            )
        if layer.ffn.kind == "width" and layer.ffn.width % WIDTH_MULTIPLE and layer.ffn.width != self.intermediate_size:
            raise ConfigError(f"{layer.ffn}: FFN widths must be multiples of {WIDTH_MULTIPLE}, or the parent's own")


def as_built(shape: ModelShape, architecture: Architecture) -> tuple[ModelShape, Architecture]:
    """The shape and architecture that a child really has on disk; count its parameters with these two.

    The child's form knows FFN widths in multiples of 256 (the rest are zero channels) and one flag for all attention
    biases (a missing one is a zero bias).
    """
    bias = shape.qkv_bias or shape.o_bias
    built = Architecture(tuple(LayerSpec(layer.attention, _padded(layer.ffn)) for layer in architecture))
    width = _padded(FFNSpec("width", shape.intermediate_size)).width
    return replace(shape, qkv_bias=bias, o_bias=bias, intermediate_size=width), built


def _padded(ffn: FFNSpec) -> FFNSpec:
    if ffn.kind != "width":
        return ffn
    return replace(ffn, width=rounded_width(ffn.width))


def rounded_width(width: int) -> int:
    """Channels with the zero channels that fill them up to a multiple of 256."""
    return -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def ffn_mult(width: int, hidden_size: int) -> float:
    """The `ffn_mult` that published Nemotron configurations use for `width` channels; `ffn_width` inverts it."""
    return 3 * width / (2 * hidden_size)


def ffn_width(mult: float, hidden_size: int) -> int:
    """intermediate_size = ceil256(int(2 * ffn_mult * hidden_size / 3)), as serving engines compute it."""
    return rounded_width(int(2 * mult * hidden_size / 3))
