"""`nas show`: a run on the terminal: score table, architecture map, budget, results."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from blocks.errors import ConfigError
from blocks.shape import ModelShape
from blocks.spec import Architecture, AttentionSpec, FFNSpec
from nas.eval_table import eval_table, of_run, render
from nas.format_words import UNIFORM, baseline_name, bits_text, by_structure, costs_of, formats_told
from nas.limits import UNITS, cost_field, in_words
from nas.run import Run
from nas.table import load_table
from nas.table_fp8 import fp8_lines

# Share of the parent's cost kept, from nothing to all: background colours that read on light and dark terminals.
SHADES = ((0.001, "grey37"), (0.34, "dark_orange3"), (0.67, "gold3"), (0.999, "chartreuse4"), (1e9, "dark_green"))


def render_run(run: Run, shape: ModelShape, console: Console) -> None:
    """Prints what the run holds so far."""
    console.print(
        f"[bold]{run.directory}[/bold]  parent {run.config.parent} ({run.fingerprint}), text {run.config.data.source}, space {run.config.space}"
    )
    if run.has("scores.csv"):
        console.print(scores_summary(run))
    if run.has("architecture.json"):
        found = run.read("architecture.json", "search")
        costs = costs_of({**found, "shape": asdict(shape)})
        architecture = Architecture.load(run.path("architecture.json"))
        console.print(architecture_map(architecture, costs, console.width, shape))
        console.print(limit_lines(found))
        healed = run.read("results.json", "distill") if run.has("results.json") else {}
        # Results of an earlier search stay until the new child is healed; they are not this child's.
        console.print(results(healed) if healed.get("search") == found["key"] else search_table(found))
        if (measured := of_run(run.directory, found["key"])) is not None:
            console.print(render(eval_table(measured)))
    console.print(paths(run))


def scores_summary(run: Run) -> RenderableType:
    """Candidates with their median score over the layers, how sure it is, and the largest one."""
    made = run.read("score.json", "score")
    table = Table(title="Scores: KL to the parent with one layer replaced, nats per token", title_justify="left")
    for name in ("candidate", "layers", "median", "+-", "largest", "at layer", "exact"):
        table.add_column(name, justify="left" if name == "candidate" else "right")
    by_spec: dict[str, list[Any]] = {}
    for rows in load_table(run.path("scores.csv")):
        for row in rows:
            if row.source != "parent":
                by_spec.setdefault(str(row.spec), []).append(row)
    for spec, rows in by_spec.items():
        worst = max(rows, key=lambda row: row.score)
        middle = statistics.median(row.score for row in rows)
        exact = sum(row.source == "exact" for row in rows)
        widths = [(high - low) / 2 for row in rows if (low := row.score_low) is not None and (high := row.score_high)]
        unsure = f"{statistics.median(widths):.4f}" if widths else "-"
        label = spec.removeprefix("attention:").replace("ffn:", "")
        table.add_row(
            label, str(len(rows)), f"{middle:.4f}", unsure, f"{worst.score:.4f}", str(worst.layer), str(exact)
        )
    about = "+-: median half-width of the 95 % intervals over sequences (-: fewer than four were scored)"
    return Group(table, Text(f"{about}\n{correlation_line(made)}"))


def correlation_line(made: dict[str, Any]) -> str:
    """How the one-pass scores compare with the exact ones, in words."""
    correlation = made["rank_correlation"]
    if correlation["spearman"] is None:
        return f"{made['candidates']} candidates, {made['exact']} of them scored exactly"
    return (
        f"{made['candidates']} candidates, {made['exact']} of them scored exactly; "
        f"rank correlation of one-pass with exact on {correlation['candidates']}: {correlation['spearman']:.3f}"
    )


class Keeps(Protocol):
    """What knows the share of the parent's bytes that a candidate keeps: a `CostModel`, or a table from elsewhere."""

    def kept(self, spec: AttentionSpec | FFNSpec) -> float: ...


@dataclass(frozen=True)
class _Kept:
    """Shares as a search on a table alone wrote them, by the candidates' names."""

    shares: dict[str, float]

    def kept(self, spec: AttentionSpec | FFNSpec) -> float:
        return by_structure(self.shares)[str(spec)]


