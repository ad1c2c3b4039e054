"""FFN fusion: the tensors against a parallel form written out in fp64, dependencies against a plain loop, and `nas fuse`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from app import BUDGET, World, contents, nas, succeed
from tiny import tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM

from blocks.canonical import canonical
from blocks.checkpoint import load_child, read_architecture, write_child
from blocks.errors import ConfigError
from blocks.fuse import (
    check_runs,
    dependency_matrix,
    ffn_stretches,
    fuse_ffns,
    fuse_layers,
    fused_architecture,
)
from blocks.layer import layer_forward
from blocks.parent import open_parent
from blocks.shape import ModelShape, ffn_mult, ffn_width
from blocks.spec import Architecture
from blocks.sweep import Sweep
from blocks.weights import WeightStore
from nas import fusion_run
from nas.clock import Times
from nas.costs import CostModel, Scenario
from nas.data import load_pack
from nas.datasheet import DATASHEETS, RooflineClock
from nas.fusion import open_sweep
from nas.fusion_search import Chooser, FusingChild, Proposal, count_proposals, propose
from nas.fusion_times import EstimatedFFNs, ffn_times, measure_ffns, run_times
from nas.progress import Reporter

D, EPS = 24, 1e-5
QUIET = Reporter(quiet=True)
CPU = torch.device("cpu")


# ---- the tensors, against the parallel form written out


def random_ffn(width: int, seed: int, bias: bool = False) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    weights = {
        "post_attention_layernorm.weight": 1 + 0.5 * draw(D),
        "mlp.gate_proj.weight": draw(width, D),
        "mlp.up_proj.weight": draw(width, D),
        "mlp.down_proj.weight": draw(D, width),
    }
    if bias:
        weights |= {"mlp.gate_proj.bias": draw(width), "mlp.up_proj.bias": draw(width), "mlp.down_proj.bias": draw(D)}
    return weights


def plain_ffn(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """One FFN in fp64, sharing no code with blocks/."""
    normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w["post_attention_layernorm.weight"]
    gate = normed @ w["mlp.gate_proj.weight"].T + w.get("mlp.gate_proj.bias", 0)
    up = normed @ w["mlp.up_proj.weight"].T + w.get("mlp.up_proj.bias", 0)
    return (gate / (1 + (-gate).exp()) * up) @ w["mlp.down_proj.weight"].T + w.get("mlp.down_proj.bias", 0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", [(256, 256), (512, 256, 768), (300, 40), (1, 2, 3, 4, 5), (256,) * 9])
def test_a_fused_ffn_is_the_parallel_form(widths: tuple[int, ...], bias: bool) -> None:
    layers = [random_ffn(width, seed, bias) for seed, width in enumerate(widths)]
    x = torch.randn(3, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    parallel = x + sum(plain_ffn(layer, x) for layer in layers)
    fused = fuse_ffns(layers)
    assert float((x + plain_ffn(fused, x) - parallel).abs().max()) <= 1e-10 * float(parallel.abs().max())
    assert fused["mlp.down_proj.weight"].shape == (D, -(-sum(widths) // 256) * 256)
    assert torch.equal(fused["post_attention_layernorm.weight"], torch.ones(D, dtype=torch.float64))


def test_padding_is_zero_channels_and_norms_are_folded_each_into_its_own() -> None:
    one, two = random_ffn(10, 0), random_ffn(20, 1)
    fused = fuse_ffns([one, two])
    for name in ("gate_proj", "up_proj"):
        matrix = fused[f"mlp.{name}.weight"]
        expected = torch.cat(
            [w[f"mlp.{name}.weight"] @ torch.diag(w["post_attention_layernorm.weight"]) for w in (one, two)]
        )
        torch.testing.assert_close(matrix[:30], expected, rtol=0, atol=1e-12)
        assert not matrix[30:].any()
    assert not fused["mlp.down_proj.weight"][:, 30:].any()
    assert "mlp.down_proj.bias" not in fused


def test_half_precision_is_folded_in_fp32() -> None:
    layers = [{name: t.bfloat16() for name, t in random_ffn(256, seed).items()} for seed in range(2)]
    assert {tensor.dtype for tensor in fuse_ffns(layers).values()} == {torch.float32}


# ---- which layers


MIXED = Architecture.from_list(
    [
        "attention:kv2+ffn:512",
        "attention:skip+ffn:512",  # 1
        "attention:skip+ffn:skip",
        "attention:skip+ffn:256",  # 3
        "attention:skip+ffn:768",  # 4
        "attention:skip+ffn:linear",
        "attention:skip+ffn:512",  # alone: the next has an attention
        "attention:linear+ffn:512",
        "attention:skip+ffn:512",  # 8
        "attention:skip+ffn:512",  # 9
    ]
)


def test_stretches_end_at_attention_and_at_matrices_but_not_at_empty_layers() -> None:
    assert ffn_stretches(MIXED) == [(1, 3, 4), (8, 9)]
    assert ffn_stretches(Architecture.from_list(["attention:kv2+ffn:512"] * 3)) == []


def test_the_fused_ffn_stands_in_the_first_layer_of_its_run() -> None:
    fused = fused_architecture(MIXED, [(1, 3), (8, 9)])
    names = ["attention:skip+ffn:768", "attention:skip+ffn:skip", "attention:skip+ffn:skip", "attention:skip+ffn:768"]
    assert fused.to_list()[1:5] == names
    assert fused.to_list()[8:] == ["attention:skip+ffn:1024", "attention:skip+ffn:skip"]
    assert [fused[i] for i in (0, 5, 6, 7)] == [MIXED[i] for i in (0, 5, 6, 7)]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([(0, 1)], "layers 0, 1 are not FFNs in a row without attention between; fuse within 1-4 or 8-9"),
        ([(1, 4)], "layers 1, 4 are not"),
        ([(1,)], "layers 1 are not"),
        ([(1, 3), (3, 4)], "layers 3-4 share a layer"),
        ([(9, 8)], "layers 9, 8 are not"),
    ],
)
def test_other_runs_are_refused(runs: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_runs(MIXED, runs)


def test_widths_of_real_fusions_survive_the_published_form() -> None:
    for hidden in (576, 8192, 16384):
        for width in range(256, 1_500_000, 25_600):
            assert ffn_width(json.loads(json.dumps(ffn_mult(width, hidden))), hidden) == width


# ---- a child on disk


def child_of(
    directory: Path, parent: Path, layers: list[str], runs: list[tuple[int, ...]] | None = None
) -> tuple[Path, Architecture]:
    """A child that keeps the parent's first KV heads and channels, some of it skipped; fused if runs are given."""
    opened = open_parent(str(parent))
    architecture = Architecture.from_list(layers)
    weights = []
    for index, spec in enumerate(architecture):
        layer = opened.weights().layer(index)
        if spec.attention.kind == "skip":
            layer = {name: t for name, t in layer.items() if not name.startswith(("self_attn", "input_"))}
        if spec.ffn.kind == "skip":
            layer = {name: t for name, t in layer.items() if not name.startswith(("mlp", "post_"))}
        elif spec.ffn.width < opened.shape.intermediate_size:
            for name in ("gate_proj", "up_proj"):
                layer[f"mlp.{name}.weight"] = layer[f"mlp.{name}.weight"][: spec.ffn.width]
                if f"mlp.{name}.bias" in layer:
                    layer[f"mlp.{name}.bias"] = layer[f"mlp.{name}.bias"][: spec.ffn.width]
            layer["mlp.down_proj.weight"] = layer["mlp.down_proj.weight"][:, : spec.ffn.width]
        weights.append(layer)
    if runs:
        architecture, weights = fuse_layers(architecture, weights, runs)
    store = opened.weights()
    tensors = {f"model.layers.{i}.{name}": tensor for i, layer in enumerate(weights) for name, tensor in layer.items()}
    tensors |= {"model.embed_tokens.weight": store.embedding, "model.norm.weight": store.final_norm}
    if not opened.shape.tie_word_embeddings:
        tensors["lm_head.weight"] = store.head
    write_child(directory, parent, architecture, tensors, "float32")
    return directory, architecture


