"""Healing in stages, and what ends it early: a spike, a held-out KL that stands still. What it tells others."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from app import HEALING, World, nas, succeed
from healing_run import CONFIG, packs, tiny_pair
from safetensors.torch import load_file
from test_ranks import run_ranks

from blocks.errors import ConfigError, NasError
from blocks.spec import Architecture
from distill.config import DistillConfig
from distill.interrupt import HealingStopped, StopRequest
from distill.progress import HealResult
from distill.stages import Stage, heal_in_stages
from distill.trainer import heal
from distill.watch import FEWEST, LossWatch, has_settled
from nas.config import load_recipe
from nas.documents import load_documents
from nas.heal_stages import FULL_RATE_KL, build_stages

STEP = CONFIG.step_tokens
KL, CE = replace(CONFIG, tokens=6 * STEP), replace(CONFIG, loss="ce", tokens=4 * STEP, sequence_length=8)
BLD = replace(CONFIG, loss="bld", tokens=4 * STEP)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def run_stages(out_dir: Path, *configs: DistillConfig, **options: Any) -> list[HealResult]:
    train, heldout = packs()
    return heal_in_stages(
        [Stage(config, train) for config in configs], lambda _: tiny_pair(), heldout, out_dir, **options
    )


def test_each_stage_begins_with_the_best_of_the_one_before(tmp_path: Path) -> None:
    results = run_stages(tmp_path, BLD, KL, CE)
    assert results[0].best.kl < 0.95 * results[0].before.kl  # layers apart bring the whole nearer, in four steps
    assert results[1].before.kl == pytest.approx(results[0].best.kl, rel=1e-6)
    teacher, student = tiny_pair()
    student.load_state_dict(load_file(results[1].best_path), strict=False)
    alone = heal(CE, teacher, student, *packs(), tmp_path / "alone")
    assert alone.evaluations == results[2].evaluations
    told = lines(tmp_path)
    assert [line["stage"] for line in told if line["kind"] == "train"] == 4 * ["1-bld"] + 6 * ["2-kl"] + 8 * ["3-ce"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-bld", "2-kl", "3-ce", "alone", "metrics.jsonl"]


def test_stopped_in_its_second_stage_it_goes_on_there(tmp_path: Path) -> None:
    whole = run_stages(tmp_path / "whole", KL, CE)

    def stop(index: int, progress: Any) -> None:
        if index == 1 and progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stages(tmp_path / "cut", KL, CE, on_step=stop)
    first = (tmp_path / "cut/1-kl/best/student.safetensors").stat().st_mtime_ns
    again = run_stages(tmp_path / "cut", KL, CE)
    assert [result.evaluations for result in again] == [result.evaluations for result in whole]
    assert (tmp_path / "cut/1-kl/best/student.safetensors").stat().st_mtime_ns == first
    timeless = [
        [{k: v for k, v in line.items() if k not in ("tokens_per_s", "memory")} for line in lines(tmp_path / name)]
        for name in ("whole", "cut")
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("step", [5, 6])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_the_end_of_a_stage_begins_no_other(tmp_path: Path, step: int, number: signal.Signals) -> None:
    """In its last step, and after its last evaluation."""

    def ask(index: int, progress: Any) -> None:
        if index == 0 and progress.step == step:
            os.kill(os.getpid(), number)

    with pytest.raises(HealingStopped, match="Run the same command again") as stopped:
        run_stages(tmp_path / "cut", KL, CE, on_step=ask)
    assert stopped.value.exit_code == 128 + number
    assert {line["stage"] for line in lines(tmp_path / "cut")} == {"1-kl"}
    begun: list[tuple[int, int]] = []
    again = run_stages(tmp_path / "cut", KL, CE, on_step=lambda index, progress: begun.append((index, progress.step)))
    assert begun[0] == (1, 0)
    assert [result.evaluations for result in again] == [
        result.evaluations for result in run_stages(tmp_path / "whole", KL, CE)
    ]


def test_another_text_is_measured_and_decides_nothing(tmp_path: Path) -> None:
    plain = heal(CONFIG, *tiny_pair(), *packs(), tmp_path / "plain")
    other = np.random.default_rng(1).integers(97, size=(6, 16), dtype=np.uint16)
    found = heal(CONFIG, *tiny_pair(), *packs(), tmp_path / "other", other_texts={"general": other})
    assert found.evaluations == plain.evaluations
    measured = [line for line in lines(tmp_path / "other") if line.get("text") == "general"]
    assert [line["step"] for line in measured] == sorted(found.evaluations)
    assert measured[0]["eval_tokens"] == 6 * 15 and measured[-1]["kl"] < measured[0]["kl"]


def test_it_ends_when_the_held_out_kl_no_longer_falls(tmp_path: Path) -> None:
    still = replace(CONFIG, learning_rate=1e-12, eval_every=2, patience=2)  # too little to change any sum by much
    values = {0: 3.0, 2: 2.0, 4: 2.5, 6: 2.0}
    assert has_settled(values, 2) and not has_settled(values, 3) and not has_settled(values, 0)
    assert not has_settled({0: 3.0, 2: 2.0, 4: 1.9}, 2)
    rising = replace(CONFIG, loss="ce", learning_rate=0.05, eval_every=2, patience=2)  # random text teaches nothing
    result = heal(rising, *tiny_pair(), *packs(), tmp_path)
    assert result.steps < CONFIG.steps and has_settled({s: e.student_ce for s, e in result.evaluations.items()}, 2)
    assert result.best.student_ce == min(e.student_ce for e in result.evaluations.values())
    written = (tmp_path / "metrics.jsonl").read_text()
    assert heal(rising, *tiny_pair(), *packs(), tmp_path).steps == result.steps
    assert (tmp_path / "metrics.jsonl").read_text() == written
    more = heal(replace(rising, patience=0), *tiny_pair(), *packs(), tmp_path)
    assert more.steps == CONFIG.steps
    assert still.trajectory() == replace(still, patience=0).trajectory()


def test_a_spike_stops_it_before_the_step_is_taken(tmp_path: Path) -> None:
    watch = LossWatch(3.0)
    assert not any(watch.fault(1.0, 1.0) for _ in range(FEWEST - 1)) and watch.fault(99.0, 1.0) is None  # too few yet
    watch = LossWatch(3.0, recent=[1.0] * FEWEST)
    assert watch.fault(2.9, 1.0) is None
    fault = watch.fault(9.0, 1.0)
    assert fault is not None and "loss 9" in fault and len(watch.recent) == FEWEST + 1
    assert LossWatch(0.0, [1.0] * 50).fault(1e9, 1.0) is None
    assert LossWatch(0.0).fault(math.nan, 1.0) and LossWatch(0.0).fault(1.0, math.inf)

    config = replace(CONFIG, tokens=30 * STEP, spike=1.0001, learning_rate=1e-9, checkpoint_every=5)
    with pytest.raises(NasError, match=r"times the mean .* at step \d+, on sequences \d+, .*nothing was overwritten"):
        heal(config, *tiny_pair(), *packs(), tmp_path)
    steps = [line["step"] for line in lines(tmp_path) if line["kind"] == "train"]
    assert FEWEST <= steps[-1] < 30
    assert (tmp_path / "checkpoints" / f"step-{steps[-1] // 5 * 5:06d}").exists()
    assert heal(replace(config, spike=0.0), *tiny_pair(), *packs(), tmp_path).steps == 30


def test_tensorboard_is_told_what_the_log_is(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    heal(replace(CONFIG, track="tensorboard"), *tiny_pair(), *packs(), tmp_path)
    events = EventAccumulator(str(tmp_path / "tracked"))
    events.Reload()
    for kind, name in (("train", "loss"), ("eval", "kl")):
        wanted = [(line["step"], line[name]) for line in lines(tmp_path) if line["kind"] == kind]
        found = [(event.step, event.value) for event in events.Scalars(f"{kind}/{name}")]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted]


def test_the_cosine_is_for_children_that_lost_attention() -> None:
    whole, cut = "attention:kv2+ffn:256", "attention:skip+ffn:256"
    for layers, wanted in (([whole, cut], 1.0), ([whole, whole], 0.0)):
        assert DistillConfig().suited_to(Architecture.from_list(layers)).cosine == wanted
    child = Architecture.from_list([whole, cut])
    assert (
        DistillConfig(cosine=0.0).suited_to(child).cosine == 0.0
        and DistillConfig(loss="ce").suited_to(child).cosine == 0.0
    )


def test_stages_of_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "distill:\n  optimizer: adamw\n  stages:\n"
        "    - {loss: bld, tokens: 4096}\n    - {tokens: 8192, learning_rate: 1.0e-3}\n    - {loss: ce, data: more.txt, sequence_length: 64}\n"
    )
    first, second, third = build_stages(load_recipe(recipe), {"seed": 7}, "cpu")
    assert (first.loss, first.tokens, second.loss, second.learning_rate) == ("bld", 4096, "kl", 1e-3)
    assert (third.data, third.sequence_length, third.seed, third.optimizer) == ("more.txt", 64, 7, "adamw")
    with pytest.raises(ConfigError, match=r"--tokens: the recipe has 3 stages; write tokens in each"):
        build_stages(load_recipe(recipe), {"tokens": 100}, "cpu")
    for text, message in (
        ("stages: []", "must be a list of stages"),
        ("stages: [kl]", r"stages\[1\] must be a mapping"),
        ("stages: [{tokens: 4096}, {lose: kl}]", r"stages\[2\]: unknown key 'lose' \(did you mean 'loss'\?\)"),
    ):
        recipe.write_text(f"distill: {{{text}}}\n")
        with pytest.raises(ConfigError, match=message):
            build_stages(load_recipe(recipe), {}, "cpu")


def test_the_rate_follows_the_damage_unless_it_was_said() -> None:
    def full_rate_kl(recipe: dict[str, Any], **flags: Any) -> list[float | None]:
        return [stage.full_rate_kl for stage in build_stages({"distill": recipe}, flags, "cuda", rounded=True)]

    assert full_rate_kl({}) == full_rate_kl({"loss": "jsd"}, learning_rate=None) == [FULL_RATE_KL]
    assert full_rate_kl({}, learning_rate=1e-4) == full_rate_kl({"learning_rate": 1e-4}) == [None]
    assert full_rate_kl({}, qad=True) == [FULL_RATE_KL]
    assert full_rate_kl({"qad": False, "loss": "ce"}) == full_rate_kl({"qad": False}, loss="bld") == [None]
    assert full_rate_kl({"qad": False, "learning_rate": 1e-4, "full_rate_kl": 0.1}) == [0.1]
    listed = [{"full_rate_kl": None}, {"learning_rate": 1e-3}, {"tokens": 5}]
    assert full_rate_kl({"stages": listed}) == [None, None, FULL_RATE_KL]


def test_a_run_is_healed_in_stages_on_other_text(world: World, tmp_path: Path) -> None:
    run, text = world.copy("searched", tmp_path / "run"), tmp_path / "more.jsonl"
    shutil.copy(world.text, text)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"distill:\n  general: {text}\n  batch_sequences: 4\n  sequence_length: 32\n  cosine: 0.0\n  stages:\n"
        f"    - {{loss: bld, tokens: 256}}\n    - {{tokens: 512}}\n    - {{loss: ce, tokens: 256, data: {text}}}\n"
    )
    result = succeed("distill", "--run", run, "--recipe", recipe, "--json").json
    assert [stage["name"] for stage in result["stages"]] == ["1-bld", "2-kl", "3-ce"]
    last = result["stages"][2]
    assert result["healing"]["tokens"] == 1024 and last["best"]["student_ce"] <= last["before"]["student_ce"]
    assert {line.get("text") for line in lines(run / "distill") if line["kind"] == "eval"} == {None, "general"}
    assert "healed already" in nas("distill", "--run", run, "--recipe", recipe).err
    assert succeed("report", "--run", run).code == 0


def test_two_sharded_ranks_heal_as_one_process_does(world: World, tmp_path: Path) -> None:
    one, two = (world.copy("searched", tmp_path / name) for name in ("one", "two"))
    words = (*HEALING, "--cosine", "0.5", "--device", "cpu", "--json")
    alone = succeed("distill", "--run", one, *words).json
    prints = run_ranks(2, 10, "distill", "--run", two, *words, "--sharding", "full")
    together = json.loads(prints[0].partition("\n")[2])
    assert len(prints[1].splitlines()) == 1  # rank 0 speaks for all
    for row, wanted in zip(together["rows"], alone["rows"], strict=True):
        assert row["kl"] == pytest.approx(wanted["kl"], rel=1e-4, abs=1e-7)
    healed, expected = (load_file(run / "healed" / "model.safetensors") for run in (two, one))
    assert healed.keys() == expected.keys()
    assert max(float((healed[k].float() - expected[k].float()).abs().max()) for k in healed) < 2e-2  # kept in bf16


def test_a_dataset_is_streamed_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def rows() -> Iterator[dict[str, str]]:
        for index in range(1000):
            read.append(index)
            yield {"text": f"document {index} " + "x" * 100}

    def load(*_: object, streaming: bool, **__: object) -> Any:
        return datasets.IterableDataset.from_generator(rows) if streaming else datasets.Dataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    few = load_documents("some/dataset", most_characters=1000)
    assert 1000 <= sum(map(len, few)) < 1200 and max(read) < 20
    assert len(load_documents("some/dataset")) == 1000
    with pytest.raises(NasError, match="no column 'words'; set text_column to one of text"):
        load_documents("some/dataset", "words", 1000)


def test_a_second_sigterm_changes_nothing_and_a_second_ctrl_c_does() -> None:
    """torchrun and a scheduler may both send one; somebody at a keyboard means it."""
    before = signal.getsignal(signal.SIGINT)  # ignored, in a shell's background
    with pytest.raises(HealingStopped) as stopped, StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_number == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
