"""From a config to a run folder that can be resumed: `config.yaml`, `metrics.jsonl`, `state/`,
`summary.json` and `report.html`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from fedhl import server
from fedhl.config import Config, dump_config
from fedhl.data.label_groups import begins
from fedhl.errors import UserError
from fedhl.federation.engine import IN_PROCESS, Engine, run_round
from fedhl.federation.examine import Examined
from fedhl.federation.prepare import Prepared, clients_keep, prepare
from fedhl.federation.scores import evaluate_round
from fedhl.files import append_line, finite, private_folder, write_text
from fedhl.model.training import learning_rate
from fedhl.record import FINISHED, better, read_metrics, rounds_in, sound
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
from fedhl.run.progress import COLLAPSE, describe, steps
from fedhl.run.stop import stopped, why
from fedhl.run.summary import (
    check_checkpoint,
    check_same,
    clients_own_data,
    hash_before,
    hashes,
    mark,
    write_summary,
)
from fedhl.server import Outcome, ServerState
from fedhl.watch import SILENT, Watcher


def start_run(
    config: Config, folder: str | Path, watcher: Watcher = SILENT, examined: Examined | None = None
) -> None:
    """Run from the first round into a new folder. Raises UserError if the folder is taken.

    `examined`: the rows and the ranks, if they have been read already.
    """
    folder = Path(folder)
    refuse_taken(folder)
    start_prepared(prepare(config, watcher, examined), folder, watcher)


def resume_run(folder: str | Path, watcher: Watcher = SILENT, places: Sequence[str] = ()) -> None:
    """Continue after the newest good checkpoint, to the same end as an uninterrupted run. `places`: where
    model and data are now, as in `load_run_config`."""
    folder = Path(folder)
    config = load_run_config(folder, places, PLACES)
    if networked(folder) and (clients_keep(config) or clients_own_data(folder)):
        raise UserError(
            f"the clients of {folder} were other processes, with rows or factors of their own; continue the "
            "run as it was started, with fedhl run --ray or fedhl serve"
        )
    with alone(folder):
        resume_prepared(prepare(config, watcher), folder, watcher)


def start_prepared(
    prepared: Prepared, folder: Path, watcher: Watcher, engine: Engine = IN_PROCESS
) -> None:
    """`start_run` for a prepared federation and any engine."""
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
        run_rounds(prepared, None, folder, watcher, engine=engine)


def resume_prepared(
    prepared: Prepared, folder: Path, watcher: Watcher, engine: Engine = IN_PROCESS
) -> None:
    """`resume_run` for a prepared federation and any engine."""
    check_same(folder, prepared.config, hashes(prepared, folder))
    if not rounds_in(folder / "state"):
        if prepared.federation.privacy is not None:
            refuse_second_noise(folder, 0)
        watcher.say("there is no checkpoint yet; starting from the first round")
        run_rounds(prepared, None, folder, watcher, engine=engine)
        return
    state, manifest = load_checkpoint(folder, prepared.initial_state(), "last", watcher)
    check_checkpoint(folder, manifest, hashes(prepared, folder))
    if prepared.federation.privacy is not None:
        refuse_second_noise(folder, state.round)
    best, keep = manifest["best"], prepared.config.checkpoints.keep
    with writing(folder):
        keep_metrics(folder, manifest["metrics"])
        checkpoint.prune(folder / "state", keep, best["round"] if best is not None else None)
    watcher.say(f"resuming after round {state.round} of {prepared.config.rounds}")
    run_rounds(prepared, state, folder, watcher, best, engine)


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
) -> None:
    """The remaining rounds, after `state` or from the start; each round is on disk before the next begins."""
    rounds = prepared.config.rounds
    with writing(folder):
        prepared = with_secret(prepared, folder)
        if state is None:
            (folder / "metrics.jsonl").unlink(missing_ok=True)
        write_summary(prepared, folder, "running", best)
    try:
        if state is None:
            state = prepared.initial_state()
            nothing = Outcome([], [], {}, {})
            state, best = finish_round(prepared, state, folder, nothing, best, watcher, engine)
        while state.round < rounds and not stopped(folder):
            here = engine.present(prepared.federation, state.round + 1)
            prepared = prepared.joined_by(here.clients)
            on_step = steps(here, state, watcher)
            following, outcome = run_round(here, state, on_step, engine)
            state, best = finish_round(
                prepared, following, folder, outcome, best, watcher, engine, before=state
            )
    except KeyboardInterrupt:
        with writing(folder):
            mark(folder, "interrupted")
        raise
    with writing(folder):
        write_summary(prepared, folder, FINISHED, best)
        write_report(folder)


def undone(
    prepared: Prepared, before: ServerState, outcome: Outcome
) -> tuple[ServerState, Outcome]:
    """The state after a round that changes nothing, and the outcome in which no client counts."""
    federation, round = prepared.federation, before.round + 1
    if federation.tasks and begins(round, prepared.config.period):
        before = server.next_task(federation.method, before)
    reason = "the round was undone, since the loss of its model was not finite"
    refused = [
        {"id": c["id"], "reason": reason, **{w: c[w] for w in ("bytes_down", "bytes_up")}}
        for c in outcome.clients
    ]
    outcome = replace(outcome, clients=[], refused=[*outcome.refused, *refused], diagnostics={})
    return replace(before, round=round), outcome


def with_secret(prepared: Prepared, folder: Path) -> Prepared:
    """With privacy: the same, with the secret of this run in place of a new secret."""
    federation = prepared.federation
    if federation.privacy is None:
        return prepared
    secret = secret_of(folder, federation.privacy.secret)
    privacy = replace(federation.privacy, secret=secret)
    return replace(prepared, federation=replace(federation, privacy=privacy))


def sum_of(seconds: Mapping[str, float]) -> float:
    """The seconds of a round before it is on disk."""
    phases = ("broadcast", "train", "aggregate", "diagnostics", "evaluate")
    return sum(seconds.get(phase, 0.0) for phase in phases)


def finish_round(
    prepared: Prepared,
    state: ServerState,
    folder: Path,
    outcome: Outcome,
    best: dict[str, Any] | None,
    watcher: Watcher,
    engine: Engine = IN_PROCESS,
    before: ServerState | None = None,
) -> tuple[ServerState, dict[str, Any] | None]:
    """Evaluate, then write checkpoint, metrics and summary; returns the state, whose memories are on disk
    from now on, and the best round so far. A round after which the loss is not finite is undone, if it is
    finite for the state `before`."""
    config, round = prepared.config, state.round
    seconds = {**outcome.seconds}
    began = perf_counter()
    evaluation = None
    if round % config.evaluation.every == 0 or round % config.period == 0:  # the end of a task
        watcher.step(f"round {round}: evaluating", 0, 1)
        last = round == config.rounds
        evaluation = evaluate_round(prepared.federation, state, every_rank=last, engine=engine)
        if before is not None and not sound(evaluation):
            kept, nothing = undone(prepared, before, outcome)
            again = evaluate_round(prepared.federation, kept, every_rank=last, engine=engine)
            if sound(again):
                state, outcome, evaluation = kept, nothing, again
        best = better(best, evaluation, round)
    seconds["evaluate"] = perf_counter() - began
    reason = None
    if config.stop is not None and 0 < round < config.rounds:
        now = {"round": round, "evaluation": evaluation, "seconds": {"total": sum_of(seconds)}}
        reason = why(config.stop, [*read_metrics(folder), now], best)
    if reason is not None:
        watcher.say(f"ending after round {round} of {config.rounds}: {reason}")
        began = perf_counter()
        evaluation = evaluate_round(prepared.federation, state, every_rank=True, engine=engine)
        best = better(best, evaluation, round)
        seconds["evaluate"] += perf_counter() - began
    began = perf_counter()
    spectra = server.spectra(prepared.federation.method, state, prepared.federation.top_rank)
    seconds["diagnostics"] = seconds.get("diagnostics", 0.0) + perf_counter() - began
    epsilon = prepared.epsilon(round)
    spent = {} if epsilon is None else {"epsilon": epsilon}
    line = {
        "round": round,
        "learning_rate": learning_rate(
            config.training, config.period, (round - 1) % config.period + 0.5
        )
        if round
        else None,
        "evaluation": evaluation,
        "clients": outcome.clients,
        "refused": outcome.refused,
        "diagnostics": outcome.diagnostics | spectra | spent,
        "bytes": {
            way: sum(record[f"bytes_{way}"] for record in (*outcome.clients, *outcome.refused))
            for way in ("down", "up")
        },
        "seconds": seconds,
    } | ({} if reason is None else {"stopped": reason})
    began = perf_counter()
    with uninterrupted(), writing(folder):
        seconds["total"] = sum_of(seconds)
        notes = finite({"metrics": line, "best": best})
        notes |= {"hashes": hashes(prepared, folder), "before": hash_before(folder, round)}
        state = checkpoint.on_disk(folder / "state", state)
        checkpoint.save(folder / "state", state, notes)
        checkpoint.prune(
            folder / "state", config.checkpoints.keep, best["round"] if best is not None else None
        )
        seconds["checkpoint"] = perf_counter() - began
        seconds["total"] += seconds["checkpoint"]
        append_line(folder / "metrics.jsonl", line)
        write_summary(prepared, folder, "running", best)
    watcher.say(describe(line, config.rounds))
    for refused in outcome.refused:
        watcher.say(f"warning: client {refused['id']!r} does not count: {refused['reason']}")
    if not outcome.clients and round:
        left = "moves by the noise alone" if spent else "stays as it was"
        watcher.say(f"warning: no update was accepted in this round; the model {left}")
    effective = outcome.diagnostics.get("effective_clients")
    if effective is not None and effective - 1 < COLLAPSE * (len(outcome.clients) - 1):
        advice = (
            "raise weighting.epsilon, or set weighting.share"
            if config.weighting_used.name == "truncation"
            else "weighting: uniform counts them alike"
        )
        watcher.say(
            f"warning: the weights of {len(outcome.clients)} clients amount to {effective:.1f} effective "
            f"ones; {advice}"
        )
    return state, best
