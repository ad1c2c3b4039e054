"""`nas report`: the page says what the run's files say, everywhere, and works for a run that has got only so far."""

from __future__ import annotations

import io
import json
import math
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from app import World, nas, succeed
from hypothesis import given
from hypothesis import strategies as st
from report_page import Node, axis, marks, read_page
from report_run import MadeUp
from rich.console import Console

from blocks.errors import CheckpointError
from blocks.spec import LayerSpec
from nas.report import collect, write_report
from nas.report_charts import front
from nas.report_html import FIGURES
from nas.report_style import DARK, LIGHT, SCORES, ramp
from nas.report_svg import Scale, element, plain
from nas.report_words import spearman
from nas.show import search_lines

NAMES = {figure.name for figure in FIGURES}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 layers in which everything is done."""
    return MadeUp().write(tmp_path_factory.mktemp("runs") / "made-up")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture(scope="module")
def written(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with its report."""
    run = Path(shutil.copytree(whole, tmp_path_factory.mktemp("written") / "made-up"))
    write_report(run)
    return run


@pytest.fixture(scope="module")
def told(written: Path) -> tuple[dict[str, Any], Node]:
    return json.loads((written / "report.json").read_text()), read_page((written / "report.html").read_text())


def change(run: Path, **values: Any) -> None:
    """Changes keys of architecture.json; a value of None removes the key."""
    path = run / "architecture.json"
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def page_of(run: Path) -> tuple[dict[str, Any], Node]:
    report = write_report(run)
    return report, read_page((run / "report.html").read_text())


# What is on the page


def test_a_whole_run_has_every_figure_with_title_caption_and_legend(told: tuple[dict[str, Any], Node]) -> None:
    report, page = told
    assert report["notes"] == {}
    for name in NAMES:
        figure = page.by_id(name)
        assert figure.tag == "figure"
        assert figure.all("h2")[0].text
        assert len(figure.all("figcaption")[0].text) > 20
        assert figure.all("svg") and figure.all("ul", "legend")[0].all("li"), name


def test_every_chart_names_both_axes_with_their_units(told: tuple[dict[str, Any], Node]) -> None:
    labels = {name: [label.text for label in told[1].by_id(name).all("text", "label")] for name in NAMES}
    assert labels["pareto"] == [
        "memory: weights + KV cache + reserve (GB = 1e9 bytes)",
        "true KL to the parent (nats/token)",
    ]
    assert labels["speed"] == ["throughput on H100 (tokens/s, estimate)", "true KL to the parent (nats/token)"]
    assert labels["predicted"] == ["predicted KL: the sum of scores (nats/token)", "true KL to the parent (nats/token)"]
    assert labels["budget"] == ["memory (GB, decimal)"]
    assert labels["history"] == ["trial number", "true KL to the parent (nats/token)"]
    assert labels["finalists"] == ["healing tokens", "KL to the parent (nats/token)"]
    assert labels["learning"] == ["healing tokens", "held-out KL to the parent (nats/token)"]
    assert labels["perplexity"] == ["healing tokens", "perplexity"]
    assert labels["scores"] == ["layer"]


