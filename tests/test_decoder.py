"""The decoder of distillation computes what transformers does, for every family and kind of subblock, and its gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_heal_child import MIXED, cut_from
from tiny import LLAMA3_ROPE, TINY, tiny_llama
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from blocks.checkpoint import load_child, write_child
from distill.decoder import last_hidden, prepare
from distill.models import FrozenTeacher, StudentLoss

TOKENS = torch.randint(256, (3, 19), generator=torch.Generator().manual_seed(0))

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "many heads": {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "scaled": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}


def family(name: str) -> nn.Module:
    """A tiny random model in which every parameter, biases and norms included, matters."""
    fields = {**TINY, **FAMILIES[name]}
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A child with fewer KV heads, matrices in the place of subblocks, and layers without attention or FFN."""
    directory = tmp_path_factory.mktemp("child")
    parent_dir = tiny_llama(directory / "parent")
    parent = AutoModelForCausalLM.from_pretrained(parent_dir)
    write_child(directory / "child", parent_dir, MIXED, cut_from(parent), "float32")
    return load_child(directory / "child")


def as_transformers(model: Any) -> Tensor:
    hidden: Tensor = model.model(input_ids=TOKENS, use_cache=False).last_hidden_state
    return hidden


def gradients(model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (hidden * direction).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_in_fp32(model: nn.Module) -> None:
    plain = copy.deepcopy(model)
    expected = as_transformers(plain)
    assert prepare(model)
    found = last_hidden(model, TOKENS, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(model, found), gradients(plain, expected)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=name)
    assert torch.equal(as_transformers(model), expected), "called as before, a layer computes as before"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_parent_of_each_family(name: str) -> None:
    assert_equal_in_fp32(family(name))


def test_a_child_of_all_kinds_of_subblocks(child: nn.Module) -> None:
    assert_equal_in_fp32(copy.deepcopy(child))


@pytest.mark.parametrize("name", ["child", "llama", "qwen3"])
def test_bfloat16_is_as_near_to_fp32_as_autocast(child: nn.Module, name: str) -> None:
    model = copy.deepcopy(child) if name == "child" else family(name)
    exact = as_transformers(model)
    exact_gradients = gradients(model, exact)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = as_transformers(model)
    rounded_gradients = gradients(model, rounded.float())
    assert prepare(model)
    found = last_hidden(model, TOKENS, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    found_gradients = gradients(model, found.float())
    # The last rounding, of the result itself, is part of what autocast does at the head.
    assert (found - exact).norm() < 1.2 * (rounded.bfloat16() - exact).norm()
    ours, theirs = (
        sum(float((g[key] - exact_gradients[key]).square().sum()) for key in exact_gradients) ** 0.5
        for g in (found_gradients, rounded_gradients)
    )
    assert ours < 1.2 * theirs
    assert all(g.dtype == torch.float32 for g in found_gradients.values())


def test_the_teachers_rounded_weights_are_made_once() -> None:
    model = family("llama")
    teacher = FrozenTeacher(model, "bfloat16")
    first = teacher(TOKENS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and parameter is not model.model.embed_tokens.weight:  # type: ignore[union-attr]
                parameter.zero_()
    second = teacher(TOKENS)
    assert torch.equal(first.hidden, second.hidden) and torch.equal(first.head, second.head)


def test_a_teacher_in_the_compute_dtype_is_held_once_and_stays_a_model() -> None:
    model: Any = family("biases").bfloat16().eval()
    expected, tensors = as_transformers(model), {name: t.clone() for name, t in model.state_dict().items()}
    teacher = FrozenTeacher(model, "bfloat16")
    hidden = teacher(TOKENS).hidden
    assert torch.equal(hidden, teacher(TOKENS).hidden)
    exact = as_transformers(family("biases"))
    assert (hidden - exact).norm() < 1.2 * (expected - exact).norm()
    attention = model.model.layers[0].self_attn
    starts = [
        proj.weight.untyped_storage().data_ptr() for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    assert len(set(starts)) == 1, "parts of one matrix"
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(as_transformers(model), expected)


def test_the_students_rounded_weights_are_made_anew() -> None:
    model = family("llama")
    loss = StudentLoss(model, "bfloat16")
    teacher = FrozenTeacher(family("llama"), "bfloat16")
    assert loss(TOKENS, teacher(TOKENS)).abs().item() < 1e-4
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(0.1)  # type: ignore[union-attr, index, operator]
    assert loss(TOKENS, teacher(TOKENS)).item() > 1e-3


def test_gradient_checkpointing_changes_nothing(child: nn.Module) -> None:
    model: Any = copy.deepcopy(child).train()
    assert prepare(model)
    plain = gradients(model, last_hidden(model, TOKENS, None))
    model.gradient_checkpointing_enable()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(count)
    again = gradients(model, last_hidden(model, TOKENS, None))
    assert calls == 2, "once forward, once again for the backward pass"
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"model_type": "gemma", "head_dim": 16}, "its norms and embeddings are scaled otherwise"),
        ({"model_type": "mistral", "sliding_window": 4}, "its attention does not see everything"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "its FFN is another function"),
        ({"model_type": "llama", "attention_dropout": 0.1}, "its attention is random"),
    ],
)
def test_what_is_not_known_keeps_transformers_way(fields: dict[str, Any], why: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**TINY, **fields}))
    assert not prepare(model), why
    hidden = FrozenTeacher(model)(TOKENS).hidden
    assert torch.equal(hidden, as_transformers(model.eval()))


def test_a_prepared_child_can_be_copied_and_saved(child: nn.Module, tmp_path: Path) -> None:
    model: Any = copy.deepcopy(child)
    expected = as_transformers(model)
    assert prepare(model) and prepare(model)
    assert torch.equal(as_transformers(copy.deepcopy(model)), expected)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    torch.testing.assert_close(as_transformers(again), expected)
