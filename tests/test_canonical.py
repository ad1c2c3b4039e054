"""Canonical topologies: the same logits to 1e-10 in fp64, whatever was dropped, packed, padded or repeated."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blocks.canonical import Form, canonical, repeated_heads
from blocks.child.configuration_decilm import DeciLMConfig, block_config
from blocks.child.layout import expected_tensors
from blocks.child.modeling_decilm import DeciLMForCausalLM
from blocks.engines import ENGINES
from blocks.shape import ModelShape, ffn_mult
from blocks.spec import Architecture, LayerSpec

SHAPE = ModelShape(24, 512, 5, 12, 6, 4, 40)
IDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(3))
EVERY_FORM = Form(first_attention=True, ffn_after_attention=True, one_kv_count=True)


def architecture(*layers: str) -> Architecture:
    """ "kv2 256", "- 256", "kv1 -", "linear linear": attention and FFN of each layer."""
    texts = [layer.replace("-", "skip").split() for layer in layers]
    return Architecture.from_list([f"attention:{attention}+ffn:{ffn}" for attention, ffn in texts])


def random_tensors(shape: ModelShape, layers: Architecture, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = expected_tensors(shape, layers)
    return {name: 0.5 * torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}


def logits(shape: ModelShape, layers: Architecture, tensors: dict[str, Tensor], cached: bool = False) -> Tensor:
    """Of the model code that travels with children, in fp64."""
    config = DeciLMConfig(
        [_block(shape, layer) for layer in layers],
        qk_norm=shape.qk_norm,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=len(layers),
        num_attention_heads=shape.num_attention_heads,
        head_dim=shape.head_dim,
        attention_bias=shape.o_bias,
        mlp_bias=shape.mlp_bias,
        tie_word_embeddings=shape.tie_word_embeddings,
    )
    model = DeciLMForCausalLM(config).double().eval()
    wanted = {name for name in model.state_dict() if not (shape.tie_word_embeddings and name == "lm_head.weight")}
    assert tensors.keys() == wanted
    model.load_state_dict(tensors, strict=not shape.tie_word_embeddings)
    with torch.no_grad():
        if not cached:
            return model(IDS, use_cache=False).logits
        first = model(IDS[:, :5], use_cache=True)
        rest = model(IDS[:, 5:], past_key_values=first.past_key_values, use_cache=True)
        return torch.cat((first.logits, rest.logits), 1)


def _block(shape: ModelShape, layer: LayerSpec) -> dict[str, dict[str, object]]:
    attention = {"linear": "linear", "skip": None}.get(layer.attention.kind, layer.attention.kind)
    ffn = {"linear": "linear", "skip": None}.get(layer.ffn.kind, layer.ffn.kind)
    return block_config(
        shape.num_attention_heads // layer.attention.kv_heads if attention == "kv" else attention,
        ffn_mult(layer.ffn.width, shape.hidden_size) if ffn == "width" else ffn,
    )


def check_exact(layers: Architecture, form: Form, shape: ModelShape = SHAPE, seed: int = 0) -> Architecture:
    """Asserts that the rewrite computes the same, with and without a cache; gives the new architecture."""
    shape = replace(shape, num_hidden_layers=len(layers))
    before = random_tensors(shape, layers, seed)
    rewrite = canonical(shape, layers, form)
    after = dict(rewrite.tensors(before.__getitem__))
    assert {name: tuple(t.shape) for name, t in after.items()} == expected_tensors(rewrite.shape, rewrite.architecture)
    wanted = logits(shape, layers, before)
    for cached in (False, True):
        found = logits(rewrite.shape, rewrite.architecture, after, cached)
        assert (found - wanted).abs().max() < 1e-10
    more = rewrite.shape.parameters(rewrite.architecture) - shape.parameters(layers)
    assert sum(change.parameters for change in rewrite.changes) == more
    values = [sum(shape.kv_values_per_token(x.attention) for x in each) for each in (rewrite.architecture, layers)]
    assert sum(change.kv_values for change in rewrite.changes) == values[0] - values[1]
    return rewrite.architecture


def test_empty_layers_go_and_the_rest_is_renumbered() -> None:
    layers = architecture("kv6 256", "- -", "kv2 512", "- -", "- 256")
    assert check_exact(layers, Form()) == architecture("kv6 256", "kv2 512", "- 256")
    shape = replace(SHAPE, num_hidden_layers=5)
    (change,) = canonical(shape, layers).changes
    assert (change.text, change.parameters) == ("layers 1 and 3, empty, left out", 0)


def test_an_attention_takes_the_ffn_of_the_next_layer_without_one() -> None:
    layers = architecture("kv6 -", "- 256", "kv2 512", "kv1 -", "- -", "- 512", "- 256")
    assert check_exact(layers, Form()) == architecture("kv6 256", "kv2 512", "kv1 512", "- 256")
    texts = [change.text for change in canonical(replace(SHAPE, num_hidden_layers=7), layers).changes]
    assert texts == ["layer 4, empty, left out", "layers 0 and 1, 3 and 5 packed into one each"]


@pytest.mark.parametrize(
    "layers",
    [
        ("kv6 -", "kv2 256"),
        ("- 256", "- 512"),
        ("- 512", "kv1 256"),
        ("kv6 256", "kv2 -"),
        ("kv1 linear", "linear 256"),
    ],
)
def test_what_is_no_such_pair_stays_as_it_is(layers: tuple[str, ...]) -> None:
    rewrite = canonical(replace(SHAPE, num_hidden_layers=2), architecture(*layers))
    assert rewrite.architecture == architecture(*layers)
    assert rewrite.changes == ()


def test_an_attention_alone_gets_an_ffn_of_zeros_even_as_the_last_layer() -> None:
    layers = architecture("kv6 256", "kv2 -", "kv1 512", "linear -", "kv2 -")
    wanted = architecture("kv6 256", "kv2 256", "kv1 512", "linear 256", "kv2 256")
    assert check_exact(layers, Form(ffn_after_attention=True)) == wanted
    (change,) = canonical(SHAPE, layers, Form(ffn_after_attention=True)).changes
    assert change.parameters == 3 * (3 * 24 * 256 + 24)
    assert "layers 1, 3 and 4" in change.text


@pytest.mark.parametrize("first", ["- 512", "linear 512", "linear -", "- linear"])
def test_layer_0_gets_an_attention_of_zeros_if_it_has_none(first: str) -> None:
    found = check_exact(architecture(first, "kv2 256"), Form(first_attention=True))
    assert str(found[0].attention) == "attention:kv1"
    found = check_exact(architecture(first, "kv2 256"), EVERY_FORM)
    assert str(found[0].attention) == "attention:kv2"


def test_an_attention_moves_up_to_layer_0_rather_than_be_invented() -> None:
    rewrite = canonical(replace(SHAPE, num_hidden_layers=3), architecture("- -", "kv2 -", "- 256"), EVERY_FORM)
    assert rewrite.architecture == architecture("kv2 256")
    assert all(change.parameters == 0 for change in rewrite.changes)


def test_a_child_of_nothing_keeps_one_layer() -> None:
    assert check_exact(architecture("- -", "- -"), Form()) == architecture("- -")
    assert check_exact(architecture("- -", "- -"), EVERY_FORM) == architecture("kv1 256")


def test_kv_heads_are_repeated_to_the_least_common_count() -> None:
    layers = architecture("kv6 256", "kv2 256", "kv1 256", "- 256", "kv3 256")
    found = check_exact(layers, Form(one_kv_count=True))
    assert [layer.attention.kv_heads for layer in found] == [6, 6, 6, 0, 6]
    found = check_exact(architecture("kv2 256", "kv3 256"), Form(one_kv_count=True))
    assert [layer.attention.kv_heads for layer in found] == [6, 6]
    assert canonical(SHAPE, architecture(*["kv2 256"] * 5), Form(one_kv_count=True)).changes == ()


def test_heads_are_repeated_one_by_one_not_as_a_block() -> None:
    heads = torch.arange(6.0).reshape(6, 1)  # 3 heads of 2 channels
    assert repeated_heads(heads, 2, 2)[:, 0].tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5]


def test_widths_are_padded_to_multiples_of_256() -> None:
    shape = replace(SHAPE, intermediate_size=300, num_hidden_layers=2)
    layers = architecture("kv6 300", "kv6 256")
    rewrite = canonical(shape, layers)
    assert rewrite.architecture == architecture("kv6 512", "kv6 256")
    assert rewrite.changes[0].parameters == 3 * 24 * 212
    tensors = random_tensors(shape, layers)
    padded = dict(rewrite.tensors(tensors.__getitem__))
    gate, down = padded["model.layers.0.mlp.gate_proj.weight"], padded["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(gate[:300], tensors["model.layers.0.mlp.gate_proj.weight"]) and not gate[300:].any()
    assert torch.equal(down[:, :300], tensors["model.layers.0.mlp.down_proj.weight"]) and not down[:, 300:].any()


@pytest.mark.parametrize(
    "flags",
    [
        {"qkv_bias": True, "o_bias": True},
        {"mlp_bias": True},
        {"qk_norm": True},
        {"tie_word_embeddings": True},
        {"head_dim": 8},
    ],
    ids=lambda flags: "-".join(flags),
)
def test_biases_norms_and_tied_heads_are_kept_exact(flags: dict[str, int]) -> None:
    layers = architecture("- 256", "kv2 -", "- -", "- 512", "kv3 -")
    check_exact(layers, EVERY_FORM, replace(SHAPE, **flags))  # type: ignore[arg-type]


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_any_topology_in_any_form_is_exact(seed: int) -> None:
    draw = random.Random(seed)
    kinds = ["kv6", "kv3", "kv2", "kv1", "linear", "-"], ["512", "256", "linear", "-"]
    layers = architecture(*(f"{draw.choice(kinds[0])} {draw.choice(kinds[1])}" for _ in range(draw.randint(1, 6))))
    form = Form(*(draw.random() < 0.5 for _ in range(3)))
    found = check_exact(layers, form, seed=seed)
    empty = architecture("- -")[0]
    assert empty not in found or len(found) == 1
    if form.first_attention:
        assert found[0].attention.kind == "kv"
    if form.one_kv_count:
        assert len({layer.attention.kv_heads for layer in found} - {0}) <= 1
    if form.ffn_after_attention:
        assert all(layer.ffn.kind != "skip" for layer in found if layer.attention.kind != "skip")
    again = canonical(replace(SHAPE, num_hidden_layers=len(found)), found, form)
    assert again.changes == () and again.architecture == found


def test_every_engines_form_is_reached_from_every_engines_form() -> None:
    layers = architecture("- 256", "kv2 -", "- -", "kv3 -")
    for engine in ENGINES.values():
        for portable in (True, False):
            check_exact(layers, engine.form(portable))
