"""Children that compute in number formats, and quantization-aware distillation: what is learned is what will be served."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from app import HEALING, World, nas, succeed
from healing_run import CONFIG, IN_FORMATS, QAD, packs, tiny_pair
from safetensors.torch import load_file
from tiny import tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import blocks.rounded_model
from blocks.checkpoint import load_child, read_architecture, write_child
from blocks.child.layout import shape_of
from blocks.errors import CheckpointError, ConfigError, UnsupportedModelError
from blocks.formats import FORMATS, Integer
from blocks.layer import LayerMath, layer_forward
from blocks.parent import open_parent
from blocks.rounded import round_layer
from blocks.rounded_model import round_model, roundings, unround_model
from blocks.spec import Architecture
from distill.config import DistillConfig
from distill.decoder import last_hidden, prepare
from distill.evaluation import evaluate
from distill.memory import healing_memory
from distill.progress import HealResult
from distill.stages import Stage, frozen_copy, heal_in_stages, stage_names
from distill.trainer import heal
from nas.commands.distill import child_of
from nas.data import load_pack
from nas.heal_stages import FULL_RATE_KL, build_stages
from nas.measure import measure
from nas.packed_export import made_for_nearest
from nas.progress import Reporter

MIXED = Architecture.from_list(
    [
        "attention:kv2@nvfp4+ffn:256@fp8",
        "attention:linear@fp8+ffn:linear@int4-g32",
        "attention:skip+ffn:512@int3",
        "attention:kv1+ffn:skip",
    ]
)
TOKENS = torch.randint(256, (3, 19), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def child_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A child of all kinds of subblocks in several formats."""
    from test_heal_child import cut_from

    directory = tmp_path_factory.mktemp("child")
    parent_dir = tiny_llama(directory / "parent")
    write_child(
        directory / "child", parent_dir, MIXED, cut_from(AutoModelForCausalLM.from_pretrained(parent_dir)), "bfloat16"
    )
    return directory / "child"


def by_layers(model: Any, architecture: Architecture) -> Tensor:
    """The last hidden states by `round_layer` and `layer_forward`, of the master weights."""
    with torch.no_grad():
        hidden = model.model.embed_tokens(TOKENS)
        rotary = LayerMath.of(model.config, TOKENS.shape[1], "cpu", torch.float32)
        for layer, spec in zip(model.model.layers, architecture, strict=True):
            hidden = layer_forward(round_layer(dict(layer.state_dict()), spec), hidden, rotary)
        normed: Tensor = model.model.norm(hidden)
    return normed


def hidden_of(model: Any) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = model.model(TOKENS, use_cache=False).last_hidden_state
    return hidden


# What is computed


@pytest.mark.parametrize("name", FORMATS)
def test_a_rounded_parent_is_its_rounded_layers(name: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    parent = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=256, initializer_range=0.2)).eval()
    architecture = Architecture.from_list(["attention:kv2+ffn:256"] * 2).at(name)
    expected, plain = by_layers(parent, architecture), hidden_of(parent)
    names = list(parent.state_dict())
    round_model(parent, architecture)
    assert torch.equal(hidden_of(parent), expected) and list(parent.state_dict()) == names
    assert torch.equal(plain, expected) == (name == "bf16")
    assert prepare(parent)
    with torch.no_grad():
        torch.testing.assert_close(last_hidden(parent, TOKENS, None), expected, rtol=1e-6, atol=1e-6)
    unround_model(parent)
    assert torch.equal(hidden_of(parent), plain) and not list(roundings(parent))


def test_a_child_is_loaded_as_it_is_served_or_as_its_master(child_dir: Path) -> None:
    served, master = load_child(child_dir), load_child(child_dir, rounded=False)
    assert not list(roundings(master)) and len(list(roundings(served))) == 8
    expected = by_layers(master, MIXED)
    assert torch.equal(hidden_of(served), expected) and not torch.equal(hidden_of(master), expected)
    assert all(torch.equal(tensor, master.state_dict()[name]) for name, tensor in served.state_dict().items())
    assert torch.equal(hidden_of(copy.deepcopy(served)), expected)
    assert prepare(served)
    with torch.no_grad():
        torch.testing.assert_close(last_hidden(served, TOKENS, None), expected, rtol=1e-5, atol=1e-5)
    half = load_child(child_dir, torch.bfloat16)
    assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert hidden_of(half).isfinite().all()
    for one, other in zip(roundings(half), roundings(served), strict=True):  # bf16 on disk, so of the same numbers
        assert torch.equal(one.values(torch.bfloat16), other.values(torch.float32).bfloat16())


