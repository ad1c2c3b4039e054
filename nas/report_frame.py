"""The frame of a chart in the report: grid, ticks, axis labels, markers with tooltips, legends, and labels that keep clear."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nas.report_svg import Markup, Scale, element, join, line, number, plain, text, title

WIDTH, HEIGHT = 560.0, 350.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 18.0, 22.0, 46.0
X_RANGE, Y_RANGE = (LEFT, WIDTH - RIGHT), (HEIGHT - BOTTOM, TOP)  # pixels from the low to the high end


def chart_frame(
    x: Scale,
    y: Scale,
    x_label: str,
    y_label: str,
    x_text: Callable[[float], str] = plain,
    y_text: Callable[[float], str] = plain,
    height: float = HEIGHT,
) -> Markup:
    """Grid, ticks and labels of both axes. Every tick carries its value in `data-value`."""
    (left, right), (bottom, top) = X_RANGE, (height - BOTTOM, TOP)
    parts = [_broken_axis(x, y, bottom)]
    for value in y.ticks():
        at = y(value)
        parts.append(
            element(
                "g",
                line(left, at, right, at, "grid"),
                text(left - 8, at + 3.5, y_text(value), "tick", "end"),
                class_="y-tick",
                data_value=f"{value:.12g}",
                data_at=at,
            )
        )
    for value in x.ticks():
        at = x(value)
        parts.append(
            element(
                "g",
                line(at, bottom, at, bottom + 4, "axis"),
                text(at, bottom + 17, x_text(value), "tick", "middle"),
                class_="x-tick",
                data_value=f"{value:.12g}",
                data_at=at,
            )
        )
    middle = (bottom + top) / 2
    parts += [
        line(left, bottom, right, bottom, "axis"),
        text((left + right) / 2, height - 8, x_label, "label", "middle"),
        text(14, middle, y_label, "label", "middle", transform=f"rotate(-90 14 {number(middle)})"),
    ]
    return join(*parts)


def _broken_axis(x: Scale, y: Scale, bottom: float) -> Markup:
    """A dashed line where a logarithmic scale ends and the band that stands for 0 begins."""
    left, right = X_RANGE
    parts = []
    if y.log and y.zero is not None:
        parts.append(line(left, y.start, right, y.start, "break"))
    if x.log and x.zero is not None:
        parts.append(line(x.start, TOP, x.start, bottom, "break"))
    return join(*parts)


def error_bar(x: float, y: Scale, value: float, error: float | None, class_: str) -> Markup:
    """One standard error to each side, upright at `x`."""
    if not error or value <= 0:
        return Markup()
    low, high = (min(max(end, y.low), y.high) for end in (value - error, value + error))
    return line(x, y(low), x, y(high), f"error {class_}")


CHARACTER = 0.57  # mean width of a character, in ems: to place labels without a browser

# Markers

SHAPES = {
    "circle": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
    "square": "M-3.6,-3.6H3.6V3.6H-3.6Z",
    "diamond": "M0,-5.4L5.4,0L0,5.4L-5.4,0Z",
    "up": "M0,-5L4.8,3.6H-4.8Z",
    "down": "M0,5L4.8,-3.6H-4.8Z",
    "plus": "M-1.5,-5H1.5V-1.5H5V1.5H1.5V5H-1.5V1.5H-5V-1.5H-1.5Z",
    "cross": "M-4,-4L4,4M-4,4L4,-4",
    "star": "M0,-8L2,-2.6L7.6,-2.5L3.2,1L4.7,6.5L0,3.3L-4.7,6.5L-3.2,1L-7.6,-2.5L-2,-2.6Z",
    "ring": "M-7.5,0a7.5,7.5 0 1,0 15,0a7.5,7.5 0 1,0 -15,0Z",
}


def marker(x: float, y: float, shape: str, class_: str, about: str, **data: object) -> Markup:
    """One point with its tooltip; `data` are data-attributes."""
    path = element("path", d=SHAPES[shape])
    where = f"translate({number(x)} {number(y)})"
    return element("g", path, title(about), class_=f"mark {shape} {class_}", transform=where, **data)


def legend(entries: Sequence[tuple[str, str, str]]) -> Markup:
    """A list below a figure. Entries are (shape or "line" or "fill", CSS class, words)."""
    items = []
    for shape, class_, words in entries:
        if shape == "line":
            drawing = line(0, 8, 18, 8, class_)
        elif shape == "fill":
            drawing = element("rect", x=1, y=2, width=16, height=12, rx=2, class_=class_)
        else:
            drawing = element(
                "g", element("path", d=SHAPES[shape]), class_=f"mark {shape} {class_}", transform="translate(9 8)"
            )
        swatch = element("svg", drawing, width=18, height=16, viewBox="0 0 18 16", aria_hidden="true")
        items.append(element("li", swatch, words))
    return element("ul", *items, class_="legend")


# Labels beside points


def place_labels(
    points: Sequence[tuple[float, float, str]],
    obstacles: Sequence[tuple[float, float]],
    bottom: float,
    size: float = 11.0,
) -> list[tuple[float, float, str]]:
    """Where to write each point's name: (x, baseline y, anchor), to its side, above or below, the least crowded place.

    Args:
        points: x, y and the words.
        obstacles: other points, better not written over.
        bottom: lowest pixel of the plotting area.
    """
    taken: list[tuple[float, float, float, float]] = []
    placed: list[tuple[float, float, str]] = []
    for x, y, words in points:
        width = CHARACTER * size * len(words)
        options = [(x + 10, y + 4, "start"), (x - 10, y + 4, "end")]
        options += [(x + dx, y + dy, "middle") for dy in (-11, 19, -23, 31) for dx in (0, width / 3, -width / 3)]

        def crowding(option: tuple[float, float, str], width: float = width) -> float:
            box = _box(*option, width, size)
            outside = box[0] < LEFT or box[2] > WIDTH or box[1] < TOP - 6 or box[3] > bottom
            overlaps = sum(_overlap(box, other) for other in taken)
            covered = sum(box[0] - 4 < px < box[2] + 4 and box[1] - 4 < py < box[3] + 4 for px, py in obstacles)
            return 1000 * outside + overlaps + 25 * covered

        best = min(options, key=crowding)
        taken.append(_box(*best, width, size))
        placed.append(best)
    return placed


def _box(x: float, y: float, anchor: str, width: float, size: float) -> tuple[float, float, float, float]:
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return left, y - size, left + width, y + 3


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]) + 6, min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)
