"""One-pass scores: against the analytic second-order term, the true KL, and sums written out by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from kinds import ALL, LENGTH, exact_scores, fitted_library, random_text
from torch import Tensor

from blocks.candidates import FitConfig, fit_layer
from blocks.layer import DOWN_PROJ, layer_forward
from blocks.library import LayerLibrary
from blocks.spec import LayerSpec
from blocks.sweep import StreamCheckpoints, Sweep
from nas.config import ESTIMATORS
from nas.exact import run_reference
from nas.scoring import CandidateOutputs, one_pass_scores, output_gradients

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


def second_order(sweep: Sweep, layer: int, output: Tensor, changes: Tensor) -> float:
    """1/2 d' J' F J d / T of one sequence, by autograd's Jacobian, summed over `changes` [M, S, D] to its output [S, D]."""
    jacobian = torch.autograd.functional.jacobian(lambda h: logits_behind(sweep, layer, h), output)  # [S, V, S, D]
    p = torch.softmax(logits_behind(sweep, layer, output), dim=-1)
    moved = torch.einsum("svtd,mtd->msv", jacobian, changes)
    fisher = (p * moved.pow(2)).sum(2) - (p * moved).sum(2).pow(2)
    return float(fisher.sum()) / (2 * POSITIONS)


def analytic(sweep: Sweep, layer: int, output: Tensor, change: Tensor) -> dict[str, float]:
    """What each estimator is in expectation, for a change [S, D]: how much of it is taken at a time tells them apart."""
    by_token = torch.eye(POSITIONS)[:, :, None] * change
    by_channel = torch.eye(change.numel()).view(-1, *change.shape) * change
    parts = {"tok": by_token, "seq": change[None], "fisher": by_channel}
    return {name: second_order(sweep, layer, output, changes) for name, changes in parts.items()}