KEPT, FREE, NARROW = "attention:kv2+ffn:512", "attention:skip+ffn:512", "attention:skip+ffn:256"
LAYERS = [KEPT, FREE, NARROW, FREE, FREE, FREE, KEPT, KEPT]


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"mlp_bias": True}])
def test_a_fused_child_on_disk_computes_the_parallel_form(tmp_path: Path, overrides: dict[str, Any]) -> None:
    """Its own model code, loaded from disk, against the parent's tensors run layer by layer with plain sums."""
    parent = tiny_llama(tmp_path / "parent", num_hidden_layers=8, **overrides)
    runs = [(1, 2, 3), (4, 5)]
    path, architecture = child_of(tmp_path / "fused", parent, LAYERS, runs)
    unfused, _ = child_of(tmp_path / "unfused", parent, LAYERS)
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(2))
    sweep = open_sweep(unfused, CPU)
    stream = sweep.embed(ids, torch.float32)
    for members in ([0], [1, 2, 3], [4, 5], [6], [7]):
        added = [layer_forward(sweep.layer(i), stream, sweep.math(12)) - stream for i in members]
        stream = stream + sum(added)
    logits = sweep.finish(stream) @ sweep.head.T
    with torch.no_grad():
        model = load_child(path)
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=2e-5 * float(logits.abs().max()))
        assert not torch.allclose(load_child(unfused)(ids).logits, logits, atol=1e-2)  # fusing does change something
    assert read_architecture(path)[1] == architecture
    assert architecture[1].ffn.width == 1280 and model.config.intermediate_size == 1280
    generated = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(
        generated, model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    )


