"""Healing: it lowers the held-out KL, survives what happens to it, and does not depend on how it is cut up."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from healing_run import CONFIG, MUON, packs, stored_student, tiny_pair
from safetensors.torch import load_file

from blocks.errors import CheckpointError, ConfigError, NasError
from distill.config import DistillConfig
from distill.evaluation import evaluate
from distill.interrupt import HealingStopped
from distill.progress import HealResult, Progress
from distill.schedule import learning_rate
from distill.trainer import heal

SCRIPT = Path(__file__).parent / "healing_run.py"
# At step 2 nothing is kept; fsync 7 is in the first checkpoint, 19 in a best student; the fourth renaming removes a
# checkpoint.
KILLS = ("step:2", "step:7", "sync:7", "sync:19", "rename:3", "rename:4")
ON_RANKS = ("ranks:2", "sharded:2", "muon:2", "lost:7", "fewer:7", "asked:12")


def run(out_dir: Path, config: DistillConfig = CONFIG, **options: Any) -> HealResult:
    return heal(config, *tiny_pair(), *packs(), out_dir, **options)


def metrics(out_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def final_weights(out_dir: Path) -> dict[str, torch.Tensor]:
    return stored_student(out_dir / "checkpoints" / f"step-{CONFIG.steps:06d}")


def assert_same_end(out_dir: Path, reference: Path) -> None:
    for load in (final_weights, lambda path: load_file(path / "best" / "student.safetensors")):
        found, wanted = load(out_dir), load(reference)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [line["step"] for line in metrics(out_dir, "train")] == list(range(1, CONFIG.steps + 1))
    assert [line["loss"] for line in metrics(out_dir, "train")] == [
        line["loss"] for line in metrics(reference, "train")
    ]
    assert metrics(out_dir, "eval") == metrics(reference, "eval")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    out_dir = tmp_path_factory.mktemp("reference")
    run(out_dir)
    return out_dir


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """The runs of `healing_run.py`: where they lie, a directory a case, and how each of their processes ended."""
    out_dir = tmp_path_factory.mktemp("processes")
    command = [sys.executable, str(SCRIPT), str(out_dir), *KILLS, *ON_RANKS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out_dir, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("tied", [True, False])
def test_healing_lowers_heldout_kl_and_leaves_the_best_student(tmp_path: Path, tied: bool) -> None:
    teacher, student = tiny_pair(tied)
    train_pack, heldout_pack = packs()
    seen: list[Progress] = []
    result = heal(CONFIG, teacher, student, train_pack, heldout_pack, tmp_path, on_step=seen.append)
    assert result.best.kl <= result.after.kl < 0.8 * result.before.kl
    assert result.steps == CONFIG.steps and result.tokens == CONFIG.steps * CONFIG.step_tokens
    assert [p.step for p in seen] == list(range(CONFIG.steps + 1))
    assert [p.step for p in seen if p.evaluation] == [0, 4, 8, 12]
    left = evaluate(teacher, student, heldout_pack, sequence_length=16, tokens=128)
    assert left.kl == pytest.approx(result.best.kl, rel=1e-6)
    assert left.teacher_ce == pytest.approx(result.before.teacher_ce, rel=1e-6)


def test_only_the_newest_checkpoints_stay(reference: Path) -> None:
    assert sorted(path.name for path in (reference / "checkpoints").iterdir()) == ["step-000009", "step-000012"]


def test_micro_batches_do_not_change_the_result(tmp_path: Path, reference: Path) -> None:
    for size in (1, 3, 4):
        run(tmp_path / str(size), replace(CONFIG, micro_batch=size))
        for found, wanted in zip(metrics(tmp_path / str(size), "train"), metrics(reference, "train"), strict=True):
            assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


@pytest.mark.parametrize("kill", KILLS)
def test_killed_and_resumed_equals_never_killed(
    processes: tuple[Path, dict[str, list[int]]], reference: Path, kill: str
) -> None:
    out_dir, codes = processes[0] / kill, processes[1]
    assert codes[kill] == [-signal.SIGKILL]
    run(out_dir)
    assert_same_end(out_dir, reference)
    assert not [path for path in out_dir.rglob(".*") if path.name != ".metadata"]


def test_sigterm_writes_a_checkpoint(tmp_path: Path, reference: Path) -> None:
    def terminate(progress: Progress) -> None:
        if progress.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(HealingStopped, match="stopped at step 5 of 12") as stopped:
        run(tmp_path, on_step=terminate)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert (tmp_path / "checkpoints" / "step-000005").exists()
    run(tmp_path)
    assert_same_end(tmp_path, reference)


def test_finished_run_has_nothing_to_do(tmp_path: Path, reference: Path) -> None:
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    result = run(tmp_path)
    assert result.tokens_per_s == 0 and result.after.kl < result.before.kl
    assert_same_end(tmp_path, reference)


def test_a_step_that_is_not_finite_stops_and_overwrites_nothing(tmp_path: Path) -> None:
    teacher, student = tiny_pair()

    def poison(progress: Progress) -> None:
        if progress.step == 6:
            student.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")

    with pytest.raises(NasError, match=r"at step 7, on sequences \d+, \d+, \d+, \d+ of the training pack"):
        heal(CONFIG, teacher, student, *packs(), tmp_path, on_step=poison)
    newest = stored_student(tmp_path / "checkpoints" / "step-000006")
    assert all(tensor.isfinite().all() for tensor in newest.values())
    assert metrics(tmp_path, "train")[-1]["step"] == 6


def test_resuming_another_run_says_what_differs(tmp_path: Path, reference: Path) -> None:
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"learning_rate was 0.002 and is now 0.001.*--run.*--restart"):
        run(tmp_path, replace(CONFIG, learning_rate=1e-3))
    teacher, student = tiny_pair(noise=0.06)
    with pytest.raises(CheckpointError, match="another run: child was"):
        heal(CONFIG, teacher, student, *packs(), tmp_path)
    assert run(tmp_path, replace(CONFIG, learning_rate=1e-3), resume=False).steps == CONFIG.steps


def test_damaged_checkpoint_is_named(tmp_path: Path, reference: Path) -> None:
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "step-000012" / "__0_0.distcp").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="step-000012 is damaged"):
        run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000012")
    run(tmp_path)
    assert_same_end(tmp_path, reference)


def test_full_disk_keeps_older_checkpoints(tmp_path: Path, reference: Path) -> None:
    """A limit on file sizes stands in for a full disk: the write fails half-way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(progress: Progress) -> None:
        if progress.step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))

    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*untouched.* Free some space"):
            run(tmp_path, on_step=fill_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000006"]
    run(tmp_path)
    assert_same_end(tmp_path, reference)


def assert_same_curve(out_dir: Path, reference: Path) -> None:
    for kind, field in (("train", "loss"), ("train", "grad_norm"), ("eval", "kl")):
        for found, wanted in zip(metrics(out_dir, kind), metrics(reference, kind), strict=True):
            assert found[field] == pytest.approx(wanted[field], rel=1e-5)


@pytest.mark.parametrize("case", ["ranks:2", "sharded:2"])
def test_two_ranks_give_the_losses_of_one(
    processes: tuple[Path, dict[str, list[int]]], reference: Path, case: str
) -> None:
    assert processes[1][case] == [0, 0]
    assert_same_curve(processes[0] / case, reference)
    best = load_file(processes[0] / case / "best" / "student.safetensors")
    for name, wanted in load_file(reference / "best" / "student.safetensors").items():
        torch.testing.assert_close(best[name], wanted, rtol=1e-4, atol=1e-6)


def test_muon_on_shards_is_muon(processes: tuple[Path, dict[str, list[int]]], tmp_path: Path) -> None:
    assert processes[1]["muon:2"] == [0, 0]
    run(tmp_path, MUON)
    for found, wanted in zip(metrics(processes[0] / "muon:2", "train"), metrics(tmp_path, "train"), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)


def test_a_lost_rank_and_a_restart_end_the_same(processes: tuple[Path, dict[str, list[int]]], reference: Path) -> None:
    """The checkpoint of step 6 is gone on with, by two ranks and by one: what the shards hold does not depend on their number."""
    first, second, *again = processes[1]["lost:7"]
    assert first != 0 and second == -signal.SIGKILL and again == [0, 0]
    assert_same_curve(processes[0] / "lost:7", reference)
    fewer = processes[0] / "fewer:7"
    assert -signal.SIGKILL in processes[1]["fewer:7"]
    run(fewer)
    assert_same_curve(fewer, reference)


def test_a_signal_to_one_rank_at_the_end_stops_all(
    processes: tuple[Path, dict[str, list[int]]], reference: Path
) -> None:
    assert processes[1]["asked:12"] == [128 + signal.SIGTERM] * 2
    assert_same_curve(processes[0] / "asked:12", reference)


def test_half_precision_student_keeps_fp32_master_weights(tmp_path: Path) -> None:
    teacher, student = tiny_pair()
    config = replace(CONFIG, compute_dtype="bfloat16", tokens=3 * CONFIG.step_tokens)
    result = heal(config, teacher.bfloat16(), student.bfloat16(), *packs(), tmp_path)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert result.after.kl < result.before.kl


@pytest.mark.parametrize(
    ("field", "value"),
    [("tokens", 0), ("sequence_length", 1), ("learning_rate", 0.0), ("betas", (0.9, 1.0)), ("schedule", "linear")],
)
def test_wrong_values_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"distill\.{field} is"):
        DistillConfig(**{field: value})


def test_learning_rate_rises_and_falls() -> None:
    config = DistillConfig(tokens=100 * 2048, warmup_share=0.1, learning_rate=1.0, final_lr_share=0.1)
    rates = [learning_rate(config, step) for step in range(config.steps)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.1)


def test_vocabularies_must_match(tmp_path: Path) -> None:
    teacher, student = tiny_pair()
    student.lm_head.weight = torch.nn.Parameter(torch.zeros(98, 32))
    with pytest.raises(ConfigError, match="different vocabularies"):
        heal(CONFIG, teacher, student, *packs(), tmp_path)


def test_packs_may_be_memory_mapped(tmp_path: Path) -> None:
    train_pack, heldout_pack = packs()
    np.save(tmp_path / "train.npy", train_pack)
    mapped = np.load(tmp_path / "train.npy", mmap_mode="r")
    teacher, student = tiny_pair()
    config = replace(CONFIG, tokens=CONFIG.step_tokens)
    assert heal(config, teacher, student, mapped, heldout_pack, tmp_path / "out").steps == 1
