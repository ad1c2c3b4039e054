"""Tables of the report: results with their standard errors, limits and what binds, every trial, and how scores were made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nas.eval_table import eval_table
from nas.report_svg import Markup, element, join
from nas.report_words import estimate, kl_text, rate_text, size_text, spearman, time_text

LIMITS = {
    "memory": "memory (weights, KV cache, reserve)",
    "parameters": "parameters",
    "kv": "KV cache",
    "throughput": "throughput",
    "ttft": "time to first token",
    "tpot": "time per output token",
    "latency": "time of a request",
    "request": "time of a request",
}
MOST_TRIALS = 60


def table(head: Sequence[str], rows: Sequence[Sequence[str]], strong: int | None = None) -> Markup:
    """A table whose first column is words and the others numbers; row `strong` stands out."""
    lines = []
    for index, row in enumerate(rows):
        first, *others = row
        cells = [element("th", first, scope="row"), *(element("td", cell) for cell in others)]
        lines.append(element("tr", *cells, class_="strong" if index == strong else None))
    top = element("tr", *(element("th", name, scope="col") for name in head))
    whole = element("table", element("thead", top), element("tbody", *lines))
    return element("div", whole, class_="scroll", tabindex="0")


def results(report: dict[str, Any]) -> Markup:
    """Every model: size, KL on calibration and held-out text, perplexity, times."""
    models = report["models"]
    timed = any((model["cost"] or {}).get("tokens_per_s") is not None for model in models)
    head = ["model", "parameters", "memory", "KL, calibration", "KL, held out", "perplexity", "top-1 agreement"]
    if timed:
        told = " (estimate)" if estimate(report) else ""
        head += [f"tokens/s{told}", f"ms to first token{told}", f"ms per token{told}"]
    rows = []
    for model in models:
        cost, heldout = model["cost"] or {}, model["heldout"] or {}
        parent = model["kind"] == "parent"
        row = [model["name"], _count(cost.get("parameters")), size_text(cost.get("total_bytes"))]
        row += ["0" if parent else kl_text(model["kl"], model["kl_se"])]
        row += ["0" if parent else kl_text(heldout.get("kl"), heldout.get("kl_se"))]
        row += ["–" if heldout.get("perplexity") is None else f"{heldout['perplexity']:.2f}"]
        row += ["–" if heldout.get("top1_agreement") is None else f"{heldout['top1_agreement']:.1%}"]
        if timed:
            row += [_count(cost.get("tokens_per_s"))]
            row += ["–" if cost.get(k) is None else f"{cost[k]:,.4g}" for k in ("prefill_ms", "decode_ms")]
        rows.append(row)
    kinds = [model["kind"] for model in models]
    return table(head, rows, strong=kinds.index("healed" if "healed" in kinds else "child"))


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def limits(report: dict[str, Any]) -> Markup:
    """Each limit with the child's value, whether it binds, and its shadow price; then the proof."""
    optimum = report["optimum"] or {}
    cost = next((model["cost"] for model in report["models"] if model["kind"] == "child"), None) or {}
    rows = []
    for name, limit in report["limits"].items():
        value = _value(name, cost, report["scenario"] or {})
        ends = [_amount({}, limit["unit"], limit[end]) for end in ("low", "high")]  # asked for, not estimated
        binds = "yes" if name in (optimum.get("binding") or []) else "no"
        rows.append(
            [LIMITS.get(name, name), *ends, _amount(report, limit["unit"], value), binds, _price(optimum, name, limit)]
        )
    return join(
        table(["limit", "at least", "at most", "the child", "binds", "shadow price"], rows) if rows else Markup(),
        table(["the proof of the optimum of summed scores", "nats/token"], _proof(optimum)) if optimum else Markup(),
    )


def _proof(optimum: dict[str, Any]) -> list[list[str]]:
    words = {
        "score": "sum of scores of the best choice",
        "bound": "proven: no choice is below",
        "gap": "gap between the two",
    }
    return [[words[key], f"{optimum[key]:.6g}"] for key in words if optimum.get(key) is not None]


def _value(name: str, cost: dict[str, Any], scenario: dict[str, Any]) -> float | None:
    """The child's value of a limit, from its cost."""
    keys = {"memory": "total_bytes", "parameters": "parameters", "kv": "kv_bytes", "throughput": "tokens_per_s"}
    keys |= {"ttft": "prefill_ms", "tpot": "decode_ms"}
    if name in keys:
        value: float | None = cost.get(keys[name])
        return value
    prefill, decode, output = cost.get("prefill_ms"), cost.get("decode_ms"), scenario.get("output")
    if name not in ("latency", "request") or prefill is None or decode is None or output is None:
        return None
    return float(prefill + output * decode)