def test_matrices_rounded_together_are_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    parent = tiny_pair()[1]
    for index, parameter in enumerate(parent.parameters()):
        parameter.data.mul_(1.7**index)  # each with a divisor of its own
    at_once = round_model(copy.deepcopy(parent), Architecture.from_list(["attention:kv2+ffn:256"] * 2).at("nvfp4a16"))
    groups = {id(each.together): len(each.together) for each in roundings(at_once)}
    assert sorted(groups.values()) == [2, 6]  # by the number of inputs: down_proj, and all others
    monkeypatch.setattr(blocks.rounded_model, "AT_ONCE", 100)
    alone = round_model(copy.deepcopy(parent), Architecture.from_list(["attention:kv2+ffn:256"] * 2).at("nvfp4a16"))
    for one, other in zip(roundings(alone), roundings(at_once), strict=True):
        assert one.together == [one]
        assert torch.equal(one.values(torch.float32), other.values(torch.float32))


def test_what_cannot_be_rounded_is_refused() -> None:
    parent = tiny_pair()[0]
    with pytest.raises(ConfigError, match=r"int4: model.layers.0.self_attn.q_proj has 32 inputs, not a multiple of"):
        round_model(parent, Architecture.from_list(["attention:kv2+ffn:256"] * 2).at("int4"))

    class Other(nn.Linear):
        pass

    parent.model.layers[1].mlp.up_proj.__class__ = Other
    with pytest.raises(UnsupportedModelError, match="up_proj is a Other"):
        round_model(parent, Architecture.from_list(["attention:kv2+ffn:256"] * 2).at("fp8"))


# How it learns


def test_gradients_pass_straight_through_by_hand() -> None:
    model = tiny_pair()[0]
    module = model.model.layers[0].self_attn.o_proj
    with torch.no_grad():
        module.weight.zero_()
        module.weight[0, :6] = torch.tensor([7.5, -7.5, 1.5, 2.5, -0.5, 0.51])
    round_model(model, Architecture.from_list(["attention:kv2@int4-g32+ffn:256"] * 2))
    x = torch.zeros(1, 32)
    x[0, :6] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    x.requires_grad_()
    out = module(x)
    # A step of 1; the largest is cut to 7, ties go to even: 7 - 8 * 2 + 2 * 3 + 2 * 4 + 0 + 6.
    assert out[0, 0].item() == 7 - 16 + 6 + 8 + 0 + 6 and not out[0, 1:].any()
    (3 * out[0, 0]).backward()
    assert x.grad is not None and module.weight.grad is not None
    assert x.grad[0, :6].tolist() == [21, -24, 6, 6, 0, 3]  # of what is multiplied, the codes
    assert module.weight.grad[0, :6].tolist() == [
        3,
        6,
        9,
        12,
        15,
        18,
    ]  # as if nothing were rounded, the cut one included


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "int3"])
def test_gradients_are_those_of_what_is_multiplied(name: str) -> None:
    """Of q, k and v as one, against the formulas of a matrix product."""
    torch.manual_seed(0)
    weights = [torch.randn(rows, 64, requires_grad=True) for rows in (24, 8, 8)]
    holder = nn.Module()
    holder.self_attn = nn.Module()  # type: ignore[assignment]
    for proj, weight in zip("qkv", weights, strict=True):
        module = nn.Linear(64, len(weight), bias=False)
        module.weight = nn.Parameter(weight.detach().clone())
        setattr(holder.self_attn, f"{proj}_proj", module)
    wrapper: Any = nn.Module()
    wrapper.model = nn.Module()
    wrapper.model.layers = nn.ModuleList([holder])
    round_model(wrapper, Architecture.from_list([f"attention:kv1@{name}+ffn:256"]))
    q_proj: Any = holder.self_attn.q_proj  # type: ignore[union-attr]
    rounding, format = q_proj.rounding, FORMATS[name]
    x, direction = torch.randn(5, 64, requires_grad=True), torch.randn(5, 40)
    divisor = format.divisor(*weights)
    fake = torch.cat([format.fake(weight.detach(), divisor) for weight in weights])
    fake_x = format.fake_input(x.detach())
    out = nn.functional.linear(rounding.inputs(x), rounding.weight(torch.float32))
    assert torch.equal(out, fake_x @ fake.T)
    (out * direction).sum().backward()
    torch.testing.assert_close(x.grad, direction @ fake)
    found = torch.cat([module.weight.grad for module in rounding.modules])
    torch.testing.assert_close(found, direction.T @ fake_x)


