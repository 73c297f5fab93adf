"""What all commands share: the app, common options, completions, messages for mistakes, progress."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from fedhl import __version__
from fedhl.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from fedhl.watch import Watcher

Number = TypeVar("Number", int, float)

app = typer.Typer(
    name="fedhl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Fine-tune a Hugging Face model with LoRA across clients that cannot share their data "
        "and cannot all afford the same rank.\n\n"
        "Typically:\n\n"
        "    fedhl check config.yaml        show what will be trained, and what it costs\n\n"
        "    fedhl run config.yaml          train; Ctrl-C stops, `fedhl resume` continues\n\n"
        "    fedhl export runs/NAME --rank 8 --out adapter     write a PEFT adapter of any rank"
    ),
)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show:
        print(f"fedhl {__version__}")
        raise typer.Exit


# --- completions --------------------------------------------------------------------------------


def run_folders(incomplete: str) -> list[str]:
    """The run folders in runs/; for another place the shell completes file names."""
    return sorted(str(file.parent) for file in Path("runs").glob("*/config.yaml"))


def method_names(incomplete: str) -> list[str]:
    from fedhl.methods import METHODS

    return list(METHODS)


def variant_names(incomplete: str) -> list[str]:
    """A list of methods and baselines with one more at its end."""
    from fedhl.compare.variants import SETTINGS

    before, comma, _ = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in (*method_names(""), *SETTINGS)]


def weighting_names(incomplete: str) -> list[str]:
    from fedhl.weightings import WEIGHTINGS

    return list(WEIGHTINGS)


# --- options that several commands have ---------------------------------------------------------

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file; configs/ has examples.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting, e.g. --set training.steps=20 --set method=flexlora. Repeatable.",
    ),
]
Places = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=PATH",
        help="Where model or data are now, if not where they were, e.g. --set data.source=rows.jsonl. "
        "Repeatable.",
    ),
]
RunFolder = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run folder, e.g. runs/NAME.", autocompletion=run_folders),
]
NewRunFolder = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="The new run folder. Default: runs/NAME."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Ray = Annotated[
    int | None,
    typer.Option(
        "--ray",
        metavar="N",
        min=1,
        help="Train the clients in N processes, by Flower on Ray. Default: in this process.",
    ),
]
Round = Annotated[
    str,
    typer.Option("--round", help="The checkpoint: best, last, or the number of a kept round."),
]


class Configured(TyperCommand):
    """A command that has a config. An option of the name of a setting gets the hint of `--set`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if type(error).__name__ != "NoSuchOption":  # of click, which is not ours to import
                raise
            from fedhl.config.text import places

            option: str = getattr(error, "option_name", "")
            found = places(option.lstrip("-"))
            if not found:
                raise
            values = [b for a, b in pairwise(given) if a == option and not b.startswith("-")]
            values += [text for text in given if text.startswith(f"{option}=")]
            value = values[0].removeprefix(f"{option}=") if values else "VALUE"
            ways = " or ".join(f"--set {path}={value}" for path in found)
            with friendly():
                raise UserError(
                    f"{self.name} has no option {option}; a setting of the config is changed by {ways}"
                ) from None


# --- what a command prints ----------------------------------------------------------------------


@contextmanager
def friendly(folder: Path | None = None, ray: int | None = None) -> Iterator[None]:
    """A user error becomes one message and exit code 2; Ctrl-C says how to continue, with exit code 130."""
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
            from fedhl.record import rounds_in

            done = max(rounds_in(folder / "state"), default=0)
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

    from fedhl.watch import SILENT, Watcher

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
    with ExitStack() as stack:
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.INFO)
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
    """Where tables go: wide enough also for a file or a pipe."""
    from rich.console import Console

    console = Console(highlight=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, emoji=False, width=120)


def say(line: str) -> None:
    """Print a sentence. Only a terminal gets it wrapped: whoever reads a file or a pipe looks for whole
    lines, and paths would be torn apart."""
    console = stdout()
    console.print(line, markup=False, soft_wrap=not console.is_terminal)


def parse_numbers(
    option: str, text: str, kind: Callable[[str], Number], example: str
) -> list[Number]:
    """Finite numbers between commas. Raises UserError, naming the option and showing the example."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"{option} {text!r}: expected numbers separated by commas, e.g. {example}"
        ) from None
    if not all(abs(number) < math.inf for number in numbers):
        raise UserError(f"{option} {text!r}: expected finite numbers, e.g. {example}")
    return numbers
