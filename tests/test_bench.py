"""`nas bench`: what is timed is the real mathematics, the arithmetic of chains is exact, and the sum meets assembled models."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from app import nas, succeed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import nas.bench as bench_module
from blocks import layer as reference
from blocks.errors import ConfigError
from blocks.shape import ModelShape
from blocks.spec import Architecture, AttentionSpec, FFNSpec, LayerSpec
from nas.bench import Effort, effort_for, run_bench, spread
from nas.bench_command import candidates, find_subject, made_child
from nas.clock import Profile, load_clock
from nas.costs import CostModel, Scenario
from nas.inference import (
    EPS,
    FFN,
    ROPE_THETA,
    Attention,
    Linear,
    Ring,
    Sizes,
    Workshop,
    inference,
    run_chain,
    run_model,
)
from nas.progress import Advance, Reporter
from nas.timing import CallTimer, Work
from search_spaces import load_space

CPU = torch.device("cpu")
SHAPE = ModelShape(64, 512, 4, 4, 2, 16, 300)
FULL: dict[str, Any] = {"context": 16, "prompt": 11, "output": 2, "weight_dtype": "float32", "kv_dtype": "float32"}
SMALL = Scenario(batch=2, context=64, weight_dtype="float32", kv_dtype="float32")
DEFAULT = load_space("default")
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
FLAGS = ("--batch", 2, "--context", 32, "--weight-dtype", "float32", "--kv-dtype", "float32", "--device", "cpu")


# What is timed


def workshop(shape: ModelShape, **changes: Any) -> Workshop:
    made = Workshop.open(shape, Scenario(**(FULL | {"batch": 3} | changes)), CPU, 1e9)
    made.weights.flat.mul_(10)  # so that every part matters to the output
    return made


def math(sizes: Sizes, length: int) -> reference.LayerMath:
    """Rotary tables from their definition (Su et al., "RoFormer", eq. 34), in the halves that Llama rotates."""
    half = sizes.shape.head_dim // 2
    angles = torch.arange(length)[:, None] / ROPE_THETA ** (torch.arange(half) / half)
    return reference.LayerMath(
        sizes.shape.head_dim, EPS, torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    )


def llama_tensors(subblock: Attention | FFN | Linear, attention: bool) -> dict[str, Tensor]:
    """The tensors of a timed subblock under Llama's names, norms made random."""
    subblock.norm.normal_(1.0, 0.2)
    w = {reference.ATTENTION_NORM if attention else reference.FFN_NORM: subblock.norm}
    if isinstance(subblock, Linear):
        return w | {reference.LINEAR_ATTENTION if attention else reference.LINEAR_FFN: subblock.matrix}
    if isinstance(subblock, FFN):
        w |= dict(zip(("mlp.gate_proj.weight", "mlp.up_proj.weight"), subblock.gate_up.chunk(2), strict=True))
        w |= {reference.DOWN_PROJ: subblock.down}
        if subblock.gate_up_bias is not None and subblock.down_bias is not None:
            w |= dict(zip(("mlp.gate_proj.bias", "mlp.up_proj.bias"), subblock.gate_up_bias.chunk(2), strict=True))
            w |= {"mlp.down_proj.bias": subblock.down_bias}
        return w
    width = subblock.sizes.shape.head_dim
    rows = [heads * width for heads in (subblock.heads, subblock.kv_heads, subblock.kv_heads)]
    for part, matrix in zip("qkv", subblock.qkv.split(rows), strict=True):
        w[f"self_attn.{part}_proj.weight"] = matrix
    w[reference.O_PROJ] = subblock.o
    if subblock.qkv_bias is not None and subblock.o_bias is not None:
        for part, bias in zip("qkv", subblock.qkv_bias.split(rows), strict=True):
            w[f"self_attn.{part}_proj.bias"] = bias
        w["self_attn.o_proj.bias"] = subblock.o_bias
    if subblock.qk_norm is not None:
        scales = torch.randn(2, width).abs() + 0.5
        subblock.qk_norm[: subblock.heads], subblock.qk_norm[subblock.heads :] = scales[0], scales[1]
        w |= {"self_attn.q_norm.weight": scales[0], "self_attn.k_norm.weight": scales[1]}
    return w


