"""Replace-one-block scores: one-pass against the analytic second-order term, exact against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from blocks.candidates import FitConfig, fit_layer
from blocks.checkpoint import load_child, write_child
from blocks.layer import DOWN_PROJ, layer_forward
from blocks.library import LayerLibrary
from blocks.spec import Architecture, LayerSpec
from blocks.sweep import Sweep
from nas.scoring import (
    CandidateOutputs,
    OnePassScores,
    Reference,
    exact_scores,
    kl_to_parent,
    one_pass_scores,
    output_gradients,
    run_reference,
)

VOCABULARY, POSITIONS, LAYERS = 5, 3, 2
TOY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
PARENT = LayerSpec.parse("attention:kv1+ffn:256")
ALL = [
    LayerSpec.parse(f"attention:{attention}+ffn:{ffn}")
    for attention in ("kv4", "kv2", "kv1", "linear", "skip")
    for ffn in ("512", "256", "linear", "skip")
]


@pytest.fixture
def toy(tiny_sweep: Callable[..., Sweep]) -> Sweep:
    return tiny_sweep(**TOY)


@pytest.fixture
def text() -> Tensor:
    return torch.tensor([[0, 3, 1], [4, 2, 2]])


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small changes must survive the library; its own bf16 is tested with the candidates."""
    monkeypatch.setattr("blocks.library.LIBRARY_DTYPE", torch.float32)


def changed_library(sweep: Sweep, layer: int, size: float) -> LayerLibrary:
    """A library whose "parent" candidate has a randomly changed down_proj."""
    library, generator = LayerLibrary(sweep.layer(layer)), torch.Generator().manual_seed(layer)
    down = sweep.layer(layer)[DOWN_PROJ]
    library.put(PARENT, DOWN_PROJ, down + size * torch.randn(down.shape, generator=generator))
    return library


def logits_behind(sweep: Sweep, layer: int, stream: Tensor) -> Tensor:
    """Logits [S, V] from the stream [S, D] that leaves `layer`."""
    h = stream[None]
    for index in range(layer + 1, LAYERS):
        h = layer_forward(sweep.layer(index), h, sweep.math(POSITIONS))
    return (sweep.finish(h) @ sweep.head.T)[0]


def second_order(sweep: Sweep, layer: int, output: Tensor, change: Tensor) -> float:
    """1/2 d' J' F J d / T of one sequence, by autograd's Jacobian: output and change [S, D]."""
    jacobian = torch.autograd.functional.jacobian(lambda h: logits_behind(sweep, layer, h), output)  # [S, V, S, D]
    p = torch.softmax(logits_behind(sweep, layer, output), dim=-1)
    moved = torch.einsum("svtd,td->sv", jacobian, change)
    fisher = (p * moved.pow(2)).sum(1) - (p * moved).sum(1).pow(2)
    return float(fisher.sum()) / (2 * POSITIONS)


def second_order_by_token(sweep: Sweep, layer: int, output: Tensor, change: Tensor) -> float:
    """The same without what tokens do together: one token's change at a time."""
    alone = torch.eye(POSITIONS)[:, :, None] * change
    return sum(second_order(sweep, layer, output, one) for one in alone)


def label_gradients(sweep: Sweep, reference: Reference) -> tuple[Tensor, Tensor]:
    """Gradients of log p(v) of every label v with respect to the last stream [N, S, V, D], and p [N, S, V]."""
    stream = reference.streams[-1].clone().requires_grad_()
    log_p = torch.log_softmax(sweep.finish(stream) @ sweep.head.T, dim=-1)
    gradients = [torch.autograd.grad(log_p[..., v].sum(), stream, retain_graph=True)[0] for v in range(VOCABULARY)]
    return torch.stack(gradients, dim=2), log_p.detach().exp()


def expected_gradients(sweep: Sweep, reference: Reference) -> Tensor:
    """All V^S label sequences as if drawn, each scaled by the root of its probability: means over them are exact
    expectations of whatever is quadratic."""
    gradients, p = label_gradients(sweep, reference)
    sequences = list(itertools.product(range(VOCABULARY), repeat=POSITIONS))
    every = torch.arange(POSITIONS)
    scale = torch.stack([p[:, every, list(labels)].prod(1) * len(sequences) for labels in sequences]).sqrt()
    picked = torch.stack([gradients[:, every, list(labels)] for labels in sequences])
    return picked * scale[:, :, None, None]


def score_toy(sweep: Sweep, reference: Reference, gradients: Tensor, size: float) -> list[OnePassScores]:
    """One-pass scores of the changed down_proj of every layer, swept backwards."""
    scores = []
    for layer in reversed(range(LAYERS)):
        library = changed_library(sweep, layer, size)
        scores.append(one_pass_scores(sweep, library, [PARENT], reference.streams[layer], gradients))
    return scores[::-1]


def output_and_change(sweep: Sweep, reference: Reference, layer: int, size: float) -> tuple[Tensor, Tensor]:
    output = reference.streams[layer + 1]
    weights = changed_library(sweep, layer, size).layer_weights(PARENT)
    return output, sweep.forward(weights, reference.streams[layer]) - output


