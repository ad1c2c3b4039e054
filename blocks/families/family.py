"""What one family of parents is: how its configuration reads, and which members are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from blocks.errors import CheckpointError, UnsupportedModelError
from blocks.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_FLAGS = frozenset({"qkv_bias", "o_bias", "mlp_bias", "qk_norm"})


@dataclass(frozen=True)
class Family:
    """One family of Llama-like parents.

    Attributes:
        model_type: as in config.json.
        architecture: class name of the causal language model, as in the `architectures` of config.json.
        flags: the `qkv_bias`, `o_bias`, `mlp_bias` and `qk_norm` of a configuration's `ModelShape`; absent means False.
    """

    model_type: str
    architecture: str
    flags: Callable[[PretrainedConfig], dict[str, bool]]

    def shape(self, config: PretrainedConfig) -> ModelShape:
        """The sizes of the model that `config` describes.

        Raises:
            UnsupportedModelError: naming everything in `config` that this toolkit cannot take apart.
            CheckpointError: if the sizes contradict each other.
        """
        if found := list(self._obstacles(config)):
            raise UnsupportedModelError(f"this {self.model_type} model cannot be a parent: {'; '.join(found)}")
        return read_sizes(config, self.flags(config))

    def _obstacles(self, config: PretrainedConfig) -> Iterator[str]:
        architectures = getattr(config, "architectures", None)
        if architectures and self.architecture not in architectures:
            yield f"its architecture is {', '.join(architectures)}, not {self.architecture}"
        if config.hidden_act not in ("silu", "swish"):
            yield f"its hidden_act is {config.hidden_act}, not silu"
        if getattr(config, "quantization_config", None):
            yield f"its weights are quantized ({_quantization(config)}); give the unquantized checkpoint"
        if (share := _rotary_share(config)) != 1.0:
            yield f"its rotary embedding is partial (partial_rotary_factor {share})"
        if (window := _active_window(config)) is not None:
            yield f"its sliding window of {window} is active"


def read_sizes(config: PretrainedConfig, flags: dict[str, bool]) -> ModelShape:
    """The sizes that `config` states, with the `flags` that only its kind can tell.

    Raises:
        CheckpointError: if they contradict each other.
    """
    assert flags.keys() <= _FLAGS
    shape = ModelShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        **flags,
    )
    _check_sizes(shape)
    return shape


def _check_sizes(shape: ModelShape) -> None:
    for field in fields(shape):
        if (value := getattr(shape, field.name)) is not False and value < 1:
            raise CheckpointError(f"config.json says {field.name} = {value}")
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise CheckpointError(
            f"config.json contradicts itself: {shape.num_key_value_heads} KV heads do not divide "
            f"{shape.num_attention_heads} attention heads"
        )


def _quantization(config: PretrainedConfig) -> str:
    settings: Any = config.quantization_config
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(method or "unknown method")


def _rotary_share(config: PretrainedConfig) -> float:
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return float(rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0)


def _active_window(config: PretrainedConfig) -> int | None:
    """The sliding window, unless no layer uses it or it is as long as the longest context."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if window is None or (layer_types and "sliding_attention" not in layer_types):
        return None
    return int(window) if window < config.max_position_embeddings else None
