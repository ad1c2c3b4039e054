"""Scores around a child against finite differences and written-out second-order terms; the path, and steps around a child."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tables import row
from torch import Tensor

from blocks.candidates import FitConfig, fit_layer
from blocks.layer import DOWN_PROJ, Weights, layer_forward
from blocks.library import BlockLibrary, LayerLibrary
from blocks.shape import ModelShape
from blocks.spec import Architecture, LayerSpec
from blocks.sweep import StreamCheckpoints, Sweep
from nas.additive import Candidates
from nas.assemble import Assembler, Child
from nas.config import SearchConfig
from nas.costs import CostModel, Scenario
from nas.exact import kl_to_parent
from nas.limits import bounds_of
from nas.path import CHANGES, Rescoring, Step, around, changes_around, walk
from nas.progress import Reporter
from nas.scoring import one_pass_scores, output_gradients

VOCABULARY, LENGTH, LAYERS = 5, 4, 3
TOY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SPECS = [
    LayerSpec.parse(f"attention:{attention}+ffn:{ffn}")
    for attention in ("kv2", "kv1", "linear", "skip")
    for ffn in ("512", "256", "linear", "skip")
]
CHILD = Architecture.from_list(["attention:kv1+ffn:512", "attention:linear+ffn:256", "attention:skip+ffn:256"])
MANY = Rescoring(tokens=100, samples=2048, dtype=torch.float32, seed=0)


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small changes must survive the library."""
    monkeypatch.setattr("blocks.library.LIBRARY_DTYPE", torch.float32)


def some_text(vocabulary: int, sequences: int, length: int, seed: int) -> Tensor:
    return torch.randint(0, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(seed))


def assembler_of(
    sweep: Sweep, directory: Path, libraries: Sequence[LayerLibrary], verify: Tensor, refit: bool
) -> Assembler:
    library = BlockLibrary(directory)
    for index, entries in enumerate(libraries):
        library.save(index, entries)
    fit = some_text(sweep.parent.shape.vocab_size, 8, verify.shape[1], 3)
    return Assembler(sweep, library, fit, verify, 10.0 if refit else None, Reporter(quiet=True))


def fitted(sweep: Sweep, specs: Sequence[Sequence[LayerSpec]], text: Tensor) -> list[LayerLibrary]:
    streams = StreamCheckpoints(sweep, text)
    return [fit_layer(sweep, sweep.layer(n), streams[n], own, FitConfig()) for n, own in enumerate(specs)]


def free(shape: ModelShape, specs: Sequence[Sequence[LayerSpec]]) -> Candidates:
    """Without limits, all scores 0."""
    table = [[row(index, spec, 0.0) for spec in own] for index, own in enumerate(specs)]
    return Candidates(table, CostModel(shape, Scenario(1, 64)), ())


@pytest.fixture
def toy(tiny_sweep: Callable[..., Sweep], tmp_path: Path) -> Assembler:
    sweep = tiny_sweep(**TOY)
    libraries = fitted(sweep, [SPECS] * LAYERS, some_text(VOCABULARY, 16, LENGTH, 2))
    return assembler_of(sweep, tmp_path / "library", libraries, some_text(VOCABULARY, 3, LENGTH, 1), refit=True)


# Scores around a child


def kl_of_stream(assembler: Assembler, child: Child, layer: int, stream: Tensor) -> float:
    """True KL, nats per token, of a child whose layer leaves `stream`."""
    sweep = assembler.sweep.of(child.layers)
    for index in range(layer + 1, len(child.layers)):
        stream = sweep.forward(child.layers[index], stream)
    return float(kl_to_parent(assembler.sweep, assembler.parent_hidden, [sweep.hidden(stream)])[0].double().mean())


def moves(assembler: Assembler, child: Child, layer: int) -> tuple[Tensor, list[Tensor]]:
    """What a layer of the child leaves, and the change of it that each candidate stands for: from the one it has, as the
    library holds both."""
    sweep = assembler.sweep.of(child.layers)
    h = StreamCheckpoints(sweep, assembler.verify_tokens)[layer]
    library = assembler.candidates_of(layer)
    outputs = [sweep.forward(library.layer_weights(spec), h) for spec in (child.architecture[layer], *SPECS)]
    return sweep.forward(child.layers[layer], h), [output - outputs[0] for output in outputs[1:]]


