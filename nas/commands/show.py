"""`nas show`."""

from __future__ import annotations

from nas.commands.options import DEFAULT_RUN, JsonOption, RunOption, emit, open_run_and_parent

EXAMPLES = """Examples:

nas show

nas show --run runs/8b --json"""


def show(run: RunOption = DEFAULT_RUN, as_json: JsonOption = False) -> None:
    """Print a run: candidates, scores, architecture map, budget, results, and where everything lies."""
    from nas.commands.import_ import show_import
    from nas.commands.search import show_search
    from nas.eval_table import of_run
    from nas.importing import read_import
    from nas.table_search import read_table_run

    if (found := read_table_run(run)) is not None:  # of a score table alone: there is no parent to open
        return emit({"run": str(run), "architecture": found}, True) if as_json else show_search(found, run, False)
    if (imported := read_import(run)) is not None:
        return show_import(imported, run, as_json)
    opened_run, parent = open_run_and_parent(run)
    if as_json:
        made = {"scores": "score.json", "architecture": "architecture.json", "results": "results.json"}
        content = {name: opened_run.read(file, "score") for name, file in made.items() if opened_run.has(file)}
        if content.get("results", {}).get("search") != content.get("architecture", {}).get("key"):
            content.pop("results", None)  # of an earlier search: not this child's
        if (measured := of_run(run, content.get("architecture", {}).get("key"))) is not None:
            content["eval"] = measured
        return emit({"run": str(run), "parent": opened_run.config.parent} | content, as_json)
    from rich.console import Console

    from nas.show import render_run

    render_run(opened_run, parent.shape, Console())
