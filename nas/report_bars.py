"""Charts of one model or a few: where the bytes go, and finalists over healing tokens."""

from __future__ import annotations

from typing import Any

from nas.format_words import UNIFORM
from nas.report_charts import style
from nas.report_frame import CHARACTER, HEIGHT, WIDTH, X_RANGE, Y_RANGE, chart_frame, error_bar, legend, marker
from nas.report_svg import (
    Markup,
    Scale,
    element,
    join,
    line,
    log_scale,
    plain,
    polyline,
    svg,
    text,
    title,
)
from nas.report_words import byte_unit, kl_text, size_text

KINDS = (
    ("fixed_bytes", "b-fixed", "embeddings, head, final norm"),
    ("attention_bytes", "b-attention", "attention"),
    ("ffn_bytes", "b-ffn", "FFN"),
    ("layer_bytes", "b-ffn", "layers"),  # of a table from elsewhere that does not tell attention and FFN apart
    ("kv_bytes", "b-kv", "KV cache"),
    ("reserve_bytes", "b-reserve", "reserve"),
)
BAR, GAP, NAMES = 24.0, 12.0, 128.0
LETTERS = 11.5  # their size


def budget(report: dict[str, Any]) -> Markup:
    """One bar a model: weights by kind, KV cache and reserve, against the budget line."""
    models = [
        model for model in report["models"] if (model["cost"] or {}).get("total_bytes") and model["kind"] != "healed"
    ]
    limit = (report["limits"].get("memory") or {}).get("high") or report["budget_bytes"]
    largest = max([model["cost"]["total_bytes"] for model in models] + ([limit] if limit else []))
    unit, factor = byte_unit(largest)
    longest = max((len(model["name"]) for model in models if model["kind"] in UNIFORM), default=0)
    x = Scale(0, largest / factor * 1.02, max(NAMES, 12 + CHARACTER * LETTERS * longest), WIDTH - 72)
    top = 24.0
    bottom = top + len(models) * (BAR + GAP)
    parts = [_byte_axis(x, top, bottom, unit)]
    for index, model in enumerate(models):
        parts.append(_bar(model, x, top + GAP / 2 + index * (BAR + GAP), factor))
    if limit:  # over the bars, under the words
        at = x(limit / factor)
        parts.append(line(at, top - 6, at, bottom, "limit"))
        parts.append(text(at, top - 11, f"budget {size_text(limit)}", "limit-text", "middle"))
    for index, model in enumerate(models):
        parts.append(_bar_words(model, x.start, top + GAP / 2 + index * (BAR + GAP)))
    entries = [("fill", class_, words) for key, class_, words in KINDS if any(m["cost"].get(key) for m in models)]
    if limit:
        entries.append(("line", "limit", "the budget"))
    return join(svg(WIDTH, bottom + 46, "bytes by kind, model by model", *parts), legend(entries))


def _byte_axis(x: Scale, top: float, bottom: float, unit: str) -> Markup:
    parts = []
    for value in x.ticks():
        at = x(value)
        tick = (line(at, top, at, bottom, "grid"), text(at, bottom + 17, plain(value), "tick", "middle"))
        parts.append(element("g", *tick, class_="x-tick", data_value=f"{value:.12g}", data_at=at))
    parts.append(line(x.start, bottom, x.end, bottom, "axis"))
    parts.append(text((x.start + x.end) / 2, bottom + 38, f"memory ({unit}, decimal)", "label", "middle"))
    return join(*parts)


def _bar(model: dict[str, Any], x: Scale, y: float, factor: float) -> Markup:
    cost, parts, at = model["cost"], [], x.start
    name = "child" if model["kind"] == "child" else model["name"]
    for key, class_, words in KINDS:
        width = x(cost.get(key, 0) / factor) - x.start
        if width > 0:
            share = cost[key] / cost["total_bytes"]
            tip = title(f"{name}: {words} {size_text(cost[key])}, {share:.1%}")
            box = {"x": at, "y": y, "width": width, "height": BAR}
            parts.append(element("rect", tip, class_=class_, data_bytes=cost[key], **box))
            at += width
    return join(*parts)


def _bar_words(model: dict[str, Any], start: float, y: float) -> Markup:
    """The model's name before its bar, and the sum in a column of its own, clear of the budget line."""
    child, total, base = model["kind"] == "child", model["cost"]["total_bytes"], y + BAR / 2 + 4
    name = text(start - 9, base, "child" if child else model["name"], "name strong" if child else "name", "end")
    return join(name, text(WIDTH - 2, base, size_text(total), "total strong" if child else "total", "end"))


def finalists(report: dict[str, Any]) -> Markup:
    """KL of each finalist over healing tokens; 0 tokens has a place of its own."""
    curves = [(finalist, [h for h in finalist["heal"] if h.get("kl") is not None]) for finalist in report["finalists"]]
    steps = [step for _, heal in curves for step in heal]
    x = log_scale([step["tokens"] for step in steps], X_RANGE[0], X_RANGE[1] - 96, band=34)
    y = log_scale([step["kl"] for step in steps], *Y_RANGE)
    parts = [chart_frame(x, y, "healing tokens", "KL to the parent (nats/token)")]
    ends = []
    for finalist, heal in sorted(curves, key=lambda curve: bool(curve[0].get("chosen"))):
        shape, class_, _ = ("star", "o-child", "") if finalist.get("chosen") else style(finalist.get("origin", ""))
        points = [(x(step["tokens"]), y(step["kl"])) for step in heal]
        parts.append(polyline(points, f"curve {class_}"))
        for (at, height), step in zip(points, heal, strict=True):
            about = f"{finalist['name']}\n{step['tokens']:,} tokens: KL {kl_text(step['kl'], step.get('kl_se'))}"
            data = {"data_point": finalist["name"], "data_x": step["tokens"], "data_y": f"{step['kl']:.12g}"}
            parts.append(error_bar(at, y, step["kl"], step.get("kl_se"), class_))
            parts.append(marker(at, height, shape, class_, about, **data))
        ends += [(points[-1][0], points[-1][1], finalist["name"], class_)] if points else []
    parts.append(_end_names(ends))
    entries = [("star", "o-child", "chosen")]
    there = {finalist.get("origin", "") for finalist in report["finalists"] if not finalist.get("chosen")}
    entries += list(dict.fromkeys(style(origin) for origin in sorted(there)))
    return join(svg(WIDTH, HEIGHT, "KL of the finalists over healing tokens", *parts), legend(entries))


def _end_names(ends: list[tuple[float, float, str, str]]) -> Markup:
    """The names at the right end of curves, moved apart so that none covers another."""
    parts, last = [], -1e9
    for x, y, name, class_ in sorted(ends, key=lambda end: end[1]):
        last = max(y + 4, last + 13)
        parts.append(
            text(
                x + 11,
                last,
                name if len(name) <= 20 else f"{name[:19]}…",
                f"name {'strong' if class_ == 'o-child' else ''}",
            )
        )
    return join(*parts)
