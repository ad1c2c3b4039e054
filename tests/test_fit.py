"""Closed-form fits: equal to dense least squares, never worse than the cut, and a good channel order."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blocks.fit import GROWTH, Statistics, contribution, greedy_order, invert_factor_


@dataclass
class Regression:
    """A random least squares problem with correlated channels of different sizes, and a prior."""

    inputs: Tensor
    targets: Tensor
    prior: Tensor

    def statistics(self, batch: int = 7) -> Statistics:
        statistics = Statistics(self.inputs.shape[1], self.targets.shape[1], "cpu")
        for start in range(0, len(self.inputs), batch):
            rows = slice(start, start + batch)
            statistics.add(self.inputs[rows], self.targets[rows])
        return statistics.reduce()

    def error(self, matrix: Tensor, channels: Tensor | None = None) -> float:
        """Squared error of a matrix on (the given channels of) the problem."""
        inputs = self.inputs if channels is None else self.inputs[:, channels]
        return float((inputs.double() @ matrix.double() - self.targets.double()).pow(2).sum())

    def dense(self, channels: Tensor, ridge: float) -> Tensor:
        """The least squares solution of the system augmented by the ridge, in fp64."""
        a = torch.cat((self.inputs[:, channels], ridge**0.5 * torch.eye(len(channels)))).double()
        y = torch.cat((self.targets, ridge**0.5 * self.prior[channels])).double()
        return torch.linalg.lstsq(a, y).solution.float()


def regression(seed: int, tokens: int = 60, channels: int = 12, outputs: int = 5) -> Regression:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    inputs = normal(tokens, channels) @ (torch.eye(channels) + 0.5 * normal(channels, channels))
    inputs = inputs * normal(channels).exp()
    prior = normal(channels, outputs)
    targets = inputs @ (prior + 0.5 * normal(channels, outputs)) + normal(tokens, outputs)
    return Regression(inputs, targets, prior)


def assert_same_outputs(problem: Regression, one: Tensor, other: Tensor, channels: Tensor | None = None) -> None:
    """Equal up to what a Gram in fp32 leaves, compared where conditioning does not matter: in what comes out."""
    inputs = problem.inputs if channels is None else problem.inputs[:, channels]
    assert (inputs @ (one - other)).norm() < 2e-5 * (inputs @ other).norm()


def all_channels(problem: Regression) -> Tensor:
    return torch.arange(problem.inputs.shape[1])


@pytest.mark.parametrize("pseudo_tokens", [0.01, 1.0, 100.0])
def test_ridge_equals_dense_least_squares_of_the_augmented_system(pseudo_tokens: float) -> None:
    problem = regression(0)
    statistics = problem.statistics()
    fitted = statistics.solve(problem.prior, pseudo_tokens)
    dense = problem.dense(all_channels(problem), statistics.ridge(pseudo_tokens))
    assert_same_outputs(problem, fitted, dense)


@pytest.mark.parametrize("channels", [1, 11, 12])
def test_ridge_is_so_many_tokens_of_median_channel_energy(channels: int) -> None:
    problem = regression(1, channels=channels)
    energies = sorted(problem.inputs.double().pow(2).mean(0).tolist())
    median = energies[(channels - 1) // 2]  # the lower one of two
    for pseudo_tokens in (0.5, 100.0):
        assert problem.statistics().ridge(pseudo_tokens) == pytest.approx(pseudo_tokens * median, rel=1e-5)


def test_one_huge_channel_does_not_change_the_ridge() -> None:
    """As a channel that carries the first token's huge activation: the mean energy grows 10,000-fold, the median not."""
    problem = regression(1)
    before = problem.statistics()
    loudest = int(problem.inputs.pow(2).mean(0).argmax())
    problem.inputs[0, loudest] = 1e3 * problem.inputs.abs().max()
    after = problem.statistics()
    assert after.gram.trace() > 1e4 * before.gram.trace()
    assert after.ridge(100.0) == before.ridge(100.0)


def test_ridge_is_at_least_a_millionth_of_the_mean_channel_energy() -> None:
    """Where most channels never fire the median is zero, and where nothing fires the ridge still is not."""
    problem = regression(1)
    problem.inputs[:, 2:] = 0.0
    energy = float(problem.inputs.pow(2).mean())
    assert problem.statistics().ridge(100.0) == pytest.approx(1e-6 * energy, rel=1e-5)
    assert Statistics(12, 5, "cpu").ridge(100.0) > 0.0


