"""`nas eval`: its figures are those of dense logits, its errors those of the bootstrap, and nothing is measured twice."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from app import World, nas, stamps, succeed, write_text
from tiny import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM, GPT2Config

import nas.evaluate as evaluation
from blocks.errors import CheckpointError, ConfigError, DataError
from nas.eval_store import EvalStore, Measure, Subject
from nas.eval_table import eval_table, markdown
from nas.harness import read_results
from nas.language_model import load_language_model
from nas.texts import Text, compare_on_text, read_text, statistics_of

CPU = torch.device("cpu")
SHORT = ("--text-tokens", "256", "--sequence-length", "32", "--sample-tokens", "4", "--prompt", "once")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tiny models (two of one vocabulary), a text and questions."""
    directory = tmp_path_factory.mktemp("eval")
    tiny_llama(directory / "parent", num_hidden_layers=2, initializer_range=0.1)
    tiny_llama(directory / "child", 1, num_hidden_layers=1, initializer_range=0.1)
    tiny_llama(directory / "large", 2, num_hidden_layers=1, vocab_size=300)
    write_text(directory / "text.jsonl", 40)
    rows = [{"prompt": f"Question {i}:", "choices": ["yes", "no", "maybe so"], "answer": i % 3} for i in range(12)]
    (directory / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def words(place: Path, out: Path, *more: object) -> tuple[object, ...]:
    models = ("--parent", place / "parent", "--model", place / "child")
    return (
        "eval",
        *models,
        "--data",
        place / "text.jsonl",
        "--tasks",
        place / "toy.jsonl",
        "--out",
        out,
        *SHORT,
        *more,
    )


# Texts


def test_kl_agreement_and_perplexity_are_those_of_dense_logits(place: Path) -> None:
    teacher, student = (load_language_model(place / name, CPU, torch.float64).model for name in ("parent", "child"))
    pack = np.random.default_rng(0).integers(0, 256, (9, 20)).astype(np.uint16)
    tokens = torch.from_numpy(pack.astype(np.int64))
    with torch.no_grad():
        log_p, log_q = (model(tokens).logits[:, :-1].log_softmax(-1) for model in (teacher, student))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    ce = -log_q.gather(2, tokens[:, 1:, None])[..., 0]
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double()
    steps: list[tuple[int, int]] = []
    found = compare_on_text(
        teacher, student, Text("t", pack), batch_tokens=60, progress=lambda done, total: steps.append((done, total))
    )
    assert (found["tokens"], found["sequences"]) == (9 * 19, 9)
    for name, values in (("kl", kl), ("ce", ce), ("top1_agreement", agreement)):
        assert found[name] == pytest.approx(float(values.mean()), rel=1e-9)
        by_sequence = values.mean(1)  # of equal length: the error of a ratio is then the plain one
        assert found[f"{name}_se"] == pytest.approx(float(by_sequence.std() / 3), rel=1e-9)
    assert found["perplexity"] == pytest.approx(math.exp(float(ce.mean())), rel=1e-9)
    assert found["perplexity_se"] == pytest.approx(found["perplexity"] * found["ce_se"], rel=1e-12)
    assert steps == [(3, 9), (6, 9), (9, 9)]
    itself = compare_on_text(teacher, teacher, Text("t", pack))
    assert (itself["kl"], itself["kl_se"], itself["top1_agreement"]) == (0.0, 0.0, 1.0)


def test_errors_of_sequences_of_different_length_are_those_of_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 60, 200)
    means = rng.gamma(2.0, 0.5, (200, 4)) + 0.02 * counts[:, None]
    sums = torch.from_numpy(np.column_stack([means * counts[:, None], counts]))
    found = statistics_of(sums)
    drawn = rng.integers(0, 200, (3000, 200))
    for column, name in enumerate(("kl", "ce")):
        totals = means[:, column] * counts
        bootstrap = (totals[drawn].sum(1) / counts[drawn].sum(1)).std()
        assert found[name] == pytest.approx(totals.sum() / counts.sum())
        assert found[f"{name}_se"] == pytest.approx(bootstrap, rel=0.06)
    assert statistics_of(sums[:1])["kl_se"] is None


