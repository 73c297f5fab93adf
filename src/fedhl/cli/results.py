"""Commands for what a run has learned: report, eval, export; and merge, for adapters from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fedhl.cli.app import Places, Round, RunFolder, friendly, parse_numbers, say, stdout, watching
from fedhl.errors import UserError

commands = typer.Typer()
PANEL = "Use the results"


@commands.command(rich_help_panel=PANEL)
def report(run: RunFolder) -> None:
    """Write report.html of a run again, whether the run is finished or not, and print its final numbers."""
    with friendly():
        from fedhl.report import final_table, write_report

        path = write_report(run)
        stdout().print(final_table(run))
        say(f"report: {path}")


@commands.command(rich_help_panel=PANEL)
def watch(run: RunFolder) -> None:
    """Follow a run that another process works on: its rounds as they come, and a report.html that a browser
    loads again by itself. Ctrl-C ends the watching, not the run."""
    with friendly(), watching(quiet=False) as watcher:
        from fedhl.run.folder import refuse_other

        refuse_other(run)
        from fedhl.run.follow import follow

        try:
            follow(run, watcher.say)
        except KeyboardInterrupt:
            watcher.say("no longer watching; the run is left as it is")


@commands.command(name="eval", rich_help_panel=PANEL)
def evaluate(
    run: RunFolder,
    round: Round = "last",
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="SOURCE", help="Other rows than those that the run has held out."
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            "--predictions",
            metavar="FILE",
            help="Write every held-out row with its prediction into a new .jsonl or .csv file.",
        ),
    ] = None,
    classes: Annotated[
        bool,
        typer.Option(
            "--classes",
            help="Show scores by class, confusions, and whether probabilities are right.",
        ),
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            metavar="N",
            min=1,
            help="Show what a language model writes after N held-out prompts.",
        ),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            "--new-tokens", metavar="N", min=1, help="The most tokens of a sample. Default: 64."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            metavar="R",
            help="The model of predictions, classes, samples and lm-eval: the update truncated to rank R. "
            "Default: the full-rank update.",
        ),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            metavar="TASKS",
            help="Hand the model to EleutherAI's lm-eval, in place of the held-out rows, with these tasks of "
            "it, e.g. hellaswag,arc_easy.",
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(
            "--include-path", metavar="DIR", help="A folder with tasks of your own for --lm-eval."
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write all that --lm-eval finds into a new .json file."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", metavar="N", min=1, help="Only the first N rows of each task of --lm-eval."
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat-template",
            help="Give lm-eval's prompts to the model as a chat, in the model's template: what a run with "
            "a chat model has trained on.",
        ),
    ] = False,
    set: Places = None,
) -> None:
    """Evaluate a run again: the full-rank update, and its truncation to every rank of a client. Look closer,
    at the predictions of single rows, at classes, or at texts; or hand the model to lm-eval."""
    with friendly(), watching(quiet=False) as watcher:
        which = parse_round(round)
        check_rank(rank)
        from fedhl.locate import locate
        from fedhl.run.asked import Asked, Harness
        from fedhl.run.folder import load_run_config, refuse_other

        refuse_other(run)
        if lm_eval is not None:
            for option, given in (
                ("--data", data),
                ("--predictions", predictions),
                ("--classes", classes),
                ("--samples", samples),
                ("--new-tokens", new_tokens),
            ):
                if given:
                    raise UserError(
                        f"{option} is for held-out rows, and --lm-eval has its own; give one"
                    )
            harness = Harness(lm_eval.split(","), include_path, json, rank, limit, chat)
            harness.check(load_run_config(run, set or (), draft=True))
            from fedhl.run.harness import evaluate_by_harness

            show(evaluate_by_harness(run, which, harness, watcher, set or ()))
            return
        for option, given in (
            ("--include-path", include_path),
            ("--json", json),
            ("--limit", limit),
            ("--chat-template", chat),
        ):
            if given:
                raise UserError(f"{option} is for --lm-eval; add --lm-eval TASKS")
        if data is not None:
            locate(data)
        asked = Asked(predictions, classes, samples, new_tokens, rank)
        asked.check(load_run_config(run, set or (), draft=True), data)
        from fedhl.run.delivery import evaluate_run

        show(evaluate_run(run, which, data, watcher, set or (), asked))


def show(lines: Sequence[Any]) -> None:
    """Print tables and sentences."""
    for said in lines:
        if isinstance(said, str):
            say(said)
        else:
            stdout().print(said)


@commands.command(rich_help_panel=PANEL)
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
    rank: Annotated[
        int | None, typer.Option("--rank", help="Write a PEFT adapter of this rank.")
    ] = None,
    merged: Annotated[
        bool,
        typer.Option(
            "--merged", help="Write the whole model, with the full-rank update merged into it."
        ),
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            "--push",
            metavar="OWNER/NAME",
            help="Send it to this repository of the Hugging Face hub, too; a new one is private.",
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="A new repository of --push is for everybody.")
    ] = False,
    round: Round = "last",
    client: Annotated[
        str | None,
        typer.Option(
            "--client",
            metavar="ID",
            help="Write the personal model of this client, if the run's config has `personal`.",
        ),
    ] = None,
    set: Places = None,
) -> None:
    """Write what a run has learned: a PEFT adapter of any rank, or the merged model, with a model card."""
    with friendly(), watching(quiet=False) as watcher:
        if (rank is None) != merged:
            raise UserError(
                "give either --rank R, for an adapter, or --merged, for the whole model"
            )
        if public and push is None:
            raise UserError("--public says who may see what --push sends; add --push OWNER/NAME")
        check_rank(rank)
        which = parse_round(round)
        if client is not None and which != "last":
            raise UserError(
                "--client: personal models are made after the last round only; leave --round out"
            )
        from fedhl.export import push as hub
        from fedhl.run.folder import refuse_other

        refuse_other(run, own=True)
        if push is not None:
            hub.check_push(push)
        from fedhl.run.delivery import export_run

        for line in export_run(run, out, rank, which, watcher, set or (), client):
            watcher.say(line)
        if push is not None:
            watcher.say(f"pushed to {hub.push(out, push, public)}")


@commands.command(rich_help_panel=PANEL)
def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER...", help="PEFT LoRA folders of any ranks and alphas."),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="The folder for the merged adapter.")
    ],
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="W,W,...",
            help="A weight for each adapter. Default: equal weights.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", help="Write the best approximation of this rank. Default: the exact sum."
        ),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize/--no-normalize", help="Divide the weights by their sum.")
    ] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Merge adapters even if their base models differ.")
    ] = False,
) -> None:
    """Merge PEFT adapters of any ranks and alphas into exactly `Σ w s B A`, the mean of their updates.

    The mean of the factors A and B would be something else: it mixes the B of one client with the A of
    another.
    """
    with friendly():
        given = (
            None if weights is None else parse_numbers("--weights", weights, float, "0.5,0.3,0.2")
        )
        check_rank(rank)
        from fedhl.export.fetch import adapter_folder

        for adapter in adapters:
            adapter_folder(adapter)
        from fedhl.export import merge_folders

        result = merge_folders(adapters, given, rank, out, normalize=normalize, force=force)
        ranks = sorted(set(result.ranks.values()))
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        for folder, weight in zip(adapters, result.weights, strict=True):
            say(f"{weight:.4f}  {folder}")
        say(
            f"merged {len(result.ranks)} layers at rank {shown} into {out}; truncation lost "
            f"{100 * result.error:.3g}% of the squared norm"
        )
        if result.unnamed:
            say(
                f"warning: nothing says which labels the heads of {', '.join(result.unnamed)} have; their "
                "mean is right only if all have the same labels in the same order"
            )
        worst = max(result.errors, key=lambda name: result.errors[name])
        if result.errors[worst] > 0:
            say(f"most in {worst}: {100 * result.errors[worst]:.3g}%")


@commands.command(rich_help_panel=PANEL)
def track(
    run: RunFolder,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="TRACKER",
            help="tensorboard, wandb or mlflow, or as in a config: '{name: wandb, mode: online}'. Default: "
            "those of the run's config.",
        ),
    ] = None,
) -> None:
    """Send all rounds of a run to TensorBoard, Weights & Biases or MLflow.

    A run does so by itself if its config says `report_to: [tensorboard]`. This command is for a run whose
    config does not, or whose tracker has failed.
    """
    with friendly(), watching(quiet=False) as watcher:
        from fedhl.config.tracking import check_installed
        from fedhl.run.folder import alone, load_run_config

        config = load_run_config(run, [] if to is None else [f"report_to={to}"], draft=True)
        if not config.report_to:
            raise UserError(f"{run} has no tracker in its config; name one, e.g. --to tensorboard")
        check_installed(config.report_to)
        from fedhl.record import read_metrics
        from fedhl.run.tracking import Trackers

        read_metrics(run)  # raises UserError if it is damaged
        with alone(run):
            trackers = Trackers(config, run, watcher)
            trackers.send()
            trackers.close()
        if len(trackers.working) < len(config.report_to):
            raise typer.Exit(2)


def check_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise UserError(f"--rank must be at least 1, got {rank}")


def parse_round(text: str) -> Any:
    """best, last, or a round's number."""
    if text in ("best", "last"):
        return text
    if text.isdecimal():
        return int(text)
    raise UserError(f"--round {text!r}: expected best, last or the number of a kept round")