def test_a_strong_prior_wins_and_no_prior_leaves_least_squares() -> None:
    problem = regression(2)
    statistics = problem.statistics()
    torch.testing.assert_close(statistics.solve(problem.prior, 1e9), problem.prior, rtol=0, atol=1e-4)
    unregularised = problem.dense(all_channels(problem), 0.0)
    assert_same_outputs(problem, statistics.solve(problem.prior, 0.0), unregularised)


def test_statistics_do_not_depend_on_the_batches() -> None:
    problem = regression(3)
    whole, parts = problem.statistics(batch=60), problem.statistics(batch=1)
    torch.testing.assert_close(parts.gram, whole.gram, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(parts.cross, whole.cross, rtol=1e-5, atol=1e-3)
    assert parts.tokens == whole.tokens == 60


def test_a_gram_summed_in_bands_is_the_whole_gram(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many channels are summed: the upper triangle only, here in six bands of two channels."""
    problem = regression(3)
    whole = problem.statistics()
    monkeypatch.setattr("blocks.fit.FEW_CHANNELS", 11)
    banded = problem.statistics()
    torch.testing.assert_close(banded.gram, whole.gram, rtol=1e-6, atol=1e-4)
    assert torch.equal(banded.gram, banded.gram.T)
    assert torch.equal(banded.cross, whole.cross)


def test_sets_of_targets_and_strengths_share_a_gram_and_nothing_else() -> None:
    problem, other = regression(3), regression(4)
    together = Statistics(12, 5, "cpu", targets=2)
    together.add(problem.inputs, problem.targets, other.targets)
    together.reduce()
    for target, targets in enumerate((problem.targets, other.targets)):
        alone = Statistics(12, 5, "cpu")
        alone.add(problem.inputs, targets)
        alone.reduce()
        for pseudo_tokens in (1.0, 100.0, 1.0):  # whatever factor was kept of the last solve
            expected = alone.solve(problem.prior, pseudo_tokens)
            assert torch.equal(together.solve(problem.prior, pseudo_tokens, target), expected)


@pytest.mark.parametrize("seed", range(5))
def test_prefix_solves_equal_separate_solves(seed: int) -> None:
    problem = regression(seed)
    statistics, widths = problem.statistics(), [2, 5, 9, 12]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    by_width = dict(statistics.solve_prefixes(problem.prior, order, widths, 3.0))
    together = [by_width[width] for width in widths]
    for width, matrix in zip(widths, together, strict=True):
        dense = problem.dense(order[:width], statistics.ridge(3.0))
        assert_same_outputs(problem, matrix, dense, order[:width])


@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 60),
    channels=st.integers(1, 20),
    pseudo_tokens=st.sampled_from([1e-3, 1.0, 100.0]),
    data=st.data(),
)
def test_fitted_is_never_worse_than_cut_on_the_fitting_text(
    seed: int, tokens: int, channels: int, pseudo_tokens: float, data: st.DataObject
) -> None:
    problem = regression(seed, tokens, channels)
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
    width = data.draw(st.integers(1, channels), label="width")
    ((_, fitted),) = problem.statistics().solve_prefixes(problem.prior, order, [width], pseudo_tokens)
    kept = order[:width]
    rounding = 1e-5 * problem.error(torch.zeros_like(problem.prior))  # the Gram is kept in fp32
    assert problem.error(fitted, kept) <= problem.error(problem.prior[kept], kept) + rounding


def test_a_gram_that_rounding_made_indefinite_is_still_solved() -> None:
    """Channels that fire hugely and together on the first token only: fp32 leaves a negative eigenvalue."""
    direction = torch.rand(40, generator=torch.Generator().manual_seed(0))
    statistics = Statistics(40, 3, "cpu")
    statistics.gram = 1e12 * direction[:, None] * direction
    statistics.gram.fill_diagonal_(0.0).add_(torch.diag(1e12 * direction.pow(2) * (1 - 3e-7)))
    statistics.tokens = 10**9
    assert torch.linalg.eigvalsh(statistics.gram.double()).min() < -statistics.ridge(100.0)
    prior = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    statistics.crosses = [statistics.gram @ prior]
    fitted = statistics.solve(prior, 100.0)
    # the targets are the prior's own outputs: they must come out to the precision that fp32 statistics can say
    torch.testing.assert_close(direction @ fitted, direction @ prior, rtol=0, atol=1e-3)


def test_contribution_is_rms_activation_times_output_norm() -> None:
    problem = regression(4)
    expected = problem.inputs.norm(dim=0) * problem.prior.norm(dim=1)
    torch.testing.assert_close(contribution(problem.statistics().gram, problem.prior), expected)


@given(seed=st.integers(0, 10_000), channels=st.integers(1, 50), steps=st.integers(1, 60), data=st.data())
def test_greedy_order_is_a_permutation(seed: int, channels: int, steps: int, data: st.DataObject) -> None:
    statistics = regression(seed, tokens=30, channels=channels).statistics()
    first = data.draw(st.integers(0, channels), label="first")
    order = greedy_order(statistics.gram, statistics.cross, first, steps)
    assert sorted(order.tolist()) == list(range(channels))


def orthogonal_least_squares(problem: Regression, count: int) -> list[int]:
    """Textbook greedy selection: at each step the channel whose addition leaves the least squared error."""
    chosen: list[int] = []
    for _ in range(count):
        left = [i for i in range(problem.inputs.shape[1]) if i not in chosen]
        errors = [
            problem.error(problem.dense(torch.tensor([*chosen, i]), 0.0), torch.tensor([*chosen, i])) for i in left
        ]
        chosen.append(left[errors.index(min(errors))])
    return chosen


@pytest.mark.parametrize("size", [1, 2, 7, 40, 65])
def test_the_inverse_factor_is_found_by_halves_in_place(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("blocks.fit.FEW_CHANNELS", 4)
    a = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    matrix = a.T @ a
    expected = torch.linalg.inv(torch.linalg.cholesky(matrix))
    found = matrix.clone()
    assert not invert_factor_(found)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert invert_factor_(matrix - 2 * matrix.diagonal().max() * torch.eye(size))


@pytest.mark.parametrize("seed", range(5))
def test_greedy_order_one_by_one_is_textbook_orthogonal_least_squares(seed: int) -> None:
    problem = regression(seed, tokens=80, channels=10)
    statistics = problem.statistics()
    order = greedy_order(statistics.gram, statistics.cross, 8, steps=10, growth=8)
    assert order[:8].tolist() == orthogonal_least_squares(problem, 8)


@pytest.mark.parametrize(("growth", "bound"), [(48, 0.7), (GROWTH, 0.85)], ids=["one by one", "default"])
def test_greedy_order_explains_more_than_contribution_order(growth: int, bound: float) -> None:
    """Correlated channels with a falling spectrum, error after fitting half of the 48, mean of 20 problems."""
    greedy, by_contribution = 0.0, 0.0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        latent = torch.randn(300, 48, generator=generator) * torch.logspace(0, -1.5, 48)
        inputs = latent @ torch.randn(48, 48, generator=generator)
        prior = torch.randn(48, 24, generator=generator)
        problem = Regression(inputs, inputs @ prior, prior)
        statistics = problem.statistics(batch=300)
        total = problem.error(torch.zeros_like(prior))
        orders = (
            greedy_order(statistics.gram, statistics.cross, 24, growth=growth),
            contribution(statistics.gram, prior).argsort(descending=True),
        )
        fits = [next(statistics.solve_prefixes(prior, order, [24], 1.0))[1] for order in orders]
        errors = [problem.error(fit, order[:24]) / total for fit, order in zip(fits, orders, strict=True)]
        greedy, by_contribution = greedy + errors[0] / 20, by_contribution + errors[1] / 20
    assert greedy < bound * by_contribution


@pytest.mark.parametrize("tokens", [64, 200, 600])
@pytest.mark.parametrize("spread", [0.0, 2.5, 4.0])
def test_greedy_order_survives_few_tokens_copies_and_huge_channels(tokens: int, spread: float) -> None:
    """Rank-deficient Grams whose channels differ by orders of magnitude, as trained FFNs have them."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(tokens, 256, generator=generator)
        inputs *= (spread * torch.randn(256, generator=generator)).exp()
        inputs[:, :20] = 3 * inputs[:, 20:40]
        targets = torch.randn(tokens, 32, generator=generator)
        order = greedy_order(inputs.T @ inputs, inputs.T @ targets, 200)
        assert sorted(order.tolist()) == list(range(256))
