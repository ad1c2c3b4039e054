"""Exact scores: the KL against a dense one in fp64, replaced layers against children that are written and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kinds import ALL, exact_scores, fitted_library, random_text
from torch import Tensor
from transformers import AutoModelForCausalLM

from blocks.checkpoint import load_child, write_child
from blocks.library import LayerLibrary
from blocks.spec import Architecture, LayerSpec
from blocks.sweep import Sweep
from nas.exact import ExactScores, Reference, kl_to_parent, run_reference

SOME = [ALL[index] for index in (1, 5, 10, 12, 16, 17, 19)]
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As brute force has it; the library's own bf16 is tested with the candidates."""
    monkeypatch.setattr("blocks.library.LIBRARY_DTYPE", torch.float32)


def dense_kl(parent_logits: Tensor, child_logits: Tensor) -> Tensor:
    """KL(parent || child) in fp64, mean over each sequence: [N]."""
    log_p, log_q = (torch.log_softmax(logits.double(), dim=-1) for logits in (parent_logits, child_logits))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(1).float()


def with_head(tiny_sweep: Callable[..., Sweep], vocabulary: int, hidden: int) -> Sweep:
    """A parent whose head is standard normal."""
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 256, "num_hidden_layers": 1}
    return tiny_sweep(**sizes, **NO_SPECIAL_TOKENS, initializer_range=1.0)


def test_kl_to_parent_equals_dense(tiny_sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, generator = with_head(tiny_sweep, 50, 16), torch.Generator().manual_seed(0)
    head, (parent, *children) = sweep.head, torch.randn(4, 3, 5, 16, generator=generator)
    for rows in (2048, 7, 1):  # 15 tokens: in one piece, in uneven ones, one by one
        monkeypatch.setattr("nas.scoring.HEAD_VALUES", rows * 50)
        found = kl_to_parent(sweep, parent, children)
        expected = torch.stack([dense_kl(parent @ head.T, child @ head.T) for child in children])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.min() > 0.1
    torch.testing.assert_close(kl_to_parent(sweep, parent, [parent]), torch.zeros(1, 3), rtol=0, atol=1e-6)


def test_a_small_kl_survives_a_large_vocabulary(tiny_sweep: Callable[..., Sweep]) -> None:
    """A difference of entropies would be 5 % off here."""
    sweep, generator = with_head(tiny_sweep, 50_000, 32), torch.Generator().manual_seed(0)
    head, (parent, noise) = sweep.head.double(), torch.randn(2, 2, 64, 32, generator=generator)
    child = parent + 0.01 * noise
    expected = dense_kl(parent.double() @ head.T, child.double() @ head.T)
    assert 1e-4 < expected.mean() < 1e-2
    torch.testing.assert_close(kl_to_parent(sweep, parent, [child])[0], expected, rtol=0, atol=1e-6)


def assembled_logits(sweep: Sweep, directory: Path, layer: int, spec: LayerSpec, library: LayerLibrary) -> Tensor:
    """The child with one layer replaced: written to disk, loaded as a checkpoint, run by its own model code."""
    store = sweep.parent.weights()
    prefix = f"model.layers.{layer}."
    state = {name: store.get(name) for name in store.names() if not name.startswith(prefix)}
    state |= {prefix + name: tensor for name, tensor in library.layer_weights(spec).items()}
    layers = [spec if index == layer else own for index, own in enumerate(sweep.parent.shape.parent_architecture)]
    write_child(directory, sweep.parent.path, Architecture(tuple(layers)), state, "float32")
    with torch.no_grad():
        logits: Tensor = load_child(directory)(random_text()).logits
    return logits


def test_exact_scores_equal_brute_force(tmp_path: Path, tiny_sweep: Callable[..., Sweep]) -> None:
    """Two layers that are not neighbours, scored in one suffix sweep."""
    sweep = tiny_sweep(num_key_value_heads=4, initializer_range=0.1)
    reference = run_reference(sweep, random_text())
    libraries = [fitted_library(sweep, reference.streams, layer) for layer in (1, 3)]
    scores = exact_scores(sweep, [(library, SOME) for library in libraries], [1, 3], reference)
    with torch.no_grad():
        parent = AutoModelForCausalLM.from_pretrained(sweep.parent.path)(random_text()).logits
    for layer, library, found in zip((1, 3), libraries, scores, strict=True):
        for spec, kl in zip(SOME, found, strict=True):
            expected = dense_kl(parent, assembled_logits(sweep, tmp_path / "child", layer, spec, library))
            torch.testing.assert_close(kl, expected, rtol=1e-4, atol=1e-5, msg=lambda text, s=spec: f"{s} {text}")
            assert expected.mean() > 3e-4  # thirty times the tolerance at least


@pytest.fixture
def scored(tiny_sweep: Callable[..., Sweep]) -> tuple[Sweep, Reference, list[LayerLibrary]]:
    """A parent with the libraries of all its layers."""
    sweep = tiny_sweep(num_key_value_heads=4)
    reference = run_reference(sweep, random_text())
    return sweep, reference, [fitted_library(sweep, reference.streams, layer) for layer in range(4)]


def test_how_many_streams_are_carried_at_once_changes_nothing(
    scored: tuple[Sweep, Reference, list[LayerLibrary]],
) -> None:
    """One by one, flushed within a layer and between layers, the last layer alone, all together."""
    sweep, reference, libraries = scored
    candidates = [(libraries[layer], SOME[: 2 * layer + 1]) for layer in range(4)]
    whole = exact_scores(sweep, candidates, range(4), reference, most=100)
    assert [scores.shape for scores in whole] == [(1, 6), (3, 6), (5, 6), (7, 6)]
    for most in (1, 2, 5, 16):
        for found, expected in zip(exact_scores(sweep, candidates, range(4), reference, most), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("most", [4, 100])
def test_every_candidate_is_told_once_and_never_more_wait_than_allowed(
    scored: tuple[Sweep, Reference, list[LayerLibrary]], most: int
) -> None:
    sweep, reference, libraries = scored
    told: list[tuple[int, LayerSpec]] = []
    queue = ExactScores(sweep, reference, most, lambda layer, spec, kl: told.append((layer, spec)))
    for layer in (3, 1, 0):
        queue.add(layer, libraries[layer], SOME)
        wanted = [(before, spec) for before in (3, 1, 0) if before >= layer for spec in SOME]
        assert len(wanted) - len(told) == len(queue._waiting) < most
        assert set(told) == set(wanted[: len(told)])
    queue.flush()
    queue.flush()  # nothing is left
    assert sorted(map(str, told)) == sorted(map(str, wanted))


def test_reference_keeps_every_stream_and_the_hidden_states(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep = tiny_sweep()
    stream, reference = sweep.embed(random_text()), run_reference(sweep, random_text())
    assert torch.equal(reference.streams[0], stream)
    for layer in range(4):
        stream = sweep.forward(sweep.layer(layer), stream)
        assert torch.equal(reference.streams[layer + 1], stream)
    assert reference.streams[4].dtype == torch.float32
    assert torch.equal(reference.hidden, sweep.run(random_text()))
