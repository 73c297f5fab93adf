"""The command line. Thin: every command parses its arguments and calls the library."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedhl import LAWS, WEIGHTINGS, __version__
from fedhl.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from fedhl.prepare import Watcher

app = typer.Typer(
    name="fedhl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Fine-tune a Hugging Face model with LoRA across clients that cannot share data "
        "and cannot afford the same rank.\n\n"
        "Typically:\n\n"
        "    fedhl check config.yaml        what will be trained, and what it costs\n\n"
        "    fedhl run config.yaml          train; Ctrl-C stops, `fedhl resume` goes on\n\n"
        "    fedhl export runs/NAME --rank 8 --out adapter     a PEFT adapter of any rank"
    ),
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting, e.g. --set training.steps=20 --set method=flexlora. Repeatable.",
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, e.g. runs/NAME.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and nothing else.")]
Ray = Annotated[
    int | None,
    typer.Option(
        "--ray",
        metavar="N",
        min=1,
        help="Train the clients in N processes, by Flower on Ray (unless given, in this one).",
    ),
]
Round = Annotated[
    str,
    typer.Option("--round", help="Which checkpoint: best, last, or the number of a kept round."),
]


@contextmanager
def friendly(folder: Path | None = None, ray: int | None = None) -> Iterator[None]:
    """User errors become one message and exit code 2; Ctrl-C says how to go on, with 130."""
    from rich.console import Console

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's "stop" is a Ctrl-C
    console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
    try:
        yield
    except UserError as error:
        console.print("[bold red]error:[/] ", end="")
        console.print(str(error), markup=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        if folder is not None and (folder / "state").is_dir():
            done = max((int(p.name[6:]) for p in (folder / "state").glob("round-*")), default=0)
            console.print(
                f"\nstopped; {done} finished rounds are saved. Continue with: fedhl resume {folder}"
                + (f" --ray {ray}" if ray else ""),
                markup=False,
            )
        else:
            console.print("\nstopped")
        raise typer.Exit(130) from None


@contextmanager
def watching(quiet: bool) -> Iterator[Watcher]:
    """Progress bars on a terminal, plain lines elsewhere, nothing if quiet."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from fedhl.prepare import SILENT, Watcher

    if quiet:
        yield SILENT
        return
    console = Console(highlight=False, emoji=False)

    def say(line: str) -> None:
        style = "yellow" if line.startswith("warning") else None
        if console.is_terminal:
            console.print(line, style=style, markup=False)
        else:
            print(line, flush=True)

    handler = logging.StreamHandler()
    handler.emit = lambda record: say(record.getMessage())  # the library's own notices
    logger = logging.getLogger("fedhl")
    logger.setLevel(logging.INFO)
    with ExitStack() as stack:
        logger.addHandler(handler)
        stack.callback(logger.removeHandler, handler)
        if not console.is_terminal:
            yield Watcher(say=say)
            return
        progress = stack.enter_context(
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
        )
        bar = progress.add_task("loading", total=None)

        def step(phase: str, done: int, total: int) -> None:
            progress.update(bar, description=phase, completed=done, total=total)

        yield Watcher(say=say, step=step)


def stdout() -> Console:
    """Where tables go: wide enough for a file or a pipe too."""
    from rich.console import Console

    console = Console(highlight=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, emoji=False, width=120)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show:
        print(f"fedhl {__version__}")
        raise typer.Exit


@app.command()
def check(config: ConfigFile, set: Overrides = None) -> None:
    """Show what a config amounts to, before anything is trained.

    Reads the data and loads the model, so that every mistake shows now: the clients and their rows,
    the parameters trained at each rank, the bytes per client and round, the memory needed.
    """
    with friendly(), watching(quiet=False) as watcher:
        from fedhl import check as examine
        from fedhl.config import load_config
        from fedhl.prepare import prepare

        prepared = prepare(load_config(config, set or ()), watcher)
        tables = (examine.clients_table, examine.ranks_table, examine.memory_table)
        lines, made = list(examine.overview(prepared)), [table(prepared) for table in tables]
        console = stdout()
        for line in lines:
            console.print(line, markup=False)
        for table in made:
            console.print(table)
        console.print(f"nothing was trained; to train: fedhl run {config}", markup=False)


