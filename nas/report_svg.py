"""SVG and HTML for the report: elements that escape what they are given, and scales with their ticks.

Plain text becomes markup in one place, `element`: a `str` child is escaped, a `Markup` child is not. Colours are never
written here; they are CSS classes, so that one page serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

VOID = ("meta", "input")  # HTML gives these no end


class Markup(str):
    """Text that is markup already."""


def element(tag: str, *children: str, **attributes: object) -> Markup:
    """One element. `class_` is class, `stroke_width` is stroke-width; an attribute that is None is left out."""
    words = [tag]
    for name, value in attributes.items():
        if value is not None:
            text = number(value) if isinstance(value, float) else str(value)
            words.append(f'{name.rstrip("_").replace("_", "-")}="{escape(text)}"')
    if tag in VOID:
        return Markup(f"<{' '.join(words)}>")
    return Markup(f"<{' '.join(words)}>{join(*children)}</{tag}>")


def join(*children: str) -> Markup:
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


def number(value: float) -> str:
    """A coordinate: two digits are finer than a screen."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def svg(width: float, height: float, label: str, *children: str, fixed: bool = False) -> Markup:
    """A drawing that shrinks with its column, or keeps its size if `fixed` (its box then scrolls)."""
    size = {"width": width, "height": height} if fixed else {"style": f"max-width:{number(width)}px"}
    return element(
        "svg",
        *children,
        viewBox=f"0 0 {number(width)} {number(height)}",
        role="img",
        aria_label=label,
        class_="fixed" if fixed else "fluid",
        **size,
    )


def text(x: float, y: float, content: str, class_: str = "", anchor: str = "start", **more: object) -> Markup:
    return element("text", content, x=float(x), y=float(y), class_=class_ or None, text_anchor=anchor, **more)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def polyline(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    return element("polyline", points=" ".join(f"{number(x)},{number(y)}" for x, y in points), class_=class_)


def title(content: str) -> Markup:
    """What a browser shows when the pointer rests on the parent element."""
    return element("title", content)


# Numbers for people


def plain(value: float) -> str:
    """A few significant digits, without an exponent where one can read it: 0.05, 1.25, 40, 1,500, 2M."""
    if value == 0:
        return "0"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.4g}{suffix}"
    if abs(value) >= 1000:
        return f"{value:,.4g}"
    return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.0e}".replace("e-0", "e-")


# Scales


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels.

    Attributes:
        low, high: values at the ends. On a logarithmic scale both are above 0.
        start, end: pixels at these values.
        zero: on a logarithmic scale, the pixel that stands for 0 and below, beyond a gap; None if there is none.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    zero: float | None = None

    def __call__(self, value: float) -> float:
        if self.log:
            if value <= 0:
                return self.start if self.zero is None else self.zero
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 7) -> list[float]:
        """Round values within the scale, at most about `most`; with `zero`, 0 first."""
        zero = [0.0] if self.log and self.zero is not None else []
        return zero + (log_ticks(self.low, self.high, most) if self.log else linear_ticks(self.low, self.high, most))


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(1, most)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Decades, with 2 and 5 (or all digits) between where there is room, fewer decades where there is none.

    Within a small part of a decade, the ticks of a linear scale.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    inside: list[float] = []
    for digits in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        inside = [float(f"{d}e{e}") for e in range(first, last + 1) for d in digits]
        inside = [value for value in inside if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(inside) <= most:
            break
    if len(inside) < 3:
        return linear_ticks(low, high, most)
    return inside[:: -(-len(inside) // most)] if len(inside) > most else inside


def linear_scale(values: Sequence[float], start: float, end: float, from_zero: bool = False) -> Scale:
    """Covers the values with a margin of 4 %, from 0 if asked."""
    low, high = (0.0 if from_zero else min(values)), max(values)
    margin = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
    return Scale(low if from_zero else low - margin, high + margin, start, end)


def log_scale(values: Sequence[float], start: float, end: float, band: float = 26.0) -> Scale:
    """Covers the positive values with a margin; a band before the start stands for zeros, if there are any."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    factor = max(1.08, (high / low) ** 0.05)
    low, high = low / factor, high * factor
    if min(values, default=1.0) > 0:
        return Scale(low, high, start, end, log=True)
    inner = start + math.copysign(band, end - start)
    return Scale(low, high, inner, end, log=True, zero=start + math.copysign(band / 3, end - start))