@pytest.mark.parametrize("overrides", [{}, {"mlp_bias": True}])
def test_the_cost_model_counts_what_is_on_disk(tmp_path: Path, overrides: dict[str, Any]) -> None:
    parent = tiny_llama(tmp_path / "parent", num_hidden_layers=8, **overrides)
    path, architecture = child_of(tmp_path / "fused", parent, LAYERS, [(1, 2, 3), (4, 5)])
    on_disk = sum(torch.Size(size).numel() for size in WeightStore(path).shapes.values())
    assert CostModel(open_parent(str(parent)).shape, Scenario()).cost(architecture).parameters == on_disk


def test_the_emptied_layers_fall_away_in_the_canonical_topology() -> None:
    shape = ModelShape(64, 512, 8, 4, 2, 16, 272)
    fused = fused_architecture(Architecture.from_list(LAYERS), [(1, 2, 3), (4, 5)])
    rewritten = canonical(shape, fused)
    assert rewritten.architecture.to_list() == [KEPT, "attention:skip+ffn:1280", "attention:skip+ffn:1024", KEPT, KEPT]
    assert shape.parameters(rewritten.architecture) == shape.parameters(fused)


# ---- dependencies


def test_dependencies_against_a_plain_loop(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep = tiny_sweep(num_hidden_layers=4)
    layers = [{name: t for name, t in sweep.layer(i).items() if name.startswith(("mlp", "post_"))} for i in range(4)]
    stream = sweep.embed(torch.randint(0, 256, (5, 9), generator=torch.Generator().manual_seed(3)), torch.float32)
    found = dependency_matrix(layers, stream.split(2), sweep.math(9))  # batches of 2, 2 and 1 sequences

    doubles = [{name: t.double() for name, t in layer.items()} for layer in layers]

    def contributions(x: Tensor, left_out: int | None) -> list[Tensor]:
        outputs = []
        for index, w in enumerate(doubles):
            outputs.append(plain_ffn_with(w, x, sweep.parent.config.rms_norm_eps))
            if index != left_out:
                x = x + outputs[-1]
        return outputs

    own = contributions(stream.double(), None)
    for i in range(4):
        without = contributions(stream.double(), i)
        for j in range(4):
            cosine = torch.nn.functional.cosine_similarity(own[j], without[j], dim=-1)
            expected = float((1 - cosine).mean()) if j > i else 0.0
            assert float(found[i, j]) == pytest.approx(expected, abs=2e-5), (i, j)
    assert float(found[0, 1]) > 0.01  # large enough that the test says something


def plain_ffn_with(w: dict[str, Tensor], x: Tensor, eps: float) -> Tensor:
    normed = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w["post_attention_layernorm.weight"]
    gate, up = normed @ w["mlp.gate_proj.weight"].T, normed @ w["mlp.up_proj.weight"].T
    return (torch.nn.functional.silu(gate) * up) @ w["mlp.down_proj.weight"].T


def test_proposals_are_the_runs_of_least_dependency_of_every_length() -> None:
    matrix = torch.zeros(5, 5, dtype=torch.float64)
    matrix[0, 1], matrix[1, 2], matrix[2, 3], matrix[0, 2] = 0.3, 0.1, 0.2, 0.9
    stretch = (3, 4, 6, 7, 8)
    first = propose(stretch, matrix, per_length=1)
    assert [(p.run, p.dependency, pytest.approx(p.dependency_sum)) for p in first] == [
        ((4, 6), 0.1, 0.1),
        ((4, 6, 7), 0.2, 0.3),
        ((3, 4, 6, 7), 0.9, 1.5),
    ]
    assert [p.run for p in propose(stretch, matrix, per_length=9) if len(p.run) == 2] == [(4, 6), (6, 7), (3, 4)]
    longest = [p.run for p in propose(stretch, matrix, include_last=True, per_length=1)][-1]
    assert longest == stretch
    assert {len(p.run) for p in propose(stretch, matrix, max_length=3)} == {2, 3}
    assert propose((1, 2), torch.zeros(2, 2)) == []
    for last in (False, True):
        for most in (None, 2, 4):
            counted = count_proposals([stretch], last, most, 2)
            assert counted == len(propose(stretch, matrix, last, most, 2))


# ---- times


def test_a_roofline_saves_what_every_ffn_pays_and_nothing_else() -> None:
    shape = ModelShape(4096, 14_336, 32, 32, 8, 128, 128_256)
    scenario = Scenario(batch=2, context=2048)
    times = EstimatedFFNs(RooflineClock(DATASHEETS["H100"], shape, scenario), sync_ns=7000)
    apart, fused = run_times(times, [14_336] * 4)
    stream = 7 * 4096 * 2 / 3.35e12 * 1e9  # ns a token: seven times a bf16 stream
    assert apart.decode_ns - fused.decode_ns == pytest.approx(3 * (2 * stream + 5000 + 7000), abs=8)
    assert apart.prefill_ns - fused.prefill_ns == pytest.approx(3 * (2 * 1024 * stream + 5000 + 7000), abs=8)
    named = ffn_times("H200", shape, replace(scenario, tp=2), [14_336], CPU, 7.0, QUIET)
    assert named.estimate and "H200" in named.device
    assert ffn_times(None, shape, scenario, [14_336], CPU, 7.0, QUIET).ffn(256) == EstimatedFFNs(
        RooflineClock(DATASHEETS["H100"], shape, scenario)
    ).ffn(256)  # one GPU has no all-reduce
    with pytest.raises(ConfigError, match=r"--clock H300: no such datasheet \(did you mean 'H[12]00'\?\)"):
        ffn_times("H300", shape, scenario, [256], CPU, 0.0, QUIET)


def test_times_are_measured_for_every_width() -> None:
    shape = ModelShape(64, 512, 4, 4, 2, 16, 256)
    scenario = Scenario(batch=1, context=32, weight_dtype="float32", kv_dtype="float32")
    times = measure_ffns(shape, scenario, [256, 8192, 256], CPU, 0, QUIET, rounds=3)
    assert set(times.taken) == {256, 8192}
    assert times.ffn(8192).prefill_ns > times.ffn(256).prefill_ns >= 0 and not times.estimate


# ---- the choice


class FlatTimes:
    """Every FFN takes a millisecond to read a prompt, however wide it is; what is fused in `slow` takes longer."""

    name, device, estimate = "flat", "nowhere", True

    def __init__(self, slow: int | None = None) -> None:
        self.slow = slow

    def ffn(self, width: int) -> Times:
        return Times(9_000_000 if width == self.slow else 1_000_000, 0)


@pytest.fixture(scope="module")
def fusing(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], FusingChild]:
    directory = tmp_path_factory.mktemp("fusing")
    parent = tiny_llama(directory / "parent", num_hidden_layers=8, initializer_range=0.08)
    path, architecture = child_of(directory / "child", parent, LAYERS)
    tokens = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(5))
    own = Sweep(open_parent(str(parent)), CPU, tokens_per_batch=32)
    hidden = own.run(tokens)
    return lambda: FusingChild(
        replace(open_sweep(path, CPU), tokens_per_batch=32), architecture, tokens, hidden, own.head
    )


