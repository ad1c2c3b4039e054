"""Between our words and the child's configuration: specs to `block_configs` and back, and the tensors they imply.

The published form can say less than a parent can be, so a child is sometimes built a little larger than its
architecture (`as_built`): FFN widths are multiples of 256 (padded with zero channels, which change nothing), and
either all attention projections carry a bias or none does (Qwen2's missing o_proj bias becomes a zero one).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blocks.errors import CheckpointError
from blocks.families import CHILD_TYPE, family_of, read_sizes
from blocks.shape import ModelShape, as_built, ffn_mult
from blocks.spec import Architecture, AttentionSpec, FFNSpec, LayerSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from blocks.child.configuration_decilm import DeciLMConfig

AUTO_MAP = {
    "AutoConfig": "configuration_decilm.DeciLMConfig",
    "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
}
FORMAT = 2  # of `marquetry_format` in config.json: raised when an older reader would misread a newer child
FORMAT_OF_BF16 = 1  # what a child without `marquetry_precisions` says
COPIED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)


def shape_of(config: PretrainedConfig) -> ModelShape:
    """Sizes of a child, or of a parent as its family reads them.

    Raises:
        UnsupportedModelError: if it is neither, or a parent that cannot be taken apart.
        CheckpointError: if the sizes contradict each other.
    """
    if config.model_type == CHILD_TYPE:
        bias = bool(config.attention_bias)
        flags = {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(config.mlp_bias), "qk_norm": bool(config.qk_norm)}
        return read_sizes(config, flags)
    return family_of(config.model_type).shape(config)


def expected_tensors(shape: ModelShape, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of such a model by its Llama name, with its shape. A tied head is not a tensor of its own."""
    table = (shape.vocab_size, shape.hidden_size)
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    for index, layer in enumerate(architecture):
        parts = _attention_tensors(shape, layer.attention) | _ffn_tensors(shape, layer.ffn)
        tensors |= {f"model.layers.{index}.{name}": size for name, size in parts.items()}
    tensors["model.norm.weight"] = (shape.hidden_size,)
    if not shape.tie_word_embeddings:
        tensors["lm_head.weight"] = table
    return tensors


def _attention_tensors(shape: ModelShape, spec: AttentionSpec) -> dict[str, tuple[int, ...]]:
    hidden, norm = shape.hidden_size, {"input_layernorm.weight": (shape.hidden_size,)}
    if spec.kind == "skip":
        return {}
    if spec.kind == "linear":
        return {**norm, "self_attn.linear_attn.weight": (hidden, hidden)}
    q_out, kv_out = shape.num_attention_heads * shape.head_dim, spec.kv_heads * shape.head_dim
    outputs = {"q_proj": q_out, "k_proj": kv_out, "v_proj": kv_out}
    tensors: dict[str, tuple[int, ...]] = {f"self_attn.{name}.weight": (out, hidden) for name, out in outputs.items()}
    tensors["self_attn.o_proj.weight"] = (hidden, q_out)
    if shape.qkv_bias:
        tensors |= {f"self_attn.{name}.bias": (out,) for name, out in outputs.items()}
    if shape.o_bias:
        tensors["self_attn.o_proj.bias"] = (hidden,)
    if shape.qk_norm:
        tensors |= {f"self_attn.{name}.weight": (shape.head_dim,) for name in ("q_norm", "k_norm")}
    return {**norm, **tensors}


def _ffn_tensors(shape: ModelShape, spec: FFNSpec) -> dict[str, tuple[int, ...]]:
    hidden, norm = shape.hidden_size, {"post_attention_layernorm.weight": (shape.hidden_size,)}
    if spec.kind == "skip":
        return {}
    if spec.kind == "linear":
        return {**norm, "mlp.linear_mlp.weight": (hidden, hidden)}
    sizes = {"gate_proj": (spec.width, hidden), "up_proj": (spec.width, hidden), "down_proj": (hidden, spec.width)}
    tensors: dict[str, tuple[int, ...]] = {f"mlp.{name}.weight": size for name, size in sizes.items()}
    if shape.mlp_bias:
        tensors |= {f"mlp.{name}.bias": size[:1] for name, size in sizes.items()}
    return {**norm, **tensors}


def child_config(
    parent_config: PretrainedConfig | Mapping[str, Any], architecture: Architecture, dtype: str
) -> DeciLMConfig:
    """The configuration of the child that `architecture` makes of a parent.

    Args:
        parent_config: the parent's configuration, or the content of its config.json.
        dtype: of the weights on disk, as torch spells it ("bfloat16").

    Raises:
        CheckpointError: if the architecture is not one of this parent.
    """
    from blocks.child.configuration_decilm import DeciLMConfig

    parent = as_config(parent_config)
    shape, built = as_built(shape_of(parent), architecture)
    if len(built) != shape.num_hidden_layers:
        raise CheckpointError(
            f"the architecture has {len(built)} layers, its parent {shape.num_hidden_layers}: it is of another parent"
        )
    config = DeciLMConfig(
        **{name: getattr(parent, name) for name in COPIED_FIELDS if hasattr(parent, name)},
        num_hidden_layers=shape.num_hidden_layers,
        num_key_value_heads=shape.num_key_value_heads,
        intermediate_size=shape.intermediate_size,
        head_dim=shape.head_dim,
        attention_bias=shape.qkv_bias,
        mlp_bias=shape.mlp_bias,
        qk_norm=shape.qk_norm,
        block_configs=[_block_config(shape, layer) for layer in built],
        architectures=["DeciLMForCausalLM"],
        dtype=dtype,
        marquetry_format=FORMAT_OF_BF16,
    )
    config.auto_map = dict(AUTO_MAP)
    if built.rounded:
        config.marquetry_format = FORMAT
        config.marquetry_precisions = [[layer.attention.precision, layer.ffn.precision] for layer in built]
    return config


