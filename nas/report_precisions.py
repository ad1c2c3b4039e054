"""The row of number formats under a map of the report: a mark for each attention and each FFN, as high as its bits."""

from __future__ import annotations

from typing import Any

from nas.format_words import bits_text
from nas.report_frame import legend
from nas.report_svg import Markup, element, join, text, title

MARK, SMALL, GAP = 13.0, 4.0, 2.0  # heights of a mark below the large map and in a strip
WORDS = {"attention": "attention", "ffn": "FFN"}
KNOWN = ("bf16", "fp8", "int8", "nvfp4", "nvfp4a16", "int4", "int4-g32")
BF16_BITS = 16.0


def rows_height(report: dict[str, Any], small: bool = False) -> float:
    """What the marks of a map take, 0 where all is bf16."""
    if not report["map"]["precisions"]:
        return 0.0
    return 2 * ((SMALL if small else MARK) + GAP) + (2.0 if small else 6.0)


def marks(report: dict[str, Any], name: str, width: float, top: float, small: bool = False) -> Markup:
    """The marks of a model, attention over FFN, from y = `top`; nothing where all models are bf16."""
    told = report["map"]["precisions"]
    if not told:
        return Markup()
    bits = {format["name"]: format["bits"] for format in told["formats"]}
    height, drawn = SMALL if small else MARK, []
    for row, (part, words) in enumerate(WORDS.items()):
        y = top + (1 if small else 4) + row * (height + GAP)
        for index, precision in enumerate(told["models"][name].get(part, [])):
            if precision is not None:
                share = min(1.0, (bits[precision] or BF16_BITS) / BF16_BITS)
                high = height if small else max(2.0, height * share)  # too low to tell heights apart in a strip
                place = {"x": index * width + 1, "width": width - 2}
                about = f"layer {report['map']['columns'][index]}, {words} in {precision}: {bits_text(bits[precision])}"
                tip = title(f"{name}, {about}" if small else about)
                track = Markup() if small else element("rect", y=y, height=height, class_="p-track", **place)
                bar = element("rect", tip, y=y + height - high, height=high, class_=class_of(precision), **place)
                drawn.append(element("g", track, bar, class_="precision", data_format=precision))
    return join(*drawn)


def row_names(report: dict[str, Any], x: float, top: float) -> Markup:
    """The name of the row, at the right end of the names of a map."""
    if not report["map"]["precisions"]:
        return Markup()
    return text(x, top + 4 + MARK + GAP / 2 + 4, "number formats", "name", "end")


def class_of(precision: str) -> str:
    return f"p-{precision if precision in KNOWN else 'other'}"


def format_legend(report: dict[str, Any]) -> Markup:
    """The formats of all models shown, with their bits; and the mean of the child."""
    told = report["map"]["precisions"]
    if not told:
        return Markup()
    words = "Number formats, attention over FFN; a mark is as high as its bits, scales included."
    if (mean := told["mean_bits"].get("child before healing")) is not None:
        words += f" The child's matrices take {mean:.3g} bits a weight in the mean."
    entries = [
        ("fill", class_of(format["name"]), f"{format['name']}: {bits_text(format['bits'])}")
        for format in told["formats"]
    ]
    return join(element("p", words, class_="aside"), legend(entries))