@app.command()
def run(
    config: ConfigFile,
    set: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="The run folder (runs/NAME unless given)."),
    ] = None,
    ray: Ray = None,
    quiet: Quiet = False,
) -> None:
    """Train as a config says, into a new run folder.

    Every finished round is saved: after Ctrl-C or a crash, `fedhl resume RUN` goes on to the same
    result. The folder holds the resolved config, metrics.jsonl, summary.json and report.html.
    """
    with friendly():
        from fedhl.config import load_config

        settings = load_config(config, set or ())
    folder = out or Path("runs") / settings.name
    with friendly(folder, ray), watching(quiet) as watcher:
        from fedhl.run import refuse_taken, start_run

        if ray is None:
            start_run(settings, folder, watcher)
        else:
            refuse_taken(folder)
            flower("simulation").simulate(settings, folder, watcher, ray)
    finished(folder, quiet)


@app.command()
def serve(
    config: ConfigFile,
    superlink: Annotated[
        str,
        typer.Argument(metavar="SUPERLINK", help="Its name in Flower's $FLWR_HOME/config.toml."),
    ],
    set: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="The run folder on the SuperLink's machine (runs/NAME here unless given).",
        ),
    ] = None,
) -> None:
    """Train with clients on other machines, through a Flower SuperLink.

    The SuperLink is up, and each client's machine runs `flower-supernode --node-config 'client="ID"
    data="rows.jsonl"'`; docs/deployment.md says how, with TLS and keys. The same command goes on with
    a run that was stopped.
    """
    with friendly():
        from fedhl.config import load_config

        settings = load_config(config, set or ())
        folder = out or Path("runs") / settings.name
        flower("submit").submit(settings, folder, superlink)


