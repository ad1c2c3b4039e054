"""Maps of the report, one column a layer: what each architecture keeps, and what each candidate would hurt."""

from __future__ import annotations

import math
from typing import Any

from nas.report_frame import legend
from nas.report_precisions import format_legend, marks, row_names, rows_height
from nas.report_svg import Markup, Scale, element, join, number, plain, svg, text, title
from nas.report_words import byte_unit

CELL, HEAD, STRIP, NAMES = 26.0, 22.0, 13.0, 150.0
LETTER = 6.1  # width of a digit in a cell
LEVELS = 9  # of the colours of scores
DECADES = 4.0  # that they cover at most: what is smaller hurts nothing either way
SHARES = (("k0", "none"), ("k1", "to 1/4"), ("k2", "to 1/2"), ("k3", "to 3/4"), ("k4", "below all"), ("k5", "all"))


# The architecture


def architecture(report: dict[str, Any]) -> Markup:
    """One large map, of the model chosen by a radio button (no script), over small ones of all models."""
    shown: dict[str, dict[str, list[str | None]]] = report["map"]["models"]
    names = ["child before healing", *(name for name in shown if name != "child before healing")]
    names = [name for name in names if name in shown]
    buttons, panes, left = [], [], []
    width = _cell_width(report)
    for index, name in enumerate(names):
        checked = {"checked": "checked"} if index == 0 else {}
        buttons.append(element("input", type="radio", name="map", id=f"map-{index}", class_="pick", **checked))
        buttons.append(element("label", _short(name), for_=f"map-{index}"))
        panes.append(element("div", _large(report, name, width), class_=f"pane pane-{index}"))
    left = [_row_names(report), *(_strip_name(report, name) for name in names)]
    right = [*panes, *(_strip(report, name, width) for name in names)]
    rows = element(
        "div", element("div", *left, class_="rows"), element("div", *right, class_="scroll", tabindex="0"), class_="map"
    )
    return join(element("div", *buttons, rows, class_="picker"), _share_legend(report), format_legend(report))


def _short(name: str) -> str:
    return "child" if name == "child before healing" else name


def _cell_width(report: dict[str, Any]) -> float:
    """The same for both maps, so that their columns stand under one another."""
    shown = report["map"]["models"] if report["map"] else {}
    labels = [_label(cell) for rows in shown.values() for row in rows.values() for cell in row]
    return max(26.0, 8 + LETTER * max((len(label) for label in labels), default=1))


def _label(candidate: str | None, most: int = 9) -> str:
    """What fits in a cell: "kv3", "1536", "14k", "lin", and a dash for a skip."""
    if candidate is None:
        return ""
    body = candidate.removeprefix("attention:").removeprefix("ffn:")
    if body.isdigit() and int(body) >= 10_000:
        return f"{int(body) / 1000:.0f}k"
    body = {"skip": "–", "linear": "lin"}.get(body, body)
    return body if len(body) <= most else f"{body[: most - 1]}…"


def _level(report: dict[str, Any], candidate: str | None) -> str:
    share = report["map"]["kept"].get(candidate)
    if candidate is None or share is None:
        return "k-unknown"
    bounds = (0.001, 0.25, 0.5, 0.75, 0.999)
    return f"k{sum(share > bound for bound in bounds)}"


def _about(report: dict[str, Any], column: str, candidate: str) -> str:
    share = report["map"]["kept"].get(candidate)
    kept = "" if share is None else f": keeps {share:.1%} of the parent's {report['map']['kept_by']}"
    return f"layer {column}, {candidate}{kept}"


def _large(report: dict[str, Any], name: str, width: float) -> Markup:
    """Cells with their labels under the numbers of the layers."""
    columns, parts, rows = report["map"]["columns"], report["map"]["parts"], report["map"]["models"][name]
    drawn = [text((i + 0.5) * width, 14, column, "tick", "middle") for i, column in enumerate(columns)]
    for row, part in enumerate(parts):
        for index, candidate in enumerate(rows.get(part, [])):
            if candidate is not None:
                x, y = index * width, HEAD + row * (CELL + 3)
                box = element("rect", x=x + 1, y=y, width=width - 2, height=CELL, rx=3)
                label = text(x + width / 2, y + CELL / 2 + 4, _label(candidate), "", "middle")
                tip = title(_about(report, columns[index], candidate))
                drawn.append(element("g", box, label, tip, class_=f"cell {_level(report, candidate)}"))
    bottom = HEAD + len(parts) * (CELL + 3)
    drawn.append(marks(report, name, width, bottom))
    height = bottom + rows_height(report) + 4
    return svg(len(columns) * width, height, f"architecture of {name}", *drawn, fixed=True)


