"""Where weights and streams lie, and how many streams are kept, changes nothing: equal to the bit on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kinds import ALL, exact_scores, random_text
from torch import Tensor

from blocks.activations import Activations
from blocks.candidates import FitConfig, fit_layer
from blocks.library import LayerLibrary
from blocks.sweep import StreamCheckpoints, Sweep
from nas.config import ESTIMATORS
from nas.exact import run_reference
from nas.scoring import one_pass_scores, output_gradients

CPU = torch.device("cpu")
LAYERS = 7  # so that neither 2 nor 3 divides it


@pytest.fixture
def deep(tiny_sweep: Callable[..., Sweep]) -> Sweep:
    return tiny_sweep(num_hidden_layers=LAYERS, intermediate_size=256)


# Checkpoints of the streams


@pytest.fixture
def streams(deep: Sweep) -> list[Tensor]:
    """The streams entering each layer and leaving the last, all kept."""
    kept = StreamCheckpoints(deep, random_text())
    return [kept[index] for index in range(LAYERS + 1)]


def test_every_stream_is_that_of_the_layer_before(deep: Sweep, streams: list[Tensor]) -> None:
    assert torch.equal(streams[0], deep.embed(random_text()))
    for index in range(LAYERS):
        assert torch.equal(streams[index + 1], deep.forward(deep.layer(index), streams[index]))


@pytest.mark.parametrize("every", [1, 2, 3, LAYERS, 100])
@pytest.mark.parametrize("resident", [True, False])
def test_streams_that_are_run_again_equal_those_kept(
    deep: Sweep, streams: list[Tensor], every: int, resident: bool
) -> None:
    sweep = deep if resident else Sweep(deep.parent, CPU, tokens_per_batch=128, resident=False)
    looked_at, taken = (StreamCheckpoints(sweep, random_text(), every) for _ in range(2))
    for index in reversed(range(LAYERS + 1)):
        assert torch.equal(looked_at[index], streams[index])
        assert torch.equal(taken.take(index), streams[index])
    for index in range(LAYERS + 1):  # still there, in any order
        assert torch.equal(looked_at[index], streams[index])


@pytest.mark.parametrize("every", [2, 3])
def test_few_streams_are_held_at_any_time(deep: Sweep, every: int) -> None:
    looked_at, taken = (StreamCheckpoints(deep, random_text(), every) for _ in range(2))
    most = -(-(LAYERS + 1) // every) + every
    for index in reversed(range(LAYERS + 1)):
        looked_at[index]
        taken.take(index)
        assert len(looked_at._streams) <= most
        assert len(taken._streams) <= most and max(taken._streams, default=-1) < index


def test_layers_behind_the_last_one_wanted_are_not_run(deep: Sweep, streams: list[Tensor]) -> None:
    told: list[int] = []
    some = StreamCheckpoints(deep, random_text(), every=2, upto=5, on_layer=told.append)
    assert told == [0, 1, 2, 3, 4]
    for index in reversed(range(6)):
        assert torch.equal(some.take(index), streams[index])
    assert torch.equal(StreamCheckpoints(deep, random_text(), upto=0)[0], streams[0])


def test_streams_are_kept_in_the_precision_asked_for(deep: Sweep, streams: list[Tensor]) -> None:
    """And run again from what was kept: rounded streams come back equal, too."""
    kept, again = (StreamCheckpoints(deep, random_text(), every, torch.bfloat16) for every in (1, 3))
    for index in reversed(range(LAYERS + 1)):
        assert kept[index].dtype == torch.bfloat16
        assert torch.equal(again.take(index), kept[index])
        assert (kept[index] - streams[index]).norm() < 0.02 * streams[index].norm()


# Places of weights and streams


@dataclass
class Everything:
    """What a fit, the one-pass scores and the exact scores of all layers give."""

    hidden: Tensor
    libraries: list[dict[str, Tensor]]
    one_pass: list[dict[str, Tensor]]
    gradients: Tensor
    exact: list[Tensor]


def everything(sweep: Sweep, every: int = 1) -> Everything:
    """As `nas score` does it: one backward sweep."""
    layers = sweep.parent.shape.layers
    reference = run_reference(sweep, random_text(), every)
    fitting, scoring = (StreamCheckpoints(sweep, random_text(), every) for _ in range(2))
    gradients = output_gradients(sweep, scoring.take(len(layers)), 2, seed=0)
    libraries, one_pass = [], []
    for index, weights in sweep.layers(reversed(layers)):
        library = fit_layer(sweep, weights, fitting.take(index), ALL, FitConfig())
        one_pass.append(one_pass_scores(sweep, library, ALL, scoring.take(index), gradients, ESTIMATORS))
        libraries.append(library)
    exact = exact_scores(sweep, [(library, ALL) for library in libraries[::-1]], layers, reference)
    return Everything(reference.hidden, [library.entries for library in libraries], one_pass, gradients, exact)


@pytest.fixture(scope="module")
def resident(tiny_sweep: Callable[..., Sweep]) -> Sweep:
    return tiny_sweep(num_key_value_heads=4, attention_bias=True)


@pytest.fixture(scope="module")
def expected(resident: Sweep) -> Everything:
    return everything(resident)


def assert_equal(found: Everything, expected: Everything) -> None:
    assert torch.equal(found.hidden, expected.hidden)
    assert torch.equal(found.gradients, expected.gradients)
    for name in ("libraries", "one_pass"):
        for own, other in zip(getattr(found, name), getattr(expected, name), strict=True):
            assert own.keys() == other.keys()
            assert all(torch.equal(own[key], other[key]) for key in own), name
    assert all(torch.equal(own, other) for own, other in zip(found.exact, expected.exact, strict=True))


@pytest.mark.parametrize(
    ("weights", "place", "every"),
    [
        ("streamed", "device", 1),
        ("resident", "host", 1),
        ("resident", "disk", 1),
        ("streamed", "host", 3),
        ("streamed", "disk", 2),
    ],
)
def test_places_change_no_result(
    resident: Sweep, expected: Everything, tmp_path: Path, weights: str, place: str, every: int
) -> None:
    store = Activations(CPU, place, tmp_path)
    sweep = Sweep(resident.parent, CPU, tokens_per_batch=128, resident=weights == "resident", activations=store)
    assert_equal(everything(sweep, every), expected)
    assert not list(tmp_path.iterdir())  # files vanish with the tensors, or before


def test_activations_on_disk_are_read_and_written_as_others(tmp_path: Path) -> None:
    values = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    for place in ("device", "host", "disk"):
        store = Activations(CPU, place, tmp_path)
        kept = store.empty(5, 3, 2, dtype=torch.bfloat16)
        for start in (0, 2, 4):
            store.write(kept, slice(start, start + 2), values[start : start + 2])
        assert torch.equal(kept, values.bfloat16())
        batches = [slice(0, 3), slice(3, 6)]
        for batch, (one, other) in store.read(batches, kept, values):
            assert torch.equal(one, kept[batch])
            assert torch.equal(other, values[batch])


def test_streamed_layers_come_in_the_order_asked_for_and_are_not_kept(resident: Sweep) -> None:
    streamed = Sweep(resident.parent, CPU, resident=False)
    order = [3, 0, 2, 2]
    found = list(streamed.layers(order))
    assert [index for index, _ in found] == order
    for index, weights in found:
        own = resident.layer(index)
        assert weights.keys() == own.keys()
        assert all(torch.equal(weights[name], own[name]) for name in own)
    assert not streamed._kept
    assert list(streamed.layers([])) == []
    for _, _ in streamed.layers([0, 1, 2]):  # what was read ahead is dropped
        break


def test_bytes_read_are_counted(resident: Sweep) -> None:
    layer = sum(tensor.numel() * tensor.element_size() for tensor in resident.layer(0).values())
    streamed, kept = (Sweep(resident.parent, CPU, resident=stay) for stay in (False, True))
    for sweep, times in ((streamed, 6), (kept, 3)):
        for dtype in (torch.float32, torch.bfloat16):
            list(sweep.at(dtype).layers([0, 1, 2]))
        assert sweep.bytes_read == times * layer


def test_another_precision_shares_the_tensors(resident: Sweep) -> None:
    half = resident.at(torch.bfloat16, tokens_per_batch=64)
    assert (half.tokens_per_batch, half.at(torch.float32).tokens_per_batch) == (64, 64)
    assert all(tensor.dtype == torch.bfloat16 for tensor in half.layer(0).values())
    own = resident.layer(0)
    assert all(half.at(torch.float32).layer(0)[name] is own[name] for name in own)


def test_bf16_is_near_fp32(resident: Sweep, expected: Everything) -> None:
    """Scores of the same candidates with the same labels; the labels themselves may be drawn otherwise in bf16."""
    half, streams, index = resident.at(torch.bfloat16), StreamCheckpoints(resident, random_text()), 3
    library = LayerLibrary(half.layer(index), expected.libraries[0])
    gradients = output_gradients(resident, streams[4], 2, seed=0).bfloat16()
    scores = one_pass_scores(half, library, ALL, streams[index].bfloat16(), gradients, ESTIMATORS)
    for name, values in expected.one_pass[0].items():
        assert scores[name].dtype == torch.float32
        torch.testing.assert_close(scores[name].mean(1), values.mean(1), rtol=0.1, atol=0.01 * float(values.mean()))