def flower(module: str) -> Any:
    """A part of fedhl that needs Flower. Raises UserError if it is not installed."""
    try:
        return import_module(f"fedhl.flower.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("flwr", "ray"):
            raise
        raise UserError(f"{error.name} is not installed: pip install 'fedhl[flower]'") from None


@app.command()
def resume(run: RunFolder, ray: Ray = None, quiet: Quiet = False) -> None:
    """Go on with a run that was stopped, to the same result as if it had never been."""
    with friendly(run, ray), watching(quiet) as watcher:
        from fedhl.folder import load_run_config
        from fedhl.run import resume_run

        if ray is None:
            resume_run(run, watcher)
        else:
            flower("simulation").simulate(load_run_config(run), run, watcher, ray)
    finished(run, quiet)


@app.command()
def compare(
    config: ConfigFile,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="A,B,...",
            help="Each NAME or NAME@KEY=VALUE, e.g. fedhl,fedit@lora.ranks=8,hetlora@method.gamma=1.",
        ),
    ],
    seeds: Annotated[
        str,
        typer.Option(
            "--seeds",
            metavar="N,N,...",
            help="Each draws clients, cohorts, batches, the initial adapter and the held-out rows.",
        ),
    ] = "0,1,2",
    set: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="A folder for all (runs/compare-NAME unless given)."
        ),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            "--rates",
            metavar="X,X,...",
            help="Choose each method's learning rate among these, on rows that are not reported.",
        ),
    ] = None,
    weighting: Annotated[
        str | None,
        typer.Option(
            "--weighting",
            metavar="NAME",
            help="One weighting for all; unless given, the config's, else that of each method's paper.",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run several methods with several seeds, and report means, intervals, bytes and seconds.

    Runs what is missing, resumes what was stopped and leaves what is finished, so the same command
    goes on after Ctrl-C. Rows, batches, initial adapter and client steps are the same for all.
    """
    with friendly():
        from fedhl.compare import compare as run_all
        from fedhl.compare import parse_numbers, parse_variants
        from fedhl.config import load_config
        from fedhl.report.compare import comparison_tables, read_comparison

        base = load_config(
            config, [*([f"weighting={weighting}"] if weighting else []), *(set or ())]
        )
        folder = out or Path("runs") / f"compare-{base.name}"
        variants, numbers = parse_variants(methods), parse_numbers("--seeds", seeds, int)
        grid = parse_numbers("--rates", rates, float) if rates else []
        stopped = False
        try:
            with watching(quiet) as watcher:
                run_all(base, variants, numbers, folder, watcher, grid)
        except KeyboardInterrupt:
            if not (folder / "comparison.json").is_file():
                raise
            stopped = True
        if not quiet:
            stdout().print(*comparison_tables(folder), sep="\n")
            stdout().print(f"report: {folder / 'comparison.html'}", markup=False)
        if stopped:
            done, planned = read_comparison(folder).finished
            print(
                f"\nstopped; {done} of {planned} runs are finished, and the finished rounds of this one "
                "are saved. Continue with the same command.",
                file=sys.stderr,
            )
            raise typer.Exit(130)


def finished(run: Path, quiet: bool) -> None:
    """The last words of a run: its numbers, its report, and what to do next."""
    if quiet:
        return
    from fedhl.report import final_table

    console = stdout()
    console.print(final_table(run))
    console.print(f"report: {run / 'report.html'}", markup=False)
    console.print(
        f"a PEFT adapter of rank 8: fedhl export {run} --rank 8 --out {run.name}-rank8",
        markup=False,
    )


@app.command()
def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="A method or a weighting: all there is to say of it."
        ),
    ] = None,
) -> None:
    """List the aggregation methods and the weightings: laws, traffic, cost and hyperparameters."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from fedhl import catalogue

    def show(title: str, rows: Sequence[dict[str, str]]) -> None:
        headers = (column.replace(" ", "\n") for column in rows[0])
        table = Table(*headers, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            table.add_row(*map(Text, row.values()))
        console.print(table)

    with friendly():
        console = stdout()
        try:
            if name is not None:
                console.print(catalogue.describe(name), markup=False)
                return
            found = catalogue.rows()
        except ValueError as error:
            raise UserError(str(error)) from None
        for title, columns in catalogue.SHEETS.items():
            show(title, [{column: row.facts[column] for column in columns} for row in found])
            console.print(catalogue.NOTES[title], markup=False)
        for law, meaning in LAWS.items():
            console.print(f"{law}: {meaning}", markup=False)
        show("Weightings", [catalogue.weighting(name) for name in WEIGHTINGS])
        console.print(
            "more on one: fedhl methods NAME; your own: method: package.module:Class, see "
            "docs/adding-a-method.md",
            markup=False,
        )


@app.command()
def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER...", help="PEFT LoRA folders of any ranks and alphas."),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the merged adapter goes.")
    ],
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="W,W,...", help="One per adapter; equal unless given."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", help="Best approximation of this rank; the exact sum unless given."),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize/--no-normalize", help="Divide the weights by their sum.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Even if the base models differ.")] = False,
) -> None:
    """Merge PEFT adapters of any ranks and alphas: exactly `Σ w s B A`, the mean of the updates.

    Averaging the factors A and B instead would mix them up (B of one client times A of another).
    """
    with friendly():
        from fedhl.export import merge_folders

        result = merge_folders(
            adapters, parse_weights(weights), rank, out, normalize=normalize, force=force
        )
        ranks = sorted(set(result.ranks.values()))
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        console = stdout()
        for folder, weight in zip(adapters, result.weights, strict=True):
            console.print(f"{weight:.4f}  {folder}", markup=False)
        console.print(
            f"merged {len(result.ranks)} layers at rank {shown} into {out}; truncation lost "
            f"{100 * result.error:.3g}% of the squared norm",
            markup=False,
        )
        worst = max(result.errors, key=lambda name: result.errors[name])
        if result.errors[worst] > 0:
            console.print(f"most in {worst}: {100 * result.errors[worst]:.3g}%", markup=False)


def parse_weights(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--weights {text!r}: expected numbers with commas, e.g. 0.5,0.3,0.2"
        ) from None