def published_config(content: Mapping[str, Any]) -> DeciLMConfig:
    """The configuration of a published child, with our model code named in it.

    Raises:
        CheckpointError: if it is not a child, or uses what our model code lacks.
    """
    config = _parse(content, "the configuration")
    config.auto_map, config.architectures = dict(AUTO_MAP), ["DeciLMForCausalLM"]
    config.marquetry_format = FORMAT_OF_BF16
    return config


def as_config(config: PretrainedConfig | Mapping[str, Any]) -> PretrainedConfig:
    """A parent's config.json as an object, which fills what the file leaves out with its model type's defaults."""
    if not isinstance(config, Mapping):
        return config
    if config.get("model_type") == CHILD_TYPE:
        return _parse(config, "the parent's configuration")
    from transformers import AutoConfig

    family_of(str(config.get("model_type")))  # before transformers looks for code that it does not have
    return AutoConfig.for_model(**config)


def _block_config(shape: ModelShape, layer: LayerSpec) -> dict[str, dict[str, Any]]:
    from blocks.child.configuration_decilm import block_config

    attention, ffn, heads = layer.attention, layer.ffn, shape.num_attention_heads
    if attention.kind == "kv" and heads % attention.kv_heads:
        raise CheckpointError(f"{attention}: {attention.kv_heads} KV heads do not divide {heads} query heads")
    instead = {"linear": "linear", "skip": None}
    return block_config(
        heads // attention.kv_heads if attention.kind == "kv" else instead[attention.kind],
        ffn_mult(ffn.width, shape.hidden_size) if ffn.kind == "width" else instead[ffn.kind],
    )


def read_architecture(source: Path | str | Mapping[str, Any]) -> tuple[ModelShape, Architecture]:
    """The sizes and the architecture of a child, ours or a published one.

    Args:
        source: a checkpoint directory, a config.json, or its content.

    Returns:
        The shape, whose `num_key_value_heads` and `intermediate_size` are the largest of any layer (a child does not
        record its parent's), and one spec per layer, as built.

    Raises:
        CheckpointError: if it cannot be read, is of another kind, or was written by a newer version.
    """
    if isinstance(source, Mapping):
        config = _parse(source, "the configuration")
    else:
        config = _parse(read_config(Path(source)), str(source))
    layers = range(config.num_hidden_layers)
    architecture = Architecture(tuple(_layer_spec(config, layer) for layer in layers))
    return shape_of(config), architecture


def is_packed(content: Mapping[str, Any]) -> bool:
    """Whether a child's config.json speaks of packed weights."""
    return bool(content.get("quantization_config"))


def read_config(path: Path) -> Mapping[str, Any]:
    """The content of a checkpoint's config.json. `path` is the file or its directory."""
    file = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a model's configuration")
    return content


def _parse(content: Mapping[str, Any], where: str) -> DeciLMConfig:
    from blocks.child.configuration_decilm import DeciLMConfig

    if content.get("model_type") != CHILD_TYPE:
        raise CheckpointError(f"{where} is of model_type {content.get('model_type')!r}, not a child ({CHILD_TYPE})")
    if content.get("marquetry_format", FORMAT) > FORMAT:
        raise CheckpointError(
            f"{where} was written by a newer version (format {content['marquetry_format']}, this one reads {FORMAT}); "
            "upgrade with `pip install -U marquetry`"
        )
    if not isinstance(content.get("block_configs"), list):
        raise CheckpointError(f"{where} has no block_configs")
    try:
        config = DeciLMConfig(**content)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    precisions = content.get("marquetry_precisions")
    if precisions is not None and not _is_pairs(precisions, config.num_hidden_layers):
        raise CheckpointError(
            f'{where}: marquetry_precisions must be one [attention, ffn] a layer, such as ["fp8", "bf16"]'
        )
    return config


def _is_pairs(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair) for pair in value)
    )


def _layer_spec(config: DeciLMConfig, layer: int) -> LayerSpec:
    attention = AttentionSpec(config.attention_kind(layer), config.kv_heads(layer))
    spec = LayerSpec(attention, FFNSpec(config.ffn_kind(layer), config.width(layer)))
    precisions = getattr(config, "marquetry_precisions", None)
    return spec if precisions is None else spec.at(*precisions[layer])
