"""The `nas` command: its name, its help, its commands (nas/commands/)."""

from __future__ import annotations

import typer

from nas.commands import bench, check, distill, eval, export, fuse, import_, report, score, search, show

app = typer.Typer(
    name="nas",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Turn a trained Llama into a smaller, faster child that fits a budget.

Three steps, each going on from the last one's run directory:

  [bold]nas score[/bold]                    build, fit and score the candidates of every layer
  [bold]nas search --budget-gb 80[/bold]    choose one per layer for a budget; assemble the child
  [bold]nas distill[/bold]                  heal the child by distilling from the parent

Then [bold]nas show[/bold] draws the run. Every command can be stopped and started again; what is done is not done twice.""",
)

for _module in (score, search, fuse, distill, export, check, eval, import_, bench, show, report):
    _name = _module.__name__.rpartition(".")[2]
    app.command(_name.rstrip("_"), epilog=_module.EXAMPLES)(getattr(_module, _name))