def label_gradients(sweep: Sweep, last: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of log p(v) of every label v with respect to the last stream [N, S, V, D], and p [N, S, V]."""
    stream = last.clone().requires_grad_()
    log_p = torch.log_softmax(sweep.finish(stream) @ sweep.head.T, dim=-1)
    gradients = [torch.autograd.grad(log_p[..., v].sum(), stream, retain_graph=True)[0] for v in range(VOCABULARY)]
    return torch.stack(gradients, dim=2), log_p.detach().exp()


def expected_gradients(sweep: Sweep, last: Tensor) -> Tensor:
    """All V^S label sequences as if drawn [N, S, V^S, D], each scaled by the root of its probability: means over them are
    exact expectations of whatever is quadratic."""
    gradients, p = label_gradients(sweep, last)
    sequences = list(itertools.product(range(VOCABULARY), repeat=POSITIONS))
    every = torch.arange(POSITIONS)
    scale = torch.stack([p[:, every, list(labels)].prod(1) * len(sequences) for labels in sequences], dim=1).sqrt()
    picked = torch.stack([gradients[:, every, list(labels)] for labels in sequences], dim=2)
    return picked * scale[:, None, :, None]


def score_toy(sweep: Sweep, streams: StreamCheckpoints, gradients: Tensor, size: float) -> list[dict[str, Tensor]]:
    """One-pass scores of the changed down_proj of every layer, swept backwards."""
    scores = []
    for layer in reversed(range(LAYERS)):
        library = changed_library(sweep, layer, size)
        scores.append(one_pass_scores(sweep, library, [PARENT], streams[layer], gradients, ESTIMATORS))
    return scores[::-1]


def output_and_change(sweep: Sweep, streams: StreamCheckpoints, layer: int, size: float) -> tuple[Tensor, Tensor]:
    output = streams[layer + 1]
    weights = changed_library(sweep, layer, size).layer_weights(PARENT)
    return output, sweep.forward(weights, streams[layer]) - output


def test_one_pass_scores_in_expectation_are_second_order_terms(toy: Sweep, text: Tensor) -> None:
    """No sampling here: all 125 label sequences with their probabilities, so only fp32 rounding is left."""
    streams = StreamCheckpoints(toy, text)
    scores = score_toy(toy, streams, expected_gradients(toy, streams[LAYERS]), size=0.01)
    for layer in range(LAYERS):
        output, change = output_and_change(toy, streams, layer, 0.01)
        for row in range(len(text)):
            for name, expected in analytic(toy, layer, output[row], change[row]).items():
                assert float(scores[layer][name][0, row]) == pytest.approx(expected, rel=1e-3), name
    for one, other in itertools.combinations(ESTIMATORS, 2):  # the toy tells the estimators apart
        assert not torch.allclose(scores[0][one], scores[0][other], rtol=0.05)


def test_one_pass_score_is_the_leading_term_of_the_true_kl(toy: Sweep, text: Tensor) -> None:
    """Changes of both signs, whose mean has no third-order term; KL of 1e-4 nats leaves fp32 about 1 %."""
    reference, size = run_reference(toy, text), 2e-3
    scores = score_toy(toy, reference.streams, expected_gradients(toy, reference.streams[LAYERS]), size)
    for layer in range(LAYERS):
        pair = [changed_library(toy, layer, sign * size) for sign in (1, -1)]
        both = [exact_scores(toy, [(library, [PARENT])], [layer], reference)[0] for library in pair]
        kl = float(torch.stack(both).mean())
        assert kl > 1e-5
        assert float(scores[layer]["seq"].mean()) == pytest.approx(kl, rel=0.03)


def test_sampled_scores_converge_to_the_second_order_term(toy: Sweep, text: Tensor) -> None:
    samples = 2000
    streams = StreamCheckpoints(toy, text)
    scores = score_toy(toy, streams, output_gradients(toy, streams[LAYERS], samples, seed=0), size=0.01)
    for layer in range(LAYERS):
        output, change = output_and_change(toy, streams, layer, 0.01)
        rows = [analytic(toy, layer, output[row], change[row]) for row in range(len(text))]
        for name in ESTIMATORS:
            expected = sum(row[name] for row in rows) / len(text)
            # (g.d)^2 of a near-Gaussian g.d has relative deviation sqrt(2): five standard errors are
            # 5 sqrt(2 / 2000) = 0.16; few labels make heavier tails, hence 0.2
            assert float(scores[layer][name].mean()) == pytest.approx(expected, rel=0.2), name


def test_labels_are_drawn_from_the_parents_own_distribution(toy: Sweep, text: Tensor) -> None:
    samples = 4000
    last = StreamCheckpoints(toy, text)[LAYERS]
    drawn = output_gradients(toy, last, samples, seed=1)  # [N, S, K, D]
    gradients, p = label_gradients(toy, last)
    distance = (drawn[:, :, :, None] - gradients[:, :, None]).norm(dim=-1)  # [N, S, K, V]
    assert float(distance.min(-1).values.max()) < 1e-4  # every sample is the gradient of some label
    frequency = torch.nn.functional.one_hot(distance.argmin(-1), VOCABULARY).float().mean(2)
    deviation = (p * (1 - p) / samples).sqrt()
    assert ((frequency - p).abs() < 5 * deviation).all()


def test_the_same_seed_gives_the_same_gradients(toy: Sweep, text: Tensor) -> None:
    last = StreamCheckpoints(toy, text)[LAYERS]
    first, again, other = (output_gradients(toy, last, 8, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_labels_of_equal_sequences_are_drawn_apart(toy: Sweep) -> None:
    last = StreamCheckpoints(toy, torch.tensor([[0, 3, 1]] * 2))[LAYERS]
    first, second = output_gradients(toy, last, 8, seed=0)
    assert not torch.equal(first, second)


def test_gradients_do_not_depend_on_which_tokens_are_taken_together(
    tiny_sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same labels whatever the batches, and whichever process or round holds a sequence: another label changes a
    gradient by thousands of times the tolerance."""
    sweep = tiny_sweep()
    last = StreamCheckpoints(sweep, random_text())[4]
    whole = output_gradients(sweep, last, 3, seed=2)

    def assert_same(found: Tensor, rows: slice) -> None:
        torch.testing.assert_close(found, whole[rows], rtol=1e-5, atol=1e-6)

    for tokens in (1, 7, LENGTH, 3 * LENGTH + 1):  # of a sequence, or of several
        monkeypatch.setattr("nas.scoring.HEAD_VALUES", tokens * sweep.parent.shape.vocab_size)
        assert_same(output_gradients(sweep, last, 3, seed=2), slice(None))
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        assert_same(output_gradients(sweep, last[rows], 3, seed=2, first_sequence=rows.start), rows)
    other_labels = output_gradients(sweep, last[1:], 3, seed=2)
    assert (other_labels - whole[1:]).abs().max() > 0.01


def test_gradients_move_to_the_layers_input_even_if_nothing_is_scored(toy: Sweep, text: Tensor) -> None:
    streams = StreamCheckpoints(toy, text)
    gradients = output_gradients(toy, streams[LAYERS], 3, seed=0)
    at_output = gradients.clone()
    scores = one_pass_scores(toy, LayerLibrary(toy.layer(1)), [], streams[1], gradients)
    assert {name: values.shape for name, values in scores.items()} == {"tok": (0, 2), "seq": (0, 2)}
    h = streams[1].clone().requires_grad_()
    output = layer_forward(toy.layer(1), h, toy.math(POSITIONS))
    for k in range(3):
        (expected,) = torch.autograd.grad(output, h, at_output[:, :, k], retain_graph=True)
        torch.testing.assert_close(gradients[:, :, k], expected, rtol=1e-5, atol=1e-5)


def test_the_parents_own_layer_scores_zero(toy: Sweep, text: Tensor) -> None:
    reference, library = run_reference(toy, text), LayerLibrary(toy.layer(1))
    gradients = output_gradients(toy, reference.streams[LAYERS], 4, seed=0)
    scores = one_pass_scores(toy, library, [PARENT], reference.streams[1], gradients, ESTIMATORS)
    (exact,) = exact_scores(toy, [(library, [PARENT])], [1], reference)
    assert scores.keys() == set(ESTIMATORS)
    for score in (*scores.values(), exact):
        torch.testing.assert_close(score, torch.zeros(1, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["fitted", "cut"])
def test_candidate_outputs_equal_whole_layers(tiny_sweep: Callable[..., Sweep], bias: bool, method: str) -> None:
    sweep = tiny_sweep(num_key_value_heads=4, attention_bias=bias, mlp_bias=bias)
    stream = sweep.embed(random_text())
    library = fit_layer(sweep, sweep.layer(0), stream, ALL, FitConfig(method))
    math, found = sweep.math(LENGTH), set()
    for row, added in CandidateOutputs(library, ALL)(stream, math):
        expected = layer_forward(library.layer_weights(ALL[row]), stream, math)
        # the same products over 512 channels in another order
        torch.testing.assert_close(
            stream + added, expected, rtol=1e-4, atol=1e-4, msg=lambda text, row=row: f"{ALL[row]} {text}"
        )
        found.add(row)
    assert found == set(range(len(ALL)))


@pytest.mark.parametrize("together", [1, 7, 100])
def test_estimators_are_the_sums_in_their_definitions(
    tiny_sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """Every kind of candidate, several batches, and so many candidates `together`: all sums written out."""
    sweep = tiny_sweep(num_key_value_heads=4)
    streams, layer = StreamCheckpoints(sweep, random_text()), 2
    library = fitted_library(sweep, streams, layer)
    gradients = output_gradients(sweep, streams[layer + 1], 3, seed=0)  # not the last layer: any gradients will do
    at_output, tokens_of_a_batch = gradients.clone(), 3 * LENGTH
    monkeypatch.setattr("nas.scoring.CHANGE_VALUES", together * tokens_of_a_batch * sweep.parent.shape.hidden_size)
    scores = one_pass_scores(sweep, library, ALL, streams[layer], gradients, ESTIMATORS)
    for row, spec in enumerate(ALL):
        d = (sweep.forward(library.layer_weights(spec), streams[layer]) - streams[layer + 1]).double()  # [N, S, D]
        g = at_output.double()  # [N, S, K, D]
        along = torch.einsum("nskd,nsd->nks", g, d)
        expected = {
            "tok": along.pow(2).mean((1, 2)) / 2,
            "seq": along.sum(2).pow(2).mean(1) / (2 * LENGTH),
            "fisher": (g.pow(2).mean(2) * d.pow(2)).sum(2).mean(1) / 2,
        }
        for name, values in expected.items():
            torch.testing.assert_close(
                scores[name][row], values.float(), rtol=1e-3, atol=1e-5, msg=lambda text, s=spec: f"{s} {text}"
            )
            assert spec == sweep.parent.shape.parent_layer or values.mean() > 1e-3


def test_one_pass_scores_rank_candidates_as_exact_ones_do(tiny_sweep: Callable[..., Sweep]) -> None:
    """Spearman over all candidates of all layers; the prototypes found 0.97 on a trained parent."""
    sweep = tiny_sweep(num_key_value_heads=4, initializer_range=0.1)
    reference = run_reference(sweep, random_text())
    gradients = output_gradients(sweep, reference.streams[4], samples=16, seed=0)
    libraries = [fitted_library(sweep, reference.streams, layer) for layer in range(4)]
    one_pass = [
        one_pass_scores(sweep, libraries[layer], ALL, reference.streams[layer], gradients)["seq"].mean(1)
        for layer in reversed(range(4))
    ]
    exact = exact_scores(sweep, [(library, ALL) for library in libraries], range(4), reference)
    ranks = torch.stack((torch.cat(one_pass[::-1]), torch.cat([kl.mean(1) for kl in exact]))).argsort().argsort()
    assert float(torch.corrcoef(ranks.double())[0, 1]) > 0.8
