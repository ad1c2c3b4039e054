"""Charts of the healing: held-out KL with its band of one standard error, other texts, training loss, and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from nas.report_frame import CHARACTER, HEIGHT, TOP, WIDTH, X_RANGE, Y_RANGE, chart_frame, legend, marker
from nas.report_svg import Markup, Scale, element, join, line, linear_scale, log_scale, number, polyline, svg, text
from nas.report_words import kl_text

HELD_OUT = "held-out text"
OTHERS = (("square", "o-pool"), ("up", "o-path"), ("down", "o-swap"), ("diamond", "o-variant"))
"""Shape and colour of texts besides the held-out one."""


def learning(report: dict[str, Any]) -> Markup:
    """Held-out KL of the child while it heals; behind it the training loss where that is a KL too."""
    evaluations, others = report["learning"], report["other_texts"]
    everything = [*evaluations, *(e for curve in others.values() for e in curve)]
    losses = [loss for loss in report["training"] if _is_kl(loss["stage"])]
    x = linear_scale([e["tokens"] for e in everything], *X_RANGE, from_zero=True)
    last = [
        e for e in evaluations if e["stage"] == evaluations[-1]["stage"]
    ]  # each stage begins with the best of the one before
    best, worst = min(last, key=lambda e: e["kl"]), max(evaluations, key=lambda e: e["kl"])
    room = best["kl"] / max(1.02, (worst["kl"] / best["kl"]) ** 0.12) if best["kl"] > 0 else 0.0  # for words below
    lowest = [loss["loss"] for loss in losses if loss["loss"] > room / 2]
    y = log_scale([room, *(e["kl"] for e in everything), *([min(lowest)] if lowest else [])], *Y_RANGE)
    parts = [chart_frame(x, y, "healing tokens", "held-out KL to the parent (nats/token)"), _stages(report, x)]
    parts += [_loss(losses, x, y)]
    for index, (name, curve) in enumerate(others.items()):
        parts.append(_curve(name, curve, "kl", OTHERS[index % len(OTHERS)], x, y))
    parts.append(_curve(HELD_OUT, evaluations, "kl", ("circle", "o-child"), x, y, best))
    side = "end" if x(best["tokens"]) > WIDTH / 2 else "start"
    parts.append(text(x(best["tokens"]), y(best["kl"]) + 19, f"best {best['kl']:.4f}", "name strong", side))
    entries = [("circle", "o-child", "held-out evaluation, ± one standard error")]
    entries += [("star", "o-child", "lowest: the weights that are kept"), *_other_entries(others)]
    if losses:
        entries.append(("line", "loss", "training loss"))
    return join(svg(WIDTH, HEIGHT, "held-out KL over healing tokens", *parts), legend(entries))


def perplexity(report: dict[str, Any]) -> Markup:
    """Perplexity (and cross-entropy, in the tooltips) of the child on each text while it heals."""
    curves = {HELD_OUT: report["learning"], **report["other_texts"]}
    curves = {name: [e for e in curve if e["perplexity"] is not None] for name, curve in curves.items()}
    everything = [e for curve in curves.values() for e in curve]
    x = linear_scale([e["tokens"] for e in everything], *X_RANGE, from_zero=True)
    y = log_scale([e["perplexity"] for e in everything], *Y_RANGE)
    parts = [chart_frame(x, y, "healing tokens", "perplexity"), _stages(report, x)]
    looks = [("circle", "o-child"), *OTHERS]
    for index, (name, curve) in reversed(list(enumerate(curves.items()))):
        parts.append(_curve(name, curve, "perplexity", looks[index % len(looks)], x, y))
    entries = [("circle", "o-child", HELD_OUT), *_other_entries(report["other_texts"])]
    return join(svg(WIDTH, HEIGHT, "perplexity over healing tokens", *parts), legend(entries))


def _is_kl(stage: str | None) -> bool:
    """Stages are named NUMBER-LOSS; a healing of one stage learns by KL unless it says otherwise."""
    return stage is None or stage.rpartition("-")[2] in ("kl", "qad")


def _curve(
    name: str,
    curve: Sequence[dict[str, Any]],
    key: str,
    look: tuple[str, str],
    x: Scale,
    y: Scale,
    best: dict[str, Any] | None = None,
) -> Markup:
    """A line with its points, and a band of one standard error around a KL."""
    shape, class_ = look
    points = [(x(e["tokens"]), y(e[key])) for e in curve]
    parts = [_band(curve, x, y, class_)] if key == "kl" else []
    parts.append(polyline(points, f"curve {class_}"))
    for e, (at, height) in zip(curve, points, strict=True):
        stage = "" if e["stage"] is None else f" of {e['stage']}"
        told = f"{name}\n{e['tokens']:,} tokens, step {e['step']}{stage}"
        told += f"\nKL {kl_text(e['kl'], e['kl_se'])}"
        if e["perplexity"] is not None:
            told += f", perplexity {e['perplexity']:.2f}"
        if e["ce"] is not None:
            told += f", cross-entropy {e['ce']:.4f}"
        data = {"data_x": e["tokens"], "data_y": f"{e[key]:.12g}"}
        parts.append(marker(at, height, "star" if e is best else shape, class_, told, **data))
    return join(*parts)


def _band(curve: Sequence[dict[str, Any]], x: Scale, y: Scale, class_: str) -> Markup:
    """The area of value ± one standard error, as far as the scale goes; nothing where no error is known."""
    known = [e for e in curve if e["kl_se"] and e["kl"] > 0]
    if len(known) < 2:
        return Markup()

    def at(e: dict[str, Any], sign: int) -> str:
        value = min(max(e["kl"] + sign * e["kl_se"], y.low), y.high)
        return f"{number(x(e['tokens']))},{number(y(value))}"

    outline = [*(at(e, 1) for e in known), *(at(e, -1) for e in reversed(known))]
    return element("polygon", points=" ".join(outline), class_=f"band {class_}")


def _loss(losses: Sequence[dict[str, Any]], x: Scale, y: Scale) -> Markup:
    """The training loss, a line a stage, kept within the scale."""
    parts = []
    for _, stage in groupby(losses, key=lambda loss: loss["stage"]):
        points = [(x(loss["tokens"]), y(min(max(loss["loss"], y.low), y.high))) for loss in stage]
        parts.append(polyline(points, "loss"))
    return join(*parts)


def _stages(report: dict[str, Any], x: Scale) -> Markup:
    """Where one stage ends and the next begins, with their names."""
    parts, free = [], 0.0
    for stage in report["stages"] if len(report["stages"]) > 1 else []:
        at = x(stage["tokens"])
        place = max(at + 4, free)
        free = place + CHARACTER * 10.5 * len(stage["name"]) + 8
        parts.append(line(at, Y_RANGE[0], at, TOP, "break"))
        parts.append(text(place, TOP - 6, stage["name"], "tick"))
    return join(*parts)


def _other_entries(others: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(*OTHERS[index % len(OTHERS)], name) for index, name in enumerate(others)]