def second_order(assembler: Assembler, child: Child, layer: int, output: Tensor, change: Tensor) -> float:
    """1/2 E[(g_t . d_t)^2] over labels of the child's own, by autograd's Jacobian of its logits; mean over all tokens."""
    sweep, total = assembler.sweep.of(child.layers), 0.0

    def logits(h: Tensor) -> Tensor:
        h = h[None]
        for index in range(layer + 1, len(child.layers)):
            h = layer_forward(child.layers[index], h, sweep.math(LENGTH))
        return (sweep.finish(h) @ sweep.head.T)[0]

    for own, d in zip(output, change, strict=True):
        jacobian = torch.autograd.functional.jacobian(logits, own)  # [S, V, S, D]: of each logit, by each token
        moved = torch.einsum("svtd,td->svt", jacobian, d)  # one token's change at a time
        p = torch.softmax(logits(own), dim=-1)[:, :, None]
        total += float((p * moved**2).sum() - (p * moved).sum(1).pow(2).sum()) / 2
    return total / output.shape[:2].numel()


def test_scores_around_a_refitted_child_are_derivatives_and_second_order_terms(toy: Assembler) -> None:
    """The first-order term is the numerical derivative of the true KL (central differences), the second is summed over all
    labels. What 2,048 drawn labels of 12 tokens leave of noise in the second is a few percent."""
    child = toy.assemble(CHILD)
    assert not any(torch.equal(child.layers[1][name], own) for name, own in toy.candidates_of(1).own(CHILD[1]).items())
    scores = changes_around(toy, free(toy.sweep.parent.shape, [SPECS] * LAYERS), child, MANY)
    seen = []
    for layer in range(LAYERS):
        output, changes = moves(toy, child, layer)
        for spec, change, score in zip(SPECS, changes, scores[layer], strict=True):
            if spec == CHILD[layer]:
                continue
            step = 0.02 / max(1.0, float(change.abs().max()))
            ahead, behind = (kl_of_stream(toy, child, layer, output + s * change) for s in (step, -step))
            first = (ahead - behind) / (2 * step)
            second = second_order(toy, child, layer, output, change)
            assert score == pytest.approx(first + second, abs=0.1 * second + 0.01 * abs(first) + 2e-4), str(spec)
            seen.append((first, second))
    assert sum(first < 0 for first, _ in seen) >= 5  # some changes heal; a term that is always positive cannot tell
    assert sum(abs(first) > second for first, second in seen) >= 5


def test_the_present_candidate_scores_exactly_zero(toy: Assembler) -> None:
    for refit in (True, False):
        child = toy.assemble(CHILD, refit=refit)
        candidates = free(toy.sweep.parent.shape, [SPECS] * LAYERS)
        scores = changes_around(toy, candidates, child, replace(MANY, samples=2))
        assert [own[c] for own, c in zip(scores, candidates.choice(CHILD), strict=True)] == [0.0] * LAYERS


