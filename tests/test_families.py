"""Every family's shape counts its model to the parameter; whatever cannot be taken apart is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from blocks.child.layout import expected_tensors
from blocks.errors import CheckpointError, UnsupportedModelError
from blocks.families import FAMILIES, family_of

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def shape_of(config: PretrainedConfig) -> Any:
    return family_of(config.model_type).shape(config)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        LlamaConfig(**SIZES, head_dim=32),
        MistralConfig(**SIZES, sliding_window=None, head_dim=32),
        Qwen2Config(**SIZES),
        Qwen3Config(**SIZES, head_dim=32),
        Qwen3Config(**SIZES, attention_bias=True, tie_word_embeddings=True),
    ],
    ids=["llama", "llama-tied-biases", "llama-head-dim", "mistral", "qwen2", "qwen3", "qwen3-tied-bias"],
)
def test_shape_describes_the_model_to_the_parameter(config: PretrainedConfig) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config)
    assert shape.parameters(shape.parent_architecture) == sum(p.numel() for p in model.parameters())
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert expected_tensors(shape, shape.parent_architecture) == built
    assert type(model).__name__ == family_of(config.model_type).architecture


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (MistralConfig(**SIZES, sliding_window=32), "sliding window of 32"),
        (Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=32, max_window_layers=1), "sliding window"),
        (Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=32, max_window_layers=1), "sliding window"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "gelu"),
        (LlamaConfig(**SIZES, quantization_config={"quant_method": "fp8"}), "quantized (fp8)"),
        (LlamaConfig(**SIZES, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), "partial"),
        (LlamaConfig(**SIZES, architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_by_name(config: PretrainedConfig, named: str) -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        shape_of(config)
    assert named in str(refused.value) and "\n" not in str(refused.value)


def test_names_every_obstacle_at_once() -> None:
    with pytest.raises(UnsupportedModelError, match=r"gelu.*sliding window"):
        shape_of(MistralConfig(**SIZES, sliding_window=32, hidden_act="gelu"))


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, sliding_window=128),  # as long as the longest context
        Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=32),
        Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=32, max_window_layers=2),  # no layer left for it
    ],
    ids=["mistral", "qwen2", "qwen3"],
)
def test_accepts_an_inactive_sliding_window(config: PretrainedConfig) -> None:
    assert shape_of(config).num_hidden_layers == 2


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "gemma2", "qwen3_moe", "nemotron-nas"])
def test_refuses_other_families_and_lists_those_that_work(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        family_of(model_type)
    assert all(word in str(refused.value) for word in (model_type, *FAMILIES))


def test_refuses_contradicting_sizes() -> None:
    config = LlamaConfig(**SIZES)
    config.num_key_value_heads = 3
    with pytest.raises(CheckpointError, match="3 KV heads do not divide 4"):
        shape_of(config)
