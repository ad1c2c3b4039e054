"""The refit sweep: a child cut hard comes closer to its parent, and what equals the parent is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blocks.candidates import FitConfig, fit_layer
from blocks.layer import Weights
from blocks.refit import refit_sweep
from blocks.rounded import precision_of, round_layer
from blocks.spec import Architecture
from blocks.sweep import Sweep
from nas.exact import kl_to_parent

HARD = Architecture.from_list(
    ["attention:kv2+ffn:512", "attention:skip+ffn:256", "attention:kv1+ffn:skip", "attention:kv1+ffn:256"]
)
WITH_LINEAR = Architecture.from_list(
    ["attention:kv1+ffn:linear", "attention:linear+ffn:skip", "attention:skip+ffn:skip", "attention:linear+ffn:256"]
)
REFITTED = ("self_attn.o_proj.weight", "mlp.down_proj.weight", "self_attn.linear_attn.weight", "mlp.linear_mlp.weight")


def tokens(seed: int = 1, sequences: int = 48) -> Tensor:
    return torch.randint(0, 256, (sequences, 32), generator=torch.Generator().manual_seed(seed))


def assemble(sweep: Sweep, architecture: Architecture, text: Tensor) -> list[Weights]:
    """The child of the library fitted on `text`; layers equal to the parent's are the parent's tensors."""
    layers, stream = [], sweep.embed(text)
    for index, spec in enumerate(architecture):
        library = fit_layer(sweep, sweep.layer(index), stream, [spec], FitConfig())
        layers.append(library.layer_weights(spec))
        stream = sweep.forward(sweep.layer(index), stream)
    return layers


def refit(sweep: Sweep, child: list[Weights], architecture: Architecture, text: Tensor) -> list[dict[str, Tensor]]:
    parent = sweep.parent.shape.parent_layer
    changed = [index for index, spec in enumerate(architecture) if spec != parent]
    return refit_sweep(sweep, child, changed, text, pseudo_tokens=100.0)


def distances(sweep: Sweep, child: list[Weights] | list[dict[str, Tensor]], text: Tensor) -> tuple[float, float]:
    """Mean squared error of the final hidden states, and KL(parent || child) in nats per token."""
    parent, hidden = sweep.run(text), sweep.of(child).run(text)
    return float((hidden - parent).pow(2).mean()), float(kl_to_parent(sweep, parent, [hidden]).mean())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("architecture", [HARD, WITH_LINEAR], ids=["hard", "with linear"])
def test_refit_brings_the_child_closer_on_the_fitting_text(
    tiny_sweep: Callable[..., Sweep], architecture: Architecture, bias: bool
) -> None:
    sweep, text = tiny_sweep(attention_bias=bias, mlp_bias=bias), tokens()
    child = assemble(sweep, architecture, text)
    error, kl = distances(sweep, child, text)
    new_error, new_kl = distances(sweep, refit(sweep, child, architecture, text), text)
    assert new_error < 0.95 * error
    assert new_kl < 0.95 * kl


def test_refit_helps_on_other_text_too(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep, text, other = tiny_sweep(), tokens(sequences=96), tokens(seed=2)
    child = assemble(sweep, HARD, text)
    error, kl = distances(sweep, child, other)
    new_error, new_kl = distances(sweep, refit(sweep, child, HARD, text), other)
    assert new_error < error
    assert new_kl < kl


def test_refit_changes_only_last_matrices_behind_the_first_change(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep, text = tiny_sweep(), tokens()
    architecture = Architecture((HARD[0], HARD[0], HARD[2], HARD[0]))
    child = assemble(sweep, architecture, text)
    refitted = refit(sweep, child, architecture, text)
    assert all(new.keys() == old.keys() for new, old in zip(refitted, child, strict=True))
    changed = {
        (index, name)
        for index, (new, old) in enumerate(zip(refitted, child, strict=True))
        for name in old
        if not torch.equal(new[name], old[name])
    }
    # the third layer has no FFN; the fourth equals the parent's but reads a stream that does not
    assert changed == {(2, REFITTED[0]), (3, REFITTED[0]), (3, REFITTED[1])}


def test_the_childs_own_tensors_are_not_written_to(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep, text = tiny_sweep(), tokens()
    child = assemble(sweep, HARD, text)
    before = [{name: tensor.clone() for name, tensor in layer.items()} for layer in child]
    refit(sweep, child, HARD, text)
    assert all(torch.equal(old[name], layer[name]) for old, layer in zip(before, child, strict=True) for name in layer)


def test_an_all_parent_child_comes_back_identical(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep, told = tiny_sweep(), []
    child = [sweep.layer(index) for index in range(4)]
    refitted = refit_sweep(sweep, child, [], tokens(), 100.0, told.append)
    assert all(new[name] is old[name] for new, old in zip(refitted, child, strict=True) for name in old)
    assert told == [0, 1, 2, 3]


def test_a_parent_layer_said_to_be_changed_hardly_moves(tiny_sweep: Callable[..., Sweep]) -> None:
    """Its present values solve the least squares problem already, so the ridge keeps them."""
    sweep = tiny_sweep(attention_bias=True, mlp_bias=True)
    child = [sweep.layer(index) for index in range(4)]
    refitted = refit_sweep(sweep, child, [0], tokens(), 100.0)
    for new, old in zip(refitted, child, strict=True):
        for name in old:
            torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-3)  # fp32 statistics; values of size 0.2


def test_a_layer_without_anything_is_passed_through(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep, text = tiny_sweep(), tokens()
    architecture = Architecture.from_list(["attention:kv2+ffn:512", "attention:skip+ffn:skip", *HARD.to_list()[:2]])
    child = assemble(sweep, architecture, text)
    refitted = refit(sweep, child, architecture, text)
    assert refitted[1] == {}
    assert distances(sweep, refitted, text)[1] < distances(sweep, child, text)[1]


def test_an_attention_without_ffn_answers_for_the_whole_layer(tiny_sweep: Callable[..., Sweep]) -> None:
    """The attention alone is the parent's own, so only the goal of the whole layer gives it anything to correct."""
    sweep, text = tiny_sweep(), tokens()
    child: list[Weights] = [sweep.layer(index) for index in range(4)]
    child[3] = {name: tensor for name, tensor in child[3].items() if not name.startswith(("mlp.", "post_attention"))}
    error, _ = distances(sweep, child, text)
    new_error, _ = distances(sweep, refit_sweep(sweep, child, [3], text, 10.0), text)
    assert new_error < 0.97 * error  # 0.91; with the goal after the attention it stays as it was