def test_around_the_parent_they_are_the_one_pass_scores(toy: Assembler) -> None:
    """With the same labels: the gradient of the KL is zero there, so nothing else is left."""
    sweep, how = toy.sweep, replace(MANY, samples=8)
    parent = toy.assemble(sweep.parent.shape.parent_architecture)
    scores = changes_around(toy, free(sweep.parent.shape, [SPECS] * LAYERS), parent, how)
    streams = StreamCheckpoints(sweep, toy.verify_tokens)
    gradients = output_gradients(sweep, streams[LAYERS], how.samples, how.seed)
    for layer in reversed(range(LAYERS)):
        tok = one_pass_scores(sweep, toy.candidates_of(layer), SPECS, streams[layer], gradients, ("tok",))["tok"]
        expected = tok.mean(1)
        torch.testing.assert_close(torch.tensor(scores[layer]), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def moved_library(own: Weights, size: float) -> LayerLibrary:
    """Candidates under other names that are the parent's layer with down_proj moved by 0 and by +-`size` of itself."""
    library, generator = LayerLibrary(own), torch.Generator().manual_seed(0)
    noise = torch.randn(own[DOWN_PROJ].shape, generator=generator) * own[DOWN_PROJ].std()
    for name, times in (("kv1", 0.0), ("kv4", size), ("kv8", -size)):
        library.put(
            LayerSpec.parse(f"attention:{name}+ffn:512"), DOWN_PROJ, own[DOWN_PROJ] + 0.5 * noise + times * noise
        )
    return library


def test_small_changes_of_a_layer_change_the_true_kl_by_their_score(
    tiny_sweep: Callable[..., Sweep], tmp_path: Path
) -> None:
    """Whole candidates are put into the child and measured. Halving a change divides what the score misses by four."""
    sweep = tiny_sweep(**TOY)
    present, more, less = (LayerSpec.parse(f"attention:kv{heads}+ffn:512") for heads in (1, 4, 8))
    architecture = Architecture.uniform(LAYERS, present)
    missed: dict[float, list[float]] = {0.02: [], 0.01: []}
    for size, errors in missed.items():
        libraries = [moved_library(sweep.layer(index), size) for index in range(LAYERS)]
        assembler = assembler_of(
            sweep, tmp_path / str(size), libraries, some_text(VOCABULARY, 6, LENGTH, 1), refit=False
        )
        child = assembler.assemble(architecture)
        specs = [[present, more, less]] * LAYERS
        scores = changes_around(assembler, free(sweep.parent.shape, specs), child, replace(MANY, samples=256))
        now = float(assembler.true_kl(child).double().mean())
        for layer in range(LAYERS):
            for place, spec in enumerate((more, less), 1):
                changed = Architecture(tuple(spec if n == layer else present for n in range(LAYERS)))
                change = float(assembler.true_kl(assembler.assemble(changed)).double().mean()) - now
                assert scores[layer][place] == pytest.approx(change, rel=0.1, abs=2e-6)
                errors.append(abs(scores[layer][place] - change))
    assert sum(missed[0.01]) < 0.4 * sum(missed[0.02])


def test_only_part_of_the_text_is_used(toy: Assembler) -> None:
    """Whole sequences from the first on, one at least."""
    assert [replace(MANY, tokens=t).rows(toy) for t in (1, 4, 7, 8)] == [slice(0, n) for n in (1, 1, 1, 2)]
    child, candidates = toy.assemble(CHILD), free(toy.sweep.parent.shape, [SPECS] * LAYERS)
    first = replace(toy, verify_tokens=toy.verify_tokens[:2], _hidden=None)
    how = Rescoring(8, 16, torch.float32, 0)
    assert changes_around(toy, candidates, child, how) == changes_around(first, candidates, child, how)


# The path


DEEP = 10
HOW = Rescoring(tokens=64, samples=2, dtype=torch.float32, seed=0)
WORDS = [f"attention:{a}+ffn:{f}" for a in ("kv2", "kv1", "skip") for f in ("512", "256", "skip")]


@pytest.fixture(scope="module")
def deep(tiny_sweep: Callable[..., Sweep], tmp_path_factory: pytest.TempPathFactory) -> Assembler:
    sweep = tiny_sweep(num_hidden_layers=DEEP, hidden_size=32, intermediate_size=512, initializer_range=0.1)
    specs = [[LayerSpec.parse(word) for word in WORDS]] * DEEP
    libraries = fitted(sweep, specs, some_text(256, 12, 32, 2))
    return assembler_of(sweep, tmp_path_factory.mktemp("deep"), libraries, some_text(256, 4, 32, 1), refit=True)


@pytest.fixture(scope="module")
def scored(deep: Assembler) -> Candidates:
    """Scored around the parent, without limits."""
    candidates = free(deep.sweep.parent.shape, [[LayerSpec.parse(word) for word in WORDS]] * DEEP)
    scores = changes_around(deep, candidates, deep.assemble(deep.sweep.parent.shape.parent_architecture), HOW)
    table = [
        [replace(r, score=s) for r, s in zip(rows, own, strict=True)]
        for rows, own in zip(candidates.table, scores, strict=True)
    ]
    return replace(candidates, table=table)


def limited(candidates: Candidates, **limits: float | str) -> Candidates:
    return replace(candidates, bounds=tuple(bounds_of(SearchConfig(**limits).ranges, candidates.costs)))  # type: ignore[arg-type]


def rows(steps: Sequence[Step]) -> list[dict[str, object]]:
    return [asdict(step) for step in steps]


@pytest.fixture(scope="module")
def whole(deep: Assembler, scored: Candidates) -> list[Step]:
    """A path of four steps to half of the parent, never stopped."""
    return list(
        walk(deep, limited(scored, budget=0.5, max_params="10e3:"), 4, HOW, deep.sweep.parent.shape.parent_architecture)
    )


def test_every_step_meets_its_tightened_limits_and_the_last_the_limits(
    deep: Assembler, scored: Candidates, whole: list[Step]
) -> None:
    candidates, parent = limited(scored, budget=0.5, max_params="10e3:"), deep.sweep.parent.shape.parent_architecture
    assert [step.progress for step in whole] == [0.25, 0.5, 0.75, 1.0]
    sizes = [candidates.costs.cost(step.architecture).total_bytes for step in whole]
    share = [candidates.costs.budget_for_share(1 - 0.125 * n) for n in range(1, 5)]  # a straight line, by hand
    assert all(size <= most + 1 for size, most in zip(sizes, share, strict=True))
    assert all(size > 0.8 * most for size, most in zip(sizes, share, strict=True))  # no step goes much too far
    assert candidates.allows(whole[-1].architecture) and not any(candidates.allows(s.architecture) for s in whole[:3])
    assert all(candidates.tightened(s.progress, parent).allows(s.architecture) for s in whole)


def test_steps_tell_the_true_kl_of_their_children_and_what_was_foreseen(
    deep: Assembler, scored: Candidates, whole: list[Step]
) -> None:
    candidates = limited(scored, budget=0.5, max_params="10e3:")
    for before, step in zip([None, *whole], whole, strict=False):
        assert step.kl == float(deep.true_kl(deep.assemble(step.architecture), HOW.rows(deep)).mean())
        if before is None:  # away from the parent the table itself is used
            optimum = candidates.tightened(0.25, deep.sweep.parent.shape.parent_architecture).optimum()
            assert candidates.architecture(optimum.choice) == step.architecture
            assert step.predicted == pytest.approx(candidates.predicted(step.architecture))
            continue
        scores = changes_around(deep, candidates, deep.assemble(before.architecture), HOW)
        change = sum(own[c] for own, c in zip(scores, candidates.choice(step.architecture), strict=True))
        assert step.predicted == pytest.approx(before.kl + change, rel=1e-6)


@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_a_path_that_was_stopped_goes_on_as_if_never_stopped(
    deep: Assembler, scored: Candidates, whole: list[Step], done: int
) -> None:
    """Bit for bit."""
    candidates, parent = limited(scored, budget=0.5, max_params="10e3:"), deep.sweep.parent.shape.parent_architecture
    again = list(walk(replace(deep, _opened={}), candidates, 4, HOW, parent, whole[:done]))
    assert rows([*whole[:done], *again]) == rows(whole)


def test_a_path_may_start_at_any_child(deep: Assembler, scored: Candidates, whole: list[Step]) -> None:
    candidates, start = limited(scored, budget=0.4), whole[-1].architecture
    steps = list(walk(deep, candidates, 2, HOW, start))
    at_start = candidates.costs.cost(start).total_bytes
    half_way = (at_start + candidates.costs.budget_for_share(0.4)) / 2
    sizes = [candidates.costs.cost(step.architecture).total_bytes for step in steps]
    assert sizes[0] <= half_way + 1 and sizes[1] <= candidates.costs.budget_for_share(0.4)


def test_children_around_another_meet_the_limits_a_few_layers_away(
    deep: Assembler, scored: Candidates, whole: list[Step]
) -> None:
    candidates, present = limited(scored, budget=0.5, max_params="10e3:"), whole[-1].architecture
    # Not the path's own last child, around which little is left to gain, but one with its layers the other way round.
    present = next(a for a in (Architecture(present.layers[::-1]), present) if candidates.allows(a))
    found = around(deep, candidates, present, HOW)
    assert 1 <= len(found) <= len(CHANGES)
    scores = changes_around(deep, candidates, deep.assemble(present), HOW)
    for architecture, gain in found:
        changed = [n for n in range(DEEP) if architecture[n] != present[n]]
        assert candidates.allows(architecture) and 1 <= len(changed) <= 8
        choice = candidates.choice(architecture)
        assert gain == pytest.approx(sum(scores[n][choice[n]] for n in changed), rel=1e-6) and gain < 0
    assert [gain for _, gain in found] == sorted(gain for _, gain in found)
