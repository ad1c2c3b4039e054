"""Merging KV heads: exact wherever rotary embeddings leave it free, and better than mean pooling elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from blocks.fit import Statistics
from blocks.layer import DOWN_PROJ, O_PROJ, LayerMath, Weights, attention_context, attention_input, project
from blocks.merge import MergeStatistics, mean_pool, merge_heads
from blocks.parent import open_parent
from blocks.sweep import Sweep

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LENGTH = 8, 4, 16, 64, 24
SIZES = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}


def stream(seed: int, sequences: int = 12) -> Tensor:
    return torch.randn(sequences, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(seed))


def attention_output(w: Weights, h: Tensor, math: LayerMath) -> Tensor:
    last = attention_input(w, h, math)
    assert last is not None
    return project(w, *last)


def statistics_of(w: Weights, h: Tensor, math: LayerMath) -> MergeStatistics:
    statistics = MergeStatistics(KV_HEADS, HEAD_DIM, "cpu")
    for part in h.split(5):
        statistics.add(w, part, math)
    return statistics


def merged(w: Weights, kv_heads: int, math: LayerMath, h: Tensor) -> Weights:
    return {**w, **merge_heads(w, kv_heads, math, statistics_of(w, h, math))}


def assert_same_attention(changed: Weights, w: Weights, math: LayerMath) -> None:
    """On text that the statistics have not seen, relative to the size of the output."""
    h = stream(99)
    expected = attention_output(w, h, math)
    error = (attention_output(changed, h, math) - expected).norm() / expected.norm()
    assert error < 2e-4  # fp32 eigenvectors, and the 1e-6 floor under what o_proj reads


def with_related_heads(
    w: Weights, relate_keys: Callable[[int], Tensor], relate_values: Callable[[int], Tensor], group: int
) -> Weights:
    """Rewrites the heads of each group as functions of its first: keys by a complex factor for each rotary frequency
    [E/2], values by a matrix [E, E]; biases likewise."""
    changed = dict(w)
    for name in [name for name in w if name.startswith(("self_attn.k_proj", "self_attn.v_proj"))]:
        heads = w[name].unflatten(0, (KV_HEADS, HEAD_DIM)).clone()
        for head in range(KV_HEADS):
            first = heads[head - head % group]
            if head % group == 0:
                continue
            if "k_proj" in name:
                rows = torch.complex(*first.chunk(2)) * relate_keys(head).reshape(-1, *(1,) * (first.dim() - 1))
                heads[head] = torch.cat((rows.real, rows.imag))
            else:
                heads[head] = relate_values(head) @ first
        changed[name] = heads.flatten(0, 1)
    return changed


def identical(head: int) -> Tensor:
    return torch.ones(HEAD_DIM // 2, dtype=torch.complex64)


def complex_factors(head: int) -> Tensor:
    generator = torch.Generator().manual_seed(head)
    angle, size = (torch.rand(HEAD_DIM // 2, generator=generator) for _ in range(2))
    return torch.polar(0.5 + size, 6.28 * angle)


def negated(head: int) -> Tensor:
    return -identical(head)


def same_value(head: int) -> Tensor:
    return torch.eye(HEAD_DIM)


def any_matrix(head: int) -> Tensor:
    return torch.eye(HEAD_DIM) + 0.2 * torch.randn(HEAD_DIM, HEAD_DIM, generator=torch.Generator().manual_seed(head))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("keys", [identical, complex_factors, negated])
@pytest.mark.parametrize("values", [same_value, any_matrix])
def test_merging_is_exact_when_heads_differ_only_by_what_rope_leaves_free(
    tiny_sweep: Callable[..., Sweep],
    bias: bool,
    kv_heads: int,
    keys: Callable[[int], Tensor],
    values: Callable[[int], Tensor],
) -> None:
    sweep = tiny_sweep(**SIZES, attention_bias=bias)
    w, math = with_related_heads(sweep.layer(1), keys, values, KV_HEADS // kv_heads), sweep.math(LENGTH)
    changed = merged(w, kv_heads, math, stream(0))
    assert changed["self_attn.k_proj.weight"].shape == (kv_heads * HEAD_DIM, HIDDEN)
    assert changed["self_attn.v_proj.weight"].shape == (kv_heads * HEAD_DIM, HIDDEN)
    assert_same_attention(changed, w, math)


def test_opposite_heads_of_equal_energy_are_merged_exactly(tiny_sweep: Callable[..., Sweep]) -> None:
    """Their principal component is (1, -1): its entries sum to zero, so no phase can be read off the sum."""
    sweep = tiny_sweep(**SIZES)
    math = sweep.math(LENGTH)
    w = dict(with_related_heads(sweep.layer(1), negated, same_value, 2))
    queries = w["self_attn.q_proj.weight"].unflatten(0, (2, 2, 2 * HEAD_DIM))  # [groups, KV heads, query heads * E, D]
    w["self_attn.q_proj.weight"] = queries[:, :1].expand_as(queries).flatten(0, 2)
    assert_same_attention(merged(w, 2, math, stream(0)), w, math)


def test_mean_pooling_is_exact_for_identical_heads_only(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep = tiny_sweep(**SIZES)
    math = sweep.math(LENGTH)
    equal = with_related_heads(sweep.layer(1), identical, same_value, 2)
    assert_same_attention({**equal, **mean_pool(equal, 2, math)}, equal, math)
    related = with_related_heads(sweep.layer(1), complex_factors, same_value, 2)
    with pytest.raises(AssertionError):
        assert_same_attention({**related, **mean_pool(related, 2, math)}, related, math)


def test_mean_pooling_takes_the_mean_of_each_group_of_neighbours(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep = tiny_sweep(**SIZES, attention_bias=True)
    w = sweep.layer(0)
    pooled = mean_pool(w, 2, sweep.math(LENGTH))
    assert pooled.keys() == {f"self_attn.{name}_proj.{part}" for name in "kv" for part in ("weight", "bias")}
    for name, tensor in pooled.items():
        heads = w[name].unflatten(0, (KV_HEADS, HEAD_DIM))
        expected = torch.cat(((heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2))
        torch.testing.assert_close(tensor, expected)


@pytest.mark.parametrize("bias", [False, True])
def test_merging_into_as_many_heads_is_the_parent(tiny_sweep: Callable[..., Sweep], bias: bool) -> None:
    sweep = tiny_sweep(**SIZES, attention_bias=bias)
    w, math = sweep.layer(2), sweep.math(LENGTH)
    assert_same_attention(merged(w, KV_HEADS, math, stream(0)), w, math)


def test_heads_normalised_after_projection_are_mean_pooled(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep = tiny_sweep(**SIZES)
    w = {
        **sweep.layer(0),
        "self_attn.q_norm.weight": torch.ones(HEAD_DIM),
        "self_attn.k_norm.weight": torch.ones(HEAD_DIM),
    }
    math = sweep.math(LENGTH)
    changed, pooled = merge_heads(w, 2, math, statistics_of(w, stream(0), math)), mean_pool(w, 2, math)
    assert changed.keys() == pooled.keys()
    assert all(torch.equal(changed[name], pooled[name]) for name in pooled)


def test_an_attention_that_nothing_reads_stays_finite(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep = tiny_sweep(**SIZES)
    w = {**sweep.layer(0), O_PROJ: torch.zeros(HIDDEN, HEADS * HEAD_DIM)}
    math = sweep.math(LENGTH)
    assert torch.equal(
        attention_output(merged(w, 2, math, stream(0)), stream(1), math), torch.zeros(12, LENGTH, HIDDEN)
    )


def test_statistics_do_not_depend_on_the_batches(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep = tiny_sweep(**SIZES)
    w, math, h = sweep.layer(0), sweep.math(LENGTH), stream(0)
    whole, parts = MergeStatistics(KV_HEADS, HEAD_DIM, "cpu"), statistics_of(w, h, math)
    whole.add(w, h, math)
    for name in ("keys", "queries", "values"):
        one, other = getattr(parts, name), getattr(whole, name)
        assert (one - other).norm() < 1e-5 * other.norm()


def refitted_error(w: Weights, changed: Weights, math: LayerMath, h: Tensor) -> float:
    """Relative error of the attention output once o_proj has been refitted to it on the same text."""
    context, bias = attention_context(changed, h, math), changed.get("self_attn.o_proj.bias", 0)
    target = attention_output(w, h, math) - bias
    statistics = Statistics(context.shape[-1], HIDDEN, "cpu")
    statistics.add(context, target)
    fitted = statistics.reduce().solve(changed[O_PROJ].T, 10.0)
    return float((context @ fitted - target).norm() / target.norm())


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_merged_and_refitted_beats_mean_pooled_and_refitted(tiny_sweep: Callable[..., Sweep], kv_heads: int) -> None:
    """Independent random heads, mean of four layers of three models, on text the fit has seen."""
    ours, pooled = 0.0, 0.0
    for seed in range(3):
        sweep = tiny_sweep(seed, **SIZES)
        math = sweep.math(LENGTH)
        for layer in range(4):
            w, h = sweep.layer(layer), stream(10 * seed + layer, sequences=24)
            ours += refitted_error(w, merged(w, kv_heads, math, h), math, h) / 12
            pooled += refitted_error(w, {**w, **mean_pool(w, kv_heads, math)}, math, h) / 12
    assert ours < 0.95 * pooled


def test_qwen2_biases_are_merged_with_their_weights(tmp_path_factory: pytest.TempPathFactory) -> None:
    """q, k and v biases but none on o; heads related by what RoPE leaves free, so that the merge must be exact."""
    directory = tmp_path_factory.mktemp("qwen2")
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=32,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.5)
    model.save_pretrained(directory)
    sweep = Sweep(open_parent(str(directory)), torch.device("cpu"))
    math, h = sweep.math(LENGTH), torch.randn(12, LENGTH, 128, generator=torch.Generator().manual_seed(5))
    w = with_related_heads(sweep.layer(0), complex_factors, any_matrix, 2)
    assert "self_attn.o_proj.bias" not in w
    assert DOWN_PROJ in w
    changed = merged(w, 2, math, h)
    expected = attention_output(w, h, math)
    assert (attention_output(changed, h, math) - expected).norm() < 2e-4 * expected.norm()
    assert changed["self_attn.k_proj.bias"].shape == changed["self_attn.v_proj.bias"].shape == (2 * HEAD_DIM,)
