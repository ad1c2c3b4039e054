"""GPTQ: by hand, against a plain reference of the paper's algorithm in fp64, and against rounding to nearest."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import blocks.gptq
from blocks.errors import ConfigError, NasError
from blocks.fit import Statistics
from blocks.formats import FORMATS, Format, Integer, NvFloat4
from blocks.gptq import gptq_codes, gptq_weights, output_error

ALL = [*FORMATS.values(), Integer("int3", 3, group=64)]
ids = [format.name for format in ALL]
ROWS, COLUMNS = 24, 256


def gptq(*arguments: Any, **options: Any) -> Tensor:
    """What the codes stand for."""
    return gptq_codes(*arguments, **options).weight


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int = COLUMNS, tokens: int = 4000, seed: int = 1) -> Tensor:
    """Inputs [tokens, columns] with falling principal components and channels of different sizes."""
    basis = torch.linalg.qr(random(columns, columns, seed=seed)).Q
    spectrum = torch.arange(1, columns + 1) ** -0.7
    return random(tokens, columns, seed=seed + 1) * spectrum @ basis.T * torch.exp(random(columns, seed=seed + 2))


def gram_of(inputs: Tensor) -> Tensor:
    statistics = Statistics(inputs.shape[1], 1, "cpu")
    statistics.add(inputs, inputs[:, :1])
    return statistics.reduce().gram


def error(weight: Tensor, quantized: Tensor, inputs: Tensor) -> float:
    return float((inputs.double() @ (weight - quantized).double().T).square().sum())


def reference(weight: Tensor, gram: Tensor, step: Tensor, limits: tuple[int, int]) -> Tensor:
    """Algorithm 1 as Optimal Brain Surgeon states it, on columns of falling inputs: after each, the inverse Gram of those left,
    computed anew."""
    order = gram.diagonal().argsort(descending=True)
    weight, gram = weight[:, order], gram[order[:, None], order]
    w, gram, out = weight.double().clone(), gram.double(), torch.zeros_like(weight, dtype=torch.float64)
    for column in range(w.shape[1]):
        inverse = torch.linalg.inv(gram[column:, column:])
        codes = (w[:, column].float() / step.float()).round()  # fp32: the largest weight of a row is at a tie
        out[:, column] = codes.clamp(*limits) * step
        w[:, column:] -= ((w[:, column] - out[:, column]) / inverse[0, 0])[:, None] * inverse[0]
    return out[:, order.argsort()]


def test_two_columns_by_hand() -> None:
    # One row, step 1 (the largest code is 7.5, set by the first group member). w = (7.5, 0.4): the first is cut to 7, an
    # error of 0.5. With H = [[2, 1], [1, 2]], H^-1 = [[2, -1], [-1, 2]] / 3, so w2 += 0.5 * 1/2: 0.65, rounded to 1, not 0.
    format = Integer("int4-g2", 4, group=None, scale_dtype=torch.float32)
    weight, gram = torch.tensor([[7.5, 0.4]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    assert format.fake(weight).tolist() == [[7, 0]]
    assert gptq(weight, gram, format, damping=0).tolist() == [[7, 1]]
    # (w - q) H (w - q)' = 2 a^2 + 2 a b + 2 b^2: 0.5, 0.4 gives 1.22; 0.5, -0.6 gives 0.62.
    found = output_error(torch.tensor([[0.5, 0.4], [0.5, -0.6]]), gram)
    torch.testing.assert_close(found, torch.tensor([1.22, 0.62], dtype=torch.float64))


def test_a_column_that_outweighs_goes_first() -> None:
    format = Integer("int4", 4, scale_dtype=torch.float32)
    weight = torch.tensor([[0.4, 7.5]])
    gram = torch.tensor([[2.0, 3.0], [3.0, 8.0]])  # from the last: w1 += 0.5 * 3/2 = 1.15
    assert gptq(weight, gram, format, damping=0).tolist() == [[1, 7]]
    assert format.fake(weight).tolist() == [[0, 7]]


@pytest.mark.parametrize("block", [1, 7, 16, 128])
def test_it_is_the_algorithm_of_the_paper_on_columns_of_falling_inputs(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks.gptq, "BLOCK", block)
    weight, gram = random(8, 40), gram_of(correlated(40))
    format = Integer("int8", 5, scale_dtype=torch.float32)
    step = format.scales(weight).steps[:, 0].double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(40)
    wanted = reference(weight, damped, step, (-16, 15))
    nearest = output_error(format.fake(weight) - weight, gram)
    assert bool((output_error(wanted.float() - weight, gram) < nearest).all())  # so that no row falls back
    torch.testing.assert_close(gptq(weight, gram, format).double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("format", ALL, ids=ids)
def test_with_independent_inputs_it_rounds_to_nearest(format: Format) -> None:
    weight = random(ROWS, COLUMNS)
    gram = torch.diag(random(COLUMNS, seed=5).exp())
    gram[3, 3] = 0
    assert torch.equal(gptq(weight, gram, format), format.fake(weight))


@pytest.mark.parametrize("format", ALL, ids=ids)
def test_it_is_better_than_rounding_to_nearest(format: Format) -> None:
    weight, inputs, held_out = random(ROWS, COLUMNS), correlated(), correlated(tokens=1000)
    gram = gram_of(inputs)
    found, nearest = gptq(weight, gram, format), format.fake(weight)
    by_row = output_error(found - weight, gram) <= output_error(nearest - weight, gram)
    assert bool(by_row.all())
    assert error(weight, found, inputs) < 0.8 * error(weight, nearest, inputs)
    assert error(weight, found, held_out) < 0.8 * error(weight, nearest, held_out)
    torch.testing.assert_close(
        output_error(found - weight, gram).sum().item(), error(weight, found, inputs), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("format", ALL, ids=ids)
def test_what_comes_out_is_what_a_file_can_hold(format: Format) -> None:
    weight = random(ROWS, COLUMNS)
    done = gptq_codes(weight, gram_of(correlated()), format)
    assert torch.equal(format.round(done.codes.float()), done.codes)
    assert done.scales.values.shape == format.scales(weight).values.shape
    stored = torch.float8_e4m3fn if isinstance(format, NvFloat4) else torch.bfloat16
    assert torch.equal(done.scales.values.to(stored).float(), done.scales.values)
    assert torch.equal(format.quantize(done.weight, done.scales).float(), done.codes.float())


def test_blocks_change_nothing_but_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = random(ROWS, COLUMNS), gram_of(correlated())
    for format in FORMATS["int4-g32"], FORMATS["nvfp4"]:
        found = []
        for block in (COLUMNS, 40):
            monkeypatch.setattr(blocks.gptq, "BLOCK", block)
            found.append(gptq(weight, gram, format))
        assert (found[0] != found[1]).float().mean() < 0.01


def test_no_row_is_worse_than_rounding_to_nearest() -> None:
    """Greedy rounding loses now and then in a space this small: brute force says that the fallback is needed, and used."""
    format = Integer("int2", 2, scale_dtype=torch.float32)
    weight, inputs = random(400, 4), random(50, 4, seed=3) @ random(4, 4, seed=4)
    gram = gram_of(inputs)
    step = format.scales(weight).steps[:, 0].double()
    greedy = output_error(reference(weight, gram, step, (-2, 1)).float() - weight, gram)
    nearest = output_error(format.fake(weight) - weight, gram)
    assert int((greedy > nearest * 1.001).sum()) > 3
    found = output_error(gptq(weight, gram, format, damping=0) - weight, gram)
    assert bool((found <= nearest).all()) and bool((found <= greedy * 1.001).all())
    choices = torch.tensor(list(itertools.product(range(-2, 2), repeat=4)), dtype=torch.float32)
    best = torch.stack([output_error(choices * s - w, gram).amin() for w, s in zip(weight, step.float(), strict=True)])
    assert bool((found >= best * 0.999).all()) and found.sum() < 2 * best.sum() < 2 * nearest.sum()


def test_matrices_with_the_same_inputs_can_be_stacked() -> None:
    q, k, gram = random(6, COLUMNS), random(4, COLUMNS, seed=8) * 5, gram_of(correlated())
    format = FORMATS["nvfp4"]
    together = gptq(torch.cat([q, k]), gram, format)
    shared = format.divisor(q, k)
    apart = torch.cat([gptq(each, gram, format, divisor=shared) for each in (q, k)])
    assert (together != apart).float().mean() < 0.01  # sums of other shapes may tip a tie
    assert output_error(together - apart, gram).sum() < 0.02 * output_error(together - torch.cat([q, k]), gram).sum()


@pytest.mark.parametrize("format", ALL[1:], ids=ids[1:])  # all that round bf16
def test_masters_keep_their_scales_and_are_rounded_to_something_better(format: Format) -> None:
    weight, inputs, held_out = random(ROWS, COLUMNS).bfloat16().float(), correlated(), correlated(tokens=1000)
    gram = gram_of(inputs)
    master, nearest = gptq_weights(weight, gram, format, stored=torch.bfloat16), format.nearest(weight)
    assert torch.equal(master, master.bfloat16().float())
    scales = format.scales(master)
    assert torch.equal(scales.values, nearest.scales.values)
    assert scales.divisor is None or torch.equal(scales.divisor, nearest.scales.divisor)
    found, least = format.fake(master), error(weight, gptq(weight, gram, format), inputs)
    assert bool((output_error(found - weight, gram) <= output_error(nearest.weight - weight, gram)).all())
    for text in (inputs, held_out):
        assert error(weight, found, text) < 0.8 * error(weight, nearest.weight, text)
    assert error(weight, found, inputs) < 1.15 * least
    off = (master - found).abs() / format.nearest(master).scales.steps.repeat_interleave(format.group or COLUMNS, 1)
    assert off.median() > 0.05  # between codes, where a little training can move them


def test_masters_stay_what_they_are_where_nothing_is_won() -> None:
    weight, format = random(ROWS, COLUMNS), FORMATS["int4-g32"]
    independent = torch.diag(random(COLUMNS, seed=5).exp())
    assert torch.equal(gptq_weights(weight, independent, format), weight)
    weight[2, 32:64] = 0
    found = gptq_weights(weight, gram_of(correlated()), format)
    assert bool((found[2, 32:64] == 0).all())
    q, k, nvfp4 = random(6, COLUMNS), random(4, COLUMNS, seed=8) * 5, FORMATS["nvfp4"]
    shared, gram = nvfp4.divisor(q, k), gram_of(correlated())
    together = gptq_weights(torch.cat([q, k]), gram, nvfp4)
    apart = torch.cat([gptq_weights(each, gram, nvfp4, divisor=shared) for each in (q, k)])
    assert (nvfp4.fake(together) != nvfp4.fake(apart, shared)).float().mean() < 0.01


def test_it_stands_grams_of_few_tokens_and_dead_inputs() -> None:
    weight, inputs = random(ROWS, COLUMNS), correlated(tokens=30)
    inputs[:, 10:20] = 0
    found = gptq(weight, gram_of(inputs).float(), FORMATS["int4-g32"])
    assert bool(found.isfinite().all())
    assert error(weight, found, inputs) < 0.5 * error(weight, FORMATS["int4-g32"].fake(weight), inputs)
    assert torch.equal(gptq(weight, torch.zeros(COLUMNS, COLUMNS), FORMATS["int4"]), FORMATS["int4"].fake(weight))


def test_wrong_arguments_are_told_in_one_line() -> None:
    weight = random(4, COLUMNS)
    with pytest.raises(ConfigError, match=r"a Gram of \[64, 64\] for 256 inputs"):
        gptq_weights(weight, torch.eye(64), FORMATS["int4"])
    with pytest.raises(ConfigError, match=r"a Gram of \[64, 64\] for 256 inputs"):
        gptq(weight, torch.eye(64), FORMATS["fp8"])
    with pytest.raises(ConfigError, match=r"int4: .*not a multiple"):
        gptq(random(4, 64), torch.eye(64), FORMATS["int4"])
    with pytest.raises(NasError, match="not finite"):
        gptq(weight, torch.full((COLUMNS, COLUMNS), torch.inf), FORMATS["fp8"])
    with pytest.raises(NasError, match="not positive"):
        gptq(weight, torch.eye(COLUMNS) - 0.5, FORMATS["int8"])
