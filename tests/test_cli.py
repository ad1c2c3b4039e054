"""The `nas` command: the whole path, machine output, dry runs, help, and what it says to wrong inputs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from app import BUDGET, HEALING, World, contents, full_disk, nas, stamps, succeed, write_text
from tiny import tiny_llama

from blocks.files import save_text
from nas.commands.options import pick_device
from nas.run import open_run

COMMANDS = ("score", "search", "distill", "show")


def process(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a shell starts it."""
    command = [sys.executable, "-m", "nas", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def fails(code: int, *arguments: object) -> str:
    """Runs what must fail with this exit code, and returns its last line, the one that says why."""
    result = nas(*arguments)
    *before, last = result.err.splitlines()
    assert result.code == code, result.err
    assert last.startswith("error: ")
    assert not any(line.startswith("error: ") or "Traceback" in line for line in before)
    assert result.out == ""
    return last


# The whole path


def test_the_three_commands_and_show(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/default")
    score = world.score_words(run)
    said = succeed(*score).out
    assert re.search(r"40 candidates, \d+ of them scored exactly; rank correlation .*: 0\.\d\d", said)
    assert "next: nas search --budget-gb GB" in said
    searched = succeed("search", "--budget-gb", "0.001", "--batch", 1, "--context", 128).out
    assert "B = 0.0010 GB" in searched and "uniform baseline" in searched and "next: nas distill\n" in searched
    assert "child after healing" in succeed("distill", *HEALING).out
    shown = succeed("show").out
    for made in (
        "Scores: KL to the parent",
        "layer        0    1    2    3",
        "child after healing",
        "runs/default/healed",
    ):
        assert made in shown
    before = stamps(run)
    again = [
        succeed(*score, "--json"),
        succeed("search", "--budget-gb", "0.001", "--batch", 1, "--context", 128, "--json"),
        succeed("distill", *HEALING, "--json"),
        succeed("show", "--json"),
    ]
    assert stamps(run) == before, "what was done is done again"
    for result in again:
        assert isinstance(result.json, dict) and result.err == ""


def test_json_is_all_that_a_process_prints(world: World, tmp_path: Path) -> None:
    """Including what the solver writes past Python's streams."""
    run = world.copy("scored", tmp_path / "run")
    done = process("search", "--run", run, *BUDGET, "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and done.stderr == ""
    assert found["cost"]["total_bytes"] <= found["budget_bytes"]
    assert set(json.loads((run / "architecture.json").read_text())) == set(found)


def test_show_draws_as_wide_as_the_terminal(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    lines = succeed("show", "--run", world.runs / "searched").out.splitlines()
    assert [line.split() for line in lines if line.startswith("layer  ")] == [["layer", "0", "1"], ["layer", "2", "3"]]


def test_rows_of_another_amount_of_text_are_measured_again(world: World, tmp_path: Path) -> None:
    """A search on a CPU measures less of the held-out text than healing on a GPU."""
    run = world.copy("searched", tmp_path / "run")
    found = json.loads((run / "architecture.json").read_text())
    wrong = {"tokens": 1, **{name: {"kl": 9.0, "perplexity": 9.0} for name in ("parent", "child", "uniform")}}
    (run / "architecture.json").write_text(json.dumps(found | {"heldout": wrong}))
    rows = succeed("distill", "--run", run, *HEALING, "--json").json["rows"]
    kls = {row["name"]: row["kl"] for row in rows[:-1]}
    wanted = {name: found["heldout"][name]["kl"] for name in ("child", "uniform")}
    assert kls == pytest.approx(
        {"parent": 0.0, "uniform baseline": wanted["uniform"], "child before healing": wanted["child"]}
    )


def test_another_budget_needs_no_other_scores_and_forgets_old_results(world: World, tmp_path: Path) -> None:
    run = world.copy("healed", tmp_path / "run")
    scores = stamps(run)["scores.csv"]
    old = (run / "architecture.json").read_text()
    succeed("search", "--run", run, "--budget", "0.8", "--batch", 1, "--context", 128)
    assert stamps(run)["scores.csv"] == scores
    assert (run / "architecture.json").read_text() != old
    assert "after healing" not in succeed("show", "--run", run).out
    assert "results" not in succeed("show", "--run", run, "--json").json
    for budget in ("0.8", "0.6", "0.8"):  # healing goes on with each where it was
        succeed("search", "--run", run, "--budget", budget, "--batch", 1, "--context", 128)
        succeed("distill", "--run", run, *HEALING)
        assert "after healing" in succeed("show", "--run", run).out
        if budget == "0.6":
            for part in ("healed", "distill"):
                assert contents(run / part) == contents(world.runs / "healed" / part)
    assert "--restart" in fails(1, "distill", "--run", run, *HEALING, "--seed", 1)
    succeed("distill", "--run", run, *HEALING, "--seed", 1, "--restart")


def test_a_budget_of_everything_gives_the_parent(world: World, tmp_path: Path) -> None:
    run = world.copy("scored", tmp_path / "run")
    found = succeed("search", "--run", run, "--budget", "1", "--json").json
    assert found["cost"] == found["parent_cost"]
    assert set(found["layers"]) == {"attention:kv2+ffn:768"}
    assert found["trials"][0]["kl"] == pytest.approx(0, abs=1e-6)


def test_restart_scores_anew_and_spares_what_is_no_run(world: World, tmp_path: Path) -> None:
    run = world.copy("healed", tmp_path / "run")
    succeed(*world.score_words(run), "--restart", "--fit", "cut")
    assert not (run / "healed").exists() and open_run(run).config.score.fit == "cut"
    save_text(tmp_path / "precious" / "thesis.txt", "years of work")
    assert "is not a run directory" in fails(2, *world.score_words(tmp_path / "precious"), "--restart")
    assert (tmp_path / "precious" / "thesis.txt").exists()


# Dry runs and help


def test_dry_runs_write_nothing_and_say_how_much(world: World, tmp_path: Path) -> None:
    plan = succeed(*world.score_words(tmp_path / "run"), "--dry-run", "--json").json
    assert not (tmp_path / "run").exists()
    assert (plan["candidates"], plan["fit_tokens"], plan["calibration_tokens"]) == (40, 1024, 512)
    assert 0 < plan["scored_exactly"] <= 40 and plan["memory_gb"] > 0
    said = succeed(*world.score_words(tmp_path / "run"), "--dry-run").out
    assert not (tmp_path / "run").exists()
    assert f"Plan: 40 candidates in 4 layers, {plan['scored_exactly']} of them scored exactly too" in said
    assert "1,024 tokens to fit, 512 to score, 256 for exact scores" in said and "time    about" in said
    run = world.copy("searched", tmp_path / "run")
    before = stamps(tmp_path)
    plan = succeed("search", "--run", run, *BUDGET, "--dry-run", "--json").json
    assert plan["candidates"] == 44 and plan["memory_gb"] > 0 and plan["verify_tokens"] > 0
    plan = succeed("distill", "--run", run, *HEALING, "--dry-run", "--json").json
    assert (plan["tokens"], plan["steps"]) == (512, 4) and plan["memory_gb"] > 0
    assert stamps(tmp_path) == before


def test_help_is_quick_and_imports_no_torch(tmp_path: Path) -> None:
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        started = time.perf_counter()
        done = process("--help", cwd=tmp_path)
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0 and "nas search --budget-gb 80" in done.stdout
        if seconds[-1] < 1.5:
            break
    assert min(seconds) < 1.5
    heavy = "{'torch', 'transformers', 'numpy', 'scipy', 'optuna', 'datasets'} & set(sys.modules)"
    program = f"import sys, nas.__main__, nas.cli; print({heavy} or '')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command: str) -> None:
    said = succeed(command, "--help").out
    assert "Examples:" in said and f"nas {command}" in said.split("Examples:")[1]


def test_no_command_shows_the_help() -> None:
    result = nas()
    assert result.code == 2 and "nas score" in result.out and result.err == ""


def test_ctrl_c_says_how_to_go_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nas.score.fit_layer", interrupt)
    result = nas(*world.score_words(tmp_path / "run"))
    assert result.code == 130
    assert result.err.splitlines()[-1] == "stopped; run the same command again and it goes on from here"


@pytest.mark.parametrize(("name", "current"), [("cuda:1", [1]), ("cuda:0", [0]), ("cuda", []), ("cpu", []), (None, [])])
def test_a_chosen_gpu_is_the_current_one(name: str | None, current: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Healing takes the device that is current."""
    taken: list[int | None] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: taken.append(device.index))
    pick_device(name)
    assert taken == current


# Wrong flags and recipes: exit code 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serch"], r"No such command 'serch'\. Did you mean 'search'.*; see nas --help"),
        (["search", "--budget-bg", "80"], r"No such option: --budget-bg.*; see nas search --help"),
        (["search", "--budget-gb", "much"], r"--budget-gb much: 'much' is not a number; write 80, 60:80, 60: or :80"),
        (["search"], r"give a limit: --budget-gb 80 .*, --budget 0\.6"),
        (["search", "--budget-gb", "1", "--budget", "0.5"], r"give one budget"),
        (["search", "--budget-gb", "-1"], r"--budget-gb -1: -1 must be above 0"),
        (["search", "--budget-gb", "inf"], r"--budget-gb inf: inf is no size of any machine"),
        (["search", "--budget-gb", "nan"], r"--budget-gb nan: nan must be above 0"),
        (["search", "--budget", "60"], r"budget is '60'; it must be a share between 0 and 1"),
        (["search", "--budget", "0.5", "--batch", "-4"], r"--batch must be at least 1, not -4"),
        (["search", "--budget", "0.5", "--reserve-gb", "nan"], r"--reserve-gb must be 0 or more, not nan"),
        (["search", "--budget", "0.5", "--kv-dtype", "int3"], r"--kv-dtype int3: .*known: float32, bfloat16, float16"),
        (["search", "--budget", "0.5", "--verify", "0"], r"verify is 0; it must be at least 1"),
        (["score", "--device", "gpu"], r"--device gpu: not a device; write cpu, cuda or cuda:N"),
        (["score", "--device", "meta"], r"--device meta: not supported; write cpu, cuda or cuda:N"),
        (["score", "--device", "cuda:99"], r"--device cuda:99: this machine has \d CUDA devices"),
        (["score", "--method", "guess"], r"method is 'guess'; it must be one of one-pass, exact, both"),
        (["score", "--seed", "-1"], r"seed is -1; it must be 0 or more"),
        (["score", "--sequence-length", "-5"], r"sequence_length is -5; it must be at least 2"),
        (["score", "--fit-tokens", "-5"], r"fit_tokens is -5, less than 8 sequences of 512 \(4096 tokens\)"),
        (["score", "--exact-share", "-0.5"], r"exact_share is -0\.5; it must be between 0 and 1"),
        (["score", "--space", "defualt"], r"--space defualt: no such recipe or file; recipes here: default"),
        (["score", "--target", "vlm"], r"--target vlm: not known \(did you mean 'vllm'\?\)"),
        (["score", "--parent", "no-such-parent"], r"no parent 'no-such-parent': .*embedded \(smollm2\)"),
        (["score", "--parent", "no/such-parent"], r"no directory no/such-parent, and the hub does not give it"),
        (["distill", "--tokens", "-1"], r"distill\.tokens is -1; it must be at least 1"),
        (["distill", "--learning-rate", "nan"], r"distill\.learning_rate is nan; it must be a positive number"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_2(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert re.search(said, fails(2, *words))


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("scor: {}", r"r\.yaml: the recipe: unknown key 'scor' \(did you mean 'score'\?\); known: run, data, score"),
        ("score: {label_sampels: 2}", r"score: unknown key 'label_sampels' \(did you mean 'label_samples'\?\)"),
        ("score: 3", r"score must be a mapping with keys method, estimator, .*fit, pseudo_tokens"),
        ("score: [unclosed", r"r\.yaml is not YAML: "),
        ("distill: {learning_rate: 6e-4}", r"distill\.learning_rate is '6e-4'; .*a number \(with a dot: 6\.0e-4\)"),
        ("scenario: {batch: 1.5}", r"scenario\.batch is 1\.5; it must be a whole number"),
        ("search: {refit: 'no'}", r"search\.refit is 'no'; it must be true or false"),
        ("distill: {betas: [0.9, much]}", r"distill\.betas is \[0\.9, 'much'\]; it must be a list of a number"),
        ("data: {seed: -3}", r"seed is -3; it must be 0 or more"),
    ],
)
def test_wrong_recipes_name_the_file_or_key(world: World, tmp_path: Path, recipe: str, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(recipe)
    section = recipe.split(":")[0]
    command = {
        "distill": ["distill"],
        "scenario": ["search", "--budget", "0.5"],
        "search": ["search", "--budget", "0.5"],
    }
    assert re.search(said, fails(2, *command.get(section, ["score"]), "--recipe", path))


def test_a_flag_overrides_the_recipe_and_the_run_records_both(world: World, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"run: {{parent: {world.parent}, space: quick}}\ndata: {{source: {world.text}, sequence_length: 32, seed: 5}}\n"
        "score: {label_samples: 3, method: exact}\n"
    )
    words = ("score", "--recipe", recipe, "--method", "both", *world.score_words(tmp_path)[7:])
    made = succeed(*words, "--run", tmp_path / "run", "--json").json
    config = open_run(tmp_path / "run").config
    assert (config.space, config.data.seed, config.score.label_samples, config.score.method) == ("quick", 5, 3, "both")
    assert made["exact"] == made["candidates"] == made["rank_correlation"]["candidates"]


def test_there_is_no_such_recipe(tmp_path: Path) -> None:
    assert "No such file" in fails(2, "score", "--recipe", tmp_path / "none.yaml")


# Wrong parents, data and order of commands


def test_another_architecture_is_named_with_what_works(world: World, tmp_path: Path) -> None:
    gpt2 = shutil.copytree(world.parent, tmp_path / "gpt2")
    save_text(gpt2 / "config.json", '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    assert re.search("gpt2.*llama", fails(1, "score", "--parent", gpt2, "--run", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garble(file: Path) -> None:
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


@pytest.mark.parametrize("damage", [cut_in_half, garble])
def test_damaged_safetensors_are_named(world: World, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    parent = shutil.copytree(world.parent, tmp_path / "parent")
    damage(parent / "model.safetensors")
    assert "model.safetensors" in fails(1, "score", "--parent", parent, "--run", tmp_path / "run")


def test_wrong_text_is_named_and_the_next_attempt_can_have_other_text(world: World, tmp_path: Path) -> None:
    little, run = write_text(tmp_path / "little.jsonl", documents=3), tmp_path / "run"
    words = world.score_words(run)
    wrong = (*words[:4], little, *words[5:])
    assert re.search(r"little\.jsonl holds \d+ tokens, which leaves .*give more text", fails(2, *wrong))
    missing = (*words[:4], tmp_path / "none.txt", *words[5:])
    assert "none.txt" in fails(2, *missing)
    assert "has no column 'body'; set text_column to one of text" in fails(2, *words, "--text-column", "body")
    succeed(*words)


def test_a_run_keeps_its_parent_and_settings(world: World, tmp_path: Path) -> None:
    run = world.runs / "scored"
    before = contents(run)
    said = fails(1, *world.score_words(run), "--seed", 3)
    assert re.search(r"belongs to other settings: data\.seed 0, not 3; score\.seed 0, not 3; use another --run", said)
    other = tiny_llama(tmp_path / "other", seed=1, initializer_range=0.1, intermediate_size=768)
    words = world.score_words(run)
    assert re.search(r"belongs to another parent: .*--restart", fails(1, *words[:2], other, *words[3:]))
    assert re.search(r"belongs to another parent: .*--restart", fails(1, *words[:2], other, *words[3:], "--dry-run"))
    assert contents(run) == before


def test_a_parent_that_changed_since_is_noticed(world: World, tmp_path: Path) -> None:
    parent, run = shutil.copytree(world.parent, tmp_path / "parent"), world.copy("scored", tmp_path / "run")
    config = (run / "config.yaml").read_text()
    save_text(run / "config.yaml", config.replace(str(world.parent), str(parent)))
    succeed("search", "--run", run, *BUDGET, "--dry-run")
    tiny_llama(parent, seed=1, initializer_range=0.1, intermediate_size=768)
    assert "belongs to another parent" in fails(1, "search", "--run", run, *BUDGET)


def test_commands_out_of_order_name_the_one_before(world: World, tmp_path: Path) -> None:
    none = tmp_path / "none"
    for words in (("search", *BUDGET), ("distill",), ("show",)):
        assert f"no run at {none}; start one with `nas score --run {none}`" in fails(1, *words, "--run", none)
    run = world.runs / "scored"
    assert f"has no architecture.json yet; run `nas search --run {run}` first" in fails(1, "distill", "--run", run)


def test_an_impossible_budget_names_the_smallest_and_what_binds(world: World, tmp_path: Path) -> None:
    run = world.copy("scored", tmp_path / "run")
    for scenario, binds in (((), "the KV cache"), (("--batch", 1, "--reserve-gb", 0.01), "the reserve")):
        said = fails(3, "search", "--run", run, "--budget-gb", "0.0001", *scenario)
        assert f"what binds is {binds}" in said
        match = re.search(
            r"the smallest takes (\S+) GB .*Raise --budget-gb to (\S+) \(--budget to (\S+)\) or more", said
        )
        assert match and match[1] == match[2]
        for flag, least in (("--budget-gb", match[2]), ("--budget", match[3])):
            words = ("search", "--run", run, *scenario, flag)
            succeed(*words, least, "--dry-run")
            fails(3, *words, f"{float(least) - 0.0001:.4f}", "--dry-run")
    found = succeed("search", "--run", run, "--budget-gb", match[2], *scenario, "--json").json
    assert found["cost"]["total_bytes"] <= found["budget_bytes"] == round(float(match[2]) * 1e9)
    assert not (run / "uniform").exists() and "uniform baseline" not in succeed("show", "--run", run).out


# Damaged runs: exit code 1


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("scores.csv", "layer,attention\n0,attention:kv2\n", ("search", *BUDGET)),
        ("scores.csv", "", ("search", *BUDGET)),
        ("config.yaml", "\x00\x01", ("search", *BUDGET)),
        ("config.yaml", "just text", ("show",)),
        ("config.yaml", "parent: [", ("distill",)),
        ("architecture.json", '{"key": ', ("distill",)),
        ("study.journal", "not json\nat all\n", ("search", "--budget", "0.7")),
        ("study.journal", "[]\n", ("search", "--budget", "0.7")),
        ("data/calibration.npy", "not numpy", ("search", "--budget", "0.7")),
    ],
)
def test_damaged_files_are_named(
    world: World, tmp_path: Path, file: str, content: str, words: tuple[object, ...]
) -> None:
    run = world.copy("searched", tmp_path / "run")
    (run / file).write_text(content)
    said = fails(2 if file.startswith("data/") else 1, *words, "--run", run)
    assert str(run / file) in said


def test_a_damaged_library_layer_is_rebuilt_alone(world: World, tmp_path: Path) -> None:
    run = world.copy("scored", tmp_path / "run")
    before, layer = contents(run), run / "library" / "layer_002.safetensors"
    layer.write_bytes(layer.read_bytes()[:1000])
    # Everything is skipped wherever that is cheaper, so the search must use layer 2.
    said = fails(1, "search", "--run", run, "--budget-gb", "0.0007", "--batch", 4, "--context", 2048)
    assert f"{layer} cannot be read" in said and "delete it and run `nas score` again" in said
    layer.unlink()
    old = stamps(run)
    succeed(*world.score_words(run))
    new = stamps(run)
    changed = {name for name in new if new[name] != old.get(name)}
    assert changed == {"library/layer_002.safetensors", "scores.csv", "score.json"}
    assert contents(run)["library/layer_002.safetensors"] == before["library/layer_002.safetensors"]
    assert contents(run)["scores.csv"] == before["scores.csv"]


def test_a_damaged_score_file_is_named(world: World, tmp_path: Path) -> None:
    run = world.copy("scored", tmp_path / "run")
    (run / "scores.csv").unlink()
    (run / "scores" / "exact_001.json").write_text('{"attention')
    assert "exact_001.json is damaged" in fails(1, *world.score_words(run))
    (run / "scores" / "exact_001.json").unlink()
    succeed(*world.score_words(run))
    assert contents(run)["scores.csv"] == contents(world.runs / "scored")["scores.csv"]


def test_a_child_of_another_search_is_not_healed(world: World, tmp_path: Path) -> None:
    run = world.copy("searched", tmp_path / "run")
    shutil.rmtree(run / "child")
    shutil.copytree(run / "uniform", run / "child")
    assert "run `nas search" in fails(1, "distill", "--run", run, *HEALING)


# A full disk: one line, what was there stays, and the same command completes


@pytest.mark.parametrize(
    ("most_bytes", "file"),
    [(300, "env.json"), (20_000, "data/train.npy"), (100_000, "library/layer_003.safetensors")],
)
def test_a_disk_full_while_scoring(world: World, tmp_path: Path, most_bytes: int, file: str) -> None:
    run = tmp_path / "run"
    with full_disk(most_bytes):
        said = fails(1, *world.score_words(run))
    assert f"cannot write {run / file}: " in said and "run the same command again" in said
    assert not (run / file).exists() and not list(run.rglob("*.tmp"))
    succeed(*world.score_words(run))
    assert contents(run)["scores.csv"] == contents(world.runs / "scored")["scores.csv"]


def test_a_disk_full_while_writing_the_table(world: World, tmp_path: Path) -> None:
    run = world.copy("scored", tmp_path / "run")
    (run / "scores.csv").unlink()
    before = stamps(run)
    with full_disk(3000):
        assert f"cannot write {run / 'scores.csv'}" in fails(1, *world.score_words(run))
    assert stamps(run) == before
    succeed(*world.score_words(run))
    assert contents(run)["scores.csv"] == contents(world.runs / "scored")["scores.csv"]


@pytest.mark.parametrize("file", ["study.journal", "child"])
def test_a_disk_full_while_searching(world: World, tmp_path: Path, file: str) -> None:
    run, words = world.copy("searched", tmp_path / "run"), ("--budget", "0.8", "--batch", 1, "--context", 128)
    before = contents(run)
    # The journal can take the line of the new study, and part of the first child's.
    with full_disk(500_000 if file == "child" else len(before["study.journal"]) + 300):
        assert f"cannot write {run / file}" in fails(1, "search", "--run", run, *words)
    after = contents(run)
    assert {name for name in before if before[name] != after.get(name)} <= {"study.journal"}
    assert len(after["study.journal"]) > len(before["study.journal"])
    assert after["study.journal"].startswith(before["study.journal"])
    found = succeed("search", "--run", run, *words, "--json").json
    untroubled = world.copy("searched", tmp_path / "untroubled")
    expected = succeed("search", "--run", untroubled, *words, "--json").json
    for key in ("layers", "trials", "heldout"):
        assert found[key] == expected[key]


def test_a_disk_full_while_healing(world: World, tmp_path: Path) -> None:
    run = world.copy("searched", tmp_path / "run")
    before = contents(run)
    with full_disk(500_000):
        assert f"cannot write {run / 'distill'}" in fails(1, "distill", "--run", run, *HEALING)
    assert before.items() <= contents(run).items()
    succeed("distill", "--run", run, *HEALING)
    healed = contents(run / "healed")
    assert healed == contents(world.runs / "healed" / "healed")
