"""The page of `nas report`: headline, figures with captions, tables. One file, no script, nothing from the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blocks.spec import BF16
from nas import report_bars, report_charts, report_healing, report_maps, report_tables
from nas.format_words import UNIFORM
from nas.report_style import style_sheet
from nas.report_svg import Markup, element, join, plain
from nas.report_words import estimate, size_text

Draw = Callable[[dict[str, Any]], Markup]
Words = Callable[[dict[str, Any]], str]


@dataclass(frozen=True)
class Figure:
    """One figure of the page.

    Attributes:
        name: its id, and its key in the report's notes.
        caption: one line: what to read from it.
        wide: whether it takes the whole width.
    """

    name: str
    title: str
    caption: str | Words
    draw: Draw
    wide: bool = False


def _predicted_caption(report: dict[str, Any]) -> str:
    pairs = [
        (p["predicted_kl"], p["kl"]) for p in report_charts.measured(report, "predicted_kl") if p["origin"] != "parent"
    ]
    agreement = report_tables.agreement(pairs)
    return f"Above the diagonal, candidates hurt more together than the sum of what each hurts alone.{agreement}"


def _finalists_caption(report: dict[str, Any]) -> str:
    curves = [[h["kl"] for h in finalist["heal"] if h.get("kl") is not None] for finalist in report["finalists"]]
    agreement = report_tables.agreement([(curve[0], curve[-1]) for curve in curves if len(curve) > 1])
    return f"Where lines cross, the order before healing is not the order after it.{agreement}"


FIGURES = (
    Figure("map", "Architecture", "One column a layer. Darker (in the dark: brighter) keeps more; a dash is left out.", report_maps.architecture, True),
    Figure("scores", "Sensitivity", "Darker cells (in the dark: brighter) hurt more when this one layer is replaced; the search looks for cells that hurt little and save much.", report_maps.sensitivity, True),
    Figure("pareto", "Quality against memory", "Down and left is better; the line joins what nothing beats in both.", report_charts.pareto),
    Figure("speed", "Quality against throughput", "Down and right is better; the line joins what nothing beats in both.", report_charts.speed),
    Figure("predicted", "Predicted against measured", _predicted_caption, report_charts.predicted),
    Figure("budget", "Where the bytes go", "What was cut, and what no choice changes, against the budget.", report_bars.budget),
    Figure("history", "The search", "How soon the best child was found, and by which proposer.", report_charts.history),
    Figure("finalists", "Finalists", _finalists_caption, report_bars.finalists),
    Figure("learning", "Healing", "Held-out KL while the child learns from its parent; where it is flat, more tokens bring little.", report_healing.learning),
    Figure("perplexity", "Perplexity while healing", "Lower is better; text that the child does not train on tells whether it forgets.", report_healing.perplexity),
)  # fmt: skip


def page(report: dict[str, Any]) -> str:
    """The whole page of a report (nas/report.py says what is in one)."""
    figures = [_figure(report, figure) for figure in FIGURES if figure.name not in report["notes"]]
    if report["made"]:
        figures.append(_card("made", "How the scores were made", "A rank correlation near 1: cheap scores order candidates as exact ones do.", report_tables.scores_made(report)))  # fmt: skip
    if report["models"]:
        tables = join(report_tables.results(report), report_tables.trials(report))
        told = f"KL to the parent in nats a token, ± one standard error{_heldout_tokens(report)}."
        figures.append(_card("results", "Results", told, tables, wide=True))
    if report["eval"]:
        told = "Parent and children side by side, by nas eval, ± one standard error. Multiple choice by log-likelihood."
        figures.append(_card("eval", "Evaluation", told, report_tables.evaluation(report), wide=True))
    if report["limits"] or report["optimum"]:
        told = "What binds, and what one more unit of it would win back by the sum of scores."
        figures.append(_card("limits", "Limits", told, report_tables.limits(report), wide=True))
    panes = len(report["map"]["models"]) if report["map"] else 0
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{report['run']} · marquetry"),
        element("style", Markup(style_sheet(report_maps.LEVELS, panes))),
    ]
    body = element("main", *_headline(report), element("div", *figures, class_="cards"), _absent(report), _foot(report))
    return "<!doctype html>\n" + element("html", element("head", *head), element("body", body), lang="en") + "\n"


def _figure(report: dict[str, Any], figure: Figure) -> Markup:
    caption = figure.caption if isinstance(figure.caption, str) else figure.caption(report)
    return _card(figure.name, figure.title, caption, figure.draw(report), figure.wide)


def _absent(report: dict[str, Any]) -> Markup:
    """What this run has not got to, and what would make it."""
    notes = []
    for figure in FIGURES:
        if note := report["notes"].get(figure.name):
            parts = (element("h2", figure.title), element("figcaption", note))
            notes.append(element("figure", *parts, id=figure.name, class_="absent"))
    return element("div", *notes, class_="notes") if notes else Markup()


def _card(name: str, heading: str, caption: str, content: Markup, wide: bool = False) -> Markup:
    parts = (element("h2", heading), element("figcaption", caption), content)
    return element("figure", *parts, id=name, class_="wide" if wide else None)


def _heldout_tokens(report: dict[str, Any]) -> str:
    tokens = report["heldout_tokens"]
    return f"; held out: {tokens:,} tokens that nothing else read" if tokens else ""


# Headline


def _headline(report: dict[str, Any]) -> list[Markup]:
    parts = [element("p", "marquetry · run report", class_="eyebrow"), element("h1", report["run"])]
    parts.append(element("p", _sentence(report), class_="lead"))
    parts.append(element("p", _facts(report), class_="facts"))
    if tiles := _tiles(report):
        parts.append(element("div", *tiles, class_="tiles"))
    parts += [element("p", element("b", "Warning: "), words, class_="warning") for words in report["warnings"] or []]
    return parts


def _by_kind(report: dict[str, Any], kind: str) -> dict[str, Any] | None:
    return next((model for model in report["models"] if model["kind"] == kind), None)


def _sentence(report: dict[str, Any]) -> str:
    parent, child = _by_kind(report, "parent"), _by_kind(report, "child")
    if not (parent and child and parent["cost"] and child["cost"]):
        return "Candidates are scored; no child is chosen yet. Next: nas search."
    if not parent["cost"].get("total_bytes"):
        return "Chosen from a table that does not tell how large its candidates are."
    share = child["cost"]["total_bytes"] / parent["cost"]["total_bytes"]
    sizes = f"{size_text(child['cost']['total_bytes'])} of {size_text(parent['cost']['total_bytes'])}"
    words = [f"The child of {_short_name(report['parent'])} keeps {share:.1%} of the parent's memory ({sizes})"]
    fast = [model["cost"].get("tokens_per_s") for model in (child, parent)]
    if all(fast):
        words.append(
            f" and generates {fast[0] / fast[1]:.2f} times as many tokens a second{' (estimate)' if estimate(report) else ''}"
        )
    kl, where = _best_known_kl(report, child)
    if kl is not None:
        words.append(f", at a KL of {kl:.3g} nats a token {where}")
        uniform, _ = _best_known_kl(report, _by_kind(report, "uniform"))
        if uniform is not None:
            words.append(f"; a uniform child of this budget has {uniform:.3g}")
        words += [f"; the {name} {kl:.3g}" for name, kl in _in_one_format(report, where)]
    return "".join(words) + "."


def _in_one_format(report: dict[str, Any], where: str) -> list[tuple[str, float]]:
    """The baselines in one number format that were measured on the same text."""
    found = [(m["name"], *_best_known_kl(report, m)) for m in report["models"] if m["kind"] in UNIFORM]
    return [(name, kl) for name, kl, text in found if kl is not None and text == where]


def _short_name(parent: str | None) -> str:
    """A directory's own name; hub ids and embedded names as they are."""
    return "its parent" if not parent else parent.rstrip("/").rpartition("/")[2] if parent[0] in "/.~" else parent