def _row_names(report: dict[str, Any]) -> Markup:
    parts = report["map"]["parts"]
    bottom = HEAD + len(parts) * (CELL + 3)
    words = {"attention": "attention", "ffn": "FFN"}
    drawn = [text(NAMES, 14, "layer", "tick", "end")]
    for row, part in enumerate(parts):
        drawn.append(text(NAMES, HEAD + row * (CELL + 3) + CELL / 2 + 4, words.get(part, part), "name", "end"))
    drawn.append(row_names(report, NAMES, bottom))
    return svg(NAMES + 4, bottom + rows_height(report) + 4, "rows of the map", *drawn, fixed=True)


def _strip(report: dict[str, Any], name: str, width: float) -> Markup:
    """The same map without labels, low enough to compare many."""
    columns, parts, rows = report["map"]["columns"], report["map"]["parts"], report["map"]["models"][name]
    drawn = []
    for row, part in enumerate(parts):
        for index, candidate in enumerate(rows.get(part, [])):
            if candidate is not None:
                tip = title(f"{name}, {_about(report, columns[index], candidate)}")
                place = {"x": index * width + 1, "y": 4 + row * (STRIP + 1), "width": width - 2, "height": STRIP}
                drawn.append(element("rect", tip, class_=f"cell {_level(report, candidate)}", rx=2, **place))
    drawn.append(marks(report, name, width, 4 + len(parts) * (STRIP + 1), small=True))
    return svg(len(columns) * width, _strip_height(report), f"architecture of {name}, small", *drawn, fixed=True)


def _strip_name(report: dict[str, Any], name: str) -> Markup:
    """The name, its KL and its size, beside its strip."""
    model = next((model for model in report["models"] if model["name"] == name), None)
    facts = []
    if model and model["kl"] is not None:
        facts.append(f"KL {model['kl']:.3g}")
    if model and (model["cost"] or {}).get("total_bytes"):
        unit, factor = byte_unit(model["cost"]["total_bytes"])
        facts.append(f"{model['cost']['total_bytes'] / factor:.3g} {unit}")
    height = _strip_height(report)
    healed = next((f["heal"] for f in report["finalists"] if name == f"finalist {f['name']}"), None)
    if healed:
        facts.append(f"healed to KL {healed[-1]['kl']:.3g}")
    words = _short(name) if len(_short(name)) <= 23 else f"{_short(name)[:22]}…"
    drawn = [text(NAMES, height / 2 - 1, words, "name strong" if words == "child" else "name", "end")]
    drawn.append(text(NAMES, height / 2 + 11, " · ".join(facts), "tick", "end"))
    return svg(NAMES + 4, height, name, *drawn, fixed=True)


def _strip_height(report: dict[str, Any]) -> float:
    return max(30.0, 8 + len(report["map"]["parts"]) * (STRIP + 1) + rows_height(report, small=True))


def _share_legend(report: dict[str, Any]) -> Markup:
    by = report["map"]["kept_by"]
    if by is None:
        return element(
            "p", "Candidates of a table from elsewhere: their names do not tell what they keep.", class_="aside"
        )
    entries = [("fill", f"cell {class_}", words) for class_, words in SHARES]
    return join(element("p", f"Share of the parent's {by} kept", class_="aside"), legend(entries))


# Scores