def test_nothing_comes_from_the_network_and_nothing_is_run(written: Path, told: tuple[dict[str, Any], Node]) -> None:
    text = (written / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|url\(|@import|@font-face|<script|<link|<iframe|javascript:", text)
    assert not [node for node in told[1].walk() if {"src", "href"} & node.attributes.keys()]
    assert not [name for node in told[1].walk() for name in node.attributes if name.startswith("on")]


def test_it_is_for_light_and_dark(written: Path) -> None:
    text = (written / "report.html").read_text()
    assert "prefers-color-scheme:dark" in text
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    for theme in text.split("@media(prefers-color-scheme:dark)"):
        assert used <= set(re.findall(r"--([\w-]+):#", theme))


# Numbers


CHARTS = {  # figure: key of x, logarithmic x, the points that must be there
    "pareto": ("gb", False, lambda p: p["state"] == "complete" and p["gb"] is not None),
    "speed": ("tokens_per_s", False, lambda p: p["state"] == "complete" and p["tokens_per_s"] is not None),
    "predicted": ("predicted_kl", True, lambda p: p["state"] == "complete" and p["predicted_kl"] and p["kl"] > 0),
    "history": ("number", False, lambda p: p["number"] is not None),
}


@pytest.mark.parametrize("name", CHARTS)
def test_points_stand_where_the_ticks_say(told: tuple[dict[str, Any], Node], name: str) -> None:
    report, page = told
    key, log, wanted = CHARTS[name]
    figure = page.by_id(name)
    x, y = axis(figure, "x", log), axis(figure, "y", True)
    drawn = sorted(marks(figure))
    points = [p for p in report["points"] if p["kl"] is not None and wanted(p)]
    expected = sorted((p["name"], x.at(p[key]), y.at(p["kl"])) for p in points)
    assert len(points) > 30
    assert [name for name, _, _ in drawn] == [name for name, _, _ in expected]
    for (_, *place), (_, *right) in zip(drawn, expected, strict=True):
        assert place == pytest.approx(right, abs=0.3)


def test_healing_curves_stand_where_the_ticks_say(told: tuple[dict[str, Any], Node]) -> None:
    report, page = told
    figure = page.by_id("finalists")
    x, y = axis(figure, "x", True), axis(figure, "y", True)
    steps = [(f["name"], x.at(h["tokens"]), y.at(h["kl"])) for f in report["finalists"] for h in f["heal"]]
    drawn = [mark for mark in marks(figure)]
    assert len(drawn) == 5 + 5 + 4 + 2
    for place, right in zip(sorted(drawn), sorted(steps), strict=True):
        assert place[0] == right[0] and place[1:] == pytest.approx(right[1:], abs=0.3)

    assert (
        len(report["learning"]) == len(report["other_texts"]["general"]) == 13
    )  # a crash cut a line off: it is left out
    curves = {"general": report["other_texts"]["general"], "held-out text": report["learning"]}
    for name, key in (("learning", "kl"), ("perplexity", "perplexity")):
        figure = page.by_id(name)
        x, y = axis(figure, "x", False), axis(figure, "y", True)
        right = [(curve, x.at(e["tokens"]), y.at(e[key])) for curve, es in curves.items() for e in es]
        drawn = marks(figure)
        assert [mark[0] for mark in drawn] == [point[0] for point in right]
        for place, expected in zip(drawn, right, strict=True):
            assert place[1:] == pytest.approx(expected[1:], abs=0.3)


def test_the_band_of_the_learning_curve_is_one_standard_error(told: tuple[dict[str, Any], Node]) -> None:
    report, page = told
    figure = page.by_id("learning")
    x, y = axis(figure, "x", False), axis(figure, "y", True)
    (band,) = figure.all("polygon", "o-child")
    outline = [tuple(map(float, point.split(","))) for point in band.attributes["points"].split()]
    es = report["learning"]
    edges = [(e, 1) for e in es] + [(e, -1) for e in reversed(es)]
    for (at, height), (e, sign) in zip(outline, edges, strict=True):
        assert at == pytest.approx(x.at(e["tokens"]), abs=0.3)
        assert height == pytest.approx(y.at(e["kl"] + sign * e["kl_se"]), abs=0.6)


def test_training_loss_lies_behind_the_learning_curve(told: tuple[dict[str, Any], Node]) -> None:
    report, page = told
    figure = page.by_id("learning")
    x, y = axis(figure, "x", False), axis(figure, "y", True)
    lines = figure.all("polyline")
    assert [line.attributes["class"] for line in lines[:2]] == ["loss", "curve o-pool"]  # drawn first
    points = [tuple(map(float, point.split(","))) for point in lines[0].attributes["points"].split()]
    assert len(points) == len(report["training"]) == 13
    for (at, height), loss in list(zip(points, report["training"], strict=True))[1:]:
        assert (at, height) == pytest.approx((x.at(loss["tokens"]), y.at(loss["loss"])), abs=0.3)


def test_stages_follow_one_another_on_one_axis(run: Path) -> None:
    lines: list[dict[str, Any]] = []
    for name, steps, loss in (("1-kl", 1000, 0.5), ("2-ce", 30, 3.0)):
        for step in range(0, steps + 1, 10 if steps == 30 else 1):
            place = {"step": step, "tokens": step * 100, "stage": name}
            lines.append({"kind": "train", "loss": loss, **place})
            if step % (steps // 2) == 0:
                lines.append({"kind": "eval", "kl": 0.4, "kl_se": None, "student_perplexity": 9.0, **place})
    lines.append({"kind": "eval", "kl": 0.3, "step": 30, "tokens": 3000, "stage": "2-ce"})  # measured again on resuming
    lines.append({"kind": "eval", "kl": float("nan"), "step": 31, "tokens": 3100, "stage": "2-ce"})
    (run / "distill" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report, page = page_of(run)
    assert report["stages"] == [{"name": "1-kl", "tokens": 0}, {"name": "2-ce", "tokens": 100_000}]
    told = [(e["stage"], e["tokens"], e["kl"]) for e in report["learning"]]
    assert [place for place in told if place[0] == "1-kl"] == [("1-kl", at, 0.4) for at in (0, 50_000, 100_000)]
    assert [place for place in told if place[0] == "2-ce"] == [("2-ce", 100_000, 0.4), ("2-ce", 103_000, 0.3)]
    training = report["training"]
    assert len(training) <= 401 + 2 and {t["loss"] for t in training} == {0.5, 3.0}
    assert training[-1]["tokens"] == 103_000
    figure = page.by_id("learning")
    assert [t.text for t in figure.all("text", "tick") if t.text in ("1-kl", "2-ce")] == ["1-kl", "2-ce"]
    (kept,) = [mark for mark in figure.all("g", "star") if "data-x" in mark.attributes]
    assert kept.attributes["data-x"] == "103000"  # of the last stage
    assert len(figure.all("polyline", "loss")) == 1  # a cross-entropy has no place on this axis
    assert figure.all("polygon") == []
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("names", [["1-qad"], ["1-kl", "2-qad"], ["1-bld", "2-kl"]])
def test_stages_of_another_healing_of_the_same_child_are_not_told(run: Path, names: list[str]) -> None:
    """Their checkpoints and metrics stay in distill/ beside those of the last one."""
    lines = [
        {"kind": kind, "kl": 0.4, "loss": 0.5, "step": step, "tokens": step * 100, "stage": stage}
        for stage in ("1-kl", "2-qad", None, "1-bld", "2-kl")
        for step in (0, 10)
        for kind in ("train", "eval")
    ]
    (run / "distill" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(results | {"stages": [{"name": name} for name in names]}))
    report, _ = page_of(run)
    told = [None] if len(names) == 1 else names
    assert [stage["name"] for stage in report["stages"]] == [name for name in told if name]
    places = [(name, number * 1000 + tokens) for number, name in enumerate(told) for tokens in (0, 1000)]
    for curve in ("learning", "training"):
        assert [(point["stage"], point["tokens"]) for point in report[curve]] == places


def test_the_evaluation_stands_on_the_page(run: Path, told: tuple[dict[str, Any], Node]) -> None:
    _, page = told
    figure = page.by_id("eval")
    rows = {row.all("th")[0].text.strip(): [cell.text for cell in row.all("td")] for row in figure.all("tr")}
    assert rows["parameters"] == ["134,515,008", "81,000,000"]
    assert rows["KL to parent"] == ["0", "0.6100 ± 0.0123"]
    assert rows["acc, %"] == ["75.0 ± 16.4", "37.5 ± 16.4"]
    assert rows["less the parent's"] == ["", "-37.5 ± 18.3"]
    assert "quiz, 8 questions, chance 25 %" in rows
    assert "The <b>sun</b>" in figure.text and "child:  is c & warm" in figure.text
    change(run, key="another")
    report, page = page_of(run)
    assert report["eval"] is None and not [node for node in page.walk() if node.attributes.get("id") == "eval"]


def test_bars_are_as_long_as_their_bytes(told: tuple[dict[str, Any], Node]) -> None:
    report, page = told
    figure = page.by_id("budget")
    x = axis(figure, "x", False)
    bars = [node for node in figure.all("rect") if "data-bytes" in node.attributes]
    models = [model for model in report["models"] if model["kind"] != "healed"]
    kinds = ("fixed_bytes", "attention_bytes", "ffn_bytes", "kv_bytes")
    assert [int(bar.attributes["data-bytes"]) for bar in bars] == [m["cost"][kind] for m in models for kind in kinds]
    for bar in bars:
        length = x.at(int(bar.attributes["data-bytes"]) / 1e9) - x.at(0)
        assert float(bar.attributes["width"]) == pytest.approx(length, abs=0.05)
    limit = figure.all("line", "limit")[0]
    assert float(limit.attributes["x1"]) == pytest.approx(x.at(report["budget_bytes"] / 1e9), abs=0.05)


def test_the_data_is_that_of_the_files(whole: Path, told: tuple[dict[str, Any], Node]) -> None:
    report = told[0]
    assert collect(whole) == report
    found = json.loads((whole / "architecture.json").read_text())
    for trial in found["trials"]:
        (point,) = [p for p in report["points"] if p["number"] == trial["number"]]
        assert [point[key] for key in ("kl", "kl_se", "predicted_kl")] == [
            trial[k] for k in ("kl", "kl_se", "predicted_kl")
        ]
        assert point["gb"] == trial["total_bytes"] / 1e9
        assert point["child"] == (trial["layers"] == found["layers"])
    assert sum(p["finalist"] for p in report["points"]) >= 5
    assert len([p for p in report["points"] if p["origin"] == "uniform"]) == 1  # once, as a trial


def test_the_map_shows_each_part_and_the_share_it_keeps(told: tuple[dict[str, Any], Node]) -> None:
    report, page = told
    layers = next(model["layers"] for model in report["models"] if model["kind"] == "child")
    cells = page.by_id("map").all("div", "pane-0")[0].all("g", "cell")
    titles = [cell.all("title")[0].text for cell in cells]
    assert [t.split(", ")[1].split(":")[0] for t in titles] == ["attention"] * 30 + ["ffn"] * 30
    for index, layer in enumerate(layers):
        for title, part in zip((titles[index], titles[30 + index]), layer.split("+"), strict=True):
            assert title.startswith(f"layer {index}, {part}: keeps ")

    def attention(heads: int) -> int:
        """Bytes by hand: q and o, k and v, the norm; and 4 x 2048 tokens of KV; 2 bytes each."""
        return 2 * (2 * 576 * 576 + 2 * 576 * 64 * heads + 576) + 2 * (4 * 2048 * 2 * 64 * heads)

    kept = report["map"]["kept"]
    assert kept["attention:kv1"] == pytest.approx(attention(1) / attention(3))
    assert kept["ffn:512"] == pytest.approx((3 * 576 * 512 + 576) / (3 * 576 * 1536 + 576))
    assert (kept["attention:skip"], kept["ffn:skip"], kept["attention:kv3"]) == (0, 0, 1)
    own = [cell for cell, title in zip(cells, titles, strict=True) if "attention:kv3" in title or "ffn:1536" in title]
    assert own and all("k5" in cell.attributes["class"].split() for cell in own)


def test_each_map_can_be_chosen_and_is_shown_small(told: tuple[dict[str, Any], Node]) -> None:
    report, page = told
    figure, names = page.by_id("map"), report["map"]["models"]
    assert {"uniform", "depth-contiguous", "depth-score", "random"} < names.keys()
    buttons = figure.all("input")
    assert len(buttons) == len(names) == len(figure.all("div", "pane"))
    assert {label.attributes["for"] for label in figure.all("label")} == {button.attributes["id"] for button in buttons}
    assert ["checked" in button.attributes for button in buttons] == [True] + [False] * (len(buttons) - 1)
    sheet = page.all("style")[0].text
    for index in range(len(names)):
        assert f"#map-{index}:checked~.map .pane-{index}" in sheet


def test_colours_of_scores_are_ordered_as_scores(told: tuple[dict[str, Any], Node]) -> None:
    report, page = told
    cells = [node for node in page.by_id("scores").all("rect") if "data-score" in node.attributes]
    assert len(cells) == 30 * 15
    pairs = [(float(c.attributes["data-score"]), c.attributes["class"]) for c in cells]
    assert {class_ for score, class_ in pairs if score == 0} == {"s-own"}
    levels = [int(class_[1:]) for score, class_ in sorted(pairs) if score > 0]
    assert levels == sorted(levels) and (levels[0], levels[-1]) == (0, 8)
    low, high = min(score for score, _ in pairs if score > 0), max(score for score, _ in pairs)
    for score, class_ in pairs:
        if score > 0:
            share = math.log(score / low) / math.log(high / low) * 9
            assert abs(int(class_[1:]) + 0.5 - share) <= 0.5 + 1e-3
    assert len(page.by_id("scores").all("rect", "chosen")) == 30 + 1  # one in the legend
    outlined = {
        (c.attributes["x"], c.attributes["y"])
        for c in page.by_id("scores").all("rect", "chosen")
        if "x" in c.attributes
    }
    titles = [c.all("title")[0].text for c in cells if (c.attributes["x"], c.attributes["y"]) in outlined]
    layers = next(model["layers"] for model in report["models"] if model["kind"] == "child")
    assert sorted(t.split(":")[0] + t[t.index(",") : t.rindex(":")] for t in titles) == sorted(
        f"layer {index}, {layer}".split(":")[0] + f", {layer}" for index, layer in enumerate(layers)
    )


def test_the_front_is_what_no_point_beats() -> None:
    rng = random.Random(0)
    points = [(rng.randint(0, 30) / 10, rng.randint(1, 30) / 10) for _ in range(80)]
    for more in (False, True):
        sign = -1 if more else 1
        unbeaten = {
            (x, kl)
            for x, kl in points
            if not any(sign * a <= sign * x and b <= kl and (a, b) != (x, kl) for a, b in points)
        }
        assert set(front(points, more)) == unbeaten


def test_tables_tell_errors_prices_and_the_proof(told: tuple[dict[str, Any], Node]) -> None:
    report, page = told
    child = next(model for model in report["models"] if model["kind"] == "child")
    text = page.by_id("results").text
    assert f"{child['kl']:.4f} ± {child['kl_se']:.4f}" in text
    assert f"{child['heldout']['kl']:.4f} ± {child['heldout']['kl_se']:.4f}" in text
    assert "0.3100 ± 0.0050" in text  # healed
    rows = {
        row.all("th")[0].text: [cell.text for cell in row.all("td")]
        for row in page.by_id("limits").all("tr")
        if row.all("td")
    }
    assert rows["memory (weights, KV cache, reserve)"][3:] == ["yes", "8.1 nats per GB"]
    assert rows["time per output token"][1] == "4 ms"  # architecture.json has it in ns
    assert rows["throughput"][0] == "1,000 tokens/s"
    assert rows["sum of scores of the best choice"] == [f"{report['optimum']['score']:.6g}"]
    assert "0.963 on 71" in page.by_id("made").text


def test_prices_are_in_readable_units(run: Path) -> None:
    prices = {"memory": -8.1e-9, "tpot": -2e-7}
    change(run, optimum={"score": 1.0, "binding": ["tpot"], "prices": prices})
    text = page_of(run)[1].by_id("limits").text
    assert "0.2 nats per ms" in text  # 2e-7 a ns


# Estimates


def test_a_datasheets_times_are_marked_everywhere(told: tuple[dict[str, Any], Node]) -> None:
    page = told[1]
    for name in ("speed", "pareto", "history", "predicted"):
        for title in page.by_id(name).all("title"):
            for line in title.text.splitlines():
                assert "tokens/s" not in line or "(estimate)" in line
    heads = [head.text for head in page.all("th") if "tokens/s" in head.text or head.text.startswith("ms ")]
    assert len(heads) == 3 and all("(estimate)" in head for head in heads)
    assert "(estimate)" in page.all("p", "lead")[0].text
    assert [t.text for t in page.all("div", "tile") if "tokens/s" in t.text and "estimate" not in t.text] == []


def test_a_measured_clock_is_no_estimate(run: Path) -> None:
    change(run, clock={"name": "profiles/h100.json", "device": "H100", "estimate": False})
    _, page = page_of(run)
    assert "estimate)" not in page.text and ", estimate" not in page.text
    assert "tokens/s" in page.by_id("speed").text


# Any text is shown as it is


def test_markup_in_names_is_shown_not_obeyed(run: Path) -> None:
    bad = '<script>alert("x")</script>&amp;\'">'
    found = json.loads((run / "architecture.json").read_text())
    found["trials"][7]["origin"] = bad
    found["finalists"][0]["name"] = bad
    found["baselines"][bad] = found["baselines"]["random"]
    change(run, parent=bad, warnings=[bad], formula=bad, **{k: found[k] for k in ("trials", "finalists", "baselines")})
    _, page = page_of(run)
    assert page.all("script") == []
    assert page.all("p", "warning")[0].text == f"Warning: {bad}"
    assert bad in page.all("p", "facts")[0].text
    assert any(bad in label.text for label in page.by_id("map").all("label"))
    assert any(entry.text == bad for entry in page.by_id("history").all("li"))


@given(st.text(), st.text())
def test_elements_escape_text_and_attributes(words: str, value: str) -> None:
    if "\x00" in words + value or "\r" in words + value or any(0xD800 <= ord(c) < 0xE000 for c in words + value):
        return
    (node,) = [n for n in read_page(element("p", words, title=value)).walk() if n.tag == "p"]
    assert (node.text, node.attributes["title"]) == (words, value)


# Large runs, and runs that have got only so far


def test_126_layers_scroll_in_their_box(tmp_path: Path) -> None:
    made = MadeUp(layers=126)
    made.cheapen = lambda greed, budget=None: made._depth(range(60, 126))  # type: ignore[method-assign]
    run = made.write(tmp_path / "deep")
    started = time.perf_counter()
    report, page = page_of(run)
    assert time.perf_counter() - started < 10
    assert report["map"]["columns"] == [str(index) for index in range(126)]
    for name in ("map", "scores"):
        (box, *_) = page.by_id(name).all("div", "scroll")
        drawing = box.all("svg")[0]
        assert "fixed" in drawing.attributes["class"]
        width = float(drawing.attributes["width"])
        assert width / 126 >= 26  # of a column, for labels of 10 px
        assert [t.text for t in drawing.all("text", "tick")][:126] == report["map"]["columns"]


def test_a_scored_run_has_scores_and_says_what_is_next(run: Path) -> None:
    for name in ("architecture.json", "results.json"):
        (run / name).unlink()
    shutil.rmtree(run / "distill")
    report, page = page_of(run)
    assert NAMES - report["notes"].keys() == {"scores"}
    for name, note in report["notes"].items():
        assert page.by_id(name).all("figcaption")[0].text == note and page.by_id(name).all("svg") == []
    assert "nas search" in page.all("p", "lead")[0].text
    assert "0.963" in page.text


@pytest.mark.parametrize(
    ("missing", "absent"),
    [
        (("finalists",), {"finalists"}),
        (("path", "baselines", "heldout", "warnings", "optimum", "limits", "seconds"), set()),
        (("trials",), {"history"}),
        (("shape",), set()),
        (("budget_bytes", "limits"), set()),
        (("kl", "kl_se", "origin", "scenario", "shape"), set()),
    ],
)
def test_keys_may_be_absent(run: Path, missing: tuple[str, ...], absent: set[str]) -> None:
    change(run, **dict.fromkeys(missing))
    report, page = page_of(run)
    assert report["notes"].keys() == absent
    assert {name for name in NAMES if page.by_id(name).all("svg")} == NAMES - absent


def test_a_run_without_a_clock_has_no_times(run: Path) -> None:
    found = json.loads((run / "architecture.json").read_text())
    for cost in (found["cost"], found["parent_cost"], *(b["cost"] for b in found["baselines"].values())):
        cost.update(tokens_per_s=None, prefill_ms=None, decode_ms=None)
    for trial in found["trials"]:
        trial["tokens_per_s"] = None
    limits = {"memory": found["limits"]["memory"]}
    change(run, **{k: found[k] for k in ("cost", "parent_cost", "baselines", "trials")}, limits=limits, clock=None)
    report, page = page_of(run)
    assert report["notes"].keys() == {"speed"} and "--clock" in report["notes"]["speed"]
    assert "tokens/s" not in page.by_id("results").text and "estimate" not in page.text


def test_a_search_on_a_table_from_elsewhere(tmp_path: Path) -> None:
    """80 layers, names that are not ours, nothing measured: the map, the costs and the proof are there."""
    names = [f"n_heads {8 if i % 3 else 'no_op'}, ffn x{i % 5 / 4}" for i in range(80)]
    cost = {
        "parameters": 49_867_145_216,
        "fixed_bytes": 4e9,
        "attention_bytes": 2e10,
        "ffn_bytes": 7e10,
        "kv_bytes": 1e10,
    }
    cost |= {"reserve_bytes": 0, "weight_bytes": 94e9, "total_bytes": 104e9, "gb": 104.0}
    content = {
        "key": "k",
        "groups": [[str(i), "layer"] for i in range(80)],
        "layers": names,
        "cost": cost,
        "parent_cost": cost | {"total_bytes": 141e9},
        "budget_bytes": 105_000_000_000,
        "limits": {"memory": {"low": None, "high": 105e9, "unit": "bytes"}},
        "optimum": {"score": 3.2, "bound": 3.2, "gap": 0.0, "binding": [], "prices": {}},
        "trials": [
            {"number": 0, "origin": "optimum", "kl": None, "predicted_kl": 3.2, "total_bytes": 104e9, "layers": names}
        ],
    }
    (tmp_path / "architecture.json").write_text(json.dumps(content))
    report, page = page_of(tmp_path)
    assert report["notes"].keys() == NAMES - {"map", "budget"}
    titles = [cell.all("title")[0].text for cell in page.by_id("map").all("div", "pane-0")[0].all("g", "cell")]
    assert titles == [f"layer {i}, {name}" for i, name in enumerate(names)]
    assert "104 GB" in page.by_id("budget").text
    separate = [[str(i // 2), ("attention", "ffn")[i % 2]] for i in range(80)]
    change(tmp_path, groups=separate)
    report, page = page_of(tmp_path)
    assert report["map"]["parts"] == ["attention", "ffn"] and len(report["map"]["columns"]) == 40
    assert report["map"]["models"]["child before healing"]["ffn"] == names[1::2]


def test_a_sweep_shows_the_children_of_its_other_budgets(run: Path) -> None:
    found = json.loads((run / "architecture.json").read_text())
    other = dict(found, layers=found["baselines"]["random"]["layers"][::-1], kl=0.111, kl_se=0.002, predicted_kl=0.1)
    other["cost"] = found["cost"] | {"total_bytes": 400_000_000}
    (run / "family" / "0.900").mkdir(parents=True)
    (run / "family" / "0.900" / "architecture.json").write_text(json.dumps(other))
    members = [{"share": 0.9, "directory": "family/0.900"}, {"share": 0.6, "directory": ".", "layers": found["layers"]}]
    (run / "family.json").write_text(json.dumps({"members": members}))
    report, page = page_of(run)
    (point,) = [p for p in report["points"] if p["origin"] == "family"]
    assert [point[key] for key in ("name", "gb", "kl", "predicted_kl")] == ["budget 0.9", 0.4, 0.111, 0.1]
    for name in ("pareto", "speed", "predicted"):
        assert "budget 0.9" in [mark for mark, _, _ in marks(page.by_id(name))]
    assert report["map"]["models"]["budget 0.9"]["attention"][0] == other["layers"][0].split("+")[0]
    assert "0.1110 ± 0.0020" in page.by_id("results").text
    change(run, layers=other["layers"])  # another search since: the family is not this child's
    assert [m for m in collect(run)["models"] if m["kind"] == "family"] == []


def test_results_of_an_earlier_search_are_left_out(run: Path) -> None:
    change(run, key="another")
    (run / "distill" / "search.json").write_text('{"search": "0123456789ab"}')
    report, page = page_of(run)
    assert report["notes"].keys() == {"learning", "perplexity"}
    assert "child after healing" not in page.text


def test_a_kl_that_is_no_number_is_left_out(run: Path) -> None:
    found = json.loads((run / "architecture.json").read_text())
    found["trials"][20]["kl"] = float("nan")
    found["trials"][21]["kl"] = float("inf")
    (run / "architecture.json").write_text(json.dumps(found))
    report, page = page_of(run)
    assert [p["number"] for p in report["points"] if p["kl"] is None] == [20, 21]
    assert len(marks(page.by_id("history"))) == len(found["trials"]) - 2
    json.dumps(report, allow_nan=False)


# The command


def test_the_command_writes_both_files_and_nothing_else(run: Path, tmp_path: Path) -> None:
    before = {path.name for path in run.iterdir()}
    result = succeed("report", "--run", run)
    assert "report.html written" in result.out
    assert {path.name for path in run.iterdir()} - before == {"report.html", "report.json"}
    first = (run / "report.html").read_bytes(), (run / "report.json").read_bytes()
    printed = succeed("report", "--run", run, "--out", tmp_path / "page.html", "--json").json
    assert printed == json.loads(first[1])
    assert (tmp_path / "page.html").read_bytes() == first[0]  # the same run, the same page


def test_no_run_and_damaged_files_are_one_line(run: Path, tmp_path: Path) -> None:
    assert "no run at" in nas("report", "--run", tmp_path / "none").err
    for name in ("architecture.json", "score.json", "results.json", "scores.csv"):
        good = (run / name).read_bytes()
        for bad in (b"{", b"[1]\n"):
            (run / name).write_bytes(bad)
            result = nas("report", "--run", run)
            assert result.code == 1 and name in result.err and result.err.count("\n") == 1, (name, result)
        (run / name).write_bytes(good)
    change(run, trials=[{"number": 0, "layers": 7}])
    with pytest.raises(CheckpointError, match=r"architecture\.json cannot be told"):
        collect(run)
    assert not (run / "report.html").exists()


def test_a_real_run_is_reported_at_every_stage(world: World, tmp_path: Path) -> None:
    for stage, there in (
        ("scored", {"scores"}),
        ("healed", {"map", "scores", "pareto", "predicted", "budget", "learning"}),
    ):
        run = world.copy(stage, tmp_path / stage)
        report = succeed("report", "--run", run, "--json").json
        page = read_page((run / "report.html").read_text())
        assert {name for name in NAMES if page.by_id(name).all("svg")} == NAMES - report["notes"].keys() >= there
    layers = json.loads((run / "architecture.json").read_text())["layers"]
    titles = [cell.all("title")[0].text for cell in page.by_id("map").all("div", "pane-0")[0].all("g", "cell")]
    assert len(titles) == 2 * len(layers)
    assert "child after healing" in page.by_id("results").text


def test_a_real_search_over_formats_is_shown_and_reported(world: World, tmp_path: Path) -> None:
    run = world.copy("scored", tmp_path / "run")
    words = ["--budget", "0.35", "--batch", "1", "--context", "128", "--precisions", "bf16,fp8,nvfp4"]
    words += ["--trials", "1", "--finalists", "1", "--path-steps", "0", "--verify", "1"]
    printed = succeed("search", "--run", run, *words, "--kv-dtype", "bfloat16,float8").out
    found = json.loads((run / "architecture.json").read_text())
    layers = [LayerSpec.parse(layer) for layer in found["layers"]]
    assert {part.precision for layer in layers for part in (layer.attention, layer.ffn)} & {"fp8", "nvfp4"}
    report = succeed("report", "--run", run, "--json").json
    page, shown = read_page((run / "report.html").read_text()), succeed("show", "--run", run).out
    kinds = [kind for kind in found["baselines"] if kind.endswith("-uniform-precision")]
    assert kinds
    for kind in kinds:
        name = next(model["name"] for model in report["models"] if model["kind"] == kind)
        assert re.fullmatch(r"(parent|best structure) in (bf16|fp8|nvfp4)", name)
        assert name in page.by_id("results").text
        assert f"baseline   {name}: " in printed and f"baseline   {name}: " in shown
    marks = page.by_id("map").all("div", "pane-0")[0].all("g", "precision")
    parts = [part for layer in layers for part in (layer.attention, layer.ffn) if part.kind != "skip"]
    assert len(marks) == len(parts) and "in formats" in printed and "in formats" in shown
    assert report["scores"]["chosen"] and None not in report["scores"]["chosen"]


# Small parts


@given(st.floats(1e-6, 1e6), st.floats(1.001, 1e9), st.booleans())
def test_ticks_are_few_round_and_inside(low: float, ratio: float, log: bool) -> None:
    scale = Scale(low, low * ratio, 0.0, 100.0, log)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 14
    assert all(low * (1 - 1e-6) <= tick <= low * ratio * (1 + 1e-6) for tick in ticks) and ticks == sorted(set(ticks))
    if ratio > 1.5:
        assert all(len(f"{tick:.12g}".replace(".", "").strip("0").split("e")[0]) <= 9 for tick in ticks)


def test_a_broken_axis_has_a_place_for_nothing() -> None:
    scale = Scale(0.1, 10.0, 274.0, 20.0, log=True, zero=291.0)
    assert (scale(0.0), scale(-1e-9), scale(0.1), scale(10.0), scale(1.0)) == pytest.approx((291, 291, 274, 20, 147))
    assert scale.ticks()[0] == 0.0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (0.05, "0.05"),
        (1.25, "1.25"),
        (40.0, "40"),
        (1500.0, "1,500"),
        (15_000.0, "15k"),
        (2e6, "2M"),
        (5e-5, "5e-5"),
    ],
)
def test_numbers_are_readable(value: float, words: str) -> None:
    assert plain(value) == words


def test_rank_correlation_is_scipys() -> None:
    from scipy.stats import spearmanr

    rng = random.Random(1)
    pairs = [(rng.randint(0, 9), rng.random()) for _ in range(40)]
    assert spearman(pairs) == pytest.approx(float(spearmanr(*zip(*pairs, strict=True)).statistic))
    assert spearman(pairs[:2]) is None and spearman([(1, 2), (1, 3), (1, 4)]) is None


# Colours (WCAG 2.2: contrast of text at least 4.5)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("palette", "name"), [(LIGHT, "light"), (DARK, "dark")])
def test_text_can_be_read_and_sequences_are_ordered_by_lightness(palette: dict[str, str], name: str) -> None:
    for words in ("ink", "muted", "accent"):
        assert min(contrast(palette[words], palette[ground]) for ground in ("card", "paper")) >= 4.5, words
    for veneer in ("k1", "k2", "k3"):
        assert contrast(palette["on-low"], palette[veneer]) >= 4.5, veneer
    for veneer in ("k4", "k5"):
        assert contrast(palette["on-high"], palette[veneer]) >= 4.5, veneer
    for sequence in ([palette[f"k{i}"] for i in range(1, 6)], ramp(SCORES[name], 9)):
        lightness = [luminance(colour) for colour in sequence]
        assert lightness == sorted(lightness, reverse=name == "light")
    for marker in ("optimum", "pool", "path", "swap", "variant", "base"):
        assert contrast(palette[marker], palette["card"]) >= 3, marker


# Number formats


def in_formats(layers: list[str]) -> list[str]:
    """Attentions in fp8; FFNs in nvfp4, every third in bf16."""
    made = [LayerSpec.parse(layer).at("fp8", "bf16" if n % 3 == 0 else "nvfp4") for n, layer in enumerate(layers)]
    return [str(layer) for layer in made]


def with_formats(run: Path, **more: Any) -> dict[str, Any]:
    """Gives a made-up run number formats, and the baselines that come with them; returns what was there before."""
    found: dict[str, Any] = json.loads((run / "architecture.json").read_text())
    parent, child = [["attention:kv3+ffn:1536"] * 30, found["layers"]]
    kl = {"kl": 0.0123, "kl_se": 0.0004}
    baselines = found["baselines"] | {
        "parent-uniform-precision": {"layers": [str(LayerSpec.parse(x).at("fp8")) for x in parent], "cost": found["cost"], **kl},
        "child-uniform-precision": {"layers": [str(LayerSpec.parse(x).at("int8")) for x in child], "cost": found["cost"], **kl},
    }  # fmt: skip
    facts = {"layers": in_formats(child), "precisions": ["bf16", "fp8", "nvfp4"], "kv_dtype": "float16"}
    scenario = found["scenario"] | {"kv_dtype": "bfloat16,float16"}
    change(run, **{"baselines": baselines, "scenario": scenario, **facts, **more})
    return found


def test_nothing_is_drawn_of_formats_where_all_is_bf16(told: tuple[dict[str, Any], Node]) -> None:
    report, page = told
    assert report["map"]["precisions"] is None and report["precisions"] is report["kv_dtype"] is None
    assert page.all("g", "precision") == [] and "ormat" not in page.by_id("map").text
    assert "KV bfloat16" in page.text and "formats" not in page.text


def test_every_attention_and_every_ffn_has_a_mark_as_high_as_its_bits(run: Path) -> None:
    before = with_formats(run)
    report, page = page_of(run)
    layers = [LayerSpec.parse(layer) for layer in before["layers"]]
    kv = [layer.attention.kv_heads for layer in layers]
    widths = [layer.ffn.width for layer in layers]
    assert 0 in kv and 0 in widths[1::3] + widths[2::3]  # skips, which have no mark

    # By hand: fp8 has a 2-byte scale for each of the outputs, nvfp4 one byte for 16 weights and 8 bytes a matrix.
    fp8 = nvfp4 = (0, 0)
    for heads in filter(None, kv):
        outputs = 576 + 2 * 64 * heads + 576
        fp8 = fp8[0] + 576 * outputs + 2 * outputs, fp8[1] + 576 * outputs
    for width in (width for n, width in enumerate(widths) if n % 3 and width):
        nvfp4 = nvfp4[0] + 3 * (576 * width * 9 // 16 + 8), nvfp4[1] + 3 * 576 * width
    child = report["map"]["precisions"]
    bits = {format["name"]: format["bits"] for format in child["formats"]}
    assert sorted(bits) == [
        "bf16",
        "fp8",
        "int8",
        "nvfp4",
    ]  # of all models: the parent in fp8, the best structure in int8
    assert bits["bf16"] == 16 and bits["nvfp4"] == pytest.approx(8 * nvfp4[0] / nvfp4[1])
    assert bits["fp8"] == pytest.approx(8 + 16 / 576, abs=0.02)  # down matrices of the baseline have other inputs
    bf16 = sum(3 * 576 * width for n, width in enumerate(widths) if n % 3 == 0)
    mean = 8 * (fp8[0] + nvfp4[0] + 2 * bf16) / (fp8[1] + nvfp4[1] + bf16)
    assert child["mean_bits"]["child before healing"] == pytest.approx(mean)
    assert f"{mean:.3g} bits a weight in the mean" in page.by_id("map").text

    (pane,) = page.by_id("map").all("div", "pane-0")
    marks = pane.all("g", "precision")
    expected = [f"layer {n}, attention in fp8" for n, heads in enumerate(kv) if heads]
    expected += [f"layer {n}, FFN in {'nvfp4' if n % 3 else 'bf16'}" for n, width in enumerate(widths) if width]
    assert [mark.all("title")[0].text.partition(":")[0] for mark in marks] == expected
    for mark in marks:
        track, bar = mark.all("rect")
        name = mark.attributes["data-format"]
        assert bar.attributes["class"] == f"p-{name}"
        ratio = float(bar.attributes["height"]) / float(track.attributes["height"])
        assert ratio == pytest.approx(bits[name] / 16, abs=1e-3)
        ends = [float(node.attributes["y"]) + float(node.attributes["height"]) for node in (track, bar)]
        assert ends[0] == pytest.approx(ends[1])  # both stand on one line
    entries = [entry.text for entry in page.by_id("map").all("li")]
    assert {"bf16: 16 bits a weight", "nvfp4: 4.5 bits a weight", "fp8: 8.02 bits a weight"} < set(entries)
    drawing = pane.all("svg")[0]
    lowest = max(float(r.attributes["y"]) + float(r.attributes["height"]) for r in drawing.all("rect"))
    assert lowest <= float(drawing.attributes["height"])
    small = [node for node in page.by_id("map").all("svg") if "child before healing, small" in node.attributes.get("aria-label", "")]  # fmt: skip
    assert len(small[0].all("g", "precision")) == len(marks)


def test_colours_and_scores_know_structures_alone(run: Path, told: tuple[dict[str, Any], Node]) -> None:
    with_formats(run, kv_dtype="bfloat16")
    report, page = page_of(run)
    plain_report, plain_page = told
    kept = report["map"]["kept"]
    assert kept == {name: plain_report["map"]["kept"][name] for name in kept}
    classes = [[cell.attributes["class"] for cell in p.by_id("map").all("div", "pane-0")[0].all("g", "cell")] for p in (page, plain_page)]  # fmt: skip
    assert classes[0] == classes[1]
    labels = [[cell.text for cell in p.by_id("map").all("div", "pane-0")[0].all("text")] for p in (page, plain_page)]
    assert labels[0] == labels[1]
    assert report["scores"]["chosen"] == plain_report["scores"]["chosen"]
    assert None not in report["scores"]["chosen"]


def test_the_baselines_in_one_format_are_named(run: Path) -> None:
    with_formats(run)
    report, page = page_of(run)
    names = {model["kind"]: model["name"] for model in report["models"]}
    assert names["parent-uniform-precision"] == "parent in fp8"
    assert names["child-uniform-precision"] == "best structure in int8"
    table = page.by_id("results").all("table")[0]
    rows = {row.all("th")[0].text: [cell.text for cell in row.all("td")] for row in table.all("tr")}
    assert rows["parent in fp8"][2] == rows["best structure in int8"][2] == "0.0123 ± 0.0004"
    for name in ("pareto", "speed"):
        figure = page.by_id(name)
        assert {"parent in fp8", "best structure in int8"} < {entry.text for entry in figure.all("li")}
        assert {"parent in fp8", "best structure in int8"} < {mark for mark, _, _ in marks(figure)}
        assert "parent in fp8" in [label.text for label in figure.all("text", "name")]
    assert "number formats searched: bf16, fp8, nvfp4" in page.text and "KV float16" in page.text
    bars = page.by_id("budget")
    label = next(node for node in bars.all("text", "name") if node.text == "best structure in int8")
    assert float(label.attributes["x"]) - 0.57 * 11.5 * len(label.text) >= 0  # not cut off at the left


def test_a_trial_of_such_a_baseline_is_named_as_it_is(run: Path) -> None:
    found = with_formats(run)
    trials = found["trials"]
    trials[3] |= {"origin": "parent-uniform-precision", "layers": ["attention:kv3@int4-g32+ffn:1536@int4-g32"] * 30}
    change(run, trials=trials)
    report, page = page_of(run)
    assert "trial 3, parent in int4-g32" in [point["name"] for point in report["points"]]
    assert "parent in int4-g32" in [entry.text for entry in page.by_id("history").all("li")]


def test_a_format_from_a_newer_version_is_drawn_all_the_same(run: Path) -> None:
    with_formats(run, layers=["attention:kv3@mx9+ffn:1536@fp8"] * 30)
    report, page = page_of(run)
    (unknown,) = [format for format in report["map"]["precisions"]["formats"] if format["name"] == "mx9"]
    assert unknown["bits"] is None and report["map"]["precisions"]["mean_bits"]["child before healing"] is None
    assert "mx9: bits not known here" in [entry.text for entry in page.by_id("map").all("li")]
    assert page.by_id("map").all("rect", "p-other")


def terminal(found: dict[str, Any], width: int = 200) -> list[str]:
    limits = {"memory": found["limits"]["memory"]}  # made-up limits have units that only the page shows
    shown = {key: value for key, value in found.items() if key != "heldout"} | {"limits": limits, "predicted_kl": 0.5}
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(search_lines(shown, width))
    return console.export_text().splitlines()


def test_the_terminal_marks_formats_layer_by_layer(run: Path) -> None:
    before = with_formats(run)
    lines = terminal(json.loads((run / "architecture.json").read_text()))
    plain_lines = terminal(before)
    row = next(line for line in lines if line.startswith("in formats"))[10:]
    cells = [row[place : place + 5].split() for place in range(0, 150, 5)]
    for n, (layer, cell) in enumerate(zip(before["layers"], cells, strict=True)):
        spec = LayerSpec.parse(layer)
        ffn = "-" if spec.ffn.kind == "skip" else "n" if n % 3 else "b"
        assert cell == ["-" if spec.attention.kind == "skip" else "8", ffn]
    for name in ("attention", "ffn"):  # what is kept is drawn as ever
        assert [line for line in lines if line.startswith(name)] == [x for x in plain_lines if x.startswith(name)]
    told = next(line for line in lines if line.startswith("in formats: "))
    count = sum("skip" not in layer.split("+")[0] for layer in before["layers"])
    assert f"8 fp8 (8.03 bits a weight, {count} subblocks)" in told and "n nvfp4 (4.5 bits a weight" in told
    assert any(re.match(r"baseline +parent in fp8: .* GB, true KL 0\.0123 \+- 0\.0004", line) for line in lines)
    assert any(re.match(r"baseline +best structure in int8: ", line) for line in lines)
    assert any(re.match(r"KV cache +in float16$", line.rstrip()) for line in lines)
    assert not any("format" in line or "KV cache" in line or line.startswith("baseline") for line in plain_lines)