def test_one_pass_score_in_expectation_is_the_second_order_term(toy: Sweep, text: Tensor) -> None:
    """No sampling here: all 125 label sequences with their probabilities, so only fp32 rounding is left."""
    reference = run_reference(toy, text)
    scores = score_toy(toy, reference, expected_gradients(toy, reference), size=0.01)
    for layer in range(LAYERS):
        output, change = output_and_change(toy, reference, layer, 0.01)
        for row in range(len(text)):
            seq = second_order(toy, layer, output[row], change[row])
            tok = second_order_by_token(toy, layer, output[row], change[row])
            assert float(scores[layer].seq[0, row]) == pytest.approx(seq, rel=1e-3)
            assert float(scores[layer].tok[0, row]) == pytest.approx(tok, rel=1e-3)
    first = scores[0]
    assert not torch.allclose(first.seq, first.tok, rtol=0.05)  # the toy tells the two estimators apart


def test_one_pass_score_is_the_leading_term_of_the_true_kl(toy: Sweep, text: Tensor) -> None:
    """Changes of both signs, whose mean has no third-order term; KL of 1e-4 nats leaves fp32 about 1 %."""
    reference, size = run_reference(toy, text), 2e-3
    scores = score_toy(toy, reference, expected_gradients(toy, reference), size)
    for layer in range(LAYERS):
        pair = [changed_library(toy, layer, sign * size) for sign in (1, -1)]
        both = [exact_scores(toy, [(library, [PARENT])], [layer], reference)[0] for library in pair]
        kl = float(torch.stack(both).mean())
        assert kl > 1e-5
        assert float(scores[layer].seq.mean()) == pytest.approx(kl, rel=0.03)


def test_sampled_scores_converge_to_the_second_order_term(toy: Sweep, text: Tensor) -> None:
    samples = 2000
    reference = run_reference(toy, text)
    scores = score_toy(toy, reference, output_gradients(toy, reference, samples, seed=0), size=0.01)
    for layer in range(LAYERS):
        output, change = output_and_change(toy, reference, layer, 0.01)
        analytic = sum(second_order(toy, layer, output[row], change[row]) for row in range(len(text))) / len(text)
        # (g.d)^2 of a near-Gaussian g.d has relative deviation sqrt(2): five standard errors are 5 sqrt(2 / 2000) = 0.16;
        # few labels make heavier tails, hence 0.2
        assert float(scores[layer].seq.mean()) == pytest.approx(analytic, rel=0.2)


def test_labels_are_drawn_from_the_parents_own_distribution(toy: Sweep, text: Tensor) -> None:
    samples = 4000
    reference = run_reference(toy, text)
    drawn = output_gradients(toy, reference, samples, seed=1)  # [K, N, S, D]
    gradients, p = label_gradients(toy, reference)
    distance = (drawn[:, :, :, None] - gradients).norm(dim=-1)  # [K, N, S, V]
    assert float(distance.min(-1).values.max()) < 1e-4  # every sample is the gradient of some label
    frequency = torch.nn.functional.one_hot(distance.argmin(-1), VOCABULARY).float().mean(0)
    deviation = (p * (1 - p) / samples).sqrt()
    assert ((frequency - p).abs() < 5 * deviation).all()


