"""The text of manuals out of Debian's documentation packages, as .jsonl files that `nas score --data DIR` reads.

    apt-get download python3.11-doc debian-handbook linux-doc-6.1 postgresql-doc-15
    python benchmarks/manuals.py runs/manuals *.deb        # one page a row: sources (.rst) where there are any, else HTML

About 11 million tokens of SmolLM2's.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

SHORTEST = 400  # characters; shorter pages are menus
BLOCKS = {"p", "div", "pre", "li", "tr", "h1", "h2", "h3", "h4", "h5", "dt", "dd", "br", "table", "section"}
SKIPPED = {"script", "style", "nav", "head"}


class Text(HTMLParser):
    """The text of a page, a line a block."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipping += tag in SKIPPED
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipping -= tag in SKIPPED
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data)


def pages(directory: Path) -> list[Path]:
    """English pages of an unpacked package, sources before what was made from them."""
    sources = sorted(path for path in directory.rglob("_sources/**/*") if ".rst" in path.name and path.is_file())
    if sources:
        return [path for path in sources if "/translations/" not in str(path)]
    found = sorted(path for path in directory.rglob("*.html") if path.is_file())
    english = [path for path in found if "/en-US/" in str(path)]
    return english or found


def read(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode("utf-8", errors="replace")
    if path.suffix == ".html":
        parser = Text()
        parser.feed(text)
        text = "".join(parser.parts)
    lines = [line.rstrip() for line in text.splitlines()]
    kept = [line for line, before in zip(lines, ["", *lines], strict=False) if line or before]
    return "\n".join(kept).strip()


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for package in map(Path, sys.argv[2:]):
        with tempfile.TemporaryDirectory() as directory:
            subprocess.run(["dpkg-deb", "-x", package, directory], check=True)
            texts = dict.fromkeys(text for page in pages(Path(directory)) if len(text := read(page)) >= SHORTEST)
        target = out / f"{package.name.partition('_')[0]}.jsonl"
        target.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        print(f"{target}: {len(texts)} pages, {sum(map(len, texts)) / 1e6:.1f} million characters", flush=True)


if __name__ == "__main__":
    main()