def sensitivity(report: dict[str, Any]) -> Markup:
    """Score by layer and candidate, grouped by attention; the chosen cells are outlined."""
    scores = report["scores"]
    layers, rows = scores["layers"], scores["rows"]
    levels = score_scale(report)
    width, height = _cell_width(report), 19.0
    tops = _row_tops(rows, height)
    drawn = [text((i + 0.5) * width, 14, str(i), "tick", "middle") for i in range(layers)]
    outlined = []
    for index, (row, y) in enumerate(zip(rows, tops, strict=True)):
        for layer, cell in enumerate(row["cells"]):
            if cell is not None:
                box = {"x": layer * width + 0.5, "y": y, "width": width - 1, "height": height - 1}
                tip = title(f"layer {layer}, {row['attention']}+{row['ffn']}: {_about_score(cell)}")
                drawn.append(
                    element("rect", tip, class_=score_level(levels, cell), data_score=f"{cell['score']:.6g}", **box)
                )
                if layer < len(scores["chosen"]) and scores["chosen"][layer] == index:
                    outlined.append(element("rect", class_="chosen", rx=2, **box))
    total = tops[-1] + height + 22
    drawn += [*outlined, text(layers * width / 2, total - 5, "layer", "label", "middle")]
    right = element(
        "div",
        svg(layers * width, total, "scores by layer and candidate", *drawn, fixed=True),
        class_="scroll",
        tabindex="0",
    )
    left = element("div", _candidate_names(rows, tops, height, total), class_="rows")
    return join(element("div", left, right, class_="map"), _colour_bar(levels, bool(outlined)))


def score_scale(report: dict[str, Any]) -> Scale:
    """The colours: a logarithmic scale over at most four decades, from 0 to the number of levels."""
    scores = [cell["score"] for row in report["scores"]["rows"] for cell in row["cells"] if cell and cell["score"] > 0]
    high = max(scores, default=1.0)
    low = max(min(scores, default=0.1), high / 10**DECADES)
    return Scale(min(low, high / 1.5), high, 0, LEVELS, log=True)


def score_level(scale: Scale, cell: dict[str, Any]) -> str:
    if cell["source"] == "parent":
        return "s-own"
    return f"s{min(LEVELS - 1, max(0, math.floor(scale(cell['score']))))}"


def _about_score(cell: dict[str, Any]) -> str:
    if cell["source"] == "parent":
        return "the parent's own"
    sure = "" if cell["low"] is None else f" ({cell['low']:.4g} to {cell['high']:.4g})"
    return f"{cell['score']:.4g} nats/token{sure}, {cell['source']}"


def _row_tops(rows: list[dict[str, Any]], height: float) -> list[float]:
    """y of every row, with a gap where the attention changes."""
    tops, y = [], HEAD
    for index, row in enumerate(rows):
        if index and rows[index - 1]["attention"] != row["attention"]:
            y += 9
        tops.append(y)
        y += height
    return tops


def _candidate_names(rows: list[dict[str, Any]], tops: list[float], height: float, total: float) -> Markup:
    drawn = [text(NAMES, 14, "attention + FFN", "tick", "end")]
    for index, (row, y) in enumerate(zip(rows, tops, strict=True)):
        attention, ffn = row["attention"].removeprefix("attention:"), row["ffn"].removeprefix("ffn:")
        if index == 0 or rows[index - 1]["attention"] != row["attention"]:
            drawn.append(text(4, y + height / 2 + 4, attention, "name strong"))
        drawn.append(text(NAMES, y + height / 2 + 4, ffn, "name", "end"))
    return svg(NAMES + 4, total, "candidates", *drawn, fixed=True)


def _colour_bar(scale: Scale, chosen: bool) -> Markup:
    step, top = 40.0, 4.0
    drawn = [element("rect", x=20 + i * step, y=top, width=step, height=14, class_=f"s{i}") for i in range(LEVELS)]
    for value in scale.ticks(9):
        at = 20 + scale(value) * step
        mark = element("line", x1=at, x2=at, y1=top + 14, y2=top + 18, class_="axis")
        drawn.append(
            element(
                "g",
                mark,
                text(at, top + 30, plain(value), "tick", "middle"),
                class_="bar-tick",
                data_value=number(value),
            )
        )
    words = f"score: KL with this one layer replaced (nats/token); {plain(scale.low)} stands for all below"
    entries = [("fill", "s-own", "the parent's own (0)")]
    if chosen:
        entries.insert(0, ("fill", "chosen", "chosen for the child"))
    bar = svg(40 + LEVELS * step, 38, "colours of scores", *drawn)
    return join(element("p", words, class_="aside"), element("div", bar, legend(entries), class_="bar"))