def _best_known_kl(report: dict[str, Any], model: dict[str, Any] | None) -> tuple[float | None, str]:
    if model is None:
        return None, ""
    heldout = (model["heldout"] or {}).get("kl")
    return (
        (heldout, "on held-out text, before healing") if heldout is not None else (model["kl"], "on calibration text")
    )


def _facts(report: dict[str, Any]) -> str:
    scenario = (report["scenario"] or {}) | ({"kv_dtype": report["kv_dtype"]} if report["kv_dtype"] else {})
    names = {"batch": "batch {}", "context": "context {:,}", "prompt": "prompt {:,}", "output": "output {:,}", "tp": "tensor parallel over {}", "weight_dtype": "weights {}", "kv_dtype": "KV {}"}  # fmt: skip
    facts = [f"parent {report['parent']}"] if report["parent"] else []
    facts += [
        words.format(scenario[key])
        for key, words in names.items()
        if scenario.get(key) is not None and (key, scenario[key]) != ("tp", 1)
    ]
    if set(report["precisions"] or []) - {BF16}:
        facts.append(f"number formats searched: {', '.join(report['precisions'])}")
    if report["clock"]:
        facts.append(f"clock: {report['clock']['name']}{estimate(report)}")
    if report["seconds"] is not None:
        facts.append(f"searched in {report['seconds']:,.0f} s")
    return " · ".join(facts)


def _tiles(report: dict[str, Any]) -> list[Markup]:
    """The few numbers that one looks for first."""
    child, healed = _by_kind(report, "child"), _by_kind(report, "healed")
    if child is None:
        return []
    cost, tiles = child["cost"] or {}, []
    if cost.get("total_bytes") is not None:
        limit = report["budget_bytes"]
        tiles.append(
            (size_text(cost["total_bytes"]), "memory" if not limit else f"memory, of a budget of {size_text(limit)}")
        )
    if cost.get("parameters") is not None:
        size, unit = (1e9, "B") if cost["parameters"] >= 1e9 else (1e6, "M")
        tiles.append((f"{cost['parameters'] / size:.4g} {unit}", "parameters"))
    for model, words in ((child, "before healing"), (healed, "after healing")):
        kl = ((model or {}).get("heldout") or {}).get("kl")
        if kl is not None:
            tiles.append((f"{kl:.4f}", f"held-out KL {words} (nats/token)"))
    if child["kl"] is not None and not (child["heldout"] or {}).get("kl"):
        tiles.append((f"{child['kl']:.4f}", "true KL, calibration text (nats/token)"))
    if cost.get("tokens_per_s") is not None:
        tiles.append(
            (
                f"{cost['tokens_per_s']:,.0f}",
                f"tokens/s on {(report['clock'] or {}).get('device', 'device')}{estimate(report)}",
            )
        )
    gap = (report["optimum"] or {}).get("gap")
    if gap is not None:
        tiles.append((plain(gap), "gap of the proven optimum (nats/token)"))
    return [element("div", element("b", number), element("span", words), class_="tile") for number, words in tiles]


def _foot(report: dict[str, Any]) -> Markup:
    parts = [element("p", report["formula"], class_="formula")] if report["formula"] else []
    parts.append(element("p", "Every number on this page is in report.json. KL is in nats per token, GB is 1e9 bytes; rest the pointer on a mark for its values."))  # fmt: skip
    return element("footer", *parts)