def _amount(report: dict[str, Any], unit: str, value: float | None) -> str:
    if unit == "bytes":
        return size_text(value)
    if unit == "ms":
        return time_text(report, value)
    if unit == "tokens/s":
        return rate_text(report, value)
    return _count(value)


def _price(optimum: dict[str, Any], name: str, limit: dict[str, Any]) -> str:
    """Nats a token that one more unit (GB, ms, million) would win back; solvers count in bytes and nanoseconds."""
    price = (optimum.get("prices") or {}).get(name)
    if price is None:
        return "–"
    size, words = {
        "bytes": (1e9, "GB"),
        "ms": (limit["per_unit"], "ms"),
        "tokens/s": (1.0, "token/s"),
    }.get(limit["unit"], (1e6, "million"))
    return f"{abs(price) * size:.4g} nats per {words}"


def trials(report: dict[str, Any]) -> Markup:
    """The best children measured, with what was foreseen of them."""
    measured = [point for point in report["points"] if point["kl"] is not None and point["origin"] != "parent"]
    done = sorted(measured, key=lambda point: (point["state"] != "complete", point["kl"]))
    timed = any(point["tokens_per_s"] is not None for point in measured)
    head = ["child", "true KL", "predicted", "true / predicted", "memory", *(["throughput"] if timed else []), "state"]
    rows = []
    for point in done[:MOST_TRIALS]:
        foreseen = point["predicted_kl"]
        size = None if point["gb"] is None else point["gb"] * 1e9
        ratio = f"{point['kl'] / foreseen:.2f}" if foreseen else "–"
        row = [point["name"], kl_text(point["kl"], point["kl_se"]), kl_text(foreseen), ratio, size_text(size)]
        rows.append([*row, *([rate_text(report, point["tokens_per_s"])] if timed else []), _state(point)])
    more = len(done) - len(rows)
    after = element("p", f"and {more} more, all of them in report.json", class_="aside") if more > 0 else Markup()
    child = next((index for index, point in enumerate(done[:MOST_TRIALS]) if point["child"]), None)
    summary = element(
        "summary", f"The {len(rows)} best of {len(done)} children measured" if more > 0 else "Every child measured"
    )
    return element("details", summary, table(head, rows, strong=child), after)


def _state(point: dict[str, Any]) -> str:
    words = ["the child"] if point["child"] else []
    words += ["finalist"] if point["finalist"] else []
    words += ["given up half-way"] if point["state"] == "pruned" else []
    words += [] if point["within"] else ["beyond the limits"]
    return ", ".join(words) or "measured"


def agreement(pairs: list[tuple[float, float]]) -> str:
    """ " Rank correlation 0.93 over 24." or nothing where there is too little for one."""
    value = spearman(pairs)
    return "" if value is None else f" Rank correlation {value:.2f} over {len(pairs)}."


def scores_made(report: dict[str, Any]) -> Markup:
    """How the scores were made, and how they agree with exact ones."""
    made = report["made"]
    correlation = made.get("rank_correlation") or {}
    spearman_text = "too few to tell" if correlation.get("spearman") is None else f"{correlation['spearman']:.3f}"
    facts = [
        ("candidates scored", _count(made.get("candidates"))),
        ("of them exactly", _count(made.get("exact"))),
        ("estimator", str(made.get("estimator", "–"))),
        ("rank correlation, one-pass with exact", f"{spearman_text} on {correlation.get('candidates', 0)} candidates"),
        ("tokens: fit, one-pass, exact", " · ".join(_count(value) for value in _tokens(made))),
        ("device", str(made.get("device", "–"))),
        ("time", "–" if made.get("seconds") is None else f"{made['seconds']:,.1f} s"),
    ]
    return table(["scores", ""], facts)


def _tokens(made: dict[str, Any]) -> list[float | None]:
    return [(made.get("tokens") or {}).get("fit"), made.get("one_pass_tokens"), made.get("exact_tokens")]


def evaluation(report: dict[str, Any]) -> Markup:
    """What `nas eval` measured, a group of rows a text or task; below it the continuations of each prompt."""
    made = eval_table(report["eval"])
    rows, group = [], ""
    for row in made.rows:
        if row.group != group:
            rows.append([row.group, *([""] * len(made.models))])
            group = row.group
        rows.append([f"\u2003{row.metric.strip()}" if row.group else row.metric, *row.cells])
    samples = []
    for prompt, texts in made.samples:
        samples.append(element("p", element("i", prompt)))
        samples += [element("p", element("b", f"{name}: "), text, class_="aside") for name, text in texts]
    told = element("details", element("summary", "What each writes after a prompt"), *samples) if samples else Markup()
    return join(table(["", *made.models], rows), told)