def test_rounded_weights_are_made_once_until_one_changes(child_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = blocks.rounded_model._round
    monkeypatch.setattr(
        blocks.rounded_model, "_round", lambda each, dtype: (calls.append(len(each)), plain(each, dtype))[1]
    )
    child: Any = load_child(child_dir)
    first = hidden_of(child)
    made = len(calls)
    assert sum(calls) == 8 and torch.equal(hidden_of(child), first) and len(calls) == made
    child(TOKENS).logits.sum().backward()  # a model that learns keeps them too: the step has several micro-batches
    assert len(calls) == made
    with torch.no_grad():
        child.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    changed = hidden_of(child)
    assert len(calls) == made + 1 and not torch.equal(changed, first)
    assert torch.equal(changed, hidden_of(copy.deepcopy(child)))
    for rounding in roundings(child):
        rounding.keeps = False
    assert torch.equal(hidden_of(child), changed)


def run(out_dir: Path, config: DistillConfig = QAD, **options: Any) -> HealResult:
    teacher, student = tiny_pair(noise=0.02)
    return heal(config, teacher, round_model(student, IN_FORMATS), *packs(), out_dir, **options)


def test_what_is_evaluated_is_the_rounded_student(tmp_path: Path) -> None:
    """After steps of a fused optimizer, which changes weights without raising their versions."""
    result = run(tmp_path, replace(QAD, eval_tokens=0))
    teacher, student = tiny_pair(noise=0.02)
    assert evaluate(teacher, round_model(copy.deepcopy(student), IN_FORMATS), packs()[1], sequence_length=16).kl == (
        pytest.approx(result.before.kl, rel=1e-6)
    )
    weights = load_file(result.best_path)
    student.load_state_dict(weights, strict=False)
    masters = evaluate(teacher, student, packs()[1], sequence_length=16).kl
    served = evaluate(teacher, round_model(student, IN_FORMATS), packs()[1], sequence_length=16).kl
    assert served == pytest.approx(result.best.kl, rel=1e-6) and masters != pytest.approx(served, rel=1e-2)
    assert result.best.kl < 0.9 * result.before.kl


def test_a_stage_without_qad_learns_as_the_master(tmp_path: Path) -> None:
    config = replace(QAD, qad=False)
    teacher, student = tiny_pair(noise=0.02)
    plain = heal(config, teacher, student, *packs(), tmp_path / "plain")
    assert run(tmp_path / "rounded", config).evaluations == plain.evaluations
    with pytest.raises(ConfigError, match="qad: the child has no precisions"):
        heal(QAD, *tiny_pair(), *packs(), tmp_path / "none")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_and_resumed_equals_never_stopped(tmp_path: Path, optimizer: str) -> None:
    config = replace(QAD, optimizer=optimizer)
    whole = run(tmp_path / "whole", config)

    def stop(progress: Any) -> None:
        if progress.step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", config, on_step=stop)
    again = run(tmp_path / "cut", config)
    assert again.evaluations == whole.evaluations
    best, other = (load_file(result.best_path) for result in (whole, again))
    assert all(torch.equal(best[name], other[name]) for name in best)
    teacher, student = tiny_pair(noise=0.02)
    with pytest.raises(CheckpointError, match="another run: formats was"):
        heal(config, teacher, round_model(student, IN_FORMATS.at("fp8")), *packs(), tmp_path / "cut")


def test_micro_batches_and_recomputed_activations_do_not_change_the_result(tmp_path: Path) -> None:
    wanted = run(tmp_path / "one")
    for name, config in (
        ("two", replace(QAD, micro_batch=4)),
        ("again", replace(QAD, checkpoint_activations=True)),
    ):
        assert run(tmp_path / name, config).after.kl == pytest.approx(wanted.after.kl, rel=1e-4)


def test_two_ranks_learn_as_one_does(tmp_path: Path) -> None:
    """DDP, and FSDP2, under which matrices are whole only while they are rounded."""
    script, cases = Path(__file__).with_name("healing_run.py"), ["qad:2", "qad-sharded:2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent.parent), str(script.parent)])}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), *cases], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {case: [0, 0] for case in cases}, done.stderr
    teacher, student = tiny_pair()
    heal(QAD, teacher, round_model(student, IN_FORMATS), *packs(), tmp_path / "alone")

    def curve(name: str) -> list[float]:
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [line["loss" if line["kind"] == "train" else "kl"] for line in lines]

    for case in cases:
        assert curve(case) == pytest.approx(curve("alone"), rel=1e-3)


# What it is for


VOCABULARY = 64


def chain(sample: int, sequences: int) -> np.ndarray:
    """Text of one Markov chain."""
    rates = np.exp(2.5 * np.random.default_rng(1).normal(size=(VOCABULARY, VOCABULARY)))
    upto = (rates / rates.sum(1, keepdims=True)).cumsum(1)
    rng = np.random.default_rng([sample, 7])
    text = np.zeros((sequences, 33), np.uint16)
    text[:, 0] = rng.integers(VOCABULARY, size=sequences)
    for at in range(1, 33):
        text[:, at] = np.minimum((rng.random(sequences)[:, None] > upto[text[:, at - 1]]).sum(1), VOCABULARY - 1)
    return text


TRAINING = DistillConfig(
    tokens=100 * 512,
    sequence_length=32,
    batch_sequences=16,
    micro_batch=16,
    learning_rate=1e-3,
    eval_every=0,
    eval_tokens=0,
    checkpoint_every=0,
    spike=0.0,
    device="cpu",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny Llama that has learned the chain."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=VOCABULARY, tie_word_embeddings=True)
    teacher, model = LlamaForCausalLM(config), LlamaForCausalLM(config)
    told = replace(TRAINING, loss="ce", learning_rate=1e-2)
    result = heal(told, teacher, model, chain(0, 600), chain(1, 20), tmp_path_factory.mktemp("parent"))
    assert result.best.student_ce < 0.6 * math.log(VOCABULARY)
    return model


def qad_of(trained: Any, name: str, loss: str, out_dir: Path) -> HealResult:
    """A parent rounded to one format and trained so, on new text of the same chain."""
    student = round_model(copy.deepcopy(trained), Architecture.from_list(["attention:kv2+ffn:256"] * 2).at(name))
    config = replace(TRAINING, qad=True, loss=loss)
    return heal(config, copy.deepcopy(trained), student, chain(2, 600), chain(3, 32), out_dir)


def test_kl_recovers_what_rounding_lost_and_cross_entropy_drives_away(trained: Any, tmp_path: Path) -> None:
    """The published pattern (arXiv 2601.20088), on text of the very distribution that the parent was trained on."""
    by_kl, by_ce = (qad_of(trained, "int3", loss, tmp_path / loss) for loss in ("kl", "ce"))
    rounded = by_kl.before.kl
    assert rounded == by_ce.before.kl > 0.005
    assert by_kl.after.kl < rounded / 4
    assert by_ce.after.kl > 2 * rounded
    assert by_ce.after.student_ce < by_ce.before.student_ce  # it does learn the text; it leaves the parent


def test_a_format_of_ones_own(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "int2", Integer("int2", 2, group=32))
    result = qad_of(trained, "int2", "kl", tmp_path)
    assert result.before.kl > 0.02 and result.after.kl < result.before.kl / 3


# Stages, and the command


def test_stages_from_master_to_rounded_and_the_healed_as_teacher(tmp_path: Path) -> None:
    first = replace(CONFIG, tokens=4 * CONFIG.step_tokens)
    configs = [first, replace(QAD, tokens=first.tokens, teacher="healed")]
    assert stage_names([*configs, replace(QAD, loss="ce")]) == ["1-kl", "2-qad", "3-qad-ce"]
    asked: list[str] = []

    def load_pair(config: DistillConfig) -> tuple[nn.Module | None, nn.Module]:
        asked.append(config.teacher)
        teacher, student = tiny_pair()
        if config.qad:
            round_model(student, IN_FORMATS)
        return (None if config.teacher == "healed" else teacher), student

    train, heldout = packs()
    results = heal_in_stages([Stage(config, train) for config in configs], load_pair, heldout, tmp_path)
    assert asked == ["parent", "healed"]
    student = tiny_pair()[1]
    student.load_state_dict(load_file(results[0].best_path), strict=False)
    teacher = frozen_copy(student, "float32")
    assert all(torch.equal(p, p.bfloat16().float()) for p in teacher.parameters())
    for dtype in "float32", "bfloat16":
        kept, own = dict(frozen_copy(student, dtype).named_buffers()), dict(student.named_buffers())
        assert kept.keys() == own.keys() and all(torch.equal(kept[name], own[name]) for name in own)
    alone = heal(configs[1], teacher, round_model(student, IN_FORMATS), train, heldout, tmp_path / "alone")
    assert alone.evaluations == results[1].evaluations
    assert results[1].before.kl < 0.1  # from itself, but for rounding
    with pytest.raises(ConfigError, match=r"distill.teacher is 'healed'; it must be parent without qad"):
        DistillConfig(teacher="healed")


def test_a_child_with_precisions_is_trained_as_it_is_served_unless_told() -> None:
    def steps(recipe: dict[str, Any], flags: dict[str, Any], device: str = "cuda", **more: Any) -> list[Any]:
        stages = build_stages({"distill": recipe}, flags, device, rounded=True, **more)
        return [
            (each.qad, each.loss, each.tokens, pytest.approx(each.learning_rate), each.full_rate_kl, each.optimizer)
            for each in stages
        ]

    served = (True, "kl", 10_000_000, 1e-3, FULL_RATE_KL, "muon")
    assert steps({}, {}) == [served] == steps({}, {"qad": True}) == steps({"qad": True}, {})
    assert steps({}, {}, width=5760) == [(*served[:3], 1e-4, *served[4:])]  # the rate falls with the width,
    assert steps({}, {}, width=64) == [served]  # and is no larger in narrower models
    assert steps({}, {}, device="cpu", width=5760) == [(True, "kl", 32_768, 7.1e-6, FULL_RATE_KL, "adamw")]
    assert steps({}, {"optimizer": "adamw"}) == [(*served[:3], 7.1e-5, FULL_RATE_KL, "adamw")]
    assert steps({}, {"learning_rate": 1e-6}, width=5760) == [(*served[:3], 1e-6, None, "muon")]
    assert steps({"loss": "ce"}, {}, width=5760) == [(True, "ce", 10_000_000, 1e-4, None, "muon")]
    assert steps({}, {"qad": False}) == [(False, *served[1:])] == steps({"qad": False}, {})
    assert [each.qad for each in build_stages({}, {}, "cuda")] == [False]
    # Two stages, where anything of the second is given.
    master = (False, "kl", 7_500_000, 1e-3, FULL_RATE_KL, "muon")
    assert steps({}, {}, qad_tokens=2_500_000) == [master, (True, "kl", 2_500_000, *served[3:])]
    assert steps({}, {}, qad_learning_rate=1e-6) == [master, (True, "kl", 2_500_000, 1e-6, None, "muon")]
    flags = {"tokens": 1000, "learning_rate": 0.1, "loss": "jsd", "teacher": "healed"}
    assert steps({"optimizer": "adamw"}, flags, qad_tokens=100, qad_learning_rate=1e-6) == [
        (False, "jsd", 900, 0.1, None, "adamw"),
        (True, "kl", 100, 1e-6, None, "adamw"),
    ]
    teachers = [each.teacher for each in build_stages({}, flags, "cuda", rounded=True, qad_tokens=100)]
    assert teachers == ["parent", "healed"]
    listed = {"stages": [{"tokens": 5000}, {"qad": True, "tokens": 500}, {"qad": True, "learning_rate": 1e-4}]}
    assert [each[:4] for each in steps(listed, {}, width=5760)] == [
        (False, "kl", 5000, 1e-3),
        (True, "kl", 500, 1e-4),
        (True, "kl", 10_000_000, 1e-4),
    ]
    for recipe, given, more, message in (
        (listed, {"qad": True}, {}, "--qad: the recipe has 3 stages"),
        ({}, {"qad": True}, {"qad_tokens": 5}, "--qad-tokens is of the second stage .*; write tokens instead"),
        ({}, {"tokens": 100}, {"qad_tokens": 100}, "--qad-tokens 100 of --tokens 100: each stage needs some"),
        ({}, {}, {"qad_learning_rate": -1.0}, "--qad-learning-rate is -1.0; it must be a positive number"),
    ):
        with pytest.raises(ConfigError, match=message):
            steps(recipe, given, **more)
    child = Architecture.from_list(["attention:skip+ffn:256"])
    with pytest.raises(ConfigError, match="qad: all matrices of this child are bf16"):
        DistillConfig(qad=True).suited_to(child)
    assert DistillConfig(qad=True).suited_to(child.at("fp8")).cosine == 0.0


def test_rounded_weights_are_counted_in_memory() -> None:
    shape = shape_of(tiny_pair()[0].config)
    child = Architecture((shape.parent_layer.at("fp8", "bf16"), shape.parent_layer.at("bf16", "int4")))
    attention, ffn = 32 * (32 + 16 + 16 + 32), 3 * 32 * 64
    table, matrices = 97 * 32, 2 * (attention + ffn)

    def rounded(qad: bool, ranks: int = 1, **settings: Any) -> int:
        config = DistillConfig(qad=qad, **settings)
        return healing_memory(config, shape, child, ranks=ranks).loss["rounded weights"]

    half: dict[str, Any] = {"compute_dtype": "bfloat16"}
    again: dict[str, Any] = {**half, "checkpoint_activations": True}
    assert rounded(False, **half) == rounded(True, **half) == 2 * (table + matrices)
    assert (rounded(False), rounded(True)) == (0, 4 * (attention + ffn))
    assert rounded(False, **again) == 2 * table
    assert rounded(True, **again) == 2 * (table + attention + ffn)  # kept from micro-batch to micro-batch
    assert rounded(True, ranks=2, sharding="full", **half) == 2 * (attention + ffn)
    assert rounded(True, ranks=2, sharding="full", **again) == 0


@pytest.fixture(scope="module")
def in_formats(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A searched run whose child was given precisions."""
    path = world.copy("searched", tmp_path_factory.mktemp("qad") / "run")
    found = json.loads((path / "architecture.json").read_text())
    architecture = Architecture(tuple(layer.at("int3", "nvfp4") for layer in Architecture.from_list(found["layers"])))
    weights = load_file(path / "child" / "model.safetensors")
    write_child(path / "child", world.parent, architecture, weights, "bfloat16")
    found["layers"] = architecture.to_list()
    (path / "architecture.json").write_text(json.dumps(found))
    return path


def test_a_run_is_healed_and_then_as_it_is_served(world: World, in_formats: Path) -> None:
    words = ("--qad-tokens", 256, "--qad-learning-rate", 1e-3)
    result = succeed("distill", "--run", in_formats, *HEALING, *words, "--json").json
    assert [stage["name"] for stage in result["stages"]] == ["1-kl", "2-qad"]
    assert child_of(in_formats) == {"rounded": True, "width": 64} and child_of(world.runs / "scored") == {}
    first, second = result["stages"]
    assert (first["tokens"], second["tokens"], second["config"]["qad"]) == (256, 256, True)
    assert second["before"]["kl"] > first["best"]["kl"] > 0  # what rounding costs
    assert second["best"]["kl"] < second["before"]["kl"]
    assert read_architecture(in_formats / "healed")[1] == read_architecture(in_formats / "child")[1]

    rows = {row["name"]: row for row in result["rows"]}
    served, master = rows["child after healing"], rows["child after healing, unrounded"]
    assert served["gb"] < master["gb"] == rows["child before healing, unrounded"]["gb"]
    assert served["kl"] != master["kl"] and "unrounded" in succeed("show", "--run", in_formats).out
    teacher = AutoModelForCausalLM.from_pretrained(world.parent, dtype=torch.float32)
    heldout = load_pack(in_formats / "data" / "heldout.npy")
    for row, rounded in ((served, True), (master, False)):
        healed = load_child(in_formats / "healed", rounded=rounded)
        assert evaluate(teacher, healed, heldout, sequence_length=32).kl == pytest.approx(row["kl"], rel=1e-5)
    assert "healed already" in nas("distill", "--run", in_formats, *HEALING, *words).err
    assert "as it is rounded to nearest" in made_for_nearest(in_formats / "healed")
    assert made_for_nearest(in_formats / "child") == made_for_nearest(in_formats) == ""


def test_by_default_it_is_trained_as_it_is_served_and_never_ends_worse(in_formats: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(in_formats, tmp_path / "run"))
    result = succeed("distill", "--run", run, "--restart", *HEALING, "--json").json
    (stage,) = result["stages"]
    assert (stage["name"], stage["config"]["qad"], stage["config"]["full_rate_kl"]) == ("1-qad", True, FULL_RATE_KL)
    assert stage["best"]["kl"] < stage["before"]["kl"]
    best = succeed("distill", "--run", run, *HEALING, "--restart", "--learning-rate", 0.5, "--json").json["healing"]
    assert best["best_step"] == 0 and best["best"] == best["before"]


def test_stages_that_harm_are_told(in_formats: Path, tmp_path: Path) -> None:
    """The master's best weights are not the best ones to round."""
    run = Path(shutil.copytree(in_formats, tmp_path / "run"))
    words = ("--tokens", 256, "--batch-sequences", 4, "--sequence-length", 32, "--qad-tokens", 128)
    said = succeed("distill", "--run", run, "--restart", *words, "--optimizer", "muon", "--qad-learning-rate", 1.0)
    assert "warning: the child is further from the parent than before healing" in said.err


def test_the_written_child_computes_what_was_evaluated(world: World, in_formats: Path) -> None:
    """Master weights are rounded to bf16 before they are rounded further, in training as on disk; norms and embeddings are not."""
    best = load_file(in_formats / "distill" / "2-qad" / "best" / "student.safetensors")
    trained: Any = load_child(in_formats / "child", rounded=False)
    trained.load_state_dict(best, strict=False)
    round_model(trained, through=torch.bfloat16)
    written = load_child(in_formats / "healed")
    pairs = list(zip(roundings(trained), roundings(written), strict=True))
    assert pairs and all(torch.equal(a.values(torch.float32), b.values(torch.float32)) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), written.parameters(), strict=True))
    teacher = AutoModelForCausalLM.from_pretrained(world.parent, dtype=torch.float32)
    heldout = load_pack(in_formats / "data" / "heldout.npy")
    before, after = (evaluate(teacher, each, heldout, sequence_length=32).kl for each in (trained, written))
    assert after == pytest.approx(before, rel=2e-2)


def test_measuring_takes_either(in_formats: Path, world: World) -> None:
    heldout = load_pack(in_formats / "data" / "heldout.npy")
    names = {"served": in_formats / "child", "master": in_formats / "child"}
    found = measure(
        open_parent(str(world.parent)), names, heldout, torch.device("cpu"), Reporter(True), unrounded={"master"}
    )
    assert found["served"]["kl"] > found["master"]["kl"]


def test_children_are_measured_one_at_a_time(in_formats: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one has left memory when the next one is loaded."""
    loaded: list[weakref.ref[Any]] = []

    def load(*arguments: Any, **options: Any) -> Any:
        assert not [one for one in loaded if one() is not None]
        child = load_child(*arguments, **options)
        loaded.append(weakref.ref(child.model.embed_tokens.weight))
        loaded.extend(weakref.ref(rounding) for rounding in roundings(child))
        return child

    monkeypatch.setattr("nas.measure.load_child", load)
    heldout = load_pack(in_formats / "data" / "heldout.npy")
    names = {name: in_formats / "child" for name in ("master", "served", "again")}
    measure(open_parent(str(world.parent)), names, heldout, torch.device("cpu"), Reporter(True), unrounded={"master"})
    assert len(loaded) > 3


def test_a_child_in_bf16_has_nothing_to_round(world: World, tmp_path: Path) -> None:
    run_dir = world.copy("searched", tmp_path / "run")
    refused = nas("distill", "--run", run_dir, *HEALING, "--qad")
    assert refused.code == 2 and "all matrices of this child are bf16" in refused.err
    assert "--qad-tokens" in nas("distill", "--run", run_dir, *HEALING, "--qad-tokens", 128).err
