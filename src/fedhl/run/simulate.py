"""A federation from Python: a model, rows for each client, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.data import default_collate

from fedhl.config.settings import Settings
from fedhl.config.text import explain
from fedhl.errors import UserError
from fedhl.federation.engine import run_round
from fedhl.federation.examine import check_count, refuse_unknown_clients
from fedhl.federation.federation import initial_state
from fedhl.federation.first_look import smallest
from fedhl.federation.personal import personal_models
from fedhl.federation.prepare import federate, pick_device
from fedhl.federation.scores import over_models, said
from fedhl.files import finite
from fedhl.names import unknown
from fedhl.record import Unit, unit_by_name
from fedhl.run.progress import steps, told
from fedhl.run.result import Result
from fedhl.run.rounds import finish, untrained
from fedhl.server import accounting
from fedhl.watch import Watcher

Loss = Callable[[Any, Any], Tensor]
"""The mean loss of a batch: `loss(model, batch)`."""
Metrics = Callable[[Any, Any], Mapping[str, Tensor]]
"""Metrics of a batch by name: `metrics(model, batch)`, each a number for each row, or the mean over the
rows."""
Data = Iterable[Any]
"""Rows: a list, a data set of torch or of Hugging Face, or anything else that can be read once from its
beginning to its end."""


class Batch(NamedTuple):
    rows: int
    inputs: Any


def own_loss(model: Any, batch: Any) -> Tensor:
    """The loss that a model of transformers computes itself, where the batch has labels."""
    return model(**batch).loss


def no_metrics(model: Any, batch: Any) -> Mapping[str, Tensor]:
    """The loss alone is measured."""
    return {}


@dataclass(frozen=True)
class Own:
    """What somebody's own functions say is learnt (see `fedhl.task.objective.Objective`)."""

    loss_of: Loss
    metrics_of: Metrics
    collate: Callable[[list[Any]], Any]
    metric: str
    greater: bool
    unit: Unit

    def batch(self, rows: Sequence[Any]) -> Batch:
        return Batch(len(rows), self.collate(list(rows)))

    def terms(self, batch: Batch) -> int:
        return batch.rows

    def loss(self, model: Any, batch: Batch) -> Tensor:
        return self.loss_of(model, batch.inputs)

    def outputs(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.loss_of(model, batch.inputs), **self.metrics_of(model, batch.inputs)}

    def score(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        if self.metric not in outputs:
            raise UserError(f"metric: {unknown('metric', self.metric, list(outputs))}")
        return {name: self.by_row(name, values, batch.rows) for name, values in outputs.items()}

    @staticmethod
    def by_row(name: str, values: Any, rows: int) -> Tensor:
        values = torch.as_tensor(values).detach()
        if values.shape not in ((), (rows,)):
            raise UserError(
                f"metrics: {name!r} has the shape {tuple(values.shape)}; expected a number for each of the "
                f"{rows} rows, or their mean"
            )
        return values.expand(rows)

    def parts(self, rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
        for at in range(0, len(rows), size):
            # one by one: the slice of a Hugging Face data set is no list of rows
            yield [rows[k] for k in range(at, min(at + size, len(rows)))]

    def tokens(self, batch: Batch) -> int | None:
        ids = batch.inputs.get("input_ids") if isinstance(batch.inputs, Mapping) else None
        return None if ids is None else ids.shape[-1]


def simulate(
    model: nn.Module,
    clients: Mapping[str, Data] | Sequence[Data],
    *,
    ranks: int | Sequence[int] | Mapping[str, int] = 8,
    loss: Loss = own_loss,
    metrics: Metrics = no_metrics,
    held_out: Data = (),
    client_held_out: Mapping[str, Data] | Sequence[Data] = (),
    collate: Callable[[list[Any]], Any] = default_collate,
    head: Sequence[str] = (),
    metric: str = "loss",
    greater_is_better: bool | None = None,
    unit: Unit | None = None,
    watcher: Watcher | None = None,
    **settings: Any,
) -> Result:
    """A federation of `clients` around a copy of `model`, in this process; the engine, the server and the
    methods are those of `fedhl run`.

    `model`: any module with `Linear` or `Conv1D` layers, which get adapters. `clients`: the training rows of
    each client, by id; in a list, client k is called client-k. `ranks`: the LoRA rank of each.

    `loss(model, batch)`: the mean loss of a batch; as it is, that of a model of transformers whose rows have
    labels. `metrics(model, batch)`: other metrics by name, each a number for each row or the mean.
    `collate(rows)`: makes a batch. `head`: the modules that are trained whole, such as a new classifier.

    `held_out`: the server's rows, on which the global model is evaluated; `client_held_out`: rows of each
    client, on which the client is evaluated, and its personal model, if there is `personal={"steps": 20}`.
    `metric`: the one by which rounds are judged; `greater_is_better`: whether more of it is better; None:
    yes, unless its name ends with "loss". `unit`: "share of rows", "share" or "number", as
    `fedhl.record.Unit` explains; None: "share of rows" for an `accuracy`, "share" for an `f1`, else "number".
    `watcher`: who is told of progress; None: a line is printed for each round.

    `settings` are those of a config, e.g. `method="fedhl_ef"`, `rounds=10`, `seed=0`,
    `training={"steps": 5, "learning_rate": 1e-2}`, `lora={"targets": ["query"], "alpha": 16}`; docs/config.md
    has them all. Nothing is written: what is stopped in the middle is lost, unlike with `fedhl run`.

    Raises UserError for settings that do not fit, as `fedhl run` does.
    """
    rows = named("clients", clients)
    own = named("client_held_out", client_held_out, list(rows)) if client_held_out else {}
    config = read_settings(settings, ranks, list(rows))
    method, tiny = smallest(config)
    refuse_idle(config, method.delta(tiny) is None, own, rows)
    if config.privacy is not None:
        accounting.check_installed()
    evaluated = listed("held_out", held_out)
    watcher = watcher or Watcher(say=lambda line: print(line, flush=True))
    device = pick_device(config)
    if config.compute.threads is not None:
        torch.set_num_threads(config.compute.threads)
    greater = not metric.endswith("loss") if greater_is_better is None else greater_is_better
    objective = Own(loss, metrics, collate, metric, greater, unit or unit_by_name(metric))
    copied = deepcopy(model).to(device).eval()
    federation = federate(
        config,
        copied,
        parameters_of(copied, head),
        config.lora.ranks.assign(list(rows), config.seed),
        objective,
        device,
    )
    federation = replace(
        federation,
        clients=[replace(c, examples=len(rows[c.id])) for c in federation.clients],
        rows=rows,
        own=own,
        held_out=evaluated,
    )
    done = untrained(federation, initial_state(federation), watcher)
    lines = [done.line]
    for text in told(done.line, config):
        watcher.say(text)
    while done.state.round < config.rounds and "stopped" not in done.line:
        state = done.state
        following, outcome = run_round(federation, state, steps(federation, state, watcher))
        done = finish(federation, following, state, outcome, lines, done.best, watcher)
        lines.append(done.line)
        for text in told(done.line, config):
            watcher.say(text)
    if config.personal is None:
        return Result(federation, done.state, lines)
    models, records = {}, {}
    for client, model_of_one, record in personal_models(federation, done.state, watcher):
        models[client.id], records[client.id] = model_of_one, record
    scores = finite(over_models(records, objective))
    watcher.say(said(scores))
    return Result(federation, done.state, lines, personal=scores, models=models)


def named(
    what: str, data: Mapping[str, Data] | Sequence[Data], known: Sequence[str] = ()
) -> dict[str, Sequence[Any]]:
    """The rows of each client by its id, sorted. `known`: the clients that there are, if that is settled."""
    if not isinstance(data, Mapping):
        width = len(str(len(data) - 1))
        data = {f"client-{k:0{width}}": rows for k, rows in enumerate(data)}
    if not data:
        raise UserError(f"{what}: there are none; give the rows of each client")
    found = {str(id): listed(f"{what}: {id!r}", data[id]) for id in sorted(data, key=str)}
    for id in found:
        if known and id not in known:
            raise UserError(f"{what}: {unknown('client', id, known)}")
    if empty := next((id for id, rows in found.items() if not len(rows)), None):
        raise UserError(f"{what}: {empty!r} has no rows; leave this client out")
    return found


def listed(what: str, data: Data) -> Sequence[Any]:
    """The rows as something with a length and an index. Raises UserError if they are neither that nor an
    iterable."""
    if (
        hasattr(data, "__getitem__")
        and hasattr(data, "__len__")
        and not isinstance(data, Mapping | str)
    ):
        return data  # pyright: ignore
    if not isinstance(data, Iterable) or isinstance(data, Mapping | str):
        raise UserError(
            f"{what}: expected rows, such as a list or a data set, got {type(data).__name__}"
        )
    return list(data)


def read_settings(settings: Mapping[str, Any], ranks: Any, clients: Sequence[str]) -> Settings:
    """The settings, with the ranks among them. Raises UserError, naming the setting."""
    lora = settings.get("lora") or {}
    if isinstance(lora, Mapping) and "ranks" in lora:
        raise UserError("lora.ranks: give the ranks as ranks=...")
    if isinstance(ranks, Mapping) and not {"clients", "shares"} & set(ranks):
        ranks = {"clients": {str(id): rank for id, rank in ranks.items()}}
    given = {**settings, "lora": {**lora, "ranks": ranks} if isinstance(lora, Mapping) else lora}
    try:
        config = Settings.model_validate(given)
    except ValidationError as error:
        raise UserError(explain(error, Settings)) from None
    check_count(config, len(clients))
    refuse_unknown_clients(config, clients)
    return config


def refuse_idle(
    config: Settings, everyone_keeps: bool, own: Mapping[str, Any], clients: Iterable[str]
) -> None:
    """Raises UserError for settings of run folders and data files, which nothing here would follow, and where
    nobody could evaluate. `everyone_keeps`: whether the method has no global model; `own`: the held-out rows
    of some of these `clients`."""
    for setting, given, instead in (
        ("checkpoints", "checkpoints" in config.model_fields_set, "nothing is written"),
        ("lora.start", config.lora.start, "merge the adapter into the model before"),
        ("evaluation.client_fraction", config.evaluation.client_fraction, "give client_held_out"),
        ("compute.cache_activations", config.compute.cache_activations, "rows may be anything"),
        ("participation.only", config.participation.only, "give the rows of these clients alone"),
        ("participation.pooled", config.participation.pooled, "give one client all rows"),
    ):
        if given:
            raise UserError(f"{setting}: not for a federation from Python; {instead}")
    if config.personal is not None and (lacking := [id for id in clients if id not in own]):
        raise UserError(
            f"personal: a personal model is judged on its client's own held-out rows, and {lacking[0]!r} has "
            "none; give client_held_out for every client"
        )
    if everyone_keeps and not own:
        raise UserError(
            f"method {config.method.name!r} has no global model, so that only the clients can evaluate; give "
            "client_held_out"
        )


def parameters_of(model: nn.Module, modules: Sequence[str]) -> list[str]:
    """The names of the parameters of these modules. Raises UserError for one that the model does not have."""
    known = dict(model.named_modules())
    names = []
    for module in modules:
        if module not in known:
            raise UserError(f"head: {unknown('module', module, [name for name in known if name])}")
        names += [f"{module}.{name}" for name, _ in known[module].named_parameters()]
    return names