def architecture_map(
    architecture: Architecture, costs: Keeps, width: int, shape: ModelShape | None = None
) -> RenderableType:
    """One column a layer, two rows (attention, FFN), coloured by the share of the parent's bytes that the structure keeps.

    Where any number format but bf16 is used, a third row has a mark for each attention and each FFN. `width` is that of the
    terminal in characters; what does not fit goes on below. `shape` tells how many bits scales take.
    """
    lines: list[RenderableType] = []
    formats = _formats(architecture, shape)
    marks = dict(zip((format["name"] for format in formats), _marks(formats), strict=True))
    columns = max(1, (width - 10) // 5)
    for start in range(0, len(architecture), columns):
        part = range(start, min(start + columns, len(architecture)))
        header, attention, ffn, inside = (Text(f"{name:<10}") for name in ("layer", "attention", "ffn", "in formats"))
        for index in part:
            spec = architecture[index]
            header.append(f"{index:>4} ", style="dim")
            attention.append(*_cell(_attention_label(spec.attention), costs.kept(spec.attention.structure)))
            ffn.append(*_cell(_ffn_label(spec.ffn), costs.kept(spec.ffn.structure)))
            inside.append(" ").append(*_mark(spec.attention, marks)).append(" ").append(*_mark(spec.ffn, marks)).append(
                " "
            )
        lines += [header, attention, ffn, *([inside] if formats else [])]
    legend = Text("attention: KV heads, ffn: channels, lin: one matrix, -: skipped; share kept: ")
    for (_, colour), label in zip(SHADES, ("none", "to 1/3", "to 2/3", "below all", "all"), strict=True):
        legend.append(f" {label} ", style=f"white on {colour}")
        legend.append(" ")
    return Group(*lines, legend, *([_format_legend(formats, marks)] if formats else []))


MARKS = {"bf16": "b", "fp8": "8", "int8": "i", "nvfp4": "n", "nvfp4a16": "w", "int4": "4", "int4-g32": "g"}
FORMAT_COLOURS = {"bf16": "grey50", "fp8": "dodger_blue1", "int8": "default", "nvfp4": "green", "nvfp4a16": "gold3", "int4": "medium_purple", "int4-g32": "magenta"}  # fmt: skip


def _formats(architecture: Architecture, shape: ModelShape | None) -> list[dict[str, Any]]:
    try:
        return formats_told(architecture.to_list(), shape)
    except ConfigError:  # of a table from elsewhere: a format that cannot hold what it is said to
        return formats_told(architecture.to_list())


def _marks(formats: list[dict[str, Any]]) -> list[str]:
    """A letter of each; capitals for those not known here."""
    unknown = (chr(ord("A") + place) for place in range(26))
    return [MARKS.get(format["name"]) or next(unknown, "?") for format in formats]


def _mark(spec: AttentionSpec | FFNSpec, marks: dict[str, str]) -> tuple[str, str]:
    if spec.kind == "skip":
        return "-", "dim"
    return marks.get(spec.precision, ""), f"bold {FORMAT_COLOURS.get(spec.precision, 'default')}"


def _format_legend(formats: list[dict[str, Any]], marks: dict[str, str]) -> Text:
    legend = Text("in formats: attention, ffn; ")
    for place, format in enumerate(formats):
        legend.append("; " if place else "")
        count = format["subblocks"]
        legend.append(marks[format["name"]], style=f"bold {FORMAT_COLOURS.get(format['name'], 'default')}")
        legend.append(f" {format['name']} ({bits_text(format['bits'])}, {count} subblock{'' if count == 1 else 's'})")
    return legend


def _attention_label(spec: AttentionSpec) -> str:
    return {"kv": f"kv{spec.kv_heads}", "linear": "lin", "skip": "-"}[spec.kind]


def _ffn_label(spec: FFNSpec) -> str:
    label = f"{spec.width}" if spec.width < 10_000 else f"{spec.width / 1000:.0f}k"
    return {"width": label, "linear": "lin", "skip": "-"}[spec.kind]


def _cell(label: str, share: float) -> tuple[str, str]:
    colour = next(colour for bound, colour in SHADES if share <= bound)
    return f"{label:^5}", f"white on {colour}"


def search_lines(found: dict[str, Any], width: int) -> RenderableType:
    """A search on the terminal: the map, the limits and how it ended, the table."""
    parts: list[RenderableType] = []
    if "shape" in found:
        costs = costs_of(found)
        parts.append(architecture_map(Architecture.from_list(found["layers"]), costs, width, costs.shape))
    elif all(name.startswith("attention:") and "+ffn:" in name for name in found["layers"]) and "kept" in found:
        parts.append(architecture_map(Architecture.from_list(found["layers"]), _Kept(found["kept"]), width))
    else:
        parts.append(Text("\n".join(_runs(found))))
    parts.append(limit_lines(found))
    parts += [Text(line) for line in fp8_lines(found)]
    if "table" in found and (same := found["baselines"].get("uniform")):
        parts.append(Text(f"{'uniform':<11}the same in every layer within the limits: {same['predicted_kl']:.4f}"))
    if "heldout" in found:
        parts.append(search_table(found))
    if "members" in found:
        parts.append(family_table(found))
    return Group(*parts)


def _runs(found: dict[str, Any]) -> list[str]:
    """Choices from a table alone: groups that follow one another and choose the same, in one line."""
    lines: list[str] = []
    groups = sorted(zip(found["groups"], found["layers"], strict=True), key=lambda pair: pair[0][1] == "ffn")
    for (subblock, name), run in itertools.groupby(groups, key=lambda pair: (pair[0][1], pair[1])):
        layers = [layer for (layer, _), _ in run]
        span = layers[0] if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        lines.append(f"{subblock if subblock != 'layer' else '':<10}{span:>9}  {name}")
    return lines


def limit_lines(found: dict[str, Any]) -> RenderableType:
    """Every limit with what the child takes of it, the formula with its numbers, and how the search ended."""
    cost, optimum = found["cost"], found["optimum"]
    clock = found.get("clock") or {"name": "the table", "estimate": False}
    estimate = " (estimate)" if clock["estimate"] else ""
    lines = []
    for name, limit in found["limits"].items():
        total, parent = cost[cost_field(name)], found["parent_cost"][cost_field(name)]
        share = f"{total / parent:.1%}" if parent else "all"  # of nothing: a table from elsewhere may say 0
        ends = [f"at least {in_words(name, limit['low'])}"] if limit["low"] is not None else []
        ends += [f"at most {in_words(name, limit['high'])}"] if limit["high"] is not None else []
        price = optimum["prices"].get(name, 0.0)
        binds = f"; binds: {_price(name, price)}" if name in optimum["binding"] else ""
        about = estimate if limit["unit"] == "ns" else ""
        lines.append(
            f"{name:<11}{' and '.join(ends)}; child {in_words(name, total)}{about}, {share} of the parent's {in_words(name, parent)}{binds}"
        )
    lines.append(f"{'child':<11}{found['formula']}")
    if cost.get("tokens_per_s"):
        faster = cost["tokens_per_s"] / found["parent_cost"]["tokens_per_s"]
        steps = (
            f"first token {cost['prefill_ms']:.1f} ms, then {cost['decode_ms']:.2f} ms a token, "
            if cost["decode_ms"]
            else ""
        )
        lines.append(
            f"{'speed':<11}{steps}{cost['tokens_per_s']:,.0f} tokens/s, {faster:.2f} times the parent's, by {clock['name']}{estimate}"
        )
    lines.append(
        f"{'search':<11}additive optimum {optimum['score']:.4f}, proven bound {optimum['bound']:.4f}, gap {optimum['gap']:.2g}"
    )
    if found.get("kl") is not None:
        error = f" +- {found['kl_se']:.4f}" if found.get("kl_se") is not None else ""
        lines.append(
            f"{'':<11}child from {found['origin']}: predicted {found['predicted_kl']:.4f}, true KL {found['kl']:.4f}{error} on calibration text, "
            f"best of {len(found['trials'])} measured"
        )
    lines += _format_lines(found)
    lines += [f"warning    {warning}" for warning in found.get("warnings", [])]
    return Text("\n".join(lines))


def _format_lines(found: dict[str, Any]) -> list[str]:
    """The dtype of the KV cache where it was searched, and the baselines in one number format, a line each."""
    given = found["scenario"]["kv_dtype"]
    chosen = found.get("kv_dtype") or given
    lines = [f"{'KV cache':<11}in {chosen}"] if chosen != given or chosen == "float8" else []
    for kind, baseline in (found.get("baselines") or {}).items():
        if kind in UNIFORM:
            size, error = baseline["cost"]["total_bytes"], baseline.get("kl_se")
            over = found.get("budget_bytes") is not None and size > found["budget_bytes"]
            told = "not measured" if baseline.get("kl") is None else f"true KL {baseline['kl']:.4f}"
            told += "" if error is None else f" +- {error:.4f}"
            name = baseline_name(kind, baseline["layers"])
            lines.append(
                f"{'baseline':<11}{name}: {in_words('memory', size)}{', over the budget' if over else ''}, {told}"
            )
    return lines


def _price(name: str, price: float) -> str:
    """A shadow price for people: nats that a little more would save."""
    unit, factor = {"bytes": ("GB", 1e9), "ns": ("ms", 1e6)}.get(UNITS[name], ("million", 1e6))
    return f"one {unit} more would save {price * factor:.3g} nats"


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def family_table(family: dict[str, Any]) -> Table:
    """The members of a family: budget, size, KL before healing."""
    table = Table(title="Children before healing", title_justify="left")
    for name in ("budget", "GB", "parameters", "predicted KL", "true KL", "held-out KL", "from", "where"):
        table.add_column(name, justify="left" if name in ("from", "where") else "right")
    for row in family["members"]:
        numbers = (f"{row['share']:g}", _digits(row["gb"]), f"{row['parameters'] or 0:,}", _digits(row["predicted_kl"]))
        measured = (_digits(row.get("kl")), _digits(row.get("heldout_kl")), row.get("origin", "-"))
        table.add_row(*numbers, *measured, row["directory"])
    return table


def search_table(found: dict[str, Any]) -> RenderableType:
    """Parent, uniform baseline and child on held-out text."""
    heldout = found["heldout"]
    rows = [{"name": "parent", **_size(found["parent_cost"]), "kl": 0.0, **heldout["parent"]}]
    if found["uniform_cost"] is not None:
        rows.append({"name": "uniform baseline", **_size(found["uniform_cost"]), **heldout["uniform"]})
    rows.append({"name": "child before healing", **_size(found["cost"]), **heldout["child"]})
    return results_table(rows, heldout["tokens"])


def _size(cost: dict[str, Any]) -> dict[str, Any]:
    return {"parameters": cost["parameters"], "gb": cost["gb"]}


def results_table(rows: list[dict[str, Any]], tokens: int) -> Table:
    """A table of models: parameters, GB, KL to the parent and perplexity."""
    table = Table(title=f"On {tokens:,} held-out tokens", title_justify="left")
    for name in ("model", "parameters", "GB", "KL to parent", "perplexity"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        table.add_row(
            row["name"], f"{row['parameters']:,}", f"{row['gb']:.4f}", f"{row['kl']:.4f}", f"{row['perplexity']:.2f}"
        )
    return table


def results(found: dict[str, Any]) -> RenderableType:
    """The final table and a sample of the healed child's text."""
    sample = found["sample"]
    return Group(
        results_table(found["rows"], found["heldout_tokens"]),
        Text.assemble(("healed child: ", "bold"), (sample["prompt"], "italic"), sample["text"]),
    )


def paths(run: Run) -> RenderableType:
    """What the run has made and where it lies."""
    made = {
        "scores.csv": "score table",
        "architecture.json": "architecture",
        "child": "child before healing",
        "uniform": "uniform baseline",
        "healed": "healed child",
        "distill/metrics.jsonl": "healing metrics",
        "results.json": "results",
        "eval.json": "evaluation",
        "report.html": "report",
    }
    lines = [f"{what:<22}{run.path(name)}" for name, what in made.items() if run.has(name)]
    return Text("\n".join(lines))
