"""Specs and their text forms, architecture files, and parameter counts against really built models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from blocks.child.layout import expected_tensors
from blocks.errors import CheckpointError, ConfigError
from blocks.families import family_of
from blocks.files import save_json
from blocks.shape import ModelShape, ffn_mult, ffn_width
from blocks.spec import Architecture, AttentionSpec, FFNSpec, LayerSpec

ATTENTIONS = st.one_of(
    st.sampled_from([AttentionSpec("linear"), AttentionSpec("skip")]),
    st.integers(1, 10_000).map(lambda heads: AttentionSpec("kv", heads)),
)
FFNS = st.one_of(
    st.sampled_from([FFNSpec("linear"), FFNSpec("skip")]),
    st.integers(1, 1_000_000).map(lambda width: FFNSpec("width", width)),
)
LAYERS = st.builds(LayerSpec, ATTENTIONS, FFNS)

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 97,
}
MODELS: dict[str, PretrainedConfig] = {
    "gqa": LlamaConfig(**SIZES, num_key_value_heads=2),
    "mha, tied": LlamaConfig(**SIZES, num_key_value_heads=4, tie_word_embeddings=True),
    "own head_dim": LlamaConfig(**SIZES, num_key_value_heads=1, head_dim=20),
    "biases": LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
}


def shape_of(config: PretrainedConfig) -> ModelShape:
    return family_of(config.model_type).shape(config)


@given(LAYERS)
def test_text_forms_round_trip(layer: LayerSpec) -> None:
    assert LayerSpec.parse(str(layer)) == layer
    assert AttentionSpec.parse(str(layer.attention)) == layer.attention
    assert FFNSpec.parse(str(layer.ffn)) == layer.ffn


@given(LAYERS, LAYERS)
def test_specs_are_equal_exactly_when_their_texts_are(one: LayerSpec, other: LayerSpec) -> None:
    assert (one == other) == (str(one) == str(other))
    assert len({one, other}) == len({str(one), str(other)})


def test_text_forms_are_the_documented_ones() -> None:
    layer = LayerSpec(AttentionSpec("kv", 1), FFNSpec("width", 768))
    assert str(layer) == "attention:kv1+ffn:768"
    assert str(LayerSpec(AttentionSpec("skip"), FFNSpec("linear"))) == "attention:skip+ffn:linear"


@pytest.mark.parametrize(
    "text", ["", "attention:", "attention:kv0", "attention:kv", "attention:kv-1", "attention:kv01"]
)
def test_bad_attention_text_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(ConfigError, match="write attention:kvN"):
        AttentionSpec.parse(text)


@pytest.mark.parametrize("text", ["", "ffn:", "ffn:0", "ffn:1.5", "ffn:-256", "ffn:kv1", "attention:skip", "ffn:256 "])
def test_bad_ffn_text_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(ConfigError, match="write ffn:WIDTH"):
        FFNSpec.parse(text)


@pytest.mark.parametrize("text", ["attention:kv1", "ffn:256+attention:kv1", "attention:kv1+ffn:256+ffn:256", "+"])
def test_bad_layer_text_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        LayerSpec.parse(text)


@pytest.mark.parametrize(("kind", "size"), [("kv", 0), ("kv", -2), ("linear", 3), ("skip", 3), ("width", 1)])
def test_impossible_attention_values_are_refused(kind: str, size: int) -> None:
    with pytest.raises(ConfigError, match="not an attention candidate"):
        AttentionSpec(kind, size)


@pytest.mark.parametrize(("kind", "size"), [("width", 0), ("width", -256), ("linear", 3), ("skip", 3), ("kv", 1)])
def test_impossible_ffn_values_are_refused(kind: str, size: int) -> None:
    with pytest.raises(ConfigError, match="not an FFN candidate"):
        FFNSpec(kind, size)


@given(st.lists(LAYERS, min_size=1, max_size=8))
def test_architecture_survives_json(layers: list[LayerSpec]) -> None:
    architecture = Architecture(tuple(layers))
    read = Architecture.from_list(json.loads(json.dumps(architecture.to_list())))
    assert read == architecture
    assert (len(read), list(read), read[0]) == (len(layers), layers, layers[0])


def test_architecture_file_round_trip(tmp_path: Path) -> None:
    architecture = Architecture.from_list(["attention:kv2+ffn:512", "attention:skip+ffn:linear"])
    save_json(tmp_path / "architecture.json", {"layers": architecture.to_list(), "score": 0.5})
    assert Architecture.load(tmp_path / "architecture.json") == architecture


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"layers": 3}', '{"layers": null}'])
def test_a_file_that_is_no_architecture_is_a_checkpoint_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "architecture.json").write_text(content)
    with pytest.raises(CheckpointError, match="run `nas search`"):
        Architecture.load(tmp_path / "architecture.json")


def test_an_absent_architecture_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not an architecture file"):
        Architecture.load(tmp_path / "architecture.json")


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_parent_counts_equal_the_built_model(config: PretrainedConfig) -> None:
    shape = shape_of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    built = sum(parameter.numel() for parameter in model.parameters())  # tied tables are listed once
    assert shape.parameters(shape.parent_architecture) == built
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert shape.layer_parameters(shape.parent_layer) == layer
    assert shape.fixed_parameters == built - 3 * layer


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_candidate_counts_equal_their_tensors(config: PretrainedConfig) -> None:
    shape = shape_of(config)
    for attention in ("kv1", "linear", "skip"):
        for ffn in ("256", "512", "linear", "skip"):
            layer = LayerSpec.parse(f"attention:{attention}+ffn:{ffn}")
            tensors = expected_tensors(shape, Architecture.uniform(3, layer))
            assert shape.parameters(Architecture.uniform(3, layer)) == sum(
                torch.Size(size).numel() for size in tensors.values()
            )


def test_kv_values_per_token_count_keys_and_values_of_cached_attentions_only() -> None:
    shape = shape_of(MODELS["own head_dim"])
    assert shape.kv_values_per_token(AttentionSpec("kv", 3)) == 2 * 3 * 20
    assert shape.kv_values_per_token(AttentionSpec("linear")) == 0
    assert shape.kv_values_per_token(AttentionSpec("skip")) == 0


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("attention:kv3+ffn:256", "3 does not divide the parent's 4"),
        ("attention:kv8+ffn:256", "8 does not divide the parent's 4"),
        ("attention:kv4+ffn:768", "wider than the parent's 600"),
        ("attention:kv4+ffn:300", "multiples of 256"),
    ],
)
def test_check_refuses_what_cannot_be_cut(layer: str, message: str) -> None:
    shape = shape_of(LlamaConfig(**{**SIZES, "intermediate_size": 600}, num_key_value_heads=4))
    with pytest.raises(ConfigError, match=message):
        shape.check(LayerSpec.parse(layer))


@pytest.mark.parametrize("ffn", ["600", "512", "256", "linear", "skip"])
def test_check_accepts_multiples_of_256_and_the_parents_own_width(ffn: str) -> None:
    shape = shape_of(LlamaConfig(**{**SIZES, "intermediate_size": 600}, num_key_value_heads=4))
    shape.check(LayerSpec.parse(f"attention:kv2+ffn:{ffn}"))


@given(st.integers(1, 1024), st.integers(1, 32768))
def test_ffn_mult_says_every_width_exactly(multiple: int, hidden_size: int) -> None:
    width = 256 * multiple
    assert ffn_width(ffn_mult(width, hidden_size), hidden_size) == width
    through_json: Any = json.loads(json.dumps(ffn_mult(width, hidden_size)))
    assert ffn_width(through_json, hidden_size) == width


def test_ffn_mult_is_exact_for_every_width_of_real_models() -> None:
    for hidden_size in (576, 896, 960, 2048, 2560, 3072, 4096, 5120, 8192, 16384):
        for width in range(256, 65_537, 256):
            assert ffn_width(ffn_mult(width, hidden_size), hidden_size) == width


def test_ffn_width_as_engines_compute_it() -> None:
    assert ffn_width(5.25, 8192) == 28672  # Llama-3.3-70B: int(2 * 5.25 * 8192 / 3) = 28672
    assert ffn_width(1.3125, 8192) == 7168
    assert ffn_width(1.0, 8192) == 5632  # 5461 channels, rounded up to a multiple of 256


@pytest.mark.parametrize(
    "text", ["attention:kv1@fp8+ffn:768@nvfp4", "attention:linear@int8+ffn:skip", "attention:skip+ffn:linear@int4-g32"]
)
def test_precisions_have_a_text_form(text: str) -> None:
    layer = LayerSpec.parse(text)
    assert str(layer) == text
    assert str(layer.structure) == re.sub(r"@[a-z0-9-]+", "", text)
    assert layer.structure.at(layer.attention.precision, layer.ffn.precision) == layer


@pytest.mark.parametrize("text", ["attention:skip@fp8+ffn:768", "attention:kv1@+ffn:768", "attention:kv1@FP 8+ffn:768"])
def test_what_is_no_precision_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="precision"):
        LayerSpec.parse(text)


def test_an_architecture_names_its_precisions() -> None:
    layers = Architecture.from_list(["attention:kv1@fp8+ffn:768", "attention:skip+ffn:skip"])
    assert layers.precisions == ["bf16", "fp8"]
    assert layers.at("nvfp4").to_list() == ["attention:kv1@nvfp4+ffn:768@nvfp4", "attention:skip+ffn:skip"]
    assert layers.structure.precisions == ["bf16"]
