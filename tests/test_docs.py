"""The documents say what the code does: their examples run, and no figure is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_worked_examples_of_the_memory_model_hold() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "memory.md").read_text(), flags=re.DOTALL)
    assert any("assert" in block for block in blocks)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)  # its assertions compare with published figures


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_figure_is_left_out(document: Path) -> None:
    assert "<!-- figures:" not in document.read_text()


@pytest.mark.parametrize("package", ["blocks", "nas", "distill"])
def test_the_readme_lists_every_module(package: str) -> None:
    readme = (ROOT / "README.md").read_text()
    modules = {str(path.relative_to(ROOT / package)) for path in (ROOT / package).rglob("*.py")}
    missing = {name for name in modules if not name.endswith("__init__.py") and f"{name} " not in readme}
    assert not missing
