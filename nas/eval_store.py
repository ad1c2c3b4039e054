"""eval.json: what `nas eval` has measured, kept so that a model is never measured twice on the same thing.

models      name, path, fingerprint of each, in the order of the table; "parent" first
measures    kind (text, choices, harness, samples), name, id and settings of each, in the order of the table
results     by "FINGERPRINT:ID"; the id is a digest of everything that the result depends on
parameters  of each model, by fingerprint
search      key of the search that child and healed are of; null outside of a run
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blocks.digest import sample_file
from blocks.errors import CheckpointError
from blocks.files import save_json

NAME = "eval.json"
FORMAT = 1
PARENT = "parent"
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Subject:
    """A model that is measured."""

    name: str
    path: str
    fingerprint: str


@dataclass(frozen=True)
class Measure:
    """One thing that models are measured on.

    Attributes:
        id: digest of all that a result depends on besides the model.
        about: settings, for people.
    """

    kind: str
    name: str
    id: str
    about: dict[str, Any] = field(default_factory=dict)


class EvalStore:
    """The file. Every result is written when it is there, so a killed command loses only what it was at."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """The content, empty if there is no file. Raises CheckpointError if it is damaged."""
        empty: dict[str, Any] = {"format": FORMAT, "search": None, "models": [], "measures": []}
        empty |= {"results": {}, "parameters": {}}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return empty
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} is damaged ({error}); delete it and run `nas eval` again") from error
        if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
            raise CheckpointError(f"{self.path} is no eval.json; give another --out, or delete it")
        if content.get("format", FORMAT) > FORMAT:
            raise CheckpointError(f"{self.path} is of a newer version; update marquetry, or give another --out")
        return empty | content

    def begin(self, models: list[Subject], measures: list[Measure], search: str | None) -> dict[str, Any]:
        """Says what is asked for now: models and measures of the same name take the place of earlier ones."""
        content = self.read()
        own = {model.name: asdict(model) for model in models}
        before = {model["name"]: model for model in content["models"]} if content["search"] == search else {}
        parents = [named[PARENT]["fingerprint"] for named in (before, own) if PARENT in named]
        if len(set(parents)) > 1:
            before = {}  # beside another parent their KLs and differences would mean nothing
        content["models"] = sorted((before | own).values(), key=lambda model: model["name"] != PARENT)
        known = {(measure["kind"], measure["name"]): measure for measure in content["measures"]}
        asked = {(measure.kind, measure.name): asdict(measure) for measure in measures}
        content |= {"measures": list((known | asked).values()), "search": search}
        save_json(self.path, content)
        return content

    def add(self, model: Subject, parameters: int, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Keeps results of a model, by measure id."""
        content = self.read()
        content["parameters"][model.fingerprint] = parameters
        content["results"] |= {key_of(model.fingerprint, id): result for id, result in results.items()}
        save_json(self.path, content)
        return content


def key_of(fingerprint: str, id: str) -> str:
    return f"{fingerprint}:{id}"


def fingerprint(directory: Path) -> str:
    """16 hex digits that tell models apart, wherever they lie: of the configuration, the weights and the tokenizer.

    Weights are sampled (blocks/digest.py), so that it takes no time. Raises CheckpointError if there is no model.
    """
    files = [file for pattern in _WEIGHTS for file in sorted(directory.glob(pattern))]
    if not (directory / "config.json").is_file() or not files:
        raise CheckpointError(f"{directory} holds no model: config.json and .safetensors files are needed")
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in [*files, *(directory / name for name in ("tokenizer.json", "tokenizer.model"))]:
        if file.is_file():
            digest.update(file.name.encode() + sample_file(file, 1 << 16))
    return digest.hexdigest()[:16]