def every_run(child: FusingChild) -> list[Proposal]:
    return [p for s, m in child.dependencies().items() for p in propose(s, m, include_last=True, per_length=9)]


def dense_kl(child: FusingChild, runs: list[tuple[int, ...]], reference: Tensor, head: Tensor) -> float:
    """KL(reference || fused child) from whole logits in fp64, the child fused in memory and run from its first layer."""
    _, layers = fuse_layers(child.architecture, [child.sweep.layer(i) for i in range(8)], runs)
    own = child.sweep.of(layers).run(child.tokens)
    log_p = torch.log_softmax(reference.double() @ head.double().T, -1)
    log_q = torch.log_softmax(own.double() @ child.sweep.head.double().T, -1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_measured_kls_are_those_of_whole_logits(fusing: Callable[[], FusingChild]) -> None:
    child = fusing()
    unfused = child.sweep.run(child.tokens)
    for kept in ([], [(2, 3)], [(1, 2), (4, 5)]):
        child.keep(frozenset(kept))  # what is measured must not depend on the model so far
        for runs in ([(1, 2)], [(2, 3, 4)], [(1, 2, 3, 4, 5)], [(1, 2), (3, 4)]):
            child._measured = {frozenset(): child.unfused}
            found = child.measure(frozenset(runs))
            assert found.kl == pytest.approx(dense_kl(child, runs, child.parent_hidden, child.parent_head), abs=1e-5)
            assert found.kl_unfused == pytest.approx(dense_kl(child, runs, unfused, child.sweep.head), abs=1e-5)
    assert child.unfused.kl_unfused == 0.0
    assert child.unfused.kl == pytest.approx(dense_kl(child, [], child.parent_hidden, child.parent_head), abs=1e-5)


def test_max_kl_holds_for_all_fusions_together(fusing: Callable[[], FusingChild]) -> None:
    kept: list[int] = []
    alone = sorted(fusing().measure(frozenset([p.run])).kl for p in every_run(fusing()))
    start = fusing().unfused.kl
    # signs differ: fusing may bring a child closer to its parent
    for limit in (0.0, max(0.0, alone[len(alone) // 2] - start), 100.0):
        child = fusing()
        rows = Chooser(child, Scenario(), FlatTimes(), limit, QUIET).choose(every_run(child))
        runs = [row.run for row in rows if row.kept]
        assert frozenset(runs) == child.kept
        assert dense_kl(child, runs, child.parent_hidden, child.parent_head) - start <= limit + 1e-5
        assert all(row.why for row in rows)
        assert len({index for run in runs for index in run}) == sum(map(len, runs))
        for row in rows:
            if not row.kept and "more than" in row.why:
                assert f"more than {limit:g}" in row.why
        kept.append(sum(len(run) - 1 for run in runs))
    assert kept == sorted(kept)
    assert kept[-1] == 4  # with no limit, the whole stretch of five becomes one


def test_what_is_not_faster_is_not_fused(fusing: Callable[[], FusingChild]) -> None:
    child = fusing()
    rows = Chooser(child, Scenario(), FlatTimes(slow=512 + 256), 100.0, QUIET).choose(
        [p for p in every_run(child) if p.run == (1, 2)]
    )
    assert [(row.kept, row.why) for row in rows] == [(False, "no faster")]


# ---- the command


@pytest.fixture(scope="module")
def searched(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A searched run whose child has no attention behind its first layer."""
    run = world.copy("searched", tmp_path_factory.mktemp("fuse") / "run")
    found = json.loads((run / "architecture.json").read_text())
    layers = ["attention:kv2+ffn:768"] + ["attention:skip+ffn:768"] * 3
    child_of(run / "child", world.parent, layers)
    scenario = Scenario(**{name: found["scenario"][name] for name in Scenario.__dataclass_fields__})
    costs = CostModel(open_parent(str(world.parent)).shape, scenario)
    found |= {"layers": layers, "cost": costs.cost(Architecture.from_list(layers)).to_json(), "key": "made by hand"}
    (run / "architecture.json").write_text(json.dumps(found))
    return run


def copy(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / "run"))


FUSE = ("--max-kl", "10", "--clock", "H100")


def test_a_child_with_number_formats_is_not_fused(searched: Path, world: World, tmp_path: Path) -> None:
    run = copy(searched, tmp_path)
    layers = ["attention:kv2+ffn:768"] + ["attention:skip+ffn:768@fp8"] * 3
    child_of(run / "child", world.parent, layers)
    found = json.loads((run / "architecture.json").read_text())
    (run / "architecture.json").write_text(json.dumps(found | {"layers": layers}))
    for dry in (), ("--dry-run",):
        refused = nas("fuse", "--run", run, *FUSE, *dry)
        assert refused.code == 2 and "has number formats (fp8), which fusion would lose" in refused.err
    assert not (run / "fused").exists()


def test_fuse_a_run(searched: Path, tmp_path: Path) -> None:
    run = copy(searched, tmp_path)
    before = contents(run)
    found = succeed("fuse", "--run", run, *FUSE, "--json").json
    assert found["runs"] == [[1, 2]] and found["stretches"] == [[1, 2, 3]]
    (row,) = found["proposals"]
    assert row["kept"] and row["fused_decode_ms"] < row["decode_ms"] and 0 < row["dependency"] < 2
    assert found["kl"]["after"] - found["kl"]["before"] == pytest.approx(row["added"], abs=1e-6)
    assert read_architecture(run / "fused")[1].to_list() == found["layers"]
    assert json.loads((run / "fusion.json").read_text()) == found
    assert {name: content for name, content in contents(run).items() if name in before} == before
    again = succeed("fuse", "--run", run, *FUSE)
    assert "fused already" in again.err and "1-2" in again.out


def test_fuse_is_stopped_and_finished_without_loss(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy(searched, tmp_path)
    before = contents(run)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("blocks.checkpoint._name_shards", interrupted)  # the last step of writing a child
        assert nas("fuse", "--run", run, *FUSE).code == 130
    assert contents(run) == before
    for place in ("replace_directory", "save_json"):  # between the renames of --replace, and before architecture.json
        with monkeypatch.context() as patched:
            succeed("fuse", "--run", run, *FUSE)
            patched.setattr(fusion_run, place, interrupted)
            assert nas("fuse", "--run", run, *FUSE, "--replace").code == 130
        held = {name: c for name, c in contents(run).items() if name.startswith("child-unfused/")}
        assert {name.removeprefix("child-unfused/"): c for name, c in held.items()} == {
            name.removeprefix("child/"): c for name, c in before.items() if name.startswith("child/")
        }
    succeed("fuse", "--run", run, *FUSE, "--replace")
    assert (
        read_architecture(run / "child")[1].to_list() == json.loads((run / "architecture.json").read_text())["layers"]
    )


def test_the_fused_child_is_healed_and_drawn(searched: Path, tmp_path: Path) -> None:
    run = copy(searched, tmp_path)
    succeed("fuse", "--run", run, *FUSE, "--replace")
    found = json.loads((run / "architecture.json").read_text())
    assert found["layers"][1:3] == ["attention:skip+ffn:1536", "attention:skip+ffn:skip"]
    on_disk = sum(torch.Size(size).numel() for size in WeightStore(run / "child").shapes.values())
    assert found["cost"]["parameters"] == on_disk
    assert found["unfused"]["key"] == "made by hand" != found["key"]
    succeed("distill", "--run", run, "--tokens", "256", "--batch-sequences", "4", "--sequence-length", "32")
    assert read_architecture(run / "healed")[1].to_list() == found["layers"]
    assert "1536" in succeed("show", "--run", run).out
    succeed("report", "--run", run)
    same = succeed("fuse", "--run", run, *FUSE, "--json").json  # of the unfused child, which is kept
    assert same["child"].endswith("child-unfused") and same["runs"] == [[1, 2]]
    healed = succeed("fuse", "--run", run, *FUSE, "--child", "healed")
    assert "nothing to fuse" in healed.out  # fused before it was healed
    assert not (run / "healed-fused").exists()


@pytest.mark.parametrize("clock", ["H100 datasheet", "profiles/gone.json"])
def test_a_child_searched_with_a_clock_keeps_its_times(searched: Path, tmp_path: Path, clock: str) -> None:
    run = copy(searched, tmp_path)
    found = json.loads((run / "architecture.json").read_text())
    timed = found["cost"] | {"ttft_ns": 7, "tpot_ns": 8, "request_ns": 9, "tokens_per_s": 10.0, "decode_ms": 8e-6}
    found |= {"clock": {"name": clock, "device": "a device", "estimate": True}, "cost": timed}
    (run / "architecture.json").write_text(json.dumps(found))
    succeed("fuse", "--run", run, *FUSE, "--replace")
    fused = json.loads((run / "architecture.json").read_text())
    if clock == "H100 datasheet":
        assert fused["cost"]["request_ns"] > 1000 and not fused["warnings"]
    else:
        assert fused["cost"]["request_ns"] == 9
        assert "times are those of the child before fusion: profiles/gone.json" in fused["warnings"][-1]
    on_disk = sum(torch.Size(size).numel() for size in WeightStore(run / "child").shapes.values())
    assert fused["cost"]["parameters"] == on_disk


def test_a_healed_child_is_fused_with_its_own_embedding_and_head(searched: Path, world: World, tmp_path: Path) -> None:
    run = copy(searched, tmp_path)
    store, shape = WeightStore(run / "child"), read_architecture(run / "child")
    g = torch.Generator().manual_seed(8)
    tensors = {name: store.get(name) for name in store.names()}
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        tensors[name] = tensors[name] * (1 + 0.3 * torch.rand(tensors[name].shape, generator=g))
    write_child(run / "healed", world.parent, shape[1], tensors, "float32")
    found = succeed("fuse", "--run", run, *FUSE, "--child", "healed", "--json").json
    assert found["runs"] == [[1, 2]]
    ids = torch.from_numpy(load_pack(run / "data" / "calibration.npy").astype("int64"))[: found["tokens"] // 32]
    parent = AutoModelForCausalLM.from_pretrained(world.parent, dtype=torch.float32)
    with torch.no_grad():
        log_p = parent(ids).logits.double().log_softmax(-1)
        for name, path in (("before", "healed"), ("after", "healed-fused")):
            log_q = load_child(run / path)(ids).logits.double().log_softmax(-1)
            expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
            assert found["kl"][name] == pytest.approx(expected, rel=1e-3), name
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(WeightStore(run / "healed-fused").get(name), tensors[name])
    assert json.loads((run / "healed-fusion.json").read_text())["runs"] == [[1, 2]]


def test_the_search_knows_its_own_child_after_fusion(world: World, tmp_path: Path) -> None:
    run = world.copy("searched", tmp_path / "run")
    found = json.loads((run / "architecture.json").read_text())
    replaced = found | {"key": "of the fused child", "unfused": found}
    (run / "architecture.json").write_text(json.dumps(replaced))
    again = succeed("search", "--run", run, *BUDGET)
    assert "done already" in again.err and json.loads((run / "architecture.json").read_text()) == replaced


def test_a_tight_limit_fuses_nothing_and_takes_a_replacement_back(searched: Path, tmp_path: Path) -> None:
    run = copy(searched, tmp_path)
    before = contents(run)
    found = succeed("fuse", "--run", run, *FUSE, "--replace", "--json").json
    least = found["kl"]["after"] - found["kl"]["before"]
    assert least > 0  # else no limit forbids it, and this test says nothing
    tight = succeed("fuse", "--run", run, "--max-kl", least / 2, "--clock", "H100", "--replace")
    assert "nothing was fused" in tight.out and f"would add {least:.4f} nats, more than" in tight.out
    after = contents(run)
    assert {name for name in after.keys() ^ before.keys()} == {"fusion.json"}
    assert {name: content for name, content in after.items() if name != "architecture.json" and name in before} == {
        name: content for name, content in before.items() if name != "architecture.json"
    }
    assert json.loads(after["architecture.json"]) == json.loads(before["architecture.json"])


def test_fuse_any_child(searched: Path, world: World, tmp_path: Path) -> None:
    path = copy(searched, tmp_path) / "child"
    words = ("fuse", path, "--parent", world.parent, "--data", world.text, *FUSE, "--include-last", "--tokens", "512")
    planned = succeed(*words, "--dry-run", "--json").json
    assert planned["proposals"] == 3 and not (tmp_path / "run" / "child-fused").exists()
    found = succeed(*words, "--json").json
    assert found["runs"] == [[1, 2, 3]]
    assert read_architecture(tmp_path / "run" / "child-fused")[1].to_list() == found["layers"]
    assert (tmp_path / "run" / "child-fused.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--child", "finalist"), "--child finalist: write child"),
        (("--child", "healed"), "has no healed yet; run `nas distill"),
        (("--child", "healed", "--replace"), "--replace puts the fused child"),
        (("--max-kl", "-1"), "max_kl is -1.0; it must be 0 or more"),
        (("--clock", "H300"), "--clock H300: no such datasheet"),
        (("--data", "x.txt"), "go with a child's directory"),
    ],
)
def test_mistakes_are_one_line(searched: Path, words: tuple[str, ...], message: str) -> None:
    result = nas("fuse", "--run", searched, *words)
    assert result.code in (1, 2) and message in result.err and "Traceback" not in result.err


def test_a_child_without_such_layers_has_nothing_to_fuse(world: World, tmp_path: Path) -> None:
    run = world.copy("searched", tmp_path / "run")
    child_of(run / "child", world.parent, ["attention:kv2+ffn:768"] * 4)
    found = json.loads((run / "architecture.json").read_text()) | {"layers": ["attention:kv2+ffn:768"] * 4}
    (run / "architecture.json").write_text(json.dumps(found))
    assert "nothing to fuse" in succeed("fuse", "--run", run).out


def test_what_is_no_child_stays_where_out_points(world: World, tmp_path: Path) -> None:
    run = world.copy("searched", tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    words = ("fuse", run / "child", "--parent", world.parent, "--data", world.text, "--clock", "H100", "--tokens", 128)
    for out, message in (
        (tmp_path / "mine", "is there already and no child"),
        (run, "holds the child itself"),
        (run / "uniform", "has made itself"),
    ):
        before = contents(out)
        for more in ((), ("--dry-run",)):
            refused = nas(*words, "--out", out, *more)
            assert refused.code != 0 and message in refused.err and contents(out) == before


def test_a_fused_architecture_can_be_benched(searched: Path, tmp_path: Path) -> None:
    run = copy(searched, tmp_path)
    succeed("fuse", "--run", run, *FUSE, "--replace")
    planned = succeed("bench", "--run", run, "--dry-run", "--json", *BUDGET[2:]).json
    assert "ffn:1536" in planned["candidates"]
