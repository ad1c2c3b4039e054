"""Candidates of a layer: right tensors, fitted never worse than cut, kept and read back unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from blocks.candidates import FitConfig, _LayerBuilder, fit_layer
from blocks.checkpoint import expected_tensors
from blocks.errors import CheckpointError
from blocks.layer import Weights, layer_forward
from blocks.library import BlockLibrary, LayerLibrary
from blocks.parent import open_parent
from blocks.spec import Architecture, LayerSpec
from blocks.sweep import Sweep

LENGTH = 32
PARENTS = {
    "gqa": {"num_key_value_heads": 2},
    "mha": {"num_key_value_heads": 4},
    "biases": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "own head_dim": {"num_key_value_heads": 2, "head_dim": 24},
}


def tokens(seed: int = 1, sequences: int = 20) -> Tensor:
    return torch.randint(0, 256, (sequences, LENGTH), generator=torch.Generator().manual_seed(seed))


def all_specs(sweep: Sweep) -> list[LayerSpec]:
    """Every pair of every kind, the parent's own first."""
    heads = sweep.parent.shape.num_key_value_heads
    attentions = [f"kv{n}" for n in (heads, heads // 2, 1) if n] + ["linear", "skip"]
    texts = [f"attention:{a}+ffn:{f}" for a in dict.fromkeys(attentions) for f in ("512", "256", "linear", "skip")]
    return [LayerSpec.parse(text) for text in texts]


def fit(sweep: Sweep, layer: int, stream: Tensor, method: str = "fitted", pseudo_tokens: float = 10.0) -> LayerLibrary:
    return fit_layer(sweep, sweep.layer(layer), stream, all_specs(sweep), FitConfig(method, pseudo_tokens))


def stream_into(sweep: Sweep, layer: int, text: Tensor) -> Tensor:
    stream = sweep.embed(text)
    for index in range(layer):
        stream = sweep.forward(sweep.layer(index), stream)
    return stream


def output_error(output: Tensor, parent: Tensor) -> float:
    """Squared error over all tokens, relative to the parent's own size."""
    return float((output - parent).double().pow(2).sum() / parent.double().pow(2).sum())


def layer_tensors(sweep: Sweep, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
    """Names within the layer and shapes that a checkpoint of this candidate must have."""
    shape = sweep.parent.shape
    whole = expected_tensors(shape, Architecture.uniform(shape.num_hidden_layers, spec))
    prefix = "model.layers.0."
    return {name.removeprefix(prefix): size for name, size in whole.items() if name.startswith(prefix)}


@pytest.fixture(params=PARENTS.values(), ids=PARENTS.keys())
def sweep(request: pytest.FixtureRequest, tiny_sweep: Callable[..., Sweep]) -> Sweep:
    return tiny_sweep(**request.param)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A parent that normalises queries and keys per head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 272}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
    model = AutoModelForCausalLM.from_config(Qwen3Config(**sizes, **heads, initializer_range=0.2))
    model.save_pretrained(directory := tmp_path_factory.mktemp("qwen3"))
    return Sweep(open_parent(str(directory)), torch.device("cpu"), tokens_per_batch=128)


@pytest.fixture
def full_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keeps the library in fp32: what least squares promises holds up to fp32 rounding, not after rounding to bf16."""
    monkeypatch.setattr("blocks.library.LIBRARY_DTYPE", torch.float32)
    yield


def assert_tensors_as_the_checkpoint_needs(sweep: Sweep, library: LayerLibrary) -> None:
    for spec in all_specs(sweep):
        weights = library.layer_weights(spec)
        assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == layer_tensors(sweep, spec), spec
        assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights.values()), spec


@pytest.mark.parametrize("method", ["fitted", "cut"])
def test_every_candidate_has_the_tensors_its_checkpoint_needs(sweep: Sweep, method: str) -> None:
    assert_tensors_as_the_checkpoint_needs(sweep, fit(sweep, 0, sweep.embed(tokens()), method))


def test_every_candidate_of_a_qk_norm_parent_has_its_tensors(qwen3: Sweep) -> None:
    assert_tensors_as_the_checkpoint_needs(qwen3, fit(qwen3, 0, qwen3.embed(tokens())))


@pytest.mark.parametrize("method", ["fitted", "cut"])
def test_the_parents_own_spec_gives_the_parents_tensors(sweep: Sweep, method: str) -> None:
    stream = sweep.embed(tokens())
    fitted = fit(sweep, 0, stream, method)
    weights, parent = fitted.layer_weights(sweep.parent.shape.parent_layer), sweep.layer(0)
    assert weights.keys() == parent.keys()
    assert all(weights[name] is parent[name] for name in parent)


@pytest.mark.parametrize("method", ["fitted", "cut"])
def test_fits_aim_at_what_the_parent_adds_to_the_stream(sweep: Sweep, method: str) -> None:
    stream, parent = sweep.embed(tokens()), sweep.layer(0)
    builder = _LayerBuilder(sweep, parent, stream, all_specs(sweep), FitConfig(method))
    only_attention = {name: tensor for name, tensor in parent.items() if not name.startswith(("mlp.", "post_"))}
    torch.testing.assert_close(stream + builder.attended, sweep.forward(only_attention, stream), rtol=0, atol=1e-5)
    torch.testing.assert_close(stream + builder.added, sweep.forward(parent, stream), rtol=0, atol=1e-5)


def assert_fitted_is_never_worse(sweep: Sweep, layer: int) -> None:
    stream = stream_into(sweep, layer, tokens())
    fitted, cut = fit(sweep, layer, stream), fit(sweep, layer, stream, "cut")
    parent = sweep.forward(sweep.layer(layer), stream)

    def error(library: LayerLibrary, spec: LayerSpec) -> float:
        return output_error(sweep.forward(library.layer_weights(spec), stream), parent)

    for spec in all_specs(sweep):
        before, after = error(cut, spec), error(fitted, spec)
        assert after <= before * (1 + 1e-5) + 1e-9, f"{spec}: {after} fitted, {before} cut"


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("layer", [0, 2])
def test_fitted_is_never_worse_than_cut_on_the_fitting_text(sweep: Sweep, layer: int) -> None:
    assert_fitted_is_never_worse(sweep, layer)


@pytest.mark.usefixtures("full_precision")
def test_fitted_is_never_worse_than_cut_with_qk_norm(qwen3: Sweep) -> None:
    assert_fitted_is_never_worse(qwen3, 1)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize(
    ("spec", "matrix"),
    [
        ("attention:kv4+ffn:256", "mlp.down_proj.weight"),
        ("attention:kv1+ffn:512", "mlp.down_proj.weight"),
        ("attention:skip+ffn:256", "mlp.down_proj.weight"),
        ("attention:linear+ffn:512", "mlp.down_proj.weight"),
        ("attention:kv2+ffn:linear", "mlp.linear_mlp.weight"),
        ("attention:kv4+ffn:skip", "self_attn.o_proj.weight"),
        ("attention:kv1+ffn:skip", "self_attn.o_proj.weight"),
    ],
)
def test_the_last_matrix_is_at_the_minimum_of_the_output_error(
    tiny_sweep: Callable[..., Sweep], spec: str, matrix: str
) -> None:
    """The gradient of the whole layer's error vanishes there (with next to no ridge), and does not nearby."""
    sweep = tiny_sweep(**PARENTS["biases"])
    stream = sweep.embed(tokens())
    library = fit(sweep, 0, stream, pseudo_tokens=1e-4)
    parent = sweep.forward(sweep.layer(0), stream)
    weights = library.layer_weights(LayerSpec.parse(spec))

    def slope(weight: Tensor) -> float:
        weight = weight.detach().clone().requires_grad_()
        output = layer_forward({**weights, matrix: weight}, stream, sweep.math(LENGTH))
        error = (output - parent).pow(2).mean()
        return float(torch.autograd.grad(error, weight)[0].norm())

    nudge = torch.randn(weights[matrix].shape, generator=torch.Generator().manual_seed(0))
    size = 0.05 * weights[matrix].std()  # a change of a twentieth, as a wrong target or bias would make
    assert slope(weights[matrix]) < 0.01 * slope(weights[matrix] + size * nudge)


@pytest.mark.parametrize("spec", ["attention:skip+ffn:512", "attention:skip+ffn:256", "attention:kv2+ffn:skip"])
def test_compensated_skips_beat_plain_skips_on_other_text(tiny_sweep: Callable[..., Sweep], spec: str) -> None:
    """On text that was not fitted, at the library's own precision, in the mean over the layers."""
    sweep, errors = tiny_sweep(), {"cut": 0.0, "fitted": 0.0}
    for layer in range(4):
        train, test = (stream_into(sweep, layer, tokens(seed, 64)) for seed in (1, 2))
        parent = sweep.forward(sweep.layer(layer), test)
        for method in errors:
            weights = fit(sweep, layer, train, method, 100.0).layer_weights(LayerSpec.parse(spec))
            errors[method] += output_error(sweep.forward(weights, test), parent) / 4
    assert errors["fitted"] < 0.95 * errors["cut"]


def test_plain_cuts_copy_the_parent(tiny_sweep: Callable[..., Sweep]) -> None:
    """The published initialisation: channels are the parent's, up to the library's bf16; skips have nothing else."""
    sweep = tiny_sweep(mlp_bias=True)
    library, parent = fit(sweep, 0, sweep.embed(tokens()), "cut"), sweep.layer(0)
    spec = LayerSpec.parse("attention:skip+ffn:256")
    weights, channels = library.layer_weights(spec), library.order(spec.attention)[:256]
    assert len(set(channels.tolist())) == 256
    for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.gate_proj.bias", "mlp.up_proj.bias"):
        assert torch.equal(weights[name], parent[name][channels])
    down = parent["mlp.down_proj.weight"][:, channels]
    torch.testing.assert_close(weights["mlp.down_proj.weight"], down, rtol=2**-8, atol=0)  # bf16 keeps 8 bits
    assert torch.equal(weights["mlp.down_proj.bias"], parent["mlp.down_proj.bias"])
    uncut = library.layer_weights(LayerSpec.parse("attention:skip+ffn:512"))
    assert all(tensor is parent[name] for name, tensor in uncut.items())


def test_the_order_of_the_specs_does_not_matter(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep = tiny_sweep()
    stream, specs = sweep.embed(tokens()), all_specs(sweep)
    forwards, backwards = (
        fit_layer(sweep, sweep.layer(0), stream, order, FitConfig()).entries for order in (specs, specs[::-1])
    )
    assert forwards.keys() == backwards.keys()
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


def assert_same_layers(one: LayerLibrary, other: LayerLibrary, specs: list[LayerSpec]) -> None:
    for spec in specs:
        a: Weights = one.layer_weights(spec)
        b: Weights = other.layer_weights(spec)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_library_survives_the_disk(tmp_path: Path, sweep: Sweep) -> None:
    library, fitted = BlockLibrary(tmp_path / "library"), fit(sweep, 0, sweep.embed(tokens()))
    assert not library.has(3)
    library.save(3, fitted)
    assert library.has(3)
    assert library.path(3).name == "layer_003.safetensors"
    opened = library.open(3, sweep.layer(0))
    assert opened.entries.keys() == fitted.entries.keys()
    assert_same_layers(opened, fitted, all_specs(sweep))


def test_what_put_returns_is_what_is_read_back(tiny_sweep: Callable[..., Sweep]) -> None:
    """Scores and fits must see the rounded matrix, not the one before rounding."""
    sweep = tiny_sweep()
    library, spec = LayerLibrary(sweep.layer(0)), LayerSpec.parse("attention:kv2+ffn:skip")
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    kept = library.put(spec, "self_attn.o_proj.weight", matrix)
    assert not torch.equal(kept, matrix)
    assert torch.equal(kept, library.layer_weights(spec)["self_attn.o_proj.weight"])


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "missing"])
def test_a_damaged_library_file_says_what_to_do(tmp_path: Path, tiny_sweep: Callable[..., Sweep], damage: str) -> None:
    sweep, library = tiny_sweep(), BlockLibrary(tmp_path)
    library.save(0, fit(sweep, 0, sweep.embed(tokens())))
    content = library.path(0).read_bytes()
    if damage == "missing":
        library.path(0).unlink()
    else:
        left = {"truncated": content[: len(content) // 2], "garbage": b"\xff" * 200, "empty": b""}
        library.path(0).write_bytes(left[damage])
    with pytest.raises(CheckpointError, match="run `nas score` again"):
        library.open(0, sweep.layer(0))


@pytest.mark.parametrize("spec", ["attention:kv2+ffn:256", "attention:linear+ffn:512", "attention:skip+ffn:linear"])
def test_a_candidate_that_was_never_built_is_refused(tiny_sweep: Callable[..., Sweep], spec: str) -> None:
    with pytest.raises(CheckpointError, match="the block library holds no attention:"):
        LayerLibrary(tiny_sweep().layer(0)).layer_weights(LayerSpec.parse(spec))
