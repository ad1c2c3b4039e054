"""The table of eval.json: parent and children side by side, the same rows on the terminal, in Markdown and in the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blocks.errors import CheckpointError
from nas.accuracy import paired_difference
from nas.eval_store import NAME, PARENT, EvalStore, fingerprint, key_of

if TYPE_CHECKING:
    from rich.console import RenderableType

NOTHING = "–"


@dataclass(frozen=True)
class Row:
    """One line: what it is of, what is told, and a cell for each model."""

    group: str
    metric: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class EvalTable:
    """What is to be shown.

    Attributes:
        models: names, in order.
        samples: (prompt, [(model, text)]) of each prompt.
    """

    models: tuple[str, ...]
    rows: tuple[Row, ...]
    samples: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()


def eval_table(content: dict[str, Any]) -> EvalTable:
    """The table of what eval.json holds. Measures that none of its models has are left out."""
    models = content["models"]
    rows: list[Row] = []
    sizes = [content["parameters"].get(model["fingerprint"]) for model in models]
    if any(sizes):
        rows.append(Row("", "parameters", tuple(NOTHING if size is None else f"{size:,}" for size in sizes)))
    samples: list[tuple[str, tuple[tuple[str, str], ...]]] = []
    for measure in content["measures"]:
        results = [content["results"].get(key_of(model["fingerprint"], measure["id"])) for model in models]
        if not any(results):
            continue
        if measure["kind"] == "samples":
            samples += _samples([model["name"] for model in models], results)
        elif measure["kind"] == "harness":
            rows += _harness_rows(results)
        else:
            rows += (_text_rows if measure["kind"] == "text" else _choice_rows)(measure["name"], models, results)
    return EvalTable(tuple(model["name"] for model in models), tuple(rows), tuple(samples))


Results = Sequence[dict[str, Any] | None]


def _text_rows(name: str, models: Sequence[dict[str, Any]], results: Results) -> list[Row]:
    tokens = next((result["tokens"] for result in results if result and "tokens" in result), None)
    group = name if tokens is None else f"{name}, {tokens:,} tokens"
    rows = []
    for key, words, scale, digits in (
        ("kl", "KL to parent", 1, 4),
        ("top1_agreement", "top-1 agreement, %", 100, 1),
        ("perplexity", "perplexity", 1, 2),
    ):
        cells = [_with_error(result, key, scale, digits) for result in results]
        if key != "perplexity":
            cells = [
                ("0" if key == "kl" else "100") if model["name"] == PARENT and result and "kl" in result else cell
                for model, result, cell in zip(models, results, cells, strict=True)
            ]
        rows.append(Row(group, words, tuple(cells)))
    return rows


def _choice_rows(name: str, models: Sequence[dict[str, Any]], results: Results) -> list[Row]:
    """acc and acc_norm in percent, each above its difference from the parent's on the same questions."""
    some = next(result for result in results if result)
    group = f"{name}, {some['questions']:,} questions, chance {100 * some['chance']:.0f} %"
    pairs = zip(models, results, strict=True)
    parent = next((result for model, result in pairs if model["name"] == PARENT), None)
    rows = []
    for key, bits in (("acc", "right"), ("acc_norm", "right_norm")):
        rows.append(Row(group, f"{key}, %", tuple(_with_error(result, key, 100, 1) for result in results)))
        less = []
        for result in results:
            if not result or not parent or result is parent:
                less.append("")
                continue
            mean, error = paired_difference(result[bits], parent[bits])
            less.append(f"{100 * mean:+.1f}{'' if error is None else f' ± {100 * error:.1f}'}")
        if any(less):
            rows.append(Row(group, "  less the parent's", tuple(less)))
    return rows


def _harness_rows(results: Results) -> list[Row]:
    names = dict.fromkeys(name for result in results if result for name in result["tasks"])
    rows = []
    for name in names:
        own = [(result or {"tasks": {}})["tasks"].get(name) for result in results]
        questions = next((one["questions"] for one in own if one and one.get("questions")), None)
        group = f"{name} (lm-eval)" + ("" if questions is None else f", {questions:,} questions")
        for key in ("acc", "acc_norm"):
            if any(one and one.get(key) is not None for one in own):
                rows.append(Row(group, f"{key}, %", tuple(_with_error(one, key, 100, 1) for one in own)))
    return rows


def _samples(names: Sequence[str], results: Results) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
    prompts: dict[str, list[tuple[str, str]]] = {}
    for name, result in zip(names, results, strict=True):
        for sample in (result or {"samples": []})["samples"]:
            prompts.setdefault(sample["prompt"], []).append((name, sample["text"]))
    return [(prompt, tuple(texts)) for prompt, texts in prompts.items()]


def _with_error(result: dict[str, Any] | None, key: str, scale: float, digits: int) -> str:
    if not result or result.get(key) is None:
        return NOTHING
    error = result.get(f"{key}_se")
    return f"{scale * result[key]:.{digits}f}" + ("" if error is None else f" ± {scale * error:.{digits}f}")


# As text


def render(table: EvalTable) -> RenderableType:
    """On a terminal, with the samples below."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title="Evaluation, ± one standard error", title_justify="left")
    drawn.add_column("")
    for name in table.models:
        drawn.add_column(Text(name), justify="right")
    group = ""
    for row in table.rows:
        if row.group != group:
            drawn.add_section()
            drawn.add_row(Text(row.group, style="bold"))
            group = row.group
        drawn.add_row(Text(f"  {row.metric}" if row.group else row.metric), *map(Text, row.cells))
    lines = []
    for prompt, texts in table.samples:
        lines.append(Text(prompt, style="italic"))
        lines += [Text.assemble((f"  {name}: ", "bold"), " ".join(text.split())) for name, text in texts]
    return Group(drawn, *lines)


def markdown(table: EvalTable) -> str:
    """For documents: the table alone."""
    lines = [f"| | | {' | '.join(table.models)} |", f"|---|---|{'---:|' * len(table.models)}"]
    group = None
    for row in table.rows:
        lines.append(f"| {row.group if row.group != group else ''} | {row.metric} | {' | '.join(row.cells)} |")
        group = row.group
    return "\n".join(lines)


# Of a run


def of_run(directory: Path, search: str | None) -> dict[str, Any] | None:
    """The eval.json of a run without models that have changed since; None if there is none that is of its search.

    Raises CheckpointError if the file is damaged.
    """
    path = directory / NAME
    if not path.exists():
        return None
    content = EvalStore(path).read()
    if content["search"] != search:
        return None

    def is_current(model: dict[str, Any]) -> bool:
        place = directory / model["name"]
        if not (place / "config.json").is_file():
            return True
        try:
            return fingerprint(place) == model["fingerprint"]
        except (CheckpointError, OSError):
            return False

    content["models"] = [model for model in content["models"] if is_current(model)]
    return content if len(content["models"]) and content["results"] else None
