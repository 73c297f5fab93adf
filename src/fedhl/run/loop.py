"""From a config to a run folder that can be resumed: `config.yaml`, `metrics.jsonl`, `state/`,
`summary.json` and `report.html`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from fedhl.config import Config, dump_config
from fedhl.errors import UserError
from fedhl.federation.engine import IN_PROCESS, Engine, run_round
from fedhl.federation.examine import Examined
from fedhl.federation.first_look import clients_keep
from fedhl.federation.prepare import Prepared, prepare
from fedhl.files import append_line, finite, private_folder, write_text
from fedhl.record import FINISHED, read_metrics, read_summary, rounds_in
from fedhl.report import write_report
from fedhl.run import checkpoint
from fedhl.run.folder import (
    PLACES,
    alone,
    anchored,
    keep_metrics,
    load_checkpoint,
    load_run_config,
    networked,
    refuse_taken,
    secret_of,
    uninterrupted,
    writing,
)
from fedhl.run.personal import keep_personal
from fedhl.run.progress import steps, told
from fedhl.run.result import Result
from fedhl.run.rounds import Done, finish, untrained
from fedhl.run.stop import stopped
from fedhl.run.summary import (
    check_checkpoint,
    check_same,
    clients_own_data,
    hash_before,
    hashes,
    mark,
    write_summary,
)
from fedhl.run.tracking import tracked
from fedhl.server import ServerState
from fedhl.watch import SILENT, Watcher


def start_run(
    config: Config, folder: str | Path, watcher: Watcher = SILENT, examined: Examined | None = None
) -> Result:
    """Run from the first round into a new folder. Raises UserError if the folder is taken.

    `examined`: the rows and the ranks, if they have been read already.
    """
    folder = Path(folder)
    refuse_taken(folder)
    return with_report(start_prepared(prepare(config, watcher, examined), folder, watcher), folder)


def resume_run(folder: str | Path, watcher: Watcher = SILENT, places: Sequence[str] = ()) -> Result:
    """Continue after the newest good checkpoint, to the same end as an uninterrupted run. `places`: where
    model and data are now, and other trackers, as in `load_run_config`."""
    folder = Path(folder)
    config = load_run_config(folder, places, PLACES)
    if networked(folder) and (clients_keep(config) or clients_own_data(folder)):
        raise UserError(
            f"the clients of {folder} were other processes, with rows or factors of their own; continue the "
            "run as it was started, with fedhl run --ray or fedhl serve"
        )
    with alone(folder):
        return with_report(resume_prepared(prepare(config, watcher), folder, watcher), folder)


def with_report(result: Result, folder: Path) -> Result:
    """The result, once report.html of the run is written."""
    with writing(folder):
        write_report(folder)
    return result


def start_prepared(
    prepared: Prepared, folder: Path, watcher: Watcher, engine: Engine = IN_PROCESS
) -> Result:
    """`start_run` for a prepared federation and any engine, without the report."""
    with writing(folder):
        private_folder(folder)
    with alone(folder):
        if (folder / "config.yaml").exists():
            raise UserError(
                f"{folder}: another process has started a run here in the meantime; choose another folder"
            )
        with writing(folder):
            write_text(folder / "config.yaml", dump_config(anchored(prepared.config)))
            private_folder(folder / "state")
        watcher.say(f"run folder: {folder}")
        return run_rounds(prepared, None, folder, watcher, engine=engine)


def resume_prepared(
    prepared: Prepared, folder: Path, watcher: Watcher, engine: Engine = IN_PROCESS
) -> Result:
    """`resume_run` for a prepared federation and any engine, without the report."""
    check_same(folder, prepared.config, hashes(prepared, folder))
    if not rounds_in(folder / "state"):
        if prepared.federation.privacy is not None:
            refuse_second_noise(folder, 0)
        watcher.say("there is no checkpoint yet; starting from the first round")
        return run_rounds(prepared, None, folder, watcher, engine=engine)
    state, manifest = load_checkpoint(folder, prepared.initial_state(), "last", watcher)
    check_checkpoint(folder, manifest, hashes(prepared, folder))
    if prepared.federation.privacy is not None:
        refuse_second_noise(folder, state.round)
    best, keep = manifest["best"], prepared.config.checkpoints.keep
    with writing(folder):
        keep_metrics(folder, manifest["metrics"])
        checkpoint.prune(folder / "state", keep, best["round"] if best is not None else None)
    watcher.say(f"resuming after round {state.round} of {prepared.config.rounds}")
    return run_rounds(prepared, state, folder, watcher, best, engine)


def refuse_second_noise(folder: Path, round: int) -> None:
    """Raises UserError if rounds after this one, of clients in other processes, were done before: done again,
    they would add the same noise to other sums."""
    if not networked(folder):
        return
    before = (line["round"] for line in read_metrics(folder))
    done = max([*rounds_in(folder / "state"), *before], default=0)
    if done > round:
        raise UserError(
            f"{folder}: with privacy, the rounds after {round} cannot be done again over a network: their "
            "noise would be added to the sums of other replies, and the difference of the two sums of a "
            f"round would have no noise; restore the checkpoint of round {done}, or start the run "
            "anew with another --out"
        )


def run_rounds(
    prepared: Prepared,
    state: ServerState | None,
    folder: Path,
    watcher: Watcher,
    best: dict[str, Any] | None = None,
    engine: Engine = IN_PROCESS,
) -> Result:
    """The remaining rounds, after `state` or from the start; each round is on disk before a tracker is told,
    and before the next begins."""
    config = prepared.config
    with writing(folder):
        prepared = with_secret(prepared, folder)
        if state is None:
            (folder / "metrics.jsonl").unlink(missing_ok=True)
        lines = read_metrics(folder)
        write_summary(prepared, folder, lines, "running", best)
    with tracked(config, folder, watcher) as track:
        try:
            if state is None:
                done = untrained(prepared.federation, prepared.initial_state(), watcher, engine)
                state, best = keep(prepared, done, lines, folder, watcher)
                track()
            while state.round < config.rounds and not stopped(lines):
                here = engine.present(prepared.federation, state.round + 1)
                prepared = prepared.joined_by(here.clients)
                on_step = steps(here, state, watcher)
                following, outcome = run_round(here, state, on_step, engine)
                done = finish(
                    prepared.federation, following, state, outcome, lines, best, watcher, engine
                )
                state, best = keep(prepared, done, lines, folder, watcher)
                track()
            keep_personal(prepared.federation, state, folder, watcher, engine)
            track()
        except KeyboardInterrupt:
            with writing(folder):
                mark(folder, "interrupted")
            raise
        with writing(folder):
            write_summary(prepared, folder, lines, FINISHED, best)
    scores = read_summary(folder)["personal"]
    return Result(prepared.federation, state, read_metrics(folder), folder, scores)


def keep(
    prepared: Prepared,
    done: Done,
    lines: list[dict[str, Any]],
    folder: Path,
    watcher: Watcher,
) -> tuple[ServerState, dict[str, Any] | None]:
    """Write checkpoint, metrics and summary of a round, add its line to those of the rounds before, and say
    what it did; returns the state, whose memories are on disk from now on, and the best round so far."""
    config, (state, line, best) = prepared.config, done
    began, seconds = perf_counter(), line["seconds"]
    with uninterrupted(), writing(folder):
        notes = finite({"metrics": line, "best": best})
        notes |= {"hashes": hashes(prepared, folder), "before": hash_before(folder, state.round)}
        state = checkpoint.on_disk(folder / "state", state)
        checkpoint.save(folder / "state", state, notes)
        checkpoint.prune(
            folder / "state", config.checkpoints.keep, best["round"] if best is not None else None
        )
        seconds["checkpoint"] = perf_counter() - began
        seconds["total"] += seconds["checkpoint"]
        append_line(folder / "metrics.jsonl", line)
        lines.append(line)
        write_summary(prepared, folder, lines, "running", best)
    for text in told(line, config):
        watcher.say(text)
    return state, best


def with_secret(prepared: Prepared, folder: Path) -> Prepared:
    """With privacy: the same, with the secret of this run in place of a new secret."""
    federation = prepared.federation
    if federation.privacy is None:
        return prepared
    secret = secret_of(folder, federation.privacy.secret)
    privacy = replace(federation.privacy, secret=secret)
    return replace(prepared, federation=replace(federation, privacy=privacy))
