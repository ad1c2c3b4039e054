"""Opens a run's report in headless Chromium, checks that every figure shows, and takes a picture of it.

    python benchmarks/screenshot.py --run runs/default --out docs/report.png

Needs Chromium (`apt-get install chromium`). In light and in dark, wide and narrow: no message on the console, every figure of
the page has drawings and words of some size, and no words leave the drawing that they are in. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from html import unescape
from pathlib import Path
from typing import Any

from nas.report import write_report

WIDTHS = (1280, 700)
# Runs in a copy of the page and leaves what it saw in the title. Scrolling boxes may hold more than they show.
PROBE = """<script>
addEventListener('load', () => {
  const box = e => e.getBoundingClientRect();
  const seen = [...document.querySelectorAll('figure')].map(figure => {
    const drawings = [...figure.querySelectorAll('svg')].filter(s => box(s).width > 15 && box(s).height > 10);
    const words = [...figure.querySelectorAll('text')].filter(t => box(t).width > 0);
    const lost = words.filter(t => { const a = box(t), b = box(t.closest('svg'));
      return a.left < b.left - 2 || a.right > b.right + 2 || a.top < b.top - 4 || a.bottom > b.bottom + 4 });
    const wide = box(figure).right > innerWidth + 1;
    return {id: figure.id, absent: figure.className == 'absent', drawings: drawings.length, words: words.length,
            lost: lost.map(t => t.textContent), wide, table: figure.querySelectorAll('td').length};
  });
  document.title = 'SEEN' + JSON.stringify(seen) + 'END';
});
</script>"""


def chromium(page: Path, *options: str) -> tuple[str, str]:
    """Output and console of a run of Chromium on a page, with a profile of its own."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        sys.exit("error: no Chromium here; apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000"]
        flags += ["--enable-logging=stderr", f"--user-data-dir={profile}", *options, f"file://{page.resolve()}"]
        done = subprocess.run([binary, *flags], capture_output=True, text=True, timeout=180, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def theme(dark: bool) -> str:
    return f"--blink-settings=preferredColorScheme={0 if dark else 1}"


def look(page: Path, width: int, dark: bool) -> list[str]:
    """What is wrong with the page, in words."""
    with tempfile.TemporaryDirectory() as directory:
        probed = Path(directory) / "page.html"
        probed.write_text(page.read_text(encoding="utf-8").replace("</head>", f"{PROBE}</head>"), encoding="utf-8")
        dom, _ = chromium(probed, "--dump-dom", f"--window-size={width},1000", theme(dark))
    _, console = chromium(page, "--dump-dom", f"--window-size={width},1000", theme(dark))
    found = re.search(r"SEEN(.*?)END", dom, re.DOTALL)
    if found is None:
        return ["the page did not load"]
    seen: list[dict[str, Any]] = json.loads(unescape(found[1]))
    wrong = [f"console: {console}"] if console else []
    for figure in seen:
        shown = figure["absent"] or figure["table"] or (figure["drawings"] and figure["words"] >= 4)
        wrong += [] if shown else [f"{figure['id']} does not show"]
        wrong += [f"{figure['id']} is wider than the page"] if figure["wide"] else []
        wrong += [f"{figure['id']}: words outside: {figure['lost']}"] if figure["lost"] else []
    names = [figure["id"] for figure in seen if not figure["absent"]]
    print(f"{width} px, {'dark' if dark else 'light'}: {len(names)} figures ({', '.join(names)}); {len(wrong)} faults")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/default"))
    parser.add_argument("--out", type=Path, help="where to save the picture; none is taken if not given")
    parser.add_argument("--size", default="1280,1480", help="of the picture, in pixels")
    parser.add_argument("--dark", action="store_true", help="take the picture in dark")
    arguments = parser.parse_args()
    write_report(arguments.run)
    page = arguments.run / "report.html"
    wrong = [fault for width in WIDTHS for dark in (False, True) for fault in look(page, width, dark)]
    if arguments.out:
        chromium(
            page, f"--screenshot={arguments.out.resolve()}", f"--window-size={arguments.size}", theme(arguments.dark)
        )
        print(f"{arguments.out}: {arguments.out.stat().st_size / 1e3:.0f} kB")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