def test_a_text_is_packed_from_whole_documents(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"body": letter * 9}) + "\n" for letter in "abcdefgh"))
    tokenizer = byte_tokenizer()
    text = read_text(str(path), "body", tokenizer, 10, 0)
    documents = [bytes(row[:-1].astype(np.uint8)).decode() for row in text.pack]
    assert sorted(set(documents)) == sorted(documents) and (text.pack[:, -1] == tokenizer.eos_token_id).all()
    assert read_text(str(path), "body", tokenizer, 10, 35).pack.tolist() == text.pack[:3].tolist()
    assert read_text(str(path), "body", tokenizer, 10, 0, seed=1).digest != text.digest
    with pytest.raises(DataError, match="less than two sequences of 50"):
        read_text(str(path), "body", tokenizer, 50, 0)


# The command


def test_the_command_measures_all_and_then_nothing(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    result = succeed(*words(place, out))
    content = json.loads(out.read_text())
    assert [model["name"] for model in content["models"]] == ["parent", "child"]
    assert [(m["kind"], m["name"]) for m in content["measures"]] == [
        ("text", str(place / "text.jsonl")),
        ("choices", "toy"),
        ("samples", "samples"),
    ]
    assert len(content["results"]) == 6
    measured = {
        m["kind"]: content["results"][f"{content['models'][1]['fingerprint']}:{m['id']}"] for m in content["measures"]
    }
    table = " ".join(result.out.split())
    for value in (measured["text"]["kl"], measured["text"]["kl_se"]):
        assert f"{value:.4f}" in table
    assert f"{100 * measured['choices']['acc']:.1f} ± {100 * measured['choices']['acc_se']:.1f}" in table
    assert "chance 33 %" in table and "toy, 12 questions" in table
    assert measured["samples"]["samples"][0]["prompt"] == "once"
    before = stamps(tmp_path)
    again = succeed(*words(place, out, "--json"))
    assert again.json["results"] == content["results"]
    assert "measured already" in succeed(*words(place, out)).err
    assert stamps(tmp_path).keys() == before.keys()
    rows = markdown(eval_table(content)).splitlines()
    assert rows[0] == "| | | parent | child |" and all(row.count("|") == 5 for row in rows)


def test_a_stopped_command_goes_on_where_it_was(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, measure, seen = tmp_path / "eval.json", evaluation._measure, []

    def stop_at_third(plan: Any, subject: Any, measure_: Any, *more: Any) -> Any:
        if len(seen) == most:
            raise KeyboardInterrupt
        seen.append((subject.name, measure_.kind))
        return measure(plan, subject, measure_, *more)

    most = 3
    monkeypatch.setattr(evaluation, "_measure", stop_at_third)
    assert nas(*words(place, out)).code == 130
    assert len(json.loads(out.read_text())["results"]) == 3
    first, most = list(seen), 99
    seen.clear()
    assert nas(*words(place, out)).code == 0
    assert len(set(first + seen)) == len(first + seen) == 6
    seen.clear()
    assert nas(*words(place, out, "--limit", "5")).code == 0  # other questions: measured; texts and samples are not
    assert seen == [("parent", "choices"), ("child", "choices")]
    seen.clear()
    assert nas(*words(place, out, "--restart", "--sample-tokens", "0")).code == 0
    assert len(seen) == len(json.loads(out.read_text())["results"]) == 4


def test_a_child_that_changed_is_measured_again(place: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(place / "child", tmp_path / "child"))
    out = tmp_path / "eval.json"
    arguments = ("eval", "--parent", place / "parent", "--model", moved, "--tasks", place / "toy.jsonl", "--out", out)
    first = succeed(*arguments, "--sample-tokens", 0, "--json").json
    tiny_llama(moved, 5, num_hidden_layers=1, initializer_range=0.1)
    second = succeed(*arguments, "--sample-tokens", 0, "--json").json
    assert first["models"][0] == second["models"][0] and first["models"][1] != second["models"][1]
    assert len(second["results"]) == len(first["results"]) + 1
    assert len(second["models"]) == 2


def test_a_model_that_texts_cannot_be_compared_on_keeps_its_place(place: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=272, n_embd=32, n_layer=1, n_head=2, n_positions=256))
    GPT.save_pretrained(tmp_path / "gpt")
    byte_tokenizer().save_pretrained(tmp_path / "gpt")
    out = tmp_path / "eval.json"
    more = ("--model", place / "large", "--model", f"mine={tmp_path / 'gpt'}")
    content = succeed(*words(place, out, *more, "--json")).json
    assert [model["name"] for model in content["models"]] == ["parent", "child", "large", "mine"]
    text, *_ = content["measures"]
    by_name = {model["name"]: model["fingerprint"] for model in content["models"]}
    assert "different vocabularies" in content["results"][f"{by_name['large']}:{text['id']}"]["note"]
    assert "gpt2" in content["results"][f"{by_name['mine']}:{text['id']}"]["note"]
    rows = {(row.group.split(",")[0], row.metric): row.cells for row in eval_table(content).rows}
    assert rows[(str(place / "text.jsonl"), "KL to parent")][2:] == ("–", "–")
    assert all("±" in cell for cell in rows[("toy", "acc, %")])


def test_a_run_is_shown_with_its_evaluation(world: World, tmp_path: Path) -> None:
    run = world.copy("healed", tmp_path / "run")
    content = succeed("eval", "--run", run, "--sample-tokens", "0", "--json").json
    assert [model["name"] for model in content["models"]] == ["parent", "child", "healed"]
    (measure,) = content["measures"]
    assert (measure["kind"], measure["name"], measure["about"]["tokens"]) == ("text", "held-out", 512)
    results = [content["results"][f"{model['fingerprint']}:{measure['id']}"] for model in content["models"]]
    rows = json.loads((run / "results.json").read_text())["rows"]
    for result, name in zip(results, ("parent", "child before healing", "child after healing"), strict=True):
        row = next(row for row in rows if row["name"] == name)
        assert result["kl"] == pytest.approx(row["kl"], abs=1e-5)
        assert result["perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)
    shown = succeed("show", "--run", run)
    assert "Evaluation" in shown.out and f"{results[1]['kl']:.4f} ± {results[1]['kl_se']:.4f}" in shown.out
    assert "eval" in succeed("show", "--run", run, "--json").json
    tiny_llama(run / "healed", 3)  # healed again since: not what was measured
    assert "healed" not in " ".join(line for line in succeed("show", "--run", run).out.splitlines() if "┃" in line and "child" in line)  # fmt: skip
    found = json.loads((run / "architecture.json").read_text())
    (run / "architecture.json").write_text(json.dumps(found | {"key": "another"}))
    assert "Evaluation" not in succeed("show", "--run", run).out


@pytest.mark.parametrize(
    ("arguments", "code", "words_"),
    [
        (("--limit", "0"), 2, "--limit is 0; it must be 1 or more"),
        (("--dtype", "int8"), 2, "float32 or bfloat16"),
        (("--tasks", "nowhere"), 2, "no such file or directory"),
        (("--data", "held-out"), 2, "give --run"),
        (("--data", "none"), 2, "--data none beside other texts"),
        (("--model", "nowhere/child"), 2, "nowhere/child"),
        (("--harness", "piqa"), 2, "pip install 'lm_eval[hf]'"),
        (("--run", "somewhere"), 2, "not both"),
    ],
)
def test_mistakes_are_one_line(place: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, words_: str) -> None:
    result = nas(*words(place, tmp_path / "eval.json", *arguments))
    assert result.code == code, result.err
    assert words_ in result.err and result.err.strip().count("\n") == 0
    assert not (tmp_path / "eval.json").exists()


def test_other_mistakes(place: Path, tmp_path: Path) -> None:
    parent = ("eval", "--parent", place / "parent", "--out", tmp_path / "eval.json")
    assert "nothing to measure" in nas(*parent, "--sample-tokens", "0").err
    twice = ("--model", place / "child", "--model", place / "child")
    assert "two models are named child; write NAME=" in nas(*parent, *twice).err
    (tmp_path / "eval.json").write_text("{")
    assert "is damaged" in nas(*parent, "--model", place / "child").err
    planned = succeed(*words(place, tmp_path / "other.json", "--dry-run", "--json")).json
    assert planned["to_measure"].keys() == {"parent", "child"} and not (tmp_path / "other.json").exists()


# What is kept


def test_models_of_another_parent_or_search_leave_the_table(tmp_path: Path) -> None:
    store, measure = EvalStore(tmp_path / "eval.json"), Measure("choices", "toy", "id")
    a, b, child, healed = (
        Subject(n, n, f) for n, f in (("parent", "1"), ("parent", "2"), ("child", "3"), ("healed", "4"))
    )

    def names(models: list[Subject], search: str) -> list[str]:
        return [model["name"] for model in store.begin(models, [measure], search)["models"]]

    assert names([a, child], "s") == ["parent", "child"]
    assert names([a, healed], "s") == ["parent", "child", "healed"]
    assert names([a, healed], "t") == ["parent", "healed"]
    assert names([b, child], "t") == ["parent", "child"]
    store.add(child, 7, {"id": {"acc": 0.5}})
    assert store.begin([b], [Measure("choices", "toy", "other")], "t")["measures"] == [
        {"kind": "choices", "name": "toy", "id": "other", "about": {}}
    ]
    assert store.read()["results"] == {"3:id": {"acc": 0.5}} and store.read()["parameters"] == {"3": 7}
    (tmp_path / "eval.json").write_text(json.dumps({"format": 99, "results": {}}))
    with pytest.raises(CheckpointError, match="newer version"):
        store.read()


def test_results_of_lm_eval_are_read_as_it_writes_them() -> None:
    """The form of `simple_evaluate` of lm-evaluation-harness 0.4."""
    results = {
        "piqa": {"alias": "piqa", "acc,none": 0.68, "acc_stderr,none": 0.0108, "acc_norm,none": 0.7, "acc_norm_stderr,none": "N/A"},
        "boolq": {"alias": "boolq", "acc,none": 0.6, "acc_stderr,none": 0.02},
        "group": {"alias": "group", " ": " "},
    }  # fmt: skip
    found = read_results("group", results, {"piqa": {"original": 1838, "effective": 100}})
    assert found["piqa"] == {"questions": 100, "acc": 0.68, "acc_se": 0.0108, "acc_norm": 0.7, "acc_norm_se": None}
    assert found["boolq"]["acc_norm"] is None and found.keys() == {"piqa", "boolq"}
    with pytest.raises(DataError, match="neither acc nor acc_norm"):
        read_results("gsm8k", {"gsm8k": {"exact_match,strict-match": 0.1}}, {})
    content: dict[str, Any] = {"parameters": {}, "models": [{"name": "parent", "fingerprint": "f"}]}
    content |= {"measures": [{"kind": "harness", "name": "group", "id": "i"}], "results": {"f:i": {"tasks": found}}}
    assert [(row.group, row.metric, row.cells) for row in eval_table(content).rows] == [
        ("piqa (lm-eval), 100 questions", "acc, %", ("68.0 ± 1.1",)),
        ("piqa (lm-eval), 100 questions", "acc_norm, %", ("70.0",)),
        ("boolq (lm-eval)", "acc, %", ("60.0 ± 2.0",)),
    ]


def test_configurations_that_cannot_work_are_refused() -> None:
    for values in ({"text_tokens": 0}, {"sequence_length": 1}, {"seed": -1}, {"batch_tokens": 0}):
        with pytest.raises(ConfigError):
            evaluation.EvalConfig(**values)