IN_FORMATS = Architecture.from_list(
    [
        "attention:kv2@int4-g32+ffn:512@nvfp4",
        "attention:linear@fp8+ffn:256@int4-g32",
        "attention:skip+ffn:linear@nvfp4a16",
        "attention:kv1+ffn:256@int3",
    ]
)


def refit_rounded(
    sweep: Sweep, child: list[Weights], architecture: Architecture, stored: torch.dtype | None
) -> list[dict[str, Tensor]]:
    text, layers = tokens(sequences=96), range(len(architecture))
    return refit_sweep(sweep, child, layers, text, 100.0, None, architecture.layers, None, stored)


@pytest.mark.parametrize("name", ["int4-g32", "nvfp4a16", "nvfp4", "int3", "fp8", "int8"])
def test_gptq_on_the_way_brings_a_rounded_child_closer_still(tiny_sweep: Callable[..., Sweep], name: str) -> None:
    sweep = tiny_sweep()
    architecture = sweep.parent.shape.parent_architecture.at(name)
    child = [sweep.layer(index) for index in range(4)]
    kl: dict[torch.dtype | None, list[float]] = {}
    for stored in None, torch.bfloat16:
        refitted = refit_rounded(sweep, child, architecture, stored)
        written = [{name: tensor.bfloat16().float() for name, tensor in layer.items()} for layer in refitted]
        served = [round_layer(*pair) for pair in zip(written, architecture, strict=True)]
        kl[stored] = [distances(sweep, served, text)[1] for text in (tokens(sequences=96), tokens(seed=2))]
    for by_gptq, nearest in zip(kl[torch.bfloat16], kl[None], strict=True):
        assert by_gptq < 0.95 * nearest


def test_gptq_chooses_all_that_is_rounded_and_nothing_else(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep = tiny_sweep()
    child = assemble(sweep, IN_FORMATS.structure, tokens())
    before = [{name: tensor.clone() for name, tensor in layer.items()} for layer in child]
    chosen = refit_rounded(sweep, child, IN_FORMATS, torch.bfloat16)
    for spec, old, own, new in zip(IN_FORMATS, before, child, chosen, strict=True):
        for name, tensor in new.items():
            rounded = tensor.ndim == 2 and precision_of(spec, name) != "bf16"
            assert not rounded or torch.equal(tensor, tensor.bfloat16().to(tensor.dtype))  # stored as it is
            assert torch.equal(tensor, old[name]) == (not rounded and name not in REFITTED)
            assert torch.equal(own[name], old[name])


def test_gptq_has_nothing_to_choose_in_a_child_that_is_not_rounded(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep, text = tiny_sweep(), tokens()
    child = assemble(sweep, HARD, text)
    plain, asked = (
        refit_sweep(sweep, child, range(4), text, 100.0, None, HARD.layers, None, stored)
        for stored in (None, torch.bfloat16)
    )
    assert all(torch.equal(one[name], two[name]) for one, two in zip(plain, asked, strict=True) for name in one)
