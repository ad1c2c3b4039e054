"""Charts of measured children: Pareto fronts, predicted against measured KL, and the search by trial number."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from nas.format_words import UNIFORM
from nas.report_frame import TOP, X_RANGE, Y_RANGE, chart_frame, error_bar, legend, marker, place_labels
from nas.report_svg import Markup, Scale, element, join, line, linear_scale, log_scale, polyline, svg, text
from nas.report_words import KL_LABEL, about_point, estimate

# Shape, CSS class and words of every origin, in the order of legends.
ORIGINS = {
    "parent": ("diamond", "o-parent", "parent"),
    "optimum": ("circle", "o-optimum", "optimum"),
    "pool": ("circle", "o-pool", "near-optima"),
    "attention-rich": ("plus", "o-variant", "variants in kind"),
    "ffn-rich": ("plus", "o-variant", "variants in kind"),
    "contiguous": ("plus", "o-variant", "variants in kind"),
    "path": ("up", "o-path", "path"),
    "around": ("down", "o-path", "scored again around the best"),
    "swap": ("square", "o-swap", "swaps"),
    "family": ("diamond", "o-child", "children of other budgets"),
    "uniform": ("square", "o-base", "uniform"),
    "depth-contiguous": ("up", "o-base", "depth-contiguous"),
    "depth-score": ("down", "o-base", "depth-score"),
    "random": ("plus", "o-base", "random"),
    "parent-uniform-precision": ("diamond", "o-base", "parent in one format"),
    "child-uniform-precision": ("circle", "o-base", "best structure in one format"),
}
OTHER = ("circle", "o-other")
NAMED = ("parent", "uniform", "depth-contiguous", "depth-score", "random", *UNIFORM)  # beside their points


def style(origin: str) -> tuple[str, str, str]:
    """Marker and colour of an origin, and its words."""
    return ORIGINS.get(origin) or (*OTHER, origin)


def measured(report: dict[str, Any], *keys: str) -> list[dict[str, Any]]:
    """Points with true KL, measured whole, and with all of these values."""
    return [
        p for p in report["points"] if p["state"] == "complete" and all(p[key] is not None for key in ("kl", *keys))
    ]


def pareto(report: dict[str, Any]) -> Markup:
    """True KL against memory."""
    limit = (report["limits"].get("memory") or {}).get("high") or report["budget_bytes"]
    budget = None if limit is None else (limit / 1e9, f"budget {limit / 1e9:.4g} GB")
    return _front(report, "gb", "memory: weights + KV cache + reserve (GB = 1e9 bytes)", budget, more_is_better=False)


def speed(report: dict[str, Any]) -> Markup:
    """True KL against throughput."""
    limit = (report["limits"].get("throughput") or {}).get("low")
    least = None if limit is None else (limit, f"at least {limit:,.0f} tokens/s")
    device = (report["clock"] or {}).get("device", "device")
    label = f"throughput on {device} (tokens/s{estimate(report)})"
    return _front(report, "tokens_per_s", label, least, more_is_better=True)


def _front(
    report: dict[str, Any], key: str, label: str, limit: tuple[float, str] | None, more_is_better: bool
) -> Markup:
    points = measured(report, key)
    x = linear_scale([p[key] for p in points] + ([limit[0]] if limit else []), *X_RANGE)
    y = log_scale([p["kl"] for p in points], *Y_RANGE)
    best = front([(p[key], p["kl"]) for p in points if p["origin"] != "parent"], more_is_better)
    steps = [(x(best[0][0]), y(best[0][1]))] if best else []
    for (_, before), (value, kl) in pairwise(best):
        steps += [(x(value), y(before)), (x(value), y(kl))]
    parts = [chart_frame(x, y, label, KL_LABEL)]
    if limit:
        parts.append(_limit_line(x(limit[0]), limit[1]))
    parts.append(polyline(steps, "front"))
    parts += [_mark(report, p, x, y, key) for p in _child_last(points)]
    obstacles = [spot for ends in pairwise(steps) for spot in _along(*ends)]
    obstacles += _along((x(limit[0]), TOP), (x(limit[0]), Y_RANGE[0])) if limit else []
    parts.append(_names(points, x, y, key, obstacles))
    entries = [("line", "front", "not beaten in both"), *_entries(points)]
    if limit:
        entries.insert(1, ("line", "limit", "the limit"))
    return join(svg(X_RANGE[1] + 18, Y_RANGE[0] + 46, f"{KL_LABEL} against {label}", *parts), legend(entries))


def front(points: Sequence[tuple[float, float]], more_is_better: bool) -> list[tuple[float, float]]:
    """The points that no other beats in both: each one dearer (or slower) than the last has lower KL."""
    kept: list[tuple[float, float]] = []
    for value, kl in sorted(points, key=lambda point: (-point[0] if more_is_better else point[0], point[1])):
        if not kept or kl < kept[-1][1]:
            kept.append((value, kl))
    return kept


def predicted(report: dict[str, Any]) -> Markup:
    """True KL against the sum of scores, both logarithmic, on one scale so that equality is a diagonal."""
    points = [p for p in measured(report, "predicted_kl") if p["kl"] > 0 and p["predicted_kl"] > 0]
    values = [p[key] for p in points for key in ("kl", "predicted_kl")]
    x, y = log_scale(values, *X_RANGE), log_scale(values, *Y_RANGE)
    parts = [chart_frame(x, y, "predicted KL: the sum of scores (nats/token)", KL_LABEL)]
    parts.append(line(x.start, y.start, x.end, y.end, "diagonal"))
    parts += [_mark(report, p, x, y, "predicted_kl") for p in _child_last(points)]
    parts.append(_names(points, x, y, "predicted_kl"))
    entries = [("line", "diagonal", "predicted = true"), *_entries(points)]
    return join(svg(X_RANGE[1] + 18, Y_RANGE[0] + 46, "true KL against predicted KL", *parts), legend(entries))


def history(report: dict[str, Any]) -> Markup:
    """True KL by trial number, with the best so far."""
    points = [p for p in report["points"] if p["number"] is not None and p["kl"] is not None]
    x = Scale(-0.5, max(7, *(p["number"] for p in points)) + 0.5, *X_RANGE)
    y = log_scale([p["kl"] for p in points], *Y_RANGE)
    steps: list[tuple[float, float]] = []
    best = float("inf")
    for p in sorted(points, key=lambda point: point["number"]):
        if p["state"] == "complete" and p["within"] and p["kl"] < best:
            steps += [(x(p["number"]), y(best))] if steps else []
            best = p["kl"]
            steps.append((x(p["number"]), y(best)))
    if steps:
        steps.append((x(max(p["number"] for p in points)), y(best)))
    parts = [chart_frame(x, y, "trial number", KL_LABEL), polyline(steps, "front")]
    parts += [_mark(report, p, x, y, "number") for p in _child_last(points)]
    entries = [("line", "front", "best so far"), *_entries(points)]
    if any(p["state"] == "pruned" for p in points):
        entries.append(("cross", "o-other", "given up half-way (KL so far)"))
    return join(svg(X_RANGE[1] + 18, Y_RANGE[0] + 46, "true KL by trial number", *parts), legend(entries))


def _along(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """Points of a line, about 12 pixels apart, for labels to keep clear of."""
    count = 1 + int(max(abs(end[0] - start[0]), abs(end[1] - start[1])) / 12)
    return [tuple(a + (b - a) * i / count for a, b in zip(start, end, strict=True)) for i in range(count + 1)]  # type: ignore[misc]


def _child_last(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In the order of drawing: finalists over others, the child over all."""
    return sorted(points, key=lambda p: (p["child"], p["finalist"]))


