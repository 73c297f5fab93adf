"""Commands to look things up: the methods and weightings; the speed of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fedhl.cli.app import friendly, method_names, say, stdout, weighting_names
from fedhl.errors import UserError

commands = typer.Typer()
PANEL = "Look up"


def known_names(incomplete: str) -> list[str]:
    return method_names("") + weighting_names("")


@commands.command(rich_help_panel=PANEL)
def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="A method or a weighting, to print all that is known about it.",
            autocompletion=known_names,
        ),
    ] = None,
) -> None:
    """List the aggregation methods and the weightings: their laws, traffic, cost and hyperparameters."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from fedhl.methods import METHODS
    from fedhl.names import unknown
    from fedhl.weightings import WEIGHTINGS

    def show(title: str, rows: Sequence[dict[str, str]]) -> None:
        headers = (column.replace(" ", "\n") for column in rows[0])
        table = Table(*headers, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            table.add_row(*map(Text, row.values()))
        console.print(table)

    with friendly():
        known = [*METHODS, *WEIGHTINGS]
        if name is not None and name not in known:
            raise UserError(unknown("method or weighting", name, known))
        from fedhl.method import LAWS
        from fedhl.methods import catalogue

        console = stdout()
        if name is not None:
            console.print(catalogue.describe(name), markup=False)
            return
        found = catalogue.rows()
        for title, columns in catalogue.SHEETS.items():
            show(title, [{column: row.facts[column] for column in columns} for row in found])
            say(catalogue.NOTES[title])
        for law, meaning in LAWS.items():
            say(f"{law}: {meaning}")
        show("Weightings", [catalogue.weighting(name) for name in WEIGHTINGS])
        say(
            "more on one: fedhl methods NAME; your own: method: package.module:Class, see "
            "docs/adding-a-method.md"
        )


bench = typer.Typer(
    no_args_is_help=True, help="Time fedhl on this machine, and check the results that are timed."
)
commands.add_typer(bench, name="bench", rich_help_panel=PANEL)


@bench.command(name="server")
def bench_server(
    json: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Also write the figures to this file, part by part."
        ),
    ] = None,
    parts: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="layer: one layer of 4096 x 4096 against its bare product, a full SVD and the literal "
            "algorithm. remembering: such a layer with fedhl_ef, whose clients remember. accuracy: "
            "truncation against the optimum. growth: time against clients, ranks and size. ceilings: the "
            "layers of Llama-2-7B against their bare products and copies. model: a round of SmolLM2-135M. "
            "disk: q and v of Llama-2-7B, from disk (which takes 25 GB there).",
        ),
    ] = "layer,remembering,accuracy,growth,ceilings,model,disk",
    repeats: Annotated[
        int, typer.Option(min=1, help="The number of measurements behind each median.")
    ] = 5,
    device: Annotated[
        str,
        typer.Option(help="cpu or cuda, for the parts layer, remembering, growth and ceilings."),
    ] = "cpu",
    clients: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="K",
            help="The number of clients of `ceilings`, 100 by default. Repeatable.",
        ),
    ] = None,
    side: Annotated[
        int | None,
        typer.Option(
            min=64,
            metavar="N",
            help="For `ceilings`: a model with square matrices of N x N instead of 4096 x 4096.",
        ),
    ] = None,
    run: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN", help="Also check the accuracy on the layers of this run. Repeatable."
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="The folder in which `disk` keeps its files while it runs.")
    ] = None,
) -> None:
    """Time a round of the server, and check in the same run that its result is correct.

    This takes about 25 minutes on two cores with 16 GB of memory. Nothing else should run at the same time.
    """
    with friendly():
        from fedhl.record import rounds_in

        for each in run or []:
            if not rounds_in(each / "state"):
                raise UserError(f"--run: {each} has no finished round")
        if folder is not None and not folder.is_dir():
            raise UserError(f"--folder: {folder} is not a folder")
        from fedhl.bench.server import PARTS
        from fedhl.bench.server import bench_server as measure
        from fedhl.model.loading import device_named

        device_named(device)
        if device not in ("cpu", "cuda"):  # what the clock knows to wait for
            raise UserError(f"--device: expected cpu or cuda, got {device!r}")
        chosen = [part.strip() for part in parts.split(",")]
        if unknown := [part for part in chosen if part not in PARTS]:
            raise UserError(f"--parts: there is no {unknown[0]!r}, only {', '.join(PARTS)}")
        say, cohorts = partial(print, flush=True), clients or [100]
        measure(chosen, repeats, device, run or [], folder, json, say, cohorts, side)