@pytest.mark.parametrize(
    ("shape", "layer"),
    [
        (SHAPE, "attention:kv2+ffn:512"),
        (SHAPE, "attention:kv1+ffn:256"),
        (SHAPE, "attention:linear+ffn:linear"),
        (replace(SHAPE, num_key_value_heads=4), "attention:kv4+ffn:256"),
        (replace(SHAPE, qkv_bias=True, mlp_bias=True), "attention:kv2+ffn:256"),
        (replace(SHAPE, qk_norm=True, head_dim=32), "attention:kv1+ffn:512"),
    ],
    ids=["grouped", "one-head", "linear", "as-many-heads", "biases", "qk-norm"],
)
def test_prefill_and_decode_are_the_layer(shape: ModelShape, layer: str) -> None:
    """Prefill of 11 tokens and a decode of the 12th are the layer's forward over 12 tokens."""
    torch.manual_seed(0)
    spec, made = LayerSpec.parse(layer), workshop(shape)
    subblocks = made.subblocks([spec.attention, spec.ffn])
    w: dict[str, Tensor] = {}
    for subblock, attention in zip(subblocks, (True, False), strict=True):
        assert isinstance(subblock, (Attention, FFN, Linear))
        w |= llama_tensors(subblock, attention)
    h = torch.randn(3, 12, 64)
    with inference():
        expected = reference.layer_forward(w, h, math(made.sizes, 12))
        read = run_chain(subblocks, "prefill", h[:, :11])
        step = run_chain(subblocks, "decode", h[:, 11:])
    assert (expected - h).abs().max() > 0.5
    torch.testing.assert_close(read, expected[:, :11], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(step, expected[:, 11:], atol=2e-4, rtol=1e-4)


def test_the_cache_may_be_in_another_dtype() -> None:
    torch.manual_seed(0)
    made, h = workshop(SHAPE, kv_dtype="bfloat16"), torch.randn(3, 12, 64)
    (attention,) = made.subblocks([AttentionSpec("kv", 2)])
    assert isinstance(attention, Attention) and attention.keys.dtype == torch.bfloat16
    with inference():
        expected = reference.layer_forward(llama_tensors(attention, True), h, math(made.sizes, 12))
        run_chain([attention], "prefill", h[:, :11])
        step = run_chain([attention], "decode", h[:, 11:])
    assert step.dtype == torch.float32 and 0 < (step - expected[:, 11:]).abs().max() < 0.05


def test_a_model_enters_by_the_embedding_and_leaves_by_the_head_of_the_last_token() -> None:
    made = workshop(SHAPE)
    ends, tokens = made.ends(), made.tokens("prefill")
    with inference():
        chosen = run_model(ends, [], "prefill", tokens)
    h = ends.table[tokens[:, -1]]
    assert chosen.tolist() == (h * (h.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() @ ends.head.T).argmax(-1).tolist()
    tied = workshop(replace(SHAPE, tie_word_embeddings=True)).ends()
    assert tied.table.data_ptr() == tied.head.data_ptr() != ends.table.data_ptr() != ends.head.data_ptr()


def test_a_rank_holds_its_part() -> None:
    made = workshop(SHAPE, tp=2)
    kv, ffn, linear = made.subblocks([AttentionSpec("kv", 2), FFNSpec("width", 512), FFNSpec("linear")])
    assert isinstance(kv, Attention) and (kv.heads, kv.kv_heads) == (2, 1)
    assert (kv.qkv.shape, kv.o.shape, kv.keys.shape) == ((64, 64), (64, 32), (3, 1, 13, 16))
    assert isinstance(ffn, FFN) and ffn.gate_up.shape == (512, 64) and ffn.down.shape == (64, 256)
    assert isinstance(linear, Linear) and linear.matrix.shape == (64, 32)
    with inference():
        for phase in ("prefill", "decode"):
            h = made.stream(phase)
            assert run_chain([kv, ffn, linear], phase, h).shape == h.shape
    assert made.ends().head.shape == (150, 64)


def test_a_ring_gives_every_layer_of_the_parent_its_own_weights() -> None:
    made = workshop(SHAPE)
    layers = made.subblocks([AttentionSpec("kv", 2), FFNSpec("width", 512)] * 4)
    parts = [t for s in layers for t in vars(s).values() if isinstance(t, Tensor) and t.numel() > 64 * 16]
    own = [t for t in parts if t.untyped_storage().data_ptr() == made.weights.flat.untyped_storage().data_ptr()]
    spans = sorted((t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in own)
    assert len(spans) == 16 and all(end <= start for (_, end), (start, _) in pairwise(spans))
    caches = sorted(t.data_ptr() for t in parts if t.ndim == 4)
    assert len(set(caches)) == 8


def test_a_ring_starts_again_at_its_end_and_refuses_what_it_cannot_hold() -> None:
    ring = Ring(1000, torch.float32, CPU, 1.0)
    first, second, third = ring.take(30, 10), ring.take(40, 10), ring.take(300)
    assert first.is_contiguous() and (second.data_ptr() - first.data_ptr()) // 4 == 512
    assert third.data_ptr() == first.data_ptr()
    with pytest.raises(ConfigError, match="no memory for one tensor of 40 x 40; lower --batch"):
        ring.take(40, 40)


@pytest.mark.parametrize(
    ("batch", "prompt", "sequences"), [(4, 1024, 4), (16, 1024, 8), (6, 2000, 3), (7, 2000, 1), (2, 99_999, 1)]
)
def test_prompts_are_read_in_equal_slices(batch: int, prompt: int, sequences: int) -> None:
    sizes = Sizes(SHAPE, Scenario(batch=batch, context=prompt + 1, prompt=prompt), CPU)
    assert (sizes.sequences, sizes.slices) == (sequences, batch // sequences)


# What is measured


def test_candidates_are_all_that_a_layer_may_be_as_built() -> None:
    shape = replace(SHAPE, intermediate_size=1000)
    child = Architecture((LayerSpec(AttentionSpec("linear"), FFNSpec("width", 300)),) * 4)
    assert [str(spec) for spec in candidates(DEFAULT, shape, [child])] == [
        "attention:kv2",
        "attention:kv1",
        "attention:skip",
        "attention:linear",
        "ffn:1024",
        "ffn:768",
        "ffn:512",
        "ffn:256",
        "ffn:skip",
    ]


@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
def test_a_made_child_is_mixed_and_of_its_size(share: float) -> None:
    llama = ModelShape(4096, 14_336, 32, 32, 8, 128, 128_256)
    child, costs = made_child(DEFAULT, llama, Scenario(), share), CostModel(llama, Scenario())
    parent = costs.parent_cost().total_bytes - costs.fixed_bytes
    assert share - 0.03 < (costs.cost(child).total_bytes - costs.fixed_bytes) / parent <= share
    assert len(set(child)) >= 8 and child[0].attention.kind == "kv"
    assert all(layer in DEFAULT.layer_candidates(llama, index) for index, layer in enumerate(child))


class Counting:
    """A stopwatch for which every subblock costs by its kind, and starting a work 700 ns: no noise, no computing.

    An attention takes 100 ns and 10 for each KV head, an FFN 1 ns for each channel, a linear 50; twice that in prefill.
    """

    def __init__(self, stop_in_round: int | None = None) -> None:
        self.passes, self.stop_in_round = 0, stop_in_round

    def prepare(self, work: Work) -> Work:
        return work

    def time(self, works: Sequence[Work], advance: Advance) -> list[float]:
        if self.stop_in_round is not None and self.passes >= 2 * self.stop_in_round:
            raise KeyboardInterrupt
        self.passes += 1
        return [self.cost(work) for work in works]

    def cost(self, work: Any) -> float:
        assert isinstance(work, partial)
        start, arguments = (700, work.args) if work.func is run_chain else (700 + 4000, work.args[1:])
        chain, phase = arguments[0], arguments[1]
        return start + (2.0 if phase == "prefill" else 1.0) * sum(self.one(subblock) for subblock in chain)

    @staticmethod
    def one(subblock: object) -> float:
        if isinstance(subblock, Attention):
            return 100 + 10 * subblock.kv_heads
        return float(subblock.down.shape[1]) if isinstance(subblock, FFN) else 50.0


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def use(**settings: Any) -> None:
        monkeypatch.setattr(bench_module, "make_timer", lambda device: Counting(**settings))

    return use


def measured(out: Path, scenario: Scenario, effort: Effort, share: float = 0.5, shape: ModelShape = SHAPE) -> Profile:
    space = load_space("default", "transformers")
    child = made_child(space, shape, scenario, share)
    specs = candidates(space, shape, [child])
    return run_bench(shape, scenario, specs, {"child": child}, CPU, effort, Reporter(True), out, {"command": "x"})


def test_slopes_remove_the_start_and_sums_are_the_models(counting: Callable[..., None], tmp_path: Path) -> None:
    counting()
    scenario = replace(SMALL, batch=4, prompt=4096, output=4, context=4100)  # read two sequences at a time
    profile = measured(tmp_path / "p.json", scenario, Effort(3, (2, 6), (3, 5)))
    one = {name: (1e6 * entry.prefill_ms, 1e6 * entry.decode_ms) for name, entry in profile.entries.items()}
    assert one["attention:kv2"] == pytest.approx((2 * 2 * 120, 120))
    assert one["attention:kv1"] == pytest.approx((2 * 2 * 110, 110))
    assert one["attention:linear"] == one["ffn:linear"] == pytest.approx((2 * 2 * 50, 50))
    assert one["ffn:512"] == pytest.approx((2 * 2 * 512, 512))
    assert one["attention:skip"] == one["ffn:skip"] == (0, 0)
    assert 1e6 * profile.entries["ffn:512"].decode_chained_ms == pytest.approx(512 + 700 / 5)
    assert 1e6 * profile.entries["ffn:512"].prefill_chained_ms == pytest.approx(2 * (2 * 512 + 700 / 6))
    assert (1e6 * profile.fixed.prefill_ms, 1e6 * profile.fixed.decode_ms) == pytest.approx((2 * 4700, 4700))
    assert [check.label for check in profile.checks] == ["parent", "child"]
    for check in profile.checks:
        assert check.prefill_error == pytest.approx(0, abs=1e-9) and check.decode_error == pytest.approx(0, abs=1e-9)
    parent = profile.checks[0]
    assert 1e6 * parent.decode_measured_ms == pytest.approx(4700 + 4 * (120 + 512))


def test_what_whole_rounds_say_survives_an_interrupt(counting: Callable[..., None], tmp_path: Path) -> None:
    counting(stop_in_round=2)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path / "p.json", SMALL, Effort(5, (1, 3), (1, 3)))
    kept = Profile.load(tmp_path / "p.json")
    assert kept.about["rounds"] == 2 and 1e6 * kept.entries["ffn:512"].decode_ms == pytest.approx(512)
    counting(stop_in_round=0)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path / "q.json", SMALL, Effort(5, (1, 3), (1, 3)))
    assert not (tmp_path / "q.json").exists()


def test_medians_and_spreads_are_those_of_the_rounds() -> None:
    assert spread([1.0]) == 0.0 and spread([2.0, 2.0, 2.0]) == 0.0
    assert spread([80.0, 90.0, 100.0, 110.0, 1000.0]) == pytest.approx(0.1)  # quartiles 90 and 110


def test_a_call_takes_as_long_as_it_takes() -> None:
    def busy(milliseconds: float) -> Work:
        return partial(time.sleep, milliseconds / 1e3)

    timer, steps = CallTimer(), []
    short, long = timer.time([timer.prepare(busy(5)), timer.prepare(busy(20))], lambda: steps.append(1))
    assert 5e6 <= short < 2e9 and 20e6 <= long < 2e9 and len(steps) == 2


class WorkClock(TorchDispatchMode):
    """A stopwatch that no other process disturbs: a nanosecond for each multiplication, and for each number written."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.now += sum(each.numel() for each in tree_leaves(out) if isinstance(each, Tensor))
        if count := flop_registry.get(func.overloadpacket):
            self.now += count(*args, **(kwargs or {}), out_val=out)
        return out


def test_the_sum_of_the_parts_is_the_assembled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times twice too long, a phase for the other, or a missed subblock would all break it."""
    with WorkClock() as clock:
        monkeypatch.setattr("nas.timing.time", SimpleNamespace(perf_counter_ns=lambda: clock.now))
        shape = ModelShape(128, 1024, 6, 8, 4, 16, 512)
        profile = measured(tmp_path / "p.json", SMALL, Effort(1, (1, 3), (1, 3)), shape=shape)
    for check in profile.checks:
        assert check.prefill_predicted_ms == pytest.approx(check.prefill_measured_ms, rel=1e-9)
        assert check.decode_predicted_ms == pytest.approx(check.decode_measured_ms, rel=1e-9)
    parent, child = profile.checks
    assert (
        child.prefill_measured_ms < parent.prefill_measured_ms and child.decode_measured_ms < parent.decode_measured_ms
    )


# The command


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def test_the_command_measures_and_writes_a_clock(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "profiles" / "mine.json"
    said = succeed("bench", "--shape", config, "--out", out, "--repeats", 2, *FLAGS)
    for text in ("attention:kv2", "ffn:skip", "fixed", "parent  prefill", "half ", "tokens/s", f"{out} written"):
        assert text in said.out
    scenario = replace(SMALL, context=32)
    clock = load_clock(str(out), SHAPE, scenario)
    layer = clock.layer(SHAPE.parent_layer)
    assert not clock.estimate and layer.prefill_ns > 0 and layer.decode_ns > 0 and clock.device.endswith("(CPU)")
    content = json.loads(out.read_text())
    assert content["rounds"] == 2 and content["command"].startswith("nas bench --shape") and content["torch"]
    with pytest.raises(ConfigError, match="--batch 2, not 4"):
        load_clock(str(out), SHAPE, replace(scenario, batch=4))


def test_machine_output_is_the_profile(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = succeed("bench", "--shape", config, "--repeats", 1, "--json", "--space", "quick", *FLAGS).json
    (written,) = (tmp_path / "profiles").glob("*.json")
    assert json.loads(written.read_text()) == content and content["name"] == f"profiles/{written.name}"


def test_a_dry_run_measures_nothing(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = succeed("bench", "--shape", config, "--dry-run", "--json", "--target", "transformers", *FLAGS).json
    assert plan["candidates"][:4] == ["attention:kv2", "attention:kv1", "attention:linear", "attention:skip"]
    assert (plan["prompt"], plan["attended"], plan["assembled"]) == (16, 24, ["parent", "half"])
    assert not (tmp_path / "profiles").exists()
    assert "ffn:256" in succeed("bench", "--shape", config, "--dry-run", *FLAGS).out


def test_a_run_brings_its_space_and_its_chosen_child(world: Any, tmp_path: Path) -> None:
    run = world.copy("searched", tmp_path / "run")
    chosen = Architecture.load(run / "architecture.json")
    subject = find_subject(SMALL, run=run)
    rounded = tmp_path / "architecture.json"
    rounded.write_text(json.dumps({"layers": chosen.at("fp8").to_list()}))
    in_formats = find_subject(SMALL, run=run, architecture=rounded)
    assert in_formats.children == subject.children and in_formats.specs() == subject.specs()
    assert subject.children == {"chosen": chosen} and subject.space.name == "default"
    assert {str(layer.ffn) for layer in chosen} <= {str(spec) for spec in subject.specs()}
    assert find_subject(SMALL, run=world.copy("scored", tmp_path / "scored")).children.keys() == {"half"}
    assert find_subject(SMALL, parent=str(world.parent)).shape == subject.shape


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--parent", "x", "--shape", "CONFIG"), "give one of --run, --parent and --shape"),
        (("--shape", "CONFIG", "--tp", 3), "--tp 3 does not divide"),
        (("--shape", "CONFIG", "--repeats", 0), "--repeats must be at least 1"),
        (("--shape", "CONFIG", "--space", "defualt"), "no such recipe"),
        (("--shape", "CONFIG", "--architecture", "OTHER"), "has 2 layers, the parent 4"),
        (("--shape", "CONFIG", "--prompt", 30, "--output", 30), "exceed --context 32"),
    ],
)
def test_wrong_wishes_end_with_code_2(config: Path, tmp_path: Path, arguments: tuple[object, ...], said: str) -> None:
    other = tmp_path / "architecture.json"
    other.write_text(json.dumps({"layers": ["attention:kv2+ffn:512"] * 2}))
    words = [{"CONFIG": config, "OTHER": other}.get(str(word), word) for word in arguments]
    result = nas("bench", *words, *FLAGS)
    assert result.code == 2 and said in result.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read"),
        ({"hidden_size": 3}, "cannot be a parent"),
        (CONFIG | {"hidden_act": "gelu"}, "hidden_act is gelu"),
        (CONFIG | {"num_key_value_heads": 3}, "3 KV heads do not divide"),
    ],
)
def test_a_shape_that_cannot_be_read_or_cut_is_refused(
    tmp_path: Path, content: dict[str, Any] | None, said: str
) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(json.dumps(content))
    result = nas("bench", "--shape", path, *FLAGS)
    assert result.code == 1 and said in result.err.splitlines()[-1]


def test_repeats_are_the_rounds() -> None:
    assert effort_for(CPU, None).rounds == 5 and effort_for(CPU, 3) == replace(effort_for(CPU, None), rounds=3)
    assert effort_for(torch.device("cuda"), None).rounds == 20


def test_the_benchmark_runs_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import clocks

    clocks.main(["--small", "--rounds", "2", "--out", str(tmp_path / "clocks.json")])
    said = capsys.readouterr().out
    assert [check.label for check in Profile.load(tmp_path / "clocks.json").checks] == [
        "parent",
        "mild",
        "half",
        "deep",
        *(f"{share} {kind}" for share in ("mild", "half", "deep") for kind in ("contiguous", "fused")),
    ]
    for text in ("| ffn:1024 |", "| deep |", "error of plain means", "largest error of a child", "tokens/s predicted"):
        assert text in said
    assert "deep: layers 2-5 without attention, FFNs 2-4 fused to 768 channels" in said
    table = said.partition("x unfused: prefill | decode | request |")[2]
    rows = {cells[0]: cells for line in table.splitlines() if (cells := line.strip("| ").split(" | "))[0]}
    assert [label for label in rows if rows[label][-1].endswith(" x") and len(rows[label]) == 11] == [
        f"{share} fused" for share in ("mild", "half", "deep")
    ]
    for share in ("mild", "half", "deep"):  # a fused child against its unfused one, not against the parent
        fused, unfused = (float(rows[f"{share} {kind}"][3].removesuffix(" x")) for kind in ("fused", "contiguous"))
        assert float(rows[f"{share} fused"][8].removesuffix(" x")) == pytest.approx(fused / unfused, rel=2e-3)
    sys.modules.pop("clocks")


def test_the_benchmark_fuses_children_of_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import clocks

    shape, scenario = clocks.LLAMA_8B, Scenario(batch=16, context=2048)
    costs, children = CostModel(shape, scenario), clocks.children_of(load_space("default"), shape, scenario, None)
    for share, bare in (("mild", 6), ("half", 16), ("deep", 22)):
        made, unfused, fused = (children[name] for name in (share, f"{share} contiguous", f"{share} fused"))
        skipped = [index for index, layer in enumerate(unfused) if layer.attention.kind == "skip"]
        assert skipped == list(range(28 - bare, 28)) and all(layer.ffn.kind == "width" for layer in unfused)
        sizes = [costs.cost(child).total_bytes for child in (made, unfused, fused)]
        assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
        assert sizes[1] - sizes[2] == (bare - 2) * 4096 * 2  # all norms but one of the fused FFNs
        assert [fused[index] for index in range(27, 32)] == [unfused[index] for index in range(27, 32)]
        assert fused[28 - bare].ffn.width == sum(unfused[index].ffn.width for index in skipped[:-1])
    short = clocks.runs_of(children["half contiguous"], 4)
    assert short == [(12, 13, 14, 15), (16, 17, 18, 19), (20, 21, 22, 23), (24, 25, 26)]
    sys.modules.pop("clocks")
