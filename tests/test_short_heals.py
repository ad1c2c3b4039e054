"""A heal that stops early is the beginning of the whole one, and tells the held-out KL there with its standard error."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from healing_run import CONFIG, packs, stored_student, tiny_pair
from safetensors.torch import load_file

from blocks.errors import ConfigError
from distill.evaluation import EvalStats, evaluate
from distill.interrupt import HealingStopped
from distill.progress import HealResult, Progress
from distill.trainer import heal


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HealResult]:
    """A run that never stopped; it evaluates at 4, 8 and 12, and at 5."""
    out_dir = tmp_path_factory.mktemp("whole")
    return out_dir, run(out_dir, eval_at=[5])


def run(out_dir: Path, **options: Any) -> HealResult:
    return heal(CONFIG, *tiny_pair(), *packs(), out_dir, **options)


def lines(out_dir: Path, kind: str, *keys: str) -> list[list[Any]]:
    every = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [[line[key] for key in keys] for line in every if line["kind"] == kind]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "student.safetensors") if path.name == "best" else stored_student(path)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("stops", [(5,), (4, 8), (5, 5, 3, 11)])
def test_stopping_on_the_way_changes_nothing(
    tmp_path: Path, whole: tuple[Path, HealResult], stops: tuple[int, ...]
) -> None:
    out_dir, expected = whole
    done = 0
    for until in stops:
        result, done = run(tmp_path, until=until, eval_at=[5]), max(done, until)
        assert result.steps == done and result.tokens == done * CONFIG.step_tokens
        assert max(result.evaluations) == done and result.after == result.evaluations[done]
        assert (tmp_path / "checkpoints" / f"step-{done:06d}").exists()
    result = run(tmp_path, eval_at=[5])
    name = f"step-{CONFIG.steps:06d}"
    assert same(weights(tmp_path / "checkpoints" / name), weights(out_dir / "checkpoints" / name))
    keys = ("step", "loss", "lr", "grad_norm")
    assert lines(tmp_path, "train", *keys) == lines(out_dir, "train", *keys)
    assert {step: result.evaluations[step] for step in expected.evaluations} == expected.evaluations
    assert set(result.evaluations) == set(expected.evaluations) | set(stops) - {3}
    assert result.best.kl <= expected.best.kl


def test_the_schedule_is_that_of_the_whole_run(tmp_path: Path, whole: tuple[Path, HealResult]) -> None:
    run(tmp_path, until=4)
    assert lines(tmp_path, "train", "lr") == lines(whole[0], "train", "lr")[:4]
    shorter = replace(CONFIG, tokens=4 * CONFIG.step_tokens)
    heal(shorter, *tiny_pair(), *packs(), tmp_path / "shorter")
    assert lines(tmp_path / "shorter", "train", "lr") != lines(whole[0], "train", "lr")[:4]


def test_what_a_short_heal_tells_is_the_kl_of_its_student(tmp_path: Path) -> None:
    teacher, student = tiny_pair()
    result = heal(replace(CONFIG, eval_every=0), teacher, student, *packs(), tmp_path, until=6)
    assert set(result.evaluations) == {0, 6} and result.best_step == 6
    left = evaluate(teacher, student, packs()[1], sequence_length=16, tokens=128)
    assert left.kl == pytest.approx(result.after.kl, rel=1e-6)


def test_stopped_by_a_signal_just_where_a_short_heal_ends(tmp_path: Path, whole: tuple[Path, HealResult]) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(HealingStopped, match="stopped at step 5 of 12"):
        run(tmp_path, on_step=interrupt)
    result = run(tmp_path, until=5)
    assert result.after == whole[1].evaluations[5]
    assert run(tmp_path, until=5).evaluations == result.evaluations


def test_a_later_end_than_the_last_step_is_the_last_step(tmp_path: Path, whole: tuple[Path, HealResult]) -> None:
    assert run(tmp_path, until=1000).after == whole[1].after


def test_what_is_left_is_counted_to_where_it_stops(tmp_path: Path) -> None:
    told: list[Progress] = []
    run(tmp_path, until=4, on_step=told.append)
    run(tmp_path, until=6, on_step=told.append)
    assert [(p.step, p.total_steps) for p in told] == [*((step, 4) for step in range(5)), (5, 6), (6, 6)]
    assert told[4].eta_seconds == told[-1].eta_seconds == 0 < told[5].eta_seconds


def test_an_end_before_the_first_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="until is 0"):
        run(tmp_path, until=0)


def test_standard_error_of_equal_sequences_is_that_of_their_mean() -> None:
    kl = torch.rand(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    length = 15
    sums = torch.stack([kl * length, kl, kl, kl, torch.full_like(kl, length)], dim=1)
    masked = torch.zeros(2, 5, dtype=torch.float64)
    stats = EvalStats.from_sequences(torch.cat([sums, masked]))
    assert stats.tokens == 7 * length
    assert stats.kl == pytest.approx(float(kl.mean()), rel=1e-12)
    assert stats.kl_se == pytest.approx(float(kl.std()) / 7**0.5, rel=1e-12)
    assert EvalStats.from_sequences(sums[:1]).kl_se is None


def test_standard_error_of_unequal_sequences_holds_on_repeated_samples() -> None:
    """The spread of the ratio over many draws is what one draw says, on average."""
    generator = torch.Generator().manual_seed(1)
    means, errors = [], []
    for _ in range(400):
        lengths = torch.randint(5, 50, (40,), generator=generator).double()
        level = 0.3 + 0.1 * torch.randn(40, generator=generator, dtype=torch.float64)
        sums = torch.stack([level * lengths, *[lengths] * 4], dim=1)
        stats = EvalStats.from_sequences(sums)
        means.append(stats.kl)
        errors.append(stats.kl_se)
    assert torch.tensor(errors).mean() == pytest.approx(float(torch.tensor(means).std()), rel=0.1)


def test_statistics_survive_json() -> None:
    stats = EvalStats(0.3, 2.0, 1.9, 0.7, 100, 0.01)
    assert EvalStats.from_dict(json.loads(json.dumps(stats.to_dict()))) == stats
    old = {"kl": 0.3, "student_ce": 2.0, "teacher_ce": 1.9, "top1_agreement": 0.7, "tokens": 100}
    assert EvalStats.from_dict(old).kl_se is None
