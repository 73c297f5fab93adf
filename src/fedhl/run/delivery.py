"""Uses of a finished run: export of adapters and models, and another evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text
from torch import Tensor

from fedhl import server
from fedhl.config import Config
from fedhl.config.conduct import ComputeConfig
from fedhl.data.loading import load_rows
from fedhl.errors import UserError
from fedhl.export import export_adapter, export_merged, model_card
from fedhl.export.cards import base_licence
from fedhl.export.own import read_own
from fedhl.federation.federation import Federation, initial_state
from fedhl.federation.first_look import clients_keep
from fedhl.federation.personal import client_named, personal_change
from fedhl.federation.prepare import (
    load_federation,
    prepare,
    prepare_server_again,
    readable,
    with_cache,
)
from fedhl.federation.scores import evaluate_round, truncations
from fedhl.lora import LoRA, dense
from fedhl.model.adapters import is_finite
from fedhl.model.loading import Loaded, load_model
from fedhl.names import unknown
from fedhl.record import FAILED, is_own, measured, read_summary, unit_of
from fedhl.run.asked import METRICS, Asked
from fedhl.run.closer_look import HeldOut, closer_look
from fedhl.run.folder import PLACES, load_checkpoint, load_run_config, networked
from fedhl.run.personal import read_model, there
from fedhl.run.summary import check_same, clients_own_data, hash_once
from fedhl.run.tables import Said
from fedhl.server import ServerState
from fedhl.task.intervals import wilson
from fedhl.task.rows import located
from fedhl.watch import SILENT, Watcher

Which = int | Literal["last", "best"]


def export_run(
    run: Path,
    out: Path,
    rank: int | None,
    which: Which,
    watcher: Watcher = SILENT,
    places: Sequence[str] = (),
    client: str | None = None,
) -> list[str]:
    """Write a PEFT adapter of `rank`, or (None) the merged model, into `out`; the data is not needed.
    `run`: a run folder, or that of a personal model on its client's own machine; `places`: where the model is
    now, as in `load_run_config`; `client`: the client whose personal model is written, in place of the global
    one.

    Layers narrower than `rank` get their full rank. Returns lines that say what was written and how
    to load it. Raises UserError, e.g. if `out` is not empty or the round was not kept.
    """
    if rank is not None and rank < 1:
        raise UserError(f"rank must be at least 1, got {rank}")
    config = load_run_config(run, places, ["model.source"], own=True)
    summary = read_summary(run)
    if is_own(run):
        client = client or summary["clients"][0]["id"]
    # names and shapes of the base are all that is needed of it: any machine will do
    model = config.model.model_copy(update={"four_bit": False})
    config = config.model_copy(update={"compute": ComputeConfig(device="cpu"), "model": model})
    ranks = {client["id"]: client["rank"] for client in summary["clients"]}
    if client is not None and client not in ranks:
        raise UserError(f"--client: {unknown('client', client, list(ranks))}")
    if client is not None and not is_own(run):
        summary["personal"] = there(run)  # known before the summary knows
    loaded, federation = load_federation(config, summary["labels"], ranks)
    check_same(run, config, {"model": loaded.hash, "tokenizer": hash_once(loaded.processor)})
    if is_own(run):
        known, head = read_own(run)
    else:
        state, manifest = load_checkpoint(run, initial_state(federation), which, watcher)
        summary["rounds_done"] = state.round
        summary["final"] = manifest["metrics"]["evaluation"]
        known, head = server.deltas(federation.method, state), state.head
        if client is None:
            refuse_diverged(run, state, known, summary["final"])
        else:
            known, head = personal_of(run, federation, state, client)
    if client is not None and not all_finite(known, head):
        raise UserError(
            f"{run}: the personal training of client {client!r} has diverged: its numbers are not finite; a "
            "smaller personal.learning_rate may help"
        )
    if summary["status"] == FAILED:
        watcher.say(f"warning: {run} failed: {summary['reason']}")
    if not known:
        raise UserError(f"{run}: method {config.method.name!r} has no global model to export")
    base, round = loaded.source_for_adapter, summary["rounds_done"]
    whose = "" if client is None else f"client {client!r}, "
    about: dict[str, Any] = {
        "base": base,
        "max_length": config.task.longest,
        "labels": summary["labels"] or (),
        "licence": base_licence(base),
        "client": client,
    }
    if rank is None:
        fresh = load_fresh(config, summary, loaded)
        card = model_card(summary, "merged", None, **about)
        export_merged(out, fresh, {name: dense(delta) for name, delta in known.items()}, head, card)
        what = "full-rank update" if client is None else "personal model's change"
        return [f"{whose}round {round}, {what} merged into {base}: {out}"]
    adapter = truncations(known, rank)
    got = max(lora.rank for lora in adapter.values())
    card = model_card(summary, "adapter", got, **about)
    export_adapter(out, loaded, adapter, head, card)
    short = "" if got == rank else f" (the rank of the update; asked for was {rank})"
    return [
        f"{whose}round {round}, PEFT adapter of rank {got}{short}: {out}",
        f"truncation left out {100 * left_out(known, adapter):.3g}% of the update's squared norm",
    ]


def personal_of(
    run: Path, federation: Federation, state: ServerState, id: str
) -> tuple[dict[str, Tensor | LoRA], dict[str, Tensor]]:
    """The change of every layer, and the head, of the personal model of this client. Raises UserError if
    there is none."""
    client = client_named(federation, id)
    personal = read_model(run, client, state)
    return personal_change(federation, state, client, personal), dict(personal.head)


def refuse_diverged(
    run: Path,
    state: ServerState,
    deltas: Mapping[str, Tensor | LoRA],
    evaluation: Mapping[str, Any] | None,
) -> None:
    """Raises UserError unless all numbers of the model are finite, and its losses, where measured."""
    if not all_finite(deltas, state.head) or None in measured(evaluation or {}):
        raise UserError(
            f"{run}: training had diverged by round {state.round}, whose numbers or losses are not finite; "
            "take an earlier round, e.g. with --round best"
        )


def all_finite(deltas: Mapping[str, Tensor | LoRA], head: Mapping[str, Tensor]) -> bool:
    """Whether all numbers of these changes and of this head are finite."""
    factors = [t for d in deltas.values() for t in ((d.A, d.B) if isinstance(d, LoRA) else (d,))]
    return all(is_finite(tensor) for tensor in (*factors, *head.values()))


def load_fresh(config: Config, summary: Mapping[str, Any], loaded: Loaded) -> Loaded:
    """The base model again, in float32 and without adapters, to merge into."""
    return load_model(
        config.model.source,
        config.task.kind,
        labels=summary["labels"],
        revision=loaded.revision,
        fresh_head=config.model.fresh_head,
        seed=config.seed,
    )


def left_out(deltas: Mapping[str, Any], adapter: Mapping[str, LoRA]) -> float:
    """`Σ ||ΔW - T_r(ΔW)||² / Σ ||ΔW||²` over the layers; 0 if there is no update."""
    lost = total = 0.0
    for name, delta in deltas.items():
        W = dense(delta).double()
        lost += float((W - adapter[name].delta()).square().sum())
        total += float(W.square().sum())
    return lost / total if total else 0.0


def evaluate_run(
    run: Path,
    which: Which,
    source: str | None,
    watcher: Watcher = SILENT,
    places: Sequence[str] = (),
    asked: Asked = METRICS,
) -> list[Said]:
    """The metrics of a checkpoint on the run's held-out rows, or, without the data of the run, on the rows
    of `source`, as a table; and tables and sentences of what else is asked for. `places`: where model and
    data are now, as in `load_run_config`."""
    config = load_run_config(run, places)
    asked.check(config, source)
    if networked(run) and clients_keep(config):
        raise UserError(
            f"only the clients of {run} can evaluate, since {config.method.name} has them keep factors for "
            "themselves; their reported metrics are in metrics.jsonl"
        )
    if source is not None and config.tasks is None:
        return evaluate_on(run, which, source, watcher, places, asked)
    own = clients_own_data(run)
    config = load_run_config(
        run, places, [key for key in PLACES if not (own and key == "data.source")]
    )
    prepared = (
        prepare_server_again(config, read_summary(run), watcher)
        if own
        else prepare(config, watcher)
    )
    check_same(run, config, {"model": prepared.loaded.hash, "data": prepared.data.hash})
    federation, rows = prepared.federation, prepared.data.held_out
    processor, labels, encoded = prepared.loaded.processor, prepared.data.labels, None
    if source is not None:
        rows = load_rows(source, encoding=config.data.encoding)
        encoded = config.task.encode(rows, source, processor, labels)
        with located(rows, source):
            encoded = readable(config, federation, prepared.loaded, watcher)(encoded)
        federation = replace(federation, held_out=encoded.examples, own={})
    if not federation.held_out and not federation.own:
        raise UserError(f"{run} has no held-out rows; name a file of rows with --data")
    state, _ = load_checkpoint(run, prepared.initial_state(), which, watcher)
    said: list[Said] = [
        table(evaluate_round(federation, state, every_rank=True), federation, state)
    ]
    if asked.anything:
        if encoded is None:
            place = (config.data.held_out and config.data.held_out.source) or config.data.source
            encoded = config.task.encode(rows, place, processor, labels)
            encoded = readable(config, federation, prepared.loaded, watcher)(encoded)
        held_out = HeldOut(rows, encoded)
        said += closer_look(asked, config.task, federation, state, held_out, labels, processor)
    return said


def evaluate_on(
    run: Path, which: Which, source: str, watcher: Watcher, places: Sequence[str], asked: Asked
) -> list[Said]:
    """`evaluate_run` on the rows of `source`, without the data of the run."""
    config, summary = load_run_config(run, places, ["model.source"]), read_summary(run)
    ranks = {client["id"]: client["rank"] for client in summary["clients"]}
    loaded, federation = load_federation(config, summary["labels"], ranks)
    check_same(run, config, {"model": loaded.hash, "tokenizer": hash_once(loaded.processor)})
    rows = load_rows(source, encoding=config.data.encoding)
    encoded = config.task.encode(rows, source, loaded.processor, summary["labels"])
    with located(rows, source):
        encoded = readable(config, federation, loaded, watcher)(encoded)
    federation = with_cache(config, replace(federation, held_out=encoded.examples))
    state, _ = load_checkpoint(run, initial_state(federation), which, watcher)
    said: list[Said] = [
        table(evaluate_round(federation, state, every_rank=True), federation, state)
    ]
    if asked.anything:
        known = (HeldOut(rows, encoded), summary["labels"], loaded.processor)
        said += closer_look(asked, config.task, federation, state, *known)
    return said


def table(evaluation: dict[str, Any], federation: Federation, state: ServerState) -> Table:
    """The metrics of one evaluation, a row per model, with an interval for each share of rows."""
    rows: dict[str, Mapping[str, Any]] = {}
    if evaluation["full"]:
        rows["full-rank update"] = evaluation["full"]
    for rank, metrics in evaluation["ranks"].items():
        rows[f"truncated to rank {rank}"] = metrics
    if evaluation["clients"]:
        rows["clients on their own rows, mean"] = evaluation["clients"]["mean"]
        worst = evaluation["clients"]["worst"]
        rows[f"worst client, {worst['client']}"] = worst
    accuracies = (evaluation.get("tasks") or {}).get("accuracy", ())
    for k, (accuracy, labels) in enumerate(
        zip(accuracies, federation.tasks, strict=False), start=1
    ):
        examples = sum(example.labels in labels for example in federation.held_out)
        of_task = {"accuracy": accuracy, "examples": examples}
        rows[f"task {k}, among the labels so far"] = of_task
    if not rows:
        raise UserError(
            "there is no global model to evaluate on these rows, and no client has held-out rows of its own"
        )
    first = next(iter(rows.values()))
    names = [n for n in dict.fromkeys((evaluation["metric"], "loss", "examples")) if n in first]
    result = Table(title=f"after round {state.round}", title_justify="left")
    result.add_column("model")
    shares = {evaluation["metric"]} if unit_of(evaluation) == "share of rows" else set()
    for name in names:
        result.add_column(name, justify="right")
        if name in shares:
            result.add_column("95%", justify="right")
            result.caption = Text(caption(bool(evaluation["clients"])))
            result.caption_justify = "left"
    for what, metrics in rows.items():
        cells = []
        for name in names:
            value = metrics.get(name)
            cells.append(f"{value:.4f}" if isinstance(value, float) else str(value or ""))
            if name in shares:
                cells.append(interval(value, metrics.get("examples")))
        result.add_row(Text(what), *cells)
    return result


def caption(clients: bool) -> str:
    said = "95%: Wilson's interval, from the number of examples"
    more = "; a mean over clients has none. Of the worst client it ends lowest." if clients else "."
    return said + more


def interval(share: float | None, examples: float | None) -> str:
    """The interval of a share of this number of rows; nothing without a number."""
    if share is None or not examples:
        return ""
    low, high = wilson(share, examples)
    return f"{low:.3f}–{high:.3f}"
