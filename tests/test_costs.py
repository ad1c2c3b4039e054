"""Costs to the byte, against published models and against models as transformers builds them."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from blocks.errors import ConfigError
from blocks.families import family_of
from blocks.shape import ModelShape
from blocks.spec import Architecture, AttentionSpec, FFNSpec, LayerSpec
from nas.costs import CostModel, Scenario

SMOLLM2 = ModelShape(576, 1536, 30, 9, 3, 64, 49_152, tie_word_embeddings=True)
LLAMA_70B = ModelShape(8192, 28_672, 80, 64, 8, 128, 128_256)
QWEN3_4B = ModelShape(2560, 9728, 36, 32, 8, 128, 151_936, tie_word_embeddings=True, qk_norm=True)
MODELS = {"SmolLM2-135M": SMOLLM2, "Llama-3.3-70B": LLAMA_70B, "Qwen3-4B": QWEN3_4B}
PARAMETERS = {"SmolLM2-135M": 134_515_008, "Llama-3.3-70B": 70_553_706_496, "Qwen3-4B": 4_022_468_096}
SMOLLM2_LAYERS = st.builds(
    LayerSpec,
    st.sampled_from([AttentionSpec("kv", 3), AttentionSpec("kv", 1), AttentionSpec("linear"), AttentionSpec("skip")]),
    st.sampled_from([FFNSpec("width", 1536), FFNSpec("width", 768), FFNSpec("linear"), FFNSpec("skip")]),
)
SCENARIOS = st.builds(
    Scenario,
    batch=st.integers(1, 64),
    context=st.integers(1, 131_072),
    weight_dtype=st.sampled_from(["bfloat16", "float32"]),
    kv_dtype=st.sampled_from(["float16", "float32"]),
    reserve_gb=st.floats(0, 10),
)


def config_of(shape: ModelShape) -> PretrainedConfig:
    """The configuration of a model of this shape."""
    sizes = dataclasses.asdict(shape)
    qk_norm = sizes.pop("qk_norm")
    for flag in ("qkv_bias", "o_bias", "mlp_bias"):
        assert not sizes.pop(flag)
    return (Qwen3Config if qk_norm else LlamaConfig)(**sizes)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_equal_the_published_count_and_the_built_model(name: str) -> None:
    shape, config = MODELS[name], config_of(MODELS[name])
    assert family_of(config.model_type).shape(config) == shape
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert CostModel(shape, Scenario()).cost(shape.parent_architecture).parameters == PARAMETERS[name]


def test_kv_cache_of_llama_70b_is_327_680_bytes_a_token() -> None:
    model = CostModel(LLAMA_70B, Scenario(batch=1, context=1))
    assert model.cost(LLAMA_70B.parent_architecture).kv_bytes == 327_680


def test_kv_cache_of_qwen3_at_its_longest_context() -> None:
    """36 layers hold 36 GiB; six attentions of two heads hold 1.5 GiB of it."""
    model = CostModel(QWEN3_4B, Scenario(batch=1, context=262_144))
    assert model.cost(QWEN3_4B.parent_architecture).kv_bytes == 36 * 2**30
    ffn = QWEN3_4B.parent_layer.ffn
    two_heads, none = LayerSpec(AttentionSpec("kv", 2), ffn), LayerSpec(AttentionSpec("skip"), ffn)
    assert model.cost(Architecture((two_heads,) * 6 + (none,) * 30)).kv_bytes == 1.5 * 2**30


def test_dtypes_and_batches_multiply() -> None:
    small = CostModel(SMOLLM2, Scenario(batch=1, context=100)).cost(SMOLLM2.parent_architecture)
    scenario = Scenario(batch=3, context=200, weight_dtype="float32", kv_dtype="float32", reserve_gb=0.25)
    large = CostModel(SMOLLM2, scenario).cost(SMOLLM2.parent_architecture)
    assert small.weight_bytes == 2 * PARAMETERS["SmolLM2-135M"]
    assert large.weight_bytes == 2 * small.weight_bytes
    assert large.kv_bytes == 3 * 2 * 2 * small.kv_bytes
    assert (small.reserve_bytes, large.reserve_bytes) == (0, 250_000_000)


@given(st.lists(SMOLLM2_LAYERS, min_size=30, max_size=30), SCENARIOS)
def test_cost_is_the_fixed_part_plus_the_sum_of_the_layers(layers: list[LayerSpec], scenario: Scenario) -> None:
    model, architecture = CostModel(SMOLLM2, scenario), Architecture(tuple(layers))
    cost = model.cost(architecture)
    assert cost.total_bytes == model.fixed_bytes + sum(map(model.layer_bytes, layers))
    assert cost.weight_bytes == cost.parameters * model.weight_bytes
    assert cost.total_bytes == cost.weight_bytes + cost.kv_bytes + cost.reserve_bytes
    assert cost.gb == cost.total_bytes / 1e9
    told = cost.to_json()
    assert (told["total_bytes"], told["weight_bytes"], told["gb"]) == (cost.total_bytes, cost.weight_bytes, cost.gb)


@given(SMOLLM2_LAYERS, SCENARIOS)
def test_no_candidate_costs_more_than_the_parents_layer(layer: LayerSpec, scenario: Scenario) -> None:
    model = CostModel(SMOLLM2, scenario)
    assert 0 <= model.layer_bytes(layer) <= model.layer_bytes(SMOLLM2.parent_layer)


@pytest.mark.parametrize("name", MODELS)
def test_formula_is_filled_in_with_the_true_numbers(name: str) -> None:
    shape = MODELS[name]
    scenario = Scenario(batch=7, context=4096, kv_dtype="float32", reserve_gb=1.5)
    first = LayerSpec(AttentionSpec("kv", 1), FFNSpec("width", 512))
    architecture = Architecture((first, *shape.parent_architecture.layers[1:]))
    text, cost = CostModel(shape, scenario).formula(architecture), CostModel(shape, scenario).cost(architecture)
    numbers = [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]
    parameters, weight_bytes, weights, batch, context, values, kv_bytes, kv, reserve, total, gb, gib = numbers
    assert parameters * weight_bytes == weights == cost.weight_bytes
    assert batch * context * values * kv_bytes == kv == cost.kv_bytes
    assert (batch, context, kv_bytes, reserve) == (7, 4096, 4, 1_500_000_000)
    assert weights + kv + reserve == total == cost.total_bytes
    assert (gb, gib) == (pytest.approx(total / 1e9, abs=5e-5), pytest.approx(total / 2**30, abs=5e-5))
    assert re.search(r"GB = [\d.]+ GiB$", text)


def test_budget_for_share_keeps_that_share_of_what_can_change() -> None:
    model = CostModel(SMOLLM2, Scenario(reserve_gb=0.5))
    parent = model.cost(SMOLLM2.parent_architecture)
    changeable = parent.attention_bytes + parent.ffn_bytes + parent.kv_bytes
    assert model.fixed_bytes == 49_152 * 576 * 2 + 576 * 2 + 500_000_000
    assert model.budget_for_share(0.5) == model.fixed_bytes + changeable // 2
    assert model.budget_for_share(0.0) == model.fixed_bytes
    assert model.budget_for_share(1.0) == parent.total_bytes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 0}, "--batch must be at least 1, not 0"),
        ({"context": -5}, "--context must be at least 1, not -5"),
        ({"weight_dtype": "int3"}, "--weight-dtype int3: .*bfloat16"),
        ({"kv_dtype": "bf8"}, "--kv-dtype bf8: .*bfloat16"),
        ({"reserve_gb": -0.1}, "--reserve-gb must .*, not -0.1"),
    ],
)
def test_a_bad_scenario_names_its_flag(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scenario(**fields)  # type: ignore[arg-type]


def test_a_budget_of_the_whole_parent_admits_it_even_where_its_ffn_is_padded() -> None:
    shape = dataclasses.replace(SMOLLM2, intermediate_size=1500)
    costs = CostModel(shape, Scenario())
    assert costs.cost(shape.parent_architecture).total_bytes <= costs.budget_for_share(1.0)
    assert costs.cost(shape.parent_architecture).parameters > costs.parent_cost().parameters
