"""The families of parents that can be taken apart. A new one is one small file and one line here."""

from __future__ import annotations

from blocks.errors import UnsupportedModelError
from blocks.families.family import Family, read_sizes
from blocks.families.llama import LLAMA
from blocks.families.mistral import MISTRAL
from blocks.families.qwen2 import QWEN2
from blocks.families.qwen3 import QWEN3

__all__ = ["CHILD_TYPE", "FAMILIES", "Family", "family_of", "read_sizes"]

CHILD_TYPE = "nemotron-nas"  # the model_type of every child

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def family_of(model_type: str) -> Family:
    """The family of a config.json's `model_type`. Raises UnsupportedModelError listing those that work."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    hint = "; it is a child already: start from its parent" if model_type == CHILD_TYPE else ""
    raise UnsupportedModelError(
        f"a {model_type} model cannot be a parent{hint}; the families that work are {', '.join(FAMILIES)} (dense)"
    )