def parse_round(text: str) -> Any:
    """best, last, or a round's number."""
    if text in ("best", "last"):
        return text
    if text.isdecimal():
        return int(text)
    raise UserError(f"--round {text!r}: expected best, last or the number of a kept round")


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
    rank: Annotated[int | None, typer.Option("--rank", help="A PEFT adapter of this rank.")] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="The whole model with the full-rank update merged in.")
    ] = False,
    round: Round = "last",
) -> None:
    """Write what a run learned: a PEFT adapter of any rank, or the merged model, with a model card."""
    with friendly(), watching(quiet=False) as watcher:
        from fedhl.deliver import export_run

        if (rank is None) != merged:
            raise UserError(
                "give either --rank R, for an adapter, or --merged, for the whole model"
            )
        lines = export_run(run, out, rank, parse_round(round), watcher)
        for line in lines:
            watcher.say(line)


@app.command(name="eval")
def evaluate(
    run: RunFolder,
    round: Round = "last",
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SOURCE", help="Other rows than the run's held-out ones."),
    ] = None,
) -> None:
    """Evaluate a run again: the full-rank update, and its truncation to every deployed rank."""
    with friendly(), watching(quiet=False) as watcher:
        from fedhl.deliver import evaluate_run

        table = evaluate_run(run, parse_round(round), data, watcher)
        stdout().print(table)


@app.command()
def report(run: RunFolder) -> None:
    """Write report.html of a run anew, finished or not, and print its final numbers."""
    with friendly():
        from fedhl.report import final_table, write_report

        path = write_report(run)
        stdout().print(final_table(run))
        stdout().print(f"report: {path}", markup=False)


bench = typer.Typer(
    no_args_is_help=True, help="Time fedhl on this machine, and check what is timed."
)
app.add_typer(bench, name="bench")


@bench.command(name="server")
def bench_server(
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the figures here, too, part by part."),
    ] = None,
    parts: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="layer: one 4096 x 4096 layer against its bare product, a full SVD and the literal "
            "algorithm. accuracy: truncation against the optimum. growth: time against clients, ranks "
            "and size. ceilings: the layers of Llama-2-7B against their bare products and copies. model: a "
            "round of SmolLM2-135M. disk: Llama-2-7B's q and v, from disk (25 GB there).",
        ),
    ] = "layer,accuracy,growth,ceilings,model,disk",
    repeats: Annotated[int, typer.Option(min=1, help="Medians are of so many.")] = 5,
    device: Annotated[
        str, typer.Option(help="cpu or cuda; of layer, growth and ceilings.")
    ] = "cpu",
    clients: Annotated[
        list[int] | None,
        typer.Option(
            min=1, metavar="K", help="How many clients ceilings has (100 unless given). Repeatable."
        ),
    ] = None,
    side: Annotated[
        int | None,
        typer.Option(
            min=64, metavar="N", help="Of ceilings: other square matrices than 4096 x 4096."
        ),
    ] = None,
    run: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN", help="Check accuracy on the layers of this run, too. Repeatable."
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where `disk` keeps its files while it runs.")
    ] = None,
) -> None:
    """Time a round of the server, with correctness checked in the same run.

    Takes about 25 minutes on two cores and 16 GB of memory; nothing else should run beside it.
    """
    with friendly():
        from fedhl.bench import PARTS
        from fedhl.bench import bench_server as measure
        from fedhl.checkpoint import stored
        from fedhl.model import device_named

        device_named(device)
        if device not in ("cpu", "cuda"):  # what the clock knows to wait for
            raise UserError(f"--device: expected cpu or cuda, got {device!r}")
        chosen = [part.strip() for part in parts.split(",")]
        if unknown := [part for part in chosen if part not in PARTS]:
            raise UserError(f"--parts: there is no {unknown[0]!r}, only {', '.join(PARTS)}")
        for each in run or []:
            if not stored(each / "state"):
                raise UserError(f"--run: {each} has no finished round")
        if folder is not None and not folder.is_dir():
            raise UserError(f"--folder: {folder} is not a folder")
        say, cohorts = partial(print, flush=True), clients or [100]
        measure(chosen, repeats, device, run or [], folder, json, say, cohorts, side)


def main() -> None:
    """Entry point of the `fedhl` command."""
    app()


if __name__ == "__main__":
    sys.exit(main())
