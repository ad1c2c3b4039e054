"""The documents say what the code does: their examples run, and no figure is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from nas.config import SECTIONS, build, to_dict

ROOT = Path(__file__).parent.parent
FORMATS = ROOT / "docs" / "formats.md"
MINIMUM = {"search": {"budget": 0.6}}  # a search needs a budget
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", ["memory.md", "cluster.md"])
def test_the_worked_examples_of_the_memory_model_hold(document: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / document).read_text(), flags=re.DOTALL)
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


def test_the_recipe_in_the_formats_states_the_real_defaults() -> None:
    recipe = next(b for b in re.findall(r"```yaml\n(.*?)```", FORMATS.read_text(), flags=re.DOTALL) if "scenario:" in b)
    stated = yaml.safe_load(recipe)
    in_brackets = {
        key: yaml.safe_load(value) for key, value in re.findall(r"(\w+):.*\[([\w.]+)\]$", recipe, re.MULTILINE)
    }
    for name in ("data", "score", "search", "scenario", "distill"):
        gpu = to_dict(build(SECTIONS[name], stated, {}, "cuda"))
        assert gpu == to_dict(build(SECTIONS[name], MINIMUM, {}, "cuda")), name
        cpu = to_dict(build(SECTIONS[name], MINIMUM, {}, "cpu"))
        assert {key: value for key, value in cpu.items() if value != gpu[key]} == {
            key: in_brackets[key] for key in cpu if cpu[key] != gpu[key]
        }, name
