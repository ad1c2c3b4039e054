"""Learning rates over the steps and by kind of parameter; Muon against torch's own; exact resumption with both."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from healing_run import CONFIG, packs, stored_student, tiny_pair

from blocks.errors import ConfigError
from distill.config import DistillConfig
from distill.muon import Muon, orthogonalise
from distill.schedule import build_optimizers, learning_rate, parameters_by_kind, set_learning_rate
from distill.trainer import heal

MUON = replace(CONFIG, optimizer="muon", schedule="wsd", decay_share=0.5, embedding_lr_scale=0.3, norm_lr_scale=3.0)


def test_wsd_is_flat_and_then_falls_on_a_line() -> None:
    config = DistillConfig(
        tokens=100 * 2048, warmup_share=0.1, learning_rate=1.0, schedule="wsd", decay_share=0.2, final_lr_share=0.1
    )
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[4] == pytest.approx(0.5) and rates[9:80] == [1.0] * 71
    assert rates[99] == pytest.approx(0.1)
    falls = [before - after for before, after in pairwise(rates[79:])]
    assert falls == pytest.approx([0.9 / 20] * 20)


def test_wsd_needs_room_for_warmup_and_decay() -> None:
    with pytest.raises(ConfigError, match=r"decay_share is 0.6; it must be at most 0.5"):
        DistillConfig(schedule="wsd", warmup_share=0.5, decay_share=0.6)
    DistillConfig(schedule="cosine", warmup_share=0.5, decay_share=0.6)


@pytest.mark.parametrize("field", ["embedding_lr_scale", "norm_lr_scale"])
def test_scales_are_not_negative(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        DistillConfig(**{field: -1.0})  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_of_one_kind(tied: bool) -> None:
    student = tiny_pair(tied)[1]
    kinds = parameters_by_kind(student)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    found = {kind: [names[id(p)] for p in parameters] for kind, parameters in kinds.items()}
    assert sorted(chain(*found.values())) == sorted(names.values())
    assert found["tables"] == ["model.embed_tokens.weight", *["lm_head.weight"] * (not tied)]
    assert all(name.endswith("norm.weight") for name in found["vectors"]) and len(found["vectors"]) == 5
    assert all("proj" in name for name in found["matrices"]) and len(found["matrices"]) == 14


def step_once(config: DistillConfig, rate: float) -> dict[str, float]:
    """The largest change of each kind of parameter in one update whose gradient is 1 everywhere."""
    student = tiny_pair()[1]
    optimizers = build_optimizers(config, student)
    kinds = parameters_by_kind(student)
    before = {kind: [p.detach().clone() for p in parameters] for kind, parameters in kinds.items()}
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers.values():
        set_learning_rate(optimizer, rate)
        optimizer.step()
    return {
        kind: max(float((p.detach() - old).abs().max()) for p, old in zip(parameters, before[kind], strict=True))
        for kind, parameters in kinds.items()
    }


def test_rates_by_kind() -> None:
    """AdamW's first update is the learning rate itself."""
    moved = step_once(replace(CONFIG, embedding_lr_scale=0.5, norm_lr_scale=2.0), 1e-2)
    assert moved == {kind: pytest.approx(rate, rel=1e-4) for kind, rate in zip(moved, (1e-2, 5e-3, 2e-2), strict=True)}
    assert step_once(replace(CONFIG, embedding_lr_scale=0.0), 1e-2)["tables"] == 0
    muon = step_once(replace(CONFIG, optimizer="muon", norm_lr_scale=2.0), 1e-2)
    assert muon["tables"] == pytest.approx(1e-2, rel=1e-4) and muon["vectors"] == pytest.approx(2e-2, rel=1e-4)
    assert 0 < muon["matrices"] < 1e-2


def test_muon_is_torchs_muon() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 40), (40, 24), (24, 40), (16, 16), (40, 24), (24, 40)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in values] for _ in range(2))
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = Muon(ours, **options), torch.optim.Muon(theirs, **options, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        ours[1].grad = theirs[1].grad = None  # a parameter without gradient stays as it is
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours[1], values[1])
    for mine, other, value in zip(ours, theirs, values, strict=True):
        moved = float((other - value).detach().abs().max())
        torch.testing.assert_close(mine, other, rtol=0, atol=0.02 * moved)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 20, 50), (2, 50, 20)):
        matrices = torch.randn(shape, generator=generator)
        found = orthogonalise(matrices, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.6 and values.max() < 1.3  # what these coefficients aim at
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        aligned = (u @ v * found).sum((1, 2)) / (found.norm(dim=(1, 2)) * (u @ v).norm(dim=(1, 2)))
        assert aligned.min() > 0.95


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_child_that_is_hardly_hurt_learns_at_a_lower_rate(tmp_path: Path, optimizer: str) -> None:
    """At the full rate it leaves the parent further behind than it was; the root of the ratio brings it closer."""
    steady = replace(CONFIG, tokens=30 * CONFIG.step_tokens, optimizer=optimizer, eval_every=0)
    gentle = replace(steady, full_rate_kl=0.5)
    full = heal(steady, *tiny_pair(noise=0.005), *packs(), tmp_path / "full")
    assert full.after.kl > full.before.kl
    for until in (7, None):  # the share is that of the first evaluation, also when it goes on
        result = heal(gentle, *tiny_pair(noise=0.005), *packs(), tmp_path / "gentle", until=until)
    assert result.after.kl < 0.8 * result.before.kl
    share = math.sqrt(result.before.kl / 0.5)
    assert gentle.rate_share(result.before.kl) == pytest.approx(share) and share < 0.1
    for name, factor in (("full", 1.0), ("gentle", share)):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        rates = [line["lr"] for line in lines if line["kind"] == "train"]
        assert rates == pytest.approx([factor * learning_rate(steady, step) for step in range(30)])


def test_the_full_rate_begins_at_a_kl_and_old_checkpoints_know_of_none() -> None:
    config = DistillConfig(full_rate_kl=0.25)
    assert [config.rate_share(kl) for kl in (-1e-9, 0.0, 0.0025, 0.25, 3.0)] == pytest.approx([0, 0, 0.1, 1, 1])
    assert DistillConfig().rate_share(1e-9) == 1
    assert "full_rate_kl" not in DistillConfig().trajectory() and config.trajectory()["full_rate_kl"] == 0.25
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match=r"full_rate_kl is .*; it must be a positive number, or null"):
            DistillConfig(full_rate_kl=wrong)


def test_muon_heals_and_resumes_exactly(tmp_path: Path) -> None:
    whole = heal(MUON, *tiny_pair(), *packs(), tmp_path / "whole")
    assert whole.after.kl < 0.85 * whole.before.kl
    for until in (4, 7, None):
        result = heal(MUON, *tiny_pair(), *packs(), tmp_path / "parts", until=until)
    assert result.after == whole.after
    name = f"checkpoints/step-{MUON.steps:06d}"
    ours, theirs = (stored_student(tmp_path / run / name) for run in ("parts", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