def _limit_line(x: float, words: str) -> Markup:
    bottom, top = Y_RANGE
    right = x > (X_RANGE[0] + X_RANGE[1]) / 2
    label = text(x + 6 if right else x - 6, top - 4, words, "limit-text", "end" if right else "start")
    return join(line(x, bottom, x, top, "limit"), label)


def _mark(report: dict[str, Any], point: dict[str, Any], x: Scale, y: Scale, key: str) -> Markup:
    """A point with its error bar, a ring around a finalist, and the child as a star."""
    at, height = x(point[key]), y(point["kl"])
    shape, class_, _ = style(point["origin"])
    if point["state"] == "pruned":
        shape = "cross"
    if point["child"]:
        shape, class_ = "star", "o-child"
    data = {"data_point": point["name"], "data_x": f"{point[key]:.12g}", "data_y": f"{point['kl']:.12g}"}
    parts = [error_bar(at, y, point["kl"], point["kl_se"], class_)]
    if point["finalist"]:
        parts.append(
            element("g", element("path", d=_RING), class_="mark ring", transform=f"translate({at:.2f} {height:.2f})")
        )
    return join(*parts, marker(at, height, shape, class_, about_point(report, point), **data))


_RING = "M-7.5,0a7.5,7.5 0 1,0 15,0a7.5,7.5 0 1,0 -15,0Z"


def _names(
    points: list[dict[str, Any]], x: Scale, y: Scale, key: str, obstacles: Sequence[tuple[float, float]] = ()
) -> Markup:
    """The names of the parent, the child and the baselines, beside their points."""
    named = [
        (x(p[key]), y(p["kl"]), "child" if p["child"] else _words(p))
        for p in points
        if p["child"] or p["origin"] in NAMED
    ]
    everything = [(x(p[key]), y(p["kl"])) for p in points]
    places = place_labels(named, [*everything, *obstacles], Y_RANGE[0])
    return join(
        *(
            text(left, base, words, "name strong" if words == "child" else "name", anchor)
            for (left, base, anchor), (_, _, words) in zip(places, named, strict=True)
        )
    )


def _words(point: dict[str, Any]) -> str:
    """Its origin; of a baseline in one number format, which one it is ("trial 5, parent in fp8")."""
    return str(point["name"].rpartition(", ")[2] if point["origin"] in UNIFORM else point["origin"])


def _entries(points: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The legend of what is there: origins in a fixed order, then the child and finalists."""
    there = {p["origin"]: p for p in points if not p["child"]}
    origins = [origin for origin in [*ORIGINS, *sorted(there.keys() - ORIGINS.keys())] if origin in there]
    named = {origin: _words(there[origin]) for origin in origins if origin in UNIFORM}
    entries = list(dict.fromkeys((*style(o)[:2], named.get(o, style(o)[2])) for o in origins))
    if any(p["child"] for p in points):
        entries.append(("star", "o-child", "the child"))
    if any(p["finalist"] for p in points):
        entries.append(("ring", "", "finalist"))
    return entries
