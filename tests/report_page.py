"""Reads a report's page as a browser would, for the tests: a tree that must be balanced, and charts as numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "input", "br", "link", "img"}


@dataclass
class Node:
    """An element: its own text is that of its children, in order."""

    tag: str
    attributes: dict[str, str]
    children: list[Node | str] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, tag: str, class_: str = "") -> list[Node]:
        """Elements of a tag and, if given, a class."""
        return [
            n for n in self.walk() if n.tag == tag and (not class_ or class_ in n.attributes.get("class", "").split())
        ]

    def by_id(self, name: str) -> Node:
        return next(node for node in self.walk() if node.attributes.get("id") == name)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Parser(HTMLParser):
    """Fails at an end tag that does not close what was opened last."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.stack = [Node("document", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in <{tag}>: {names}"
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.stack[-1].children.append(node)
        if tag not in VOID:
            self.stack.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack[-1].tag == tag, f"</{tag}> closes <{self.stack[-1].tag}>"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.stack[-1].children.append(data)


def read_page(text: str) -> Node:
    parser = Parser()
    parser.feed(text)
    parser.close()
    assert [node.tag for node in parser.stack] == ["document"], "something is left open"
    return parser.stack[0]


@dataclass(frozen=True)
class Axis:
    """An axis as one reads it: from the words of its ticks and where they stand."""

    ticks: list[tuple[float, float]]
    log: bool

    def at(self, value: float) -> float:
        """Where a value must stand, by interpolation between the outer ticks; 0 on a logarithmic axis by its own tick."""
        if self.log and value <= 0:
            return dict(self.ticks)[0.0]
        positive = [(v, at) for v, at in self.ticks if v > 0 or not self.log]
        (low, start), (high, end) = positive[0], positive[-1]
        if self.log:
            share = math.log(value / low) / math.log(high / low)
        else:
            share = (value - low) / (high - low)
        return start + share * (end - start)


def axis(figure: Node, name: str, log: bool) -> Axis:
    """The axis "x" or "y" of a figure."""
    ticks = []
    for tick in figure.all("g", f"{name}-tick"):
        words, line = tick.all("text")[0], tick.all("line")[0]
        at = float(line.attributes[f"{name}1"])
        ticks.append((spoken(words.text), at))
    assert len(ticks) >= 2, f"{name} axis has {len(ticks)} ticks"
    return Axis(ticks, log)


def spoken(words: str) -> float:
    """The number that a tick's words say: "1,500", "2M", "0.05"."""
    factor = {"k": 1e3, "M": 1e6, "G": 1e9}.get(words[-1], 1.0)
    return float(words.rstrip("kMG").replace(",", "")) * factor


def marks(figure: Node) -> list[tuple[str, float, float]]:
    """(name in the tooltip, x, y) of every point of a chart."""
    found = []
    for node in figure.walk():
        if node.tag == "g" and "mark" in node.attributes.get("class", "").split() and node.all("title"):
            x, y = map(float, re.findall(r"-?[\d.]+", node.attributes["transform"]))
            found.append((node.all("title")[0].text.splitlines()[0].removesuffix(" (the child)"), x, y))
    return found