def test_the_same_seed_gives_the_same_gradients(toy: Sweep, text: Tensor) -> None:
    reference = run_reference(toy, text)
    first, again, other = (output_gradients(toy, reference, 8, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_gradients_move_to_the_layers_input_even_if_nothing_is_scored(toy: Sweep, text: Tensor) -> None:
    reference = run_reference(toy, text)
    gradients = output_gradients(toy, reference, 3, seed=0)
    at_output = gradients.clone()
    scores = one_pass_scores(toy, LayerLibrary(toy.layer(1)), [], reference.streams[1], gradients)
    assert scores.seq.shape == scores.tok.shape == (0, 2)
    h = reference.streams[1].clone().requires_grad_()
    output = layer_forward(toy.layer(1), h, toy.math(POSITIONS))
    for k in range(3):
        (expected,) = torch.autograd.grad(output, h, at_output[k], retain_graph=True)
        torch.testing.assert_close(gradients[k], expected, rtol=1e-5, atol=1e-5)


def test_the_parents_own_layer_scores_zero(toy: Sweep, text: Tensor) -> None:
    reference = run_reference(toy, text)
    gradients = output_gradients(toy, reference, 4, seed=0)
    scores = one_pass_scores(toy, LayerLibrary(toy.layer(1)), [PARENT], reference.streams[1], gradients)
    (exact,) = exact_scores(toy, [(LayerLibrary(toy.layer(1)), [PARENT])], [1], reference)
    for score in (scores.seq, scores.tok, exact):
        torch.testing.assert_close(score, torch.zeros(1, 2), rtol=0, atol=1e-6)


def fitted_library(sweep: Sweep, reference: Reference, layer: int) -> LayerLibrary:
    return fit_layer(sweep, sweep.layer(layer), reference.streams[layer], ALL, FitConfig()).library


def random_text(sequences: int = 6, length: int = 40) -> Tensor:
    return torch.randint(0, 256, (sequences, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["fitted", "cut"])
def test_candidate_outputs_equal_whole_layers(tiny_sweep: Callable[..., Sweep], bias: bool, method: str) -> None:
    sweep = tiny_sweep(num_key_value_heads=4, attention_bias=bias, mlp_bias=bias)
    stream = sweep.embed(random_text())
    library = fit_layer(sweep, sweep.layer(0), stream, ALL, FitConfig(method)).library
    math, found = sweep.math(40), set()
    for row, output in CandidateOutputs(library, ALL)(stream, math):
        expected = layer_forward(library.layer_weights(ALL[row]), stream, math)
        # the same products over 512 channels in another order
        torch.testing.assert_close(
            output, expected, rtol=1e-4, atol=1e-4, msg=lambda text, row=row: f"{ALL[row]} {text}"
        )
        found.add(row)
    assert found == set(range(len(ALL)))


def dense_kl(parent_logits: Tensor, child_logits: Tensor) -> Tensor:
    """KL(parent || child) in fp64, mean over each sequence: [N]."""
    log_p, log_q = (torch.log_softmax(logits.double(), dim=-1) for logits in (parent_logits, child_logits))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(1).float()


def test_kl_to_parent_equals_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    head, parent, *children = (torch.randn(size, generator=generator) for size in ((50, 16), *[(3, 5, 16)] * 4))
    for chunk in (2048, 7, 1):  # 15 tokens: in one piece, in uneven ones, one by one
        monkeypatch.setattr("nas.scoring.HEAD_CHUNK", chunk)
        found = kl_to_parent(head, parent, children)
        expected = torch.stack([dense_kl(parent @ head.T, child @ head.T) for child in children])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.min() > 0.1
    torch.testing.assert_close(kl_to_parent(head, parent, [parent]), torch.zeros(1, 3), rtol=0, atol=1e-6)


def test_a_small_kl_survives_a_large_vocabulary() -> None:
    """A difference of entropies would be 5 % off here."""
    generator = torch.Generator().manual_seed(0)
    head, parent, noise = (torch.randn(size, generator=generator) for size in ((50_000, 32), *[(2, 64, 32)] * 2))
    child = parent + 0.01 * noise
    expected = dense_kl(parent.double() @ head.double().T, child.double() @ head.double().T)
    assert 1e-4 < expected.mean() < 1e-2
    torch.testing.assert_close(kl_to_parent(head, parent, [child])[0], expected, rtol=0, atol=1e-6)


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
    specs = [ALL[index] for index in (1, 5, 10, 12, 16, 17, 19)]
    reference = run_reference(sweep, random_text())
    libraries = [fitted_library(sweep, reference, layer) for layer in (1, 3)]
    scores = exact_scores(sweep, [(library, specs) for library in libraries], [1, 3], reference)
    with torch.no_grad():
        parent = AutoModelForCausalLM.from_pretrained(sweep.parent.path)(random_text()).logits
    for layer, library, found in zip((1, 3), libraries, scores, strict=True):
        for spec, kl in zip(specs, found, strict=True):
            expected = dense_kl(parent, assembled_logits(sweep, tmp_path / "child", layer, spec, library))
            torch.testing.assert_close(kl, expected, rtol=1e-4, atol=1e-5, msg=lambda text, s=spec: f"{s} {text}")
            assert expected.mean() > 3e-4  # thirty times the tolerance at least


def test_reference_keeps_every_stream_and_the_hidden_states(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep, told = tiny_sweep(), []
    reference = run_reference(sweep, random_text(), told.append)
    assert told == [0, 1, 2, 3]
    assert len(reference.streams) == 5
    assert torch.equal(reference.streams[0], sweep.embed(random_text()))
    assert torch.equal(reference.hidden, sweep.run(random_text()))


def test_one_pass_scores_rank_candidates_as_exact_ones_do(tiny_sweep: Callable[..., Sweep]) -> None:
    """Spearman over all candidates of all layers; the prototypes found 0.97 on a trained parent."""
    sweep = tiny_sweep(num_key_value_heads=4, initializer_range=0.1)
    reference = run_reference(sweep, random_text())
    gradients = output_gradients(sweep, reference, samples=16, seed=0)
    libraries = [fitted_library(sweep, reference, layer) for layer in range(4)]
    one_pass = [
        one_pass_scores(sweep, libraries[layer], ALL, reference.streams[layer], gradients).seq.mean(1)
        for layer in reversed(range(4))
    ]
    exact = exact_scores(sweep, [(library, ALL) for library in libraries], range(4), reference)
    ranks = torch.stack((torch.cat(one_pass[::-1]), torch.cat([kl.mean(1) for kl in exact]))).argsort().argsort()
    assert float(torch.corrcoef(ranks.double())[0, 1]) > 0.8
